"""Proof that what the engines serve is the policy: completely at the start and on demand, by a probe's log-probs in between.

For the complete one, every tensor of an engine is overwritten with random numbers and must be back, bit for bit, after a sync. A
tensor that the export leaves out, misnames or puts together wrongly is not, and is named. SGLang ignores names that it
does not know, so that without this a sync could leave out a tensor in silence.

Checksums tell it, rather than /weights_checker's own comparison: that needs CUDA, sees the first TP rank only, and
keeps a second copy of the weights on the host.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_gppo.weight_sync.endpoint import Checksums, WeightSyncError

NAMED_AT_MOST = 10


def check_reset(url: str, before: Checksums, after: Checksums) -> None:
    """Raises WeightSyncError naming the tensors of the engine whose checksums a reset left as they were."""
    if kept := [name for name in before if after.get(name) == before[name]]:
        raise WeightSyncError(
            f"weight sync, phase 'verify': {url} did not reset {listed(kept)}, so that a sync of them cannot be verified"
        )


def check_restored(url: str, before: Checksums, after: Checksums) -> None:
    """Raises WeightSyncError naming the tensors of the engine whose checksums are not as before the reset."""
    if wrong := [name for name in before if after.get(name) != before[name]]:
        raise WeightSyncError(
            f"weight sync, phase 'verify': {url}: {len(wrong)} of {len(before)} tensors are not what they were before they "
            f"were reset and synced: {listed(wrong)}. Either the engine was started from other weights than the policy, or "
            f"in another dtype (fix: restart it with model.hf_path), or the export of these tensors is wrong"
        )


def compare_logprobs(url: str, engine: Tensor, policy: Tensor, tolerance: float) -> float:
    """The mean absolute difference of two [L-1] log-probs, in nats. Raises WeightSyncError above `tolerance`, or for NaN."""
    if engine.shape != policy.shape:
        raise WeightSyncError(f"probe: {url} gave {tuple(engine.shape)} log-probs, the policy {tuple(policy.shape)}")
    difference = (engine.double() - policy.double().to(engine.device)).abs()
    mean = difference.mean().item()
    if not mean <= tolerance:
        raise WeightSyncError(
            f"probe: the log-probs of {url} differ from the policy's by {mean:.3g} nats on average (at most "
            f"{difference.max().item():.3g}, at token {int(difference.argmax()) + 1}); sync.verify_tolerance allows "
            f"{tolerance:g}. The engine does not serve the policy's weights, or computes in a lower precision"
        )
    return mean


def listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(map(str, names[:NAMED_AT_MOST])) + more
