"""Whether a layout builds at its real size: the real Megatron model of a rank of every pipeline stage, without memory or peers.

Weights are on the meta device, and the process group is torch's "fake" backend, in which every rank but this one is
imagined. Both need a process of their own: the one that plans has, or will have, a real process group. It sees no GPU, so
that nothing is allocated there either, and builds Megatron's local layers: they have the parameters of TransformerEngine's.
"""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import yaml

from megatron_gppo.config import Config, dump_config, parse_config
from megatron_gppo.convert import Architecture
from megatron_gppo.policy.model import build_chunks
from megatron_gppo.policy.setup import pretend_model_parallel, shut_down


class BuildError(RuntimeError):
    """Megatron does not build the model in this layout. The message ends with what it said."""


def parameters_built(config: Config, world_size: int) -> list[int]:
    """Parameters of a rank of each pipeline stage. Takes an import of Megatron and about a second more. Raises BuildError."""
    process = subprocess.run(
        [sys.executable, "-c", "from megatron_gppo.policy.meta_build import main; main()", str(world_size)],
        input=dump_config(config),
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    if process.returncode:
        raise BuildError(
            f"Megatron does not build the model over {world_size} ranks:\n{process.stderr.strip()[-3000:]}"
        )
    counts: list[int] = json.loads(process.stdout.splitlines()[-1])
    return counts


def build(config: Config, architecture: Architecture, world_size: int) -> list[int]:
    """parameters_built() in this process, which may have no process group."""
    return [_build_stage(config, architecture, world_size, stage) for stage in range(config.parallel.pp)]


def _build_stage(config: Config, architecture: Architecture, world_size: int, stage: int) -> int:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it imports much

    first_rank = stage * (world_size // config.parallel.pp)  # a stage's ranks follow each other
    dist.init_process_group("fake", store=FakeStore(), rank=first_rank, world_size=world_size)
    try:
        parallel = pretend_model_parallel(config)
        assert parallel.pp_rank == stage
        with torch.device("meta"):
            chunks = build_chunks(architecture, config, parallel)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    finally:
        shut_down()


def main() -> None:
    """The child: a configuration in, a list of numbers out."""
    config = parse_config(yaml.safe_load(sys.stdin))
    print(json.dumps(build(config, Architecture.from_hf(config.model.hf_path), int(sys.argv[1]))))
