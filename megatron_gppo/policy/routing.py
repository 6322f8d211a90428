"""Which experts the policy's routers choose, to be compared with what an engine chooses for the same tokens.

A sequence's tokens lie on several ranks (context and sequence parallelism), its layers too (pipeline).
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy.context_parallel import own_tokens
from megatron_gppo.policy.model import PolicyModel

MOST_TOKENS = 512  # of a sequence; all its choices would be megabytes


class ChosenExperts:
    """This rank's part of a sequence's choices, as its routers make them. Empty for a dense model."""

    def __init__(self, parallel: ParallelState, sequence_parallel: bool) -> None:
        self._parallel = parallel
        self._sequence_parallel = sequence_parallel
        self._by_layer: dict[int, torch.Tensor] = {}  # [tokens of this rank, k] expert ids, ascending

    def record(self, layer: int, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        routing_map: torch.Tensor = output[1]  # [tokens of this rank, experts] bool
        # Interleaved pipelines are given the sequence several times.
        if layer not in self._by_layer:
            k = int(routing_map[0].sum())
            self._by_layer[layer] = routing_map.nonzero()[:, 1].reshape(-1, k).cpu()

    def gather(self, length: int) -> torch.Tensor | None:
        """[up to MOST_TOKENS of `length`, layers, k] int64 on every rank, expert ids ascending; None for a dense model. Collective."""
        parallel = self._parallel
        part: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # layer, places in the row, choices
        if parallel.dp_rank == 0 and (self._sequence_parallel or parallel.tp_rank == 0):
            for layer, choices in self._by_layer.items():
                places = self._places(len(choices))
                head = places < min(length, MOST_TOKENS)
                part.append((layer, places[head].short(), choices[head].short()))
        parts = [piece for of_rank in parallel.gather(part) for piece in of_rank]
        if not parts:
            return None
        layers, k = max(layer for layer, _, _ in parts) + 1, parts[0][2].shape[1]
        chosen = torch.full((min(length, MOST_TOKENS), layers, k), -1)
        for layer, places, choices in parts:
            chosen[places.long(), layer] = choices.long()
        return chosen

    def _places(self, tokens: int) -> torch.Tensor:
        """Where the tokens of this rank stand in the row."""
        parallel = self._parallel
        shares = parallel.tp_size if self._sequence_parallel else 1
        row = torch.arange(tokens * shares * parallel.cp_size)
        own = own_tokens(row, torch.tensor([0, len(row)], dtype=torch.int32), parallel)
        return own.chunk(shares)[parallel.tp_rank] if shares > 1 else own


@contextmanager
def chosen_experts(
    models: Iterable[PolicyModel], parallel: ParallelState, sequence_parallel: bool
) -> Iterator[ChosenExperts]:
    """Records what the routers choose for the first sequence that passes."""
    chosen = ChosenExperts(parallel, sequence_parallel and parallel.tp_size > 1)
    with ExitStack() as hooks:
        for model in models:
            for layer in model.decoder.layers:
                router = getattr(layer.mlp, "router", None)
                if router is not None:
                    hook = router.register_forward_hook(partial(chosen.record, layer.layer_number - 1))
                    hooks.callback(hook.remove)
        yield chosen
