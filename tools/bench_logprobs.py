"""Time and peak memory of log-probs and entropy, ours beside others', LM head included.

    python tools/bench_logprobs.py
    python tools/bench_logprobs.py --cases 16384,151936,1536,bf16        # tokens, vocabulary, hidden size, dtype[, threads]
    python tools/bench_logprobs.py --cases 1024,32768,1536,fp32,1        # seconds of CPU, for a machine that is not quiet

Without --cases: on CUDA 1,024 to 16,384 tokens, two vocabularies, two hidden sizes and both dtypes; on a CPU up to 4,096
tokens, and one case of the larger hidden size. bf16 on a CPU without instructions for it takes the rows other than ours some
seventy times as long as ours, so that it has one small case there.

Times are the least of repeats in which the rows take turns: what other work on the machine adds is no row's. With one
thread they are seconds of CPU, which other processes hardly change; with more, and on CUDA, of the wall's clock. A row's
peak memory is measured in a process of its own: what was resident (CPU) or allocated (CUDA) at most, less what was before,
and for the backward less the two returned gradients.
"""

import argparse
import ctypes
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_gppo.algorithm import linear_logprobs_and_entropy, vocab_parallel_logprobs_and_entropy
from megatron_gppo.algorithm.output_layer import has_bf16_instructions

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATUS = Path("/proc/self/status")
TOKENS_PER_CHUNK = 512
MIB = 2**20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    hidden_size: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        where = torch.cuda.get_device_name() if ON_CUDA else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"T = {self.tokens:,}, V = {self.vocabulary:,}, H = {self.hidden_size:,}, {self.dtype}, {where}"

    @property
    def logits_bytes(self) -> int:
        """Of one fp32 [T, V] tensor."""
        return 4 * self.tokens * self.vocabulary

    @property
    def gradient_bytes(self) -> int:
        return (self.tokens + self.vocabulary) * self.hidden_size * DTYPES[self.dtype].itemsize


def default_cases() -> list[Case]:
    if ON_CUDA:
        sizes = itertools.product((1024, 4096, 16384), (32768, 151936), (1536, 3584), DTYPES)
        return [Case(*size, threads=1) for size in sizes]
    dtypes = ("fp32", "bf16") if has_bf16_instructions() else ("fp32",)
    cpu_sizes = [*itertools.product((1024, 4096), (32768, 151936), (1536,), dtypes), (1024, 32768, 3584, "fp32")]
    if "bf16" not in dtypes:
        cpu_sizes.append((256, 8192, 1536, "bf16"))
    return [Case(*size, threads=len(os.sched_getaffinity(0))) for size in cpu_sizes]


# Each takes hidden [T, H], weight [V, H] and targets [T], and returns log-probs [T] and whatever else it computes.
Method = Callable[[Tensor, Tensor, Tensor], Any]


def linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    return linear_logprobs_and_entropy(hidden, weight, targets)


def from_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    return vocab_parallel_logprobs_and_entropy(functional.linear(hidden, weight), targets)


