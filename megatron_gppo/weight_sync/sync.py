"""Weight sync as the training loop sees it: one object, called by every rank in lockstep."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.convert.architecture import Architecture
from megatron_gppo.convert.table import parameters
from megatron_gppo.metrics import Phases
from megatron_gppo.parallel import ParallelState
from megatron_gppo.weight_sync.addresses import is_loopback
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.disk import DiskTransport
from megatron_gppo.weight_sync.distributed import DistributedTransport
from megatron_gppo.weight_sync.endpoint import Checksums, WeightEndpoint
from megatron_gppo.weight_sync.export import Exporter
from megatron_gppo.weight_sync.fleet import EnginesGoneError, Fleet, SyncedEngines
from megatron_gppo.weight_sync.push import push
from megatron_gppo.weight_sync.routing import read_experts, unlike
from megatron_gppo.weight_sync.sample import RollingSample
from megatron_gppo.weight_sync.shared_memory import SharedMemoryTransport
from megatron_gppo.weight_sync.transport import SendAgainError, Transport
from megatron_gppo.weight_sync.verify import check_reset, check_restored, compare_logprobs

T = TypeVar("T")
DISK_FOLDER = "weights"  # in run.dir
# Mean absolute difference of the probe's log-probs, in nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What one sync took. Equal on every rank. All 0 where the run was asked to end while it waited for an engine."""

    seconds: float
    num_bytes: int  # sent to each engine
    num_buckets: int
    phases: dict[str, float]  # seconds of rank 0: prepare, gather, convert, send, load (what those did not hide), check


