"""From the live policy to HF tensors in flattened buckets on global rank 0; called by every rank in lockstep.

    every TP rank   own shards of a bucket's parameters, cast and flattened
      -> TP rank 0  one gather a bucket; shards joined and split into HF tensors by convert's table
      -> rank 0     the finished bucket, sent by the pipeline stage that owns it

Experts are whole on their ranks, so the one that owns a bucket's experts splits them by itself and sends the finished
bucket to its stage's TP rank 0.

Invariants
- Buckets come in the order of convert's table, cut only between parameters, and wherever their owner changes: pipeline
  stage, expert-parallel rank. Each HF tensor of the model is in exactly one of them. The embedding that tied models copy to
  their last stage is taken from the first.
- A bucket holds at most `bucket_bytes`, unless it is a single parameter that is larger.
- Only the first copy of the weights, and of the experts, takes part; the others return at once.
- A rank holds a bucket's shards, their joined form and the bucket at a time, never the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.convert.table import Parameter
from megatron_gppo.parallel import ParallelState


@dataclass(frozen=True, slots=True)
class Bucket:
    """HF tensors, one behind the other in one buffer.

    Example. Two bf16 tensors "a" [2, 3] and "b" [4] make names ["a", "b"], shapes [(2, 3), (4,)] and 20 bytes of data.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype  # of every tensor
    data: Tensor  # [bytes] uint8

    @classmethod
    def flatten(cls, tensors: Sequence[tuple[str, Tensor]], dtype: torch.dtype) -> "Bucket":
        return cls(
            names=[name for name, _ in tensors],
            shapes=[tuple(tensor.shape) for _, tensor in tensors],
            dtype=dtype,
            data=_flatten([tensor for _, tensor in tensors], dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Views of `data` by HF name."""
        return dict(zip(self.names, _unflatten(self.data, self.shapes, self.dtype), strict=True))


class Exporter:
    """The division of one policy into buckets, and the collective that fills them.

    Constructing it is collective over all ranks too. `shards` are this rank's parameters by canonical name; later calls of
    `export` need the same names and shapes.

    Raises ValueError, on every rank alike, when a parameter of the table is on no rank, or a shard has a name or a shape
    that the table does not have.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        shards: Mapping[str, Tensor],
        parallel: ParallelState,
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        is_stage_root = parallel.tp_rank == 0 and parallel.is_first_copy
        assert (parallel.rank == 0) == (parallel.pp_rank == 0 and is_stage_root)
        assert not is_stage_root or parallel.ep_rank == parallel.expert_dp_rank == 0
        self._parallel = parallel
        self._dtype = dtype
        self._plan = _plan(parameters, _owners(parameters, shards, parallel), dtype, bucket_bytes)

    @property
    def num_buckets(self) -> int:
        return len(self._plan)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._plan)

    def export(self, shards: Mapping[str, Tensor]) -> Iterator[Bucket]:
        """Yields the `num_buckets` buckets on rank 0, on the shards' device, and nothing elsewhere.

        Every rank must exhaust the iterator: the peers of a rank that stops early wait for it.
        """
        parallel = self._parallel
        device = next(iter(shards.values())).device
        is_stage_root = parallel.tp_rank == 0 and parallel.is_first_copy
        for part in self._plan:
            bucket = None
            if part.owner.stage == parallel.pp_rank:
                if part.owner.ep_rank is not None:
                    bucket = self._experts(part, shards, is_stage_root, device)
                elif parallel.is_first_copy:
                    bucket = self._join(part, shards)
            if part.owner.stage != 0 and is_stage_root:
                bucket = self._send_to_first_stage(part, bucket, device)
            if bucket is not None and parallel.rank == 0:
                yield bucket

    def _experts(
        self, part: "_Part", shards: Mapping[str, Tensor], is_stage_root: bool, device: torch.device
    ) -> Bucket | None:
        """The bucket on the stage's root, None on its other ranks."""
        parallel = self._parallel
        if parallel.expert_dp_rank != 0:
            return None
        bucket = None
        if parallel.ep_rank == part.owner.ep_rank:
            whole = [hf for parameter in part.parameters for hf in parameter.to_hf(shards[parameter.name].detach())]
            bucket = Bucket.flatten(whole, self._dtype)
        if part.owner.ep_rank == 0:
            return bucket
        if bucket is not None:
            dist.send(bucket.data, group=parallel.ep_group, group_dst=0)
            return None
        return self._receive(part, parallel.ep_group, part.owner.ep_rank, device) if is_stage_root else None

    def _join(self, part: "_Part", shards: Mapping[str, Tensor]) -> Bucket | None:
        """The bucket on TP rank 0 of the owning stage, None on its other TP ranks."""
        own = _flatten([shards[parameter.name].detach() for parameter in part.parameters], self._dtype)
        gathered = self._gather_over_tp(own)
        if not gathered:
            return None
        shard_shapes = [tuple(shards[parameter.name].shape) for parameter in part.parameters]
        by_rank = [_unflatten(flat, shard_shapes, self._dtype) for flat in gathered]
        hf_tensors = [
            hf_tensor
            for parameter, tp_shards in zip(part.parameters, zip(*by_rank, strict=True), strict=True)
            for hf_tensor in parameter.to_hf(parameter.join(tp_shards))
        ]
        return Bucket.flatten(hf_tensors, self._dtype)

    def _gather_over_tp(self, own: Tensor) -> list[Tensor]:
        if self._parallel.tp_size == 1:
            return [own]
        is_root = self._parallel.tp_rank == 0
        gathered = [torch.empty_like(own) for _ in range(self._parallel.tp_size)] if is_root else []
        dist.gather(own, gathered if is_root else None, group=self._parallel.tp_group, group_dst=0)
        return gathered

    def _send_to_first_stage(self, part: "_Part", bucket: Bucket | None, device: torch.device) -> Bucket | None:
        group = self._parallel.pp_group
        if bucket is not None:
            dist.send(bucket.data, group=group, group_dst=0)
            return None
        return self._receive(part, group, part.owner.stage, device) if self._parallel.pp_rank == 0 else None

    def _receive(
        self, part: "_Part", group: dist.ProcessGroup | None, group_src: int | None, device: torch.device
    ) -> Bucket:
        data = torch.empty(part.num_bytes, dtype=torch.uint8, device=device)
        dist.recv(data, group=group, group_src=group_src)
        return Bucket(part.names, part.shapes, self._dtype, data)


@dataclass(frozen=True, slots=True, order=True)
class _Owner:
    """Where a parameter is."""

    stage: int
    ep_rank: int | None  # None: cut over the TP ranks of the stage, which is all but experts


@dataclass(frozen=True, slots=True)
class _Part:
    """What one bucket will hold."""

    owner: _Owner  # of all of its parameters
    parameters: list[Parameter]
    num_bytes: int

    @property
    def names(self) -> list[str]:
        return [name for parameter in self.parameters for name in parameter.hf_names]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for parameter in self.parameters for shape in parameter.hf_shapes]


