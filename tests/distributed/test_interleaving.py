"""Messages between interleaved stages, where one stage is slower than the other."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

from megatron_gppo.policy.interleaving import InterleavedCommunicator
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, make_config
from tests.support.tiny import make_tiny_model


def send_to_a_slow_stage(rank: int, hf_folder: Path) -> bool:
    """As the schedule's warm-up does: the output is sent without waiting, and its memory given back at once."""
    policy = build_policy(make_config(hf_folder, LAYOUTS["pp2_vpp2"]))
    config = policy.chunks[0].module.config
    communicator = InterleavedCommunicator(dist.group.WORLD, config)
    shape = [4096, 1, 64]
    if rank == 0:
        output = torch.ones(shape) * 2
        _, handles = communicator.send_forward_recv_forward(output, False, shape, overlap_p2p_comm=True)
        deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
        reused = [torch.zeros(shape) for _ in range(8)]
        handles.pop("send_next").wait()
        return bool(torch.stack(reused).eq(0).all())
    # The shapes must be exchanged before the sender goes on, so only what follows them can be late.
    exchange = communicator._communicate_shapes

    def exchange_and_dawdle(*args: torch.Tensor | bool | None) -> tuple[list[int], list[int]]:
        shapes = exchange(*args)  # type: ignore[arg-type]
        time.sleep(1)
        return shapes

    communicator._communicate_shapes = exchange_and_dawdle  # type: ignore[method-assign]
    received = communicator.send_forward_recv_forward(None, True, shape)
    return bool(received.eq(2).all())


def test_what_is_sent_outlives_the_deallocation_of_pipeline_outputs(tmp_path: Path) -> None:
    assert run_ranks(2, send_to_a_slow_stage, make_tiny_model(tmp_path / "model")) == [True, True]
