"""The real train command with a real SGLang server, over several layouts."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_gppo.convert import convert_megatron_to_hf
from megatron_gppo.policy.checkpoint import folder_name
from megatron_gppo.rollout.record import read_rollout, write_rollout
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from tests.support.rollout import is_engine, processes_below, wait_gone
from tests.support.training import (
    PROBE,
    check_learned,
    hf_logprobs,
    lines_until,
    saved_weights,
    scalars,
    start_training,
    train,
    write_config,
)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the TP = 2 run records its rollouts, for the replays below."""
    return tmp_path_factory.mktemp("recording")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.pp=2", "parallel.vpp=2"]),
        (2, ["parallel.cp=2", "train.recompute=full"]),
        (4, ["parallel.tp=2", "parallel.pp=2"]),
    ],
    ids=["tp2", "pp2", "cp2_recompute", "tp2_pp2"],
)
def test_trains_and_gives_the_engine_the_new_weights(
    engine_url: str, tiny_model: Path, recording: Path, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    config = write_config(tmp_path, tiny_model, rollout={"mode": "external", "urls": [engine_url]})
    record = [f"rollout.record={recording}"] if layout and layout[0] == "parallel.tp=2" and ranks == 2 else []
    output = train(config, ranks, *layout, *record)
    check_learned(output, tmp_path / "run")

    convert_megatron_to_hf(tmp_path / "run" / "checkpoints" / folder_name(2), tmp_path / "exported")
    engine = WeightEndpoint(engine_url, None, 60)
    assert engine.weight_version() == "2"
    new, old = hf_logprobs(tmp_path / "exported"), hf_logprobs(tiny_model)
    torch.testing.assert_close(engine.prompt_logprobs(PROBE), new, rtol=0, atol=2e-5)
    assert (new - old).abs().max() > 1e-2, "the weights have hardly moved"


def test_the_router_before_engines_of_both_kinds_that_are_asked_for_more_than_is_needed(
    engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    asked = {"dynamic_sampling": True, "oversample": 2.0, "concurrency": 6}  # groups that wait are cut off for certain
    engines = {"urls": [engine_url], "engines": [{"count": 1}], "router": True, "placement": "colocated"}
    config = write_config(tmp_path, tiny_model, rollout={**asked, **engines}, sync={"transport": "tensor"})
    output = train(config, 2)
    check_learned(output, tmp_path / "run")
    assert "lost" not in output, output

    logged = scalars(tmp_path / "run")
    assert logged["rollout/groups"] == [8, 8]
    assert logged["rollout/serving_engines"] == [2, 2]
    assert min(logged["rollout/aborted_groups"]) > 0
    assert max(logged["rollout/lost_engines"]) == max(logged["rollout/degenerate_groups"]) == 0
    assert WeightEndpoint(engine_url, None, 60).weight_version() == "2"


def test_resumed_equals_uninterrupted(recording: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The trainer's side of a run is a function of its rollouts, however often it is interrupted, to the bit.

    With all that a resumed run could get wrong: a reference policy, which is the start's and not the checkpoint's, the
    entropy controller's state, and schedules by step.
    """
    algorithm = {
        "preset": "paper",
        "kl_coef": 0.1,
        "entropy_target": {"target": 3.0, "gain": 1.0},
        "clip_high": {"linear": {1: 0.2, 3: 0.3}},
    }
    weights = []
    for name, lengths in (("uninterrupted", [2]), ("resumed", [1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(
            folder,
            tiny_model,
            rollout={"mode": "replay", "replay": str(recording)},
            algorithm=algorithm,
            optimizer={"lr": {"linear": {1: 3e-3, 3: 1e-3}}, "warmup_updates": 3},
        )
        for steps in lengths:
            output = train(config, 2, "parallel.tp=2", f"train.steps={steps}")
        assert ("resumed from" in output) == (name == "resumed")
        weights.append(saved_weights(folder / "run", 2))
    uninterrupted, resumed = weights
    for parameter in uninterrupted:
        assert torch.equal(uninterrupted[parameter], resumed[parameter]), parameter
    before = scalars(tmp_path / "uninterrupted" / "run")
    after = scalars(tmp_path / "resumed" / "run")
    for tag in ("policy/loss", "policy/grad_norm", "policy/entropy", "ratio/left_of_clip", "policy/reference_kl"):
        assert before[tag] == after[tag], tag
    for tag in ("algorithm/beta1", "algorithm/clip_high", "policy/lr"):
        assert before[tag] == after[tag], tag
        assert before[tag][0] != before[tag][1], f"{tag} does not change"
    assert after["policy/reference_kl"][1] > after["policy/reference_kl"][0] > 0, "away from the start"


def test_ctrl_c_while_saving_loses_nothing(recording: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In a replay that saves after every step, nearly all the time goes into saving."""
    replay = tmp_path / "replay"
    for step in range(1, 101):
        write_rollout(replay, step, read_rollout(recording, 1))
    config = write_config(tmp_path, tiny_model, rollout={"mode": "replay", "replay": str(replay)})
    for _ in range(2):
        process = start_training(config, 2, "parallel.tp=2", "train.steps=100")
        printed = lines_until(process, "/100 ")
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=90)
        assert "ended by SIGINT; progress is saved" in rest, printed + rest[-3000:]
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert 2 <= int(saved[-1].name.removeprefix("step_")) < 100
    assert not [path for path in saved if path.name.endswith(".partial")]


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "the engine dies"])
def test_an_early_end_saves_and_leaves_nothing_running(tiny_model: Path, tmp_path: Path, ending: str) -> None:
    config = write_config(tmp_path, tiny_model, run={"dir": str(tmp_path / "run"), "save_every": 1000})
    process = start_training(config, 2, "train.steps=1000", "rollout.max_restarts=0")
    lines_until(process, " 2/1000 ")
    started = processes_below(process.pid)
    assert len(started) > 6, "torchrun, two ranks, a reward worker, the guard and SGLang's processes"
    if ending == "the engine dies":
        (engine,) = [pid for pid in started if is_engine(pid)]
        os.kill(engine, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.Signals[ending])
    rest, _ = process.communicate(timeout=120)
    expected = "no engine is left" if ending == "the engine dies" else f"ended by {ending}; progress is saved"
    assert expected in rest, rest[-3000:]
    assert process.returncode != 0
    assert wait_gone(started, 20) == []
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    done = int(checkpoints[0].removeprefix("step_"))
    assert done >= 2

    if ending == "SIGINT":
        output = train(config, 2, f"train.steps={done + 1}")
        assert f"{done} of {done + 1} steps are done" in output
        assert f" {done + 1}/{done + 1} " in output
