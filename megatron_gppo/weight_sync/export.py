"""From the live policy to HF tensors in flattened buckets on global rank 0; called by every rank in lockstep.

    every TP rank   own shards of a bucket's parameters, cast and flattened
      -> TP rank 0  all of them; shards joined and split into HF tensors by convert's table
      -> rank 0     the finished bucket, sent by the pipeline stage that owns it

Experts are whole on their ranks, so the one that owns a bucket's experts splits them by itself and sends the finished
bucket to its stage's TP rank 0. A parameter that is whole on its rank goes straight from the live weights into the bucket.

Invariants
- Buckets come in the order of convert's table, cut only between parameters, and wherever their owner changes: pipeline
  stage, expert-parallel rank. Each HF tensor of the model is in exactly one of them. The embedding that tied models copy to
  their last stage is taken from the first.
- A bucket holds at most `bucket_bytes`, unless it is a single parameter that is larger.
- Only the first copy of the weights, and of the experts, takes part; the others have nothing to do.
- A rank holds a bucket's shards and their joined form at a time, never the model. Buckets take turns in two buffers, which
  stay for the next sync: while one bucket is being sent, the next is filled. Getting the memory anew costs a quarter of the
  time of sending it on the CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.convert.table import Parameter
from megatron_gppo.metrics import Phases
from megatron_gppo.parallel import ParallelState
from megatron_gppo.weight_sync.bucket import Bucket, Shape, num_bytes, unflatten


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
        self.device = next(iter(shards.values())).device
        self._buffers: list[Tensor] = []
        self._phases = Phases()

    @property
    def num_buckets(self) -> int:
        return len(self._plan)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._plan)

    @property
    def names(self) -> list[str]:
        """Of all HF tensors, in the order of the buckets."""
        return [name for part in self._plan for name in part.names]

    def bytes_of(self, bucket: int) -> int:
        """Size of the bucket with this number, counted from 0."""
        return self._plan[bucket].num_bytes

    def export(self, shards: Mapping[str, Tensor], phases: Phases | None = None) -> Iterator[Bucket | None]:
        """Yields `num_buckets` items on every rank: on rank 0 the buckets, on the shards' device; None elsewhere.

        `phases` gets the seconds of "gather" (collectives) and "convert" (joining shards, copying into the bucket).

        Every rank must exhaust the iterator: the peers of a rank that stops early wait for it. A bucket's memory is
        overwritten when the second one after it is taken.
        """
        parallel = self._parallel
        is_stage_root = parallel.tp_rank == 0 and parallel.is_first_copy
        self._phases = phases or Phases()
        for number, part in enumerate(self._plan):
            bucket = None
            if part.owner.stage == parallel.pp_rank:
                if part.owner.ep_rank is not None:
                    bucket = self._experts(number, shards, is_stage_root)
                elif parallel.is_first_copy:
                    bucket = self._join(number, shards)
            if part.owner.stage != 0 and is_stage_root:
                bucket = self._send_to_first_stage(number, bucket)
            yield bucket if parallel.rank == 0 else None

    def _experts(self, number: int, shards: Mapping[str, Tensor], is_stage_root: bool) -> Bucket | None:
        """The bucket on the stage's root, None on its other ranks."""
        parallel, part = self._parallel, self._plan[number]
        if parallel.expert_dp_rank != 0:
            return None
        bucket = None
        if parallel.ep_rank == part.owner.ep_rank:
            with self._phases("convert"):
                whole = [hf for parameter in part.parameters for hf in parameter.to_hf(shards[parameter.name].detach())]
                bucket = Bucket.flatten(whole, self._dtype, self._buffer(number))
        if part.owner.ep_rank == 0:
            return bucket
        if bucket is not None:
            with self._phases("gather"):
                dist.send(bucket.data, group=parallel.ep_group, group_dst=0)
            return None
        return self._receive(number, parallel.ep_group, part.owner.ep_rank) if is_stage_root else None

    def _join(self, number: int, shards: Mapping[str, Tensor]) -> Bucket | None:
        """The bucket on TP rank 0 of the owning stage, None on its other TP ranks."""
        part = self._plan[number]
        own = [shards[parameter.name].detach() for parameter in part.parameters]
        with self._phases("gather"):
            by_rank = [own] if self._parallel.tp_size == 1 else self._gather_over_tp(own)
        if not by_rank:
            return None
        with self._phases("convert"):
            hf_tensors = [
                hf_tensor
                for parameter, tp_shards in zip(part.parameters, zip(*by_rank, strict=True), strict=True)
                for hf_tensor in parameter.to_hf(parameter.join(tp_shards))
            ]
            return Bucket.flatten(hf_tensors, self._dtype, self._buffer(number))

    def _gather_over_tp(self, own: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every TP rank's shards on TP rank 0, nothing on the others."""
        flat = torch.cat([shard.to(self._dtype).reshape(-1) for shard in own]).view(torch.uint8)
        group = self._parallel.tp_group
        gathered = []
        # Not dist.gather, which takes gloo several times as long; NCCL does the same for both.
        if self._parallel.tp_rank == 0:
            gathered = [flat, *(torch.empty_like(flat) for _ in range(1, self._parallel.tp_size))]
            transfers = [
                dist.P2POp(dist.irecv, part, group=group, group_peer=rank)
                for rank, part in enumerate(gathered[1:], start=1)
            ]
        else:
            transfers = [dist.P2POp(dist.isend, flat, group=group, group_peer=0)]
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        return [unflatten(shards, [tuple(shard.shape) for shard in own], self._dtype) for shards in gathered]

    def _send_to_first_stage(self, number: int, bucket: Bucket | None) -> Bucket | None:
        group = self._parallel.pp_group
        if bucket is not None:
            with self._phases("gather"):
                dist.send(bucket.data, group=group, group_dst=0)
            return None
        return self._receive(number, group, self._plan[number].owner.stage) if self._parallel.pp_rank == 0 else None

    def _receive(self, number: int, group: dist.ProcessGroup | None, group_src: int | None) -> Bucket:
        part = self._plan[number]
        data = self._buffer(number)[: part.num_bytes]
        with self._phases("gather"):
            dist.recv(data, group=group, group_src=group_src)
        return Bucket(part.names, part.shapes, self._dtype, data)

    def _buffer(self, number: int) -> Tensor:
        """[bytes of the largest bucket] uint8: one of two, in turn. Only ranks that fill or receive buckets have them."""
        if not self._buffers:
            capacity = max(part.num_bytes for part in self._plan)
            self._buffers = [torch.empty(capacity, dtype=torch.uint8, device=self.device) for _ in range(2)]
        return self._buffers[number % 2]


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
    def shapes(self) -> list[Shape]:
        return [shape for parameter in self.parameters for shape in parameter.hf_shapes]


def _plan(
    parameters: Sequence[Parameter], owners: Mapping[str, _Owner], dtype: torch.dtype, bucket_bytes: int
) -> list[_Part]:
    plan: list[_Part] = []
    for parameter in parameters:
        owner = owners[parameter.name]
        size = num_bytes(parameter.hf_shapes, dtype)
        if plan and plan[-1].owner == owner and plan[-1].num_bytes + size <= bucket_bytes:
            last = plan.pop()
            plan.append(_Part(owner, [*last.parameters, parameter], last.num_bytes + size))
        else:
            plan.append(_Part(owner, [parameter], size))
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
