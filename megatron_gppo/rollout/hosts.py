"""Where an engine runs, as the pool sees it: a server of this process, or somebody else's. nodes.py has a third kind."""

from pathlib import Path
from typing import Protocol

from megatron_gppo.config import Config, RolloutConfig
from megatron_gppo.rollout.engine import EngineFaultError
from megatron_gppo.rollout.placement import EnginePlace
from megatron_gppo.rollout.server import ManagedServer, wait_healthy


class EngineHost(Protocol):
    """One engine's process, however it is reached. The pool calls it from one thread at a time, except check() and close()."""

    managed: bool  # start() can bring it back; otherwise it may come back by itself

    @property
    def gpus(self) -> list[int]:
        """Which it was shown of its node's; empty for all."""

    def start(self) -> None:
        """Starts the engine, after ending what is left of an earlier one, without waiting for it."""

    def wait_ready(self) -> str:
        """The URL of the started engine, once it is healthy. Raises EngineError when it dies or takes too long."""

    def check(self) -> None:
        """Raises EngineFaultError when the engine is known to have ended. Returns at once."""

    def close(self) -> None:
        """Ends the engine for good, if it is ours. Also ends a wait_ready() in another thread."""


class LocalHost:
    """A managed engine on this node."""

    managed = True

    def __init__(self, config: Config, place: EnginePlace, log_path: Path, address: str | None = None) -> None:
        self._config = config
        self._place = place
        self._log_path = log_path
        self._address = address
        self._server: ManagedServer | None = None
        self._closed = False

    @property
    def gpus(self) -> list[int]:
        return self._place.gpus

    def start(self) -> None:
        if self._server is not None:
            self._server.close()
        if not self._closed:
            self._server = ManagedServer(self._config, self._log_path, self._place, self._address)
            if self._closed:  # meanwhile
                self._server.close()

    def wait_ready(self) -> str:
        if self._server is None or self._closed:
            raise EngineFaultError("the run is ending")
        self._server.wait_ready()
        return self._server.url

    def check(self) -> None:
        if self._server is not None:
            self._server.check()

    def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()


class ExternalHost:
    """A server that somebody else runs. If it fails, it has rollout.start_timeout_s to be healthy again."""

    managed = False

    def __init__(self, rollout: RolloutConfig, url: str) -> None:
        self._rollout = rollout
        self._url = url
        self.gpus: list[int] = []

    def start(self) -> None:
        pass

    def wait_ready(self) -> str:
        wait_healthy(self._url, self._rollout.api_key, self._rollout.start_timeout_s)
        return self._url

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
