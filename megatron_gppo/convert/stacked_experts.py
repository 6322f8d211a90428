"""The two ways in which HF folders store experts. Only this file and those that read and write HF files know the second.

    released models            mlp.experts.{e}.gate_proj.weight [X, H]    mlp.experts.{e}.down_proj.weight [H, X]
                               mlp.experts.{e}.up_proj.weight   [X, H]
    transformers 5, stacked    mlp.experts.gate_up_proj [E, 2X, H]        mlp.experts.down_proj [E, H, X]

E experts, X their hidden size, H the model's. Expert e of gate_up_proj is gate_proj over up_proj, so a stacked tensor is its
experts' tensors one behind the other, byte for byte: reading and writing either form takes nothing but names and positions.
"""

import re
from collections.abc import Mapping

from megatron_gppo.convert.layout import Shape

_STACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<kind>gate_up|down)_proj")
_SEPARATE = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight")


def unstack(name: str, shape: Shape) -> list[tuple[str, Shape]]:
    """The tensors in a stacked one, in the order of their bytes; for any other tensor nothing."""
    match = _STACKED.fullmatch(name)
    if match is None or len(shape) != 3 or 0 in shape:  # of no bytes there may be any number
        return []
    num_experts, rows, columns = shape
    kinds = ["gate", "up"] if match["kind"] == "gate_up" else ["down"]
    if rows % len(kinds):
        return []
    part = (rows // len(kinds), columns)
    return [(f"{match['experts']}.{e}.{kind}_proj.weight", part) for e in range(num_experts) for kind in kinds]


def stack(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes with experts stacked. `shapes` lists them as the table does: by tensor and, in it, by expert."""
    stacked: dict[str, Shape] = {}
    for name, shape in shapes.items():
        match = _SEPARATE.fullmatch(name)
        if match is None:
            stacked[name] = shape
            continue
        kind = "down" if match["kind"] == "down" else "gate_up"
        rows = shape[0] * (1 if kind == "down" else 2)
        stacked[f"{match['experts']}.{kind}_proj"] = (int(match["expert"]) + 1, rows, shape[1])
    return stacked
