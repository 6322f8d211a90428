"""The trained policy: what train.py sees of Megatron."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from megatron.core.utils import get_model_config

from megatron_gppo.algorithm import InForce
from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture, canonical_name
from megatron_gppo.datatypes import MicroBatch, ScoredBatch, UpdateBatch, UpdateStats
from megatron_gppo.parallel import ParallelState
from megatron_gppo.policy import step
from megatron_gppo.policy.model import build_chunks
from megatron_gppo.policy.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_gppo.policy.optimizer import step as optimizer_step
from megatron_gppo.policy.reference import ReferenceWeights
from megatron_gppo.policy.routing import ChosenExperts, chosen_experts


class Policy:
    """A Megatron model over all ranks, with its optimizer. Every method is called by all ranks in lockstep.

    Its weights are undefined until checkpoint.load_weights or checkpoint.load has filled them.
    """

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        parallel: ParallelState,
        on_microbatch: Callable[[], None] = lambda: None,
    ):
        """on_microbatch: called at the forward of each, in every pass."""
        self.config = config
        self.architecture = architecture
        self.parallel = parallel
        self.models = build_chunks(architecture, config, parallel)
        self.chunks = wrap_data_parallel(self.models, config)
        self.optimizer = build_optimizer(self.chunks, config)
        self._reference: ReferenceWeights | None = None
        megatron_config = get_model_config(self.chunks[0])
        megatron_config.finalize_model_grads_func = step.finalize_gradients
        self.network = step.Network(
            chunks=self.chunks,
            parallel=parallel,
            vocab_size=architecture.vocab_size,
            temperature=config.rollout.temperature,
            sequence_parallel=config.parallel.sequence_parallel,
            on_microbatch=on_microbatch,
        )

    def keep_reference(self) -> None:
        """Makes the current weights the reference policy of the KL term. Later changes of the policy leave it alone."""
        self._reference = ReferenceWeights(parameter for _, parameter in self.named_parameters())

    def add_old_logprobs(self, updates: list[UpdateBatch]) -> list[ScoredBatch]:
        """Scores every micro-batch of the step under the current weights, before its first update.

        Under the reference policy, too, if there is one (keep_reference).
        """
        microbatches = [batch for update in updates for batch in update.microbatches]
        old = iter(step.score(self.network, microbatches))
        reference = None
        if self._reference is not None:
            with self._reference.in_place_of_policy():
                reference = iter(step.score(self.network, microbatches))
        return [
            ScoredBatch(
                update,
                old_logprobs=[next(old) for _ in update.microbatches],
                ref_logprobs=None if reference is None else [next(reference) for _ in update.microbatches],
            )
            for update in updates
        ]

    def update(self, batch: ScoredBatch, in_force: InForce) -> UpdateStats:
        """One optimizer step. A gradient that is not finite, or an update without a loss token, moves nothing."""
        lr = in_force.lr
        if batch.update.num_loss_tokens == 0:
            return UpdateStats({}, {}, [], 0, loss=0.0, grad_norm=0.0, lr=lr, skipped=True)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        seen = step.accumulate_gradients(self.network, batch, in_force.loss, self.config.rollout.max_response_tokens)
        set_learning_rate(self.optimizer, lr, self.config.optimizer.weight_decay)
        grad_norm, applied = optimizer_step(self.optimizer)
        return UpdateStats(
            seen.sums,
            seen.maxima,
            seen.ratio_histogram,
            batch.update.num_loss_tokens,
            seen.loss,
            grad_norm,
            lr,
            skipped=not applied,
        )

    def sequence_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probs at temperature 1 of token_ids[1:], each given what stands before it: [L-1] float32."""
        alignment = self.alignment
        padded = token_ids + [0] * (-len(token_ids) % alignment)
        ids = torch.tensor(padded)
        mask = torch.arange(len(padded)) < len(token_ids) - 1
        zeros = torch.zeros(len(padded))
        batch = MicroBatch(
            input_ids=ids,
            position_ids=torch.arange(len(padded)),
            targets=torch.where(mask, ids.roll(-1), 0),
            loss_mask=mask,
            advantages=zeros,
            rollout_logprobs=zeros,
            cu_seqlens=torch.tensor([0, len(padded)], dtype=torch.int32),
            sequence_lengths=torch.tensor([len(token_ids) - 1]),
            group_lengths=torch.tensor([len(token_ids) - 1]),
            correct=torch.tensor([False]),
            sample_indices=[],
        )
        network = replace(self.network, temperature=1.0)
        return step.score(network, [batch] * self.microbatches_multiple_of)[0][: len(token_ids) - 1]

    def chosen_experts(self) -> AbstractContextManager[ChosenExperts]:
        """Records which experts the first sequence scored in the context is sent to."""
        return chosen_experts(self.models, self.parallel, self.config.parallel.sequence_parallel)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters by canonical name. The last stage's copy of a tied embedding has the embedding's."""
        for model in self.models:
            offset = model.decoder.layers[0].layer_number - 1
            expert_offset = self.architecture.num_experts // self.parallel.ep_size * self.parallel.ep_rank
            for live_name, parameter in model.named_parameters():
                yield canonical_name(self.architecture, live_name, offset, expert_offset), parameter

    def shards(self) -> dict[str, torch.Tensor]:
        """What this rank contributes to an export, by canonical name: its parameters without copies of other stages'."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if not getattr(parameter, "shared", False)
        }

    @property
    def alignment(self) -> int:
        """Packed rows are a multiple of this."""
        return self.config.parallel.row_alignment

    @property
    def sequence_alignment(self) -> int:
        """Each sequence in them is a multiple of this."""
        return self.config.parallel.sequence_alignment

    @property
    def microbatches_multiple_of(self) -> int:
        """Interleaved pipelines take micro-batches in rounds of the pipeline's size."""
        return self.parallel.pp_size if len(self.chunks) > 1 else 1
