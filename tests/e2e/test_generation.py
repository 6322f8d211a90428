"""Generation, cancellation and evaluation on the session's real SGLang server."""

import asyncio
import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.config import EvalConfig, RewardConfig, SamplingConfig, SourceConfig
from megatron_gppo.data import load_tokenizer
from megatron_gppo.datatypes import Prompt, Response
from megatron_gppo.evaluate.command import run_evaluation
from megatron_gppo.rollout.engine import Engine, EngineError
from megatron_gppo.rollout.generate import EngineRollouts, RolloutCancelled, RolloutError
from megatron_gppo.rollout.rewards import Rewards
from megatron_gppo.rollout.server import ManagedServer
from tests.support.fake_engine import FakeJudge, FixedEngines
from tests.support.rollout import make_config, running_requests, wait_busy
from tests.support.tiny import SPECIAL_TOKENS

EOS = SPECIAL_TOKENS.index("<eos>")
LOGPROB_TOLERANCE = 2e-5


class Questions:
    """Prompts "n+1=" for n = 0, 1, 2, ..."""

    def __init__(self, hf_path: Path) -> None:
        self._tokenizer = load_tokenizer(hf_path)
        self._taken = 0

    @property
    def position(self) -> int:
        return self._taken

    def take(self, n: int) -> list[Prompt]:
        self._taken += n
        return [self._prompt(row) for row in range(self._taken - n, self._taken)]

    def _prompt(self, row: int) -> Prompt:
        text = f"<user>{row}+1=<assistant>"
        return Prompt(row, self._tokenizer(text)["input_ids"], text, str(row + 1), "sums")


def generate(server: ManagedServer, prompts: list[Prompt], sampling: SamplingConfig, n: int) -> list[list[Response]]:
    async def run() -> list[list[Response]]:
        engine = Engine(server.url)
        await engine.connect()
        try:
            return await asyncio.gather(
                *(engine.generate(prompt.token_ids, sampling, n, Counter()) for prompt in prompts)
            )
        finally:
            await engine.disconnect()

    return asyncio.run(run())


def hf_logprobs(model: Any, prompt: Prompt, response: Response, temperature: float) -> list[float]:
    ids = torch.tensor([prompt.token_ids + response.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.5)])
def test_logprobs_are_those_of_hf(tiny_model: Path, server: ManagedServer, temperature: float, top_p: float) -> None:
    """Of the temperature-scaled distribution, whole even where top-p cuts it, EOS included."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = Questions(tiny_model).take(6)
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, max_response_tokens=32)
    groups = generate(server, prompts, sampling, n=8)
    for prompt, responses in zip(prompts, groups, strict=True):
        assert len(responses) == 8
        assert len({tuple(response.token_ids) for response in responses}) > 1
        for response in responses:
            assert set(response.policy_versions) == {0}
            assert EOS not in response.token_ids[:-1]
            if response.finish_reason == "stop":
                assert response.token_ids[-1] == EOS
            else:
                assert len(response.token_ids) == 32
                assert response.token_ids[-1] != EOS
            expected = hf_logprobs(model, prompt, response, temperature)
            assert response.logprobs == pytest.approx(expected, rel=0, abs=LOGPROB_TOLERANCE)
    assert {response.finish_reason for responses in groups for response in responses} == {"stop", "length"}


def test_a_rollout_judged_by_math_verify(tiny_model: Path, server: ManagedServer, tmp_path: Path) -> None:
    config = make_config(tiny_model, tmp_path, prompts_per_step=6)
    pool = Rewards(RewardConfig(workers=1))
    try:
        rollouts = EngineRollouts(
            config.rollout, FixedEngines([Engine(server.url)]), Questions(tiny_model), pool, prompts_per_update=2
        )
        first, second = rollouts.next(0, 0), rollouts.next(1, 0)
        assert [group.prompt.row for group in first.groups + second.groups] == list(range(12))
        for group in first.groups:
            assert len(group.responses) == len(group.verdicts) == 4
            assert all(verdict.reward == 0.0 and not verdict.correct for verdict in group.verdicts)
        assert first.counts["retried_requests"] == first.counts["reward_timeout"] == 0
        assert first.seconds["generate"] > 0

        # A random model answers nothing right, so no group is left to learn from.
        config = make_config(tiny_model, tmp_path, dynamic_sampling=True, max_refills=1)
        rollouts = EngineRollouts(
            config.rollout, FixedEngines([Engine(server.url)]), Questions(tiny_model), pool, prompts_per_update=2
        )
        with pytest.raises(RolloutError, match="all 8 groups had equal rewards"):
            rollouts.next(0, 0)
    finally:
        pool.close()


def test_weights_of_another_version_are_noticed(tiny_model: Path, server: ManagedServer, tmp_path: Path) -> None:
    config = make_config(tiny_model, tmp_path)
    rollouts = EngineRollouts(
        config.rollout, FixedEngines([Engine(server.url)]), Questions(tiny_model), FakeJudge(), prompts_per_update=2
    )
    with pytest.raises(EngineError, match=r"weights of version 0, the policy has version 3"):
        rollouts.next(0, 3)


def test_a_rejected_prompt_is_an_error_with_what_the_server_said(tiny_model: Path, server: ManagedServer) -> None:
    too_long = Prompt(0, [5] * 5000, "", "", "")
    with pytest.raises(EngineError, match=rf"{server.url}/generate: HTTP 400: .*context length"):
        generate(server, [too_long], SamplingConfig(max_response_tokens=8), n=2)


def test_cancel_stops_the_engine_too(tiny_model: Path, server: ManagedServer, tmp_path: Path) -> None:
    config = make_config(tiny_model, tmp_path, prompts_per_step=64, responses_per_prompt=8, max_response_tokens=1900)
    rollouts = EngineRollouts(
        config.rollout, FixedEngines([Engine(server.url)]), Questions(tiny_model), FakeJudge(), prompts_per_update=2
    )

    def interrupt_when_busy() -> None:
        wait_busy(server.url)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]

    previous = signal.signal(signal.SIGUSR1, lambda *_: rollouts.cancel())
    interrupter = threading.Thread(target=interrupt_when_busy)
    try:
        interrupter.start()
        with pytest.raises(RolloutCancelled):
            rollouts.next(0, 0)
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, previous)
    # What was running is aborted: by itself it would take minutes.
    deadline = time.monotonic() + 30
    while running_requests(server.url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running_requests(server.url) == 0
    generate(server, Questions(tiny_model).take(1), SamplingConfig(max_response_tokens=4), n=1)


def test_evaluation(
    tiny_model: Path, server: ManagedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(3)))
    config = make_config(tiny_model, tmp_path / "run", mode="external", urls=[server.url])
    source = SourceConfig(path=str(problems), question_column="q", answer_column="a")
    data = config.data.model_copy(update={"eval": [source]})
    config = config.model_copy(update={"data": data, "eval": EvalConfig(samples=3, max_response_tokens=8)})
    report = run_evaluation(config)
    score = report.scores["problems"]
    assert (score.problems, score.samples, score.avg.mean) == (3, 3, 0.0)
    assert 1 <= score.mean_response_tokens <= 8
    [folder] = (tmp_path / "run" / "eval").iterdir()
    assert folder.name.startswith(f"{tiny_model.name}-version-")
    assert len((folder / "problems.jsonl").read_text().splitlines()) == 3
    assert "accuracy in %" in capsys.readouterr().out
    written = (folder / "report.json").read_bytes()
    assert run_evaluation(config).scores == report.scores
    assert (folder / "report.json").read_bytes() == written
    assert "nothing to do" in capsys.readouterr().out
