"""A real SGLang server on one GPU that it shares with this process. Needs SGLang with its CUDA dependencies."""

import asyncio
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_gppo.config import SamplingConfig
from megatron_gppo.http_calls import call
from megatron_gppo.rollout.engine import Engine
from megatron_gppo.rollout.launch import launched_engines
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("sglang") is None,
        reason="needs a CUDA device and SGLang",
    ),
]


def test_a_colocated_engine_gives_its_memory_back(tmp_path: Path) -> None:
    config = make_config(
        make_tiny_model(tmp_path / "tiny"),
        tmp_path / "run",
        placement="colocated",
        engines=[{"gpus": [0], "server_args": {"mem_fraction_static": 0.5}}],
    )

    async def generate(engine: Engine) -> int:
        await engine.connect()
        try:
            sampling = SamplingConfig(max_response_tokens=8)
            return len(await engine.generate([5, 6, 7], sampling, 4, Counter()))
        finally:
            await engine.disconnect()

    def free_share() -> float:
        free, total = torch.cuda.mem_get_info(0)
        return free / total

    with launched_engines(config) as pool:
        pool.wait_ready()
        pool.synced(pool.to_sync(), 0)
        [engine] = pool.serving()
        assert asyncio.run(generate(engine)) == 4
        busy = free_share()
        pool.release_memory()
        assert free_share() > busy + 0.3, "the KV cache, at least"
        pool.resume_memory()
        call(engine.url, "/continue_generation", None, {}, timeout_s=60)  # as the end of a sync does
        assert free_share() < busy + 0.1
        assert asyncio.run(generate(engine)) == 4  # of undefined weights, which a sync would define
        assert pool.take_counts() == {"serving_engines": 1}
