import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import build_model
from examples.quickstart.phases import PhaseError, Phases, record_path
from examples.quickstart.problems import Problem, make_problem_sets, write_jsonl
from examples.quickstart.reward import exact_integer
from examples.quickstart.run import CONFIG, FOLDER, delete_run, elsewhere, quickstart
from examples.quickstart.tokenizer import build_tokenizer
from megatron_gppo.config import ConfigError, load_config


def test_problem_sets_share_no_problem_and_cover_all() -> None:
    sets = make_problem_sets(seed=0)
    questions = [{problem.question for problem in part} for part in (sets.warm_up, sets.train, sets.held_out)]
    for one, other in itertools.combinations(questions, 2):
        assert not one & other
    assert set.union(*questions) == {f"{a}+{b}" for a in range(10, 100) for b in range(10, 100)}
    assert len(sets.held_out) == 512


def test_problem_sets_depend_on_the_seed_alone() -> None:
    assert make_problem_sets(seed=3) == make_problem_sets(seed=3)
    assert make_problem_sets(seed=3).held_out != make_problem_sets(seed=4).held_out


def test_answers_are_right() -> None:
    for problem in make_problem_sets(seed=0).held_out:
        a, b = problem.question.split("+")
        assert int(a) + int(b) == int(problem.answer)


def test_rows_are_chat_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "problems.jsonl", [Problem("27+65", "92"), Problem("10+10", "20")])
    first, second = map(json.loads, (tmp_path / "data" / "problems.jsonl").read_text().splitlines())
    assert first == {
        "prompt": [{"role": "user", "content": "27+65"}],
        "reward_model": {"ground_truth": "92"},
        "data_source": "addition",
    }
    assert second["reward_model"]["ground_truth"] == "20"


@pytest.mark.parametrize(
    ("response", "reward"),
    [("92", 1.0), ("93", 0.0), ("", 0.0), ("092", 0.0), (" 92", 0.0), ("92 ", 0.0), ("92+", 0.0), ("9", 0.0)],
)
def test_reward_asks_for_exactly_the_integer(response: str, reward: float) -> None:
    assert exact_integer(response, "92", "addition") == reward


