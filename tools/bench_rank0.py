"""What rank 0 does for everyone in a step, and what every rank does with what it gets: CPU seconds a response, and a step.

    python tools/bench_rank0.py [--tokens 16384] [--prompts 256] [--responses-per-prompt 16] [--dp 256] [--groups 4]

Measured on --groups groups, and counted up to the step: reading, parsing and checking the engines' answers (real HTTP,
canned answers in SGLang's form), handing responses to the reward workers (math-verify, whose own time is not rank 0's),
making samples, pickling them for the broadcast, the rollout's scalars; and unpickling and packing, on each of --dp
data-parallel ranks. CPU seconds of this process alone, so that what else the machine does counts little.

From that, in a model: how long answers are still parsed after the last one has been generated. A group is one request, and
arrives when its longest response is done; all groups are in flight from the start, and every sequence grows as fast.
"""

import argparse
import asyncio
import json
import logging
import math
import multiprocessing
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import NormalDist
from typing import Any, TypeVar

from aiohttp import web

from megatron_gppo.algorithm import samples_from_groups
from megatron_gppo.config import RewardConfig, RolloutConfig
from megatron_gppo.datatypes import Group, Prompt, Response, Rollout, Sample
from megatron_gppo.packing import pack_updates
from megatron_gppo.rollout.dispatch import Dispatcher
from megatron_gppo.rollout.hosts import ExternalHost
from megatron_gppo.rollout.pool import EnginePool
from megatron_gppo.rollout.rewards import Rewards
from megatron_gppo.scalars import rollout_scalars

PROMPT = Prompt(row=0, token_ids=list(range(512)), text="", ground_truth="42", data_source="benchmark")
CHARACTERS_PER_TOKEN = 3
VERSION = 7
TOKENS_PER_S = 100  # of a sequence
CUT_SHARE = 0.05  # of responses whose lengths are spread, at --tokens
LENGTH_SIGMA = 0.7  # of these lengths' logarithms
T = TypeVar("T")


def answer(tokens: int, draw: random.Random) -> dict[str, Any]:
    """One response as SGLang answers it."""
    ids = [draw.randrange(150_000) for _ in range(tokens)]
    thoughts = "so x = 17. " * (tokens * CHARACTERS_PER_TOKEN // 11)
    return {
        "text": f"{thoughts}</think>It is \\boxed{{{draw.choice([41, 42])}}}",
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": "length", "length": tokens},
            "weight_version": str(VERSION),
            "output_token_logprobs": [[-draw.expovariate(2.0), token, None] for token in ids],
        },
    }


def serve(body: bytes, connection: Connection) -> None:
    """A healthy server that gives every prompt the same answer. Tells its port, and ends with the process that started it."""

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    async def healthy(request: web.Request) -> web.Response:
        return web.Response()

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_route("*", "/{control:.*}", healthy)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        connection.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


def cpu_seconds(action: Callable[[], T]) -> tuple[float, T]:
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def read_groups(port: int, size: int, count: int) -> list[list[Response]]:
    config = RolloutConfig(responses_per_prompt=size)
    pool = EnginePool(config, [ExternalHost(config, f"http://127.0.0.1:{port}")], needs_weights=False)
    pool.wait_ready()
    groups: list[list[Response]] = []

    async def read(dispatcher: Dispatcher) -> None:
        groups.append(await dispatcher.generate(PROMPT.token_ids, config, size, VERSION, Counter()))

    async def read_all() -> None:
        dispatcher = Dispatcher(pool, config, concurrency=1)
        await dispatcher.all([read(dispatcher) for _ in range(count)])

    asyncio.run(read_all())
    return groups


def judge_groups(rewards: Rewards, groups: list[list[Response]]) -> list[Group]:
    async def judge_all() -> list[Group]:
        verdicts = await asyncio.gather(*(rewards.judge(PROMPT, responses) for responses in groups))
        return [Group(PROMPT, responses, of_group) for responses, of_group in zip(groups, verdicts, strict=True)]

    return asyncio.run(judge_all())


