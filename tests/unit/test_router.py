"""Qwen3-MoE's router in Megatron's configuration."""

from pathlib import Path

from megatron_gppo.convert import Architecture
from megatron_gppo.policy.model import transformer_config
from tests.support.policy import make_config
from tests.support.released_models import write_model_config


def test_no_auxiliary_loss_enters_the_gradient(tmp_path: Path) -> None:
    folder = write_model_config(tmp_path, "Qwen3-30B-A3B")
    router = transformer_config(Architecture.from_hf(folder), make_config(folder))
    assert router.moe_router_load_balancing_type == "none"
    assert not router.moe_aux_loss_coeff
    assert router.moe_z_loss_coeff is None
    assert not router.moe_router_enable_expert_bias
    assert router.moe_expert_capacity_factor is None  # no token is dropped
    assert (router.moe_router_topk, router.moe_router_pre_softmax) == (
        8,
        False,
    )  # softmax over the chosen: norm_topk_prob
