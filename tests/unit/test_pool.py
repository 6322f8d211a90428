"""Which engines serve, and how lost ones come back: EnginePool over hosts, routers and servers that are ours."""

import http.server
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_gppo.rollout import pool as pool_module
from megatron_gppo.rollout.engine import EngineError, EngineFaultError
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.rollout.router import Router
from tests.support.rollout import make_config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE_S", "POLL_S"):
        monkeypatch.setattr(pool_module, name, 0.01)


class FakeHost:
    """An engine whose n-th start fails if n is in `failing`; a new URL every time."""

    managed = True

    def __init__(self, name: str, failing: Any = (), url: str | None = None) -> None:
        self.name, self.failing, self.url = name, failing, url
        self.starts = 0
        self.started_at: list[float] = []
        self.dead = self.closed = False
        self.may_be_ready = threading.Event()
        self.may_be_ready.set()

    def start(self) -> None:
        self.starts += 1
        self.started_at.append(time.monotonic())

    def wait_ready(self) -> str:
        self.may_be_ready.wait()
        if self.closed or self.starts in self.failing:
            raise EngineFaultError(f"{self.name}: start {self.starts} failed")
        self.dead = False
        return self.url or f"http://{self.name}-{self.starts}"

    def check(self) -> None:
        if self.dead:
            raise EngineFaultError(f"{self.name} ended")

    def close(self) -> None:
        self.closed = True
        self.may_be_ready.set()


@contextmanager
def serving_pool(*hosts: FakeHost, router: Router | None = None, **rollout: Any) -> Iterator[EnginePool]:
    """A pool whose engines have been given version 0."""
    config = make_config(Path("m"), Path("r"), **rollout).rollout
    pool = EnginePool(config, hosts, start_router=(lambda: router) if router is not None else None)
    try:
        pool.wait_ready()
        assert pool.serving() == [], "not before they have the weights"
        pool.synced(pool.to_sync(), 0)
        yield pool
    finally:
        pool.close()


def urls(pool: EnginePool) -> list[str]:
    return [engine.url for engine in pool.serving()]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lost_engine_serves_again_only_after_its_sync(capsys: pytest.CaptureFixture[str]) -> None:
    with serving_pool(FakeHost("a"), FakeHost("b")) as pool:
        assert urls(pool) == ["http://a-1", "http://b-1"]
        pool.lost("http://a-1", "it hung")
        assert urls(pool) == ["http://b-1"]
        pool.lost("http://a-1", "it hung")  # a second reporter changes nothing
        until(lambda: len(pool.to_sync()) == 2)
        assert pool.to_sync() == ["http://a-2", "http://b-1"]
        assert urls(pool) == ["http://b-1"], "up, but with the weights of its files"
        pool.synced(["http://b-1"], 1)
        assert urls(pool) == ["http://b-1"], "came too late for this sync"
        pool.synced(pool.to_sync(), 2)
        assert urls(pool) == ["http://a-2", "http://b-1"]
        assert pool.take_counts() == {"lost_engines": 1, "restarted_engines": 1, "serving_engines": 2}
        assert pool.take_counts() == {"serving_engines": 2}, "each is counted once"
    assert "lost the engine at http://a-1: it hung" in (printed := capsys.readouterr().err)
    assert "the engine at http://a-2 serves again, with weights of version 2" in printed


def test_processes_that_ended_are_found_before_a_sync() -> None:
    hosts = FakeHost("a"), FakeHost("b")
    hosts[0].may_be_ready.set()
    with serving_pool(*hosts) as pool:
        hosts[0].may_be_ready.clear()  # its next start takes a while
        hosts[0].dead = True
        assert pool.to_sync() == ["http://b-1"]


def test_restarts_pause_longer_each_time_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.05)
    host = FakeHost("a", failing={2, 3, 4})
    with serving_pool(host, max_restarts=3) as pool:
        lost_at = time.monotonic()
        pool.lost("http://a-1", "it died")
        assert pool.prospect() == "starting"

        until(lambda: host.starts == 4)
        with pytest.raises(EngineError, match=r"no engine is left: .*rollout\.max_restarts = 3.*a: start 4 failed"):
            pool.to_sync()
        at = [lost_at, *host.started_at[1:]]
        pauses = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert len(pauses) == 3
        assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))


