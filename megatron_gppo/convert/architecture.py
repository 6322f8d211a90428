"""What a model is, read from the config.json of its HF folder, and which parallel layouts it admits."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.hf_config import HfConfig

# The architectures that are supported, and their model_type.
SUPPORTED = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# More than any model has. What lists layers, experts or TP sizes would take for ever with a number that is damaged.
MOST_LAYERS, MOST_EXPERTS, MOST_HEADS = 1000, 10_000, 10_000


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Qwen decoder: pre-norm (RMSNorm), rotary positions, grouped-query attention, SwiGLU.

    Qwen2ForCausalLM covers Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen. Qwen3MoeForCausalLM has routed experts, and nothing
    but these, in the place of every layer's MLP.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_kv_heads: int  # Megatron's query groups
    head_dim: int  # num_attention_heads * head_dim need not be hidden_size
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tied_embeddings: bool  # lm_head.weight is the embedding
    qkv_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head
    dtype: torch.dtype  # as config.json names it; what the weights have is in their files
    num_experts: int = 0  # of each layer; 0 for a dense model
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    normalized_routing: bool = False  # the weights of a token's experts sum to 1

    @classmethod
    def from_hf(cls, folder: str | Path) -> "Architecture":
        """Reads `folder`/config.json, as written by any version of transformers.

        Raises ConvertError for a missing or broken file, an architecture that is not SUPPORTED, a missing field, and
        for what Megatron's model would silently do otherwise: sliding windows, scaled rotary positions, quantization.
        """
        config = HfConfig.read(Path(folder))
        name = _architecture(config)
        config.refuse("use_sliding_window", False)
        config.refuse("hidden_act", "silu")
        config.refuse("attention_bias", False)
        config.refuse("quantization_config", None)
        for layer_type in config.get("layer_types", list, []):
            if layer_type != "full_attention":
                raise config.error(
                    f"layer_types has {layer_type}, which is not supported", "convert a model of full_attention"
                )

        num_attention_heads = config.size("num_attention_heads", most=MOST_HEADS)
        num_kv_heads = config.size("num_key_value_heads", most=MOST_HEADS)
        if num_attention_heads % num_kv_heads:
            raise config.error(
                f"num_key_value_heads = {num_kv_heads} does not divide num_attention_heads = {num_attention_heads}"
            )
        return cls(
            name=name,
            num_layers=config.size("num_hidden_layers", most=MOST_LAYERS),
            hidden_size=config.size("hidden_size"),
            ffn_hidden_size=config.size("intermediate_size"),
            num_attention_heads=num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(config, name, num_attention_heads),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_position_embeddings"),
            rope_theta=config.rope_theta(),
            rms_norm_eps=config.positive("rms_norm_eps", config.fields.get("rms_norm_eps", 1e-6)),
            tied_embeddings=config.get("tie_word_embeddings", bool, False),
            qkv_bias=name == "Qwen2ForCausalLM",
            qk_norm=name != "Qwen2ForCausalLM",
            dtype=_dtype(config),
            **(_experts(config) if name == "Qwen3MoeForCausalLM" else {}),
        )

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the live model's embedding: the next multiple of `tp`."""
        return math.ceil(self.vocab_size / tp) * tp

    def check_layout(self, *, tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1) -> None:
        """Raises ConvertError, naming the size at fault and those that would do, unless the model can be cut like this."""
        for reason in self._tp_obstacles(tp):
            usable = [n for n in range(1, self.num_attention_heads + 1) if not self._tp_obstacles(n)]
            raise ConvertError(f"tp = {tp} {reason} of {self.name}. Fix: set tp to one of {usable}")
        chunks = pp * (vpp or 1)
        if self.num_layers % chunks:
            size = f"pp = {pp}" if vpp is None else f"pp * vpp = {pp} * {vpp}"
            relation = "is larger than" if chunks > self.num_layers else "does not divide"
            usable = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise ConvertError(
                f"{size} {relation} num_hidden_layers = {self.num_layers} of {self.name}. Fix: make it one of {usable}"
            )
        if ep != 1 and not self.num_experts:
            raise ConvertError(f"ep = {ep}, but {self.name} has no experts. Fix: set ep to 1")
        if self.num_experts % ep:
            usable = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ConvertError(
                f"ep = {ep} does not divide num_experts = {self.num_experts} of {self.name}. Fix: set ep to one of {usable}"
            )

    def _tp_obstacles(self, tp: int) -> list[str]:
        obstacles = []
        if self.num_attention_heads % tp:
            obstacles.append(f"does not divide num_attention_heads = {self.num_attention_heads}")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            obstacles.append(f"neither divides nor is a multiple of num_key_value_heads = {self.num_kv_heads}")
        if self.ffn_hidden_size % tp and not self.num_experts:  # experts are not cut
            obstacles.append(f"does not divide intermediate_size = {self.ffn_hidden_size}")
        # With fewer KV heads than ranks Megatron cuts the rows of linear_qkv evenly, through the middle of heads.
        if 2 * self.num_kv_heads * self.head_dim % tp:
            obstacles.append(f"does not divide the {2 * self.num_kv_heads * self.head_dim} key and value rows")
        return obstacles