class WeightSync:
    """Keeps the engines' weights equal to the policy's.

    Every method is called by all ranks in lockstep. Rank 0 alone talks to the engines; what goes wrong there is raised as
    WeightSyncError on rank 0 and as PeerFailed on the others. After an error nothing but close() may be called.

    `engines`, on rank 0 only, says at every sync which engines there are, and hears which of them hold the new weights and
    which failed. One that fails is no error as long as another is left. When the last one ends or hangs, a sync waits for one
    that comes back (SyncedEngines.to_sync), and a probe says nothing; but not at the start, which ends with the first
    probe. Where `shards` appears, it is this rank's parameters by canonical name (convert.canonical_name). `on_progress` is
    called on rank 0 while a sync waits.
    """

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        parallel: ParallelState,
        engines: SyncedEngines | None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        assert (engines is None) == (parallel.rank != 0)
        self._config = config.sync
        self._api_key = config.rollout.api_key
        self._parallel = parallel
        self._parameters = parameters(architecture)
        # In the narrower of the two dtypes: a wider one would only move zeros.
        both_fp32 = config.model.dtype == "fp32" and config.rollout.engine_dtype in (None, "fp32")
        self._dtype = torch.float32 if both_fp32 else torch.bfloat16
        self._tolerance = config.sync.verify_tolerance or TOLERANCE[self._dtype]
        self._engines = engines
        self._on_progress = on_progress
        self._transport = _make_transport(config, parallel)
        self._exporter: Exporter | None = None
        self._sample: RollingSample | None = None
        self._synced: list[str] = []  # URLs of the engines that hold the weights of the last sync; on rank 0
        self._syncs = 0
        self._started = False
        self._warned_of_experts = False

    def sync(self, shards: Mapping[str, Tensor], version: int) -> SyncStats:
        """Gives the policy's weights to every engine, as `version`, and checks a sample of them, or all if it is time.

        sync.pause says what becomes of requests in flight.
        """
        start = time.perf_counter()
        phases = self._send(shards, version)
        self._syncs += 1
        if not phases:
            return SyncStats(0.0, 0, 0, {})
        if self._config.verify_all_every is not None and self._syncs % self._config.verify_all_every == 0:
            self._verify_all(shards, version)
        assert self._exporter is not None
        seconds = self._parallel.from_rank_0(lambda: time.perf_counter() - start)
        return SyncStats(seconds, self._exporter.num_bytes, self._exporter.num_buckets, phases)

    def verify_start(self, shards: Mapping[str, Tensor], version: int, *, engines_hold_policy: bool) -> None:
        """Syncs, and proves for every tensor of every engine that the sync wrote it, and wrote the right thing.

        `engines_hold_policy` says that the engines have loaded the same weights from model.hf_path by themselves, which
        makes that the standard. Otherwise (a resumed run, external engines that served another one) a first sync does,
        and only the probe can tell that its values are right.
        """
        if engines_hold_policy:
            self._synced = self._parallel.from_rank_0(self._to_sync)
        else:
            self._send(shards, version)
        self._verify_all(shards, version)

    def verify_probe(self, token_ids: Sequence[int], logprobs: Tensor) -> float:
        """Compares the engines' log-probs of token_ids[1:] with the policy's.

        `logprobs` [L-1], needed on rank 0, are the policy's at temperature 1: engines do not scale a prompt's log-probs by
        the sampling temperature. Returns the largest mean absolute difference of an engine, in nats, NaN when none is left;
        raises above sync.verify_tolerance.
        """

        def compare() -> float:
            by_url = self._ask(self._synced, "probe", lambda endpoint: endpoint.prompt_logprobs(token_ids))
            differences = [
                compare_logprobs(url, engine, logprobs.cpu(), self._tolerance) for url, engine in by_url.items()
            ]
            self._started = True
            return max(differences, default=math.nan)

        return self._parallel.from_rank_0(compare)

    def routing_difference(self, token_ids: Sequence[int], chosen: torch.Tensor) -> float | None:
        """Share of the experts chosen by the policy (`chosen`, [L, layers, k]) that an engine does not choose for the same tokens.

        The largest of the engines'; None where none of them says. Only a metric depends on it, so an answer that cannot be
        read loses no engine: it is left out, with one warning a run.
        """

        def compare() -> float | None:
            head = token_ids[: len(chosen)]
            answers = self._ask(self._synced, "routing", lambda endpoint: endpoint.chosen_experts(head))
            experts = [self._read_experts(url, answer, chosen.shape) for url, answer in answers.items()]
            return max((unlike(chosen, of_engine) for of_engine in experts if of_engine is not None), default=None)

        return self._parallel.from_rank_0(compare)

    def close(self) -> None:
        """Leaves the engines. Not collective; does nothing except on rank 0."""
        if self._parallel.rank == 0:
            self._transport.close()

    def _send(self, shards: Mapping[str, Tensor], version: int) -> dict[str, float]:
        """One push, and more of them as long as an engine that fails takes the others' connections with it, or was the last.

        Returns the seconds of the last one, by phase; nothing when the run was asked to end while it waited for an engine.
        """
        if self._exporter is None:
            bucket_bytes = self._config.bucket_mb * 2**20
            self._exporter = Exporter(self._parameters, shards, self._parallel, self._dtype, bucket_bytes)
            self._sample = RollingSample(self._exporter.names)
        failed: dict[str, str] = {}  # in this sync
        phases = None
        while phases is None:
            phases = self._send_once(shards, version, failed)
        return phases

    def _send_once(self, shards: Mapping[str, Tensor], version: int, failed: dict[str, str]) -> dict[str, float] | None:
        def urls_to_sync() -> list[str]:
            up = self._to_sync()
            # Who comes back meanwhile waits for the next sync, unless nobody else is left.
            return [url for url in up if url not in failed] or up

        urls = self._parallel.from_rank_0(urls_to_sync)
        if not urls:
            self._synced = []
            return {}
        phases = Phases()
        buckets = self._buckets(shards, urls, phases)
        if self._parallel.rank != 0:
            _drain(buckets)
        return self._parallel.from_rank_0(lambda: self._push(buckets, urls, version, failed, phases))

    def _push(
        self,
        buckets: Iterator[Bucket | None],
        urls: Sequence[str],
        version: int,
        failed: dict[str, str],
        phases: Phases,
    ) -> dict[str, float] | None:
        """Seconds by phase when the engines at `urls` have the weights, all but those that failed and are now in `failed`.
        None when those that are left have to be sent them again.
        """
        assert self._exporter is not None
        assert self._sample is not None
        assert self._engines is not None
        phases_of_push = None
        try:
            with self._fleet(urls, failed) as fleet:
                push(
                    fleet,
                    self._transport,
                    (bucket for bucket in buckets if bucket is not None),
                    self._exporter.num_buckets,
                    self._exporter.num_bytes,
                    version=str(version),
                    pause=self._config.pause,
                    device=self._exporter.device,
                    sample=self._sample,
                    phases=phases,
                )
                phases_of_push = phases.seconds
        except SendAgainError:
            pass
        finally:
            # The other ranks gather and send to the end, whatever became of the engines.
            _drain(buckets)
        if phases_of_push is not None:
            self._synced = [endpoint.url for endpoint in fleet.endpoints]
            self._engines.synced(self._synced, version)
        return phases_of_push

    def _verify_all(self, shards: Mapping[str, Tensor], version: int) -> None:
        """Overwrites the weights of the engines, sends them again, and compares with what they had."""
        before: dict[str, Checksums] = {}

        def reset() -> None:
            # Until the push ends: no request may see what comes now.
            self._ask(self._synced, "pause", lambda endpoint: endpoint.pause(self._config.pause))
            held = self._ask(self._synced, "verify", WeightEndpoint.checksums)
            self._ask(self._synced, "reset weights", WeightEndpoint.reset_tensors)
            for url, after in self._ask(self._synced, "verify", WeightEndpoint.checksums).items():
                before[url] = held[url]
                check_reset(url, held[url], after)

        def compare() -> None:
            urls = [url for url in self._synced if url in before]
            for url, after in self._ask(urls, "verify", WeightEndpoint.checksums).items():
                check_restored(url, before[url], after)

        self._parallel.from_rank_0(reset)
        self._send(shards, version)
        self._parallel.from_rank_0(compare)

    def _ask(self, urls: Sequence[str], phase: str, call: Callable[[WeightEndpoint], T]) -> dict[str, T]:
        """What these engines answer, by URL. Those that fail are lost, and give no answer."""
        if self._started and not urls:
            return {}
        with self._fleet(urls) as fleet:
            return {endpoint.url: answer for endpoint, answer in fleet.on_all(phase, call).items()}
        return {}

    def _read_experts(self, url: str, answer: Any, shape: Sequence[int]) -> Tensor | None:
        try:
            return read_experts(answer, shape)
        except ValueError as error:
            if not self._warned_of_experts:
                print(
                    f"warning: engine/routing_difference leaves out {url}, which does not say which experts it chooses: "
                    f"{error}. Fix: serve the policy's model there, with the SGLang version in requirements/",
                    file=sys.stderr,
                    flush=True,
                )
            self._warned_of_experts = True
            return None

    def _buckets(self, shards: Mapping[str, Tensor], urls: Sequence[str], phases: Phases) -> Iterator[Bucket | None]:
        """The export, with every bucket where the transport wants it. Must be exhausted by every rank."""
        assert self._exporter is not None
        for number, bucket in enumerate(self._exporter.export(shards, phases)):
            with phases("gather"):
                self._transport.pass_bucket(bucket, self._exporter.bytes_of(number), urls, self._exporter.device)
            yield bucket

    def _to_sync(self) -> list[str]:
        assert self._engines is not None
        urls = self._engines.to_sync(self._on_progress)
        host = self._config.host
        for url in urls if self._config.transport == "distributed" else []:
            if is_loopback(host) and not is_loopback(urlsplit(url).hostname or ""):
                raise ConfigError(
                    f"sync.host = {host} cannot be reached from the engine at {url}. Fix: set sync.host to an address of "
                    f"rank 0's machine"
                )
        return urls

    @contextmanager
    def _fleet(self, urls: Sequence[str], failed: dict[str, str] | None = None) -> Iterator[Fleet]:
        """The engines at `urls`. Those that fail in the body are reported, and added to `failed`.

        A body that the last engine's end has cut short is left without an error, except at the start.
        """
        assert self._engines is not None
        failed = {} if failed is None else failed
        engines, timeout_s = self._engines, self._config.timeout_s
        endpoints = [WeightEndpoint(url, self._api_key, timeout_s, engines.gpus(url)) for url in urls]
        fleet = Fleet(endpoints, failed_before=dict(failed))
        try:
            yield fleet
        except EnginesGoneError:
            if not self._started:  # nothing is forgiven: more likely it cannot work here
                raise
        finally:
            failed |= fleet.failed
            self._synced = [url for url in self._synced if url not in fleet.failed]
            for url, why in fleet.failed.items():
                self._engines.lost(url, why)


def _make_transport(config: Config, parallel: ParallelState) -> Transport:
    if config.sync.transport == "distributed":
        return DistributedTransport(config.sync.host, config.sync.timeout_s)
    if config.sync.transport == "tensor":
        return SharedMemoryTransport(parallel)
    return DiskTransport(config.sync.disk_dir or config.run.dir / DISK_FOLDER, config.model.hf_path)


def _drain(buckets: Iterator[Bucket | None]) -> None:
    for _ in buckets:
        pass