def pack_step(samples: list[Sample], prompts: int, size: int, tokens: int, dp: int) -> int:
    """Packs a whole step for one rank; returns its micro-batches."""
    step = [
        Sample(
            group=index // size,
            prompt_ids=sample.prompt_ids,
            response_ids=sample.response_ids,
            rollout_logprobs=sample.rollout_logprobs,
            advantage=sample.advantage,
            correct=sample.correct,
            masked=False,
        )
        for index, sample in enumerate(samples[index % len(samples)] for index in range(prompts * size))
    ]
    updates = pack_updates(
        step,
        groups_per_update=max(prompts // 8, 1),
        dp_rank=0,
        dp_size=dp,
        tokens_per_microbatch=tokens + 4096,
        alignment=8,
        sequence_alignment=1,
        microbatches_multiple_of=1,
    )
    return sum(len(update.microbatches) for update in updates)


def spread_lengths(tokens: int, count: int, draw: random.Random) -> list[int]:
    """Log-normal, cut at `tokens`."""
    mean_log = math.log(tokens) - LENGTH_SIGMA * NormalDist().inv_cdf(1 - CUT_SHARE)
    return [min(tokens, round(draw.lognormvariate(mean_log, LENGTH_SIGMA))) for _ in range(count)]


def seconds_after_generation(groups: list[list[int]], seconds_per_token: float) -> float:
    """How long rank 0 goes on parsing when the last of groups of such lengths has been generated."""
    now = 0.0
    for longest, tokens in sorted((max(lengths), sum(lengths)) for lengths in groups):
        now = max(now, longest / TOKENS_PER_S) + tokens * seconds_per_token
    return now - max(map(max, groups)) / TOKENS_PER_S


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Measure what rank 0 does for everyone in a step.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--responses-per-prompt", type=int, default=16)
    parser.add_argument("--dp", type=int, default=256)
    parser.add_argument("--groups", type=int, default=4, help="how many to measure on")
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    size, measured = arguments.responses_per_prompt, arguments.groups * arguments.responses_per_prompt
    draw = random.Random(0)
    body = json.dumps([answer(arguments.tokens, draw) for _ in range(size)]).encode()

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(body, sender), daemon=True)
    server.start()
    port = receiver.recv()
    try:
        read_groups(port, size, 1)  # imports and connections
        reading, responses = cpu_seconds(lambda: read_groups(port, size, arguments.groups))
    finally:
        server.kill()
        server.join()
    rewards = Rewards(RewardConfig(workers=2))
    try:
        judge_groups(rewards, responses[:1])  # starts the workers
        judging, groups = cpu_seconds(lambda: judge_groups(rewards, responses))
    finally:
        rewards.close()
    making, samples = cpu_seconds(lambda: samples_from_groups(groups))
    pickling, pickled = cpu_seconds(lambda: pickle.dumps(samples))
    logging_scalars, _ = cpu_seconds(lambda: rollout_scalars(VERSION + 1, Rollout(groups, {}, {})))
    unpickling, _ = cpu_seconds(lambda: pickle.loads(pickled))
    packing, microbatches = cpu_seconds(
        lambda: pack_step(samples, arguments.prompts, size, arguments.tokens, arguments.dp)
    )

    in_step = arguments.prompts * size
    print(f"a step of {arguments.prompts} x {size} responses of {arguments.tokens:,} tokens; CPU seconds")
    print(f"{'':<38}{'ms a response':>14}{'s a step':>10}")
    for name, seconds in (
        ("rank 0: answers read, parsed, checked", reading),
        ("rank 0: rewards handed out", judging),
        ("rank 0: samples made", making),
        ("rank 0: samples pickled", pickling),
        ("rank 0: scalars of the rollout", logging_scalars),
        ("every rank: samples unpickled", unpickling),
    ):
        print(f"{name:<38}{1000 * seconds / measured:>14.2f}{seconds / measured * in_step:>10.1f}")
    print(
        f"{'every rank: packing':<38}{1000 * packing / in_step:>14.2f}{packing:>10.1f}   ({microbatches} micro-batches)"
    )
    print(
        f"an answer has {len(body) / size / 1e6:.2f} MB a response, the broadcast {len(pickled) / measured / 1e6:.3f} MB: "
        f"{len(pickled) / measured * in_step / 1e9:.2f} GB a step"
    )
    print(f"of the reading, after the last token of the step, at {TOKENS_PER_S} tokens a second for a sequence:")
    for title, lengths in (
        (f"all responses of {arguments.tokens:,} tokens", [arguments.tokens] * in_step),
        (f"lengths spread, {CUT_SHARE:.0%} cut there", spread_lengths(arguments.tokens, in_step, draw)),
    ):
        step = [lengths[start : start + size] for start in range(0, in_step, size)]
        at_end = sum(max(of_group) == arguments.tokens for of_group in step) / len(step)
        per_token = reading / measured / arguments.tokens
        print(
            f"  {title:<36}{seconds_after_generation(step, per_token):>7.1f} of {per_token * sum(lengths):.1f} s; "
            f"mean {sum(lengths) / in_step:,.0f} tokens, {at_end:.0%} of the groups end last"
        )


if __name__ == "__main__":
    main()
