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
# What `_files.writing` leaves in a folder if it is killed.
_PARTIAL = ".tf_deform-partial-"
# Settings of a call, not of the run.
OF_CALL = ("out", "resume")


def open_run(
    task: str,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    spell: Callable[[str], str] = "`{}`".format,
) -> dict[str, Any]:
    """Returns the settings of a run: given, of the run to resume, defaults.

    Args:
        task: "train_detector" or "train_segmenter".
        settings: The task's entry of `_settings.TASKS`.
        given: The settings that were given, checked; `out` is one of them.
        spell: How messages spell the name of a setting.

    Raises:
        ValueError: The folder has a run with other settings; or a required
            setting is missing.
        FileExistsError: The folder has something else, or a run that is not to
            be resumed.
    """
    out = pathlib.Path(given["out"])
    kept = _kept(out)
    found = {name: setting.default for name, setting in settings.items()}
    if kept is None:
        found.update(given)
        missing = [spell(name) for name, value in found.items() if value is ...]
        if missing:
            raise ValueError(f"Expected {', '.join(missing)}. Received: none")
        return found
    if not given.get("resume"):
        raise FileExistsError(
            f"Expected {spell('out')} to be a new or empty folder, or "
            f"{spell('resume')}. Received: {out}, which has a run"
        )
    if kept.get("task") != task:
        raise ValueError(
            f"Expected {out} to have a run of {task}. Received: one of "
            f"{kept.get('task')}"
        )
    found.update({name: kept[name] for name in settings if name in kept})
    for name, value in given.items():
        if name not in OF_CALL and value != found[name]:
            raise ValueError(
                f"Expected {spell(name)} to be {found[name]!r}, as in the run "
                f"in {out}. Received: {value!r}. Leave it out, or choose "
                f"another {spell('out')}"
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
