"""A run over two hosts whose link is cut, while it generates and while it syncs: all processes end, and it goes on later.

A rank on each (TP = 2, so that every export crosses the link), the engine on the second, rank 0 on the first.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_gppo.rollout import server as rollout_server
from megatron_gppo.rollout.placement import only_place
from tests.support.rollout import make_config, processes_below, wait_gone
from tests.support.tiny import make_tiny_model
from tests.support.training import write_config
from tests.support.two_hosts import ENGINE_PORTS, FIRST, SECOND, TwoHosts, two_hosts

STALL_S = 12.0
# Longer than a busy machine takes for a rollout or a sync: that a host is cut off, the watchdog sees before.
OWN_LIMITS_S = 90.0
# From the cut on: the limit that notices it, the time to report, and what a busy machine adds.
ENDS_WITHIN_S = STALL_S + 60.0
KEY = "two-hosts"


class Printing:
    """A process whose output is read as it comes."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)  # line by line, as they come

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.printed:
            assert self.process.poll() is None, self.printed[-5000:]
            assert time.monotonic() < deadline, self.printed[-5000:]
            time.sleep(0.05)

    def wait(self, timeout_s: float) -> int:
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; it printed: {self.printed[-5000:]}") from None
        self._thread.join(10)
        return status


def start_engine(hosts: TwoHosts, model: Path, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """On the second host. The log has a line a request."""
    config = make_config(
        model, folder, host=hosts.addresses[SECOND], api_key=KEY, server_args={"log_level_http": "info"}
    )
    place = only_place(config.rollout)
    guard = [sys.executable, "-I", str(Path(rollout_server.__file__).with_name("guard.py")), str(os.getpid()), "5"]
    with (folder / f"engine_{port}.log").open("wb") as log:
        return subprocess.Popen(
            hosts.command(SECOND, [*guard, *rollout_server.server_command(config, port, place)]),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=rollout_server.server_environment(place),
        )


def start_ranks(hosts: TwoHosts, config: Path, *overrides: str) -> list[Printing]:
    """torchrun on each host, a rank each."""
    ranks = []
    for host in (FIRST, SECOND):
        address, port = hosts.store(host)
        launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host)]
        where = ["--master-addr", address, "--master-port", str(port)]
        train = ["-m", "megatron_gppo.train", "--config", str(config), *overrides]
        ranks.append(Printing(hosts.command(host, [sys.executable, *launch, *where, *train])))
    return ranks


def wait_in_log(log: Path, text: str, start: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text()[start:]:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)


def cut_when(hosts: TwoHosts, ranks: list[Printing], printed: str, log: Path, logged: str) -> str:
    """Cuts the link at a line of the engine's log, which comes after a line of rank 0. Returns what rank 1 says, and rank 0."""
    ranks[FIRST].wait_for(printed)
    wait_in_log(log, logged, len(log.read_text()))
    hosts.cut()
    started = time.monotonic()
    below = [pid for rank in ranks for pid in processes_below(rank.process.pid)]
    statuses = [rank.wait(max(1.0, started + ENDS_WITHIN_S - time.monotonic())) for rank in ranks]
    assert 0 not in statuses
    print(*(rank.printed for rank in ranks), sep="\n" + 100 * "-" + "\n")
    assert wait_gone(below, 10) == []
    hosts.mend()
    return ranks[SECOND].printed, ranks[FIRST].printed


def done_steps(config: Path) -> int:
    names = [path.name for path in (config.parent / "run" / "checkpoints").glob("step_" + "[0-9]" * 8)]
    return max(int(name.removeprefix("step_")) for name in names)


def test_a_cut_link(tmp_path: Path) -> None:
    model = make_tiny_model(
        tmp_path / "model", hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=2
    )
    with two_hosts() as hosts:
        engines = [start_engine(hosts, model, port, tmp_path) for port in ENGINE_PORTS]
        ranks: list[Printing] = []
        try:
            config = write_config(
                tmp_path,
                model,
                parallel={"tp": 2},
                rollout={
                    "mode": "external",
                    "urls": [hosts.engine(ENGINE_PORTS[0])],
                    "api_key": KEY,
                    "max_response_tokens": 120,
                    "request_timeout_s": OWN_LIMITS_S,
                    "max_retries": 0,
                },
                sync={"host": hosts.addresses[FIRST], "timeout_s": OWN_LIMITS_S, "bucket_mb": 1, "verify_every": 1000},
                run={"dir": str(tmp_path / "run"), "stall_timeout_s": STALL_S},
            )
            log = tmp_path / f"engine_{ENGINE_PORTS[0]}.log"

            ranks = start_ranks(hosts, config, "train.steps=1000")
            second, first = cut_when(hosts, ranks, " 1/1000 ", log, "Prefill batch")
            assert re.search(r"rank 0, phase '(rollout|checkpoint)'.*(http://|rank 1 \()", first)
            assert re.search(r"error: rank 1, phase 'rollout'.*: the rendezvous store at .* has not answered", second)

            done = done_steps(config)
            ranks = start_ranks(hosts, config, "train.steps=1000")
            ranks[FIRST].wait_for(f"{done} of 1000 steps are done")
            second, first = cut_when(
                hosts, ranks, f" {done + 1}/1000 ", log, "POST /update_weights_from_distributed HTTP/1.1"
            )
            assert re.search(r"rank 0, phase '(sync|checkpoint)'.*(http://|rank 1 \()", first)
            assert re.search(r"error: rank 1, phase 'sync'.*: the rendezvous store at .* has not answered", second)

            done = done_steps(config)
            url = hosts.engine(ENGINE_PORTS[1])
            ranks = start_ranks(hosts, config, f"rollout.urls=['{url}']", f"train.steps={done + 1}")
            assert [rank.wait(240) for rank in ranks] == [0, 0], ranks[FIRST].printed
            assert f"resumed from {tmp_path / 'run'}" in ranks[FIRST].printed
        finally:
            for process in (*(rank.process for rank in ranks), *engines):
                process.terminate()
                process.wait(60)
