"""HF <-> Megatron for Qwen: names, layouts, files. Pure tensors: needs neither Megatron nor a process group."""

from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.hf_checkpoint import HfCheckpoint, keep_hf_assets
from megatron_gppo.convert.hf_to_megatron import convert_hf_to_megatron, describe_hf_to_megatron
from megatron_gppo.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_gppo.convert.megatron_to_hf import convert_megatron_to_hf, describe_megatron_to_hf
from megatron_gppo.convert.table import Parameter, canonical_name, parameters

__all__ = [
    "Architecture",
    "ConvertError",
    "HfCheckpoint",
    "MegatronCheckpoint",
    "Parameter",
    "canonical_name",
    "convert_hf_to_megatron",
    "convert_megatron_to_hf",
    "describe_hf_to_megatron",
    "describe_megatron_to_hf",
    "keep_hf_assets",
    "parameters",
]
