"""The mapping of a conversion as text."""

import math
from collections.abc import Sequence

import torch

from megatron_gppo.convert.table import Parameter

_HEADER = ("HF name", "Megatron name", "rule", "HF shape")


def render_mapping(
    table: Sequence[Parameter], source_dtype: torch.dtype, dtype: torch.dtype, *, stacked_experts: bool
) -> str:
    """One row for each HF tensor, and the sizes."""
    rows = [_HEADER]
    for parameter in table:
        rule = (
            parameter.layout.rule if parameter.expert is None else f"{parameter.layout.rule}; expert {parameter.expert}"
        )
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
            rows.append((name, parameter.key, rule, " x ".join(map(str, shape))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    sizes = [math.prod(parameter.shape) for parameter in table]
    lines += [
        "",
        f"{len(rows) - 1:,} HF tensors, {len({parameter.key for parameter in table}):,} Megatron tensors, {sum(sizes):,} parameters",
        f"read   {sum(sizes) * source_dtype.itemsize / 1e9:.3f} GB ({source_dtype})".replace("torch.", ""),
        f"write  {sum(sizes) * dtype.itemsize / 1e9:.3f} GB ({dtype})".replace("torch.", ""),
        f"memory at most about {3 * max(sizes) * max(source_dtype.itemsize, dtype.itemsize) / 1e9:.3f} GB of tensors",
    ]
    if stacked_experts:
        lines.append(
            "the HF folder's experts are stacked: mlp.experts.gate_up_proj and mlp.experts.down_proj hold those of a layer"
        )
    return "\n".join(lines)
