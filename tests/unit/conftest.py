"""A small model in both formats."""

from pathlib import Path

import pytest

from megatron_gppo.convert import convert_hf_to_megatron
from tests.support.conversion import make


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make(tmp_path / "hf")


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"
