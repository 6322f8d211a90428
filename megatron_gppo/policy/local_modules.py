"""Layers for machines without TransformerEngine: an RMSNorm and packed attention, plugged into Megatron's local spec."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_gppo.policy.context_parallel import token_positions, visible_keys, whole_row

# Sequences are attended in blocks of at most this many tokens under one block-diagonal mask: one call for many short
# sequences, while the masked-out part of a block stays small.
BLOCK_TOKENS = 512


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells Megatron to sum its gradient over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            self.to(torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a packed (thd) row; grouped queries are not expanded on CUDA.

    With context parallelism (R ranks; context_parallel.py has the cut) a rank's queries meet the keys and values of the
    whole row. These are gathered in every layer and kept for the backward: R times the memory of a rank's own keys and
    values, 2 * T * kv_heads/TP * head_dim numbers a layer, or of one layer at a time under full recompute. On CUDA in
    bf16 each of a rank's chunks also gets a copy of the keys that it sees, up to 1 + 1/2R times as much again. The [queries,
    keys] mask of a block on the CPU has R times fewer rows than without.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,  # [T/R, heads/TP, head_dim]
        key: torch.Tensor,  # [T/R, kv_heads/TP, head_dim]
        value: torch.Tensor,  # [T/R, kv_heads/TP, head_dim]
        attention_mask: torch.Tensor | None,
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:  # [T/R, heads/TP * head_dim]
        assert packed_seq_params is not None
        assert attention_mask is None
        if self.cp_group is None:
            return self.attend(query, key, value, packed_seq_params)
        row = whole_row(torch.stack([key, value], dim=1), packed_seq_params.cu_seqlens_q, self.cp_group)
        key, value = row.unbind(1)
        return self.attend(query, key, value, packed_seq_params, self.cp_group.rank(), self.cp_group.size())

    def attend(
        self,
        query: torch.Tensor,  # [T/R, heads/TP, head_dim], the part of `rank`
        key: torch.Tensor,  # [T, kv_heads/TP, head_dim], like value of the whole row
        value: torch.Tensor,
        packed: PackedSeqParams,
        rank: int = 0,
        size: int = 1,
    ) -> torch.Tensor:  # [T/R, heads/TP * head_dim]
        """The attention of one of `size` context-parallel ranks; no communication."""
        attend = self._flash if query.is_cuda and query.dtype != torch.float32 else self._sdpa
        return attend(query, key, value, packed, rank, size).reshape(query.shape[0], -1)

    def _flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
        rank: int,
        size: int,
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens_q, cu_seqlens_kv, max_seqlen_q = packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q
        if size > 1:
            # Each chunk is a sequence of its own, whose last query sees its last key: causal masks are aligned there.
            seen, cu_seqlens_kv = visible_keys(packed.cu_seqlens_q, rank, size)
            key, value = key.index_select(0, seen), value.index_select(0, seen)
            chunks = (packed.cu_seqlens_q.diff() // (2 * size)).repeat_interleave(2)
            cu_seqlens_q = torch.nn.functional.pad(chunks.cumsum(0), (1, 0)).int()
            max_seqlen_q = packed.max_seqlen_q // (2 * size)
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:  # torch 2.11's varlen_attn takes no grouped queries
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        output = varlen_attn(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_kv,
            max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
        )
        assert isinstance(output, torch.Tensor)
        return output

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
        rank: int,
        size: int,
    ) -> torch.Tensor:
        outputs = []
        for bounds in _blocks(packed.cu_seqlens_q.tolist()):
            start, end = bounds[0], bounds[-1]
            is_plain = len(bounds) == 2 and size == 1
            mask = None if is_plain else _block_diagonal_causal(bounds, rank, size).to(query.device)
            rows = query[start // size : end // size], key[start:end], value[start:end]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in rows)
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)


def _blocks(cu_seqlens: list[int]) -> list[list[int]]:
    """Cuts the sequences into runs of consecutive ones, each run given by its boundaries."""
    blocks = [[cu_seqlens[0]]]
    for end in cu_seqlens[1:]:
        block = blocks[-1]
        if len(block) > 1 and end - block[0] > BLOCK_TOKENS:
            blocks.append([block[-1]])
        blocks[-1].append(end)
    return blocks


def _block_diagonal_causal(bounds: list[int], rank: int, size: int) -> torch.Tensor:
    """[n/R, n] bool, true where query i of the rank may see key j: the same sequence, j not behind i."""
    cu_seqlens = torch.tensor(bounds) - bounds[0]
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    queries = token_positions(cu_seqlens, rank, size) if size > 1 else torch.arange(len(sequence))
    return (sequence[queries, None] == sequence[None, :]) & (torch.arange(len(sequence)) <= queries[:, None])
