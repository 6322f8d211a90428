"""What saving and loading the state of Megatron's distributed optimizer needs, as seen in megatron-core 0.16 to 0.19.

Each function here keeps a resumed run from differing from an uninterrupted one; tests/distributed/test_checkpoint.py
fails without any of them.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def mend(optimizer: ChainedOptimizer) -> None:
    """Call once, after the optimizer is built. Changes these objects only, none of Megatron's classes."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            _keep_bucket_padding(part)
            if isinstance(part.optimizer, torch.optim.AdamW):
                _give_each_parameter_its_own_step(part)


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


def _keep_bucket_padding(part: DistributedOptimizer) -> None:
    """Makes saved moments and master weights those of their parameters when a gradient buffer has several buckets.

    Megatron gathers a buffer's state without the padding between its buckets, and then cuts it by positions that count
    the padding: whatever follows the first padded bucket is saved shifted, and its end as zeros. A tied embedding
    under pipeline parallelism, which has a bucket of its own, is enough.
    """
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state: dict[Any, Any] | None = gather(*args, **kwargs)
        for index, buffer in enumerate(part.buffers if state is not None else []):
            assert state is not None
            for tensors in state[index].values():
                for key, value in tensors.items():
                    if isinstance(value, torch.Tensor):
                        tensors[key] = _padded(value, buffer)
        return state

    part.get_parameter_state_dp_zero = gather_with_padding


def _padded(unpadded: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = unpadded.new_zeros(buffer.numel)
    pieces = unpadded.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
        padded[bucket.offset : bucket.offset + len(piece)] = piece
    return padded


def _give_each_parameter_its_own_step(part: DistributedOptimizer) -> None:
    """Mends loading into torch's Adam, which has a "step" tensor a parameter.

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
