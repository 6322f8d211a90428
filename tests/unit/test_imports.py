"""Who may import whom, read from the syntax tree of every file: what keeps each part understandable by itself."""

import ast
from pathlib import Path

import pytest

import megatron_gppo

PACKAGE = Path(megatron_gppo.__file__).parent

BASE = {"datatypes", "config", "http_calls", "metrics", "schedules"}
EVERYTHING = {
    *BASE,
    "algorithm",
    "convert",
    "data",
    "drift",
    "entropy_trace",
    "errors",
    "evaluate",
    "interrupts",
    "job",
    "memory",
    "packing",
    "parallel",
    "peers",
    "plan",
    "policy",
    "rollout",
    "scalars",
    "training_prompts",
    "watchdog",
    "weight_sync",
}
# Module or package -> what it may import of this one, beside itself. A new module needs a row.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "datatypes": set(),
    "http_calls": set(),
    "schedules": set(),
    "config": {"schedules"},
    "metrics": set(),
    "algorithm": BASE,
    "convert": BASE,
    "packing": BASE,
    "parallel": BASE,
    "rollout": BASE,
    "data": BASE,
    "entropy_trace": BASE,
    "plot": BASE,
    "scalars": BASE | {"algorithm", "entropy_trace"},
    "memory": BASE | {"convert"},
    "plan": BASE | {"convert", "memory"},
    "weight_sync": BASE | {"convert", "parallel"},
    "policy": BASE | {"algorithm", "convert", "job", "parallel"},
    "interrupts": set(),
    "job": BASE,
    "peers": {"job"},
    "watchdog": BASE | {"job", "parallel", "peers"},
    "drift": BASE | {"packing", "parallel"},
    "evaluate": BASE | {"convert", "data", "parallel", "rollout"},
    "training_prompts": BASE | {"data", "evaluate", "rollout"},
    "preview": BASE | {"convert", "data", "evaluate", "rollout", "training_prompts"},
    "errors": BASE | {"convert", "data", "evaluate", "job", "rollout", "weight_sync"},
    "run": EVERYTHING,
    "train": EVERYTHING | {"run"},
    "cli": EVERYTHING | {"train", "preview"},
}
# Engine -> the only part that may import it.
ENGINES = {"megatron": "policy", "sglang": "rollout"}

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """The row of a file: its package, or its own name at the top."""
    return file.parts[0].removesuffix(".py")


def imports_of(source: str, file: Path) -> set[str]:
    """Absolute names of everything that a file of megatron_gppo imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source, str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            if node.level:
                above = ("megatron_gppo", *file.parent.parts)
                module = [*above[: len(above) - node.level + 1], *module]
            names |= {".".join([*module, alias.name]) for alias in node.names}
    return names


def violations(source: str, file: Path) -> list[str]:
    part = part_of(file)
    found = []
    for name in sorted(imports_of(source, file)):
        package, *rest = name.split(".")
        if package == "megatron_gppo" and rest[0] != "__version__" and rest[0] not in MAY_IMPORT[part] | {part}:
            found.append(f"{file} imports {name}: {part} may import {sorted(MAY_IMPORT[part])} only")
        if ENGINES.get(package, part) != part:
            found.append(f"{file} imports {name}: only {ENGINES[package]} may")
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_follow_the_table(file: Path) -> None:
    assert part_of(file) in MAY_IMPORT, f"{file}: add a row to MAY_IMPORT"
    assert violations((PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rollout/engine.py", "from megatron_gppo.policy import Policy"),
        ("policy/step.py", "from megatron_gppo import rollout"),
        ("policy/step.py", "import megatron_gppo.rollout.engine"),
        ("policy/step.py", "from ..rollout import engine"),
        ("packing.py", "from .algorithm import policy_loss"),
        ("packing.py", "from . import algorithm"),
        ("metrics.py", "from megatron_gppo.datatypes import Rollout"),
        ("algorithm/losses.py", "def late():\n    from megatron.core import parallel_state"),
        ("convert/table.py", "import megatron.core as core"),
        ("algorithm/losses.py", "import sglang"),
        ("train.py", "from megatron.core import parallel_state"),
    ],
)
def test_violations_are_found(file: str, source: str) -> None:
    assert len(violations(source, Path(file))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policy/step.py", "from megatron.core import parallel_state\nfrom megatron_gppo.algorithm import policy_loss"),
        ("policy/step.py", "from . import model\nfrom .model import PolicyModel\nfrom ..parallel import ParallelState"),
        ("cli.py", "from megatron_gppo import __version__, train\nimport torch"),
    ],
)
def test_what_is_allowed_is_not_a_violation(file: str, source: str) -> None:
    assert violations(source, Path(file)) == []
