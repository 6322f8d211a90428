"""Time weight syncs of a Qwen2.5 shape with random weights into a real SGLang server, beside raw copies of the same bytes.

    python tools/bench_weight_sync.py --shape 0.5b [--transport tensor distributed disk] [--bucket-mb 64 512] [--dtype bf16]
    torchrun --nproc-per-node 2 tools/bench_weight_sync.py ...        # the parameters cut over two tensor-parallel ranks

The policy's side are processes that hold the parameters by name, as the ranks of a Megatron model do, without the model and
its optimizer: they would not fit beside the engine in a small machine's memory. Everything else is what a training step
does, checks included.

Beside each transport stands the raw operation of the same bytes in pieces of the bucket's size, in the same run: a copy in
memory (tensor), a broadcast over gloo to another process (distributed; NCCL is not measured here), writing a file (disk).
Times are medians. Every process of the policy's side computes in one thread, as torchrun's ranks do.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_gppo.config import Config, parse_config
from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.convert.memory import memory_of
from megatron_gppo.parallel import ParallelState
from megatron_gppo.rollout.server import ManagedServer
from megatron_gppo.weight_sync import WeightSync

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "heads": (4, 2), "vocab_size": 512},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "heads": (14, 2)},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "heads": (12, 2)},
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "heads": (28, 4),
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# As SyncStats has them. Sending and loading go on while the next bucket is converted: theirs is what is waited for.
PHASES = ("prepare", "gather", "convert", "send", "load", "check")
MOVING = ("gather", "convert", "send", "load")  # all bytes
RAW = {"tensor": "copy", "distributed": "broadcast", "disk": "write"}


class OneEngine:
    """See SyncedEngines."""

    def __init__(self, url: str) -> None:
        self.url = url

    def to_sync(self, on_progress: Callable[[], None]) -> list[str]:
        return [self.url]

    def gpus(self, url: str) -> list[int]:
        return []

    def synced(self, urls: Sequence[str], version: int) -> None:
        pass

    def lost(self, url: str, why: str) -> None:
        raise SystemExit(why)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--transport", choices=list(RAW), nargs="+", default=list(RAW))
    parser.add_argument("--bucket-mb", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the disk transport writes; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parallel = parallel_of_torchrun()
    with ExitStack() as stack:
        folder = parallel.from_rank_0(
            lambda: stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_weight_sync_"))
        )
        measure(args, Path(folder), parallel)
    return 0


def parallel_of_torchrun() -> ParallelState:
    """This process's: one of torchrun's tensor-parallel ranks, or the only one."""
    if "RANK" not in os.environ:
        return ParallelState(0, 1, 0, 1, 0, 1, 0, 1, None, None, None, None)
    dist.init_process_group("gloo")
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    return ParallelState(rank, size, rank, size, 0, 1, 0, 1, group, None, None, group)


def measure(args: argparse.Namespace, folder: Path, parallel: ParallelState) -> None:
    model = folder / "model"

    def write_model() -> None:
        model.mkdir()
        (model / "config.json").write_text(json.dumps(model_config(SHAPES[args.shape], args.dtype)))

    parallel.from_rank_0(write_model)
    architecture = Architecture.from_hf(model)
    shards = random_shards(architecture, DTYPES[args.dtype], parallel)
    num_bytes = sum(math.prod(parameter.shape) for parameter in parameters(architecture)) * DTYPES[args.dtype].itemsize
    with ExitStack() as stack:

        def start_engine() -> str:
            config = make_config(model, folder, args.dtype)
            server = stack.enter_context(ManagedServer(config, folder / "engine.log"))
            server.wait_ready()
            return server.url

        url = parallel.from_rank_0(start_engine)
        say(
            parallel,
            f"{args.shape}, {args.dtype}: {num_bytes / 1e9:.2f} GB in {len(shards)} parameters, tp {parallel.tp_size}; "
            f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}\n\n"
            f"{'':<13}{'MiB a':>7}{'':>50}seconds of each phase (GB/s)\n"
            f"{'transport':<13}{'bucket':>7}{'seconds':>9}{'GB/s':>7}{'raw':>11}{'GB/s':>6}{'of raw':>8}"
            + "".join(f"{name:>13}" for name in PHASES),
        )
        for bucket_mb in args.bucket_mb:
            for transport in args.transport:
                measure_transport(args, folder, url, architecture, shards, num_bytes, transport, bucket_mb, parallel)


def measure_transport(
    args: argparse.Namespace,
    folder: Path,
    url: str,
    architecture: Architecture,
    shards: dict[str, torch.Tensor],
    num_bytes: int,
    transport: str,
    bucket_mb: int,
    parallel: ParallelState,
) -> None:
    piece = bucket_mb * 2**20
    raw = {"tensor": raw_copy, "distributed": raw_broadcast, "disk": raw_write}[transport]
    before = parallel.from_rank_0(lambda: raw(num_bytes, piece, args.repeats, folder))
    config = make_config(folder / "model", folder, args.dtype, transport=transport, bucket_mb=bucket_mb)
    weight_sync = WeightSync(config, architecture, parallel, OneEngine(url) if parallel.rank == 0 else None)
    weight_sync.sync(shards, 1)  # makes the group, and gets the memory
    syncs = []
    for version in range(2, 2 + args.repeats):
        for shard in shards.values():
            shard[:1] += 1e-2  # the sample wants to see it changed
        syncs.append(weight_sync.sync(shards, version))
    weight_sync.close()
    seconds = statistics.median(sync.seconds for sync in syncs)
    after = parallel.from_rank_0(lambda: raw(num_bytes, piece, args.repeats, folder))
    raw_seconds = statistics.median([*before, *after])
    phases = {name: statistics.median(sync.phases.get(name, 0.0) for sync in syncs) for name in PHASES}
    say(
        parallel,
        f"{transport:<13}{bucket_mb:>7}{seconds:>9.2f}{num_bytes / seconds / 1e9:>7.2f}{RAW[transport]:>11}"
        f"{num_bytes / raw_seconds / 1e9:>6.2f}{raw_seconds / seconds:>8.0%}"
        + "".join(f"{of_phase(name, phases[name], num_bytes):>13}" for name in PHASES),
    )


def of_phase(name: str, seconds: float, num_bytes: int) -> str:
    return f"{seconds:.2f}" + (f" ({num_bytes / seconds / 1e9:.1f})" if name in MOVING and seconds >= 0.005 else "")


def say(parallel: ParallelState, text: str) -> None:
    if parallel.rank == 0:
        print(text, flush=True)


def model_config(shape: dict[str, Any], dtype: str) -> dict[str, Any]:
    fields = {"vocab_size": 151936, "tie_word_embeddings": True} | shape
    heads, kv_heads = fields.pop("heads")
    return fields | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }


def make_config(model: Path, folder: Path, dtype: str, **sync: Any) -> Config:
    return parse_config(
        {
            "model": {"hf_path": str(model), "dtype": dtype},
            "run": {"dir": str(folder / "run")},
            "data": {"train": "none"},
            "algorithm": {"preset": "paper"},
            "rollout": {
                # It starts with weights of its own, and without a tokenizer.
                "server_args": {"load_format": "dummy", "skip_tokenizer_init": True, "max_total_tokens": 2048},
                "start_timeout_s": 1200,
            },
            "sync": sync,
        }
    )


def random_shards(architecture: Architecture, dtype: torch.dtype, parallel: ParallelState) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # a norm is the same on every rank
    return {
        parameter.name: parameter.shard(
            torch.empty(parameter.shape, dtype=dtype).uniform_(-0.05, 0.05), parallel.tp_rank, parallel.tp_size
        ).clone()
        for parameter in parameters(architecture)
    }


def timed(action: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def pieces(num_bytes: int, piece: int) -> list[int]:
    return [piece] * (num_bytes // piece) + [num_bytes % piece]


def raw_copy(num_bytes: int, piece: int, repeats: int, folder: Path) -> list[float]:
    """Between memory that is there already, from all of the bytes to a bucket."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.ones(piece, dtype=torch.uint8)
    return timed(
        lambda: [target[: len(part)].copy_(part) for part in source.split(pieces(num_bytes, piece))],
        repeats,
    )


def raw_broadcast(num_bytes: int, piece: int, repeats: int, folder: Path) -> list[float]:
    """Between memory that is there already, over gloo."""
    store = folder / f"store_{time.monotonic_ns()}"
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_broadcast_rank, args=(rank, store, num_bytes, piece, repeats, results))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    seconds: list[float] = results.get()
    for rank in ranks:
        rank.join()
    return seconds


def _broadcast_rank(rank: int, store: Path, num_bytes: int, piece: int, repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=10)
    )
    buffer = torch.ones(piece, dtype=torch.uint8)

    def broadcast() -> None:
        for size in pieces(num_bytes, piece):
            dist.broadcast(buffer[:size], src=0)
        dist.barrier()

    seconds = timed(broadcast, repeats)
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


def raw_write(num_bytes: int, piece: int, repeats: int, folder: Path) -> list[float]:
    """To files, without waiting for the disk, as the transport does."""
    buffer = torch.ones(piece, dtype=torch.uint8)

    def write() -> None:
        target = folder / "raw"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for number, size in enumerate(pieces(num_bytes, piece)):
            (target / str(number)).write_bytes(memory_of(buffer[:size]))

    seconds = timed(write, repeats)
    shutil.rmtree(folder / "raw")
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
