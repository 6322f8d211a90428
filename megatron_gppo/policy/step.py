"""Forward and backward through Megatron's pipeline schedules.

Two hazards have their home here.

Loss scaling. policy_loss divides by the update's global count, so the gradient of an update is the plain sum over
micro-batches, data-parallel ranks and context-parallel parts, and Megatron must divide by nothing. That holds because the loss function
returns three values (two would be multiplied by cp and divided by the number of micro-batches), num_tokens is an int (its running sum is
never used), calculate_per_token_loss is on (no division by it, no 1/(DP * CP) in the gradient buffers), and
finalize_gradients withholds num_tokens from finalize_model_grads (no division at the end).

Log-probs exist only on the last pipeline stage, and each context-parallel rank has those of its part. score() puts rows
together and sends them to all stages, and accumulate_gradients() the statistics, so callers never ask where they are:
outside of this module and the model a micro-batch is always a whole row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gppo.algorithm import LossOutput, linear_logprobs_and_entropy, loss_denominator, policy_loss
from megatron_gppo.config import LossConfig
from megatron_gppo.datatypes import MicroBatch, ScoredBatch
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy.context_parallel import own_part, own_tokens, whole_rows
from megatron_gppo.policy.interleaving import interleaved_arguments
from megatron_gppo.policy.model import PolicyModel


@dataclass(frozen=True, slots=True)
class Network:
    """The policy's chunks with what their forward needs beside a micro-batch."""

    chunks: Sequence[DistributedDataParallel]
    parallel: ParallelState
    vocab_size: int  # without padding
    temperature: float
    sequence_parallel: bool
    on_microbatch: Callable[[], None] = lambda: None

    def logprobs_and_entropy(
        self, model: PolicyModel, hidden: torch.Tensor, targets: torch.Tensor, with_entropy: bool, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T] fp32 each, of the last stage's output, [T, 1, H] or this rank's part of it under sequence parallelism."""
        weight = model.head_weight
        return linear_logprobs_and_entropy(
            hidden.squeeze(1),
            weight,
            targets,
            vocab_size=self.vocab_size,
            tp_group=self.parallel.tp_group if self.parallel.tp_size > 1 else None,
            sequence_parallel=self.sequence_parallel,
            temperature=self.temperature,
            with_entropy=with_entropy,
            entropy_requires_grad=entropy_grad,
            main_grad=weight.main_grad,  # type: ignore[attr-defined]
        )


class LossSums(NamedTuple):
    """LossOutput over an update: all micro-batches, data- and context-parallel ranks."""

    loss: float
    sums: dict[str, float]
    maxima: dict[str, float]
    ratio_histogram: list[float]


@torch.no_grad()
def score(network: Network, microbatches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Log-probs of each micro-batch under the current weights: [T] float32 on the CPU of every rank, 0 outside the mask."""

    def collect(
        model: PolicyModel, index: int, batch: MicroBatch, hidden: torch.Tensor, non_loss_data: bool
    ) -> torch.Tensor:
        logprobs, _ = network.logprobs_and_entropy(model, hidden, batch.targets, False, False)
        return torch.where(batch.loss_mask, logprobs, 0.0)

    outputs = _run_schedule(network, microbatches, collect, forward_only=True)
    parallel = network.parallel
    if parallel.is_last_pp_stage:
        outputs = whole_rows(outputs, microbatches, parallel)
    if parallel.pp_size == 1:
        return [output.cpu() for output in outputs]
    lengths = [len(batch.targets) for batch in microbatches]
    if parallel.is_last_pp_stage:
        flat = torch.cat(outputs)
    else:
        flat = torch.empty(sum(lengths), dtype=torch.float32, device=torch.cuda.current_device())
    dist.broadcast(flat, group=parallel.pp_group, group_src=parallel.pp_size - 1)
    return list(flat.cpu().split(lengths))


