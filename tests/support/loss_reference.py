"""The policy loss in fp64, sequence by sequence and straight from the equations, and batches to compare it on.

Nothing is shared with megatron_gppo.algorithm: sequences are not packed, masked tokens are left out instead of
zeroed, and δ/sg(δ) is the quotient as the paper prints it (which fp64 can form for the log-ratios used here).
Branches are taken on the fp32 ratio, like the implementation's.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from megatron_gppo.algorithm import LossConfig, policy_loss

OBJECTIVES = ["ce_gppo", "ppo_clip", "dapo", "cispo", "gspo"]
AGGREGATIONS = ["token_mean", "group_token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
MAX_RESPONSE_TOKENS = 64


def loss_config(objective: str = "ce_gppo", **settings: object) -> LossConfig:
    if objective == "ce_gppo":
        settings = {"beta1": 0.5, "beta2": 1.25, **settings}
    return LossConfig.model_validate({"objective": objective, "clip_low": 0.2, "clip_high": 0.28, **settings})


@dataclass
class Sequence:
    """One response with its prompt; [L] fp32 tensors. Tokens outside loss_mask hold NaN or Inf on purpose."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    group: int
    correct: bool

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


TOKEN_FIELDS = [item.name for item in fields(Sequence) if item.name not in ("group", "correct")]


@dataclass
class Batch:
    """An update's sequences with its global counts."""

    sequences: list[Sequence]
    group_lengths: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.group_lengths = {sequence.group: 0 for sequence in self.sequences}
        for sequence in self.sequences:
            self.group_lengths[sequence.group] += sequence.num_loss_tokens

    @property
    def num_correct_tokens(self) -> int:
        return sum(sequence.num_loss_tokens for sequence in self.sequences if sequence.correct)

    def denominator(self, aggregation: str) -> int:
        lengths = [sequence.num_loss_tokens for sequence in self.sequences]
        return {
            "token_mean": sum(lengths),
            "group_token_mean": sum(length > 0 for length in self.group_lengths.values()),
            "seq_mean_token_mean": sum(length > 0 for length in lengths),
            "seq_mean_token_sum_norm": sum(length > 0 for length in lengths) * MAX_RESPONSE_TOKENS,
        }[aggregation]

    def pack(self, config: LossConfig, indices: list[int] | None = None) -> dict[str, Any]:
        """policy_loss's arguments for the sequences at these indices, packed in this order."""
        chosen = [self.sequences[index] for index in (range(len(self.sequences)) if indices is None else indices)]
        lengths = torch.tensor([0] + [len(sequence.logprobs) for sequence in chosen])
        packed: dict[str, Any] = {
            name: torch.cat([getattr(sequence, name) for sequence in chosen] + [torch.zeros(0)])
            for name in TOKEN_FIELDS
        }
        return packed | {
            "loss_mask": packed["loss_mask"].bool(),
            "denominator": self.denominator(config.aggregation),
            "cu_seqlens": lengths.cumsum(0).int(),
            "sequence_lengths": torch.tensor([sequence.num_loss_tokens for sequence in chosen], dtype=torch.int64),
            "group_lengths": torch.tensor([self.group_lengths[s.group] for s in chosen], dtype=torch.int64),
            "correct": torch.tensor([sequence.correct for sequence in chosen], dtype=torch.bool),
            "num_correct_tokens": self.num_correct_tokens,
        }


@dataclass
class LossAndGradients:
    """Gradients by sequence; those of masked tokens are 0."""

    loss: float
    logprobs: list[Tensor]
    entropy: list[Tensor]


@dataclass
class Reference(LossAndGradients):
    """The same in fp64, with the scales of rounding errors: sums in which every term was made positive."""

    magnitude: float  # of the loss
    logprobs_scale: list[Tensor]  # of each token's gradient


