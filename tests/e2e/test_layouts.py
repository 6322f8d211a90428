"""The real train command with a real SGLang server: Qwen3 and Qwen3-MoE, over combinations of layouts. Qwen2: test_train.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_gppo.convert import Architecture, convert_megatron_to_hf
from megatron_gppo.policy.checkpoint import folder_name
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_model
from tests.support.training import PROBE, check_learned, hf_logprobs, put_back, scalars, train, write_config

LAYOUTS = [
    ("Qwen3ForCausalLM", 4, ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"]),
    ("Qwen3ForCausalLM", 4, ["parallel.pp=2", "parallel.vpp=2"]),  # and dp 2
    ("Qwen3MoeForCausalLM", 2, ["parallel.cp=2", "parallel.ep=2"]),
    ("Qwen3MoeForCausalLM", 4, ["parallel.tp=2", "parallel.ep=2", "parallel.sequence_parallel=true"]),  # and dp 2
    ("Qwen3MoeForCausalLM", 4, ["parallel.pp=2", "parallel.vpp=2", "parallel.ep=2"]),  # and dp 2
]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A model of the architecture, and the URL of a server that holds it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny_model(folder / "tiny", request.param)
    args = {"enable_return_routed_experts": True} if request.param == "Qwen3MoeForCausalLM" else {}
    with ManagedServer(make_config(model, folder, server_args=args), folder / "sglang.log") as server:
        server.wait_ready()
        yield model, server.url


@pytest.mark.parametrize(("served", "ranks", "layout"), LAYOUTS, indirect=["served"])
def test_trains_and_gives_the_engine_the_new_weights(
    served: tuple[Path, str], tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    model, url = served
    put_back(url, model)
    config = write_config(tmp_path, model, rollout={"mode": "external", "urls": [url]})
    check_learned(train(config, ranks, *layout), tmp_path / "run")
    if Architecture.from_hf(model).num_experts:
        # A score is hardly ever so near to another one that rounding decides.
        assert max(scalars(tmp_path / "run")["engine/routing_difference"]) < 0.01
    convert_megatron_to_hf(tmp_path / "run" / "checkpoints" / folder_name(2), tmp_path / "exported")
    new, old = hf_logprobs(tmp_path / "exported"), hf_logprobs(model)
    torch.testing.assert_close(WeightEndpoint(url, None, 60).prompt_logprobs(PROBE), new, rtol=0, atol=2e-5)
    assert (new - old).abs().max() > 1e-2, "the weights have hardly moved"
