"""One SGLang server, as a client sees it: generation with log-probs, health, abort. All calls are asyncio."""

import asyncio
import itertools
from collections import Counter
from typing import Any, Protocol

import aiohttp

from megatron_gppo.config import SamplingConfig
from megatron_gppo.datatypes import Response
from megatron_gppo.http_calls import authorization
from megatron_gppo.rollout.json_answers import parse_json
from megatron_gppo.rollout.pieces import Piece, Staleness, UnusableItemError, parse_piece

CONNECT_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 5.0
FIRST_RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 30.0
BY_OTHERS = "the request was aborted in the server, by another client"


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
    after a disconnect, a time-out, an abort that no weight sync explains, or an HTTP status of 408, 429 or 5xx. process:
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
        self,
        prompt_ids: list[int],
        sampling: SamplingConfig,
        n: int,
        counts: Counter[str],
        staleness: Staleness | None = None,
    ) -> list[Response]:
        """n responses to one prompt, in one request: the server then computes the prompt once, and measured throughput
        of short responses is 1.5 times that of n requests.

        staleness: weight syncs may come meanwhile. Responses that one aborts go on where they stopped, in one request for
        all of them, by the weights that the server then has.

        Adds to counts "retried_requests", of these "timed_out_requests", and "carried_on_responses". Raises
        EngineFaultError when the engine has died, when retries are used up, and on a malformed answer; EngineError when it
        rejects the request.

        Cancelling it closes the connection, by which SGLang knows within seconds that the request is to be aborted: it
        gives names of its own to the n responses, so that no /abort_request could name them.
        """
        params = _sampling_params(sampling, n, sampling.max_response_tokens)
        pieces = await self._pieces({"input_ids": prompt_ids, "sampling_params": params}, n, counts, staleness)
        cut: set[int] = set()
        for times in itertools.count(1):
            aborted = [index for index, piece in enumerate(pieces) if piece.finish_reason == "abort"]
            if not aborted:
                break
            assert staleness is not None
            if times > staleness.versions:
                await self._before_retry(times - staleness.versions, "/generate", BY_OTHERS, counts)
            cut.update(aborted)
            counts["carried_on_responses"] += len(aborted)
            left = [sampling.max_response_tokens - len(pieces[index].token_ids) for index in aborted]
            body = {
                "input_ids": [prompt_ids + pieces[index].token_ids for index in aborted],
                "sampling_params": [_sampling_params(sampling, 1, max_new_tokens) for max_new_tokens in left],
            }
            rest = await self._pieces(body, len(aborted), counts, staleness)
            for index, piece in zip(aborted, rest, strict=True):
                pieces[index] = pieces[index].followed_by(piece)
        return [
            piece.response(staleness.decode(piece.token_ids) if staleness is not None and index in cut else piece.text)
            for index, piece in enumerate(pieces)
        ]

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

    async def _pieces(
        self, body: dict[str, Any], n: int, counts: Counter[str], staleness: Staleness | None
    ) -> list[Piece]:
        body = {**body, "return_logprob": True}
        answer = await self._request("POST", "/generate", body, counts, retry_aborted=staleness is None)
        items = answer if isinstance(answer, list) else [answer]  # SGLang answers one prompt with n = 1 by an object
        if len(items) != n:
            raise MalformedAnswerError(f"{self.url}/generate: asked for {n} responses, got {_start(answer)}")
        pieces = []
        for item in items:
            try:
                pieces.append(parse_piece(item))
            except UnusableItemError as error:
                raise MalformedAnswerError(
                    f"{self.url}/generate: malformed answer: {error}; it starts {_start(item)}"
                ) from error
        return pieces

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        counts: Counter[str],
        *,
        retry_aborted: bool = False,
    ) -> Any:
        url = self.url + path
        for attempt in itertools.count(1):
            try:
                async with self._open_session.request(method, url, json=body) as response:
                    if response.status == 200:
                        answer = await response.json(content_type=None, loads=parse_json)
                        if not (retry_aborted and _was_aborted(answer)):
                            return answer
                        failure = BY_OTHERS
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
            await self._before_retry(attempt, path, failure, counts)

    async def _before_retry(self, attempt: int, path: str, failure: str, counts: Counter[str]) -> None:
        """Waits after a failed attempt, numbered from 1. Raises EngineFaultError when it was the last, or the engine has died."""
        if self.process is not None:
            self.process.check()
        if attempt > self._max_retries:
            raise EngineFaultError(
                f"{self.url}{path}: failed {attempt} times (rollout.max_retries), the last time: {failure}"
            )
        counts["retried_requests"] += 1
        await asyncio.sleep(min(FIRST_RETRY_DELAY_S * 2 ** (attempt - 1), MAX_RETRY_DELAY_S))


def _was_aborted(answer: Any) -> bool:
    items = answer if isinstance(answer, list) else [answer]
    try:
        return any(item["meta_info"]["finish_reason"]["type"] == "abort" for item in items)
    except (KeyError, TypeError):
        return False


def _sampling_params(sampling: SamplingConfig, n: int, max_new_tokens: int) -> dict[str, Any]:
    """Every parameter that changes the distribution is spelled out: a server's defaults may come from the model's
    generation_config.json."""
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": max_new_tokens,
    }


def _start(body: Any) -> str:
    text = str(body)
    return text if len(text) <= 300 else f"{text[:300]}..."