def test_an_external_engine_that_keeps_failing_is_given_up() -> None:
    """It is healthy whenever asked, and then answers nonsense again."""
    host = FakeHost("a")
    host.managed = False
    with serving_pool(host, max_restarts=2) as pool:
        for start in (1, 2):
            pool.lost(f"http://a-{start}", "nonsense")
            pool.synced(pool.to_sync(), 0)
            assert urls(pool) == [f"http://a-{start + 1}"]
        pool.lost("http://a-3", "nonsense")
        with pytest.raises(EngineError, match=r"no engine is left.*nonsense"):
            pool.prospect()


def test_an_engine_that_serves_since_the_caller_looked_is_no_error() -> None:
    with serving_pool(FakeHost("a")) as pool:
        assert pool.prospect() == "starting"


def test_when_no_sync_was_under_way() -> None:
    with serving_pool(FakeHost("a")) as pool:
        assert pool.quiet_since() < time.monotonic()
        pool.to_sync()
        assert pool.quiet_since() > time.monotonic()
        pool.synced([], 1)
        assert pool.quiet_since() < time.monotonic()


def test_without_restarts_the_first_loss_is_final() -> None:
    host = FakeHost("a")
    with serving_pool(host, max_restarts=0) as pool:
        pool.lost("http://a-1", "it died")
        with pytest.raises(EngineError, match=r"no engine is left.*it died"):
            pool.prospect()
        until(lambda: host.closed)  # it may only hang


def test_to_sync_waits_for_the_only_engine() -> None:
    host = FakeHost("a")
    with serving_pool(host) as pool:
        host.may_be_ready.clear()
        pool.lost("http://a-1", "it died")
        threading.Timer(0.1, host.may_be_ready.set).start()
        assert pool.to_sync() == ["http://a-2"]
        assert pool.prospect() == "needs weights"


def test_to_sync_reports_every_attempt_and_does_not_wait_when_the_run_is_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(pool_module, "POLL_S", 0.01)
    host = FakeHost("a", failing={2, 3, 4, 5})
    with serving_pool(host) as pool:
        attempts: list[int] = []

        def on_progress() -> None:
            attempts.append(host.starts)
            if len(attempts) == 2:
                pool.cancel()

        pool.lost("http://a-1", "it died")
        assert pool.to_sync(on_progress) == []
        assert len(attempts) == 2


def test_an_engine_that_does_not_come_up_at_the_start_is_an_error() -> None:
    pool = EnginePool(make_config(Path("m"), Path("r")).rollout, [FakeHost("a", failing={1})])
    with pytest.raises(EngineError, match="a: start 1 failed"):
        pool.wait_ready()
    pool.close()


def test_the_engines_own_weights_are_enough_where_nothing_is_synced() -> None:
    host = FakeHost("a")
    pool = EnginePool(make_config(Path("m"), Path("r")).rollout, [host], needs_weights=False)
    pool.wait_ready()
    assert urls(pool) == ["http://a-1"]
    pool.lost("http://a-1", "it died")
    until(lambda: urls(pool) == ["http://a-2"])
    pool.close()
    assert host.closed


def test_closing_ends_a_restart_that_is_under_way() -> None:
    host = FakeHost("a")
    with serving_pool(host) as pool:
        host.may_be_ready.clear()
        pool.lost("http://a-1", "it died")
        until(lambda: host.starts == 2)
    assert host.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "engine restart"]


