"""How many groups the recipes send to an engine at once: as many as its cache holds."""

from pathlib import Path

import pytest

from megatron_gppo.config import RolloutConfig
from megatron_gppo.plan import GIB
from tests.unit.test_recipes import EXAMPLES, GPU_GIB, MODELS, RANKS, plan_of

# Somewhat more than its mean over the time in which its group is in flight, if lengths are log-normal (sigma 0.7), and a
# fifth is cut at 16,384.
HELD_BY_A_SEQUENCE = 4096
NODES = 8  # of which each has engines, where the recipe needs more than one


@pytest.mark.parametrize("recipe", MODELS)
def test_an_engine_is_sent_what_its_cache_holds(recipe: str, tmp_path: Path) -> None:
    plan = plan_of(recipe, RANKS[recipe][0], tmp_path)
    rollout, (engine,) = plan.config.rollout, plan.engines.values()
    share = rollout.server_args["mem_fraction_static"]
    assert isinstance(share, float)
    cache = GPU_GIB * GIB * share - engine.weights
    tokens = cache / engine.cache_per_token
    sequences = tokens / HELD_BY_A_SEQUENCE
    groups = int(sequences / rollout.responses_per_prompt)
    num_engines = sum(entry.count for entry in rollout.engines) * (NODES if len(RANKS[recipe]) == 1 else 1)
    sent = rollout.prompts_per_step // num_engines
    default = RolloutConfig.model_fields["concurrency"].default
    assert rollout.concurrency == (groups if groups < sent else default)
    readme = " ".join((EXAMPLES / recipe / "README.md").read_text().split())
    assert f"{cache / GIB:.1f} GiB, {tokens / 1e6:.2f} million tokens: {int(sequences)} sequences" in readme
    assert f"so {groups} groups an engine" in readme
    assert f"{sent} of a step's 128" in readme