def accumulate_gradients(
    network: Network, batch: ScoredBatch, config: LossConfig, max_response_tokens: int
) -> LossSums:
    """Adds the update's gradient to the chunks' main gradients. Returns what policy_loss saw, equal on every rank."""
    update, parallel = batch.update, network.parallel
    denominator = loss_denominator(config, update, max_response_tokens=max_response_tokens)

    def loss(
        model: PolicyModel, index: int, packed: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, int, LossOutput]:
        def own(scored: Sequence[torch.Tensor]) -> torch.Tensor:
            return own_tokens(scored[index], update.microbatches[index].cu_seqlens, parallel).to(hidden.device)

        logprobs, entropy = network.logprobs_and_entropy(model, hidden, packed.targets, True, config.entropy_coef > 0)
        output = policy_loss(
            config,
            logprobs=logprobs,
            old_logprobs=own(batch.old_logprobs),
            advantages=packed.advantages,
            loss_mask=packed.loss_mask,
            denominator=denominator,
            cu_seqlens=packed.cu_seqlens,
            sequence_lengths=packed.sequence_lengths,
            group_lengths=packed.group_lengths,
            entropy=entropy,
            ref_logprobs=None if batch.ref_logprobs is None else own(batch.ref_logprobs),
            rollout_logprobs=packed.rollout_logprobs,
            correct=packed.correct,
            num_correct_tokens=update.num_correct_tokens,
            cp_group=parallel.cp_group if parallel.cp_size > 1 else None,
        )
        return output.loss, 1, replace(output, loss=output.loss.detach())

    outputs = _run_schedule(network, update.microbatches, loss, forward_only=False)
    return _reduce(outputs, parallel)


def finalize_gradients(
    chunks: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **kwargs: Any
) -> None:
    """Sums gradients over ranks; the token count that Megatron would divide by is dropped."""
    finalize_model_grads(chunks, None, **kwargs)


def _run_schedule(
    network: Network, microbatches: Sequence[MicroBatch], output_function: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    """One pass of all micro-batches. On the last stage: what output_function returned for each, in order; else [].

    output_function(model, index, batch, hidden) sees this rank's part of the micro-batch, on the device.
    """

    def forward_step(
        batches: Iterator[tuple[int, MicroBatch]], model: DistributedDataParallel
    ) -> tuple[torch.Tensor, Any]:
        network.on_microbatch()
        index, row = next(batches)
        batch = _to_device(own_part(row, network.parallel))
        hidden = model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=_packed_seq_params(row, network.parallel),
        )
        return hidden, partial(output_function, model.module, index, batch)

    chunks = list(network.chunks)
    iterators = [enumerate(microbatches) for _ in chunks]
    longest = max(len(batch.input_ids) for batch in microbatches)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=longest,  # only an upper bound: variable_seq_lengths exchanges the real shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **(interleaved_arguments(chunks) if len(chunks) > 1 else {}),
    )
    return list(outputs) if network.parallel.is_last_pp_stage else []


def _to_device(batch: MicroBatch) -> MicroBatch:
    device = torch.cuda.current_device()
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return MicroBatch(**values | {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def _packed_seq_params(row: MicroBatch, parallel: ParallelState) -> PackedSeqParams:
    """Bounds and longest length of the whole row's sequences, also where a rank holds a part of each."""
    cu_seqlens = row.cu_seqlens.to(torch.cuda.current_device(), non_blocking=True)
    longest = int(row.cu_seqlens.diff().max())
    # TransformerEngine asks for them under context parallelism. Here padding is the end of its sequence, where causal
    # attention hides it, so they are the bounds.
    padded = cu_seqlens if parallel.cp_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _reduce(outputs: list[LossOutput], parallel: ParallelState) -> LossSums:
    """Adds the last stage's outputs over micro-batches, data- and context-parallel ranks, and tells all stages."""
    result: list[Any] = [None]
    if parallel.is_last_pp_stage:
        first = outputs[0]
        sums = torch.stack([_flat(output.loss, *output.metrics.values(), output.ratio_histogram) for output in outputs])
        maxima = torch.stack([_flat(*output.maxima.values()) for output in outputs])
        sums, maxima = sums.sum(0), maxima.amax(0)
        for size, group in ((parallel.dp_size, parallel.dp_group), (parallel.cp_size, parallel.cp_group)):
            if size > 1:
                dist.all_reduce(sums, group=group)
                dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        loss, *values = sums.tolist()
        metrics, histogram = values[: len(first.metrics)], values[len(first.metrics) :]
        result = [
            LossSums(
                loss,
                dict(zip(first.metrics, metrics, strict=True)),
                dict(zip(first.maxima, maxima.tolist(), strict=True)),
                histogram,
            )
        ]
    if parallel.pp_size > 1:
        dist.broadcast_object_list(result, group=parallel.pp_group, group_src=parallel.pp_size - 1)
    return result[0]


def _flat(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()
