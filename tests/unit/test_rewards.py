import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_gppo.config import RewardConfig
from megatron_gppo.datatypes import Prompt, Response, Verdict
from megatron_gppo.rollout.answers import last_boxed
from megatron_gppo.rollout.reward_pool import RewardError
from megatron_gppo.rollout.rewards import Rewards

# What users' modules look like to a worker. The response says what to do.
USER_MODULE = """
import os, subprocess, sys, time

def length(response, ground_truth, data_source):
    return float(len(response))

def same(response, ground_truth, data_source):
    return response == ground_truth

def obey(response, ground_truth, data_source):
    if response == "sleep":
        time.sleep(1000)
    elif response == "hang in C":
        9**9**9
    elif response == "exit":
        os._exit(3)
    elif response == "raise":
        raise KeyError("a mistake of the user's")
    elif response == "pid":
        return os.getpid()
    elif response == "start a child":
        return subprocess.Popen(["sleep", "1000"]).pid
    elif response == "sleep noting pid":
        with open(data_source, "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(1000)
    elif response == "hang in C noting pid":
        with open(data_source, "a") as file:
            file.write(f"{os.getpid()}\\n")
        9**9**9
    elif response in ("nan", "inf"):
        return float(response)
    elif response == "none":
        return None
    elif response == "print":
        print("a reward function may print")
    return 1.0

def modules(response, ground_truth, data_source):
    return response in sys.modules

def too_few(response):
    return 1.0

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    (tmp_path / "user_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "user_exits.py").write_text("import sys; sys.exit(7)")
    monkeypatch.syspath_prepend(tmp_path)


def prompt(ground_truth: str = "12", data_source: str = "test") -> Prompt:
    return Prompt(row=5, token_ids=[1], text="?", ground_truth=ground_truth, data_source=data_source)


def response(text: str) -> Response:
    return Response(token_ids=[1], logprobs=[0.0], text=text, finish_reason="stop", policy_versions=[0])


def judge(pool: Rewards, texts: list[str], ground_truth: str = "12", data_source: str = "test") -> list[Verdict]:
    return asyncio.run(pool.judge(prompt(ground_truth, data_source), [response(text) for text in texts]))


def user_pool(function: str, **config: float) -> Rewards:
    return Rewards(RewardConfig(function=f"user_rewards:{function}", **config))


@pytest.fixture
def obedient():
    pool = user_pool("obey", workers=2, timeout_s=2.0, incorrect=-1.0)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{12}.", "12"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{3}}", "\\boxed{3}"),
        ("} { \\boxed{4} {", "4"),
        ("\\\\\\boxed{5}", "5"),
        ("\\boxed{6} then cut off: \\boxed{8", "6"),
        ("\\boxed{}", ""),
        ("\\boxed{", None),
        ("boxed{9}", None),
        ("12", None),
        ("", None),
        ("\\boxed{" * 200_000, None),
        ("\\boxed{" * 200_000 + "1" + "}" * 3, "\\boxed{\\boxed{1}}"),
    ],
)
def test_last_boxed(text: str, content: str | None):
    assert last_boxed(text) == content


def test_math_verify_judges_the_last_box():
    cases = [
        # ground truth, response, correct, outcome
        ("12", "I think \\boxed{12}", True, "scored"),
        ("12", "I think \\boxed{12.}", True, "scored"),
        ("12", "\\boxed{12}, no, \\boxed{13}", False, "scored"),
        ("12", "\\boxed{13}, no, $\\boxed{12}$", True, "scored"),
        ("\\frac{1}{2}", "\\boxed{0.5}", True, "scored"),
        ("$\\frac{1}{2}$", "\\boxed{\\dfrac12}", True, "scored"),
        ("\\boxed{4}", "\\boxed{2+2}", True, "scored"),
        ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}", True, "scored"),
        ("1234", "\\boxed{1,234}", True, "scored"),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True, "scored"),
        ("x^2-1", "\\boxed{(x-1)(x+1)}", True, "scored"),
        ("x^2-1", "\\boxed{(x-1)(x+2)}", False, "scored"),
        ("\\text{Tuesday}", "\\boxed{\\text{Monday}}", False, "scored"),
        ("\\frac{", "\\boxed{\\frac{}", False, "unparsable"),
        ("\\sqrt{2}+", "\\boxed{\\sqrt{2}+}", True, "scored"),  # the same text, LaTeX or not
        ("\\sqrt{2}+", "\\boxed{2}", False, "unparsable"),  # the ground truth
        ("12", "\\boxed{\\sqrt{2}+}", False, "unparsable"),
        ("12", "the answer is 12", False, "unparsable"),
        ("12", "\\boxed{}", False, "unparsable"),
        ("12", "\\boxed{1", False, "unparsable"),
        ("12", "", False, "unparsable"),
        ("12", "\udcff \\boxed{12}", True, "scored"),
        ("12", "\\boxed{\\input{/etc/passwd}}", False, "unparsable"),
        ("12", "\\boxed{__import__('os')._exit(0)}", False, "unparsable"),
        ("\\frac{1}{0}", "\\boxed{12}", False, "crash"),  # SymPy raises
    ]

    async def judge_all(pool: Rewards) -> list[list[Verdict]]:
        return await asyncio.gather(*(pool.judge(prompt(truth), [response(text)]) for truth, text, _, _ in cases))

    pool = Rewards(RewardConfig(correct=2.0, incorrect=-1.0, timeout_s=60.0))
    try:
        verdicts = asyncio.run(judge_all(pool))
    finally:
        pool.close()
    for (truth, text, correct, outcome), verdict in zip(cases, verdicts, strict=True):
        (found,) = verdict
        assert (found.reward, found.correct, found.outcome) == (2.0 if correct else -1.0, correct, outcome), (
            truth,
            text,
        )


def test_a_hang_in_sympy_is_killed_and_the_pool_goes_on(caplog: pytest.LogCaptureFixture):
    pool = Rewards(RewardConfig(workers=1, timeout_s=6.0))
    try:
        verdicts = judge(
            pool, ["\\boxed{12}", "\\boxed{\\sum_{k=1}^{1000000000} \\frac{1}{k}}", "\\boxed{11+1}", "\\boxed{13}"]
        )
        assert verdicts == [
            Verdict(1.0, True, "scored", "12"),
            Verdict(0.0, False, "timeout"),
            Verdict(1.0, True, "scored", "11+1"),
            Verdict(0.0, False, "scored", "13"),
        ]
    finally:
        pool.close()
    assert "prompt row 5" in caplog.text
    assert "sum_{k=1}^{1000000000}" in caplog.text


def test_an_unparsable_ground_truth_is_logged_and_an_unparsable_answer_is_not(caplog: pytest.LogCaptureFixture):
    pool = Rewards(RewardConfig(workers=1, timeout_s=60.0))
    try:
        judge(pool, ["no box"])
        assert not caplog.records
        judge(pool, ["\\boxed{2}"], ground_truth="\\sqrt{2}+")
        assert "the ground truth '\\\\sqrt{2}+' cannot be parsed" in caplog.text
    finally:
        pool.close()


def test_verdicts_are_in_order_from_one_event_loop_after_another():
    pool = user_pool("length", workers=2)
    try:
        for _ in range(3):
            lengths = [(7 * index) % 50 for index in range(200)]
            verdicts = judge(pool, ["x" * length for length in lengths])
            assert [verdict.reward for verdict in verdicts] == lengths
        assert judge(pool, []) == []
        assert judge(pool, ["x" * 3_000_000] * 3) == [Verdict(3e6, True, "scored")] * 3
    finally:
        pool.close()


def test_a_float_is_the_reward_and_a_bool_chooses_one():
    pool = user_pool("length", workers=1, correct_above=2.0)
    assert judge(pool, ["xx", "xxx"]) == [Verdict(2.0, False, "scored"), Verdict(3.0, True, "scored")]
    pool.close()
    pool = user_pool("same", workers=1, correct=5.0, incorrect=-1.0)
    assert judge(pool, ["12", "13"]) == [Verdict(5.0, True, "scored"), Verdict(-1.0, False, "scored")]
    pool.close()


def test_every_way_to_fail_is_told_apart_and_costs_no_other_response(obedient: Rewards):
    texts = ["fine", "sleep", "print", "exit", "fine", "raise", "nan", "inf", "none", "hang in C", "exit", "fine"]
    outcomes = {"fine": "scored", "print": "scored", "sleep": "timeout", "hang in C": "timeout"}
    for _ in range(2):
        verdicts = judge(obedient, texts)
        assert [verdict.outcome for verdict in verdicts] == [outcomes.get(text, "crash") for text in texts]
        for verdict in verdicts:
            assert verdict.correct == (verdict.outcome == "scored")
            assert verdict.reward == (1.0 if verdict.correct else -1.0)


def test_the_first_traceback_is_logged_and_only_that(obedient: Rewards, caplog: pytest.LogCaptureFixture):
    judge(obedient, ["raise", "raise"])
    judge(obedient, ["raise"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "a mistake of the user's" in record.getMessage()
    assert "Traceback" in record.getMessage()


def test_signals_meant_for_the_trainer_leave_a_worker_alone():
    pool = user_pool("obey", workers=1)
    try:
        pid = judge(pool, ["pid"])[0].reward
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(int(pid), number)
            assert judge(pool, ["pid"])[0] == Verdict(pid, True, "scored")
        assert os.getpgid(int(pid)) != os.getpgid(0)  # the terminal's Ctrl-C goes to a group
    finally:
        pool.close()


def test_a_worker_killed_while_idle_is_replaced():
    pool = user_pool("obey", workers=1)
    try:
        pid = judge(pool, ["pid"])[0].reward
        os.kill(int(pid), signal.SIGKILL)
        outcomes = [verdict.outcome for verdict in judge(pool, ["fine", "fine"])]
        assert outcomes == ["crash", "scored"]
    finally:
        pool.close()


def test_a_worker_that_cannot_be_started_again_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch):
    pool = user_pool("obey", workers=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/python")
            assert judge(pool, ["exit"])[0].outcome == "crash"
            with pytest.raises(FileNotFoundError):
                judge(pool, ["fine"])
            with pytest.raises(FileNotFoundError):
                user_pool("obey", workers=2)
    finally:
        pool.close()


def test_a_worker_loads_neither_torch_nor_megatron():
    pool = user_pool("modules", workers=1)
    try:
        modules = ["user_rewards", "torch", "numpy", "megatron", "transformers", "megatron_gppo.datatypes"]
        assert [verdict.correct for verdict in judge(pool, modules)] == [True] + [False] * 5
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("user_rewards", ["package.module:function"]),
        ("user_rewards:", ["package.module:function"]),
        (":length", ["package.module:function"]),
        ("no_such_module:reward", ["importing no_such_module failed", "PYTHONPATH", "ModuleNotFoundError"]),
        ("user_broken:reward", ["importing user_broken failed", "a_module_that_is_not_there"]),
        ("user_exits:reward", ["exit status 7"]),
        ("user_rewards:lenght", ["no function lenght"]),
        ("user_rewards:not_a_function", ["no function not_a_function"]),
        ("user_rewards:too_few", ["(response, ground_truth, data_source)"]),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_the_start(function: str, words: list[str]):
    with pytest.raises(RewardError) as refusal:
        Rewards(RewardConfig(function=function))
    for word in [f"reward.function = {function}", "Fix:", *words]:
        assert word in str(refusal.value)
    assert not reward_workers(os.getpid())


def test_a_cancelled_judge_leaves_the_pool_usable(obedient: Rewards):
    async def cancel() -> None:
        task = asyncio.create_task(obedient.judge(prompt(), [response("sleep")] * 2 + [response("fine")] * 20))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert [verdict.outcome for verdict in judge(obedient, ["fine"] * 4)] == ["scored"] * 4


def test_close_ends_every_process_even_hanging_ones_and_what_they_started(tmp_path: Path):
    pool = user_pool("obey", workers=2, timeout_s=1000.0)
    noted = tmp_path / "pids"
    child = psutil.Process(int(judge(pool, ["start a child"])[0].reward))

    async def close_while_judging() -> None:
        hanging = [response("hang in C noting pid"), response("sleep noting pid"), response("fine")]
        task = asyncio.create_task(pool.judge(prompt(data_source=str(noted)), hanging))
        while not noted.exists() or len(noted.read_text().split()) < 2:
            await asyncio.sleep(0.01)
        workers = reward_workers(os.getpid())
        assert len(workers) == 2
        pool.close()
        assert not any(worker.is_running() for worker in workers)
        with pytest.raises(RewardError, match="closed"):
            await task
        with pytest.raises(RuntimeError, match="closed"):
            await pool.judge(prompt(), [response("fine")])

    asyncio.run(close_while_judging())
    wait_until_gone([child])
    pool.close()  # a second time does nothing


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path):
    noted = tmp_path / "pids"
    trainer = subprocess.Popen(
        [sys.executable, "-c", KILLED_TRAINER, str(noted)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while not noted.exists() or len(noted.read_text().split()) < 2:
        assert trainer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = reward_workers(trainer.pid)
    assert len(workers) == 3  # two that hang and an idle one
    trainer.kill()
    trainer.wait()
    wait_until_gone(workers)


KILLED_TRAINER = """
import asyncio, sys
from megatron_gppo.config import RewardConfig
from megatron_gppo.datatypes import Prompt, Response
from megatron_gppo.rollout.rewards import Rewards

pool = Rewards(RewardConfig(function="user_rewards:obey", workers=3, timeout_s=1000.0))
prompt = Prompt(0, [1], "?", "12", sys.argv[1])
responses = [Response([1], [0.0], f"{how} noting pid", "stop", [0]) for how in ("hang in C", "sleep")]
asyncio.run(pool.judge(prompt, responses))
"""


def reward_workers(trainer: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(trainer).children() if "reward_worker" in " ".join(child.cmdline())]


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """A killed orphan stays a zombie where no init reaps it: that counts as gone."""
    deadline = time.monotonic() + 60
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} is still there"
            time.sleep(0.05)
