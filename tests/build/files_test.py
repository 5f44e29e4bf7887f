# SPDX-License-Identifier: Apache-2.0
"""Tests that a file or folder appears whole or not at all.

Processes are killed.
"""

import concurrent.futures
import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest

from tf_deform import _files

# Loads the module alone: without TensorFlow a process starts at once, and may
# fork.
HEAD = f"""
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("files", {_files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
MARK = "saved_model.pb"

def refuse(*_):
    raise OSError(22, "Invalid argument")

def write(path, content, folder):
    with files.writing(path, MARK if folder else None) as partial:
        if not folder:
            partial.write_text(content)
            return
        (partial / "variables").mkdir(parents=True)
        (partial / MARK).write_text(content)
        (partial / "variables" / "data").write_text(content)

def read(path):
    if not path.exists():
        return None
    parts = [path] if path.is_file() else [
        path / MARK, path / "variables" / "data"]
    (content,) = {{part.read_text() for part in parts}}
    return content
"""


def run(script, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    "folder, before",
    [
        *((True, "nothing"), (True, "empty"), (True, "old")),
        *((False, "nothing"), (False, "old")),
    ],
)
def test_killed_at_every_line(folder, before, exchange, tmp_path):
    """Kills the process at every line, so around every rename, too."""
    run(
        f"""
        FOLDER, BEFORE, EXCHANGE = {folder}, {before!r}, {exchange}
        parent = pathlib.Path(sys.argv[1])

        def kill_at(count):
            def trace(frame, event, _):
                nonlocal count
                if frame.f_code.co_filename != files.__file__:
                    return None
                count -= 1
                if count < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace
            return trace

        def look(path):
            if path.is_dir() and not os.listdir(path):
                return "empty"
            return read(path) or "nothing"

        if not EXCHANGE:
            files._exchange = refuse
        left, seen, moment, status = 0, [], 0, None
        while status != 0:
            home = parent / str(moment)
            home.mkdir()
            path = home / "model"
            if BEFORE == "old":
                write(path, "old", FOLDER)
            elif BEFORE == "empty":
                path.mkdir()
            first = look(path)
            child = os.fork()
            if not child:
                sys.settrace(kill_at(moment))
                write(path, "new", FOLDER)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert status in (0, 9), status
            found = look(path)
            left += len(os.listdir(home)) - (found != "nothing")
            if EXCHANGE or not FOLDER:
                assert found in (first, "new"), (moment, found)
            # The next one to write beside it puts back what was there.
            write(home / "other", "other", FOLDER)
            again = look(path)
            assert again == (first if found == "nothing" else found)
            seen.append((found, again))
            assert sorted(os.listdir(home)) == sorted(
                ["other"] + ["model"] * (again != "nothing"))
            moment += 1
        assert moment > 50 and left > 30, (moment, left)
        assert seen[0][0] == first and seen[-1][0] == "new"
        # The old way has its moment: it was met, and mended.
        missing = ("nothing", "old") in seen
        assert missing == (FOLDER and BEFORE == "old" and not EXCHANGE), seen
        """,
        str(tmp_path),
    )


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_many_write_to_one_path(folder, exchange, tmp_path):
    """Tests that all writers end, and that the result is one whole version.

    A reader that looks all the time always finds the path, if the file system
    can exchange two paths.
    """
    said = run(
        f"""
        import threading
        FOLDER, EXCHANGE = {folder}, {exchange}
        path = pathlib.Path(sys.argv[1]) / "model"
        if not EXCHANGE:
            files._exchange = refuse
        write(path, "0 0", FOLDER)
        children = []
        for writer in range(3):
            child = os.fork()
            if not child:
                for turn in range(150):
                    write(path, f"{{writer}} {{turn}}", FOLDER)
                os._exit(0)
            children.append(child)
        looks = missing = 0
        while children:
            looks += 1
            missing += not path.exists()
            if looks % 100 == 0:
                done, status = os.waitpid(-1, os.WNOHANG)
                if done:
                    assert status == 0
                    children.remove(done)
        assert read(path) in {{f"{{x}} 149" for x in range(3)}}, read(path)
        print(looks, missing, os.listdir(path.parent))
        """,
        str(tmp_path),
    )
    looks, missing, *left = said.split()
    assert left == ["['model']"]
    assert int(looks) > 1000
    if exchange or not folder:
        assert missing == "0"


