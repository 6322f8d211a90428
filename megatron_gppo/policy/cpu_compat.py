"""Run Megatron-Core over gloo on a machine without CUDA. The only module that assumes a CPU, and a no-op elsewhere.

Megatron-Core names the CUDA device as ``torch.cuda.<call>()``, as ``device="cuda"`` / ``Tensor.cuda()`` and as
``Tensor.type() == "torch.cuda.FloatTensor"``. ``install()`` points all of them at the CPU. Call it once a process, before
any Megatron object is built.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")
_installed = False


def install() -> bool:
    """Returns whether the CPU stands in for CUDA in this process."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return _installed
    _installed = True
    _redirect_torch()
    _redirect_random_states()
    _mend_experts()
    return True


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> "_Stream":
        return self


def _redirect_torch() -> None:
    with torch.device("cpu"):  # torch notes at its first use which factories a default device is for: not the stand-ins
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.type = _as_cuda_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]

    cpu, stream = torch.device("cpu"), _Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.compiler.set_stance("force_eager")  # Megatron's jit_fuser is torch.compile


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _as_cuda_type(type_of: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(type_of)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = type_of(self, *args, **kwargs)
        # Only Megatron's optimizers compare type strings; everyone else sees the truth.
        if isinstance(out, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            out = out.replace("torch.", "torch.cuda.", 1)
        return out

    return wrapped


def _redirect_random_states() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _mend_experts() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # megatron-core 0.16 reads this name in the router even where TransformerEngine, which defines it, is missing.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # all_to_all_single wants plain numbers, and Megatron converts only what lives on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
