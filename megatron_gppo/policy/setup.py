"""Process groups: torch.distributed for this machine, Megatron's model-parallel groups, and the value that names them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_gppo.config import Config
from megatron_gppo.job import Job
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy import cpu_compat

# Rank 0 generates for everyone, so the others may wait for a whole rollout, however long it is. That it moves on, the
# watchdog sees.
CONTROL_TIMEOUT = timedelta(days=7)


def initialize_distributed(config: Config, job: Job) -> None:
    """The default process group of all ranks: NCCL where there is CUDA, gloo elsewhere."""
    timeout = timedelta(seconds=config.run.collective_timeout_s)
    if torch.cuda.is_available():
        # Megatron overlaps tensor-parallel communication with matmuls by the order of launches, which one queue keeps.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=job.store, rank=job.rank, world_size=job.world_size, timeout=timeout)


def initialize_model_parallel(config: Config) -> ParallelState:
    """Creates Megatron's groups over the ranks of the default process group."""
    _create_groups(config, gloo=True)
    return _parallel_state(config, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def pretend_model_parallel(config: Config) -> ParallelState:
    """The same on a default process group of torch's "fake" backend, whose peers do not exist: nothing may communicate."""
    _create_groups(config, gloo=False)
    return _parallel_state(config, control_group=None)


def _create_groups(config: Config, *, gloo: bool) -> None:
    cpu_compat.install()
    layout = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp and layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, round(config.run.collective_timeout_s / 60)),
        create_gloo_process_groups=gloo,
    )
    # Megatron forks this generator around its tensor-parallel regions even where nothing is drawn from it.
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)


def _parallel_state(config: Config, control_group: dist.ProcessGroup | None) -> ParallelState:
    layout = config.parallel
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=layout.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=layout.pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=layout.cp,
        cp_group=parallel_state.get_context_parallel_group(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=layout.ep,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        control_group=control_group,
    )


def shut_down() -> None:
    """Leaves all groups; a second call does nothing."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
