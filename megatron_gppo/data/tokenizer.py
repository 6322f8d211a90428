"""The model's tokenizer, with what training needs of it checked."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_gppo.data.errors import DataError


def load_tokenizer(hf_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local HF model folder. Raises DataError when there is none or it has no chat template."""
    if not hf_path.is_dir():
        raise DataError(f"model.hf_path = {hf_path}: no such folder. Fix: give a local HF model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_path), local_files_only=True)
    except Exception as error:  # a broken file raises nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"model.hf_path = {hf_path}: no tokenizer can be loaded from it ({reason}). Fix: add the model's tokenizer files"
        ) from error
    # Without tokenizer.json the class that config.json names is built all the same, with an empty vocabulary.
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        raise DataError(
            f"model.hf_path = {hf_path}: its tokenizer has no vocabulary. Fix: add the model's tokenizer.json"
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"model.hf_path = {hf_path}: its tokenizer has no chat template. Fix: add the model's chat_template.jinja, "
            "or set chat_template in its tokenizer_config.json"
        )
    return tokenizer
