"""How one Megatron parameter relates to its HF tensors, and to its tensor-parallel shards.

A layout answers four questions, by copying only: no value is ever computed.

    HF tensors  --merge-->  full  --shard(rank, size)-->  one shard a TP rank
                <--split--        <-------join----------

Attention with 4 heads and 2 KV heads. A row is one head (head_dim rows of the weight); Megatron keeps a query group, the
heads that share a KV head, together:

    q_proj  q0 q1 | q2 q3                                     group 0          group 1
    k_proj  k0    | k1          merge       linear_qkv     q0 q1 k0 v0   |  q2 q3 k1 v1
    v_proj  v0    | v1                                      TP rank 0    |   TP rank 1

Rows are cut evenly over the TP ranks. With more ranks than groups a cut runs through a group; Megatron then
gathers the projection's output, so the weight is still nothing but a range of rows.

The gated MLP. The full tensor is gate over up, but every TP rank must hold both halves of its own columns, so the shards
interleave, and joining them is not concatenation:

    gate_proj  g0 g1          full  g0 g1 u0 u1        TP rank 0  g0 u0
    up_proj    u0 u1                                   TP rank 1  g1 u1

Experts. Ranks hold whole ones: expert parallelism deals them out, and tensor parallelism does not cut them.

The vocabulary. Ranks hold equally many rows, so the last ones are padded with zeros; join cuts them off.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(ABC):
    """What is common: the simplest way to merge and split, one HF tensor as it is."""

    __slots__ = ()
    rule: ClassVar[str] = "as it is"

    def full_shape(self, hf_shapes: Sequence[Shape]) -> Shape:
        (shape,) = hf_shapes
        return shape

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]

    @abstractmethod
    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor: ...

    @abstractmethod
    def join(self, shards: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Replicated(Layout):
    """One HF tensor; every TP rank holds all of it."""

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        return full

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Sharded(Layout):
    """One HF tensor, cut evenly along one axis."""

    axis: int
    rule: ClassVar[str] = "as it is; TP cuts columns"

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        assert full.shape[self.axis] % tp_size == 0, "check_layout was not called"
        return full.chunk(tp_size, self.axis)[tp_rank]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0] if len(shards) == 1 else torch.cat(list(shards), self.axis)


@dataclass(frozen=True, slots=True)
class QKV(Sharded):
    """q_proj, k_proj and v_proj by query group; weights [rows, hidden] and biases [rows] alike."""

    rule: ClassVar[str] = "q, k, v by query group; TP cuts rows"
    num_groups: int
    heads_per_group: int
    head_dim: int

    def full_shape(self, hf_shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in hf_shapes), *hf_shapes[0][1:])

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def split(self, full: Tensor) -> list[Tensor]:
        rows = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.flatten(0, 1) for part in full.unflatten(0, (self.num_groups, sum(rows))).split(rows, dim=1)]


@dataclass(frozen=True, slots=True)
class GateUp(Layout):
    """gate_proj over up_proj."""

    rule: ClassVar[str] = "gate over up; TP cuts both"

    def full_shape(self, hf_shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in hf_shapes), *hf_shapes[0][1:])

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def split(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2))

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        assert full.shape[0] % (2 * tp_size) == 0, "check_layout was not called"
        parts = full.chunk(2 * tp_size)
        return torch.cat([parts[tp_rank], parts[tp_size + tp_rank]])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates_and_ups = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in gates_and_ups] + [up for _, up in gates_and_ups])


@dataclass(frozen=True, slots=True)
class ReplicatedGateUp(GateUp):
    """gate_proj over up_proj of an expert; every TP rank that has the expert holds all of it."""

    rule: ClassVar[str] = "gate over up"

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        return full

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True, slots=True)
class Vocabulary(Sharded):
    """Rows by token id, padded at the end to equal shards."""

    rule: ClassVar[str] = "as it is; TP cuts padded rows"
    vocab_size: int

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        rows = math.ceil(self.vocab_size / tp_size)
        own = full[tp_rank * rows : min((tp_rank + 1) * rows, self.vocab_size)]
        if len(own) == rows:
            return own
        return torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        # Explicit base: the zero-argument form does not find it in a slotted dataclass.
        return Sharded.join(self, shards)[: self.vocab_size]
