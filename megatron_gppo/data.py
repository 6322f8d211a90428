"""Prompts: from the user's files to an endless, resumable stream of tokenised problems.

    files -> rows (each with its place, for errors) -> chat messages -> text (chat template) -> Prompt -> PromptStream

Two forms of rows are known. Chat rows:

    {"prompt": [{"role": "user", "content": "What is 6*7?"}], "reward_model": {"ground_truth": "42"}, "data_source": "math"}

and plain rows, whose columns data.question_column and data.answer_column name:

    {"question": "What is 6*7?", "answer": 42}
"""

import glob
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_gppo.config import DataConfig
from megatron_gppo.datatypes import Prompt

ROWS_PER_TOKENIZER_CALL = 1000  # a call runs them in parallel, and holds ten times the ids' memory meanwhile


class DataError(ValueError):
    """A mistake in the user's data. The message names file, row, field and fix."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of all files, in the files' order."""

    prompts: list[Prompt]
    num_rows: int  # in the files; Prompt.row counts these
    num_too_long: int  # left out: longer than data.max_prompt_tokens


class PromptStream:
    """An endless stream over the prompts, epoch after epoch, that is resumed by one integer.

    The order of an epoch depends on seed and epoch alone, so the prompt at a position is always the same one,
    however it was reached: ``PromptStream(..., position=k)`` continues where a stream stood after k prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], *, shuffle: bool, seed: int, position: int = 0) -> None:
        if not prompts:
            raise DataError("there are no prompts to draw from")
        if position < 0:
            raise ValueError(f"position = {position} is negative")
        self._prompts = prompts
        self._shuffle = shuffle
        self._seed = seed
        self._position = position
        self._epoch = -1  # the epoch that _order belongs to
        self._order: Sequence[int] = []

    @property
    def position(self) -> int:
        """Prompts taken since the beginning of the first epoch."""
        return self._position

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; across the end of an epoch they come from two epochs."""
        return [self._next() for _ in range(n)]

    def _next(self) -> Prompt:
        epoch, index = divmod(self._position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        self._position += 1
        return self._prompts[self._order[index]]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._prompts))
        # RandomState, because NumPy freezes its streams for ever and reserves the right to change Generator's:
        # a run must resume in the same order after an upgrade.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
        return random.permutation(len(self._prompts)).tolist()


