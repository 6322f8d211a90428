"""Output folders: nothing of the user's is removed, and what an ended run says of them is true."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from megatron_gppo.convert import ConvertError, convert_hf_to_megatron, describe_hf_to_megatron
from megatron_gppo.convert import output_folder as folders
from megatron_gppo.convert.command_line import run
from megatron_gppo.convert.output_folder import check_output, output_folder
from tests.support.conversion import make

DEAD = 2**22 + 1  # beyond the largest process id


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write(output: Path, source: Path, *, overwrite: bool = False) -> str:
    with output_folder(output, source, 0, overwrite) as folder:
        (folder / "new").write_text("new")
    return "done"


def in_use(output: Path) -> Path:
    output.mkdir(parents=True)
    (output / "precious").write_text("data")
    return output


def refuse_to_remove(monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException) -> None:
    """Folders of one kind cannot be removed, as another user's."""
    remove = shutil.rmtree

    def rmtree(path: Path, *args: object, **options: object) -> None:
        if kind in Path(path).name:
            raise error
        remove(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_a_replaced_folder_that_cannot_be_removed_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = in_use(tmp_path / "out" / "m")
    refuse_to_remove(monkeypatch, "replaced", PermissionError(13, "Permission denied", "precious"))
    write(output, source, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["new"]
    (replaced,) = [path for path in output.parent.iterdir() if path != output]
    assert caplog.messages == [f"{replaced}: Permission denied, so it is left there. Fix: remove it"]

    caplog.clear()  # and a later run says so again
    replaced.rename(replaced.with_name(f".m.replaced-{socket.gethostname()}-{DEAD}"))
    write(output, source, overwrite=True)
    assert f"-{DEAD}: Permission denied, so it is left there. Fix: remove it" in caplog.text


def test_what_a_killed_run_left_and_cannot_be_removed_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = in_use(tmp_path / "out" / f".m.incomplete-{socket.gethostname()}-{DEAD}")
    refuse_to_remove(monkeypatch, "incomplete", PermissionError(13, "Permission denied", "precious"))
    write(tmp_path / "out" / "m", source)
    assert caplog.messages == [f"{leftover}: Permission denied, so it is left there. Fix: remove it"]


def test_an_interruption_after_the_rename_says_that_the_output_is_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = in_use(tmp_path / "out" / "m")
    refuse_to_remove(monkeypatch, "replaced", KeyboardInterrupt())
    assert run(lambda: write(output, source, overwrite=True), str(output)) == 130
    assert [path.name for path in output.iterdir()] == ["new"]
    (replaced,) = [path for path in output.parent.iterdir() if path != output]
    assert capsys.readouterr().err == (
        f"interrupted: {output} is complete, but {replaced}, which it replaced, may be left. Fix: remove that one\n"
    )


@pytest.mark.parametrize(("at", "complete"), [(1, False), (2, True)])
def test_an_interruption_at_a_rename_leaves_one_or_the_other_and_says_which(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
    complete: bool,
) -> None:
    """Python raises KeyboardInterrupt when the rename has been done."""
    output, rename, count = in_use(tmp_path / "out" / "m"), Path.rename, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        renamed = rename(path, target)
        if count == at:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    assert run(lambda: write(output, source, overwrite=True), str(output)) == 130
    assert [path.name for path in output.iterdir()] == (["new"] if complete else ["precious"])
    errors = capsys.readouterr().err
    assert errors.startswith(f"interrupted: {output} is {'complete, but ' if complete else 'as it was. Fix: run'}")
    left = [path for path in output.parent.iterdir() if path != output]
    assert [str(path) in errors for path in left] == ([True] if complete else [])


def test_an_error_after_the_rename_says_that_the_output_is_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, sync = tmp_path / "out" / "m", folders._sync

    def broken(path: Path) -> None:
        if path == output.parent:
            raise OSError(5, "Input/output error", str(path))
        sync(path)

    monkeypatch.setattr(folders, "_sync", broken)
    with pytest.raises(ConvertError, match=r"Input/output error. .*/out/m is complete. Fix: "):
        write(output, source)
    assert (output / "new").exists()


@pytest.mark.parametrize("when", ["before", "during"])
def test_files_that_appear_during_the_run_are_kept(source: Path, tmp_path: Path, when: str) -> None:
    output = tmp_path / "out" / "m"
    if when == "before":
        output.mkdir(parents=True)

    def convert() -> None:
        with output_folder(output, source, 0):
            output.mkdir(exist_ok=True)
            (output / "precious").write_text("data")

    with pytest.raises(ConvertError, match=r"m: files appeared there during the run. Fix: .* --overwrite"):
        convert()
    assert [path.name for path in output.parent.rglob("*")] == ["m", "precious"]


@pytest.mark.parametrize(
    ("output", "other"),
    [
        ("a*", f".ab.incomplete-{socket.gethostname()}-{DEAD}"),
        ("a", f".a.incomplete-{socket.gethostname()}-1-{DEAD}"),  # of a host whose name goes on
        ("a", f".a.incomplete-{socket.gethostname()}-{DEAD}x"),
    ],
)
def test_folders_of_others_are_left_alone(source: Path, tmp_path: Path, output: str, other: str) -> None:
    precious = in_use(tmp_path / "out" / other)
    write(tmp_path / "out" / output, source)
    assert (precious / "precious").exists()


def test_a_mount_point_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    for action in (lambda: check_output(output, source, 0), lambda: write(output, source)):
        with pytest.raises(ConvertError, match=r"out: is a mount point, .* Fix: give a folder in it"):
            action()
    monkeypatch.undo()
    with pytest.raises(ConvertError, match=r"/: is a mount point"):
        check_output(Path("/"), source, 0, overwrite=True)


def test_an_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf")
    before = sorted(hf.rglob("*"))
    for action in (convert_hf_to_megatron, describe_hf_to_megatron):
        with pytest.raises(ConvertError, match=r"hf/m: is inside the source .*/hf. Fix: give a folder outside it"):
            action(hf, hf / "m")
    assert sorted(hf.rglob("*")) == before


def make_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("make_output", "message"),
    [
        (make_loop, "loop: is a loop of symbolic links. Fix: "),
        (lambda folder: Path(f"{folder}/nul\0byte"), "nul.*byte': is no path: embedded null byte. Fix: "),
        (lambda folder: folder / ("x" * 300), "x: File name too long. Fix: "),
        (lambda folder: folder / "source" / "file" / "m", "file/m: cannot be made, as .*/file is a file. Fix: "),
    ],
)
def test_an_output_that_cannot_be_looked_at(source: Path, tmp_path: Path, make_output: object, message: str) -> None:
    (source / "file").write_text("")
    output = make_output(tmp_path)  # type: ignore[operator]
    for action in (lambda: check_output(output, tmp_path / "other", 0), lambda: write(output, tmp_path / "other")):
        with pytest.raises(ConvertError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_parent_that_cannot_be_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops."""

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    with pytest.raises(ConvertError, match=r"out: Permission denied. Fix: give a folder that can be written"):
        check_output(tmp_path / "out" / "m", source, 0)
