"""What the items of SGLang's /generate answers say, and responses that come in several pieces because a weight sync cut them.

An item as it is read here (0.5.23): output_ids end with the EOS token that stopped them, and output_token_logprobs holds
one (logprob, token id, text) for each of them, EOS included. The log-probs are of the temperature-scaled distribution
before top-p, whatever top_p is. weight_versions has spans of tokens by the version of the weights that generated them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_gppo.datatypes import FinishReason, Response

AS_STARTED = "default"  # what SGLang calls the version of the weights it started with, unless told otherwise


class UnusableItemError(ValueError):
    """An item of an answer that cannot be used. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Of rollouts that are generated while the policy trains, and gets new weights."""

    versions: int  # by so many may tokens be older than the policy; and so many weight syncs may cut a response
    decode: Callable[[list[int]], str]  # what a response that was cut spells, without special tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """A response, or as much of it as one request gave."""

    token_ids: list[int]  # [L], like the two below; L = 0 in a piece that was aborted before it began
    logprobs: list[float]
    policy_versions: list[int]
    text: str
    finish_reason: FinishReason | Literal["abort"]

    def followed_by(self, rest: "Piece") -> "Piece":
        """Without a text: a character's bytes may be divided between the two."""
        return Piece(
            self.token_ids + rest.token_ids,
            self.logprobs + rest.logprobs,
            self.policy_versions + rest.policy_versions,
            "",
            rest.finish_reason,
        )

    def response(self, text: str) -> Response:
        assert self.finish_reason != "abort"
        return Response(self.token_ids, self.logprobs, text, self.finish_reason, self.policy_versions)


def parse_piece(item: Any) -> Piece:
    """Raises UnusableItemError."""
    try:
        meta = item["meta_info"]
        reason, matched = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
        token_ids = item["output_ids"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        logprob_ids = [entry[1] for entry in meta["output_token_logprobs"]]
        text = item["text"]
        versions = _versions(meta, len(token_ids))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnusableItemError(f"{type(error).__name__} {error}") from error
    if (not token_ids and reason != "abort") or token_ids != logprob_ids:
        raise UnusableItemError(
            f"{len(token_ids)} output_ids and {len(logprob_ids)} output_token_logprobs do not pair up"
        )
    if not _are_finite(logprobs):
        raise UnusableItemError("a log-prob is not a finite number")
    if reason == "abort":
        # Without its last token, which may be an EOS that the abort came before.
        return Piece(token_ids[:-1], logprobs[:-1], versions[:-1], "", "abort")
    if reason not in ("stop", "length") or (reason == "stop" and matched != token_ids[-1]):
        # SGLang also says "stop" when it met NaN, matched to a text.
        raise UnusableItemError(f"finish_reason {reason}, matched {matched!r}")
    return Piece(token_ids, logprobs, versions, text, reason)


def _versions(meta: dict[str, Any], num_tokens: int) -> list[int]:
    """By token. An answer without spans is of one version."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": num_tokens}]
    versions: list[int] = []
    for span in spans:
        if span["start"] != len(versions):
            break
        versions += [_version(span["version"])] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise UnusableItemError(f"weight_versions = {spans} are not of {num_tokens} tokens")
    return versions


def _version(name: Any) -> int:
    if name == AS_STARTED:
        return 0
    try:
        return int(name)
    except (TypeError, ValueError):
        raise UnusableItemError(
            f"weight_version = {name!r} is not a number. Fix: start the server without --weight-version"
        ) from None


def _are_finite(values: list[Any]) -> bool:
    """Whether all are finite numbers. By a map: there is one for every token."""
    try:
        return all(map(math.isfinite, values))
    except TypeError:
        return False
