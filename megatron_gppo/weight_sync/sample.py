"""Checksums of a part of the weights after every sync: one layer a time, and what is in no layer, in turn.

An engine fuses HF tensors (q, k and v into one), and cuts them over its TP ranks, so that what it holds mostly has other
checksums than what it was sent. What must hold all the same, for each of its tensors:
- it is there;
- it has changed since its last turn if, and only if, one of the HF tensors in it has;
- engines of one kind hold the same;
- on the CPU, where SGLang's hash is known to be SHA-256: it is what was sent, where neither fused nor cut.

So a tensor that is left out, misnamed, late, or damaged in one of the engines is found within as many syncs as there are
layers. The cost is that of hashing one layer, on rank 0 and in the engine. That as many tensors were sent as the model has is
checked every time.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_gppo.convert.memory import memory_of
from megatron_gppo.weight_sync.bucket import Bucket
from megatron_gppo.weight_sync.endpoint import Checksums, EngineProcess, EngineTensor, WeightSyncError
from megatron_gppo.weight_sync.verify import listed

REST = -1  # the turn of what is in no layer
HASH_DIGITS = 16
VOCABULARY_ALIGNMENT = 64  # rows; SGLang pads embeddings to it
# HF name -> the engine's.
FUSED = (
    (re.compile(r"\.experts\.\d+\.(?:gate|up)_proj\.weight$"), ".experts.w13_weight"),
    (re.compile(r"\.experts\.\d+\.down_proj\.weight$"), ".experts.w2_weight"),
    (re.compile(r"\.[qkv]_proj\."), ".qkv_proj."),
    (re.compile(r"\.(?:gate|up)_proj\."), ".gate_up_proj."),
)


class RollingSample:
    """What was sent and what engines hold of one layer, and when it was its turn before. Rank 0 only.

    begin(), add() for every bucket, check(); a push that fails in between starts over.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names` of all HF tensors."""
        self._names = names
        self._turns = sorted({_layer_of(name) for name in names})
        self._turn = 0
        self._num_sent = 0
        self._digests: dict[str, str] = {}  # of this turn, by HF name
        self._plain: dict[str, Tensor] = {}  # those that an engine with one rank has as they are; on the meta device
        self._sent_before: dict[str, str] = {}  # at each tensor's last turn
        self._held_before: dict[EngineProcess, dict[EngineTensor, str]] = {}

    @property
    def skip(self) -> list[str]:
        """What the names of engine tensors contain that are not in this turn."""
        now = self._turns[self._turn]
        others = [f"layers.{layer}." for layer in self._turns if layer not in (now, REST)]
        return others if now == REST else others + [name for name in self._names if _layer_of(name) == REST]

    def begin(self) -> None:
        self._digests, self._plain, self._num_sent = {}, {}, 0

    def add(self, bucket: Bucket) -> None:
        """Looks at a bucket that is sent."""
        self._num_sent += len(bucket.names)
        layer = self._turns[self._turn]
        if not any(_layer_of(name) == layer for name in bucket.names):
            return
        for name, tensor in bucket.tensors().items():
            if _layer_of(name) == layer:
                self._digests[name] = digest(tensor)
                is_padded = layer == REST and tensor.dim() == 2 and len(tensor) % VOCABULARY_ALIGNMENT
                if engine_name(name) == name and not is_padded:
                    self._plain[name] = tensor.to("meta")

    def check(self, held: Mapping[EngineProcess, Checksums]) -> None:
        """Ends the turn. Raises WeightSyncError naming an engine and its tensors."""
        if self._num_sent != len(self._names):
            raise WeightSyncError(f"weight sync: {self._num_sent} tensors were sent, not {len(self._names)}")
        sources: dict[str, list[str]] = {}  # HF names by the engine's
        for name in self._digests:
            sources.setdefault(engine_name(name), []).append(name)
        first_of_kind: dict[tuple[object, ...], Checksums] = {}
        for process, checksums in held.items():
            wrong = self._wrong(process, checksums, sources)
            like = first_of_kind.setdefault(process.kind, checksums)
            wrong += [
                f"{tensor} (another engine's differs)" for tensor in like if checksums.get(tensor) != like[tensor]
            ]
            if wrong:
                raise WeightSyncError(
                    f"weight sync, phase 'check sample': {process.url}: {len(wrong)} tensors are not what was sent: "
                    f"{listed(wrong)}. Fix: look for what else writes to this engine, or for a damaged device; "
                    f"restart it"
                )
        self._sent_before |= self._digests
        self._held_before = {
            process: {**self._held_before.get(process, {}), **checksums} for process, checksums in held.items()
        }
        self._turn = (self._turn + 1) % len(self._turns)

    def _wrong(self, process: EngineProcess, checksums: Checksums, sources: Mapping[str, Sequence[str]]) -> list[str]:
        wrong = []
        before = self._held_before.get(process, {})
        for name, hf_names in sources.items():
            parts = [EngineTensor(name, tp_rank) for tp_rank in range(process.tp_size)]
            if any(part not in checksums for part in parts):
                wrong.append(f"{name} (not there)")
                continue
            if self._is_held_plain(name, process) and any(checksums[part] != self._digests[name] for part in parts):
                wrong.append(f"{name} (not what was sent)")
            elif all(part in before for part in parts):
                moved = any(checksums[part] != before[part] for part in parts)
                was_sent = any(self._digests[hf_name] != self._sent_before[hf_name] for hf_name in hf_names)
                if moved and not was_sent:
                    wrong.append(f"{name} (changed, though the policy's did not)")
                elif was_sent and not moved and not process.quantized:
                    wrong.append(f"{name} (as before, though the policy's changed)")
        return wrong

    def _is_held_plain(self, name: str, process: EngineProcess) -> bool:
        tensor = self._plain.get(name)
        if tensor is None or process.device != "cpu" or process.dtype != str(tensor.dtype).removeprefix("torch."):
            return False
        return process.tp_size == 1 or tensor.dim() == 1  # vectors, all of norms, are on every rank


def engine_name(hf_name: str) -> str:
    """SGLang's name of the tensor that it puts an HF tensor into."""
    for pattern, replacement in FUSED:
        renamed = pattern.sub(replacement, hf_name)
        if renamed != hf_name:
            return renamed
    return hf_name


def digest(tensor: Tensor) -> str:
    """SGLang's hash of a CPU tensor, of a tensor anywhere."""
    return hashlib.sha256(memory_of(tensor.cpu())).hexdigest()[:HASH_DIGITS]


def _layer_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else REST
