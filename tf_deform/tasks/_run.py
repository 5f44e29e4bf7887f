# SPDX-License-Identifier: Apache-2.0
"""Keeps the folder of a run: settings, versions, files, messages."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import pathlib
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _build_info, _run_folder, _settings, training
from tf_deform._keras import keras

LOGGER = logging.getLogger("tf_deform")
_PACKAGES = ("numpy", "pillow", "faster-coco-eval", "matplotlib")
_SHOW_BAR = [False]


@contextlib.contextmanager
def progress(show: bool = True) -> Iterator[None]:
    """Lets the tasks within show a progress bar, if there is a terminal."""
    before, _SHOW_BAR[0] = _SHOW_BAR[0], show
    try:
        yield
    finally:
        _SHOW_BAR[0] = before


def shows_bar() -> bool:
    """Tells whether to show a progress bar."""
    return _SHOW_BAR[0] and sys.stdout.isatty()


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file, or None if there is none."""
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


class Run:
    """A folder in which a model is trained.

    Args:
        task: The name of the task.
        settings: All its settings, checked.
    """

    def __init__(self, task: str, settings: Mapping[str, Any]) -> None:
        self.task = task
        self.settings = dict(settings)
        self.folder = pathlib.Path(settings["out"])

    def begin(self) -> None:
        """Writes what is known before the run, once."""
        kept = {
            name: value
            for name, value in self.settings.items()
            if name not in _run_folder.OF_CALL
        }
        path = self.folder / _run_folder.SETTINGS
        # Without the list of files, the call that wrote it found none to use.
        files = self.folder / _run_folder.FILES
        new = not (files.exists() and self.settings["resume"])
        if new:
            files.unlink(missing_ok=True)
        before = kept if new else read_json(path)
        grown = [n for n in _run_folder.LENGTHS if before.get(n) != kept[n]]
        if new or grown:
            training.write_metrics(path, {"task": self.task, **kept})
        for name in grown:
            LOGGER.info(
                "The run goes on to %d %s, in place of %d: from here on its "
                "learning rate is that of the longer run, and may rise again",
                kept[name],
                name,
                before[name],
            )
        now, path = versions(), self.folder / _run_folder.VERSIONS
        before = None if new else read_json(path)
        if before is None:
            training.write_metrics(path, now)
        elif before != now:
            names = [n for n in now if now[n] != before.get(n)]
            LOGGER.warning(
                "The run began with other versions (%s): its results are not "
                "those of a run without a stop",
                ", ".join(f"{n} {before.get(n)}, now {now[n]}" for n in names),
            )

    def keep_files(self, **parts: Any) -> None:
        """Writes the hashes of all files, or checks that they are the same.

        Args:
            parts: The `Annotations` of each part of the run, by name.

        Raises:
            ValueError: The run began with other files.
        """
        now = {name: describe_files(part) for name, part in parts.items()}
        path = self.folder / _run_folder.FILES
        before = read_json(path)
        if before is None:
            training.write_metrics(path, now)
            return
        for name, part in now.items():
            if part != before.get(name):
                raise ValueError(
                    f"Expected the files of {path}, with which the run began. "
                    f"Received: {_difference(before.get(name, {}), part)}"
                )


def _difference(before: Mapping, now: Mapping) -> str:
    """Says which file of a part is another one."""
    old, new = before.get("files", {}), now["files"]
    for path in sorted({*old, *new}):
        if path not in new:
            return f"none at {path}"
        if path not in old:
            return f"a further one, {path}"
        if old[path] != new[path]:
            return f"another content of {path}"
    return "other annotations of the same files"


