"""The real train command with a real SGLang server: Qwen3 and Qwen3-MoE, over combinations of layouts. Qwen2: test_train.py."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from megatron_gppo.convert import convert_megatron_to_hf
from megatron_gppo.policy.checkpoint import folder_name
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_model
from tests.support.training import PROBE, check_learned, hf_logprobs, put_back, train, write_config

LAYOUTS = [
    ("Qwen3ForCausalLM", 4, ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"]),
    ("Qwen3ForCausalLM", 4, ["parallel.pp=2", "parallel.cp=2"]),
    ("Qwen3ForCausalLM", 4, ["parallel.tp=2", "parallel.sequence_parallel=true"]),  # as the 8B recipe, and dp 2
    ("Qwen3MoeForCausalLM", 2, ["parallel.cp=2", "parallel.ep=2"]),
    ("Qwen3MoeForCausalLM", 4, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.sequence_parallel=true"]),
    ("Qwen3MoeForCausalLM", 4, ["parallel.pp=2", "parallel.vpp=2", "parallel.ep=2"]),  # and dp 2
    # As the 30B recipe: experts over ranks that differ in tp and dp; and copies of them, which share their optimizer state.
    ("Qwen3MoeForCausalLM", 4, ["parallel.tp=2", "parallel.ep=4", "parallel.sequence_parallel=true"]),
    ("Qwen3MoeForCausalLM", 4, ["parallel.tp=2", "parallel.ep=2", "parallel.sequence_parallel=true"]),
]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, str]]]:
    """A model of an architecture, and the URL of the one server that holds it; experts are cut over two engine ranks."""
    with ExitStack() as servers:

        @functools.cache
        def start(architecture: str) -> tuple[Path, str]:
            folder = tmp_path_factory.mktemp(architecture)
            model = make_tiny_model(folder / "tiny", architecture)
            config = make_config(model, folder, engine_tp=2 if "Moe" in architecture else 1)
            server = servers.enter_context(ManagedServer(config, folder / "sglang.log"))
            server.wait_ready()
            return model, server.url

        yield start


@pytest.mark.parametrize(("architecture", "ranks", "layout"), LAYOUTS)
def test_trains_and_gives_the_engine_the_new_weights(
    serve: Callable[[str], tuple[Path, str]], tmp_path: Path, architecture: str, ranks: int, layout: list[str]
) -> None:
    model, url = serve(architecture)
    put_back(url, model)
    config = write_config(tmp_path, model, rollout={"mode": "external", "urls": [url]})
    check_learned(train(config, ranks, *layout), tmp_path / "run")
    convert_megatron_to_hf(tmp_path / "run" / "checkpoints" / folder_name(2), tmp_path / "exported")
    new, old = hf_logprobs(tmp_path / "exported"), hf_logprobs(model)
    torch.testing.assert_close(WeightEndpoint(url, None, 60).prompt_logprobs(PROBE), new, rtol=0, atol=2e-5)
    assert (new - old).abs().max() > 1e-2, "the weights have hardly moved"