def _architecture(config: HfConfig) -> str:
    name = str((config.get("architectures", list, []) or [None])[0])
    if name not in SUPPORTED:
        raise config.error(
            f"architecture {name} is not supported. Supported: {', '.join(SUPPORTED)}", "convert a model of these"
        )
    model_type = config.get("model_type", str, SUPPORTED[name])
    if model_type != SUPPORTED[name]:
        raise config.error(
            f"model_type = {model_type!r} contradicts architectures, as {name}'s is {SUPPORTED[name]!r}",
            "correct the one that is wrong",
        )
    return name


def _head_dim(config: HfConfig, name: str, num_attention_heads: int) -> int:
    """As transformers has it, where it is absent: 128 for Qwen3's dense models, and for these alone."""
    if config.fields.get("head_dim") is not None:
        return config.size("head_dim")
    if name == "Qwen3ForCausalLM":
        return 128
    hidden_size = config.size("hidden_size")
    if hidden_size % num_attention_heads:
        raise config.error(f"num_attention_heads = {num_attention_heads} does not divide hidden_size = {hidden_size}")
    return hidden_size // num_attention_heads


def _dtype(config: HfConfig) -> torch.dtype:
    """transformers 5 calls it dtype, torch_dtype before."""
    name = config.get("dtype", str, "") or config.get("torch_dtype", str, "") or "float32"
    if name not in DTYPES:
        raise config.error(f"dtype {name} is not supported. Supported: {', '.join(DTYPES)}", "save the model in one")
    return DTYPES[name]


def _experts(config: HfConfig) -> dict[str, Any]:
    """Architecture's fields of a mixture of experts."""
    config.refuse("mlp_only_layers", [])
    config.refuse("decoder_sparse_step", 1)
    # transformers 5 writes num_local_experts.
    given = [field for field in ("num_experts", "num_local_experts") if config.fields.get(field) is not None]
    num_experts = config.size(given[0] if given else "num_experts", most=MOST_EXPERTS)
    per_token = config.size("num_experts_per_tok")
    normalized = config.get("norm_topk_prob", bool, False)
    if per_token > num_experts:
        raise config.error(f"num_experts_per_tok = {per_token} of num_experts = {num_experts}")
    if per_token == 1 and normalized:
        raise config.error(
            "norm_topk_prob = True with num_experts_per_tok = 1 gives the router no gradient, and is not supported",
            "convert a model with more experts a token",
        )
    return {
        "num_experts": num_experts,
        "experts_per_token": per_token,
        "expert_ffn_hidden_size": config.size("moe_intermediate_size"),
        "normalized_routing": normalized,
    }
