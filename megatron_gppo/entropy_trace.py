"""Whether the entropy moves as the paper says that it should.

Eq. 7 of arXiv 2509.20712: the change of the entropy in a step is about -η · Cov(log π, π · A). Its η is a tabular step
size and the covariance a sample's, so no magnitude is claimed here; sign and correlation are.
"""

from collections.abc import Sequence

import numpy as np

from megatron_gppo.datatypes import EntropyPoint, UpdateStats

STEPS = 100  # that the running figures look back on


def covariance(updates: Sequence[UpdateStats]) -> float:
    """Of x = log π and y = π · A over all loss tokens of these updates; at least one token."""
    x, y, product, tokens = (
        sum(update.sums[key] for update in updates)
        for key in ("logprob", "weighted_advantage", "product", "num_tokens")
    )
    return product / tokens - (x / tokens) * (y / tokens)


def extended(trace: Sequence[EntropyPoint], updates: Sequence[UpdateStats]) -> tuple[EntropyPoint, ...]:
    """The trace with this step; without any token in the loss the step leaves no point."""
    measured = [update for update in updates if update.num_loss_tokens > 0]
    if not measured:
        return tuple(trace)
    entropy = sum(update.sums["entropy"] for update in measured) / sum(update.num_loss_tokens for update in measured)
    return (*trace, EntropyPoint(covariance(measured), entropy))[-STEPS - 1 :]


def trace_scalars(trace: Sequence[EntropyPoint]) -> dict[str, float]:
    """How well -covariance foretold the change of the mean entropy to the next step, over the trace's steps.

    The correlation needs three changes that are not all equal; until then it is left out.
    """
    foretold = -np.array([point.covariance for point in trace[:-1]])
    changes = np.diff([point.entropy for point in trace])
    if len(changes) == 0:
        return {}
    scalars = {"entropy/sign_agreement": float(np.mean(np.sign(foretold) == np.sign(changes)))}
    if len(changes) >= 3 and foretold.std() > 0 and changes.std() > 0:
        scalars["entropy/covariance_correlation"] = float(np.corrcoef(foretold, changes)[0, 1])
    return scalars
