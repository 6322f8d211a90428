"""What a model is, read from the config.json of its HF folder, and which parallel layouts it admits."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_gppo.convert.errors import ConvertError

SUPPORTED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

T = TypeVar("T")


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
        config = _HfConfig.read(Path(folder))
        name = config.architecture()
        config.refuse("use_sliding_window", False)
        config.refuse("hidden_act", "silu")
        config.refuse("attention_bias", False)
        config.refuse("quantization_config", None)
        for layer_type in config.get("layer_types", list, []):
            if layer_type != "full_attention":
                raise ConvertError(f"{config.path}: layer_types has {layer_type}, which is not supported")

        num_attention_heads = config.size("num_attention_heads")
        num_kv_heads = config.size("num_key_value_heads")
        hidden_size = config.size("hidden_size")
        if num_attention_heads % num_kv_heads:
            raise ConvertError(
                f"{config.path}: num_key_value_heads = {num_kv_heads} does not divide num_attention_heads = {num_attention_heads}"
            )
        if name == "Qwen2ForCausalLM":
            if "head_dim" not in config.fields and hidden_size % num_attention_heads:
                raise ConvertError(
                    f"{config.path}: num_attention_heads = {num_attention_heads} does not divide hidden_size = {hidden_size}"
                )
            head_dim = config.size("head_dim", hidden_size // num_attention_heads)
        else:
            head_dim = config.size("head_dim", 128)
        return cls(
            name=name,
            num_layers=config.size("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=config.size("intermediate_size"),
            num_attention_heads=num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_position_embeddings"),
            rope_theta=config.rope_theta(),
            rms_norm_eps=config.positive("rms_norm_eps", config.fields.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(config.fields.get("tie_word_embeddings", False)),
            qkv_bias=name == "Qwen2ForCausalLM",
            qk_norm=name != "Qwen2ForCausalLM",
            dtype=config.dtype(),
            **(config.experts() if name == "Qwen3MoeForCausalLM" else {}),
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


@dataclass(frozen=True, slots=True)
class _HfConfig:
    """config.json, with errors that name it."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_HfConfig":
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}. Fix: give the folder of an HF model") from error
        except ValueError as error:
            raise ConvertError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConvertError(f"{path}: holds a {type(fields).__name__}, not an object")
        return cls(path, fields)

    def architecture(self) -> str:
        names = self.get("architectures", list, []) or [None]
        if names[0] not in SUPPORTED:
            raise ConvertError(
                f"{self.path}: architecture {names[0]} is not supported. Supported: {', '.join(SUPPORTED)}"
            )
        return str(names[0])

    def get(self, field: str, kind: type[T], default: T) -> T:
        """A field of one type; null and absent mean the default."""
        value = self.fields.get(field)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise ConvertError(f"{self.path}: {field} = {value!r} is not a {kind.__name__}")
        return value

    def positive(self, field: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConvertError(f"{self.path}: {field} = {value!r} is not a positive number")
        return float(value)

    def size(self, field: str, default: int | None = None) -> int:
        """A positive integer; null and absent mean the default."""
        value = self.fields.get(field)
        if value is None:
            value = default
        if value is None:
            raise ConvertError(f"{self.path}: {field} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConvertError(f"{self.path}: {field} = {value!r} is not a positive integer")
        return value

    def experts(self) -> dict[str, Any]:
        """Architecture's fields of a mixture of experts."""
        self.refuse("mlp_only_layers", [])
        self.refuse("decoder_sparse_step", 1)
        # transformers 5 writes num_local_experts.
        num_experts = self.size("num_experts", self.fields.get("num_local_experts"))
        per_token = self.size("num_experts_per_tok")
        normalized = bool(self.fields.get("norm_topk_prob", False))
        if per_token > num_experts:
            raise ConvertError(f"{self.path}: num_experts_per_tok = {per_token} of num_experts = {num_experts}")
        if per_token == 1 and normalized:
            raise ConvertError(
                f"{self.path}: norm_topk_prob = True with num_experts_per_tok = 1 gives the router no gradient, and is not supported"
            )
        return {
            "num_experts": num_experts,
            "experts_per_token": per_token,
            "expert_ffn_hidden_size": self.size("moe_intermediate_size"),
            "normalized_routing": normalized,
        }

    def refuse(self, field: str, supported: Any) -> None:
        """Raises if the field is there with anything but null or the value that is supported."""
        value = self.fields.get(field)
        if value is not None and value != supported:
            raise ConvertError(f"{self.path}: {field} = {value!r} is not supported; only {supported!r} is")

    def rope_theta(self) -> float:
        """transformers 5 keeps it in rope_parameters; before, it stood beside rope_scaling."""
        scaling = self.get("rope_parameters", dict, {}) or self.get("rope_scaling", dict, {})
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type != "default":
            raise ConvertError(
                f"{self.path}: rope type {rope_type!r} (scaled rotary positions) is not supported. "
                f"Fix: remove it if sequences stay within the original context"
            )
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConvertError(f"{self.path}: partial_rotary_factor is not supported; only 1.0 is")
        return self.positive("rope_theta", scaling.get("rope_theta", self.fields.get("rope_theta", 10000.0)))

    def dtype(self) -> torch.dtype:
        """transformers 5 calls it dtype, torch_dtype before."""
        name = self.get("dtype", str, "") or self.get("torch_dtype", str, "") or "float32"
        if name not in DTYPES:
            raise ConvertError(f"{self.path}: dtype {name} is not supported. Supported: {', '.join(DTYPES)}")
        return DTYPES[name]
