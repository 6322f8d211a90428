"""Where rows come from and what is recognised in them: folders, globs, splits, columns, duplicates, bad rows."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_gppo.config import DataConfig
from megatron_gppo.data import DataError, PromptSet, load_prompts
from tests.support.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(number: int, **fields: Any) -> dict[str, Any]:
    return {"question": f"{number}=", "answer": number, **fields}


def chat(number: int, **fields: Any) -> dict[str, Any]:
    """As in KlearReasoner-MathSub-30K."""
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": f"{number}="}],
        "ability": "math",
        "reward_model": {"ground_truth": str(number), "style": "rule"},
        **fields,
    }


def load(tokenizer: Any, source: Any, which: str = "train", **config: Any) -> PromptSet:
    return load_prompts(DataConfig(**{which: source}, **config), tokenizer, which)  # type: ignore[arg-type]


def answers(loaded: PromptSet) -> list[str]:
    return [prompt.ground_truth for prompt in loaded.prompts]


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "my-data"
    write(folder / "b.jsonl", plain(3))
    write(folder / "a" / "2.json", plain(2))
    datasets.Dataset.from_list([plain(1)]).to_parquet(folder / "a" / "1.parquet")
    write(folder / ".cache" / "hidden.jsonl", plain(9))
    (folder / "README.md").write_text("not data")
    assert answers(load(tokenizer, str(folder))) == ["1", "2", "3"]
    assert {prompt.data_source for prompt in load(tokenizer, str(folder)).prompts} == {"my-data"}
    assert answers(load(tokenizer, f"{folder}/**/*.json")) == ["2"]
    assert answers(load(tokenizer, [f"{folder}/b.*", f"{folder}/a/*.parquet"])) == ["3", "1"]


def test_a_folder_of_several_splits_wants_one_named(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", plain(1))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", plain(2))
    write(tmp_path / "test" / "0.jsonl", plain(3))
    with pytest.raises(DataError, match=r"holds several splits: test, train\. Fix: choose one, as \{path: "):
        load(tokenizer, str(tmp_path))
    assert answers(load(tokenizer, {"path": str(tmp_path), "split": "train"})) == ["1", "2"]
    assert answers(load(tokenizer, {"path": str(tmp_path), "split": "test"})) == ["3"]
    with pytest.raises(DataError, match="no file or folder in it is called dev"):
        load(tokenizer, {"path": str(tmp_path), "split": "dev"})


def test_a_dataset_dict_saved_to_disk(tmp_path: Path, tokenizer: Any) -> None:
    parts = {split: datasets.Dataset.from_list([plain(n)]) for n, split in enumerate(["train", "test"])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert answers(load(tokenizer, {"path": str(tmp_path / "saved"), "split": "test"})) == ["1"]


def test_the_hub_where_it_cannot_be_reached(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data.train.hub = someone/math, split test: .*set path instead") as error:
        load(tokenizer, {"hub": "someone/math", "split": "test"})
    assert "Fix: correct hub, subset and split" in str(error.value)


def test_the_hub_where_it_can(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.IterableDataset.from_generator(lambda: iter([plain(1), plain(2)]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load(tokenizer, {"hub": "someone/math", "subset": "main", "split": "test"})
    assert asked == [(("someone/math", "main"), {"split": "test", "streaming": True})]
    assert answers(loaded) == ["1", "2"]
    assert loaded.origins[1].place == "hub someone/math, split test, row 2"
    assert loaded.prompts[0].data_source == "math"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (chat(42), "42"),
        ({"question": "6*7=", "answer": "42"}, "42"),
        ({"problem": "6*7=", "answer": 42, "solution": "look it up"}, "42"),
        ({"question": "6*7=", "answer": "6*7 is <<6*7=42>> and so\n#### 1,042"}, "1,042"),
    ],
    ids=["chat", "question", "problem", "gsm8k"],
)
def test_columns_are_recognised(tmp_path: Path, tokenizer: Any, row: dict[str, Any], answer: str) -> None:
    assert answers(load(tokenizer, str(write(tmp_path / "a.jsonl", row)))) == [answer]


def test_columns_that_are_not_recognised_are_named_and_can_be_mapped(tmp_path: Path, tokenizer: Any) -> None:
    row = {"task": {"text": "1="}, "label": 1, "turns": [{"role": "user", "content": "2="}]}
    file = str(write(tmp_path / "a.jsonl", row))
    with pytest.raises(
        DataError, match=r"line 1: its columns are not recognised; the row has task, label, turns\. Fix"
    ):
        load(tokenizer, file)
    mapped = {"question_column": "task.text", "answer_column": "label"}
    assert load(tokenizer, file, **mapped).prompts[0].text == "<user>1=<assistant>"
    # A source's own columns replace those of the section as a whole.
    source = {"path": file, "prompt_column": "turns", "answer_column": "label"}
    loaded = load(tokenizer, source, **mapped).prompts[0]
    assert (loaded.text, loaded.data_source) == ("<user>2=<assistant>", "a")


def test_sources_of_several_forms_and_names(tmp_path: Path, tokenizer: Any) -> None:
    sources = [
        str(write(tmp_path / "a.jsonl", chat(1))),
        {"path": str(write(tmp_path / "b.jsonl", plain(2))), "name": "mine", "weight": 1.0},
        {"path": str(write(tmp_path / "c.jsonl", {"problem": "3=", "answer": "3"})), "weight": 2.0},
    ]
    with pytest.raises(ValueError, match=r"give every source of data\.train a weight, or none"):
        DataConfig(train=sources)
    loaded = load(tokenizer, [{"path": sources[0], "weight": 1.0}, *sources[1:]])
    assert [prompt.data_source for prompt in loaded.prompts] == ["math", "mine", "c"]
    config = DataConfig(train=[{"path": sources[0], "weight": 1.0}, *sources[1:]])
    assert loaded.shares(config) == [(1, 1.0), (1, 1.0), (1, 2.0)]
    assert loaded.shares(DataConfig(train=[sources[0]])) is None


def test_the_suffix_is_put_once(tmp_path: Path, tokenizer: Any) -> None:
    suffix = " answer in \\boxed{}."
    rows = [
        chat(1),
        chat(2, prompt=[{"role": "user", "content": "2= answer in \\boxed{}.\n"}]),
        chat(3, prompt=[{"role": m, "content": c} for m, c in (("user", "3"), ("assistant", "?"), ("user", "="))]),
    ]
    loaded = load(tokenizer, str(write(tmp_path / "a.jsonl", *rows)), prompt_suffix=suffix)
    assert [prompt.text for prompt in loaded.prompts] == [
        "<user>1= answer in \\boxed{}.<assistant>",
        "<user>2= answer in \\boxed{}.\n<assistant>",
        "<user>3<assistant>?<eos><user>= answer in \\boxed{}.<assistant>",
    ]
    assert [origin.question for origin in loaded.origins] == ["1=", "2= answer in \\boxed{}.\n", "3\n="]


def test_long_prompts_are_dropped_or_cut_from_the_left(tmp_path: Path, tokenizer: Any) -> None:
    file = str(write(tmp_path / "a.jsonl", {"question": "1+2+3=", "answer": 6}, {"question": "1=", "answer": 1}))
    dropped = load(tokenizer, file, max_prompt_tokens=4)
    assert (answers(dropped), dropped.dropped, dropped.lengths) == (["1"], {"too long": 1}, [8, 4])
    assert dropped.summary() == "left out 1 of 2 rows: 1 too long"
    cut = load(tokenizer, file, max_prompt_tokens=4, long_prompts="truncate_left")
    assert [prompt.text for prompt in cut.prompts] == ["+3=<assistant>", "<user>1=<assistant>"]
    assert [len(prompt.token_ids) for prompt in cut.prompts] == [4, 4]
    assert (cut.num_truncated, cut.dropped, cut.lengths) == (1, {}, [8, 4])
    assert cut.summary() == "cut 1 prompts to data.max_prompt_tokens"


BAD_LINES = [
    (b'{"question": "1="}', "answer is missing"),
    (b'{"question": ["1="], "answer": 1}', "question is a list, not text"),
    (b'{"question": " ", "answer": 1}', "question is empty"),
    (b'{"question": "1=", "answer": "#### "}', "answer has nothing after ####"),
    (b'{"question": "1=", "answer": 1, "id": 0}', "its id 0 is that of "),
    (b'{"question": "1=", "answer": 1, "id": 1.5}', "id is a number, not text or a whole number"),
    (b'{"question": "1\xff=", "answer": 1}', "not valid UTF-8"),
    (b'{"question": "\\udc00", "answer": 1}', "question is not valid Unicode"),
    (b'{"question": "1=", ', "not valid JSON"),
    (b"[]", "holds a list, not an object"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_row_is_an_error_that_names_it(tmp_path: Path, tokenizer: Any, line: bytes, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(plain(0, id=0)).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="Fix: ") as error:
        load(tokenizer, str(file))
    assert f"{file}, line 2: {words}" in str(error.value)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(plain(0, id=0)).encode(), *(line for line, _ in BAD_LINES), json.dumps(plain(1, id=7)).encode()]
    file.write_bytes(b"\n".join(lines))
    loaded = load(tokenizer, str(file), on_bad_row="skip")
    assert [(prompt.row, prompt.ground_truth) for prompt in loaded.prompts] == [(0, "0"), (len(BAD_LINES) + 1, "1")]
    assert loaded.dropped == {"bad row": len(BAD_LINES)}
    for number, (message, (_, words)) in enumerate(zip(loaded.bad_rows, BAD_LINES, strict=True), start=2):
        assert f"{file}, line {number}: {words}" in message


def test_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path, tokenizer: Any) -> None:
    texts = pyarrow.array([b"1=", b"\xff=", b"3="]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    table = pyarrow.table({"question": column, "answer": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    loaded = load(tokenizer, str(tmp_path / "a.parquet"), on_bad_row="skip")
    assert answers(loaded) == ["1", "3"]
    assert "row 2: not valid UTF-8" in loaded.bad_rows[0]


def test_repeated_evaluation_problems_are_one(tmp_path: Path, tokenizer: Any) -> None:
    """As in files of AIME problems prepared for avg@32: JSON lines called .json, each problem 32 times."""
    file = str(write(tmp_path / "aime.json", *[chat(n, id=n) for n in (5, 6) for _ in range(32)]))
    loaded = load(tokenizer, file, "eval")
    assert answers(loaded) == ["5", "6"]
    assert (loaded.num_rows, loaded.dropped) == (64, {"repeated problem": 62})
    with pytest.raises(DataError, match=r"line 2: its id 5 is that of .*line 1, too"):
        load(tokenizer, file)
    other = str(write(tmp_path / "b.jsonl", plain(1), {"question": "1=", "answer": 2}))
    with pytest.raises(DataError, match=r"line 2: the same prompt as .*line 1, but the answer '2' instead of '1'"):
        load(tokenizer, other, "eval")
    assert len(load(tokenizer, other).prompts) == 2


def test_ids_are_unique_within_a_source_only(tmp_path: Path, tokenizer: Any) -> None:
    files = [str(write(tmp_path / name, plain(n, uid=0))) for n, name in enumerate(["a.jsonl", "b.jsonl"])]
    assert len(load(tokenizer, files, id_column="uid").prompts) == 2
    with pytest.raises(DataError, match=r"b.jsonl, line 1: its id 0 is that of .*a.jsonl, line 1"):
        load(tokenizer, str(tmp_path), id_column="uid")
    with pytest.raises(DataError, match="line 1: number is missing"):
        load(tokenizer, files, id_column="number")


def test_prompts_found_bad_later_are_bad_rows_too(tmp_path: Path, tokenizer: Any) -> None:
    file = str(write(tmp_path / "a.jsonl", *map(plain, range(3))))
    loaded = load(tokenizer, file)
    left = loaded.without_bad({1: "wrong"}, DataConfig(train=file, on_bad_row="skip"))
    assert answers(left) == ["0", "2"]
    assert [origin.place.rpartition(" ")[2] for origin in left.origins] == ["1", "3"]
    assert (left.dropped, left.bad_rows) == ({"bad row": 1}, [f"{file}, line 2: wrong"])
    with pytest.raises(DataError, match=f"^{file}, line 2: wrong$"):
        loaded.without_bad({1: "wrong"}, DataConfig(train=file))
