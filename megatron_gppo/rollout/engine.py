"""One SGLang server, as a client sees it: generation with log-probs, health, abort. All calls are asyncio.

SGLang's /generate, as its answers are read here (0.5.23): output_ids end with the EOS token that stopped them, and
output_token_logprobs holds one (logprob, token id, text) for each of them, EOS included. The log-probs are of the
temperature-scaled distribution before top-p, whatever top_p is. n > 1 answers a list, n = 1 an object.
"""

import asyncio
import math
from collections import Counter
from typing import Any, Protocol

import aiohttp

from megatron_gppo.config import SamplingConfig
from megatron_gppo.datatypes import Response
from megatron_gppo.rollout.json_answers import parse_json

CONNECT_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 5.0
FIRST_RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 30.0
AS_STARTED = "default"  # what SGLang calls the version of the weights it started with, unless told otherwise


class EngineError(RuntimeError):
    """An engine failed or answered something that cannot be used. The message names its URL and what it said."""


class EngineFaultError(EngineError):
    """The engine is at fault, not the request: another engine may do better."""


class MalformedAnswerError(EngineFaultError):
    """The engine answered nonsense."""


class Supervised(Protocol):
    """The process behind a managed engine."""

    def check(self) -> None:
        """Raises EngineFaultError when the process has ended."""


class Engine:
    """A client of one server; connect() opens it in the event loop that uses it.

    url: base URL. timeout_s: limit for one request, generation included. max_retries: times a request is sent again
    after a disconnect, a time-out, an abort that nobody here asked for, or an HTTP status of 408, 429 or 5xx. process:
    set for a managed server, so that its death is reported with its log, at once, and not retried.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 1800.0,
        max_retries: int = 3,
        process: Supervised | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.process = process
        self._headers = authorization(api_key)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._max_retries = max_retries
        self._session: aiohttp.ClientSession | None = None

    async def connect(self) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0)
            )

    async def disconnect(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def model_info(self) -> dict[str, Any]:
        """model_path, weight_version and more. Raises EngineError."""
        return await self._request("GET", "/model_info", None, Counter())

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingConfig, n: int, counts: Counter[str]
    ) -> list[Response]:
        """n responses to one prompt, in one request: the server then computes the prompt once, and measured throughput
        of short responses is 1.5 times that of n requests.

        Adds to counts "retried_requests" and, of these, "timed_out_requests". Raises EngineFaultError when the engine has
        died, when retries are used up, and on a malformed answer; EngineError when it rejects the request.

        Cancelling it closes the connection, by which SGLang knows within seconds that the request is to be aborted: it
        gives names of its own to the n responses, so that no /abort_request could name them.
        """
        body = {
            "input_ids": prompt_ids,
            "return_logprob": True,
            # Every parameter that changes the distribution is spelled out: a server's defaults may come from the
            # model's generation_config.json.
            "sampling_params": {
                "n": n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
                "max_new_tokens": sampling.max_response_tokens,
            },
        }
        answer = await self._request("POST", "/generate", body, counts)
        items = answer if n > 1 else [answer]
        if not isinstance(items, list) or len(items) != n:
            raise MalformedAnswerError(f"{self.url}/generate: asked for {n} responses, got {_start(answer)}")
        return [self._parse(item) for item in items]

    async def healthy(self) -> bool:
        """Whether GET /health answers 200, for which SGLang's scheduler must be getting on. It may answer late, or never."""
        try:
            async with self._open_session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def abort(self) -> None:
        """Ends every request the server is working on, whoever sent it. Never raises: the server may be gone."""
        try:
            timeout = aiohttp.ClientTimeout(total=ABORT_TIMEOUT_S)
            async with self._open_session.post(
                f"{self.url}/abort_request", json={"abort_all": True}, timeout=timeout
            ) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError):
            pass

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "Engine.connect() comes first"
        return self._session

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, counts: Counter[str]) -> Any:
        url = self.url + path
        failure = ""
        for attempt in range(self._max_retries + 1):
            if attempt:
                counts["retried_requests"] += 1
                if self.process is not None:
                    self.process.check()
                await asyncio.sleep(min(FIRST_RETRY_DELAY_S * 2 ** (attempt - 1), MAX_RETRY_DELAY_S))
            try:
                async with self._open_session.request(method, url, json=body) as response:
                    if response.status == 200:
                        answer = await response.json(content_type=None, loads=parse_json)
                        if not _was_aborted(answer):
                            return answer
                        failure = "the request was aborted in the server, by another client"
                    else:
                        failure = f"HTTP {response.status}: {_start(await response.text(errors='replace'))}"
                        if response.status < 500 and response.status not in (408, 429):
                            raise EngineError(f"{url}: {failure}")
            except aiohttp.ConnectionTimeoutError:
                failure = f"no connection within {CONNECT_TIMEOUT_S} s"
            except TimeoutError:
                counts["timed_out_requests"] += 1
                failure = f"no answer within rollout.request_timeout_s = {self._timeout.total} s"
            except aiohttp.ClientError as error:
                failure = f"{type(error).__name__}: {error}"
            except ValueError as error:
                raise MalformedAnswerError(f"{url}: the answer is not JSON: {error}") from error
        if self.process is not None:
            self.process.check()
        raise EngineFaultError(
            f"{url}: failed {self._max_retries + 1} times (rollout.max_retries), the last time: {failure}"
        )

    def _parse(self, item: Any) -> Response:
        try:
            meta = item["meta_info"]
            reason, matched = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
            token_ids = item["output_ids"]
            logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
            logprob_ids = [entry[1] for entry in meta["output_token_logprobs"]]
            text = item["text"]
            versions = [span["version"] for span in meta.get("weight_versions", [])] or [meta["weight_version"]]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._malformed(f"{type(error).__name__} {error}", item) from error
        if not token_ids or token_ids != logprob_ids:
            raise self._malformed(
                f"{len(token_ids)} output_ids and {len(logprob_ids)} output_token_logprobs do not pair up", item
            )
        if not all(isinstance(value, float | int) and math.isfinite(value) for value in logprobs):
            raise self._malformed("a log-prob is not a finite number", item)
        if reason not in ("stop", "length") or (reason == "stop" and matched != token_ids[-1]):
            # SGLang also says "stop" when it met NaN, matched to a text.
            raise self._malformed(f"finish_reason {reason}, matched {matched!r}", item)
        if len(set(versions)) > 1:
            raise EngineError(f"{self.url}/generate: one response was generated by several weight versions: {versions}")
        return Response(token_ids, logprobs, text, reason, self._version(versions[0]))

    def _version(self, name: Any) -> int:
        if name == AS_STARTED:
            return 0
        try:
            return int(name)
        except (TypeError, ValueError):
            raise EngineError(
                f"{self.url}: weight_version = {name!r} is not a number. Fix: start the server without --weight-version"
            ) from None

    def _malformed(self, what: str, item: Any) -> MalformedAnswerError:
        return MalformedAnswerError(f"{self.url}/generate: malformed answer: {what}; it starts {_start(item)}")


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that a server started with --api-key demands."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _was_aborted(answer: Any) -> bool:
    items = answer if isinstance(answer, list) else [answer]
    try:
        return any(item["meta_info"]["finish_reason"]["type"] == "abort" for item in items)
    except (KeyError, TypeError):
        return False


def _start(body: Any) -> str:
    text = str(body)
    return text if len(text) <= 300 else f"{text[:300]}..."
