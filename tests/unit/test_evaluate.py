"""An evaluation from problems to report, its going on after an interruption, and comparisons."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_gppo import cli
from megatron_gppo.config import Config, ConfigError, EvalConfig, SamplingConfig, parse_config
from megatron_gppo.datatypes import Prompt, Response, Verdict
from megatron_gppo.evaluate import Benchmark, EvaluationError, Evaluator, compare_reports, load_benchmarks
from megatron_gppo.evaluate.command import run_evaluation
from megatron_gppo.evaluate.compare import ALL, comparison_table
from megatron_gppo.evaluate.report import Report, console_table, markdown, read_report, scalars
from megatron_gppo.metrics import is_documented
from megatron_gppo.rollout.engine import EngineError
from megatron_gppo.rollout.generate import RolloutCancelled
from tests.support.fake_engine import FakeEngine, FakeJudge, FixedEngines
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_tokenizer


def benchmark(name: str, rows: range, samples: int = 4, **sampling: Any) -> Benchmark:
    prompts = [Prompt(row, [row], f"<user>{row}=", str(row), name) for row in rows]
    sampling = {"temperature": 0.6, "max_response_tokens": 8, **sampling}
    return Benchmark(name, SamplingConfig(**sampling), samples, prompts, [f"{row}=" for row in rows], {"too long": 1})


class CountingEngine(FakeEngine):
    """Remembers what it was asked, with which parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: Counter[tuple[int, int, int]] = Counter()

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingConfig, n: int, counts: Counter[str], staleness: Any = None
    ) -> list[Response]:
        self.asked[prompt_ids[0], n, sampling.max_response_tokens] += 1
        return await super().generate(prompt_ids, sampling, n, counts)


def evaluator(engine: FakeEngine, *benchmarks: Benchmark, judge: Any = None) -> Evaluator:
    config = make_config(Path("model"), Path("run"))
    return Evaluator(config.rollout, config.reward, FixedEngines([engine]), judge or FakeJudge({0}), benchmarks)


