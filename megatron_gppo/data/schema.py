"""Rows to problems: what is asked, and what the answer is.

Columns are those that the configuration names, or else recognised from a source's first row:

    chat        {"prompt": [{"role": "user", "content": "What is 6*7?"}], "reward_model": {"ground_truth": "42"}, "data_source": "math"}
    plain       {"question": "What is 6*7?", "answer": 42}     also with `problem` instead of `question`
    GSM8K       {"question": "What is 6*7?", "answer": "6*7 is ... #### 42"}

and the id from `id` or `unique_id`, where there is one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_gppo.config import ColumnsConfig, DataConfig
from megatron_gppo.data.errors import BadRowError
from megatron_gppo.data.files import Row, kind

GSM8K_MARK = "####"
CHAT_ANSWER = "reward_model.ground_truth"
QUESTION_COLUMNS = ("question", "problem")
ID_COLUMNS = ("id", "unique_id")


class Columns(NamedTuple):
    """Where the rows of a source hold what is needed."""

    prompt: str | None  # a list of messages
    question: str | None  # text; one of the two is set
    answer: str
    id: str | None  # None where rows have no id
    id_required: bool  # the configuration names it


@dataclass(frozen=True, slots=True)
class Problem:
    """A row, checked."""

    place: str  # file and line or row
    messages: list[dict[str, Any]]  # as the chat template takes them, suffix and system prompt included
    question: str  # what the row's own user messages say
    ground_truth: str
    data_source: str
    id: str | None


def find_columns(row: Row, source: ColumnsConfig, data: DataConfig) -> Columns:
    """The columns of a source: its own, or else those of the data section, or else those that its row has.

    Raises BadRowError when they are not recognised.
    """
    named = source if (source.prompt_column or source.question_column) else data
    id_column = source.id_column or data.id_column
    found_id = id_column or next((name for name in ID_COLUMNS if name in row.fields), None)
    rest = (found_id, id_column is not None)
    if named.question_column is not None:
        assert named.answer_column is not None
        return Columns(None, named.question_column, named.answer_column, *rest)
    if named.prompt_column is not None:
        return Columns(named.prompt_column, None, named.answer_column or CHAT_ANSWER, *rest)
    if "prompt" in row.fields and ("reward_model" in row.fields or isinstance(row.fields["prompt"], list)):
        return Columns("prompt", None, CHAT_ANSWER, *rest)
    for question in QUESTION_COLUMNS:
        if question in row.fields and "answer" in row.fields:
            return Columns(None, question, "answer", *rest)
    raise BadRowError(
        row.place,
        f"its columns are not recognised; the row has {', '.join(row.fields) or 'no fields'}. Fix: set data.question_column "
        "and data.answer_column for text, data.prompt_column for messages",
    )


def problem_of(row: Row, columns: Columns, config: DataConfig) -> Problem:
    """Checks a row. Raises BadRowError."""
    if columns.question is not None:
        question = _text(row, columns.question, "fix the row, or change data.question_column")
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        data_source = row.origin
        if row.fields.get("data_source") is not None:
            data_source = _text(row, "data_source", "fix the row")
    else:
        assert columns.prompt is not None
        messages = _messages(row, columns.prompt)
        question = "\n".join(message["content"] for message in messages if message["role"] == "user")
        # Chat rows of other answer columns come from elsewhere and need not have one.
        if columns.answer == CHAT_ANSWER or row.fields.get("data_source") is not None:
            data_source = _text(row, "data_source", "add the name of the data set, as text")
        else:
            data_source = row.origin
    return Problem(
        place=row.place,
        messages=_with_additions(messages, row, config),
        question=question,
        ground_truth=_ground_truth(row, columns.answer),
        data_source=data_source,
        id=_id(row, columns),
    )


def _messages(row: Row, name: str) -> list[dict[str, Any]]:
    prompt = _value(
        row,
        name,
        "fix the row, or change data.prompt_column; for plain rows set data.question_column and data.answer_column",
    )
    if not isinstance(prompt, list):
        raise BadRowError(
            row.place,
            f"{name} is {kind(prompt)}, not a list of messages. Fix: write [{{role, content}}, ...], "
            "or for plain rows set data.question_column and data.answer_column",
        )
    messages = []
    for index, message in enumerate(prompt):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise BadRowError(
                    row.place,
                    f"{name}[{index}] has no text as {key}. Fix: write each message as {{role, content}}",
                )
            _check_unicode(row, f"{name}[{index}].{key}", message[key])
        # Parquet has every key in every message; templates take one that is there for a value.
        messages.append({key: value for key, value in message.items() if value is not None})
    if not any(message["content"].strip() for message in messages):
        raise BadRowError(row.place, f"{name} is an empty prompt. Fix: fill it in, or remove the row")
    return messages


def _with_additions(messages: list[dict[str, Any]], row: Row, config: DataConfig) -> list[dict[str, Any]]:
    """The messages with data.system_prompt and data.prompt_suffix."""
    if config.prompt_suffix is not None:
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise BadRowError(
                row.place, "there is no user message to put data.prompt_suffix after. Fix: change the row, or remove it"
            )
        content = messages[users[-1]]["content"]
        # Rows that were prepared for another trainer often have it.
        if not content.rstrip().endswith(config.prompt_suffix.strip()):
            changed = {**messages[users[-1]], "content": content + config.prompt_suffix}
            messages = [changed if index == users[-1] else message for index, message in enumerate(messages)]
    if config.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise BadRowError(
                row.place, "prompt has a system message of its own, beside data.system_prompt. Fix: remove either"
            )
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return messages


def _ground_truth(row: Row, name: str) -> str:
    fix = "fix the row" if name == CHAT_ANSWER else "fix the row, or change data.answer_column"
    value = _value(row, name, fix)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    text = _text(row, name, fix)
    _, mark, after = text.rpartition(GSM8K_MARK)
    if mark and not after.strip():
        raise BadRowError(row.place, f"{name} has nothing after {GSM8K_MARK}. Fix: {fix}")
    return after.strip() if mark else text


def _id(row: Row, columns: Columns) -> str | None:
    if columns.id is None or (not columns.id_required and row.fields.get(columns.id) is None):
        return None
    value = _value(row, columns.id, "fix the row, or change data.id_column")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise BadRowError(
            row.place, f"{columns.id} is {kind(value)}, not text or a whole number. Fix: change data.id_column"
        )
    return str(value)


def _text(row: Row, name: str, fix: str) -> str:
    value = _value(row, name, fix)
    if not isinstance(value, str):
        raise BadRowError(row.place, f"{name} is {kind(value)}, not text. Fix: {fix}")
    if not value.strip():
        raise BadRowError(row.place, f"{name} is empty. Fix: fill it in, or remove the row")
    _check_unicode(row, name, value)
    return value


def _check_unicode(row: Row, name: str, text: str) -> None:
    """Lone surrogates: JSON can spell them, and neither tokenizers nor files take them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError(
            row.place,
            f"{name} is not valid Unicode: it was not UTF-8, or half a character. Fix: correct or remove the row",
        ) from None


def _value(row: Row, name: str, fix: str) -> Any:
    """The value of a field, by its name or, for one inside an object, by a dotted name."""
    value = row.fields.get(name)
    if value is None:
        value = row.fields
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if value is None or value != value:  # pandas writes what is missing as NaN
        raise BadRowError(
            row.place, f"{name} is missing; the row has {', '.join(row.fields) or 'no fields'}. Fix: {fix}"
        )
    return value
