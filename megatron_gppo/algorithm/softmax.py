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

from megatron_gppo.algorithm.tile_passes import LOWEST_SHIFTED_LOGIT, exponentiate_tile, scaled, sum_tile
from megatron_gppo.algorithm.vocabulary import Tile, VocabularyShard

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
        self._group, self._temperature, self._with_entropy = shard.group, temperature, with_entropy
        self._centre = None  # divided by the temperature: of every logit, and the target's logit
        if centre is not None:
            self._centre = scaled(centre.values.float(), temperature), scaled(centre.target_logit, temperature)
        self._target_logit = torch.zeros(len(targets), device=targets.device)
        # Finite, so that a rank whose columns are all padding adds 0 and not NaN.
        nothing = torch.zeros(3, len(targets), device=targets.device)
        nothing[0] = torch.finfo(torch.float32).min
        self._sums = [nothing]  # of each tile: m, s, and sum e^(z-m) (z-m)

    def add(self, logits: Tensor, tile: Tile) -> None:
        """logits: [T, C] of the tile, fp32 or bf16, less the centre, not divided by the temperature. Only read."""
        target_logit = scaled(logits[tile.tokens, tile.places].float(), self._temperature)
        sums = sum_tile(logits, self._temperature, self._with_entropy)
        if self._centre is not None:
            centre, unrounded_target = self._centre
            unrounded = unrounded_target[tile.tokens] - centre[tile.tokens]
            # A logit that rounding moves this far stays rounded: e^(unrounded - m) could overflow, or leave a sum of 0.
            is_near = (unrounded - target_logit).abs() < LARGEST_CORRECTION
            unrounded = torch.where(is_near, unrounded, target_logit)
            maximum = sums[0, tile.tokens]
            sums[1:, tile.tokens] += _summands(unrounded - maximum) - _summands(target_logit - maximum)
            sums[0] += centre
            target_logit = unrounded + centre[tile.tokens]
        self._target_logit[tile.tokens] = target_logit
        self._sums.append(sums)

    def over_ranks(self) -> Softmax:
        """The sums over the whole vocabulary; several ranks exchange [T], and [3, T] ([2, T] without an entropy)."""
        sums, target_logit = torch.stack(self._sums), self._target_logit
        maximum = sums[:, 0].amax(dim=0)
        if self._group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self._group)
        exp_sum, weighted_sum = _rescaled(sums, maximum).sum(dim=1)
        if self._group is not None:
            # One rank has the target's logit, the others 0.
            parts = torch.stack([target_logit, exp_sum, *([weighted_sum] if self._with_entropy else [])])
            dist.all_reduce(parts, group=self._group)
            target_logit, exp_sum = parts[:2]
            weighted_sum = parts[-1]
        # Of a row of nothing but -inf: its log-prob is -inf then, and its entropy and p are 0, not NaN.
        exp_sum = exp_sum.masked_fill(exp_sum == 0.0, 1.0)
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
        self._temperature = temperature
        self._shift = softmax.maximum if centre is None else softmax.maximum - scaled(centre.float(), temperature)
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

    def write(self, logits: Tensor, tile: Tile, *, out: Tensor) -> None:
        """Writes 0 for the targets' logits. logits: as in SoftmaxSums.add. out: [T, C], may be logits itself."""
        exponentiate_tile(logits, self._temperature, self._shift, self._factor, self._line, out)
        out[tile.tokens, tile.places] = 0.0

    def write_targets(self, tile: Tile, *, out: Tensor) -> None:
        """Completes what write() has written."""
        out[tile.tokens, tile.places] = self.of_targets[tile.tokens].to(out.dtype)


def _rescaled(sums: Tensor, maximum: Tensor) -> Tensor:
    """[2, tiles, T]: s and sum e^(z-m) (z-m) relative to a larger m, [T]. sums: [tiles, 3, T]."""
    own_maximum, exp_sum, weighted_sum = sums.unbind(dim=1)
    change = (own_maximum - maximum).clamp(min=LOWEST_SHIFTED_LOGIT)
    return torch.stack([exp_sum, weighted_sum + change * exp_sum]) * change.exp()


def _summands(shifted: Tensor) -> Tensor:
    """[2, T]: what one logit adds to s and to sum e^(z-m) (z-m)."""
    shifted = shifted.clamp(min=LOWEST_SHIFTED_LOGIT)
    exps = shifted.exp()
    return torch.stack([exps, exps * shifted])
