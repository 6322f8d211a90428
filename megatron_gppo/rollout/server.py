"""A managed SGLang server: its command, its start, its supervision and its end.

The server is not a child of the trainer but of a guard (guard.py), in a session of its own: Ctrl-C in the terminal does
not reach it, and it ends whenever the trainer does.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_gppo.config import Config, ConfigError, RolloutConfig, ServerArgs
from megatron_gppo.http_calls import HttpCallError, call
from megatron_gppo.rollout import cpu_engine
from megatron_gppo.rollout.engine import Engine, EngineError, EngineFaultError, Supervised
from megatron_gppo.rollout.guarding import GRACE_SECONDS, guarded
from megatron_gppo.rollout.placement import EnginePlace, only_place
from megatron_gppo.rollout.ports import number_of, reserve_port

HEALTH_TIMEOUT_S = 5.0
HEALTH_INTERVAL_S = 0.5
LOG_TAIL_BYTES = 65536  # searched for a known cause
LOG_TAIL_LINES = 30  # shown
LOG_LINE_CHARACTERS = 300
# With the names that SGLang takes for the same.
OWN_ARGS = (
    "model_path",
    "model",
    "dtype",
    "host",
    "port",
    "api_key",
    "tp_size",
    "tp",
    "tensor_parallel_size",
    "weight_version",
)

# torchrun describes the trainer's ranks in these. SGLang forms groups of its own, and with
# TORCHELASTIC_USE_AGENT_STORE set torch would look for their store in torchrun instead of making one.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")

# What is seen in the log of a server that did not come up, or died -> what to do about it; the first match counts.
FIXES = (
    ("No module named 'sglang'", "install SGLang into this Python: see 'Installation' in the README"),
    ("error: unrecognized arguments", "correct rollout.server_args: this SGLang does not know one of them"),
    ("error: argument", "correct rollout.server_args: SGLang does not accept a value there"),
    ("address already in use", "set rollout.port to a free one, or to null"),
    ("out of memory", "lower rollout.server_args.mem_fraction_static, or give the server other GPUs (base_gpu_id)"),
    ("Not enough memory", "raise rollout.server_args.mem_fraction_static, or give the server more GPUs"),
    ("SafetensorError", "check the weights in model.hf_path: a file is damaged or incomplete"),
    ("Cannot find any model weights", "check model.hf_path: it holds no weights"),
    (
        "guard: the server ended with status 137",
        "look for the kernel's out-of-memory killer, which leaves no other trace",
    ),
)


class ManagedServer:
    """A server that this process started. The constructor launches it and returns at once; wait_ready() waits.

    Use as a context manager, or call close(). address: what others reach it by; None is rollout.host. Raises ConfigError
    when there is no model, the port is in use or server_args repeat a field.
    """

    def __init__(
        self, config: Config, log_path: Path, place: EnginePlace | None = None, address: str | None = None
    ) -> None:
        rollout = config.rollout
        place = place or only_place(rollout)
        if not (config.model.hf_path / "config.json").is_file():
            raise ConfigError(
                f"model.hf_path = {config.model.hf_path} has no config.json. Fix: give a local HF model folder"
            )
        self.log_path = log_path
        self._api_key = rollout.api_key
        self._start_timeout_s = rollout.start_timeout_s
        with contextlib.ExitStack() as undo:
            self._port = undo.enter_context(_reserved_port(rollout.host, place.port))
            port = number_of(self._port)
            self.url = _url(address or rollout.host, port)
            self._command = server_command(config, port, place)
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as log, _confined_to(place.cores):
                self._log_start = log.tell()
                self._guard = guarded(self._command, log, server_environment(place))
            undo.pop_all()

    def __enter__(self) -> "ManagedServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    def wait_ready(self) -> None:
        """Returns when the server is healthy. Raises EngineError, and ends the server, if it dies or takes too long."""
        try:
            wait_healthy(self.url, self._api_key, self._start_timeout_s, self)
        except EngineError as error:
            self.close()
            raise EngineError(self._report(str(error))) from None

    def alive(self) -> bool:
        return self._guard.poll() is None

    def check(self) -> None:
        """Raises EngineFaultError with the end of the log when the server has ended."""
        if not self.alive():
            raise EngineFaultError(
                self._report(f"the SGLang server at {self.url} ended with status {self._guard.returncode}")
            )

    def close(self) -> None:
        """Ends the server and everything it started; returns when that is done. Can be called again."""
        # Not only by closing its stdin: a process that the trainer forked may hold the other end too.
        self._guard.terminate()
        try:
            self._guard.wait(GRACE_SECONDS + 20.0)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"the SGLang server at {self.url} cannot be killed: guard process {self._guard.pid} is still waiting for it"
            ) from None
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._port.close()

    def _report(self, what: str) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        command = shlex.join("***" if part == self._api_key else part for part in self._command)
        fix = next((fix for sign, fix in FIXES if sign.lower() in text.lower()), "read the log")
        if self._api_key is not None:  # SGLang logs all its arguments, in one line of many thousand characters
            text = text.replace(repr(self._api_key), "'***'")
        tail = "\n".join(f"  | {line[:LOG_LINE_CHARACTERS]}" for line in text.splitlines()[-LOG_TAIL_LINES:])
        return f"{what}. Fix: {fix}\n  command: {command}\n  log: {self.log_path}, which ends:\n{tail}"


def make_engine(config: RolloutConfig, url: str, process: Supervised | None = None) -> Engine:
    return Engine(
        url,
        api_key=config.api_key,
        timeout_s=config.request_timeout_s,
        max_retries=config.max_retries,
        process=process,
    )


def wait_healthy(url: str, api_key: str | None, timeout_s: float, server: ManagedServer | None = None) -> None:
    """Returns when GET /health answers 200. Raises EngineError after timeout_s, or when the server has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        if server is not None and not server.alive():
            raise EngineError(f"the SGLang server at {url} ended while starting")
        try:
            if server is None:
                # A trainer that was killed in the middle of a sync left it paused: it would never be healthy.
                with contextlib.suppress(HttpCallError):
                    call(url, "/continue_generation", api_key, {}, timeout_s=HEALTH_TIMEOUT_S)
            call(url, "/health", api_key, timeout_s=HEALTH_TIMEOUT_S)
            return
        except ValueError as error:
            raise ConfigError(f"rollout.urls: {error}. Fix: write it as http://HOST:PORT") from None
        except HttpCallError as error:
            answer = str(error)
        if time.monotonic() > deadline:
            raise EngineError(
                f"the SGLang server at {url} was not healthy within rollout.start_timeout_s = {timeout_s:g} s ({answer})"
            )
        time.sleep(HEALTH_INTERVAL_S)


