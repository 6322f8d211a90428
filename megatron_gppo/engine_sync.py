"""Weights for engines that come and go."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture
from megatron_gppo.parallel import ParallelState
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.weight_sync import WeightSync
from megatron_gppo.weight_sync.sync import SyncStats


class PoolSync:
    """WeightSync over the engines that the pool has at each sync. See WeightSync; engines: on rank 0 only."""

    def __init__(
        self, config: Config, architecture: Architecture, parallel: ParallelState, engines: EnginePool | None
    ) -> None:
        self._config = config
        self._architecture = architecture
        self._parallel = parallel
        self._engines = engines
        self._urls: list[str] = []
        self._sync: WeightSync | None = None

    def sync(self, shards: Mapping[str, Tensor], version: int) -> SyncStats:
        stats = self._of_members().sync(shards, version)
        self._synced(version)
        return stats

    def verify_start(self, shards: Mapping[str, Tensor], version: int, *, engines_hold_policy: bool) -> None:
        self._of_members().verify_start(shards, version, engines_hold_policy=engines_hold_policy)
        self._synced(version)

    def verify_probe(self, token_ids: Sequence[int], logprobs: Tensor) -> float:
        assert self._sync is not None
        return self._sync.verify_probe(token_ids, logprobs)

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()

    def _of_members(self) -> WeightSync:
        urls = self._parallel.from_rank_0(lambda: self._engines.to_sync() if self._engines is not None else [])
        if self._sync is None or urls != self._urls:
            self.close()
            self._sync = WeightSync(self._config, self._architecture, self._parallel, urls)
            self._urls = urls
        return self._sync

    def _synced(self, version: int) -> None:
        if self._engines is not None:
            self._engines.synced(self._urls, version)
