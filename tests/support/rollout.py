"""Configurations, processes and servers for tests of rollouts."""

import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any

from megatron_gppo.config import Config, parse_config
from megatron_gppo.http_calls import authorization


def make_config(hf_path: Path, run_dir: Path, **rollout: Any) -> Config:
    """A small fp32 run: 4 prompts a step, G = 4, responses of at most 32 tokens; `rollout` replaces fields."""
    fields = {"prompts_per_step": 4, "responses_per_prompt": 4, "max_response_tokens": 32}
    return parse_config(
        {
            "model": {"hf_path": str(hf_path), "dtype": "fp32"},
            "run": {"dir": str(run_dir)},
            "data": {"train": "unused.jsonl", "max_prompt_tokens": 64},
            "rollout": fields | rollout,
            "sync": {"transport": "tensor"} if rollout.get("placement") == "colocated" else {},
            "train": {"prompts_per_update": 1, "tokens_per_microbatch": 4096},
            "algorithm": {"preset": "paper"},
        }
    )


def processes_below(pid: int) -> list[int]:
    """A process and all its descendants, whatever group or session they are in."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found


def is_engine(pid: int) -> bool:
    """Whether it is SGLang's main process, not the guard, which has the same command as arguments."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"sglang.launch_server" in command and b"guard.py" not in command


def wait_gone(pids: list[int], timeout_s: float) -> list[int]:
    """The processes of `pids` that are still there after `timeout_s`; zombies count as gone."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if _exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def running_requests(url: str, api_key: str | None = None) -> int:
    """What an SGLang server is working on, or will."""
    request = urllib.request.Request(f"{url}/v1/loads", headers=authorization(api_key))
    with urllib.request.urlopen(request) as response:
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in json.load(response)["loads"])


def wait_busy(url: str, api_key: str | None = None) -> None:
    """Returns once an SGLang server is working on a request."""
    while running_requests(url, api_key) == 0:
        time.sleep(0.05)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
