"""Small models to convert, ways to damage them, and what every refusal has in common."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gppo.convert import ConvertError
from tests.support.tiny import make_tiny_model

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 20}


def make(folder: Path, **model: Any) -> Path:
    return make_tiny_model(folder, **{**SMALL, **model})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(action: Callable[[], object], message: str, output: Path) -> None:
    """The action raises one line that matches and says how to mend it, and nothing is left where it would have written."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(ConvertError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert ". Fix: " in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