def load_tokenizer(hf_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local HF model folder. Raises DataError when there is none or it has no chat template."""
    if not hf_path.is_dir():
        raise DataError(f"model.hf_path = {hf_path}: no such folder. Fix: give a local HF model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
    except Exception as error:  # a broken file raises nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"model.hf_path = {hf_path}: no tokenizer can be loaded from it ({reason}). Fix: add the model's tokenizer files"
        ) from error
    # Without tokenizer.json the class that config.json names is built all the same, with an empty vocabulary.
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        raise DataError(
            f"model.hf_path = {hf_path}: its tokenizer has no vocabulary. Fix: add the model's tokenizer.json"
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"model.hf_path = {hf_path}: its tokenizer has no chat template. Fix: add the model's chat_template.jinja, "
            "or set chat_template in its tokenizer_config.json"
        )
    return tokenizer


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, which: Literal["train", "eval"]) -> PromptSet:
    """Reads, renders and tokenises the prompts of data.train or data.eval.

    Raises DataError on a file that cannot be read, a row that is not as the config says, and when nothing is left.
    """
    paths = _paths(config, which)
    prompts: list[Prompt] = []
    num_rows = 0
    for path in paths:
        rows = _read(path)
        while batch := list(itertools.islice(rows, ROWS_PER_TOKENIZER_CALL)):
            problems = [_problem(row, config) for row in batch]
            texts = [
                _render(tokenizer, problem, config, row.place) for row, problem in zip(batch, problems, strict=True)
            ]
            # The template has already written every special token.
            token_ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for problem, text, ids in zip(problems, texts, token_ids, strict=True):
                if len(ids) <= config.max_prompt_tokens:
                    prompts.append(Prompt(num_rows, ids, text, problem.ground_truth, problem.data_source))
                num_rows += 1
    named = f"data.{which} = {', '.join(map(str, paths))}"
    if num_rows == 0:
        raise DataError(f"{named}: no rows. Fix: give files that hold prompts")
    if not prompts:
        raise DataError(
            f"{named}: all {num_rows} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens}. Fix: raise it"
        )
    return PromptSet(prompts, num_rows, num_rows - len(prompts))


class _Row(NamedTuple):
    path: Path
    place: str  # file and line or row, both from 1, for errors
    fields: dict[str, Any]


class _Problem(NamedTuple):
    messages: list[dict[str, Any]]
    ground_truth: str
    data_source: str


def _paths(config: DataConfig, which: Literal["train", "eval"]) -> list[Path]:
    value = config.train if which == "train" else config.eval
    paths = [value] if isinstance(value, Path) else value
    if not paths:
        raise DataError(f"data.{which} is missing. Fix: name one or more .jsonl, .json or .parquet files")
    for path in paths:
        if not path.is_file():
            raise DataError(f"data.{which} = {path}: no such file. Fix: give the path of an existing file")
        if path.suffix not in (".jsonl", ".json", ".parquet"):
            raise DataError(
                f"data.{which} = {path}: unknown extension {path.suffix!r}. Fix: convert it to .jsonl, .json or .parquet"
            )
    return paths


def _read(path: Path) -> Iterator[_Row]:
    # IterableDataset reads the file itself, where load_dataset asks the hub first (and waits, where there is none).
    if path.suffix == ".parquet":
        return _read_parquet(path)
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _read_json_array(path) if start.startswith(b"[") else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[_Row]:
    # As lines of text, not with the JSON reader of `datasets`: that one loses line numbers, fails on blank lines,
    # turns answers that look like dates into timestamps, and lets a row's type depend on the other rows.
    lines = datasets.IterableDataset.from_text(glob.escape(str(path)), encoding="utf-8-sig")
    try:
        for number, line in enumerate(lines, start=1):
            if not line["text"].strip():
                continue
            place = f"{path}, line {number}"
            try:
                fields = json.loads(line["text"])
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not valid JSON ({error}). Fix: write one JSON object a line") from None
            yield _Row(path, place, _as_object(fields, place))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _read_json_array(path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not a valid JSON array ({error}). Fix: write one array of objects, or one object a line"
        ) from None
    for number, fields in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        yield _Row(path, place, _as_object(fields, place))


def _read_parquet(path: Path) -> Iterator[_Row]:
    try:
        rows = datasets.IterableDataset.from_parquet(glob.escape(str(path)), batch_size=1000)
        for number, fields in enumerate(rows, start=1):
            yield _Row(path, f"{path}, row {number}", fields)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"{path}: not a readable Parquet file ({error}). Fix: write or copy it again") from error


def _as_object(fields: Any, place: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: holds {_kind(fields)}, not an object. Fix: write each row as {{...}}")
    return fields


def _not_utf8(path: Path) -> DataError:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return DataError(f"{path}, line {line}: not valid UTF-8. Fix: save the file as UTF-8")
    raise AssertionError(f"{path} changed while it was read")


def _problem(row: _Row, config: DataConfig) -> _Problem:
    if config.question_column is not None and config.answer_column is not None:
        question = _text(row, config.question_column, "fix the row, or change data.question_column")
        ground_truth = _ground_truth(row, config.answer_column, "fix the row, or change data.answer_column")
        data_source = row.path.stem
        if row.fields.get("data_source") is not None:
            data_source = _text(row, "data_source", "fix the row")
        return _Problem([{"role": "user", "content": question}], ground_truth, data_source)
    return _Problem(
        _messages(row, config),
        _ground_truth(row, "reward_model.ground_truth", "fix the row"),
        _text(row, "data_source", "add the name of the data set, as text"),
    )


def _messages(row: _Row, config: DataConfig) -> list[dict[str, Any]]:
    name = config.prompt_column
    prompt = _value(
        row,
        name,
        "fix the row, or change data.prompt_column; for plain rows set data.question_column and data.answer_column",
    )
    if not isinstance(prompt, list):
        raise DataError(
            f"{row.place}: {name} is {_kind(prompt)}, not a list of messages. Fix: write [{{role, content}}, ...], "
            "or for plain rows set data.question_column and data.answer_column"
        )
    messages = []
    for index, message in enumerate(prompt):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{row.place}: {name}[{index}] has no text as {key}. Fix: write each message as {{role, content}}"
                )
        # Parquet has every key in every message; templates take one that is there for a value.
        messages.append({key: value for key, value in message.items() if value is not None})
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{row.place}: {name} is an empty prompt. Fix: fill it in, or remove the row")
    if config.system_prompt is not None and messages[0]["role"] == "system":
        raise DataError(
            f"{row.place}: {name} has a system message of its own, beside data.system_prompt. Fix: remove either"
        )
    return messages


def _ground_truth(row: _Row, name: str, fix: str) -> str:
    value = _value(row, name, fix)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _text(row, name, fix)


def _text(row: _Row, name: str, fix: str) -> str:
    value = _value(row, name, fix)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name} is {_kind(value)}, not text. Fix: {fix}")
    if not value.strip():
        raise DataError(f"{row.place}: {name} is empty. Fix: fill it in, or remove the row")
    return value


def _value(row: _Row, name: str, fix: str) -> Any:
    """The value of a field, by its name or, for one inside an object, by a dotted name."""
    value = row.fields.get(name)
    if value is None:
        value = row.fields
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if value is None or value != value:  # pandas writes what is missing as NaN
        raise DataError(
            f"{row.place}: {name} is missing; the row has {', '.join(row.fields) or 'no fields'}. Fix: {fix}"
        )
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else f"of type {type(value).__name__}")


def _render(tokenizer: PreTrainedTokenizerBase, problem: _Problem, config: DataConfig, place: str) -> str:
    messages = problem.messages
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise DataError(
            f"{place}: the chat template of {tokenizer.name_or_path} refuses the messages ({error}). Fix: change the row"
        ) from error
