"""One real SGLang server for all end-to-end tests of a session: starting one takes half a minute."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gppo.rollout.server import ManagedServer
from tests.support.rollout import make_config
from tests.support.tiny import make_tiny_model
from tests.support.training import put_back


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 in HF format, fp32."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedServer]:
    """A server that holds tiny_model as weight version 0. A test that changes its weights must put them back."""
    folder = tmp_path_factory.mktemp("server")
    with ManagedServer(make_config(tiny_model, folder), folder / "sglang.log") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def engine_url(server: ManagedServer, tiny_model: Path) -> Iterator[str]:
    """The session's server, which gets its weights back at the end."""
    yield server.url
    put_back(server.url, tiny_model)
