"""The recipes in examples/: each config at its stated number of ranks, and the launch scripts without a cluster."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_gppo import train
from megatron_gppo.config import load_config
from megatron_gppo.convert import Architecture
from megatron_gppo.plan import GIB, Plan, make_plan, render
from tests.support.released_models import PUBLISHED_BILLIONS, write_model_config

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCH = EXAMPLES / "launch"
MODELS = {
    "ce_gppo_1.5b": "DeepSeek-R1-Distill-Qwen-1.5B",
    "ce_gppo_7b": "DeepSeek-R1-Distill-Qwen-7B",
    "qwen3_8b": "Qwen3-8B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
}
# Ranks: four of one node's GPUs, and of 8 nodes'.
RANKS = {"ce_gppo_1.5b": (4, 32), "ce_gppo_7b": (4, 32), "qwen3_8b": (4, 32), "qwen3_30b_a3b": (32,)}
CASES = [(recipe, ranks) for recipe, numbers in RANKS.items() for ranks in numbers]
RELEASED_CODE = ["algorithm.preset=released-code", "reward.scope=response", "reward.after_think=false"]
GPU_GIB = 80 * 1e9 / GIB
NOT_COUNTED_GIB = 8  # CUDA's context, NCCL's buffers, fragmentation: a guess on the safe side


def plan_of(recipe: str, ranks: int, folder: Path, *overrides: str) -> Plan:
    model = write_model_config(folder, MODELS[recipe])
    config = load_config(EXAMPLES / recipe / "config.yaml", [f"model.hf_path={model}", *overrides])
    return make_plan(config, Architecture.from_hf(model), ranks)


@pytest.mark.parametrize(("recipe", "ranks"), CASES)
def test_fits_its_gpus(recipe: str, ranks: int, tmp_path: Path) -> None:
    plan = plan_of(recipe, ranks, tmp_path)
    published = PUBLISHED_BILLIONS[MODELS[recipe]]
    assert plan.num_parameters / 1e9 == pytest.approx(published, rel=3e-3)
    assert plan.memory.total / GIB < GPU_GIB - NOT_COUNTED_GIB


@pytest.mark.parametrize(("recipe", "ranks"), CASES)
def test_readme_shows_the_plan(recipe: str, ranks: int, tmp_path: Path) -> None:
    """The table of its --dry-run, line by line."""
    text = render(plan_of(recipe, ranks, tmp_path))
    table = re.search(r"^memory .*\n(?: +\d+ .*\n)+", text, re.MULTILINE)
    assert table is not None
    readme = (EXAMPLES / recipe / "README.md").read_text()
    assert table.group() in readme
    engines = re.findall(r"^engine  .*", text, re.MULTILINE)
    assert engines
    assert re.findall(r"^engine  .*", readme, re.MULTILINE) == engines


@pytest.mark.parametrize("recipe", MODELS)
def test_dry_run_builds_every_stage(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model_config(tmp_path, MODELS[recipe])
    ranks = RANKS[recipe][-1]
    command = ["--config", str(EXAMPLES / recipe / "config.yaml"), "--dry-run", "--world-size", str(ranks)]
    assert train.main([*command, f"model.hf_path={model}"]) == 0
    assert f"on the meta device as one of {ranks} ranks" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["ce_gppo_1.5b", "ce_gppo_7b"])
def test_settings_of_paper_and_released_code(recipe: str, tmp_path: Path) -> None:
    paper = plan_of(recipe, 32, tmp_path).config
    released = plan_of(recipe, 32, tmp_path, *RELEASED_CODE).config
    beta1 = {"ce_gppo_1.5b": 0.5, "ce_gppo_7b": 0.75}[recipe]
    for config in (paper, released):
        assert (config.algorithm.beta1, config.algorithm.beta2) == (beta1, 1.0)
        assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.2)
        assert (config.rollout.responses_per_prompt, config.rollout.max_response_tokens) == (8, 16384)
        assert (config.rollout.prompts_per_step, config.updates_per_step, config.train.steps) == (128, 8, 1000)
        assert (config.optimizer.lr, config.algorithm.kl_coef, config.algorithm.entropy_coef) == (1e-6, 0.0, 0.0)
    assert (paper.algorithm.dual_clip, paper.algorithm.nll_coef, paper.reward.scope) == (None, 0.0, "last_boxed")
    assert (released.algorithm.dual_clip, released.algorithm.nll_coef) == (10.0, 0.1)
    assert " ".join(RELEASED_CODE) in (EXAMPLES / recipe / "README.md").read_text()


def write_command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def run(script: str, *arguments: str, commands: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with these commands found first, and nothing of this process's cluster or launcher."""
    clean = {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | environment,
        cwd=EXAMPLES.parent,
    )


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder, "torchrun", 'echo "torchrun $*"')
    return folder


