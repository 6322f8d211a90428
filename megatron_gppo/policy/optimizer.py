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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gppo.config import Config
from megatron_gppo.policy.model import DTYPES, PolicyModel


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
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            _give_each_parameter_its_own_step(part)
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


def allocate_state(optimizer: ChainedOptimizer) -> None:
    """Makes torch's Adam, used where TransformerEngine and Apex are missing, allocate the state that loading fills.

    It only does so in a step, so this takes one that moves nothing.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW) or inner.state:
            continue
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate


def _give_each_parameter_its_own_step(part: DistributedOptimizer) -> None:
    """Mends loading a checkpoint into torch's Adam, which has a "step" tensor a parameter.

    Megatron gives all parameters one shared tensor, which then advances once a parameter and update: a resumed run
    looks right and diverges at its next update. It also expects a "step" for each parameter in the checkpoint, which
    holds one for all.
    """
    set_states = part._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(model_param, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = set_states_but_step


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """The rate of the next update."""
    return float(optimizer.param_groups[0]["lr"])