def test_tokenizer_round_trip_through_a_folder(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "0123456789+-*/=?!.,:;()[] 1 + (2)"
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert len(tokenizer) == 32
    assert tokenizer.encode("a") == [tokenizer.unk_token_id]


def test_chat_template(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = [{"role": "user", "content": "27+65"}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == "<user>27+65<assistant>"
    chat = [{"role": "system", "content": "+"}, *prompt, {"role": "assistant", "content": "92"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<system>+<user>27+65<assistant>92<eos>"
    token_ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "+27+6592"


def test_only_the_answer_and_its_eos_are_learned() -> None:
    tokenizer = build_tokenizer()
    input_ids, labels = build_model.encode_examples(tokenizer, [Problem("10+10", "20"), Problem("99+99", "198")])
    assert input_ids.shape == labels.shape == (2, 7 + 4)
    assert tokenizer.decode(input_ids[0]) == "<user>10+10<assistant>20<eos><pad>"
    learned = labels != build_model.IGNORED
    assert torch.equal(labels[learned], input_ids[learned])
    assert [tokenizer.decode(row[mask]) for row, mask in zip(labels, learned, strict=True)] == ["20<eos>", "198<eos>"]


def test_model_loads_from_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model.build_model(build_tokenizer())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 0.7e6 < loaded.num_parameters() < 0.9e6
    token_ids = torch.tensor([[4, 8, 9, 16, 7, 7, 5]])
    torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits, rtol=0, atol=0)


def test_warm_up_learns_and_stops_at_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model.build_model(tokenizer)
    few = make_problem_sets(seed=0).warm_up[:4]  # few enough to be learned by heart at once
    monkeypatch.setattr(build_model, "MAX_ITERATIONS", 150)
    assert build_model.sampled_accuracy(model, tokenizer, few) == 0.0
    build_model.warm_up(model, tokenizer, few, probe=few)
    assert build_model.sampled_accuracy(model, tokenizer, few * 16) > 0.1


def test_warm_up_that_does_not_reach_its_target_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    problems = make_problem_sets(seed=0).warm_up
    monkeypatch.setattr(build_model, "MAX_ITERATIONS", 10)
    with pytest.raises(RuntimeError, match="below 30% after 10 iterations"):
        build_model.warm_up(build_model.build_model(tokenizer), tokenizer, problems, probe=problems[:64])


def test_config_is_what_the_readme_promises() -> None:
    config = load_config(CONFIG)
    assert config.rollout.responses_per_prompt == 8
    assert config.train.steps >= 40
    assert config.updates_per_step >= 4
    assert (config.parallel.tp, config.model.dtype) == (2, "fp32")
    assert (config.algorithm.objective, config.algorithm.beta1, config.algorithm.beta2) == ("ce_gppo", 0.5, 1.0)
    assert (config.eval.samples, config.eval.temperature) == (8, 0.6)
    module_name, function_name = config.reward.function.split(":")
    assert (module_name, function_name) == (exact_integer.__module__, exact_integer.__name__)


def test_another_folder_moves_every_path(tmp_path: Path) -> None:
    assert elsewhere(FOLDER) == []
    moved = load_config(CONFIG, elsewhere(tmp_path)).model_dump_json()
    assert moved == load_config(CONFIG).model_dump_json().replace(str(FOLDER), str(tmp_path))


def test_fresh_with_a_mistake_deletes_nothing(tmp_path: Path) -> None:
    Phases(tmp_path, {}, Console(quiet=True))
    with pytest.raises(ConfigError):
        quickstart(tmp_path, ["train.steps=none"], fresh=True)
    assert record_path(tmp_path).exists()


def append(path: Path, exit_code: int = 0) -> list[str]:
    """A command that leaves a trace of having run."""
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write('x'); raise SystemExit({exit_code})"]


def test_phases_go_on_where_they_stopped(tmp_path: Path) -> None:
    folder, console = tmp_path / "run", Console(quiet=True)
    first = Phases(folder, {"steps": 60}, console)
    first.run("one", append(tmp_path / "one"))
    with pytest.raises(PhaseError, match="two: exit code 3"):
        first.run("two", append(tmp_path / "two", exit_code=3))
    failed_after = first.seconds["two"]

    second = Phases(folder, {"steps": 60}, console)
    second.run("one", append(tmp_path / "one"))
    second.run("two", append(tmp_path / "two"))
    assert (tmp_path / "one").read_text() == "x"
    assert (tmp_path / "two").read_text() == "xx"
    assert second.seconds["two"] > failed_after > 0


def test_phases_refuse_a_run_with_other_settings(tmp_path: Path) -> None:
    Phases(tmp_path, {"steps": 60}, Console(quiet=True))
    with pytest.raises(PhaseError, match=r"other settings\. Fix: --fresh"):
        Phases(tmp_path, {"steps": 40}, Console(quiet=True))


def test_fresh_deletes_runs_only(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(PhaseError, match="not a run of the quick start"):
        delete_run(tmp_path)
    assert (tmp_path / "precious.txt").exists()
    Phases(tmp_path / "run", {"steps": 60}, Console(quiet=True))
    delete_run(tmp_path / "run")
    delete_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


PHASE = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, {on_interrupt})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({started!r}).write_text(str(child.pid))
try:
    time.sleep(600)
finally:
    child.kill()
"""
RECIPE = """
import signal, sys
from pathlib import Path
from rich.console import Console
from examples.quickstart import phases
phases.STOP_TIMEOUT_S = {timeout}
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have had the tests ignore it
phases.interrupt_on_signals()
phases.Phases(Path({folder!r}), {{}}, Console()).run("sleep", [sys.executable, "-c", {phase!r}])
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("on_interrupt", "timeout"), [("signal.default_int_handler", 60), ("signal.SIG_IGN", 0.1)])
def test_an_interrupt_leaves_no_process(
    tmp_path: Path, signum: signal.Signals, on_interrupt: str, timeout: float
) -> None:
    started = tmp_path / "started"
    phase = PHASE.format(on_interrupt=on_interrupt, started=str(started))
    recipe = RECIPE.format(timeout=timeout, folder=str(tmp_path / "run"), phase=phase)
    process = subprocess.Popen(
        [sys.executable, "-c", recipe], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (started.exists() and started.read_text()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        spawned = psutil.Process(process.pid).children(recursive=True)
        assert len(spawned) == 2
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    _, alive = psutil.wait_procs(spawned, timeout=60)
    assert not alive
