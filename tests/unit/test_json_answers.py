import gc
import json
import random

import pytest

from megatron_gppo.datatypes import Group, Prompt, Response, Rollout, Verdict
from megatron_gppo.rollout.json_answers import parse_json


def test_parses_and_leaves_the_collector_as_it_was() -> None:
    assert gc.isenabled()
    assert parse_json('{"a": [1, -2.5, null]}') == {"a": [1, -2.5, None]}
    assert gc.isenabled()
    with pytest.raises(ValueError, match="line 1"):
        parse_json("[1,")
    assert gc.isenabled()
    gc.disable()
    try:
        parse_json("[]")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_collection_runs_while_it_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orjson.loads", lambda text: gc.isenabled())
    assert parse_json("[]") is False


def test_numbers_are_those_that_json_reads() -> None:
    """Log-probs are the engine's, to the bit."""
    draw = random.Random(0)
    answer = {
        "text": "\u00fc \u4e2d \U0001f600",
        "logprobs": [-draw.expovariate(2.0) for _ in range(1000)] + [-1e-300, 0],
    }
    assert parse_json(json.dumps(answer)) == answer


def test_a_rollout_has_a_short_repr() -> None:
    response = Response([7] * 100_000, [-0.5] * 100_000, "x" * 100_000, "stop", [3] * 100_000)
    prompt = Prompt(5, [1] * 10_000, "y" * 10_000, "42", "math")
    rollout = Rollout([Group(prompt, [response] * 2, [Verdict(1.0, True, "scored")] * 2)], {}, {})
    assert len(repr(rollout)) < 1000
    assert "finish_reason='stop'" in repr(rollout)
