"""Engines on another node, played by a second process on this machine that meets the first at a real store.

The server is a few lines of ours that answer /health, started and guarded as SGLang would be.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gppo.config import ConfigError
from megatron_gppo.rollout import nodes as nodes_module
from megatron_gppo.rollout.engine import EngineError, EngineFaultError
from megatron_gppo.rollout.nodes import EngineStore, RemoteHost, own_address
from megatron_gppo.rollout.placement import Node, engine_places
from tests.support.rollout import make_config, processes_below, wait_gone

ENGINES: dict[str, Any] = {
    "engines": [{"nodes": [1], "count": 2}], "host": "0.0.0.0", "api_key": "k", "start_timeout_s": 60,
}  # fmt: skip

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

NODE = """
import sys
from pathlib import Path
from megatron_gppo.rollout import nodes, server
from megatron_gppo.rollout.launch import launched_node_engines
from tests.support.rollout import make_config
from tests.unit.test_nodes import ENGINES, SERVER

folder = Path(sys.argv[1])
def command(config, port, place):
    if place.index == 1 and not (folder / "repaired").exists():
        return [sys.executable, "-c", "raise SystemExit('no such luck')"]
    return [sys.executable, "-c", SERVER, str(port)]
server.server_command = command
nodes.POLL_S = 0.05
with launched_node_engines(make_config(folder, folder, **ENGINES)):
    sys.stdin.read()
"""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    monkeypatch.setattr(nodes_module, "POLL_S", 0.05)
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(master.port))
    return master


@pytest.fixture
def node(store: dist.TCPStore, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The second node's first rank."""
    (tmp_path / "config.json").write_text("{}")
    variables = {"GROUP_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NODE), str(tmp_path)],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_failed(host: RemoteHost) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            host.check()
        except EngineFaultError:
            return
        time.sleep(0.05)


def test_the_other_node_starts_watches_and_restarts_its_engines(node: subprocess.Popen[str], tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, **ENGINES)
    engine_store = EngineStore(30)
    good, bad = (
        RemoteHost(config.rollout, place, lambda: engine_store)
        for place in engine_places(config.rollout, Node(0, 2, 1))
    )
    for host in (good, bad):
        host.start()
    url = good.wait_ready()
    assert urllib.request.urlopen(f"{url}/health").status == 200
    good.check()
    with pytest.raises(EngineError, match=r"(?s)ended while starting. Fix: .*engine_1.log.*no such luck"):
        bad.wait_ready()

    (tmp_path / "repaired").touch()
    bad.start()
    assert urllib.request.urlopen(f"{bad.wait_ready()}/health").status == 200

    [server] = [
        pid for pid in processes_below(node.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").endswith(url.rpartition(":")[2].encode())
        and b"guard.py" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(server, signal.SIGKILL)
    wait_failed(good)
    with pytest.raises(EngineFaultError, match="ended with status 137"):
        good.check()
    good.start()
    again = good.wait_ready()
    good.check()
    assert urllib.request.urlopen(f"{again}/health").status == 200

    started = processes_below(node.pid)
    assert node.stdin is not None
    node.stdin.close()  # the rank ends
    assert wait_gone(started, 30) == []


def test_a_node_that_says_nothing(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(Path("m"), Path("r"), **{**ENGINES, "start_timeout_s": 0.1}).rollout
    monkeypatch.setattr(nodes_module, "SILENCE_S", 0.1)
    place = engine_places(config, Node(0, 2, 1))[0]
    host = RemoteHost(config, place, lambda: EngineStore(5))
    host.start()
    with pytest.raises(EngineFaultError, match=r"node 1 said nothing of its engine 0 within rollout\.start_timeout_s"):
        host.wait_ready()


def test_no_store() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "1")
        with pytest.raises(EngineError, match=r"no rendezvous store at MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:1"):
            EngineStore(0.5)


def test_the_address_by_which_others_reach_this_node(store: dist.TCPStore) -> None:
    assert own_address("0.0.0.0") == "127.0.0.1"
    with pytest.raises(
        ConfigError, match=r"rollout\.host = ::, MASTER_ADDR = 127\.0\.0\.1: .*Fix: set rollout.host to"
    ):
        own_address("::")