def _plan(
    parameters: Sequence[Parameter], owners: Mapping[str, _Owner], dtype: torch.dtype, bucket_bytes: int
) -> list[_Part]:
    plan: list[_Part] = []
    for parameter in parameters:
        owner = owners[parameter.name]
        num_bytes = dtype.itemsize * sum(torch.Size(shape).numel() for shape in parameter.hf_shapes)
        if plan and plan[-1].owner == owner and plan[-1].num_bytes + num_bytes <= bucket_bytes:
            last = plan.pop()
            plan.append(_Part(owner, [*last.parameters, parameter], last.num_bytes + num_bytes))
        else:
            plan.append(_Part(owner, [parameter], num_bytes))
    return plan


def _owners(
    parameters: Sequence[Parameter], shards: Mapping[str, Tensor], parallel: ParallelState
) -> dict[str, _Owner]:
    """Where each parameter is by name; the first stage that has it. Collective over all ranks."""
    experts = {parameter.name for parameter in parameters if parameter.expert is not None}
    mine: list[tuple[str, int, int | None]] = []
    for name in shards:
        if name in experts and parallel.expert_dp_rank == 0:
            mine.append((name, parallel.pp_rank, parallel.ep_rank))
        elif name not in experts and parallel.is_first_copy:
            mine.append((name, parallel.pp_rank, None))
    found = parallel.gather((mine, _mistakes(parameters, shards, parallel)))

    owners: dict[str, _Owner] = {}
    mistakes: list[str] = []
    for held, wrong in found:
        mistakes += wrong
        for name, stage, ep_rank in held:
            owner = _Owner(stage, ep_rank)
            owners[name] = min(owners.get(name, owner), owner)
    mistakes += [f"{parameter.name} is on no rank" for parameter in parameters if parameter.name not in owners]
    if mistakes:
        raise ValueError(f"the policy does not fit the table of its architecture: {'; '.join(mistakes)}")
    return owners


def _mistakes(parameters: Sequence[Parameter], shards: Mapping[str, Tensor], parallel: ParallelState) -> list[str]:
    table = {parameter.name: parameter for parameter in parameters}
    mistakes = [f"rank {parallel.rank} has an unknown parameter {name}" for name in shards.keys() - table.keys()]
    for name in shards.keys() & table.keys():
        full = torch.empty(table[name].shape, device="meta")
        expected = tuple(table[name].shard(full, parallel.tp_rank, parallel.tp_size).shape)
        if tuple(shards[name].shape) != expected:
            mistakes.append(f"rank {parallel.rank} has {name} of shape {tuple(shards[name].shape)}, not {expected}")
    return sorted(mistakes)


def _flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[bytes] uint8, a copy."""
    return torch.cat([tensor.to(dtype).reshape(-1) for tensor in tensors]).view(torch.uint8)


def _unflatten(data: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Views of [bytes] uint8, which they fill exactly."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [flat.view(shape) for flat, shape in zip(data.view(dtype).split(sizes), shapes, strict=True)]
