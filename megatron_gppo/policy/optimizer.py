"""Megatron's Adam over data-parallel chunks, and its schedule."""

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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gppo.config import Config
from megatron_gppo.policy.model import DTYPES, PolicyModel
from megatron_gppo.policy.optimizer_checkpoint import mend


def wrap_data_parallel(chunks: Sequence[PolicyModel], config: Config) -> list[DistributedDataParallel]:
    """Gives each chunk fp32 gradient buffers that are summed, not averaged, over data-parallel ranks."""
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


def build_optimizer(
    chunks: list[DistributedDataParallel], config: Config
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Adam, without weight decay on norms and biases, and the learning-rate schedule over the run's updates.

    The learning rate of update k (from 0) in a warm-up of W is lr * (k + 1) / (W + 1): the first update already moves.
    """
    settings = config.optimizer
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
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
    updates = config.train.steps * config.updates_per_step
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr / (settings.warmup_updates + 1),
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_updates,
        lr_decay_steps=max(updates, settings.warmup_updates + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


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


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """The rate of the next update."""
    return float(optimizer.param_groups[0]["lr"])
