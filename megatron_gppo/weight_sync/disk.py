"""Buckets as safetensors in a folder, for engines that share no more with the trainer than a file system.

Every bucket is a file: its bytes are what safetensors has after the header. Rank 0 writes `version_N` under another name,
renames it when it is complete, and has the engines read it. Older ones get another name, too, and are deleted while the
training goes on: it takes up to half as long as the rest of a sync.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import torch

from megatron_gppo.convert.hf_checkpoint import INDEX_FILE
from megatron_gppo.convert.hf_weights import safetensors_header, weights_index
from megatron_gppo.convert.memory import memory_of
from megatron_gppo.metrics import Phases
from megatron_gppo.weight_sync.bucket import Bucket, Shape
from megatron_gppo.weight_sync.endpoint import WeightSyncError
from megatron_gppo.weight_sync.fleet import Fleet, in_thread
from megatron_gppo.weight_sync.transport import Processes

FOLDER = "version_{}"
OUTDATED = "outdated_version_{}"


class DiskTransport:
    """See Transport. `folder` must have the same path for the engines; `hf_path` has the model's config.json."""

    in_session = False

    def __init__(self, folder: Path, hf_path: Path) -> None:
        self._folder = folder.resolve()
        self._partial = self._folder / "incomplete"
        self._hf_path = hf_path
        self._files: dict[str, dict[str, Shape]] = {}
        self._writing: Future[None] | None = None
        self._deleting: Future[None] | None = None
        self._last: tuple[Bucket, str] | None = None  # with its version

    def prepare(self, fleet: Fleet, processes: Processes, device: torch.device) -> None:
        self._files, self._writing, self._last = {}, None, None
        self._finish_deleting()
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            shutil.copy(self._hf_path / "config.json", self._partial)
        except OSError as error:
            raise self._failure(error) from error

    def pass_bucket(self, bucket: Bucket | None, size: int, urls: Sequence[str], device: torch.device) -> None:
        """Does nothing: rank 0 writes by itself."""

    def send(self, fleet: Fleet, bucket: Bucket, phase: str, version: str | None) -> None:
        name = f"model-{len(self._files) + 1:05}.safetensors"
        self._files[name] = dict(zip(bucket.names, bucket.shapes, strict=True))
        self._writing = in_thread(_write, self._partial / name, self._files[name], bucket)
        if version is not None:
            self._last = bucket, version

    def wait(self, fleet: Fleet, phases: Phases) -> None:
        if self._writing is None:
            return
        try:
            with phases("send"):
                self._writing.result()
            if self._last is None:
                return
            bucket, version = self._last
            (self._partial / INDEX_FILE).write_bytes(weights_index(self._files, bucket.dtype))
            complete = self._folder / FOLDER.format(version)
            shutil.rmtree(complete, ignore_errors=True)
            self._partial.rename(complete)
        except OSError as error:
            raise self._failure(error) from error
        self._writing = self._last = None
        with phases("load"):
            fleet.on_all("load from disk", lambda endpoint: endpoint.load_folder(str(complete), version=version))
        for older in self._folder.glob(FOLDER.format("*")):
            if older != complete:
                with suppress(OSError):
                    older.rename(self._folder / f"outdated_{older.name}")
        self._deleting = in_thread(self._delete_outdated)

    def close(self) -> None:
        self._finish_deleting()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _finish_deleting(self) -> None:
        """Also what a process that was killed has left."""
        if self._deleting is not None:
            self._deleting.result()
        self._delete_outdated()

    def _delete_outdated(self) -> None:
        with suppress(OSError):
            for folder in self._folder.glob(OUTDATED.format("*")):
                shutil.rmtree(folder, ignore_errors=True)

    def _failure(self, error: OSError) -> WeightSyncError:
        return WeightSyncError(
            f"weight sync: {error.filename or self._folder}: {error.strerror}. Fix: make room there, or set sync.disk_dir to "
            f"a folder that can be written"
        )


def _write(path: Path, shapes: dict[str, Shape], bucket: Bucket) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(safetensors_header(shapes, bucket.dtype))
        data = memory_of(bucket.data.cpu())
        while len(data):  # one write is at most 2 GiB
            data = data[file.write(data) :]