def versions() -> dict[str, str]:
    """Returns the versions of all that a result depends on."""
    found = {
        "tf-deform": _build_info.VERSION,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "platform": platform.platform(),
        "devices": ", ".join(
            device.name for device in tf.config.list_physical_devices()
        ),
    }
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_files(annotations: Any) -> dict[str, Any]:
    """Returns the hashes of the files of `Annotations`, and of what they say.

    Files of masks are hashed as photographs are; boxes and classes, which may
    stand in one file or many, are hashed as they were read.
    """
    text = hashlib.sha256(json.dumps(annotations.classes).encode())
    paths = []
    for photograph in annotations.photographs:
        paths.append(str(photograph.path))
        if photograph.mask is not None:
            paths.append(getattr(photograph.mask, "path", photograph.mask))
        for array in ("boxes", "labels", "crowd", "difficult"):
            text.update(np.ascontiguousarray(getattr(photograph, array)))
        text.update(b";")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_sha256, paths))
    return {"objects": text.hexdigest(), "files": dict(zip(paths, hashes))}


def _sha256(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def opened(task: str, given: Mapping[str, Any]) -> Iterator[Run]:
    """Opens the folder of a run, and writes all messages within to its log.

    Args:
        task: The name of the task.
        given: The task's arguments.

    Raises:
        ValueError, FileExistsError: As `_settings.check` and
            `_run_folder.open_run` say.
        BlockingIOError: Another process is training in the folder.
        MemoryError: The device's memory is too small.
    """
    settings = _settings.check(task, given)
    settings = _run_folder.open_run(task, _settings.TASKS[task], settings)
    _settings.check_together(task, settings)
    run = Run(task, settings)
    run.folder.mkdir(parents=True, exist_ok=True)
    with logging_to(run.folder / _run_folder.LOG) as handler:
        try:
            run.begin()
            yield run
        except KeyboardInterrupt:
            begins = "goes on from its last validation"
            if not (run.folder / _run_folder.LAST).exists():
                begins = "begins anew, as nothing was saved yet"
            text = (
                "Interrupted. With --resume (`resume=True`), the run in "
                f"{run.folder} {begins}"
            )
            handler.stream.write(f"{text}\n")
            raise KeyboardInterrupt(text) from None
        except tf.errors.ResourceExhaustedError as error:
            traceback.print_exc(file=handler.stream)
            raise MemoryError(
                "Expected memory for steps of "
                f"{settings['batch_size']} images of {settings['size']} "
                f"pixels. Received: {str(error.message).splitlines()[0]:.300}. "
                "Choose a smaller `batch_size` or `size`, or `mixed_precision`"
            ) from error
        except tf.errors.InvalidArgumentError as error:
            # An error of Python within tf.data, as of a file that is broken.
            traceback.print_exc(file=handler.stream)
            lines = str(error.message).splitlines()
            told = [line for line in lines if "Expected " in line]
            text = told[0][told[0].index("Expected ") :] if told else lines[0]
            raise ValueError(text) from error
        except Exception as error:
            handler.stream.write(f"{type(error).__name__}: {error}\n")
            traceback.print_exc(file=handler.stream)
            raise


@contextlib.contextmanager
def logging_to(path: pathlib.Path) -> Iterator[logging.FileHandler]:
    """Adds the messages of the logger `tf_deform` to a file.

    Raises:
        BlockingIOError: Another process does the same.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    level = LOGGER.level
    try:
        try:
            fcntl.flock(handler.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"Expected no other process to train in {path.parent}. "
                f"Received: one that writes {path.name}",
            ) from None
        except OSError:
            pass  # The file system has no locks.
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(handler)
        if LOGGER.getEffectiveLevel() > logging.INFO:
            LOGGER.setLevel(logging.INFO)
        yield handler
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()


def number_text(value: float) -> str:
    """Returns a number for the log: "none" for NaN, which is of no object."""
    return "none" if math.isnan(value) else f"{float(value):.4g}"


def table(measures: Mapping[str, float]) -> str:
    """Returns lines of names and numbers, aligned."""
    width = max(map(len, measures), default=0)
    return "\n".join(
        f"  {name:{width}}  {number_text(value)}"
        for name, value in measures.items()
    )
