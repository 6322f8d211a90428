import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_gppo.config import DataConfig
from megatron_gppo.data import DataError, PromptSet, load_prompts, load_tokenizer
from megatron_gppo.data.prompts import ROWS_PER_TOKENIZER_CALL
from tests.support.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def chat_row(question: str = "1+1=", ground_truth: Any = "2", **fields: Any) -> dict[str, Any]:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": ground_truth, "style": "rule"},
        **fields,
    }


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(tokenizer: Any, *paths: Path, **config: Any) -> PromptSet:
    return load_prompts(DataConfig(train=list(paths), **config), tokenizer, "train")


def error_of(tokenizer: Any, *paths: Path, **config: Any) -> str:
    with pytest.raises(DataError) as error:
        load(tokenizer, *paths, **config)
    assert "Fix:" in str(error.value)
    return str(error.value)


def test_chat_rows_become_prompts(tmp_path: Path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [chat_row(), chat_row("2*(3+4)=", 14, data_source="products")])
    loaded = load(tokenizer, file)
    assert (loaded.num_rows, loaded.dropped) == (2, {})
    first, second = loaded.prompts
    assert first.text == "<user>1+1=<assistant>"
    assert tokenizer.convert_ids_to_tokens(first.token_ids) == ["<user>", "1", "+", "1", "=", "<assistant>"]
    assert (first.row, first.ground_truth, first.data_source) == (0, "2", "sums")
    assert second.text == "<user>2*(3+4)=<assistant>"
    assert (second.row, second.ground_truth, second.data_source) == (1, "14", "products")


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path: Path, tokenizer):
    rows = [chat_row(f"{n}+{n}=", str(2 * n)) for n in range(5)]
    rows[2]["prompt"].insert(0, {"role": "system", "content": "add"})
    array = tmp_path / "array.json"
    array.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    spaced = tmp_path / "spaced [x]*.jsonl"  # not a glob
    spaced.write_text("\ufeff\n" + "\r\n \r\n".join(json.dumps(row) for row in rows), encoding="utf-8", newline="")
    lines = load(tokenizer, write_lines(tmp_path / "a.jsonl", rows)).prompts
    assert load(tokenizer, write_lines(tmp_path / "lines.json", rows)).prompts == lines
    assert load(tokenizer, array).prompts == lines
    assert load(tokenizer, spaced).prompts == lines
    assert load(tokenizer, write_parquet(tmp_path / "a.parquet", rows)).prompts == lines
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load(tokenizer, tmp_path / "saved").prompts == lines
    assert load(tokenizer, next((tmp_path / "saved").glob("*.arrow"))).prompts == lines


def test_rows_are_counted_over_all_files(tmp_path: Path, tokenizer):
    first = write_lines(tmp_path / "a.jsonl", [chat_row("1=", "1"), chat_row("1+1+1+1=", "4"), chat_row("3=", "3")])
    second = write_parquet(tmp_path / "b.parquet", [chat_row("2+2+2+2=", "8"), chat_row("5=", "5")])
    loaded = load(tokenizer, first, second, max_prompt_tokens=4)
    assert [(prompt.row, prompt.ground_truth) for prompt in loaded.prompts] == [(0, "1"), (2, "3"), (4, "5")]
    assert (loaded.num_rows, loaded.dropped) == (5, {"too long": 2})


def test_a_prompt_of_exactly_the_limit_stays(tmp_path: Path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [chat_row("1+1=")])
    assert len(load(tokenizer, file, max_prompt_tokens=6).prompts[0].token_ids) == 6
    assert "none of 1 rows can be used: 1 too long. Fix: raise data.max_prompt_tokens (5)" in error_of(
        tokenizer, file, max_prompt_tokens=5
    )


def test_where_no_row_is_good_the_first_bad_one_is_named(tmp_path: Path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [chat_row("")])
    message = error_of(tokenizer, file, on_bad_row="skip")
    assert "none of 1 rows can be used: 1 bad row." in message
    assert f"{file}, line 1" in message
    assert "max_prompt_tokens" not in message


