"""The process that judges responses for a RewardPool. reward_protocol.py says how the two talk.

This module and what it imports stay free of torch and of the rest of the package, so that a worker is up in about a
second and takes some 60 MB. Time limits are the pool's: it kills a worker that takes too long. Only what is awaited is
given up here, because its worker lives on.
"""

import asyncio
import ctypes
import functools
import importlib
import inspect
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from megatron_gppo.rollout.reward_protocol import MAX_DETAIL_CHARACTERS, FunctionSpec, Judgement, Question

MATH_VERIFY = "math_verify"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MIB = 2**20

Judge = functools.partial[Iterator[tuple[int, Judgement]]]  # takes list[Question]


def serve(handle: int, spec: FunctionSpec) -> None:
    """Runs the worker on the connection with this file descriptor until its other end is closed."""
    _outlive_signals_but_not_the_trainer()
    if spec.memory_mb is not None:
        # What the process allocates, and not address space: that a library reserves without using it does not count.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = spec.memory_mb * MIB if hard == resource.RLIM_INFINITY else min(spec.memory_mb * MIB, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    connection = Connection(handle)
    judge = _load(spec)
    if isinstance(judge, str):
        connection.send(judge)
        return
    try:
        connection.send(judge.func is _one_by_one)
        while True:
            for answer in judge(connection.recv()):
                connection.send(answer)
    except (EOFError, OSError):
        pass  # the pool was closed, or the trainer is gone


def _outlive_signals_but_not_the_trainer() -> None:
    # Ctrl-C and a scheduler's SIGTERM mean the trainer, which may still need verdicts to finish its step. Handlers that
    # do nothing rather than SIG_IGN, which programs that a reward function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The closed connection ends a worker that waits. One that hangs, perhaps inside C code, would never notice.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _load(spec: FunctionSpec) -> Judge | str:
    """The reward function, ready to be called at full speed, or why there is none."""
    if spec.function == MATH_VERIFY:
        try:
            from megatron_gppo.rollout.math_reward import MathReward
        except ImportError as error:
            return f"math-verify cannot be imported ({error}). Fix: pip install math-verify"
        return functools.partial(_one_by_one, MathReward(spec.scope, spec.after_think))
    module_name, colon, attribute = spec.function.partition(":")
    if not (module_name and colon and attribute):
        return "not of the form package.module:function. Fix: write it so, or math_verify"
    try:
        module = importlib.import_module(module_name)
    except Exception:
        return (
            f"importing {module_name} failed. Fix: mend the module, or put its folder on PYTHONPATH\n"
            + traceback.format_exc()
        )
    function = getattr(module, attribute, None)
    if not callable(function):
        return f"{module.__name__} has no function {attribute}. Fix: correct the name"
    try:
        inspect.signature(function).bind("response", "ground truth", "data source")
    except (TypeError, ValueError) as error:
        return f"it cannot be called with (response, ground_truth, data_source): {error}. Fix: take these three"
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if spec.batched:
        call = functools.partial(_awaited, asyncio.Runner(), function) if is_async else function
        return functools.partial(_batch, call)
    if is_async:
        return functools.partial(_concurrently, asyncio.Runner(), function, spec.timeout_s)
    return functools.partial(_one_by_one, functools.partial(_call, function))


def _one_by_one(judge: Callable[[Question], Judgement], questions: list[Question]) -> Iterator[tuple[int, Judgement]]:
    for index, question in enumerate(questions):
        yield index, judge(question)


def _call(function: Callable[..., Any], question: Question) -> Judgement:
    try:
        return _scored(function(*question))
    except Exception:
        return _crash()


def _batch(function: Callable[..., Any], questions: list[Question]) -> Iterator[tuple[int, Judgement]]:
    """A batch that fails as a whole is judged again one by one, so that only those that are to blame are lost."""
    try:
        scores = list(function(*(list(column) for column in zip(*questions, strict=True))))
        if len(scores) != len(questions):
            raise ValueError(f"the reward function returned {len(scores)} scores for {len(questions)} responses")
        judgements = [_checked(score) for score in scores]
    except Exception:
        if len(questions) == 1:
            judgements = [_crash()]
        else:
            for index, question in enumerate(questions):
                yield from ((index, judgement) for _, judgement in _batch(function, [question]))
            return
    yield from enumerate(judgements)


def _awaited(runner: asyncio.Runner, function: Callable[..., Awaitable[Any]], *columns: list[str]) -> Any:
    async def call() -> Any:
        return await function(*columns)

    return runner.run(call())


def _concurrently(
    runner: asyncio.Runner,
    function: Callable[..., Awaitable[Any]],
    timeout_s: float,
    questions: list[Question],
) -> Iterator[tuple[int, Judgement]]:
    """Each judgement is passed on when it is there, though the others are still awaited."""

    async def judge(index: int, question: Question) -> tuple[int, Judgement]:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return index, _scored(await function(*question))
        except Exception:
            return index, Judgement("timeout") if limit.expired() else _crash()

    async def first_of(tasks: set[asyncio.Task[tuple[int, Judgement]]]) -> set[asyncio.Task[tuple[int, Judgement]]]:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done

    async def start() -> set[asyncio.Task[tuple[int, Judgement]]]:
        return {asyncio.create_task(judge(index, question)) for index, question in enumerate(questions)}

    tasks = runner.run(start())
    while tasks:
        done = runner.run(first_of(tasks))
        tasks -= done
        yield from (task.result() for task in done)


def _checked(score: Any) -> Judgement:
    try:
        return _scored(score)
    except Exception:
        return _crash()


def _scored(score: Any) -> Judgement:
    """Raises when the score is neither a finite number nor a bool."""
    score = score.item() if hasattr(score, "item") else score  # NumPy and torch scalars
    if not isinstance(score, bool):
        score = float(score)
        if score != score or abs(score) == float("inf"):
            raise ValueError(f"the reward function returned {score}; it must return a finite number or a bool")
    return Judgement("scored", score)


def _crash() -> Judgement:
    """Of the exception that is being handled."""
    return Judgement("crash", detail=traceback.format_exc()[-MAX_DETAIL_CHARACTERS:])
