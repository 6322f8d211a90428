"""Recorded rollouts come back exactly, and what is wrong with a recording is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gppo.datatypes import Group, Prompt, Response, Rollout, Verdict
from megatron_gppo.rollout.generate import RolloutCancelled, RolloutError
from megatron_gppo.rollout.record import RecordingRollouts, ReplayRollouts

finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=4)
any_text = st.text(st.characters(codec=None))  # lone surrogates included


@st.composite
def responses(draw: st.DrawFn) -> Response:
    token_ids = draw(ids)
    logprobs = draw(st.lists(finite, min_size=len(token_ids), max_size=len(token_ids)))
    reason = draw(st.sampled_from(["stop", "length"]))
    versions = draw(st.lists(st.integers(0, 10**6), min_size=len(token_ids), max_size=len(token_ids)))
    return Response(token_ids, logprobs, draw(any_text), reason, versions)  # type: ignore[arg-type]


prompts = st.builds(Prompt, st.integers(0, 10**9), ids, any_text, any_text, any_text)
verdicts = st.builds(Verdict, finite, st.booleans(), st.sampled_from(["scored", "unparsable", "timeout", "crash"]))
groups = st.builds(Group, prompts, st.lists(responses(), max_size=2), st.lists(verdicts, max_size=2))
rollouts = st.builds(
    Rollout,
    st.lists(groups, max_size=3),
    st.dictionaries(st.text(), st.integers(), max_size=2),
    st.dictionaries(st.text(), finite, max_size=2),
    st.integers(0, 10**6),
)


class Source:
    def __init__(self, *rollouts: Rollout) -> None:
        self.rollouts = list(rollouts)
        self.cancelled = False

    def next(self, step: int, policy_version: int) -> Rollout:
        return self.rollouts[step]

    def cancel(self) -> None:
        self.cancelled = True


def small() -> Rollout:
    prompt = Prompt(3, [5, 14], "2+", "5", "sums")
    response = Response([8, 1], [-0.1, -1e-30], "5\n\u2028\r", "stop", [2, 3])
    return Rollout(
        [Group(prompt, [response], [Verdict(1.0, True, "scored")])] * 3, {"dropped_groups": 1}, {"reward": 0.1}
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rollout=rollouts)
def test_replay_is_exact(tmp_path: Path, rollout: Rollout) -> None:
    recording = RecordingRollouts(Source(rollout), tmp_path)
    assert recording.next(0, 0) == rollout
    replayed = ReplayRollouts(tmp_path).next(0, 0)
    assert repr(replayed) == repr(rollout)  # tells -0.0 from 0.0, which == does not


def test_a_step_has_one_file_and_recording_again_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for rollout in (Rollout([], {}, {}), small()):
        RecordingRollouts(Source(rollout), folder).next(0, 0)
    assert [path.name for path in folder.iterdir()] == ["step_000000.jsonl"]
    assert ReplayRollouts(folder).next(0, 0) == small()


def test_a_missing_step_is_an_error(tmp_path: Path) -> None:
    replay = ReplayRollouts(tmp_path)
    with pytest.raises(RolloutError, match=r"step 0 is not recorded: rollout.replay = .* has no recorded steps"):
        replay.next(0, 0)
    recording = RecordingRollouts(Source(small(), small()), tmp_path)
    recording.next(0, 0)
    recording.next(1, 1)
    with pytest.raises(RolloutError, match=r"step 2 is not recorded.*step_000000.jsonl to step_000001.jsonl"):
        replay.next(2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged|holds [012] of 3 groups"),
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "holds 2 of 3 groups"),
        (lambda data: b"", "damaged"),
        (lambda data: data.replace(b'"format": 2', b'"format": 99'), "format 99, this version reads 2"),
        (lambda data: data.replace(b'"logprobs"', b'"log_probs"'), "damaged"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    RecordingRollouts(Source(small()), tmp_path).next(0, 0)
    path = tmp_path / "step_000000.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RolloutError, match=message):
        ReplayRollouts(tmp_path).next(0, 0)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the rollout cannot be recorded. Fix: .*rollout.record"):
        RecordingRollouts(Source(small()), tmp_path / "file").next(0, 0)


def test_cancel() -> None:
    source = Source()
    RecordingRollouts(source, Path("unused")).cancel()
    assert source.cancelled
    replay = ReplayRollouts(Path("unused"))
    replay.cancel()
    with pytest.raises(RolloutCancelled):
        replay.next(0, 0)