def test_one_node(commands: Path) -> None:
    done = run("train.sh", "a.yaml", "run.seed=1", commands=commands)
    assert done.stdout == (
        "torchrun --standalone --nproc-per-node 4 --shutdown-timeout 150 -m megatron_gppo.train --config a.yaml run.seed=1\n"
    ), done.stderr


SEVERAL_NODES = (
    "torchrun --nnodes 8 --node-rank 2 --master-addr 10.0.0.1 --master-port 29500 --nproc-per-node 4 --shutdown-timeout 150 "
    "-m megatron_gppo.train --config a.yaml sync.host=10.0.0.1 rollout.host=0.0.0.0 rollout.api_key=key run.seed=1\n"
)


def test_a_node_of_several(commands: Path) -> None:
    environment = {"NNODES": "8", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1", "ENGINE_KEY": "key"}
    done = run("train.sh", "a.yaml", "run.seed=1", commands=commands, **environment)
    assert done.stdout == SEVERAL_NODES, done.stderr
    del environment["MASTER_ADDR"]
    failed = run("train.sh", "a.yaml", commands=commands, **environment)
    assert failed.returncode != 0
    assert "MASTER_ADDR: set it to the address of node 0" in failed.stderr
    assert "torchrun" not in failed.stdout


def test_slurm_starts_every_node_alike(commands: Path) -> None:
    write_command(commands, "scontrol", "printf 'n%s\\n' 1 2 3 4 5 6 7 8")
    write_command(commands, "getent", '[ "$2" = n1 ] && printf "%s STREAM n1\\n" 127.0.1.1 10.0.0.1 10.0.0.2')
    write_command(commands, "openssl", "echo key")
    write_command(commands, "srun", 'SLURM_NODEID=2 exec "$@"')
    job = {"SLURM_JOB_NODELIST": "n[1-8]", "SLURM_NNODES": "8"}
    done = run("train.sbatch", "a.yaml", "run.seed=1", commands=commands, **job)
    assert done.stdout == SEVERAL_NODES, done.stderr
    write_command(commands, "getent", "echo 127.0.1.1 STREAM n1")
    done = run("train.sbatch", "a.yaml", "run.seed=1", commands=commands, MASTER_ADDR="10.0.0.1", **job)
    assert done.stdout == SEVERAL_NODES, done.stderr
    failed = run("train.sbatch", "a.yaml", commands=commands, **job)
    assert failed.returncode != 0
    assert "n1 has no IPv4 address but loopback here; set it to an address of that node" in failed.stderr


@pytest.mark.parametrize("recipe", MODELS)
def test_engines_on_every_node(recipe: str) -> None:
    """What train.sh and the README's command add on several nodes makes a valid configuration."""
    count = 1 if recipe == "qwen3_30b_a3b" else 4
    engines = f"rollout.engines=[{{count: {count}, nodes: all}}]"
    added = ["sync.host=10.0.0.1", "rollout.host=0.0.0.0", "rollout.api_key=key", engines]
    config = load_config(EXAMPLES / recipe / "config.yaml", added)
    assert [engine.nodes for engine in config.rollout.engines] == ["all"]
    tp = config.rollout.engine_tp
    assert sum(engine.count * (engine.tp or tp) for engine in config.rollout.engines) == 4
    assert f"'{engines}'" in (EXAMPLES / recipe / "README.md").read_text()
