"""How long responses to a prompt were, so that the prompts that take longest are begun first.

Known from this run only: a resumed one learns it anew. The order affects when a step's rollout is done, not what it holds.
"""

from collections.abc import Sequence

from megatron_gppo.datatypes import Group, Prompt


class ResponseLengths:
    """Mean response length of each prompt's last group."""

    def __init__(self) -> None:
        self._tokens: dict[int, float] = {}  # by Prompt.row

    def add(self, group: Group) -> None:
        self._tokens[group.prompt.row] = sum(len(of.token_ids) for of in group.responses) / len(group.responses)

    def longest_first(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices into prompts. Those not seen before come first: any of them may be the longest."""
        return sorted(range(len(prompts)), key=lambda index: -self._tokens.get(prompts[index].row, float("inf")))
