"""Problems to prompts: rendered with the chat template, tokenised, within the limits, and counted where they are not."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_gppo.config import DataConfig
from megatron_gppo.data.errors import BadRowError, DataError
from megatron_gppo.data.files import read_source
from megatron_gppo.data.schema import Columns, Problem, find_columns, problem_of
from megatron_gppo.data.stream import Share
from megatron_gppo.datatypes import Prompt

ROWS_PER_TOKENIZER_CALL = 1000  # a call runs them in parallel, and holds ten times the ids' memory meanwhile
KEPT_BAD_ROWS = 100  # messages; all are counted


class Origin(NamedTuple):
    """Where a prompt comes from."""

    place: str  # file and line or row
    source: int  # index of its source in the configuration's list
    question: str  # what its row's user messages say, without template, system prompt and suffix


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of all sources, in the sources' and their files' order, and what was left out."""

    prompts: list[Prompt]
    origins: list[Origin]  # of prompts, one each
    lengths: list[int]  # tokens of every row's prompt, those of dropped and cut ones included
    num_rows: int  # in the sources; Prompt.row counts these
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out, by reason
    num_truncated: int = 0
    bad_rows: list[str] = field(default_factory=list)  # messages of the first KEPT_BAD_ROWS bad rows

    def without(self, indices: Collection[int], reason: str) -> "PromptSet":
        """The set without some of its prompts, which are counted as dropped for this reason."""
        left = [index for index in range(len(self.prompts)) if index not in indices]
        return replace(
            self,
            prompts=[self.prompts[index] for index in left],
            origins=[self.origins[index] for index in left],
            dropped=self.dropped + Counter({reason: len(self.prompts) - len(left)}),
        )

    def without_bad(self, bad: dict[int, str], config: DataConfig) -> "PromptSet":
        """The set without prompts that something is wrong with; with data.on_bad_row: error the first is raised."""
        messages = [f"{self.origins[index].place}: {problem}" for index, problem in sorted(bad.items())]
        if messages and config.on_bad_row == "error":
            raise BadRowError(*messages[0].split(": ", 1))
        return replace(self.without(bad, "bad row"), bad_rows=(self.bad_rows + messages)[:KEPT_BAD_ROWS])

    def shares(self, config: DataConfig) -> list[Share] | None:
        """What PromptStream mixes by, where data.train has weights."""
        sizes = Counter(origin.source for origin in self.origins)
        weights = [source.weight for source in config.train]
        if any(weight is None for weight in weights):
            return None
        return [Share(sizes[index], weight) for index, weight in enumerate(weights) if weight is not None]

    def summary(self) -> str | None:
        """A line about what was left out or cut; None if nothing was."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.dropped.items()) if count]
        text = f"left out {sum(self.dropped.values())} of {self.num_rows} rows: {', '.join(parts)}" if parts else ""
        if self.num_truncated:
            text += f"{'; ' if text else ''}cut {self.num_truncated} prompts to data.max_prompt_tokens"
        return text or None


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    which: Literal["train", "eval"],
    field_name: str | None = None,
) -> PromptSet:
    """Reads, renders and tokenises the prompts of data.train or data.eval.

    Evaluation problems that are there several times, as in files prepared for avg@k, become one. field_name: what
    messages call the source instead of data.train or data.eval. Raises DataError on a source that cannot be read, a row
    that is not as the configuration says (unless data.on_bad_row: skip), and when nothing is left.
    """
    named = field_name or f"data.{which}"
    if not getattr(config, which):
        raise DataError(f"{named} is missing. Fix: name one or more files, folders or data sets on the hub")
    return _Loader(config, tokenizer, which, named).load()


class _Loader:
    """What a load has gathered so far."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, which: str, named: str) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._sources = config.train if which == "train" else config.eval
        self._merges_duplicates = which == "eval"
        self._named = named
        self._prompts: list[Prompt] = []
        self._origins: list[Origin] = []
        self._lengths: list[int] = []
        self._num_rows = 0
        self._num_truncated = 0
        self._dropped: Counter[str] = Counter()
        self._bad_rows: list[str] = []

    def load(self) -> PromptSet:
        """Raises DataError for a bad row (or leaves it out), and where no prompt is left."""
        for index, source in enumerate(self._sources):
            problems = self._problems(index)
            while batch := list(itertools.islice(problems, ROWS_PER_TOKENIZER_CALL)):
                self._add(batch, index)
            if source.weight is not None and not any(origin.source == index for origin in self._origins):
                raise DataError(f"{self._named}: {source.label} has a weight but no usable prompt. Fix: remove it")
        labels = f"{self._named} = {', '.join(source.label for source in self._sources)}"
        if self._num_rows == 0:
            raise DataError(f"{labels}: no rows. Fix: give files that hold prompts")
        if not self._prompts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._dropped.items())
            if self._bad_rows:
                raise DataError(f"{labels}: none of {self._num_rows} rows can be used: {reasons}. {self._bad_rows[0]}")
            raise DataError(
                f"{labels}: none of {self._num_rows} rows can be used: {reasons}. Fix: raise data.max_prompt_tokens "
                f"({self._config.max_prompt_tokens}) for rows that are too long; see megatron-gppo data preview"
            )
        return PromptSet(
            self._prompts,
            self._origins,
            self._lengths,
            self._num_rows,
            self._dropped,
            self._num_truncated,
            self._bad_rows,
        )

    def _problems(self, index: int) -> Iterator[tuple[int, Problem, str]]:
        """Row number, problem and rendered text of a source's rows that can be used."""
        source = self._sources[index]
        columns: Columns | None = None
        ids: dict[str, Problem] = {}
        seen: dict[str, Problem] = {}  # evaluation: by text
        for row in read_source(source, self._named):
            number = self._num_rows
            self._num_rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                columns = columns or find_columns(row, source, self._config)
                problem = problem_of(row, columns, self._config)
                text = self._render(problem)
                if self._merges_duplicates and _is_repeated(problem, text, seen):
                    self._dropped["repeated problem"] += 1
                    continue
                _check_id(problem, ids)
            except BadRowError as error:
                if self._config.on_bad_row == "error":
                    raise
                self._dropped["bad row"] += 1
                if len(self._bad_rows) < KEPT_BAD_ROWS:
                    self._bad_rows.append(str(error))
                continue
            yield number, problem, text

    def _add(self, batch: list[tuple[int, Problem, str]], source: int) -> None:
        limit = self._config.max_prompt_tokens
        # The template has already written every special token.
        token_ids = self._tokenizer(
            [text for _, _, text in batch], add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        for (row, problem, text), ids in zip(batch, token_ids, strict=True):
            self._lengths.append(len(ids))
            if len(ids) > limit:
                if self._config.long_prompts == "drop":
                    self._dropped["too long"] += 1
                    continue
                self._num_truncated += 1
                ids = ids[-limit:]
                text = self._tokenizer.decode(ids)
            self._prompts.append(Prompt(row, ids, text, problem.ground_truth, problem.data_source))
            self._origins.append(Origin(problem.place, source, problem.question))

    def _render(self, problem: Problem) -> str:
        try:
            return self._tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise BadRowError(
                problem.place,
                f"the chat template of {self._tokenizer.name_or_path} refuses the messages ({error}). Fix: change the row",
            ) from error


def _is_repeated(problem: Problem, text: str, seen: dict[str, Problem]) -> bool:
    """Whether this problem was there before. Raises BadRowError if it was, with another answer."""
    first = seen.setdefault(text, problem)
    if first is problem:
        return False
    if first.ground_truth != problem.ground_truth:
        raise BadRowError(
            problem.place,
            f"the same prompt as {first.place}, but the answer {problem.ground_truth!r} instead of "
            f"{first.ground_truth!r}. Fix: remove one of them",
        )
    return True


def _check_id(problem: Problem, ids: dict[str, Problem]) -> None:
    if problem.id is not None and (first := ids.setdefault(problem.id, problem)) is not problem:
        raise BadRowError(
            problem.place,
            f"its id {problem.id} is that of {first.place}, too. Fix: remove one of them, set data.id_column to another "
            "column, or list files that number their rows each from the start as several sources",
        )