def megatron(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return -vocab_parallel_cross_entropy(functional.linear(hidden, weight)[:, None], targets[:, None])[:, 0], None


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    return _log_softmax(functional.linear(hidden, weight), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _log_softmax(functional.linear(hidden, weight), targets)

    chunks = zip(hidden.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True)
    results = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([logprobs for logprobs, _ in results]), torch.cat([entropy for _, entropy in results])


def _log_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    all_logprobs = logits.float().log_softmax(dim=1)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=1)
    return all_logprobs.gather(1, targets[:, None])[:, 0], entropy


METHODS: dict[str, Method] = {
    "linear_logprobs_and_entropy": linear,
    "vocab_parallel_logprobs_and_entropy": from_logits,
    "log_softmax, gather, entropy": plain,
    f"the same by {TOKENS_PER_CHUNK} tokens, recomputed": chunked,
    "Megatron-Core cross entropy, no entropy": megatron,
}


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes, as the module says."""

    forward: int
    backward: int  # the larger of both passes


def measure_memory(case: Case, method: str) -> Memory:
    """Runs in a process of its own."""
    _prepare(case)
    _warm_up(case, METHODS[method])
    inputs = _inputs(case)
    before = _memory_in_use()
    _reset_peak()
    logprobs, _ = METHODS[method](*inputs)
    forward = _peak_memory()
    logprobs.backward(torch.ones_like(logprobs))
    return Memory(forward - before, max(forward, _peak_memory() - case.gradient_bytes) - before)


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat."""

    forward: dict[str, list[float]]
    both: dict[str, list[float]]  # forward and backward
    matmuls: list[float]  # the four as F.linear and its backward run them
    fastest_matmuls: list[float]  # each in the fastest of the forms that are known here


def measure_times(case: Case, methods: Sequence[str], repeats: int, budget_s: float) -> Times:
    """At least one repeat, and another while there are fewer than repeats and the budget is not spent."""
    _prepare(case)
    for method in methods:
        _warm_up(case, METHODS[method])
    hidden, weight, targets = _inputs(case)
    times = Times({method: [] for method in methods}, {method: [] for method in methods}, [], [])
    start = time.perf_counter()
    while not times.matmuls or (len(times.matmuls) < repeats and time.perf_counter() - start < budget_s):
        as_linear, fastest = _time_matmuls(hidden.detach(), weight.detach())
        times.matmuls.append(as_linear)
        times.fastest_matmuls.append(fastest)
        for method in methods:
            hidden.grad = weight.grad = None
            before = _now()
            logprobs, rest = METHODS[method](hidden, weight, targets)
            between = _now()
            logprobs.backward(torch.ones_like(logprobs))
            times.both[method].append(_now() - before)
            times.forward[method].append(between - before)
            del logprobs, rest
    return times


def _time_matmuls(hidden: Tensor, weight: Tensor) -> tuple[float, float]:
    """Seconds of the four unavoidable products, as Times has them."""
    as_linear, fastest = _time_products(hidden, weight)
    if hidden.dtype == torch.bfloat16 and not ON_CUDA:
        # A CPU without instructions for bf16 is faster in fp32.
        fastest = min(fastest, _time_products(hidden.float(), weight.float())[1])
    return as_linear, fastest


def _time_products(hidden: Tensor, weight: Tensor) -> tuple[float, float]:
    grad = hidden.new_ones(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.ones_like(hidden), torch.ones_like(weight)  # memory whose pages are there
    of_logits = min(_seconds(torch.mm, hidden, weight.t(), grad) for _ in range(2))
    of_hidden = _seconds(torch.mm, grad, weight, grad_hidden)
    of_weight = _seconds(torch.mm, grad.t(), hidden, grad_weight)
    transposed = grad_weight.view(hidden.shape[1], len(weight))
    of_transposed = _seconds(torch.mm, hidden.t().contiguous(), grad, transposed)
    others = 2 * of_logits + of_hidden
    return others + of_weight, others + min(of_weight, of_transposed)


def _seconds(product: Callable[..., Tensor], left: Tensor, right: Tensor, out: Tensor) -> float:
    start = _now()
    product(left, right, out=out)
    return _now() - start


def _now() -> float:
    if ON_CUDA:
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _prepare(case: Case) -> None:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if ON_CUDA:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        # A method that asks for more than there is fails, instead of taking the machine down.
        available = _kib_line(Path("/proc/meminfo"), "MemAvailable")
        resource.setrlimit(resource.RLIMIT_DATA, (available, available))


def _warm_up(case: Case, method: Method) -> None:
    """Loads libraries, and for Megatron sets up the groups that it wants."""
    if method is megatron and not dist.is_initialized():
        with warnings.catch_warnings(action="ignore"):  # about TransformerEngine
            from megatron.core import parallel_state

        store = dist.HashStore()
        dist.init_process_group("nccl" if ON_CUDA else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    logprobs, _ = method(*_inputs(Case(64, 256, 128, case.dtype, case.threads)))
    logprobs.backward(torch.ones_like(logprobs))  # given a gradient, torch imports 30 MB more


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Logits have the spread of a language model's, about 3."""
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(case.tokens, case.hidden_size, device=DEVICE).to(dtype)
    weight = torch.empty(case.vocabulary, case.hidden_size, device=DEVICE, dtype=dtype)
    weight.normal_(std=3 / case.hidden_size**0.5)
    targets = torch.randint(case.vocabulary, (case.tokens,), device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _kib_line(file: Path, name: str) -> int:
    """The value of a line such as "VmRSS:  123 kB", in bytes."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _memory_in_use() -> int:
    return torch.cuda.memory_allocated() if ON_CUDA else _kib_line(STATUS, "VmRSS")


def _peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if ON_CUDA else _kib_line(STATUS, "VmHWM")


def _reset_peak() -> None:
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, or None when it ran out of memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, MemoryError):
            return None
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            return None


def _end_with(parent: int) -> None:
    """Also when that is killed: a measurement may go on for many minutes, and would slow the next one."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


@dataclass(frozen=True)
class Row:
    """What is known of a method in a case."""

    forward_s: float
    both_s: float
    matmuls: float  # both_s over that of the matmuls, as in Times
    fastest_matmuls: float
    memory: Memory


def run_case(case: Case, repeats: int, budget_s: float) -> dict[str, Row]:
    """Rows of the methods that fit into the memory."""
    memory = {method: _in_new_process(measure_memory, case, method) for method in METHODS}
    fitting = [method for method, peak in memory.items() if peak is not None]
    times = _in_new_process(measure_times, case, fitting, repeats, budget_s)
    if times is None:
        print(f"\n{case}; no times, out of memory\n")
        return {}

    matmuls, fastest_matmuls = min(times.matmuls), min(times.fastest_matmuls)
    print(
        f"\n{case}; least of {len(times.matmuls)}; the four matmuls {matmuls:.2f} s, "
        f"in their fastest form {fastest_matmuls:.2f} s\n"
    )
    return {
        method: Row(
            min(times.forward[method]),
            min(times.both[method]),
            min(times.both[method]) / matmuls,
            min(times.both[method]) / fastest_matmuls,
            memory[method],
        )
        for method in fitting
    }


def print_table(case: Case, rows: dict[str, Row]) -> None:
    head = ["", "forward s", "both s", "/ matmuls", "/ fastest matmuls", "forward MiB", "both MiB", "/ fp32 [T, V]"]
    lines = [
        [
            method,
            f"{row.forward_s:.2f}",
            f"{row.both_s:.2f}",
            f"{row.matmuls:.2f}",
            f"{row.fastest_matmuls:.2f}",
            *_memory_cells(case, row.memory),
        ]
        if (row := rows.get(method))
        else [method, *["out of memory"] * 7]
        for method in METHODS
    ]
    _print_lines([head, *lines])


def print_memory(cases: Sequence[Case]) -> None:
    """Of linear_logprobs_and_entropy."""
    head = ["", "forward MiB", "both MiB", "/ fp32 [T, V]"]
    lines = []
    for case in cases:
        peak = _in_new_process(measure_memory, case, "linear_logprobs_and_entropy")
        lines.append([str(case), *_memory_cells(case, peak)])
    _print_lines([head, *lines])


def _memory_cells(case: Case, peak: Memory | None) -> list[str]:
    """As the last three columns have them. None: there was not enough."""
    if peak is None:
        return ["out of memory"] * 3
    return [
        f"{peak.forward / MIB:,.0f}",
        f"{peak.backward / MIB:,.0f}",
        f"{peak.backward / case.logits_bytes:.3f}",
    ]


def print_growth(results: dict[Case, dict[str, Row]]) -> None:
    """Seconds and MiB of both passes by size, so that columns show the growth with T and V."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in results:
        groups.setdefault((case.hidden_size, case.dtype, case.threads), []).append(case)
    for (hidden_size, dtype, threads), cases in groups.items():
        if len(cases) == 1:
            continue
        cases.sort(key=lambda case: (case.tokens, case.vocabulary))
        print(f"\nGrowth, H = {hidden_size:,}, {dtype}, {threads} threads: seconds, MiB of both passes\n")
        head = ["", *(f"T {case.tokens:,} V {case.vocabulary:,}" for case in cases)]
        lines = [
            [
                method,
                *(
                    f"{row.both_s:.2f} s {row.memory.backward / MIB:,.0f} MiB"
                    if (row := results[case].get(method))
                    else "out of memory"
                    for case in cases
                ),
            ]
            for method in METHODS
        ]
        _print_lines([head, *lines])


def _print_lines(lines: list[list[str]]) -> None:
    """As a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=_case, default=default_cases(), metavar="T,V,H,DTYPE[,THREADS]")
    parser.add_argument("--memory", action="store_true", help="only that of linear_logprobs_and_entropy, no times")
    parser.add_argument("--repeats", type=int, default=3, help="of each time, when the budget allows")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="no repeat of a case starts later")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if ON_CUDA else _cpu_name()}")
    if arguments.memory:
        print_memory(arguments.cases)
        return 0
    results = {}
    for case in arguments.cases:
        results[case] = run_case(case, arguments.repeats, arguments.budget)
        print_table(case, results[case])
    print_growth(results)
    return 0


def _case(text: str) -> Case:
    tokens, vocabulary, hidden_size, dtype, *threads = text.split(",")
    if dtype not in DTYPES or len(threads) > 1:
        raise ValueError
    return Case(
        int(tokens), int(vocabulary), int(hidden_size), dtype, int(threads[0]) if threads else torch.get_num_threads()
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    sys.exit(main())
