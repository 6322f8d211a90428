"""Messages between interleaved pipeline stages."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

NO_SHAPE = [0, 0, 0]


class InterleavedCommunicator(P2PCommunicator):
    """Megatron's communicator, made right for interleaved stages in two places.

    Shapes. Two stages are each other's neighbours on both sides. Messages between a pair of ranks are matched by order alone,
    and upstream posts both directions' shapes as send-to-previous, receive-from-previous, send-to-next,
    receive-from-next, so that each stage takes the shape of the one direction for that of the other. Here every rank
    posts the forward direction first. (The tensors themselves are matched by overlap_p2p_comm, which is on.)

    Lifetime. The schedule replaces an output's data (deallocate_pipeline_outputs) while it is still being sent. NCCL keeps
    that memory by itself; gloo would read what was put there since, whenever the next stage is late. An alias is sent.
    """

    def _communicate(self, *, tensor_send_next: torch.Tensor | None, **arguments: Any) -> Any:
        alias = None if tensor_send_next is None else tensor_send_next.detach()
        return super()._communicate(tensor_send_next=alias, **arguments)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        device = torch.cuda.current_device()

        def post(call: Any, shape: torch.Tensor | None, peer: int | None) -> list[dist.P2POp]:
            return [] if shape is None else [dist.P2POp(call, shape, peer, self.pp_group)]

        def outgoing(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, device=device)

        from_prev = torch.empty(3, dtype=torch.int64, device=device) if recv_prev else None
        from_next = torch.empty(3, dtype=torch.int64, device=device) if recv_next else None
        operations = [
            *post(dist.isend, outgoing(tensor_send_next), self.next_rank),
            *post(dist.irecv, from_prev, self.prev_rank),
            *post(dist.isend, outgoing(tensor_send_prev), self.prev_rank),
            *post(dist.irecv, from_next, self.next_rank),
        ]
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        return (
            NO_SHAPE if from_prev is None else from_prev.tolist(),
            NO_SHAPE if from_next is None else from_next.tolist(),
        )


def interleaved_arguments(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """What Megatron's interleaved schedule takes to use this communicator."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {
        "p2p_communicator": InterleavedCommunicator(pp_group=groups.pp, config=get_model_config(chunks[0])),
        "pg_collection": groups,
    }
