"""Weights from the policy to the engines: export, push, and proof that they arrived."""

from megatron_gppo.weight_sync.addresses import check_host
from megatron_gppo.weight_sync.endpoint import WeightSyncError
from megatron_gppo.weight_sync.fleet import SyncedEngines
from megatron_gppo.weight_sync.sync import SyncStats, WeightSync

__all__ = ["SyncStats", "SyncedEngines", "WeightSync", "WeightSyncError", "check_host"]
