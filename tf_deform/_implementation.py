# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the ops runs: native, or stock TensorFlow's ops."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import tensorflow as tf

from tf_deform import _loader

_asked_for: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "tf_deform_implementation", default=None
)
# The graphs that have the marker, inside `explaining`; otherwise None.
_explained: contextvars.ContextVar[set[tf.Graph] | None] = (
    contextvars.ContextVar("tf_deform_explained", default=None)
)


def check_implementation(implementation: Any) -> str:
    if implementation not in _loader.IMPLEMENTATIONS:
        raise ValueError(
            'Expected `implementation` to be "native" or "portable". Received: '
            f"{implementation!r}"
        )
    return implementation


@contextlib.contextmanager
def implementation(implementation: str) -> Iterator[None]:
    """Switches all functions and layers that are called inside.

    ```python
    with tf_deform.implementation("portable"):
        model.export("runs_without_tf_deform")
    ```

    It wins over the argument `implementation` of functions and layers. What
    is traced inside (`tf.function`, a functional model that is exported) keeps
    it; what was traced before stays as it is.

    Args:
        implementation: "native" (C++ and CUDA), or "portable": the same in
            stock TensorFlow ops, which are slower and take more memory, but
            run where tf_deform is not installed.

    Raises:
        ValueError: Another value.
        RuntimeError: "native" where there are no native ops.
    """
    check_implementation(implementation)
    if implementation == "native" and _loader.op_library() is None:
        raise RuntimeError(
            "Expected native ops for `implementation('native')`. Received: a "
            "process in which they are not loaded, see the environment "
            f"variable {_loader.VARIABLE} and the file {_loader.LIBRARY}"
        )
    token = _asked_for.set(implementation)
    try:
        yield
    finally:
        _asked_for.reset(token)


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Marks every graph traced inside that has native ops.

    The first of them comes after an op whose name tells what to do: it is what
    TensorFlow names where the graph is loaded without the library. See
    cc/tf/marker_op.cc.
    """
    token = _explained.set(set())
    try:
        yield
    finally:
        _explained.reset(token)


def _mark(library: ModuleType) -> None:
    explained = _explained.get()
    if explained is None or tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    if graph not in explained:
        explained.add(graph)
        library.tf_deform_import_tf_deform_or_load_its_op_library()


def choose(implementation: Any, name: str, portable: Callable) -> Callable:
    """The native op of this name, or the portable function.

    Both are called alike, with the op's inputs and attributes.
    """
    check_implementation(implementation)
    library = _loader.op_library()
    wanted = _asked_for.get() or _loader.forced() or implementation
    if library is None or wanted == "portable":
        return portable
    _mark(library)
    return getattr(library, name)
