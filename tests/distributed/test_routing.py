"""The experts that the policy's routers choose, gathered from all ranks, against HF transformers in one process."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gppo.policy.routing import MOST_TOKENS
from tests.support.distributed import run_ranks
from tests.support.policy import LAYOUTS, build_policy, leave_model_parallel, make_config
from tests.support.tiny import VOCAB_SIZE, make_tiny_model

EXPERTS_A_TOKEN = 3
LENGTHS = [45, MOST_TOKENS + 19]  # no multiple of what a layout needs, so that rows are padded; and one that is cut


def choose(rank: int, hf_folder: Path, layouts: list[str]) -> dict[str, list[torch.Tensor | None]]:
    """Of every layout, the experts of each sequence: runs on each rank."""
    chosen: dict[str, list[torch.Tensor | None]] = {}
    for layout in layouts:
        policy = build_policy(make_config(hf_folder, LAYOUTS[layout]))
        chosen[layout] = []
        for token_ids in sequences():
            with policy.chosen_experts() as experts:
                policy.sequence_logprobs(token_ids)
            chosen[layout].append(experts.gather(len(token_ids)))
        leave_model_parallel()
    return chosen


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def experts_of_hf(hf_folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[tokens, layers, k], ids ascending."""
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    with torch.no_grad():
        by_layer = model(torch.tensor([token_ids]), output_router_logits=True).router_logits
    logits = torch.stack(by_layer, dim=1)[:MOST_TOKENS]  # [tokens, layers, experts]
    best = logits.sort(descending=True).values
    margin = (best[..., EXPERTS_A_TOKEN - 1] - best[..., EXPERTS_A_TOKEN]).min()
    assert margin > 1e-5, "two experts are so close that rounding chooses between them: take another seed"
    return logits.topk(EXPERTS_A_TOKEN).indices.sort().values


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (2, ["tp2_sp", "cp2", "pp2", "pp2_vpp2", "ep2", "tp2_sp_ep2"]),
        (4, ["tp2_cp2_sp", "pp2_vpp2_cp2", "tp2_sp_ep4"]),
    ],
)
def test_every_layout_chooses_the_experts_of_hf(tmp_path: Path, world_size: int, layouts: list[str]) -> None:
    model = make_tiny_model(tmp_path, "Qwen3MoeForCausalLM", num_experts=8, num_experts_per_tok=EXPERTS_A_TOKEN)
    ranks = run_ranks(world_size, choose, model, layouts)
    for index, token_ids in enumerate(sequences()):
        expected = experts_of_hf(model, token_ids)
        for layout in layouts:
            for rank, chosen in enumerate(ranks):
                gathered = chosen[layout][index]
                assert gathered is not None
                assert gathered.shape == expected.shape, (layout, rank)
                unequal = (gathered != expected).any(-1).sum().item()
                assert unequal == 0, f"{layout}, rank {rank}, {len(token_ids)} tokens: {unequal} choices differ"


def test_a_dense_model_chooses_none(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "Qwen3ForCausalLM")
    assert run_ranks(2, choose, model, ["tp2_sp"]) == [{"tp2_sp": [None, None]}] * 2
