"""Several real SGLang servers in a real run, on two torchruns that play two nodes; what becomes of it when they hang or die."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gppo.rollout.ports import number_of, reserve_port
from tests.support.rollout import is_engine, processes_below, running_requests, wait_gone
from tests.support.training import (
    TIMEOUT_S,
    check_learned,
    lines_until,
    scalars,
    start_node,
    start_numbered_node,
    write_config,
)

KEY = "secret"


def engine_of(node: subprocess.Popen[str]) -> tuple[int, str]:
    """Process and URL of the engine that a node runs."""
    [pid] = [pid for pid in processes_below(node.pid) if is_engine(pid)]
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return pid, f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


@pytest.fixture
def port() -> Iterator[int]:
    with reserve_port("127.0.0.1") as port:
        yield number_of(port)


def test_an_engine_on_the_second_of_two_nodes_that_torchrun_numbers(
    tiny_model: Path, tmp_path: Path, port: int
) -> None:
    rollout = {"engines": [{"nodes": [1]}], "host": "0.0.0.0", "api_key": KEY}
    config = write_config(tmp_path, tiny_model, rollout=rollout)
    nodes = [start_numbered_node(config, 2, port) for _ in range(2)]
    try:
        outputs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    check_learned("".join(outputs), tmp_path / "run")


def test_engines_on_two_nodes_that_hang_and_die_in_a_rollout(tiny_model: Path, tmp_path: Path, port: int) -> None:
    engines = [{"nodes": [0], "cores": [0]}, {"nodes": [1], "cores": [1]}]
    config = write_config(
        tmp_path,
        tiny_model,
        rollout={
            "engines": engines,
            "host": "0.0.0.0",
            "api_key": KEY,
            "prompts_per_step": 8,
            "responses_per_prompt": 4,
            "max_response_tokens": 160,
            "health_timeout_s": 30,
        },
        train={"steps": 1000, "prompts_per_update": 4, "tokens_per_microbatch": 1024},
        run={"dir": str(tmp_path / "run"), "save_every": 1000},
    )
    first, second = (start_node(config, node, 2, port) for node in range(2))
    started: set[int] = set()
    # Its output is read, or the node would wait for ever to print more.
    reader = threading.Thread(target=second.communicate)
    reader.start()
    try:
        output = lines_until(first, " 1/1000 ")
        started.update(processes_below(first.pid) + processes_below(second.pid))
        (_, own), (pid, url) = engine_of(first), engine_of(second)
        while not running_requests(own, KEY) or not running_requests(url, KEY):
            pass
        os.kill(pid, signal.SIGSTOP)  # while both generate
        output += lines_until(first, "serves again")
        assert f"lost the engine at {url}: {url}: no health check succeeded within" in output
        output += lines_until(first, "/1000 ")

        (pid, own), (other_pid, url) = engine_of(first), engine_of(second)
        started.update(processes_below(first.pid) + processes_below(second.pid))
        while not running_requests(own, KEY) and not running_requests(url, KEY):
            pass
        for each in (pid, other_pid):
            os.kill(each, signal.SIGKILL)
        output += lines_until(first, "serves again")  # within the same rollout
        output += lines_until(first, "/1000 ")
        started.update(processes_below(first.pid) + processes_below(second.pid))
        os.killpg(second.pid, signal.SIGTERM)  # and rank 0, on the first, ends what it generates
        rest, _ = first.communicate(timeout=120)
        assert "ended by SIGTERM; progress is saved" in rest, rest[-3000:]
    finally:
        for pid in {*started, first.pid, second.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.wait()
        reader.join()
    assert wait_gone(sorted(started), 30) == []

    assert KEY not in (tmp_path / "run" / "config.yaml").read_text()
    logged = scalars(tmp_path / "run")
    assert sum(logged["rollout/lost_engines"]) == 3
    assert 1 <= sum(logged["rollout/restarted_engines"]) <= 3
    assert sum(logged["rollout/moved_requests"]) >= 1
    assert logged["rollout/serving_engines"][0] == 2
    assert min(logged["rollout/serving_engines"]) >= 1
    assert set(logged["rollout/groups"]) == {8}
    assert max(logged["engine/logprob_difference_max"]) < 1e-4, "every response is of the weights of its step"
