"""Layers for machines without TransformerEngine: an RMSNorm and packed attention, plugged into Megatron's local spec."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

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
    """Causal attention within each sequence of a packed (thd) row; grouped queries are not expanded on CUDA."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,  # [T, heads/TP, head_dim]
        key: torch.Tensor,  # [T, kv_heads/TP, head_dim]
        value: torch.Tensor,  # [T, kv_heads/TP, head_dim]
        attention_mask: torch.Tensor | None,
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:  # [T, heads/TP * head_dim]
        assert packed_seq_params is not None
        assert attention_mask is None
        if query.is_cuda and query.dtype != torch.float32:
            output = self._flash(query, key, value, packed_seq_params)
        else:
            output = self._sdpa(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
        return output.reshape(output.shape[0], -1)

    def _flash(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:  # torch 2.11's varlen_attn takes no grouped queries
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        output = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
        )
        assert isinstance(output, torch.Tensor)
        return output

    def _sdpa(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: list[int]) -> torch.Tensor:
        outputs = []
        for bounds in _blocks(cu_seqlens):
            start, end = bounds[0], bounds[-1]
            mask = None if len(bounds) == 2 else _block_diagonal_causal(bounds, query.device)
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
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


def _block_diagonal_causal(bounds: list[int], device: torch.device) -> torch.Tensor:
    """[n, n] bool, true where query i may see key j: the same sequence, j <= i."""
    lengths = torch.tensor(bounds).diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return ((sequence[:, None] == sequence[None, :]).tril()).to(device)
