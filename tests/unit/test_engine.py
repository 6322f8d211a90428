"""What the client of an engine makes of answers, good and bad. The server here is a few lines of ours, not SGLang."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_gppo.config import SamplingConfig
from megatron_gppo.datatypes import Response
from megatron_gppo.rollout import engine as engine_module
from megatron_gppo.rollout.engine import Engine, EngineError
from megatron_gppo.rollout.pieces import Staleness

SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, max_response_tokens=8)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(token_ids: tuple[int, ...] = (8, 1), **meta: Any) -> dict[str, Any]:
    return {
        "text": "5",
        "output_ids": list(token_ids),
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": token_ids[-1] if token_ids else None},
            "weight_version": "4",
            "output_token_logprobs": [[-0.5, token, None] for token in token_ids],
            **meta,
        },
    }


ABORTED = {"finish_reason": {"type": "abort", "message": "Aborted"}}


def generate(
    handler: Handler,
    *,
    n: int = 2,
    timeout_s: float = 30.0,
    max_retries: int = 2,
    api_key: str | None = None,
    staleness: Staleness | None = None,
) -> tuple[list[Response], Counter[str]]:
    """Engine.generate against a server whose POST /generate is `handler`."""

    async def run() -> tuple[list[Response], Counter[str]]:
        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        engine = Engine(f"http://{host}:{port}/", api_key=api_key, timeout_s=timeout_s, max_retries=max_retries)
        await engine.connect()
        counts: Counter[str] = Counter()
        try:
            return await engine.generate([2, 3], SAMPLING, n, counts, staleness), counts
        finally:
            await engine.disconnect()
            await runner.cleanup()

    return asyncio.run(run())


def always(body: Any, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=body if isinstance(body, str) else json.dumps(body), status=status)

    return handler


def after(failures: list[web.Response | None], body: Any) -> Handler:
    """Answers with the failures first; None breaks the connection."""

    async def handler(request: web.Request) -> web.Response:
        if not failures:
            return web.json_response(body)
        if (failure := failures.pop(0)) is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return failure

    return handler


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_RETRY_DELAY_S", 0.001)


def test_reads_responses() -> None:
    items = [answer(), answer((7, 6, 5), finish_reason={"type": "length", "length": 3})]
    responses, counts = generate(always(items))
    assert responses == [
        Response([8, 1], [-0.5, -0.5], "5", "stop", [4, 4]),
        Response([7, 6, 5], [-0.5, -0.5, -0.5], "5", "length", [4, 4, 4]),
    ]
    assert not counts


def test_one_response_is_not_a_list() -> None:
    responses, _ = generate(always(answer()), n=1)
    assert len(responses) == 1


def test_weights_as_started_are_version_0() -> None:
    responses, _ = generate(always(answer(weight_version="default")), n=1)
    assert responses[0].policy_versions == [0, 0]


def test_sends_the_whole_sampling_configuration_and_the_key() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(await request.json(), authorization=request.headers["Authorization"])
        return web.json_response(answer())

    generate(handler, n=1, api_key="secret")
    assert seen == {
        "input_ids": [2, 3],
        "return_logprob": True,
        "authorization": "Bearer secret",
        "sampling_params": {
            "n": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 8,
        },
    }


@pytest.mark.parametrize(
    "failures",
    [
        [web.Response(status=500), web.Response(status=503)],
        [web.Response(status=429), web.Response(status=408)],
        [None, None],
        [web.json_response([answer(**ABORTED)] * 2), None],
    ],
    ids=["5xx", "4xx that pass", "disconnects", "aborted by somebody"],
)
def test_retries_and_counts(failures: list[web.Response | None]) -> None:
    responses, counts = generate(after(failures, [answer()] * 2))
    assert len(responses) == 2
    assert counts == {"retried_requests": 2}


def test_retries_are_bounded() -> None:
    with pytest.raises(EngineError, match=r"http://127.0.0.1:\d+/generate: failed 3 times .*HTTP 502: bad luck"):
        generate(always("bad luck", status=502))


def test_a_rejected_request_is_not_sent_again() -> None:
    failures: list[web.Response | None] = [web.Response(status=400, text="too long " * 100)]
    with pytest.raises(EngineError, match=r"/generate: HTTP 400: too long .*\.\.\.$"):
        generate(after(failures, [answer()] * 2))


def test_time_outs_are_counted_and_bounded() -> None:
    calls: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        calls.append(1)
        await asyncio.sleep(30)
        return web.Response()

    with pytest.raises(EngineError, match=r"failed 2 times .*no answer within rollout.request_timeout_s = 0.2 s"):
        generate(handler, timeout_s=0.2, max_retries=1)
    assert len(calls) == 2


def test_nobody_listens() -> None:
    async def run() -> None:
        engine = Engine("http://127.0.0.1:1", max_retries=1)
        await engine.connect()
        try:
            await engine.model_info()
        finally:
            await engine.disconnect()

    with pytest.raises(EngineError, match=r"http://127.0.0.1:1/model_info: failed 2 times .*ClientConnectorError"):
        asyncio.run(run())


def spans(*bounds: tuple[int, int, int]) -> dict[str, Any]:
    """An answer of two tokens with these (version, start, end)."""
    return answer(weight_versions=[{"version": str(v), "start": start, "end": end} for v, start, end in bounds])


def test_tokens_have_the_versions_of_their_spans() -> None:
    """What a server says that paused, got new weights, and went on."""
    responses, _ = generate(always(spans((3, 0, 1), (5, 1, 2))), n=1)
    assert responses[0].policy_versions == [3, 5]


class Cutting:
    """A server that aborts what it generates, as often as `cuts` says, after three tokens more each time (the first time
    in the queue, without a token), and has newer weights after each."""

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        version = str(len(self.bodies))
        if len(self.bodies) > self.cuts:
            count = (
                len(body["input_ids"]) if isinstance(body["sampling_params"], list) else body["sampling_params"]["n"]
            )
            return web.json_response([answer(weight_version=version)] * count)
        if len(self.bodies) == 1:  # one of three is complete
            return web.json_response([answer((), **ABORTED), answer(weight_version=version), answer((), **ABORTED)])
        return web.json_response([answer((5, 6, 7), weight_version=version, **ABORTED)] * 2)


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_what_a_weight_sync_cuts_goes_on_where_it_stopped(cuts: int) -> None:
    server = Cutting(cuts)
    responses, counts = generate(server, n=3, staleness=Staleness(cuts, lambda token_ids: f"text of {token_ids}"))
    assert counts == {"carried_on_responses": 2 * cuts}
    # The last token of an aborted piece is drawn anew: it may be an EOS.
    kept = [5, 6] * (cuts - 1)
    versions = [version for version in range(2, cuts + 1) for _ in range(2)] + [cuts + 1] * 2
    for response in (responses[0], responses[2]):
        assert response == Response([*kept, 8, 1], [-0.5] * (2 * cuts), f"text of {[*kept, 8, 1]}", "stop", versions)
    assert responses[1] == Response([8, 1], [-0.5, -0.5], "5", "stop", [1, 1])
    for number, body in enumerate(server.bodies[1:]):
        assert body["input_ids"] == [[2, 3] + [5, 6] * number] * 2
        assert [params["max_new_tokens"] for params in body["sampling_params"]] == [8 - 2 * number] * 2
        assert all(params["n"] == 1 and params["temperature"] == 0.7 for params in body["sampling_params"])
        assert body["return_logprob"]


def test_aborts_that_no_sync_explains_are_retries_and_bounded() -> None:
    responses, counts = generate(Cutting(3), n=3, staleness=Staleness(1, str))
    assert len(responses) == 3
    assert counts == {"carried_on_responses": 6, "retried_requests": 2}
    with pytest.raises(EngineError, match=r"/generate: failed 3 times .*the request was aborted in the server"):
        generate(Cutting(100), n=3, staleness=Staleness(1, str))


def without(key: str) -> dict[str, Any]:
    item = answer()
    del item["meta_info"][key]
    return item


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (without("output_token_logprobs"), "malformed answer: KeyError 'output_token_logprobs'"),
        (without("finish_reason"), "malformed answer: KeyError 'finish_reason'"),
        (answer(finish_reason=None), "malformed answer: TypeError"),
        (answer(output_token_logprobs=[[-0.5, 8, None]]), "2 output_ids and 1 output_token_logprobs do not pair up"),
        (answer(output_token_logprobs=[[-0.5, 8, None], [-0.5, 9, None]]), "do not pair up"),
        (answer(()), "0 output_ids and 0 output_token_logprobs"),
        (answer(output_token_logprobs=[[-0.5, 8, None], [float("nan"), 1, None]]), "the answer is not JSON"),
        (answer(output_token_logprobs=[[-0.5, 8, None], [None, 1, None]]), "not a finite number"),  # SGLang's NaN
        (answer(finish_reason={"type": "stop", "matched": "NaN happened"}), "finish_reason stop, matched 'NaN happened'"),
        (spans((3, 0, 1), (4, 1, 3)), "malformed answer: weight_versions = .* are not of 2 tokens"),
        (spans((3, 0, 1)), "are not of 2 tokens"),
        (spans((3, 1, 2)), "are not of 2 tokens"),
        (answer(weight_version="mine"), "weight_version = 'mine' is not a number"),
        ({"error": "odd"}, "malformed answer: KeyError 'meta_info'; it starts {'error': 'odd'}"),
        ([answer()] * 3, "asked for 1 responses"),
        (["text"], "malformed answer: TypeError"),
    ],
)  # fmt: skip
def test_malformed_answers_are_errors(item: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        generate(always(item), n=1)


@pytest.mark.parametrize("body", [[answer()] * 3, answer()])
def test_a_wrong_number_of_responses_is_an_error(body: Any) -> None:
    with pytest.raises(EngineError, match="asked for 2 responses"):
        generate(always(body))


def test_an_answer_that_is_not_json_is_an_error() -> None:
    with pytest.raises(EngineError, match="the answer is not JSON"):
        generate(always("<html>"))


def test_the_death_of_a_managed_server_is_reported_instead_of_retried() -> None:
    class Dead:
        def check(self) -> None:
            raise EngineError("the SGLang server ended with status 137")

    async def run() -> None:
        engine = Engine("http://127.0.0.1:1", max_retries=100, process=Dead())
        await engine.connect()
        try:
            await engine.model_info()
        finally:
            await engine.disconnect()

    with pytest.raises(EngineError, match="ended with status 137"):
        asyncio.run(run())
