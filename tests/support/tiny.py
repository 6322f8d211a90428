"""Tiny random HF models with a character-level tokenizer, for tests that want a real folder to start from."""

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

SPECIAL_TOKENS = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHARACTERS = string.digits + "+-*/=?.,: \n" + "\\{}" + string.ascii_lowercase + "AQTU()<>"
# Byte-level BPE, Qwen's tokenizer, spells a space and a line break in its own way.
VOCABULARY = SPECIAL_TOKENS + [{" ": "Ġ", "\n": "Ċ"}.get(character, character) for character in CHARACTERS]
VOCAB_SIZE = 65  # odd, and larger than the tokenizer's, as in the released Qwen models

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tiny_tokenizer() -> Qwen2Tokenizer:
    """One token a character: Qwen's byte-level BPE without merges. Characters outside CHARACTERS are dropped.

    It must be Qwen2Tokenizer: for model_type qwen2, AutoTokenizer builds that class whatever tokenizer_config.json says.
    """
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(
    folder: Path,
    architecture: str = "Qwen2ForCausalLM",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    stacked_experts: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write a random model of 4 layers, hidden 64, 4 heads and 2 KV heads to `folder`, which is returned.

    A mixture has 4 experts a layer, 2 a token, each in tensors of its own unless `stacked_experts`.
    `config_overrides` replace fields of the HF config (`tie_word_embeddings=True`, `vocab_size=101`, ...). All weights,
    biases and norms included, are random, so that a tensor put in the wrong place or left out changes the logits.
    """
    model_type = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
    }
    if architecture != "Qwen2ForCausalLM":
        fields["head_dim"] = 24  # heads x head_dim differs from hidden, as in several Qwen3 models
    if architecture == "Qwen3MoeForCausalLM":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(model_type[architecture], **(fields | config_overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1.0 + 0.1 * noise if is_norm else 0.06 * noise)
    model.generation_config.eos_token_id = fields["eos_token_id"]
    model.generation_config.pad_token_id = fields["pad_token_id"]

    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not stacked_experts)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder
