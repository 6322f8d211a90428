"""Which experts an engine chooses, as it says in an answer, and how far they are from those that the policy chooses."""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHOWN_AT_MOST = 60  # characters of what cannot be read


def read_experts(answer: Any, shape: Sequence[int]) -> Tensor | None:
    """[L, layers, k] int64, that shape, from what /generate answers to a prompt of L tokens for which it generates one.

    None where the server was not started with --enable-return-routed-experts. Raises ValueError, which says what was
    expected and what came, where the answer is something else.
    """
    tokens, layers, k = shape
    num_bytes = tokens * layers * k * torch.int32.itemsize
    expected = f"expected {num_bytes} bytes in base64, int32 of {tokens} tokens x {layers} layers x {k} experts"
    came = answer
    try:
        came = answer["meta_info"].get("routed_experts")
        if came is None:
            return None
        data = base64.b64decode(came, validate=True)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}; came {repr(came)[:SHOWN_AT_MOST]}") from error
    if len(data) != num_bytes:
        raise ValueError(f"{expected}; came {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.int32).reshape(tokens, layers, k).long()


def unlike(one: Tensor, other: Tensor) -> float:
    """[L, layers, k] twice, the experts that each token goes to: the share of the one's that is not among the other's."""
    same = (one[..., None] == other[..., None, :]).any(-1)
    return 1.0 - same.float().mean().item()
