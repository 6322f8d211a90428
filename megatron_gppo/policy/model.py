"""The policy network: Megatron-Core GPT chunks built from an Architecture alone."""

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy.local_modules import PackedAttention, RMSNorm

try:
    import transformer_engine.pytorch  # noqa: F401

    # TransformerEngine has no CPU kernels, so its presence alone decides nothing.
    USE_TRANSFORMER_ENGINE = torch.cuda.is_available()
except ImportError:
    USE_TRANSFORMER_ENGINE = False

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class PolicyModel(GPTModel):
    """A GPT whose last stage returns hidden states: log-probs are computed from them without building logits."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states  # [T, 1, H]; [T/TP, 1, H] under sequence parallelism

    @property
    def head_weight(self) -> torch.Tensor:
        """[V/TP, H], padded vocabulary included. Only on a chunk that has the output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(architecture: Architecture, config: Config) -> TransformerConfig:
    """Megatron's configuration for this architecture and layout."""
    on_cuda = torch.cuda.is_available()
    dtype = DTYPES[config.model.dtype]
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    by_version = {
        # Gone in newer releases of Megatron-Core.
        "async_tensor_model_parallel_allreduce": False,
    }
    recompute = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if config.train.recompute == "full"
        else {}
    )
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=config.parallel.tp,
        pipeline_model_parallel_size=config.parallel.pp,
        virtual_pipeline_model_parallel_size=_vpp(config),
        context_parallel_size=config.parallel.cp,
        sequence_parallel=config.parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Packed micro-batches differ in length, which Megatron allows between pipeline stages only together with this
        # dispatcher, for dense models too.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=True,
        # Two interleaved stages can tell forward from backward messages only when these are not sent as one batch.
        overlap_p2p_comm=_vpp(config) is not None,
        batch_p2p_comm=_vpp(config) is None,
        # The loss arrives divided by the update's global count: see policy/step.py.
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_cuda,
        # Needless for the values, which are loaded; but it is initialisation that marks weights as tensor-parallel shards,
        # and a gradient norm over unmarked ones leaves out all ranks but the first.
        perform_initialization=not _on_meta(),  # there it takes a millisecond a weight, and nothing is reduced
        gradient_accumulation_fusion=False,
        apply_rope_fusion=USE_TRANSFORMER_ENGINE,
        bias_activation_fusion=USE_TRANSFORMER_ENGINE,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=USE_TRANSFORMER_ENGINE,
        **(_expert_settings(architecture, config) if architecture.num_experts else {}),
        **{name: value for name, value in by_version.items() if name in known},
        **recompute,
    )


def _expert_settings(architecture: Architecture, config: Config) -> dict[str, Any]:
    """Qwen3-MoE's routing: softmax, top k, no shared experts; no auxiliary loss, which would not be the objective's."""
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_pre_softmax": not architecture.normalized_routing,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": USE_TRANSFORMER_ENGINE,
        "expert_model_parallel_size": config.parallel.ep,
        "expert_tensor_parallel_size": 1,
    }


def build_chunks(architecture: Architecture, config: Config, parallel: ParallelState) -> list[PolicyModel]:
    """This rank's model chunks, one unless the pipeline is interleaved. Weights are not initialised.

    Where meta is torch's default device, that is where they are.
    """
    megatron_config = transformer_config(architecture, config)
    vpp = _vpp(config)
    chunks = []
    for vp_stage in range(vpp or 1):
        first = parallel.pp_rank == 0 and vp_stage == 0
        last = parallel.is_last_pp_stage and vp_stage == (vpp or 1) - 1
        chunk = PolicyModel(
            config=megatron_config,
            transformer_layer_spec=_layer_spec(megatron_config, vp_stage if vpp else None, parallel.pp_rank),
            vocab_size=architecture.padded_vocab_size(config.parallel.tp),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=vp_stage if vpp else None,
        )
        _reduce_experts_over_their_copies(chunk)
        chunks.append(chunk if _on_meta() else chunk.to(torch.cuda.current_device()))
    return chunks


def _reduce_experts_over_their_copies(chunk: PolicyModel) -> None:
    """Makes Megatron sum an expert's gradient over all ranks that hold it, its tensor-parallel neighbours included.

    Megatron asks for that only if ep > 1, and else sums over data-parallel ranks. But tensor-parallel ranks hold whole
    experts here (expert_tensor_parallel_size 1) and, under sequence parallelism, give each of them other tokens.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def _vpp(config: Config) -> int | None:
    return config.parallel.vpp if config.parallel.vpp and config.parallel.vpp > 1 else None


def _layer_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    if USE_TRANSFORMER_ENGINE:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # It would name the norm before experts as if it were fused into a linear, which TransformerEngine does not do.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
