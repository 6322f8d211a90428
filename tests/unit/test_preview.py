"""What `megatron-gppo data preview` prints."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_gppo import cli
from megatron_gppo.preview import histogram
from tests.support.tiny import make_tiny_model


def test_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = [json.dumps({"question": f"{n}+{n}=", "answer": 2 * n}) for n in range(5)]
    lines += ['{"question": "", "answer": 1}', json.dumps({"question": "1=", "answer": "\\sqrt{2}+"})]
    lines += [json.dumps({"question": "1+" * 40 + "1=", "answer": 41})]
    lines += [json.dumps({"question": "a b c d e f g h i j k", "answer": 1})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "x b c d e f g h i j y", "answer": 1}))
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"hf_path": str(make_tiny_model(tmp_path / "model"))},
                "run": {"dir": str(tmp_path / "run")},
                "data": {
                    "train": str(tmp_path / "train.jsonl"),
                    "max_prompt_tokens": 64,
                    "decontamination_ngram": 9,
                    "prompt_suffix": " box it.",
                },
                "eval": {"benchmarks": {"mine": {"path": str(tmp_path / "test.jsonl"), "max_response_tokens": 32}}},
                "reward": {"workers": 1},
                "algorithm": {"preset": "paper"},
            }
        )
    )
    assert cli.main(["data", "preview", "--config", str(config), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/train.jsonl, line 1: 14 tokens, data source train, ground truth 0" in out
    assert "<user>0+0= box it.<assistant>" in out
    assert "<user>1+1= box it.<assistant>" in out
    assert "<user>2+2= box it.<assistant>" not in out
    for words in ("read", "dropped: bad row", "dropped: contaminated", "dropped: too long", "kept"):
        assert words in out
    assert f"bad row: {tmp_path}/train.jsonl, line 6: question is empty" in out
    assert "line 7: the ground truth '\\\\sqrt{2}+' cannot be read by math_verify" in out
    assert '"shared": "b c d e f g h i j"' in out
    assert "> data.max_prompt_tokens" in out
    assert "mine" in out
    assert not (tmp_path / "run").exists()


def test_histogram() -> None:
    assert histogram([], limit=3) == []
    lines = histogram([1, 1, 1, 5, 10, 10], limit=9)
    assert lines[0].split()[:3] == ["1", "-", "1"]
    assert [line.split()[-1] for line in lines[:-1]] == ["3", "0", "0", "0", "1", "0", "0", "0", "0"]
    assert lines[-1].endswith("2  > data.max_prompt_tokens")
    assert lines[0].count("#") == 40
    wide = histogram(list(range(100, 1100)), limit=5000)
    assert len(wide) == 10
    assert sum(int(line.split()[-1]) for line in wide) == 1000


def test_a_negative_number_of_rows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "preview", "--config", "absent.yaml", "--rows", "-1"])
    assert ended.value.code == 2
    assert "--rows: '-1' is not a number of rows" in capsys.readouterr().err
