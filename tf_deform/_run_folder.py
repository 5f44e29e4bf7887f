# SPDX-License-Identifier: Apache-2.0
"""Opens the folder of a run: a new one, or one to go on with.

As `_settings.py`, this file is also loaded by its path, without TensorFlow.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

SETTINGS, LOG = "settings.json", "log.txt"
VERSIONS, FILES = "versions.json", "files.json"
LAST = "last.keras"
# What `_files.writing` leaves in a folder if it is killed.
_PARTIAL = ".tf_deform-partial-"
# Settings of a call, not of the run.
OF_CALL = ("out", "resume")
# Of these, the one that a run counts by may grow when it is resumed.
LENGTHS = ("epochs", "steps")


def open_run(
    task: str,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    spell: Callable[[str], str] = "`{}`".format,
) -> dict[str, Any]:
    """Returns the settings of a run: given, of the run to resume, defaults.

    A run to resume may become longer; its other settings stay.

    Args:
        task: "train_detector" or "train_segmenter".
        settings: The task's entry of `_settings.TASKS`.
        given: The settings that were given, checked; `out` is one of them.
        spell: How messages spell the name of a setting.

    Raises:
        ValueError: The folder has a run with other settings; or a required
            setting is missing.
        FileExistsError: The folder has something else, or a run that has saved
            its state and is not to be resumed.
    """
    out = pathlib.Path(given["out"])
    kept = _kept(out)
    found = {name: setting.default for name, setting in settings.items()}
    resume = given.get("resume")
    if kept is not None and not resume:
        if (out / LAST).exists():
            raise FileExistsError(
                f"Expected {spell('out')} to be a new or empty folder, or "
                f"{spell('resume')}. Received: {out}, which has a run"
            )
        kept = None  # It ended before it had saved anything.
    if kept is None:
        found.update(given)
        missing = [spell(name) for name, value in found.items() if value is ...]
        if missing:
            why = f", as there is no run in {out} to resume" if resume else ""
            raise ValueError(
                f"Expected {', '.join(missing)}{why}. Received: none"
            )
        return found
    if kept.get("task") != task:
        raise ValueError(
            f"Expected {out} to have a run of {task}. Received: one of "
            f"{kept.get('task')}"
        )
    found.update({name: kept[name] for name in settings if name in kept})
    length = "epochs" if found["steps"] is None else "steps"
    for name, value in given.items():
        before = found[name]
        if name in OF_CALL or value == before:
            continue
        if name == length and value is not None and value > before:
            found[name] = value
            continue
        more = " or more" if name == length else ""
        wanted = "left out" if before is None else repr(before)
        raise ValueError(
            f"Expected {spell(name)} to be {wanted}{more}, as in the run in "
            f"{out}. Received: {value!r}. Say the former, or choose another "
            f"{spell('out')}"
        )
    return {**found, **{name: given[name] for name in OF_CALL}}


def _kept(out: pathlib.Path) -> dict[str, Any] | None:
    """Returns the settings of the run in a folder, None if it is free.

    Raises:
        FileExistsError: It has something else.
    """
    if not out.exists():
        return None
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        # What a run leaves that ended before it had read its files.
        before = {SETTINGS, VERSIONS, LOG}
        if all(x in before or x.startswith(_PARTIAL) for x in names):
            return None
        if SETTINGS in names:
            path = out / SETTINGS
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(found, dict):
                    return found
            except ValueError:
                pass
            raise FileExistsError(
                f"Expected {path} to be the settings of a run. Received: "
                "something else"
            )
    raise FileExistsError(
        f"Expected {out} to be a new or empty folder, or one with a run. "
        f"Received: {'a folder' if out.is_dir() else 'a file'} with other "
        "things"
    )