def test_plain_rows_by_the_names_of_their_columns(tmp_path: Path, tokenizer):
    columns = {"question_column": "problem", "answer_column": "solution.final"}
    rows = [
        {"problem": "6*7=", "solution": {"final": 42}, "data_source": "products"},
        {"problem": "1/2=", "solution": {"final": 0.5}},
        {"problem": "when?", "solution": {"final": "2024-01-02"}},  # text that readers like to take for a date
    ]
    prompts = load(tokenizer, write_lines(tmp_path / "mine.jsonl", rows), **columns).prompts
    assert [prompt.text for prompt in prompts] == [f"<user>{row['problem']}<assistant>" for row in rows]
    assert [prompt.ground_truth for prompt in prompts] == ["42", "0.5", "2024-01-02"]
    assert [prompt.data_source for prompt in prompts] == ["products", "mine", "mine"]


def test_a_column_may_have_a_dot_in_its_name(tmp_path: Path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"q.text": "1=", "a": "1"}])
    assert load(tokenizer, file, question_column="q.text", answer_column="a").prompts[0].text == "<user>1=<assistant>"


def test_a_system_prompt_comes_first(tmp_path: Path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [chat_row("1+1=")])
    assert load(tokenizer, file, system_prompt="add: ").prompts[0].text == "<user>add: <user>1+1=<assistant>"
    rows = [chat_row(prompt=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "1="}])]
    message = error_of(tokenizer, write_lines(tmp_path / "b.jsonl", rows), system_prompt="add: ")
    assert "line 1: prompt has a system message of its own" in message


def test_eval_reads_its_own_files(tmp_path: Path, tokenizer):
    config = DataConfig(
        train=write_lines(tmp_path / "train.jsonl", [chat_row("1=")]),
        eval=write_lines(tmp_path / "eval.jsonl", [chat_row("2=")]),
    )
    assert load_prompts(config, tokenizer, "train").prompts[0].text == "<user>1=<assistant>"
    assert load_prompts(config, tokenizer, "eval").prompts[0].text == "<user>2=<assistant>"
    with pytest.raises(DataError, match=r"data\.eval is missing.*Fix"):
        load_prompts(DataConfig(train=config.train), tokenizer, "eval")


def test_many_rows_keep_their_order_across_tokenizer_calls(tmp_path: Path, tokenizer):
    count = 2 * ROWS_PER_TOKENIZER_CALL + 1
    file = write_lines(tmp_path / "a.jsonl", [chat_row(f"{n}=", n) for n in range(count)])
    prompts = load(tokenizer, file).prompts
    assert [prompt.row for prompt in prompts] == list(range(count))
    assert [prompt.text for prompt in prompts] == [f"<user>{n}=<assistant>" for n in range(count)]
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]


BAD_ROWS = [
    # what is wrong with the row, and words that the error must have
    ({"reward_model": None}, ["reward_model.ground_truth is missing"]),
    ({"reward_model": {"style": "rule"}}, ["reward_model.ground_truth is missing"]),
    ({"reward_model": "2"}, ["reward_model.ground_truth is missing"]),
    ({"reward_model": {"ground_truth": None}}, ["reward_model.ground_truth is missing"]),
    ({"reward_model": {"ground_truth": math.nan}}, ["reward_model.ground_truth is missing"]),
    ({"reward_model": {"ground_truth": " "}}, ["reward_model.ground_truth is empty"]),
    ({"reward_model": {"ground_truth": ["2"]}}, ["reward_model.ground_truth is a list, not text"]),
    ({"reward_model": {"ground_truth": True}}, ["reward_model.ground_truth is true or false, not text"]),
    ({"data_source": None}, ["data_source is missing"]),
    ({"data_source": 3}, ["data_source is a number, not text"]),
    ({"prompt": None}, ["prompt is missing", "question_column"]),
    ({"prompt": "1+1="}, ["prompt is text, not a list of messages", "question_column"]),
    ({"prompt": {"role": "user", "content": "1="}}, ["prompt is an object, not a list"]),
    ({"prompt": []}, ["prompt is an empty prompt"]),
    ({"prompt": [{"role": "user", "content": " \n"}]}, ["prompt is an empty prompt"]),
    ({"prompt": ["1+1="]}, ["prompt[0] has no text as role"]),
    ({"prompt": [{"role": "user", "content": "1="}, {"role": "user"}]}, ["prompt[1] has no text as content"]),
    ({"prompt": [{"role": "user", "content": 3}]}, ["prompt[0] has no text as content"]),
]


