"""The control endpoints of one SGLang server that a weight update needs, as plain blocking HTTP calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_gppo.config import PauseMode
from megatron_gppo.http_calls import HttpCallError, call
from megatron_gppo.weight_sync.bucket import Bucket


class WeightSyncError(RuntimeError):
    """Weights did not reach an engine, or not the right ones. The message names the phase and the engine's URL."""


class NoAnswerError(WeightSyncError):
    """The server cannot be reached, broke off, or took too long. One that answers with an error is another matter."""


class _UnknownPathError(WeightSyncError):
    """The server has no such endpoint."""


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running server, told apart from one that was restarted at the same URL."""

    url: str
    started: str
    tp_size: int  # each tensor-parallel rank receives the weights itself
    gpus: tuple[int, ...]  # of the TP ranks, among those of its machine
    dtype: str
    device: str
    quantized: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Engines of one kind hold the same bits."""
        return self.tp_size, self.dtype, self.device, self.quantized


class EngineTensor(NamedTuple):
    """One of an engine's own tensors, as one of its ranks holds it."""

    name: str
    tp_rank: int

    def __str__(self) -> str:
        return f"{self.name} (tp rank {self.tp_rank})"


Checksums = Mapping[EngineTensor, str]


class WeightEndpoint:
    """One server. Every method raises WeightSyncError, naming URL, path and the server's answer, when the call fails or
    takes longer than `timeout_s`.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float, gpus: Sequence[int] = ()) -> None:
        """`gpus` of the TP ranks, if known: an engine that was shown only some counts them from 0."""
        self.url = url.rstrip("/")
        self._gpus = tuple(gpus)
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._in_session = False
        self._in_place = False  # how it was paused

    def process(self) -> "EngineProcess":
        """What runs behind the URL now."""
        info = self._call("/server_info")
        for size in ("pp_size", "dp_size"):
            if info.get(size, 1) != 1:
                raise WeightSyncError(
                    f"{self.url} runs with {size} = {info[size]}; weights can be sent to engines with {size} = 1 only. "
                    f"Fix: start several servers instead"
                )
        tp_size = int(info["tp_size"])
        first_gpu, step = int(info.get("base_gpu_id") or 0), int(info.get("gpu_id_step") or 1)
        return EngineProcess(
            url=self.url,
            started=str(info.get("startup_time")),
            tp_size=tp_size,
            gpus=self._gpus or tuple(first_gpu + tp_rank * step for tp_rank in range(tp_size)),
            dtype=str(info.get("dtype")),
            device=str(info.get("device")),
            quantized=info.get("quantization") is not None,
        )

    def weight_version(self) -> str:
        return str(self._call("/model_info").get("weight_version"))

    def join_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        """Returns when the engine's ranks, rank_offset and following, have met the others of the group."""
        self._call(
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": name,
                "backend": backend,
            },
        )

    def leave_group(self, name: str) -> None:
        self._call("/destroy_weights_update_group", {"group_name": name})

    def pause(self, mode: PauseMode) -> None:
        """Stops generating, and lets new requests wait: none must see half-updated weights. See sync.pause."""
        self._in_place = mode == "in_place"
        self._call("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._call("/continue_generation", {})

    def begin_update(self) -> None:
        """Opens the session that servers since 0.5.23 demand around weight updates; older ones have none."""
        try:
            self._call("/begin_weight_update", {})
        except _UnknownPathError:
            return
        except WeightSyncError as error:
            # A trainer that was killed in the middle of a sync leaves its session open on an external server.
            if "already open" not in str(error):
                raise
            self._call("/end_weight_update", {})
            self._call("/begin_weight_update", {})
        self._in_session = True

    def end_update(self) -> None:
        if self._in_session:
            self._call("/end_weight_update", {})
            self._in_session = False

    def receive(self, bucket: Bucket, *, group: str, version: str | None) -> None:
        """Returns when the engine has received the bucket's broadcast in `group` and loaded it.

        With a version, given for the last bucket, the server takes that as the version of its weights, and drops the KV
        cache of the old ones, unless requests were paused in place. See forget_cache.
        """
        self._call(
            "/update_weights_from_distributed",
            {
                "names": bucket.names,
                "dtypes": [str(bucket.dtype).removeprefix("torch.")] * len(bucket.names),
                "shapes": [list(shape) for shape in bucket.shapes],
                "group_name": group,
                "load_format": "flattened_bucket",
                **self._ending(version),
            },
        )

    def load(self, handles: Sequence[str], *, version: str | None) -> None:
        """Returns when the engine has loaded the bucket in shared memory, given as one handle a TP rank. See receive."""
        self._call(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": list(handles),
                "load_format": "flattened_bucket",
                **self._ending(version),
            },
        )

    def load_folder(self, folder: str, *, version: str) -> None:
        """Returns when the engine has loaded an HF folder, under this path."""
        self._call(
            "/update_weights_from_disk",
            # The format is named, or SGLang would take the one that it was started with, "dummy" for example.
            {"model_path": folder, "load_format": "auto", **self._ending(version)},
        )

    def _ending(self, version: str | None) -> dict[str, Any]:
        """What the last bucket's call has of its own. SGLang's allocator keeps its memory: on the CPU, emptying it is a
        garbage collection of 0.4 s.
        """
        is_last = version is not None
        flush = is_last and not self._in_place
        return {"weight_version": version, "flush_cache": flush, "torch_empty_cache": False}

    def forget_cache(self) -> None:
        """Drops the KV cache of the old weights, if requests were paused in place: those that there are keep theirs, and
        then so does the whole cache, as SGLang forgets all of it or nothing.
        """
        if not self._in_place:  # the last bucket had it dropped
            return
        try:
            self._request("/flush_cache", {})
        except WeightSyncError as error:
            if " answered 400" not in str(error):
                raise

    def checksums(self, skip: Sequence[str] = ()) -> Checksums:
        """A hash of each of the engine's own tensors (fused, a part per TP rank).

        Tensors whose name contains one of `skip` are left out. On the CPU the hash is the first 16 digits of SHA-256.
        """
        answer = self._call("/weights_checker", {"action": "checksum", "skip_tensor_list": list(skip)})
        return {
            EngineTensor(name, int(rank["parallelism_info"][0]["tp_rank"])): checksum
            for rank in answer["ranks"]
            for name, checksum in rank["checksums"].items()
        }

    def reset_tensors(self) -> None:
        """Overwrites all weights with random numbers."""
        self._call("/weights_checker", {"action": "reset_tensors"})

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probs of token_ids[1:], each given what is before it: [L-1] fp32, in nats, at temperature 1.

        SGLang scales by the temperature what it generates, but never the log-probs of a prompt.
        """
        answer = self._call(
            "/generate",
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        logprobs = answer["meta_info"]["input_token_logprobs"]
        return torch.tensor([logprob for logprob, _, _ in logprobs[1:]], dtype=torch.float32)

    def chosen_experts(self, token_ids: Sequence[int]) -> Any:
        """What /generate answers when it is asked for the experts of these tokens, too: see routing.read_experts."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_routed_experts": True,
        }
        return self._call("/generate", body)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON that _request answers."""
        try:
            return json.loads(self._request(path, body))
        except ValueError as error:
            raise WeightSyncError(f"{self.url}{path} did not answer with JSON: {error}") from error

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """POSTs the body, or GETs without one."""
        try:
            return call(self.url, path, self._api_key, body, timeout_s=self._timeout_s)
        except HttpCallError as error:
            kind = {None: NoAnswerError, 404: _UnknownPathError}.get(error.status, WeightSyncError)
            raise kind(str(error)) from error