def test_from_problems_to_a_report(tmp_path: Path) -> None:
    engine = CountingEngine()
    progress: list[tuple[int, int]] = []
    of_two = evaluator(engine, benchmark("hard", range(3)), benchmark("easy", range(1, 2), 8, max_response_tokens=16))
    report = of_two.run(tmp_path / "e", "my-model", {}, on_progress=lambda *at: progress.append(at))

    # The fake judge finds the first of each problem's responses correct, except for problem 0.
    assert engine.asked == {(0, 4, 8): 1, (1, 4, 8): 1, (2, 4, 8): 1, (1, 8, 16): 1}
    hard = report.scores["hard"]
    assert (hard.problems, hard.samples, hard.avg.mean) == (3, 4, pytest.approx(1 / 6))
    assert {k: round(found.mean, 4) for k, found in hard.pass_at.items()} == {1: 0.1667, 2: 0.3333, 4: 0.6667}
    assert hard.majority is None, "nothing that could be compared"
    assert (hard.truncated, hard.mean_response_tokens) == (0.0, 3.0)
    assert (hard.outcomes, hard.left_out) == ({"scored": 12}, {"too long": 1})
    assert list(hard.accuracies.values()) == [0.0, 0.25, 0.25]
    assert report.average == pytest.approx((1 / 6 + 1 / 8) / 2)
    assert progress == [(done, 4) for done in range(5)]
    assert read_report(tmp_path / "e") == report

    lines = [json.loads(line) for line in (tmp_path / "e" / "hard.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {0, 1, 2}
    one = next(line for line in lines if line["row"] == 1)
    assert (one["prompt"], one["ground_truth"]) == ("<user>1=", "1")
    assert [response["text"] for response in one["responses"]] == ["1.0", "1.1", "1.2", "1.3"]
    assert [response["correct"] for response in one["responses"]] == [True, False, False, False]

    console = Console(record=True, width=150)
    console.print(console_table(report))
    shown = console.export_text()
    for text in (shown, markdown(report), (tmp_path / "e" / "report.md").read_text()):
        assert "my-model" in text
        row = next(line for line in text.splitlines() if "hard" in line)
        assert [cell for cell in ("3", "4", "16.7", "66.7", "0.0") if cell not in row] == []
        assert "14.6" in next(line for line in text.splitlines() if "average" in line)
    assert "**hard**: pass@1 16.7, pass@2 33.3, pass@4 66.7; temperature 0.6" in markdown(report)
    found = scalars(report)
    assert (found["eval/hard/accuracy"], found["eval/average"]) == (hard.avg.mean, report.average)
    assert all(map(is_documented, found))


def test_majorities_need_answers(tmp_path: Path) -> None:
    class Judge:
        async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
            answers = ["1", "2", "2", None] if prompt.row else ["3", "3", "4", "5"]
            return [Verdict(0.0, answer in ("1", "3"), "scored", answer) for answer in answers]

    report = evaluator(FakeEngine(), benchmark("b", range(2)), judge=Judge()).run(tmp_path / "e", "m", {})
    assert report.scores["b"].majority is not None
    assert report.scores["b"].majority.mean == 0.5


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder, problems = tmp_path / "e", benchmark("b", range(40))
    with pytest.raises(EngineError, match="prompt 30 failed"):
        evaluator(FakeEngine(fails_on=30), problems).run(folder, "m", {})
    path = folder / "b.jsonl"
    done = {json.loads(line)["row"] for line in path.read_text().splitlines()}
    assert 0 < len(done) < 40
    with path.open("a") as file:
        file.write('{"row": 30, "resp')  # the process died while it wrote
    engine = CountingEngine()
    report = evaluator(engine, problems).run(folder, "m", {})
    assert sorted(row for row, _, _ in engine.asked) == sorted(set(range(40)) - done)
    assert sorted(json.loads(line)["row"] for line in path.read_text().splitlines()) == list(range(40))
    whole = evaluator(FakeEngine(), problems).run(tmp_path / "whole", "m", {})
    assert whole.scores == report.scores


@pytest.mark.parametrize("change", ["model", "sampling", "problems"])
def test_records_of_another_model_or_setting_are_not_used(tmp_path: Path, change: str) -> None:
    evaluator(FakeEngine(), benchmark("b", range(3))).run(tmp_path / "e", "m", {"file": 1})
    engine = CountingEngine()
    again = benchmark(
        "b", range(1, 4) if change == "problems" else range(3), temperature=0.7 if change == "sampling" else 0.6
    )
    evaluator(engine, again).run(tmp_path / "e", "m", {"file": 2 if change == "model" else 1})
    assert engine.asked.total() == 3


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / "file").write_text("")
    for folder, words in [("precious", "is not an evaluation's folder"), ("file/e", "Not a directory")]:
        with pytest.raises(EvaluationError, match=words) as error:
            evaluator(FakeEngine(), benchmark("b", range(1))).run(tmp_path / folder, "m", {})
        assert "Fix: " in str(error.value)
    evaluator(FakeEngine(), benchmark("b", range(2))).run(tmp_path / "e", "m", {})
    (tmp_path / "e" / "b.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(EvaluationError, match=r"b.jsonl, line 1: damaged \('responses'\)\. Fix"):
        evaluator(FakeEngine(), benchmark("b", range(2))).run(tmp_path / "e", "m", {})


def test_cancel_keeps_what_is_done(tmp_path: Path) -> None:
    class Slow(FakeJudge):
        async def judge(self, prompt: Prompt, responses: list[Response]) -> list[Verdict]:
            if prompt.row == 5:
                signal.raise_signal(signal.SIGUSR1)
            return await super().judge(prompt, responses)

    engine = FakeEngine()
    of_one = evaluator(engine, benchmark("b", range(300)), judge=Slow())
    previous = signal.signal(signal.SIGUSR1, lambda *_: of_one.cancel())
    try:
        with pytest.raises(RolloutCancelled):
            of_one.run(tmp_path / "e", "m", {})
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert 0 < len((tmp_path / "e" / "b.jsonl").read_text().splitlines()) < 300
    assert engine.aborts == 1
    with pytest.raises(RolloutCancelled):
        of_one.run(tmp_path / "e", "m", {})


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="weights of version 3, the policy has version 4"):
        evaluator(FakeEngine(version=3), benchmark("b", range(1))).run(tmp_path / "e", "m", {}, policy_version=4)


def reports(tmp_path: Path, *wrong: set[int]) -> list[Report]:
    return [
        evaluator(FakeEngine(), benchmark("b", range(20)), benchmark("c", range(5)), judge=FakeJudge(rows)).run(
            tmp_path / str(index), f"model {index}", {}
        )
        for index, rows in enumerate(wrong)
    ]


def test_comparing_two_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = reports(tmp_path, set(range(8)), {0, 1})
    found = compare_reports(first, second)
    assert list(found) == ["b", "c", ALL]
    assert (found["b"].first, found["b"].second) == (pytest.approx(12 / 80), pytest.approx(18 / 80))
    assert found["b"].difference.mean == pytest.approx(6 / 80)
    assert found["b"].difference.significant
    assert not found["c"].difference.significant or found["c"].difference.problems == 5
    back = compare_reports(second, first)["b"].difference
    assert (back.mean, back.p_value) == (pytest.approx(-6 / 80), pytest.approx(found["b"].difference.p_value))
    assert not compare_reports(first, first)[ALL].difference.significant

    console = Console(record=True, width=150)
    console.print(comparison_table(first, second, found))
    (line,) = [line for line in console.export_text().splitlines() if " b " in line]
    assert "+7.5" in line
    assert "yes" in line
    assert cli.main(["eval", "compare", str(tmp_path / "0"), str(tmp_path / "1" / "report.json")]) == 0
    assert "model 1 against model 0" in capsys.readouterr().out


def test_reports_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first,) = reports(tmp_path, set())
    other = evaluator(FakeEngine(), benchmark("d", range(2))).run(tmp_path / "d", "m", {})
    with pytest.raises(EvaluationError, match="no benchmark in common: b, c and d"):
        compare_reports(first, other)
    elsewhere = evaluator(FakeEngine(), benchmark("b", range(30, 35))).run(tmp_path / "e", "m", {})
    with pytest.raises(EvaluationError, match="no problem of a benchmark in common"):
        compare_reports(first, elsewhere)
    some = evaluator(FakeEngine(), benchmark("b", range(15, 25), samples=8)).run(tmp_path / "f", "m", {})
    found = compare_reports(first, some)["b"]
    assert (found.difference.problems, found.unpaired, found.caution) == (5, 20, "samples differ")
    (tmp_path / "broken.json").write_text("{}")
    assert cli.main(["eval", "compare", str(tmp_path / "0"), str(tmp_path / "broken.json")]) == 1
    assert "error: " in (error := capsys.readouterr().err)
    assert "broken.json: not a report" in error


