"""The real train command, run as a user runs it, and what it leaves behind."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from megatron_gppo.convert import Architecture, MegatronCheckpoint, parameters
from megatron_gppo.metrics import TAGS
from megatron_gppo.policy.checkpoint import folder_name

TIMEOUT_S = 400
PROBE = [5, 14, 6, 13, 8, 20, 33, 40, 7, 7]
NOT_IN_EVERY_RUN = {  # among the scalars of two steps
    "policy/reference_kl",
    "algorithm/entropy_target",
    "engine/importance_weight",
    "engine/importance_corrected",
    "engine/importance_effective_sample_size",
    "engine/routing_difference",
    "entropy/covariance_correlation",
    "memory/gpu_peak_gib",
    "ratio/histogram",
    "samples",
}


def write_config(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """A run of 2 steps of 2 updates on random prompts, with a learning rate that leaves the clip range."""
    data = folder / "prompts.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": a + b} for a in range(6) for b in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "model": {"hf_path": str(model), "dtype": "fp32"},
        "run": {"dir": str(folder / "run"), "collective_timeout_s": 120, "save_every": 1},
        "data": {
            "train": str(data),
            "question_column": "question",
            "answer_column": "answer",
            "max_prompt_tokens": 32,
        },
        "rollout": {"prompts_per_step": 8, "responses_per_prompt": 4, "max_response_tokens": 24},
        "reward": {"function": "tests.support.reward:share_of_letters", "workers": 1},
        "train": {"steps": 2, "prompts_per_update": 4, "tokens_per_microbatch": 256},
        "algorithm": {"preset": "paper"},
        "optimizer": {"lr": 3e-3, "warmup_updates": 0},
        "sync": {"verify_every": 1, "timeout_s": 60, "bucket_mb": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start_training(config: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal would give it a process group."""
    return _torchrun(["--standalone", "--nproc-per-node", str(ranks)], config, overrides)


def start_node(config: Path, node: int, num_nodes: int, port: int, *overrides: str) -> subprocess.Popen[str]:
    """As a node with one rank, all nodes being this machine; port: where the first one's torchrun listens."""
    nodes = ["--nnodes", str(num_nodes), "--node-rank", str(node), "--nproc-per-node", "1"]
    return _torchrun([*nodes, "--master-addr", "127.0.0.1", "--master-port", str(port)], config, overrides)


def start_numbered_node(config: Path, num_nodes: int, port: int, *overrides: str) -> subprocess.Popen[str]:
    """As start_node, but torchrun's c10d rendezvous says which node it is."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    return _torchrun(["--nnodes", str(num_nodes), "--nproc-per-node", "1", *rendezvous], config, overrides)


def _torchrun(options: list[str], config: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return subprocess.Popen(
        [*launcher, "-m", "megatron_gppo.train", "--config", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(config: Path, ranks: int, *overrides: str, status: int = 0) -> str:
    """Runs to the end and returns what was printed."""
    process = start_training(config, ranks, *overrides)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == status, output[-6000:]
    return output


def scalars(run: Path) -> dict[str, list[float]]:
    """TensorBoard's values by tag, in order of step."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def saved_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = MegatronCheckpoint(run / "checkpoints" / folder_name(step))
    architecture: Architecture = checkpoint.architecture()
    return {parameter.name: checkpoint.read(parameter) for parameter in parameters(architecture)}


def lines_until(process: subprocess.Popen[str], wanted: str) -> str:
    """What the process prints up to the first line that holds `wanted`."""
    printed = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if wanted in line:
            return "".join(printed)
    raise AssertionError("".join(printed)[-6000:])


def check_learned(output: str, run: Path) -> None:
    """Of a run of write_config's two steps: all that is logged, log-probs that agree with the engine's, tokens that were clipped."""
    assert " 1/2 " in output
    assert " 2/2 " in output
    logged = scalars(run)
    assert set(logged) - {"engine/routing_difference"} == set(TAGS) - NOT_IN_EVERY_RUN
    assert max(logged["ratio/first_update_max_deviation"]) < 1e-5
    assert max(logged["engine/logprob_difference_max"]) < 1e-4
    assert max(logged["rollout/staleness_max"]) == max(logged["rollout/mixed_responses"]) == 0
    outside = [
        left + right for left, right in zip(logged["ratio/left_of_clip"], logged["ratio/right_of_clip"], strict=True)
    ]
    assert min(outside) > 0, "no ratio ever left the clip range"
    assert min(logged["policy/grad_norm"]) > 0
    assert max(logged["policy/skipped_updates"]) == 0


def put_back(url: str, model: Path) -> None:
    """Gives a server the weights of a folder, as version 0."""
    body = {"model_path": str(model), "weight_version": "0", "flush_cache": True}
    request = urllib.request.Request(
        f"{url}/update_weights_from_disk",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def hf_logprobs(folder: Path) -> torch.Tensor:
    """[L-1] of PROBE."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROBE])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]
