"""Generation beside training with real engines: what a sync does to responses in flight, and a run that is interrupted."""

import asyncio
import json
import os
import signal
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.config import SamplingConfig, load_config
from megatron_gppo.data import PromptStream, load_prompts, load_tokenizer
from megatron_gppo.datatypes import Response
from megatron_gppo.rollout.engine import Engine
from megatron_gppo.rollout.pieces import Staleness
from megatron_gppo.rollout.record import read_rollout
from tests.support.rollout import wait_busy
from tests.support.tiny import make_tiny_model
from tests.support.training import lines_until, scalars, start_training, train, write_config

PROMPTS = [[2, 4 + n, 5 + n, 3] for n in range(6)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New weights for tiny_model."""
    return make_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)


def call(url: str, path: str, **body: object) -> None:
    request = urllib.request.Request(
        url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def replace_weights(url: str, model: Path, pause: str) -> None:
    """In the middle of what the server generates, as version 1."""
    wait_busy(url)
    call(url, "/pause_generation", mode=pause)
    call(url, "/update_weights_from_disk", model_path=str(model), weight_version="1", flush_cache=pause != "in_place")
    call(url, "/continue_generation")


def logprobs_by(model: Path, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """[L]"""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("pause", ["abort", "retract", "in_place"])
def test_responses_outlive_a_sync_with_the_version_of_every_token(
    engine_url: str, tiny_model: Path, other_model: Path, pause: str
) -> None:
    """Log-probs of each part are those of the weights that its version names. After in_place, which keeps the KV cache of
    the old weights, nothing but the old part can be compared."""
    tokenizer = load_tokenizer(tiny_model)

    def decode(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    async def generate() -> tuple[list[list[Response]], Counter[str]]:
        engine, counts = Engine(engine_url), Counter[str]()
        await engine.connect()
        try:
            sampling, staleness = SamplingConfig(max_response_tokens=300), Staleness(1, decode)
            work = [engine.generate(prompt, sampling, 4, counts, staleness) for prompt in PROMPTS]
            groups, _ = await asyncio.gather(
                asyncio.gather(*work), asyncio.to_thread(replace_weights, engine_url, other_model, pause)
            )
            return groups, counts
        finally:
            await engine.disconnect()

    groups, counts = asyncio.run(generate())
    responses = [(prompt, response) for prompt, group in zip(PROMPTS, groups, strict=True) for response in group]
    mixed = [pair for pair in responses if set(pair[1].policy_versions) == {0, 1}]
    assert mixed
    assert counts["retried_requests"] == 0
    assert (counts["carried_on_responses"] > 0) == (pause == "abort")
    for prompt, response in [max(mixed, key=lambda pair: len(pair[1].token_ids)), responses[0], responses[-1]]:
        length, versions = len(response.token_ids), response.policy_versions
        assert len(versions) == len(response.logprobs) == length <= 300
        assert versions == sorted(versions)
        assert response.text == decode(response.token_ids)
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in response.token_ids[:-1]
        old = versions.count(0)
        expected = logprobs_by(tiny_model, prompt, response.token_ids)[:old]
        torch.testing.assert_close(torch.tensor(response.logprobs[:old]), expected, rtol=0, atol=2e-5)
        if pause != "in_place":
            expected = logprobs_by(other_model, prompt, response.token_ids)[old:]
            torch.testing.assert_close(torch.tensor(response.logprobs[old:]), expected, rtol=0, atol=2e-5)


def test_an_interrupted_run_ahead_goes_on_with_the_prompts_that_it_had_ahead(
    engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Responses may be cut by syncs before the interruption, and are whole after it."""
    recorded = tmp_path / "recorded"
    problems = tmp_path / "eval.jsonl"
    problems.write_text(json.dumps({"problem": "1+1=", "answer": 2}) + "\n")
    file = write_config(
        tmp_path,
        tiny_model,
        rollout={"mode": "external", "urls": [engine_url], "record": str(recorded), "max_response_tokens": 64},
        train={"tokens_per_microbatch": 512},
        run={"dir": str(tmp_path / "run"), "save_every": 1000},
        algorithm={"preset": "paper", "importance_correction": "truncated", "importance_level": "geometric"},
        eval={"every": 2, "samples": 2, "max_response_tokens": 8, "benchmarks": {"one": {"path": str(problems)}}},
        **{"async": {"staleness": 1}},
    )
    process = start_training(file, 2, "train.steps=1000")
    lines_until(process, " 4/1000 ")
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert "ended by SIGINT; progress is saved" in rest, rest[-3000:]
    done = int(next((tmp_path / "run" / "checkpoints").iterdir()).name.removeprefix("step_"))
    last = done + 3

    output = train(file, 2, f"train.steps={last}", "async.staleness=2", "async.partial_rollouts=false")
    assert f"{done} of {last} steps are done" in output
    assert f" {last}/{last} " in output

    config = load_config(file)
    prompts = load_prompts(config.data, load_tokenizer(tiny_model), "train").prompts
    stream = PromptStream(prompts, shuffle=True, seed=config.run.seed)
    for step in range(1, last + 1):
        rollout = read_rollout(recorded, step)
        assert [group.prompt for group in rollout.groups] == stream.take(8), f"step {step}"
        versions = {v for group in rollout.groups for one in group.responses for v in one.policy_versions}
        assert step - 1 - (1 if step <= done else 2) <= min(versions), f"step {step}"
        assert max(versions) <= step - 1, f"step {step}"
    logged = scalars(tmp_path / "run")
    assert logged["rollout/staleness_max"][0] == logged["rollout/staleness_max"][done] == 0, "nothing was ahead"
    assert max(logged["rollout/staleness_max"][:done]) == 1
    assert 1 <= max(logged["rollout/staleness_max"][done:]) <= 2
    assert max(logged["rollout/mixed_responses"][done:]) == 0
    assert min(logged["engine/importance_effective_sample_size"]) > 0
    evaluated = (tmp_path / "run" / "eval").glob("step_*/report.json")
    assert {int(path.parent.name[5:]) for path in evaluated} == {step for step in range(last + 1) if step % 2 == 0}