def config_with(tmp_path: Path, **sections: Any) -> Config:
    tree = make_config(tmp_path, tmp_path / "run").model_dump(mode="json")
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return parse_config(tree)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_benchmarks_from_both_places(tmp_path: Path) -> None:
    files = write(
        tmp_path / "a.jsonl", *[{"question": f"{n}=", "answer": n, "data_source": f"s{n % 2}"} for n in range(5)]
    )
    own = {"path": write(tmp_path / "b.jsonl", {"problem": "7=", "answer": 7}), "samples": 2, "temperature": 1.0}
    config = config_with(
        tmp_path,
        data={
            "eval": files,
            "prompt_suffix": " a",
            "max_prompt_tokens": 64,
            "question_column": "question",  # not mine's
            "answer_column": "answer",
        },
        eval={"samples": 3, "max_response_tokens": 16, "benchmarks": {"mine": {**own, "prompt_suffix": " b"}}},
    )
    found = load_benchmarks(config, make_tiny_tokenizer(), 80)
    assert [(of.name, len(of.prompts), of.samples, of.sampling.temperature) for of in found] == [
        ("mine", 1, 2, 1.0),
        ("s0", 3, 3, 0.6),
        ("s1", 2, 3, 0.6),
    ]
    assert all(of.sampling.max_response_tokens == 16 for of in found)
    assert [of.prompts[0].text for of in found[:2]] == ["<user>7= b<assistant>", "<user>0= a<assistant>"]
    assert found[1].questions[0] == "0="
    with pytest.raises(
        ConfigError, match=r"benchmark mine: .* = 64 \+ 16 = 80 tokens, more than max_position_embeddings = 79"
    ):
        load_benchmarks(config, make_tiny_tokenizer(), 79)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        load_benchmarks(config_with(tmp_path), make_tiny_tokenizer(), 80)


def test_problems_keep_their_keys_under_another_template_and_suffix(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", {"question": "1=", "answer": 1}, {"question": "2=", "answer": 2})
    tokenizer = make_tiny_tokenizer()
    (plain,) = load_benchmarks(
        config_with(tmp_path, data={"eval": rows}, eval={"max_response_tokens": 8}), tokenizer, 99
    )
    tokenizer.chat_template = "!" + tokenizer.chat_template
    changed = config_with(tmp_path, data={"eval": rows, "prompt_suffix": " box it"}, eval={"max_response_tokens": 8})
    (other,) = load_benchmarks(changed, tokenizer, 99)
    assert plain.keys == other.keys
    assert len(set(plain.keys)) == 2
    assert plain.settings != other.settings


def test_a_run_folder_that_cannot_be_written_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir = .*/file: .*Fix: give a folder that can be written"):
        run_evaluation(make_config(tmp_path, tmp_path / "file"))


def test_a_checkpoint_is_no_business_of_external_engines(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "run", mode="external", urls=["http://a:1"])
    config = config.model_copy(update={"eval": EvalConfig()})
    with pytest.raises(ConfigError, match=r"--checkpoint .* with rollout.mode = external"):
        run_evaluation(config, tmp_path / "checkpoint")