@pytest.mark.parametrize(("fields", "words"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, tokenizer, fields: dict[str, Any], words: list[str]):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(chat_row()), "", json.dumps(chat_row(**fields)), json.dumps(chat_row())]
    file.write_text("\n".join(lines))
    message = error_of(tokenizer, write_lines(tmp_path / "good.jsonl", [chat_row()] * 5), file)
    for word in [f"{file}, line 3: ", *words]:
        assert word in message


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_a_bad_row_of_another_kind_of_file_is_named_by_file_and_row(tmp_path: Path, tokenizer, extension: str):
    rows = [chat_row(), chat_row(), chat_row(ground_truth=None)]
    file = tmp_path / f"a.{extension}"
    if extension == "parquet":
        write_parquet(file, rows)
    else:
        file.write_text(json.dumps(rows))
    assert f"{file}, row 3: reward_model.ground_truth is missing" in error_of(tokenizer, file)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"question": None},
            "question is missing; the row has question, answer. Fix: fix the row, or change data.ques",
        ),
        ({"question": " "}, "question is empty"),
        ({"question": ["1="]}, "question is a list, not text"),
        ({"answer": None}, "answer is missing"),
        ({"answer": ""}, "answer is empty"),
        ({"data_source": 3}, "data_source is a number"),
    ],
)
def test_a_bad_plain_row(tmp_path: Path, tokenizer, fields: dict[str, Any], words: str):
    file = write_lines(tmp_path / "a.jsonl", [{"question": "1=", "answer": "1"} | fields])
    message = error_of(tokenizer, file, question_column="question", answer_column="answer")
    assert f"{file}, line 1: {words}" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'\n{"prompt": \n', "line 2: not valid JSON"),
        ("a.jsonl", b"3\n", "line 1: holds a number, not an object"),
        ("a.json", b'[{"prompt": ]', "not a valid JSON array"),
        ("a.json", b"[[]]", "row 1: holds a list, not an object"),
        ("a.jsonl", b"\n\n\xff\n", "line 3: not valid UTF-8"),
        ("a.json", b'[{"question": "\xff", "answer": 1}]', "row 1: question is not valid Unicode"),
        ("a.jsonl", b'{"question": "\\ud83d", "answer": 1}', "line 1: question is not valid Unicode"),
        ("a.jsonl", b"[" * 5000, "not a valid JSON array"),
        ("a.jsonl", b'{"a":' * 5000, "line 1: nested too deeply"),
        ("a.arrow", b"ARROW1, cut off", "not a readable Arrow stream file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.parquet", b"PAR1, cut off", "not a readable Parquet file"),
        ("a.csv", b"question,answer\n", "unknown extension '.csv'"),
        ("a", b"", "unknown extension ''"),
    ],
)
def test_a_file_that_holds_no_rows(tmp_path: Path, tokenizer, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    message = error_of(tokenizer, tmp_path / name)
    assert str(tmp_path / name) in message
    assert words in message


def test_a_cut_off_or_empty_parquet_file(tmp_path: Path, tokenizer):
    file = write_parquet(tmp_path / "a.parquet", [chat_row()] * 100)
    file.write_bytes(file.read_bytes()[:-200])
    assert "not a readable Parquet file" in error_of(tokenizer, file)
    datasets.Dataset.from_list([chat_row()]).select([]).to_parquet(file)
    assert "no rows" in error_of(tokenizer, file)


def test_a_missing_file_and_a_folder(tmp_path: Path, tokenizer):
    assert "no such file" in error_of(tokenizer, tmp_path / "missing.jsonl")
    assert "no such file" in error_of(tokenizer, tmp_path / "*.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "no .jsonl, .json, .parquet or .arrow file in this folder" in error_of(tokenizer, tmp_path / "folder.jsonl")


def test_messages_that_the_chat_template_refuses(tmp_path: Path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}..."
    messages = [{"role": "user", "content": "1="}] * 2
    file = write_lines(tmp_path / "a.jsonl", [chat_row(), chat_row(prompt=messages)])
    message = error_of(tokenizer, file)
    assert f"{file}, line 2: " in message
    assert "one at a time" in message


def test_load_tokenizer(tmp_path: Path, tokenizer):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = load_tokenizer(folder)
    text = "<user>1+1=<assistant>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template

    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"model\.hf_path = .*no chat template\. Fix"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match=r"model\.hf_path = .*no such folder\. Fix"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"model\.hf_path = .*no tokenizer can be loaded from it.*Fix"):
        load_tokenizer(tmp_path / "empty")
    for content in ("{", "{}"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"model\.hf_path = .*no tokenizer can be loaded from it.*Fix"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"model\.hf_path = .*its tokenizer has no vocabulary\. Fix"):
        load_tokenizer(folder)
