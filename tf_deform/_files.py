# SPDX-License-Identifier: Apache-2.0
"""Writes a file or folder so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from stat import S_ISDIR

# The staging folder lies beside the path that is written. It holds at most
# three entries: a lock file that the writing process holds locked, the new file
# or folder, and, where the file system cannot exchange two folders, the
# previous one. The last two are folders with one entry each, under its final
# name.
_PREFIX = ".tf_deform-partial-"
_LOCK, _NEW, _BEFORE = "lock", "new", "before"

# Errors that say that a file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYS_RENAMEAT2 = 316  # x86-64


def to_path(value: str | os.PathLike) -> pathlib.Path:
    """Returns the path that a caller gave.

    Raises:
        TypeError: The value is neither text nor a path of text.
        ValueError: The value has a character that no path has.
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
    """Yields a path to write to, and moves the result to `path` at the end.

    The move is one step: a process that looks at `path`, at any time, finds
    either the previous file or folder or the new one. An error, or a kill at
    any time, leaves the previous one in place. The leftovers of killed
    processes beside `path` are removed. A file system that cannot exchange two
    folders (network file systems cannot) has no folder at `path` for a moment;
    after a kill in that moment, the next writer to the same parent puts the
    previous folder back.

    Args:
        path: The file or folder to write. Links are followed.
        folder: None for a file. For a folder, the name of a file in it: a
            folder that holds this file is replaced, and so is an empty folder,
            but no other folder.

    Raises:
        OSError: `path` cannot be written, or is something else.
    """
    path = pathlib.Path(os.path.realpath(path))
    _check_replaceable(path, folder)
    _clear_dead(path.parent)
    try:
        # The staging folder lies beside `path`, so that one step moves its
        # content there.
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
            # A mount point, for example, cannot be replaced.
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
    """Checks that `path` is free, an empty folder, or a folder with `name`.

    Another process may exchange the folder between two looks at it: a folder
    that is refused is judged again until it is the same folder before and
    after.
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
                continue  # Another process came between and removed the folder.
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                lock = None  # Nobody may take the folder for a dead process's.
            (staging / _NEW).mkdir()
            (staging / _BEFORE).mkdir()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return staging, lock


def _lock(staging: pathlib.Path) -> int:
    """Locks a staging folder until the file that it returns is closed.

    The system closes the file when the process ends, however it ends.

    Raises:
        BlockingIOError: Another process holds the lock.
        FileNotFoundError: Another process has removed the folder.
        OSError: The file system has no locks, or something else.
    """
    lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been removed between opening and locking the file.
        os.stat(staging / _LOCK)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _put(staging: pathlib.Path, path: pathlib.Path) -> None:
    """Moves the new entry to `path`, and the previous one into `staging`."""
    new, before = (staging / name / path.name for name in (_NEW, _BEFORE))
    while True:
        try:
            os.rename(new, path)  # Replaces a file, or an empty folder.
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # If the exchange fails for any reason, moving twice succeeds or says
        # why it cannot. Another process may be faster in both.
        try:
            _exchange(new, path)
            return
        except OSError:
            shutil.rmtree(before, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, before)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Exchanges two files or folders in one step.

    Raises:
        OSError: The paths, the system or the file system do not allow it.
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
                    _remove(*_take(staging))


def _take(staging: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Locks a staging folder and renames it. Returns the new path and the lock.

    A living process may have made the folder and not locked it yet. It finds
    nothing under the name that it knows, also after this lock is released, and
    makes another folder.
    """
    lock = _lock(staging)
    taken = staging.with_name(_PREFIX + secrets.token_hex(4))
    try:
        os.rename(staging, taken)
    except BaseException:
        os.close(lock)
        raise
    return taken, lock


def _is_staging(path: pathlib.Path) -> bool:
    """Checks by all its content that `path` is this user's staging folder."""
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
    """Removes a staging folder, but never the only copy of the old entry."""
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
        # The lock file is closed first: NFS keeps a removed file until it is
        # closed.
        if lock is not None:
            os.close(lock)
    shutil.rmtree(staging, ignore_errors=True)
