"""Megatron's Adam over data-parallel chunks."""

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_gppo.config import Config
from megatron_gppo.policy.model import DTYPES, PolicyModel
from megatron_gppo.policy.optimizer_checkpoint import mend


def wrap_data_parallel(chunks: Sequence[PolicyModel], config: Config) -> list[DistributedDataParallel]:
    """Gives each chunk fp32 gradient buffers that are summed, not averaged, over data- and context-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=False,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # a non-finite gradient skips the update and is counted, see step()
    )
    return [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> ChainedOptimizer:
    """Adam, without weight decay on norms and biases. Its learning rate is set before each step: set_learning_rate()."""
    settings = config.optimizer
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.peak_lr(step=1),
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        params_dtype=DTYPES[config.model.dtype],
        bf16=config.model.dtype == "bf16",
        use_distributed_optimizer=settings.distributed,
    )
    overrides = get_standard_config_overrides(megatron_config)
    optimizer = get_megatron_optimizer(megatron_config, chunks, config_overrides=overrides)
    mend(optimizer)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """For the next step, and weight decay with it: Megatron applies wd_mult, 0 for norms and biases, in a scheduler only."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def step(optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """Clips and applies the gradients unless their norm is not finite. Returns (norm before clipping, applied).

    Megatron's own step() looks for non-finite gradients only under fp16 loss scaling.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    for part in optimizer.chained_optimizers:
        clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, True
