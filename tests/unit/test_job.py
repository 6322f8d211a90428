"""Where a rank finds the others, and how they reach it."""

import os
from pathlib import Path

import psutil
import pytest

from megatron_gppo.job import JobError, _address_towards, _use_interface_of, join_job
from megatron_gppo.rollout.ports import number_of, reserve_port
from tests.support.rollout import make_config


def test_the_address_on_the_way_to_the_first_node() -> None:
    assert _address_towards("127.0.0.1", 29500) == "127.0.0.1"
    assert _address_towards("no-such-host.invalid", 29500) == "no known address"


def test_gloo_takes_the_interface_with_that_address(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = type("Entry", (), {"address": "10.1.2.3"})
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth7": [entry]})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that afterwards it is again as it was, absent too
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    _use_interface_of("127.0.0.1")
    _use_interface_of("10.9.9.9")
    _use_interface_of("no known address")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    _use_interface_of("10.1.2.3")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    _use_interface_of("10.1.2.3")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"


def test_ranks_that_never_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_config(tmp_path, tmp_path)
    config = made.model_copy(update={"run": made.run.model_copy(update={"collective_timeout_s": 1.0})})
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with reserve_port("127.0.0.1") as port:
        monkeypatch.setenv("MASTER_PORT", str(number_of(port)))
        with pytest.raises(
            JobError, match=r"(?s)rank 0 \(.*phase 'join': the 2 ranks have not met at 127.0.0.1:.*= 1 s"
        ):
            join_job(config)
