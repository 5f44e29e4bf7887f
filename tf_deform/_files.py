# SPDX-License-Identifier: Apache-2.0
"""The file or folder that appears whole or not at all: every writer uses it."""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from stat import S_ISDIR

# A folder beside what is written, with at most these in it: a file that its
# process holds locked, what is being written, and, where the file system cannot
# exchange, what was there before. The last two hold one thing each, under the
# name that it has at its place.
_PREFIX = ".tf_deform-partial-"
_LOCK, _NEW, _BEFORE = "lock", "new", "before"

# What says that a file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYS_RENAMEAT2 = 316  # x86-64


def to_path(value: str | os.PathLike) -> pathlib.Path:
    """A path that a caller gave.

    Raises:
        TypeError: It is neither text nor a path of text.
        ValueError: It has a character that no path has.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(
            "Expected `path` to be a str or an os.PathLike of one. Received: "
            f"{value!r:.200} of type {type(value).__name__}"
        )
    if "\0" in text:
        raise ValueError(
            "Expected `path` to be without null characters. Received: "
            f"{text!r:.200}"
        )
    return pathlib.Path(text)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike, folder: str | None = None
) -> Iterator[pathlib.Path]:
    """A path to write to; what is there takes the place of `path` at the end.

    It does so at one stroke: whoever looks at `path`, at any time, finds what
    was there before or what is new. An error, or a kill at any time, leaves
    what was there before. What killed processes left beside `path` is removed.
    A file system that cannot exchange two folders (network ones cannot) has
    none at `path` for a moment; after a kill in it, the next writer to the same
    parent puts back what was there.

    Args:
        path: What will be written. Links are followed.
        folder: None for a file. For a folder, the name of a file in it: one
            that holds it is replaced, as is an empty one, but no other.

    Raises:
        OSError: `path` cannot be written, or is something else.
    """
    path = pathlib.Path(os.path.realpath(path))
    _check_replaceable(path, folder)
    _clear_dead(path.parent)
    try:
        # Beside it, so that it can be moved there in one step.
        staging, lock = _stage(path.parent)
    except OSError as error:
        raise _explain(
            error, "in a folder that can be written", path
        ) from error
    try:
        yield staging / _NEW / path.name
        _check_replaceable(path, folder)
        try:
            _put(staging, path)
        except OSError as error:
            # Such as a mount point.
            raise _explain(error, "one that can be replaced", path) from error
    finally:
        _remove(staging, lock)


def _explain(error: OSError, expected: str, path: pathlib.Path) -> OSError:
    text = f"Expected `path` to be {expected}. Received: {error.strerror}"
    return type(error)(error.errno, text, str(path))


def _check_replaceable(path: pathlib.Path, folder: str | None) -> None:
    if folder is None:
        replaceable = not path.is_dir()
        kind = "a file"
    else:
        replaceable = _is_replaceable_folder(path, folder)
        kind = f"a new or empty folder, or one with a {folder}"
    if not replaceable:
        raise FileExistsError(
            f"Expected `path` to be {kind}. Received: {path}, which is "
            f"{'a folder with other things' if path.is_dir() else 'a file'}"
        )


def _is_replaceable_folder(path: pathlib.Path, name: str) -> bool:
    """Whether nothing is at `path`, or a folder that is empty or has `name`.

    Another process may exchange the folder between two looks at it: what is
    refused is judged again until it is the same one before and after.
    """
    while path.exists():
        try:
            before = path.stat()
            found = os.listdir(path)
            if not found or name in found:
                return True
            if os.path.samestat(before, path.stat()):
                return False
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            return False
    return True


def _stage(parent: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Makes a staging folder, locked where the file system has locks."""
    while True:
        staging = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            try:
                lock = _lock(staging)
            except (BlockingIOError, FileNotFoundError):
                continue  # Another process came between and removes it.
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                lock = None  # So that nobody can take it for a dead one's.
            (staging / _NEW).mkdir()
            (staging / _BEFORE).mkdir()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging, lock


def _lock(staging: pathlib.Path) -> int:
    """Locks a staging folder until the file that it returns is closed.

    The system closes it when the process ends, however it ends.

    Raises:
        BlockingIOError: Another process holds it.
        FileNotFoundError: Another process has removed it.
        OSError: The file system has no locks, or something else.
    """
    lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been removed between opening and locking.
        os.stat(staging / _LOCK)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _put(staging: pathlib.Path, path: pathlib.Path) -> None:
    """Moves what is new to its place, and what is there into `staging`."""
    new, before = (staging / name / path.name for name in (_NEW, _BEFORE))
    while True:
        try:
            os.rename(new, path)  # Replaces a file, or an empty folder.
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Whatever goes wrong in the first way, goes right in the second one,
        # or says there why not. In both, another process may be faster.
        try:
            _exchange(new, path)
            return
        except OSError:
            shutil.rmtree(before, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, before)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Exchanges two things at one stroke.

    Raises:
        OSError: They or the system or the file system do not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [
        ctypes.c_long(_AT_FDCWD),
        os.fsencode(one),
        ctypes.c_long(_AT_FDCWD),
        os.fsencode(other),
        ctypes.c_long(_RENAME_EXCHANGE),
    ]
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(*arguments)
    elif platform.machine() == "x86_64":  # The C library is older than Linux.
        failed = libc.syscall(ctypes.c_long(_SYS_RENAMEAT2), *arguments)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _clear_dead(parent: pathlib.Path) -> None:
    """Removes the staging folders that killed processes left."""
    with contextlib.suppress(OSError):
        for staging in list(parent.iterdir()):
            if _is_staging(staging):
                with contextlib.suppress(OSError):
                    _remove(staging, _lock(staging))


def _is_staging(path: pathlib.Path) -> bool:
    """Whether it is a staging folder of this user, judged by all of it."""
    if not re.fullmatch(re.escape(_PREFIX) + "[a-z0-9_]{8}", path.name):
        return False
    with contextlib.suppress(OSError):
        stat = path.lstat()
        return (
            stat.st_uid == os.geteuid()
            and S_ISDIR(stat.st_mode)
            and {entry.name for entry in path.iterdir()}
            <= {_LOCK, _NEW, _BEFORE}
        )
    return False


def _remove(staging: pathlib.Path, lock: int | None) -> None:
    """Removes a staging folder, but never the only copy of what was before."""
    try:
        for before in (staging / _BEFORE).glob("*"):
            path = staging.parent / before.name
            try:
                if not os.path.lexists(path):
                    os.rename(before, path)
            except OSError:
                if not os.path.lexists(path):
                    return
        for name in (_NEW, _BEFORE):
            shutil.rmtree(staging / name, ignore_errors=True)
    finally:
        # First: NFS keeps a removed file until it is closed.
        if lock is not None:
            os.close(lock)
    shutil.rmtree(staging, ignore_errors=True)
