"""sglang-router in front of the engines, for generation only: it knows which engine has a prompt's beginning cached.

It does not pass on what pauses engines or loads weights, so everything else goes straight to each engine. Its own health
checks, retries and circuit breaker are off: the pool decides which engines serve, and requests are counted where they
are sent.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_gppo.config import ConfigError, RolloutConfig
from megatron_gppo.http_calls import HttpCallError, call
from megatron_gppo.rollout.engine import Engine, EngineError, EngineFaultError
from megatron_gppo.rollout.guarding import guarded
from megatron_gppo.rollout.ports import number_of, reserve_port
from megatron_gppo.rollout.server import make_engine

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0
POLL_S = 0.1
HOST = "127.0.0.1"  # rank 0 alone uses it


class Router:
    """A router that this process started, ended with it. Raises ConfigError if sglang-router is not installed."""

    def __init__(self, rollout: RolloutConfig, log_path: Path) -> None:
        if not _is_installed():
            raise ConfigError(
                "rollout.router = true needs sglang-router. Fix: pip install --no-deps sglang-router==0.3.2, or set rollout.router: false"
            )
        self._api_key = rollout.api_key
        self._log_path = log_path
        self._workers: set[str] = set()
        # Every router would take one and the same port for its metrics.
        self._ports = [reserve_port(HOST), reserve_port(HOST)]
        port, metrics_port = map(number_of, self._ports)
        self.url = f"http://{HOST}:{port}"
        command = [sys.executable, "-m", "sglang_router.launch_router", "--host", HOST, "--port", str(port)]
        command += ["--prometheus-host", HOST, "--prometheus-port", str(metrics_port)]
        command += [
            "--policy",
            "cache_aware",
            "--disable-retries",
            "--disable-circuit-breaker",
            "--disable-health-check",
        ]
        # Later than the client's own limit.
        command += ["--request-timeout-secs", str(int(rollout.request_timeout_s) + 60), "--log-level", "warn"]
        if rollout.api_key is not None:
            command += ["--api-key", rollout.api_key]
        with log_path.open("ab") as log:
            self._guard: subprocess.Popen[bytes] = guarded(command, log, env=None)
        self.engine: Engine = make_engine(rollout, self.url, self)

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    def wait_ready(self) -> None:
        """Raises EngineError when it does not come up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self.check()
            try:
                self._call("/liveness")
                return
            except EngineFaultError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"sglang-router was not up within {START_TIMEOUT_S:g} s ({error}). Fix: read {self._log_path}"
                    ) from None
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises EngineFaultError when it has ended."""
        if (status := self._guard.poll()) is not None:
            raise EngineFaultError(
                f"sglang-router at {self.url} ended with status {status}. Fix: read {self._log_path}"
            )

    def set_workers(self, urls: set[str]) -> None:
        """From now on it sends requests to these engines. Returns when it does; raises EngineFaultError."""
        for url in self._workers - urls:
            self._call(f"/workers/{quote(self._ids()[url], safe='')}", method="DELETE")
        for url in urls - self._workers:
            self._call("/workers", {"url": url} | ({"api_key": self._api_key} if self._api_key is not None else {}))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not urls <= set(self._ids()):
            if time.monotonic() > deadline:
                raise EngineFaultError(
                    f"sglang-router at {self.url} has workers {sorted(self._ids())}, not {sorted(urls)}"
                )
            time.sleep(POLL_S)
        self._workers = set(urls)

    def close(self) -> None:
        self._guard.terminate()
        self._guard.wait()
        for port in self._ports:
            port.close()

    def _ids(self) -> dict[str, str]:
        """The router's names of its healthy workers, by URL."""
        workers = json.loads(self._call("/workers"))["workers"]
        return {worker["url"]: worker["id"] for worker in workers if worker["is_healthy"]}

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> bytes:
        try:
            return call(self.url, path, self._api_key, body, method=method, timeout_s=CALL_TIMEOUT_S)
        except HttpCallError as error:
            raise EngineFaultError(str(error)) from error


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("sglang_router") is not None
    except ValueError:  # said to be there, and is not
        return False
