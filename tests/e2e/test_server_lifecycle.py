"""What becomes of real SGLang servers when something goes wrong. Each test here starts one of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_gppo.rollout.engine import Engine, EngineError
from megatron_gppo.rollout.generate import EngineRollouts
from megatron_gppo.rollout.server import ManagedServer, make_engine
from tests.support.fake_engine import CountingPrompts, FakeJudge, FixedEngines
from tests.support.rollout import make_config, processes_below, wait_busy, wait_gone

TRAINER = """
import json, sys, time
from pathlib import Path
from megatron_gppo.rollout.server import ManagedServer
from tests.support.rollout import make_config
server = ManagedServer(make_config(Path(sys.argv[1]), Path(sys.argv[2]), engine_tp=2), Path(sys.argv[2]) / "sglang.log")
server.wait_ready()
print(json.dumps({"guard": server.guard_pid}), flush=True)
time.sleep(3600)
"""


def test_no_process_survives_a_killed_trainer(tiny_model: Path, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tiny_model), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    try:
        guard = json.loads(trainer.stdout.readline())["guard"]
        pids = processes_below(guard)
        assert len(pids) >= 4  # guard, SGLang's main process, two schedulers
    finally:
        trainer.kill()
        trainer.wait()
    assert wait_gone(pids, 60) == []


def test_a_server_killed_while_it_generates(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model, tmp_path, prompts_per_step=32, max_response_tokens=1900, api_key="secret", max_retries=100
    )
    with ManagedServer(config, tmp_path / "sglang.log") as server:
        server.wait_ready()

        without_key = EngineRollouts(
            config.rollout, FixedEngines([Engine(server.url)]), CountingPrompts(), FakeJudge(), prompts_per_update=1
        )
        with pytest.raises(EngineError, match="HTTP 401"):
            without_key.next(0, 0)

        pids = processes_below(server.guard_pid)
        engines = FixedEngines([make_engine(config.rollout, server.url, server)])
        rollouts = EngineRollouts(config.rollout, engines, CountingPrompts(), FakeJudge(), prompts_per_update=1)

        def kill_when_busy() -> None:
            wait_busy(server.url, "secret")
            os.kill(pids[1], signal.SIGKILL)

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        with pytest.raises(
            EngineError, match=r"(?s)ended with status 137\. Fix: .*--api-key '\*\*\*'.*sglang.log"
        ) as error:
            rollouts.next(0, 0)
        killer.join()
        assert "secret" not in str(error.value)
        assert not server.alive()
        assert wait_gone(pids, 60) == []


def test_a_model_that_cannot_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    with ManagedServer(make_config(broken, tmp_path), tmp_path / "sglang.log") as server:
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))  # its port is kept, long before it listens
        with pytest.raises(EngineError) as error:
            server.wait_ready()
        assert not server.alive()
    message = str(error.value)
    assert "ended while starting. Fix: check the weights in model.hf_path" in message
    assert f"--model-path {broken}" in message
    assert str(tmp_path / "sglang.log") in message
    assert "SafetensorError" in message
