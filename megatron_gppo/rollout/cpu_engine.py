"""All that is special about an SGLang server on a machine without a CUDA device. On CUDA nothing here applies.

The server then runs SGLang's CPU engine with PyTorch's own attention and sampling. Three packages that SGLang imports
at module level exist for CUDA only; the folder cpu_stubs holds import-only stand-ins, which go on the PYTHONPATH of the
server process and never on the trainer's.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

STUBS = Path(__file__).with_name("cpu_stubs")

SERVER_ARGS: dict[str, str | int | float | bool] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 16384,
    "skip_server_warmup": True,
    "sleep_on_idle": True,  # or the scheduler polls with a core to itself, which the trainer needs
}


def is_needed() -> bool:
    return not torch.cuda.is_available()


def environment(engine_tp: int, cores_of_ranks: Sequence[Sequence[int]] = ()) -> dict[str, str]:
    """Variables of the server process; they replace those of the trainer's environment. cores_of_ranks: if none, one each."""
    variables = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        # Large blocks stay with the process, as CUDA's allocator keeps them. Getting the memory of every bucket of weights
        # from the kernel anew takes longer than receiving it.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # or Inductor may look for a C++ compiler
    }
    if cores_of_ranks:
        variables["OMP_NUM_THREADS"] = str(len(cores_of_ranks[0]))
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores)) for cores in cores_of_ranks)
    elif engine_tp > 1:
        # Without it SGLang binds each rank to a NUMA node of its own, and fails where there are fewer nodes than ranks.
        cores = sorted(os.sched_getaffinity(0))
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(engine_tp))
    if engine_tp > 1:
        # A torch that was built for CUDA brings NCCL along, which SGLang would try between ranks on the CPU.
        variables["SGLANG_NCCL_SO_PATH"] = "not-on-the-cpu"
    return variables