def run_policy_loss(config: LossConfig, batch: Batch, indices: list[int] | None = None) -> LossAndGradients:
    """The implementation under test, in fp32."""
    inputs = batch.pack(config, indices)
    for name in ("logprobs", "entropy"):
        inputs[name] = inputs[name].clone().requires_grad_()
    loss = policy_loss(config, **inputs).loss
    loss.backward()
    sizes = inputs["cu_seqlens"].diff().tolist()
    logprobs, entropy = inputs["logprobs"], inputs["entropy"]
    entropy_grad = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return LossAndGradients(
        loss.item(),
        list(logprobs.grad.split(sizes)),
        list(entropy_grad.split(sizes)),
    )


def reference_loss(config: LossConfig, batch: Batch) -> Reference:
    loss = torch.zeros((), dtype=torch.float64)
    result = Reference(0.0, [], [], 0.0, [])
    denominator = batch.denominator(config.aggregation)
    for sequence in batch.sequences:
        keep = sequence.loss_mask
        logprobs = sequence.logprobs.double().where(keep, torch.zeros(())).requires_grad_()
        entropy = sequence.entropy.double().where(keep, torch.zeros(())).requires_grad_()
        gradients = [torch.zeros_like(logprobs), torch.zeros_like(entropy)]
        scale = torch.zeros_like(logprobs)
        for term in _terms(config, batch, sequence, logprobs, entropy, denominator) if keep.any() else []:
            loss = loss + term.detach().sum()
            result.magnitude += term.detach().abs().sum().item()
            term_gradients = torch.autograd.grad(term.sum(), [logprobs, entropy], retain_graph=True, allow_unused=True)
            for total, gradient in zip(gradients, term_gradients, strict=True):
                total += 0 if gradient is None else gradient
            scale += 0 if term_gradients[0] is None else term_gradients[0].abs()
        result.logprobs.append(gradients[0])
        result.entropy.append(gradients[1])
        result.logprobs_scale.append(scale)
    result.loss = loss.item()
    return result


def _terms(
    config: LossConfig, batch: Batch, sequence: Sequence, logprobs: Tensor, entropy: Tensor, denominator: int
) -> list[Tensor]:
    """What a sequence adds to the loss, one tensor of its tokens' values for each part of the objective."""
    keep = sequence.loss_mask
    weight = {
        "token_mean": 1.0,
        "group_token_mean": 1.0 / batch.group_lengths[sequence.group],
        "seq_mean_token_mean": 1.0 / sequence.num_loss_tokens,
        "seq_mean_token_sum_norm": 1.0,
    }[config.aggregation]
    objective = _objective(config, logprobs[keep], sequence) * _importance_weight(config, sequence)
    terms = [-weight * objective / denominator]
    if config.kl_coef > 0:
        kl = _kl(config, logprobs[keep] - sequence.ref_logprobs[keep].double())
        terms.append(weight * config.kl_coef * kl / denominator)
    if config.entropy_coef > 0:
        terms.append(-weight * config.entropy_coef * entropy[keep] / denominator)
    if sequence.correct and config.nll_coef > 0:
        terms.append(-config.nll_coef * logprobs[keep] / batch.num_correct_tokens)
    return terms


def _importance_weight(config: LossConfig, sequence: Sequence) -> Tensor:
    old, rollout = sequence.old_logprobs[sequence.loss_mask], sequence.rollout_logprobs[sequence.loss_mask]
    if config.importance_correction is None:
        return torch.ones_like(old).double()
    log_weight, branch = old.double() - rollout.double(), old - rollout
    level = config.importance_level or ("geometric" if config.objective == "gspo" else "token")
    if level != "token":
        log_weight, branch = log_weight.mean().expand(len(old)), branch.double().mean().float().expand(len(old))
    if level == "sequence":
        log_weight, branch = log_weight * len(old), branch * len(old)
    weight, branch = log_weight.clamp(-20, 20).exp(), branch.clamp(-20, 20).exp()  # the latter in fp32
    cap = config.importance_cap
    if config.importance_correction == "truncated":
        return torch.where(branch > cap, cap, weight)
    return torch.where((branch > cap) | (branch < 1 / cap), 0.0, weight)


