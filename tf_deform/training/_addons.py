# SPDX-License-Identifier: Apache-2.0
"""Knows what tensorflow_addons does, which only TensorFlow 2.15 can load."""

from __future__ import annotations

import collections
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf


def import_addons() -> Any:
    """Imports tensorflow_addons.

    Raises:
        ImportError: It is not installed, or cannot run here.
    """
    try:
        return importlib.import_module("tensorflow_addons")
    except ImportError as error:
        raise ImportError(
            "Expected tensorflow_addons, which runs with TensorFlow 2.15 and "
            "Python 3.9 to 3.11: its last release, 0.23, imports parts of "
            "Keras 2 that are gone since. Received: TensorFlow "
            f"{tf.__version__}, Python {sys.version.split()[0]}, and the error "
            f"{error!r}. Run `pip install 'tf-deform[addons]' "
            "'tensorflow==2.15.*'` in an environment of its own"
        ) from error


def load_class(config: Mapping[str, Any]) -> None:
    """Imports the addons if a saved optimizer, or one in it, is theirs."""
    if "Addons>" in str(config):
        import_addons()


def is_multi(optimizer: Any) -> bool:
    """Tells whether an optimizer or class is the addons' MultiOptimizer."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return any(
        base.__name__ == "MultiOptimizer"
        and base.__module__.startswith("tensorflow_addons.")
        for base in kind.__mro__
    )


def check_groups(
    groups: Sequence[Mapping[str, Any]], variables: Sequence[Any]
) -> None:
    """Checks that every variable belongs to one group, by its name.

    Raises:
        ValueError: The MultiOptimizer would take too many steps, or none.
    """
    names = [variable.name for variable in variables]
    counts = collections.Counter(names)
    held = collections.Counter(
        name for group in groups for name in group["weights"]
    )
    twice = sorted(n for n in counts if counts[n] > 1 or held[n] > 1)
    if twice:
        raise ValueError(
            "Expected every variable to have a name of its own and to belong "
            "to one group, because MultiOptimizer takes one step for each "
            f"place where it finds the name. Received: {_list(twice)} more "
            "than once. Give layers names, call a layer's layers before its "
            "`build` ends, or use one optimizer"
        )
    missing = sorted(n for n in counts if not held[n])
    if missing:
        raise ValueError(
            "Expected every variable to belong to a group, because "
            "MultiOptimizer does not train any other. Received: "
            f"{_list(missing)} in no group. Build all layers before "
            "MultiOptimizer is made, and give it all of them"
        )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