def write(path, content="mine"):
    with _files.writing(path, "mark") as partial:
        partial.mkdir()
        (partial / "mark").write_text(content)


def make_staging(parent, name="abcdefgh"):
    """Makes the folders that a killed process leaves."""
    staging = parent / f".tf_deform-partial-{name}"
    (staging / "new" / "model").mkdir(parents=True)
    (staging / "new" / "model" / "mark").write_text("half")
    (staging / "before").mkdir()
    (staging / "lock").touch()
    return staging


def test_a_dead_ones_folder_is_cleared(tmp_path):
    make_staging(tmp_path)
    (tmp_path / ".tf_deform-partial-01234567").mkdir()  # killed at once
    write(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    make_staging(tmp_path)
    with _files.writing(tmp_path / "other") as partial:
        partial.write_text("a file's writer clears as well")
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_a_living_ones_folder_stays(tmp_path):
    """Tests folders of another process, and of this process while it writes."""
    staging = make_staging(tmp_path)
    script = (
        "import fcntl, sys; file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, staging / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    with _files.writing(tmp_path / "one", "mark") as partial:
        partial.mkdir()
        (partial / "mark").touch()
        write(tmp_path / "one", "in between")
        assert partial.exists()
    assert (tmp_path / "one" / "mark").read_text() == ""
    assert staging.exists()
    child.kill()
    child.communicate()
    write(tmp_path / "one")
    assert os.listdir(tmp_path) == ["one"]


def test_what_others_own_stays(tmp_path):
    """Tests that similar names stay, although no process holds a lock."""
    for name in (
        *(".model-abcdefgh", ".model", "tf_deform-partial-abcdefgh"),
        *(".tf_deform-partial-", ".tf_deform-partial-ABCDEFGH"),
        *(".tf_deform-partial-abcdefgh.old", "target"),
    ):
        (tmp_path / name).mkdir()
    holding = make_staging(tmp_path, "holding1")
    (holding / "notes").write_text("precious")
    (tmp_path / ".tf_deform-partial-afile123").write_text("precious")
    (tmp_path / ".tf_deform-partial-linkabcd").symlink_to(tmp_path / "target")
    before = os.listdir(tmp_path)
    write(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "model"])
    assert sorted(os.listdir(holding)) == ["before", "lock", "new", "notes"]


def test_folders_of_other_users_stay(tmp_path, monkeypatch):
    staging = make_staging(tmp_path)
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        write(tmp_path / "model")
    assert staging.exists()


def raising(number):
    """Returns a function that fails as a call of the system does."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", sorted(_files._NO_LOCKS))
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    """Tests that writing works, and never clears another process's folder."""
    staging = make_staging(tmp_path)
    monkeypatch.setattr(fcntl, "flock", raising(number))
    write(tmp_path / "model")
    write(tmp_path / "model", "again")
    assert (tmp_path / "model" / "mark").read_text() == "again"
    assert sorted(os.listdir(tmp_path)) == [staging.name, "model"]


def test_a_lock_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.EIO))
    with pytest.raises(OSError, match="Expected `path` to be in a folder"):
        write(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_taken_for_dead_while_it_begins(tmp_path, monkeypatch):
    """Tests another writer that clears the folder before its lock is taken."""
    lock, begun = _files._lock, []

    def late(staging):
        if not begun:
            begun.append(staging)
            write(tmp_path / "other")
        return lock(staging)

    monkeypatch.setattr(_files, "_lock", late)
    write(tmp_path / "model")
    assert not begun[0].exists()
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_taken_for_dead_while_the_other_clears(tmp_path, monkeypatch):
    """Tests a lock that is taken when the clearing process releases its own."""
    staging = tmp_path / ".tf_deform-partial-justmade"
    staging.mkdir()
    remove, tried = _files.shutil.rmtree, []

    def late(path, **options):
        if path.parent == tmp_path and not tried:
            with pytest.raises(FileNotFoundError):
                _files._lock(staging)
            tried.append(path)
        remove(path, **options)

    monkeypatch.setattr(_files.shutil, "rmtree", late)
    write(tmp_path / "model")
    assert tried
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("libc", ["glibc", "old", "other processor"])
def test_the_systems_call(libc, tmp_path, monkeypatch):
    """Tests the system call by name, by number (old C library), and absent."""
    if libc != "glibc":
        load = _files.ctypes.CDLL

        def load_old(*arguments, **options):
            library = load(*arguments, **options)
            return types.SimpleNamespace(syscall=library.syscall)

        monkeypatch.setattr(_files.ctypes, "CDLL", load_old)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.write_text("2")
    if libc == "other processor":
        monkeypatch.setattr(_files.platform, "machine", lambda: "riscv64")
        with pytest.raises(OSError, match="not implemented"):
            _files._exchange(one, two)
        return
    _files._exchange(one, two)
    assert one.read_text() == "2"
    assert two.is_dir()
    with pytest.raises(FileNotFoundError):
        _files._exchange(one, tmp_path / "three")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", ["interrupt", "error"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_swap_that_fails_leaves_what_was_there(
    when, kind, exchange, tmp_path, monkeypatch
):
    """Tests a failure of every rename in turn."""
    rename = os.rename
    error = OSError(errno.EIO, "Input/output error")
    if kind == "interrupt":
        error = KeyboardInterrupt()
    for turn in range(6):
        path = tmp_path / str(turn) / "model"
        path.parent.mkdir()
        write(path, "old")
        calls = []

        def fail(*paths, turn=turn, calls=calls):
            calls.append(paths)
            if len(calls) - 1 != turn:
                return rename(*paths)
            if when == "after":
                rename(*paths)
            raise error

        found = {"old", "new"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            if not exchange:
                patch.setattr(_files, "_exchange", lambda *_: os.stat(""))
            try:
                write(path, "new")
                found = {"new"}
            except KeyboardInterrupt:
                pass
            except OSError as raised:
                assert "Expected `path` to be one that can be" in str(raised)
        assert os.listdir(path.parent) == ["model"]
        assert (path / "mark").read_text() in found
    assert len(calls) < 6


def test_what_may_not_be_replaced(tmp_path):
    """Tests that a path is refused also if it appears during writing."""
    path = tmp_path / "model"
    with pytest.raises(FileExistsError, match="with a mark.* other things"):
        with _files.writing(path, "mark") as partial:
            partial.mkdir()
            path.mkdir()
            (path / "precious").touch()
    assert os.listdir(path) == ["precious"]
    with pytest.raises(FileExistsError, match="to be a file.*other things"):
        with _files.writing(path):
            pass
    file = tmp_path / "file"
    with pytest.raises(FileExistsError, match="new or empty folder.*is a file"):
        with _files.writing(file, "mark") as partial:
            partial.mkdir()
            file.touch()
    with pytest.raises(FileNotFoundError, match="one that can be replaced"):
        with _files.writing(tmp_path / "nothing", "mark"):
            pass  # Nothing was written.
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_names(tmp_path):
    """Tests the longest names, and the names that staging folders use."""
    for name in ("a" * 255, "lock", "new", "before", " ", "ü*[?]", "-rf"):
        for content in ("first", "second"):
            write(tmp_path / name, content)
            assert (tmp_path / name / "mark").read_text() == content
    assert len(os.listdir(tmp_path)) == 7


def test_links(tmp_path):
    """Tests that the link's target is written, and that the link stays."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "model")
    for content in ("first", "second"):
        write(tmp_path / "link", content)
        assert (tmp_path / "real" / "model" / "mark").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["model"]


def test_threads(tmp_path):
    """Tests threads of one process: each thread has its own lock."""

    def work(index):
        for _ in range(30):
            write(tmp_path / "model", str(index))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "path", [None, 3, 1.5, b"model", ["model"], open, os.scandir]
)
def test_what_is_no_path(path):
    with pytest.raises(TypeError, match="Expected `path` to be a str or an"):
        _files.to_path(path)


@pytest.mark.parametrize("path", ["\0", "a\0b", pathlib.Path("a\0")])
def test_null_characters(path):
    with pytest.raises(ValueError, match="`path` to be without null char"):
        _files.to_path(path)


def test_paths(tmp_path):
    """Tests strings, `Path` objects and other path-like objects."""
    (tmp_path / "model").touch()
    (entry,) = os.scandir(tmp_path)
    for path in (tmp_path / "model", str(tmp_path / "model"), entry):
        assert _files.to_path(path) == tmp_path / "model"
    (entry,) = os.scandir(os.fsencode(tmp_path))
    with pytest.raises(TypeError, match="Received: .* of type .*DirEntry"):
        _files.to_path(entry)