@contextmanager
def control_server(busy_flushes: int = 0, failing: str | None = None) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Records what is POSTed; its cache cannot be flushed the first times."""
    calls: list[tuple[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append((self.path, body))
            flushes = [path for path, _ in calls].count("/flush_cache")
            refused = self.path == "/flush_cache" and flushes <= busy_flushes
            self.send_response(400 if refused else 500 if self.path == failing else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", calls
        server.shutdown()


def test_memory_is_released_when_idle_and_resumed() -> None:
    with control_server(busy_flushes=2) as (url, calls), serving_pool(FakeHost("a", url=url)) as pool:
        pool.release_memory()
        assert calls == [
            ("/pause_generation", {"mode": "abort"}),
            *[("/flush_cache", {})] * 3,
            ("/release_memory_occupation", {"tags": ["kv_cache", "weights", "cuda_graph"]}),
        ]
        calls.clear()
        pool.resume_memory()
        assert calls == [("/resume_memory_occupation", {"tags": ["kv_cache", "weights", "cuda_graph"]})]
        assert urls(pool) == [url]


def test_an_engine_lost_while_the_policy_trains_is_started_when_there_is_room_again() -> None:
    host = FakeHost("a")
    with control_server() as (url, calls), serving_pool(host, FakeHost("b", url=url)) as pool:
        pool.release_memory()  # nobody answers at http://a-1
        assert urls(pool) == [url]
        time.sleep(0.1)
        assert host.starts == 1
        pool.resume_memory()
        until(lambda: host.starts == 2)
        until(lambda: len(pool.to_sync()) == 2)
        calls.clear()
        pool.resume_memory()
        assert not calls, "nothing is released"


def test_an_engine_that_is_coming_up_when_the_policy_wants_the_memory_gives_it_back_first() -> None:
    with control_server() as (url, calls):
        host = FakeHost("a")
        with serving_pool(host) as pool:
            host.url = url
            host.may_be_ready.clear()
            pool.lost("http://a-1", "it died")
            until(lambda: host.starts == 2)
            threading.Timer(0.1, host.may_be_ready.set).start()
            pool.release_memory()
            assert calls[-1][0] == "/release_memory_occupation"


def test_releasing_the_memory_of_an_engine_that_has_ended_does_not_wait() -> None:
    host = FakeHost("a")
    with control_server(busy_flushes=10**9) as (url, _):
        host.url = url
        with serving_pool(host, max_restarts=0) as pool:
            threading.Timer(0.1, setattr, (host, "dead", True)).start()
            pool.release_memory()
            assert urls(pool) == []


def test_a_colocated_engine_that_is_the_only_one_is_started_for_the_sync() -> None:
    host = FakeHost("a")
    with serving_pool(host) as pool:
        pool.release_memory()  # nobody answers
        pool.resume_memory()
        assert host.starts == 1
        assert pool.to_sync() == ["http://a-2"]


class FakeRouter:
    """Remembers the workers it was given."""

    url = "http://router"

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.workers: list[set[str]] = []
        self.engine = object()
        self.closed = False

    def wait_ready(self) -> None:
        pass

    def set_workers(self, urls: set[str]) -> None:
        if self.fails:
            raise EngineFaultError("no answer")
        self.workers.append(urls)

    def close(self) -> None:
        self.closed = True


def test_the_router_has_those_that_serve() -> None:
    router: Any = FakeRouter()
    with serving_pool(FakeHost("a"), FakeHost("b"), router=router) as pool:
        assert pool.front() is router.engine
        assert router.workers[-1] == {"http://a-1", "http://b-1"}
        pool.lost("http://a-1", "it died")
        assert router.workers[-1] == {"http://b-1"}
        until(lambda: len(pool.to_sync()) == 2)
        assert router.workers[-1] == {"http://b-1"}
        pool.synced(pool.to_sync(), 1)
        assert router.workers[-1] == {"http://a-2", "http://b-1"}
    assert router.closed


@pytest.mark.parametrize("how", ["it ends", "it does not answer"])
def test_without_the_router_generation_goes_on(how: str) -> None:
    router: Any = FakeRouter()
    with serving_pool(FakeHost("a"), router=router) as pool:
        if how == "it ends":
            pool.lost(router.url, "it ended")
        else:
            router.fails = True
            pool.synced(pool.to_sync(), 1)
        assert pool.front() is None
        assert urls(pool) == ["http://a-1"]
        assert router.closed
        assert pool.take_counts() == {"lost_routers": 1, "serving_engines": 1}
