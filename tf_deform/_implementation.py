# SPDX-License-Identifier: Apache-2.0
"""Chooses the implementation that runs: the native ops, or stock TensorFlow."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import tensorflow as tf

from tf_deform import _loader

# Holds the implementation that is asked for. While a model is exported to
# another runtime, it holds the functions that replace ops, by the native op's
# name; stock ops replace all other ops.
_asked_for: contextvars.ContextVar[str | Mapping[str, Callable] | None] = (
    contextvars.ContextVar("tf_deform_implementation", default=None)
)
# Holds the graphs that have the marker, inside `explaining`; otherwise None.
_explained: contextvars.ContextVar[set[tf.Graph] | None] = (
    contextvars.ContextVar("tf_deform_explained", default=None)
)

# Keras traces a model for runtimes that have no native ops in these modules.
# TensorFlow's converters refuse native ops there. The converter to ONNX only
# logs that it does not know them, and writes a file that no runtime loads.
_KERAS_ONNX = "keras.src.export.onnx"
_KERAS_EXPORTERS = (
    _KERAS_ONNX,
    "keras.src.export.openvino",
    "keras.src.export.litert",
)


def check_implementation(implementation: Any) -> str:
    # A string tensor or an array could be equal to a name.
    if (
        not isinstance(implementation, str)
        or implementation not in _loader.IMPLEMENTATIONS
    ):
        raise ValueError(
            'Expected `implementation` to be "native" or "portable". Received: '
            f"{repr(implementation)[:200]} of type "
            f"{type(implementation).__name__}"
        )
    return str(implementation)


def require_native_ops() -> None:
    if _loader.op_library() is None:
        raise RuntimeError(
            "Expected native ops. Received: a process in which they are not "
            f"loaded, see the environment variable {_loader.VARIABLE} and the "
            f"file {_loader.LIBRARY}"
        )


@contextlib.contextmanager
def implementation(implementation: str) -> Iterator[None]:
    """Switches all functions and layers that are called inside.

    ```python
    with tf_deform.implementation("portable"):
        model.export("runs_without_tf_deform")
    ```

    It wins over the argument `implementation` of functions and layers. A
    function that is traced inside (`tf.function`, a functional model that is
    exported) keeps the implementation; a function that was traced before stays
    as it is.

    Args:
        implementation: "native" (C++ and CUDA), or "portable": the same
            functions in stock TensorFlow ops, which are slower and take more
            memory, but run where tf_deform is not installed.

    Raises:
        ValueError: `implementation` has another value.
        RuntimeError: It is "native" where there are no native ops.
    """
    check_implementation(implementation)
    if implementation == "native":
        require_native_ops()
    token = _asked_for.set(implementation)
    try:
        yield
    finally:
        _asked_for.reset(token)


@contextlib.contextmanager
def for_other_runtime(functions: Mapping[str, Callable]) -> Iterator[None]:
    """Switches all ops to `functions`, by the op's name, or to stock ops."""
    token = _asked_for.set(functions)
    try:
        yield
    finally:
        _asked_for.reset(token)


def is_for_other_runtime() -> bool:
    """Tells whether the graph that is traced now is for another runtime."""
    return isinstance(_asked_for.get(), Mapping) or _is_keras_exporting()


def _is_keras_exporting() -> bool:
    """Tells whether `keras.Model.export` traces for another runtime.

    Keras tells no layer for which runtime it traces, so the modules of the
    callers on the stack decide.

    Raises:
        ValueError: Keras exports to ONNX inside of a condition. tf2onnx forgets
            the shapes there, and no runtime loads a convolution that it writes
            without them.
    """
    if tf.executing_eagerly():
        return False
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if name in _KERAS_EXPORTERS:
            if name == _KERAS_ONNX and _is_in_condition():
                raise ValueError(
                    "Expected a model without conditions around its deformable "
                    "layers, as Keras' export to ONNX writes no convolutions "
                    "in them. Received: one inside of a condition. Use "
                    "tf_deform.export.onnx"
                )
            return True
        frame = frame.f_back
    return False


def _is_in_condition() -> bool:
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if type(graph).__name__ == "CondBranchFuncGraph":
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Marks every graph traced inside that has native ops.

    The first native op of a graph comes after a marker op whose name tells the
    user what to do. TensorFlow names the marker in its error where the graph is
    loaded without the library. See cc/tf/marker_op.h.
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
    """Returns the native op of this name, or the portable function.

    Both are called alike, with the op's inputs and attributes.
    """
    check_implementation(implementation)
    asked_for = _asked_for.get()
    if isinstance(asked_for, Mapping):
        return asked_for.get(name, portable)
    library = _loader.op_library()
    wanted = asked_for or _loader.forced() or implementation
    if _is_keras_exporting() or library is None or wanted == "portable":
        return portable
    _mark(library)
    return getattr(library, name)
