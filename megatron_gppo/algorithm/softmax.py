"""Softmax over a vocabulary that is visited in tiles of columns, and that is cut over tensor-parallel ranks.

Letters: T tokens, C columns of a tile, z a logit divided by the temperature, m = max z, s = sum e^(z-m), y the target.

    log p(y) = z_y - m - log s          d log p(y) / dz = 1[y] - p
    entropy  = log s - sum p (z - m)    d entropy / dz  = -p (log p + entropy)

Each tile is summed relative to its own m, and sums are brought to the larger m where tiles, or ranks, are joined.
Keeping m and log s apart, not their sum, keeps the digits of p where logits are large.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gppo.algorithm.tile_passes import LOWEST_SHIFTED_LOGIT, exponentiate_tile, sum_tile
from megatron_gppo.algorithm.vocabulary import VocabularyShard

LARGEST_CORRECTION = 16.0


@dataclass(frozen=True, slots=True)
class Softmax:
    """Each token's distribution over the whole vocabulary, as far as results and backward need it; [T] fp32."""

    logprobs: Tensor  # of the targets
    maximum: Tensor  # m
    exp_sum: Tensor  # s
    entropy: Tensor | None

    def kept(self, with_entropy: bool) -> tuple[Tensor | None, ...]:
        """What Softmax is made of again in the backward."""
        return self.logprobs, self.maximum, self.exp_sum, self.entropy if with_entropy else None


@dataclass(frozen=True, slots=True)
class Centre:
    """Logits that are about to be rounded to bf16 lose a centre first; the target's is also known unrounded."""

    values: Tensor  # [T] bf16, before the division by the temperature
    target_logit: Tensor  # [T] fp32, likewise; anything where another rank has the target


class SoftmaxSums:
    """Adds up the tiles of this rank, and then the ranks."""

    def __init__(
        self,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        *,
        with_entropy: bool,
        centre: Centre | None = None,
    ) -> None:
        self._targets, self._shard, self._temperature = targets, shard, temperature
        self._with_entropy, self._centre = with_entropy, centre
        self._target_logit = torch.zeros(len(targets), device=targets.device)
        self._sums = torch.zeros(3, len(targets), device=targets.device)  # m, s, and sum e^(z-m) (z-m)
        # Finite, so that a rank whose columns are all padding adds 0 and not NaN.
        self._sums[0] = torch.finfo(torch.float32).min

    def add(self, logits: Tensor, columns: slice) -> None:
        """logits: [T, C] of these columns, fp32 or bf16, less the centre, not divided by the temperature. Only read."""
        place, is_inside = self._shard.find(self._targets, columns)
        target_logit = logits.gather(1, place[:, None])[:, 0].float() / self._temperature
        sums = sum_tile(logits, self._temperature, self._with_entropy)
        if self._centre is not None:
            centre = self._centre.values / self._temperature
            unrounded = self._centre.target_logit / self._temperature - centre
            # A logit that rounding moves this far stays rounded: e^(unrounded - m) could overflow, or leave a sum of 0.
            is_near = (unrounded - target_logit).abs() < LARGEST_CORRECTION
            unrounded = torch.where(is_near, unrounded, target_logit)
            change = _summands(unrounded - sums[0]) - _summands(target_logit - sums[0])
            sums[1:] += torch.where(is_inside, change, 0.0)
            sums[0] += centre
            target_logit = unrounded + centre
        self._target_logit = torch.where(is_inside, target_logit, self._target_logit)
        maximum = torch.maximum(self._sums[0], sums[0])
        self._sums = torch.cat([maximum[None], _rescaled(self._sums, maximum) + _rescaled(sums, maximum)])

    def over_ranks(self) -> Softmax:
        """The sums over the whole vocabulary; several ranks exchange [T], and [3, T] ([2, T] without an entropy)."""
        maximum, exp_sum, weighted_sum = self._sums
        target_logit = self._target_logit
        if self._shard.group is not None:
            maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self._shard.group)
            rescaled = _rescaled(self._sums, maximum)
            # One rank has the target's logit, the others 0.
            parts = torch.stack([target_logit, *(rescaled if self._with_entropy else rescaled[:1])])
            dist.all_reduce(parts, group=self._shard.group)
            target_logit, exp_sum = parts[:2]
            weighted_sum = parts[-1]
        log_sum = exp_sum.log()
        entropy = log_sum - weighted_sum / exp_sum if self._with_entropy else None
        return Softmax(target_logit - maximum - log_sum, maximum, exp_sum, entropy)


class LogitGradient:
    """The gradient of a tile's logits, before the division by the temperature, apart from that of the targets' logits."""

    of_targets: Tensor  # [T] fp32, on the rank that has the target; 0 on the others

    def __init__(
        self,
        softmax: Softmax,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
        *,
        centre: Tensor | None = None,
    ) -> None:
        """grad_logprobs, grad_entropy: [T] fp32, the latter of no meaning where softmax has no entropy."""
        self._targets, self._shard, self._temperature = targets, shard, temperature
        self._shift = softmax.maximum if centre is None else softmax.maximum - centre / temperature
        logprobs = softmax.logprobs.clamp(min=LOWEST_SHIFTED_LOGIT)
        # 1 - p of the target from its log-prob, without rounding p first.
        of_targets = grad_logprobs * -logprobs.expm1()
        self._factor = -grad_logprobs / softmax.exp_sum
        self._line = None
        if softmax.entropy is not None:
            of_targets -= grad_entropy * logprobs.exp() * (logprobs + softmax.entropy)
            # With an entropy, -p (grad_entropy (z - m) + constant) + 1[y] grad_logprobs.
            self._factor = -1.0 / softmax.exp_sum
            self._line = grad_entropy, grad_logprobs + grad_entropy * (softmax.entropy - softmax.exp_sum.log())
        self._factor /= temperature
        self.of_targets = torch.where(shard.find(targets)[1], of_targets / temperature, 0.0)

    def write(self, logits: Tensor, columns: slice, *, out: Tensor) -> None:
        """Writes 0 for the targets' logits. logits: as in SoftmaxSums.add. out: [T, C], may be logits itself."""
        exponentiate_tile(logits, self._temperature, self._shift, self._factor, self._line, out)
        self._write_targets(torch.zeros_like(self.of_targets), columns, out)

    def write_targets(self, columns: slice, *, out: Tensor) -> None:
        """Completes what write() has written."""
        self._write_targets(self.of_targets, columns, out)

    def _write_targets(self, values: Tensor, columns: slice, out: Tensor) -> None:
        place, is_inside = self._shard.find(self._targets, columns)
        # Not scatter_: in bf16 it takes a CPU a thousand times as long.
        entries = torch.arange(len(place), device=place.device), place
        out[entries] = torch.where(is_inside, values.to(out.dtype), out[entries])


def _rescaled(sums: Tensor, maximum: Tensor) -> Tensor:
    """[2, T]: s and sum e^(z-m) (z-m) relative to this, larger, m."""
    change = (sums[0] - maximum).clamp(min=LOWEST_SHIFTED_LOGIT)
    return torch.stack([sums[1], sums[2] + change * sums[1]]) * change.exp()


def _summands(shifted: Tensor) -> Tensor:
    """[2, T]: what one logit adds to s and to sum e^(z-m) (z-m)."""
    shifted = shifted.clamp(min=LOWEST_SHIFTED_LOGIT)
    exps = shifted.exp()
    return torch.stack([exps, exps * shifted])
