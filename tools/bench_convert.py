"""Time both conversions of a Qwen2.5-7B-shaped model with random weights, against a plain copy of the same bytes.

Writes the model to --folder (15 GB at --scale 1; with its conversion and a copy 46 GB), measures, and deletes all that it
wrote. Everything starts from a cold page cache and ends with the bytes on the disk: the copy is `cp --reflink=never` and
fsync, and the conversions fsync what they write. Copies and conversions come in pairs, whose order alternates, so that a
disk which is faster at one time than at another favours neither. Memory is VmHWM, the most that a process ever had resident.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_gppo.convert import Architecture, parameters
from megatron_gppo.convert.hf_weights import write_weights
from megatron_gppo.convert.output_folder import sync_tree

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}


TOOLS = Path(__file__).parent
RANDOM_VALUES = 2**27


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write; a folder of its own is made in it")
    parser.add_argument("--scale", type=float, default=1.0, help="share of layers and vocabulary; default 1")
    parser.add_argument("--repeats", type=int, default=3, help="copies and conversions of each direction; default 3")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    folder = args.folder / f"bench_convert_{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        measure(folder, args.scale, args.repeats)
    finally:
        shutil.rmtree(folder)
    return 0


def measure(folder: Path, scale: float, repeats: int) -> None:
    hf, megatron, back = (folder / name for name in ("hf", "megatron", "back"))
    write_model(hf, scale)
    print(f"{gigabytes(hf):.2f} GB, {repeats} pairs; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}\n")
    print(f"{'':<16}{'copy s':>9}{'seconds':>9}{'GB/s':>7}{'of the copy':>13}{'peak GB':>9}{'--verify s':>12}")
    for name, source, output, tool, flag in (
        ("HF to Megatron", hf, megatron, "convert_hf_to_megatron.py", "--hf-path"),
        ("Megatron to HF", megatron, back, "convert_megatron_to_hf.py", "--checkpoint"),
    ):
        command = [sys.executable, TOOLS / tool, flag, source, "--output", output, "--verify"]
        pairs = []
        for repeat in range(repeats):
            shutil.rmtree(output, ignore_errors=True)
            pairs.append(measure_pair(command, source, folder / "copy", copy_first=repeat % 2 == 0))
            print_row(f"{name} {repeat + 1}", pairs[-1], gigabytes(source))
        print_row("median", Pair(*map(statistics.median, zip(*pairs, strict=True))), gigabytes(source))


class Pair(NamedTuple):
    """A copy and a conversion, one straight after the other: a disk's speed changes over minutes."""

    copy_seconds: float
    seconds: float
    of_the_copy: float  # seconds / copy_seconds; the median of these is not the ratio of the medians
    peak: float  # GB
    verify_seconds: float


def measure_pair(command: list[object], source: Path, copy: Path, *, copy_first: bool) -> Pair:
    copy_seconds = time_copy(source, copy) if copy_first else math.nan
    seconds, verify_seconds, peak = time_conversion(command, source)
    if not copy_first:
        copy_seconds = time_copy(source, copy)
    return Pair(copy_seconds, seconds, seconds / copy_seconds, peak, verify_seconds)


def print_row(name: str, pair: Pair, size: float) -> None:
    print(
        f"{name:<16}{pair.copy_seconds:>9.1f}{pair.seconds:>9.1f}{size / pair.seconds:>7.2f}{pair.of_the_copy:>13.2f}"
        f"{pair.peak:>9.2f}{pair.verify_seconds:>12.1f}",
        flush=True,
    )


def write_model(folder: Path, scale: float) -> None:
    """Tensor by tensor; each is a window of the same random values, so that nothing can be compressed within it."""
    folder.mkdir()
    config = {name: max(1, round(CONFIG[name] * scale)) for name in ("num_hidden_layers", "vocab_size")}
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    values = torch.empty(RANDOM_VALUES, dtype=torch.bfloat16).normal_(
        0, 0.02, generator=torch.Generator().manual_seed(0)
    )
    shapes = {
        name: shape
        for parameter in parameters(Architecture.from_hf(folder))
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True)
    }

    def tensors() -> Iterator[torch.Tensor]:
        for index, shape in enumerate(shapes.values()):
            missing = math.prod(shape)
            while missing:
                start = index * 1_000_003 % (RANDOM_VALUES // 2)
                window = values[start : start + missing]
                missing -= len(window)
                yield window

    write_weights(folder, shapes, torch.bfloat16, tensors())


def time_copy(source: Path, copy: Path) -> float:
    forget_cached(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, copy], check=True)
    sync_tree(copy)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def time_conversion(command: list[object], source: Path) -> tuple[float, float, float]:
    """Seconds without --verify, start of the interpreter included; seconds of --verify; peak resident memory in GB."""
    forget_cached(source)
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_peak(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    match = re.search(r"verified in ([\d.]+) s", output)
    assert match is not None
    return seconds - float(match[1]), float(match[1]), peak


def resident_peak(pid: int) -> float:
    """VmHWM in GB; 0 for a process that has ended."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(match[1]) * 1024 / 1e9 if match else 0.0


def forget_cached(folder: Path) -> None:
    """Drops a folder's files from this machine's page cache, once nothing is left to write to the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


if __name__ == "__main__":
    sys.exit(main())
