"""Prompts: from the user's rows to an endless, resumable stream of tokenised problems.

    sources -> rows (files.py) -> problems (schema.py) -> prompts (prompts.py) -> PromptStream (stream.py)

A row carries its place, file and line, until it is a prompt, so every mistake can be named by it.
"""

from megatron_gppo.data.decontamination import Contamination, find_contamination
from megatron_gppo.data.errors import BadRowError, DataError
from megatron_gppo.data.prompts import PromptSet, load_prompts
from megatron_gppo.data.stream import PromptStream
from megatron_gppo.data.tokenizer import load_tokenizer

__all__ = [
    "BadRowError",
    "Contamination",
    "DataError",
    "PromptSet",
    "PromptStream",
    "find_contamination",
    "load_prompts",
    "load_tokenizer",
]