def _objective(config: LossConfig, logprobs: Tensor, sequence: Sequence) -> Tensor:
    keep = sequence.loss_mask
    advantages = sequence.advantages[keep].double()
    log_ratio = logprobs - sequence.old_logprobs[keep].double()
    log_ratio_fp32 = sequence.logprobs[keep] - sequence.old_logprobs[keep]
    if config.objective == "gspo":
        log_ratio = log_ratio.mean().expand(len(logprobs))
        log_ratio_fp32 = log_ratio_fp32.double().mean().float().expand(len(logprobs))
    log_ratio = _clamped(log_ratio)
    delta = log_ratio.exp()
    branch = log_ratio_fp32.clamp(-20, 20).exp()  # fp32
    low, high = 1 - config.clip_low, 1 + config.clip_high
    terms = []
    for t, (d, a) in enumerate(zip(delta, advantages, strict=True)):
        left, right = bool(branch[t] < low), bool(branch[t] > high)
        if config.objective == "cispo":
            weight = low if left else high if right else d.detach()
            if config.dual_clip is not None and a < 0:
                weight = min(weight, config.dual_clip)
            terms.append(weight * a * logprobs[t])
        elif config.dual_clip is not None and a < 0 and branch[t] > config.dual_clip:
            terms.append(config.dual_clip * a + 0 * d)
        elif left and a < 0:
            terms.append(config.beta1 * low * d / d.detach() * a if config.objective == "ce_gppo" else low * a + 0 * d)
        elif right and a > 0:
            terms.append(
                config.beta2 * high * d / d.detach() * a if config.objective == "ce_gppo" else high * a + 0 * d
            )
        else:
            terms.append(d * a)
    return torch.stack(terms)


def _kl(config: LossConfig, log_ratio: Tensor) -> Tensor:
    r = _clamped(log_ratio)
    return {"k1": r, "k2": r**2 / 2, "k3": (-r).exp() - 1 + r}[config.kl_estimator]


def _clamped(log_ratio: Tensor) -> Tensor:
    """Bounded to ±20 in value, with the gradient of the unbounded one."""
    return log_ratio + (log_ratio.clamp(-20, 20) - log_ratio).detach()


def random_batch(
    seed: int, lengths: list[int], group_size: int = 2, log_ratio_scale: float = 0.3, token_advantages: bool = False
) -> Batch:
    """Sequences with these numbers of loss tokens, each after 0-2 masked tokens and before 0-1.

    token_advantages gives every token its own advantage, in place of one a sequence.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator)

    sequences = []
    for index, length in enumerate(lengths):
        before, after = integer(3), integer(2)
        old = -normal(length).abs() * 3
        logprobs = old + normal(length) * log_ratio_scale
        values = {
            "logprobs": logprobs,
            "old_logprobs": old,
            "advantages": normal(length) if token_advantages else normal(1).expand(length),
            "loss_mask": torch.ones(length),
            "entropy": normal(length).abs(),
            "ref_logprobs": logprobs + normal(length) * log_ratio_scale,
            "rollout_logprobs": old + normal(length) * 0.5,
        }
        hostile = torch.tensor([float("nan"), float("inf"), -float("inf")])
        padded = {
            name: torch.cat([hostile[torch.arange(before) % 3], value, hostile[torch.arange(after)]])
            for name, value in values.items()
        }
        padded["loss_mask"] = torch.cat([torch.zeros(before), values["loss_mask"], torch.zeros(after)]).bool()
        sequences.append(Sequence(**padded, group=index // group_size, correct=bool(integer(2))))
    return Batch(sequences)


def one_token_sequences(log_ratio: Tensor, advantages: Tensor) -> Batch:
    """Sequences of one token each, whose fp32 log-ratios are exactly these."""
    pairs = zip(log_ratio, advantages, strict=True)
    return Batch([single_sequence(x[None], a[None]).sequences[0] for x, a in pairs])


def single_sequence(log_ratio: Tensor, advantages: Tensor) -> Batch:
    """One sequence whose fp32 log-ratios are exactly these (the old log-probs are 0)."""
    zeros = torch.zeros_like(log_ratio)
    mask = torch.ones_like(log_ratio).bool()
    return Batch([Sequence(log_ratio, zeros, advantages, mask, zeros, zeros, zeros, group=0, correct=True)])
