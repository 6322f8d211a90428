"""The real sglang-router in front of servers that are ours: what it passes on, and to whom."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_gppo.config import ConfigError
from megatron_gppo.http_calls import HttpCallError, call
from megatron_gppo.rollout.engine import EngineFaultError
from megatron_gppo.rollout.router import Router
from tests.support.rollout import make_config, processes_below, wait_gone

KEY = "secret"
REQUEST = {
    "input_ids": [5, 6, 7],
    "return_logprob": True,
    "sampling_params": {"n": 4, "min_p": 0.0, "max_new_tokens": 8},
}


@contextmanager
def worker(name: str) -> Iterator[str]:
    """Answers whoever has the key; to /generate with its name and what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"model_path": "m", "status": "ok"})

        def do_POST(self) -> None:
            self.answer({"name": name, "asked": json.loads(self.rfile.read(int(self.headers["Content-Length"])))})

        def answer(self, body: dict[str, Any]) -> None:
            allowed = self.headers["Authorization"] == f"Bearer {KEY}" or self.command == "GET"
            data = json.dumps(body).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_it_routes_to_those_that_it_was_given(tmp_path: Path) -> None:
    config = make_config(Path("m"), tmp_path, api_key=KEY).rollout
    with ExitStack() as stack:
        a, b = (stack.enter_context(worker(name)) for name in "ab")
        router = Router(config, tmp_path / "router.log")
        stack.callback(router.close)
        router.wait_ready()
        started = processes_below(router.guard_pid)

        def served_by(requests: int) -> set[str]:
            names = set()
            for index in range(requests):
                body = {**REQUEST, "input_ids": [index, index + 1]}
                answer = json.loads(call(router.url, "/generate", KEY, body, timeout_s=30))
                assert body.items() <= answer["asked"].items(), "nothing of a request is lost on the way"
                names.add(answer["name"])
            return names

        router.set_workers({a})
        assert served_by(3) == {"a"}
        router.set_workers({a, b})
        assert served_by(30) <= {"a", "b"}
        router.set_workers({b})
        assert served_by(3) == {"b"}
        with pytest.raises(HttpCallError, match="answered 401"):
            call(router.url, "/generate", "wrong", REQUEST, timeout_s=30)
        router.check()
        router.close()
        with pytest.raises(EngineFaultError, match=r"ended with status .*router\.log"):
            router.check()
        assert wait_gone(started, 20) == []


def test_it_has_to_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sglang_router", None)
    with pytest.raises(ConfigError, match=r"needs sglang-router. Fix: pip install --no-deps sglang-router==0\.3\.2"):
        Router(make_config(Path("m"), tmp_path).rollout, tmp_path / "router.log")
