from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from erde.common import files
from erde.common.files import (
    Lock,
    check_folder,
    make_folder,
    replacing_file,
    replacing_folder,
    sweep_leftovers,
    write_json,
    write_text,
)
from tests.helpers.checks import entries, user_error

Replacing = Callable[[Path], AbstractContextManager[Path]]


def put(replacing: Replacing, path: Path, text: str) -> None:
    """``text`` as the file ``path``, or in the one file of the folder ``path``."""
    if replacing is replacing_file:
        path.write_text(text)
    else:
        path.mkdir(exist_ok=True)
        (path / "file.txt").write_text(text)


def get(path: Path) -> str:
    return (path / "file.txt" if path.is_dir() else path).read_text()


def break_off(replacing: Replacing, path: Path, error: BaseException) -> None:
    with replacing(path) as beside:
        put(replacing, beside, "half")
        raise error


def target(replacing: Replacing, folder: Path) -> Path:
    return folder / ("some.txt" if replacing is replacing_file else "some")


both = pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])


# ---------------------------------------------------------------- replacing


@both
@pytest.mark.parametrize("exists", [False, True])
def test_the_new_content_appears_when_the_block_ends(
    replacing: Replacing, exists: bool, tmp_path: Path
) -> None:
    path = target(replacing, tmp_path)
    if exists:
        put(replacing, path, "old")
    with replacing(path) as beside:
        put(replacing, beside, "new")
        # In the same folder, so that the last step is a rename within one file system.
        assert beside.parent == path.parent
        assert beside.name.endswith(".partial")
        assert path.exists() == exists
        if exists:
            assert get(path) == "old"
    assert get(path) == "new"
    assert entries(tmp_path) == [path.name]


@both
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_keeps_the_old_content_and_leaves_nothing_beside(
    replacing: Replacing, error: type[BaseException], tmp_path: Path
) -> None:
    path = target(replacing, tmp_path)
    put(replacing, path, "old")
    with pytest.raises(error):
        break_off(replacing, path, error())
    assert get(path) == "old"
    assert entries(tmp_path) == [path.name]