def server_command(config: Config, port: int, place: EnginePlace) -> list[str]:
    """The command line of the server for config.model and config.rollout."""
    rollout = config.rollout
    user_args = {name.replace("-", "_"): value for name, value in place.server_args.items()}
    if repeated := sorted(set(OWN_ARGS) & set(user_args)):
        raise ConfigError(
            f"rollout.server_args = {place.server_args}: {', '.join(repeated)} is set by fields of this configuration. "
            "Fix: use model.hf_path, model.dtype, rollout.{engine_dtype, host, port, api_key, engine_tp} or an entry's tp"
        )
    args: ServerArgs = {
        "model_path": str(config.model.hf_path),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[rollout.engine_dtype or config.model.dtype],
        "host": rollout.host,
        "port": port,
        "tp_size": place.tp,
        "weight_version": 0,
        "random_seed": config.run.seed + place.index,  # or all engines would draw alike
        "log_level_http": "warning",  # or the log gets a line for every request
    }
    if rollout.api_key is not None:
        args["api_key"] = rollout.api_key
    if cpu_engine.is_needed():
        args |= cpu_engine.SERVER_ARGS
    elif rollout.placement == "colocated":
        args["enable_memory_saver"] = True  # or releasing memory does nothing
    args |= user_args
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in args.items():
        if value is False:
            continue
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command += map(str, value if isinstance(value, list) else [value])
    return command


def server_environment(place: EnginePlace) -> dict[str, str]:
    """The trainer's environment without what torchrun put there, plus the engine's GPUs, or what the CPU engine needs."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith(TORCHRUN_PREFIXES)
    }
    if cpu_engine.is_needed():
        environment |= cpu_engine.environment(place.tp, place.cores_of_ranks if place.cores else [])
    elif place.gpus:
        shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(shown[gpu] if shown else str(gpu) for gpu in place.gpus)
    return environment


@contextlib.contextmanager
def _confined_to(cores: list[int]) -> Iterator[None]:
    """What this thread starts meanwhile runs on these cores only; all, if there are none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)  # 0 is the calling thread: the trainer's others stay where they are
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ConfigError(
            f"rollout.engines: cores = {cores}: {error.strerror}; this process may use {sorted(before)}. Fix: give some of these"
        ) from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _reserved_port(host: str, port: int | None) -> socket.socket:
    try:
        return reserve_port(host, port or 0)
    except OSError as error:
        raise ConfigError(
            f"rollout.port = {port}, rollout.host = {host}: {error.strerror}. Fix: end what uses the port, or set "
            "rollout.port: null for a free one; the host must be an address of this machine"
        ) from error


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
