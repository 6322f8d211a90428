"""Weight sync as the training loop sees it: one object, called by every rank in lockstep."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.table import parameters
from megatron_gppo.parallel import ParallelState
from megatron_gppo.weight_sync.endpoint import WeightEndpoint
from megatron_gppo.weight_sync.export import Bucket, Exporter
from megatron_gppo.weight_sync.push import WeightPusher
from megatron_gppo.weight_sync.verify import Checksums, check_restored, compare_logprobs, reset_weights, unlike

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Mean absolute difference of the probe's log-probs, in nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What one sync took. Equal on every rank."""

    seconds: float
    num_bytes: int  # sent to each engine
    num_buckets: int


class WeightSync:
    """Keeps the engines' weights equal to the policy's.

    Every method is called by all ranks in lockstep. Rank 0 alone talks to the engines; what goes wrong there is raised as
    WeightSyncError on rank 0 and as PeerFailed on the others. After an error nothing but close() may be called.

    Construction is collective too, and raises ConfigError when an engine cannot reach sync.host. `urls` are the engines' and
    matter on rank 0 only. Where `shards` appears, it is this rank's parameters by canonical
    name (convert.canonical_name).
    """

    def __init__(
        self, config: Config, architecture: Architecture, parallel: ParallelState, urls: Sequence[str]
    ) -> None:
        self._parallel = parallel
        self._parameters = parameters(architecture)
        # In the narrower of the two dtypes: a wider one would only move zeros.
        both_fp32 = config.model.dtype == "fp32" and config.rollout.engine_dtype in (None, "fp32")
        self._dtype = torch.float32 if both_fp32 else torch.bfloat16
        self._bucket_bytes = config.sync.bucket_mb * 2**20
        self._tolerance = config.sync.verify_tolerance or TOLERANCE[self._dtype]
        self._exporter: Exporter | None = None
        self._joined = False
        parallel.from_rank_0(lambda: _check_reachable(config.sync.host, urls))
        self._endpoints = [WeightEndpoint(url, config.rollout.api_key, config.sync.timeout_s) for url in urls]
        self._pusher = WeightPusher(self._endpoints, config.sync.host, config.sync.timeout_s)

    def sync(self, shards: Mapping[str, Tensor], version: int) -> SyncStats:
        """Gives the policy's weights to every engine, as `version`. No request may be in flight: it would be aborted."""
        start = time.perf_counter()
        if self._exporter is None:
            self._exporter = Exporter(self._parameters, shards, self._parallel, self._dtype, self._bucket_bytes)
        exporter = self._exporter
        buckets = exporter.export(shards)
        if self._parallel.rank != 0:
            _drain(buckets)

        def push() -> SyncStats:
            try:
                self._join(next(iter(shards.values())).device)
                self._pusher.push(buckets, exporter.num_buckets, version)
            finally:
                # The other ranks gather and send to the end, whatever became of the engines.
                _drain(buckets)
            return SyncStats(time.perf_counter() - start, exporter.num_bytes, exporter.num_buckets)

        return self._parallel.from_rank_0(push)

    def verify_start(self, shards: Mapping[str, Tensor], version: int, *, engines_hold_policy: bool) -> None:
        """Syncs, and proves for every tensor of every engine that the sync wrote it, and wrote the right thing.

        `engines_hold_policy` says that the engines have loaded the same weights from model.hf_path by themselves, which
        makes that the standard. Otherwise (a resumed run, external engines that served another one) a first sync does,
        and only the probe can tell that its values are right.
        """
        if not engines_hold_policy:
            self.sync(shards, version)

        def reset() -> dict[str, Checksums]:
            checksums = self._pusher.on_all("reset weights", reset_weights)
            return {endpoint.url: before for endpoint, before in zip(self._endpoints, checksums, strict=True)}

        before = self._parallel.from_rank_0(reset)
        self.sync(shards, version)
        self._parallel.from_rank_0(
            lambda: self._pusher.on_all("verify", lambda endpoint: check_restored(endpoint, before[endpoint.url]))
        )

    def verify_probe(self, token_ids: Sequence[int], logprobs: Tensor) -> float:
        """Compares the engines' log-probs of token_ids[1:] with the policy's.

        `logprobs` [L-1], needed on rank 0, are the policy's at temperature 1: engines do not scale a prompt's log-probs by
        the sampling temperature. Returns the largest mean absolute difference of an engine, in nats; raises above
        sync.verify_tolerance.
        """

        def compare() -> float:
            by_engine = self._pusher.on_all("probe", lambda endpoint: endpoint.prompt_logprobs(token_ids))
            return max(
                compare_logprobs(endpoint.url, engine, logprobs.cpu(), self._tolerance)
                for endpoint, engine in zip(self._endpoints, by_engine, strict=True)
            )

        return self._parallel.from_rank_0(compare)

    def routing_difference(self, token_ids: Sequence[int], chosen: torch.Tensor) -> float | None:
        """Share of the experts chosen by the policy (`chosen`, [L, layers, k]) that an engine does not choose for the same tokens.

        The largest of the engines'; None where none of them says.
        """

        def compare() -> float | None:
            head = token_ids[: len(chosen)]
            by_engine = self._pusher.on_all("routing", lambda endpoint: endpoint.chosen_experts(head, chosen.shape[1]))
            differences = [unlike(chosen[: len(engine)], engine) for engine in by_engine if engine is not None]
            return max(differences, default=None)

        return self._parallel.from_rank_0(compare)

    def close(self) -> None:
        """Ends the group with the engines. Not collective; does nothing except on rank 0."""
        if self._parallel.rank == 0:
            self._pusher.close()

    def _join(self, device: torch.device) -> None:
        if not self._joined:
            self._pusher.join(device)
            self._joined = True


def _check_reachable(host: str, urls: Sequence[str]) -> None:
    for url in urls:
        if host in LOOPBACK and urlsplit(url).hostname not in LOOPBACK:
            raise ConfigError(
                f"sync.host = {host} cannot be reached from the engine at {url}. Fix: set sync.host to an address of rank 0's machine"
            )


def _drain(buckets: Iterator[Bucket]) -> None:
    for _ in buckets:
        pass
