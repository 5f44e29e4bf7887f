# SPDX-License-Identifier: Apache-2.0
"""Parses the commands that run `tf_deform.tasks`.

As `_settings.py`, this file is loaded by its path, without TensorFlow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

# The words of a command, its task, and its help.
COMMANDS = {
    ("train", "detect"): (
        "train_detector",
        "train a detector on photographs with boxes",
    ),
    ("train", "segment"): (
        "train_segmenter",
        "train a segmenter on photographs with masks",
    ),
    ("eval",): ("evaluate", "judge a model on annotated photographs"),
    ("show",): ("show", "draw what a model finds in photographs"),
    ("export",): ("export_model", "write a model for other programs"),
    ("demo",): ("demo", "compare plain and deformable models"),
}
_TRAIN_HELP = "train a model on photographs"
# Values without an option's name, and how many there are.
_POSITIONAL = {
    "evaluate": {"model": None},
    "show": {"model": None, "images": "+"},
    "export_model": {"model": None, "path": None},
    "demo": {"name": None},
}
_MORE = (
    "The exit status is 0 if all is done, 1 if something failed, 2 for wrong "
    "arguments."
)


def option(name: str) -> str:
    """Returns how the command line spells a setting."""
    return "--" + name.replace("_", "-")


def add_commands(commands: Any, settings: ModuleType) -> None:
    """Adds the commands of all tasks to a parser's subparsers.

    Args:
        commands: What `add_subparsers` returned.
        settings: The module `_settings`.
    """
    groups = {(): commands}
    for words, (task, text) in COMMANDS.items():
        group = words[:-1]
        if group not in groups:
            above = commands.add_parser(group[0], help=_TRAIN_HELP)
            groups[group] = above.add_subparsers(metavar="WHAT", required=True)
        parser = groups[group].add_parser(
            words[-1],
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MORE,
        )
        _add_settings(parser, task, settings)
        parser.set_defaults(task=task, parser=parser)


def _add_settings(
    parser: argparse.ArgumentParser, task: str, settings: ModuleType
) -> None:
    positional = _POSITIONAL.get(task, {})
    for name, setting in settings.TASKS[task].items():
        text = setting.help.replace("%", "%%")
        kind = _argument(setting.check, settings)
        if name in positional:
            parser.add_argument(
                name,
                type=kind,
                nargs=positional[name],
                metavar=name.upper(),
                help=text,
            )
            continue
        default = f" (default: {setting.default})"
        if any(setting.default is value for value in (None, False, ...)):
            default = ""
        more = {"nargs": "?", "const": setting.bare} if setting.bare else {}
        if setting.check is settings.boolean:
            more = {"action": "store_true"}
        else:
            more |= {"type": kind, "metavar": setting.metavar}
        parser.add_argument(
            option(name),
            # The settings of a run to resume tell what was given.
            default=argparse.SUPPRESS,
            # A run to resume has the settings that training requires.
            required=setting.default is ...
            and (name == "out" or "resume" not in settings.TASKS[task]),
            help=text + default,
            **more,
        )
    parser.add_argument(
        "--quiet", action="store_true", help="say warnings and errors alone"
    )


def _argument(
    check: Callable[[Any], Any], settings: ModuleType
) -> Callable[[str], Any]:
    """Returns a check with the error that argparse prints."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except settings.Wrong as wrong:
            raise argparse.ArgumentTypeError(
                f"Expected {wrong}. Received: {text!r:.300}"
            ) from None

    return parse


def find_settings(
    parsed: argparse.Namespace, settings: ModuleType, run_folder: ModuleType
) -> dict[str, Any]:
    """Returns all arguments of the task, or ends the process with status 2."""
    table = settings.TASKS[parsed.task]
    given = {name: vars(parsed)[name] for name in table if name in vars(parsed)}
    try:
        if "resume" in table:
            given = run_folder.open_run(parsed.task, table, given, option)
            # Files may have gone since the run began.
            given = settings.check(parsed.task, given)
        else:
            given = {**settings.defaults(parsed.task), **given}
        settings.check_together(parsed.task, given, option)
    except (ValueError, OSError) as error:
        parsed.parser.error(str(error))
    return given