@both
@pytest.mark.parametrize("path", [".", "some/..", "/"])
def test_a_path_without_a_name_is_refused(
    replacing: Replacing, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    with user_error("has no name that a new file or folder could take"), replacing(Path(path)):
        raise AssertionError
    assert entries(tmp_path) == ["some"]


def test_a_replaced_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "some"
    put(replacing_folder, path, "old")
    (path / "other.txt").write_text("old")
    with replacing_folder(path) as beside:
        (beside / "file.txt").write_text("new")
    assert entries(path) == ["file.txt"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(exists: bool, tmp_path: Path) -> None:
    path, link = tmp_path / "v1", tmp_path / "current"
    link.symlink_to("v1")
    if exists:
        put(replacing_folder, path, "old")
    with replacing_folder(link) as beside:
        (beside / "file.txt").write_text("new")
    assert link.readlink() == Path("v1")
    assert get(path) == "new"
    assert entries(tmp_path) == ["current", "v1"]


def test_a_folder_that_another_writer_has_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some"
    put(replacing_folder, path, "old")
    with replacing_folder(path) as beside:
        (beside / "file.txt").write_text("new")
        monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.undo()
    assert get(path) == "new"
    assert entries(tmp_path) == ["some"]


def test_writers_of_the_same_file_do_not_share_a_half(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    with replacing_file(path) as first, replacing_file(path) as other:
        assert first != other
        first.write_text("one")
        other.write_text("other")
    assert get(path) == "one"


def test_the_old_folder_comes_back_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some"
    put(replacing_folder, path, "old")
    replace, calls = os.replace, []
    # As where names cannot be exchanged in one step.
    monkeypatch.setattr(files, "_exchange", lambda *_: False)

    def fail_second(source: Path, goal: Path) -> None:
        calls.append(goal)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="input/output"), replacing_folder(path) as beside:
        (beside / "file.txt").write_text("new")
    assert get(path) == "old"
    assert entries(tmp_path) == ["some"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(number: int) -> None:
        order.append("fsync")
        fsync(number)

    def watched_replace(old: Path, new: Path) -> None:
        order.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_text(tmp_path / "some.txt", "new")
    assert order == ["fsync", "replace"]


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("replacing", "where"),
    [
        (replacing_file, "fsync"),
        (replacing_file, "replace"),
        (replacing_file, "block"),
        (replacing_folder, "replace"),
        (replacing_folder, "block"),
    ],
)
def test_a_full_disk_is_one_clear_line(
    replacing: Replacing, number: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = target(replacing, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    if where != "block":
        monkeypatch.setattr(os, where, full)
    with user_error(f"no space left on the disk while writing {path}"), replacing(path) as beside:
        put(replacing, beside, "new")
        if where == "block":
            full()
    assert entries(tmp_path) == []


@both
def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(
    replacing: Replacing, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="input/output") as caught, replacing(target(replacing, tmp_path)):
        raise OSError(errno.EIO, "input/output error")
    assert type(caught.value) is OSError


def test_a_full_disk_while_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with user_error("no space left on the disk"):
        make_folder(tmp_path / "some")


# ---------------------------------------------------------------- JSON and folders


def test_write_json(tmp_path: Path) -> None:
    value = {"name": "été", "numbers": [1, 0.1, None], "nested": {"yes": True}}
    write_json(tmp_path / "some.json", value)
    assert json.loads((tmp_path / "some.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_write_json_refuses_what_json_does_not_know(value: float, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"deep": [value]})
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["some.json"]


def test_make_folder_creates_parents_and_takes_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert make_folder(path) == path
    (path / "kept").touch()
    assert make_folder(path) == path
    assert entries(path) == ["kept"]


@pytest.mark.parametrize("make", [check_folder, make_folder])
@pytest.mark.parametrize("below", [".", "a", "a/b"])
def test_a_file_in_the_way_of_a_folder_is_named(
    make: Callable[[Path], Any], below: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with user_error(f"{file} is a file"):
        make(file / below)
    assert file.read_text() == "kept"


def test_check_folder_creates_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert entries(tmp_path) == []


def test_no_permission_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, whom no mode bits stop.
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    with user_error("permission denied; choose a folder"):
        make_folder(tmp_path / "some")


def test_sweep_leftovers(tmp_path: Path) -> None:
    inside = tmp_path / "arms" / "kd"
    inside.mkdir(parents=True)
    for name in ("last.safetensors", "some.partial.txt", "partial", "kd.partial", "x.12-12345678.aside"):
        (inside / name).write_text("kept")
    (inside / f".last.safetensors.{dead_process()}-12345678.partial").write_text("half")
    # A killed process had the id that this one has, as in a container that starts anew.
    (inside / f".last.safetensors.{os.getpid()}-12345678.partial").write_text("half")
    folder = tmp_path / f".bundle.{dead_process()}-12345678.partial"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / f".manifest.json.{dead_process()}-12345678.partial").write_text("half")
    sweep_leftovers(tmp_path)
    assert entries(tmp_path) == ["arms"]
    assert entries(inside) == [
        "kd.partial", "last.safetensors", "partial", "some.partial.txt", "x.12-12345678.aside",
    ]  # fmt: skip


def test_links_that_are_left_over_go_and_their_folders_stay(tmp_path: Path) -> None:
    pid = dead_process()
    put(replacing_folder, tmp_path / "v1", "kept")
    (tmp_path / f".v1.{pid}-12345678.partial").symlink_to("v1")
    (tmp_path / f".v1.{pid}-12345678.aside").symlink_to("v1")
    sweep_leftovers(tmp_path)
    assert entries(tmp_path) == ["v1"]
    assert get(tmp_path / "v1") == "kept"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read() == b""
    state = Path(f"/proc/{process.pid}/stat")
    while state.read_text().rsplit(") ", 1)[1][0] != "Z":
        time.sleep(0.01)
    os.kill(process.pid, 0)  # still listed
    (tmp_path / f".some.{process.pid}-12345678.partial").write_text("half")
    sweep_leftovers(tmp_path)
    assert entries(tmp_path) == []
    process.wait()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# What another process does; it says when it has begun, and ends when its input does.
OTHER = """
import sys
from pathlib import Path
from erde.common import files
path = Path(sys.argv[1])
{begin}
print("begun", flush=True)
sys.stdin.read()
"""


def other_process(begin: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER.format(begin=begin), str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@both
def test_what_another_process_is_writing_stays_until_it_is_dead(replacing: Replacing, tmp_path: Path) -> None:
    writer = f"whole = files.{replacing.__name__}(path)\nbeside = whole.__enter__()"
    writer += "\n(beside if beside.is_dir() else beside.with_name(beside.name)).exists() or beside.touch()"
    process = other_process(writer, tmp_path / "some")
    (partial,) = entries(tmp_path)
    assert f".{process.pid}-" in partial
    sweep_leftovers(tmp_path)
    assert entries(tmp_path) == [partial]
    process.kill()
    process.wait()
    sweep_leftovers(tmp_path)
    assert entries(tmp_path) == []


# ---------------------------------------------------------------- a kill while a folder is replaced

KILLED = """
import os, signal, sys
from pathlib import Path
from erde.common import files
{before}
moments = 0
def watch(event, arguments):
    global moments
    if event in ("os.rename", "ctypes.dlsym", "shutil.rmtree", "os.remove", "os.rmdir"):
        if moments == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        moments += 1
sys.addaudithook(watch)
with files.replacing_folder(Path(sys.argv[1])) as beside:
    (beside / "file.txt").write_text("new")
"""


@pytest.mark.parametrize("before", ["", "files._exchange = lambda *_: False"])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(before: str, tmp_path: Path) -> None:
    seen = []
    for moment in range(10):
        path = tmp_path / str(moment) / "some"
        path.parent.mkdir()
        put(replacing_folder, path, "old")
        command = [sys.executable, "-c", KILLED.format(before=before), str(path), str(moment)]
        code = subprocess.run(command, check=False).returncode
        assert before or path.exists(), "in one step there is no moment without a folder"
        sweep_leftovers(path.parent)
        assert entries(path.parent) == ["some"]
        seen.append(get(path))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    else:
        pytest.fail("it was killed at every moment")
    assert seen == sorted(seen, reverse=True)
    assert {"old", "new"} == set(seen)


# ---------------------------------------------------------------- locks

LOCK = "lock = files.Lock(path, 'the place')"


def test_a_lock_is_of_one_process_and_says_whose(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = other_process(LOCK, path, "with", "some\narguments")
    with user_error(f"the place is being written by process {process.pid} on .* since 2.*arguments"):
        Lock(path, "the place")
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    assert entries(tmp_path) == []
    with Lock(path, "the place"):
        assert entries(tmp_path) == [".lock"]
    assert entries(tmp_path) == []


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    # Its forked children may live on.
    process = other_process(LOCK + "\nimport os, time\nif os.fork() == 0:\n    time.sleep(60)", path)
    process.kill()
    process.wait()
    assert entries(tmp_path) == [".lock"]
    with Lock(path, "the place"):
        pass
    assert entries(tmp_path) == []


def test_a_forked_worker_does_not_give_the_lock_away(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    worker = "\npid = os.fork()\nif pid == 0:\n    lock.release()\n    del lock\n    os._exit(0)\nos.waitpid(pid, 0)"
    process = other_process("import os\n" + LOCK + worker, path)
    with user_error(f"is being written by process {process.pid}"):
        Lock(path, "the place")
    process.communicate()


def test_a_process_has_a_lock_as_often_as_it_asks(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    first, second = Lock(path, "the place"), Lock(path, "the place")
    first.release()
    first.release()
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, "-c", OTHER.format(begin=LOCK), str(path)],
            check=True,
            capture_output=True,
            input=b"",
        )
    del second
    assert entries(tmp_path) == []
    other_process(LOCK, path).communicate()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"pid": 1, "since": 1e99}', b"\xff"])
def test_a_damaged_lock_file_is_still_a_lock(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = other_process(LOCK, path)
    path.write_bytes(content)
    with user_error("the place is being written by another process"):
        Lock(path, "the place")
    process.communicate()


def test_a_file_that_is_no_lock_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.lock"
    path.write_text('{"name": "my own"}')
    with user_error(f"{path} is there already and is no lock of erde's: .*move it away"):
        Lock(path, "answers")
    assert path.read_text() == '{"name": "my own"}'


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each adds 1 to a number twenty times; with a lock that lets two in, some would be lost."""
    code = """
import sys, time
from pathlib import Path
from erde.common.errors import UserError
from erde.common.files import Lock
number = Path(sys.argv[1]) / "number"
done = 0
while done < 20:
    try:
        with Lock(number.with_name(".lock"), "it"):
            value = int(number.read_text())
            time.sleep(0.001)
            number.write_text(str(value + 1))
            done += 1
    except UserError:
        time.sleep(0.001)
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"
