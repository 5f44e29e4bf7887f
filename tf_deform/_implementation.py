# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the ops runs: native, or stock TensorFlow's ops."""

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import tensorflow as tf

from tf_deform import _loader

# Or, while a model is exported to another runtime, what stands for an op there,
# by the native op's name; stock ops stand for all others.
_asked_for: contextvars.ContextVar[str | Mapping[str, Callable] | None] = (
    contextvars.ContextVar("tf_deform_implementation", default=None)
)
# The graphs that have the marker, inside `explaining`; otherwise None.
_explained: contextvars.ContextVar[set[tf.Graph] | None] = (
    contextvars.ContextVar("tf_deform_explained", default=None)
)

# Where Keras traces a model for runtimes that have no native ops. TensorFlow's
# converters refuse them there, but the one to ONNX only logs that it does not
# know them, and writes a file that nothing loads.
_KERAS_ONNX = "keras.src.export.onnx"
_KERAS_EXPORTERS = (
    _KERAS_ONNX,
    "keras.src.export.openvino",
    "keras.src.export.litert",
)


def check_implementation(implementation: Any) -> str:
    # A string tensor or an array could equal one.
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
    """Whether what is traced now will be run by something else."""
    return isinstance(_asked_for.get(), Mapping) or _is_keras_exporting()


def _is_keras_exporting() -> bool:
    """Whether `keras.Model.export` traces for a runtime without native ops.

    Keras tells no layer what it traces for: the callers do.

    Raises:
        ValueError: To ONNX inside of a condition, of which tf2onnx forgets the
            shapes: no runtime loads a convolution that it writes there.
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

    The first of them comes after an op whose name tells what to do: it is what
    TensorFlow names where the graph is loaded without the library. See
    cc/tf/marker_op.h.
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
    asked_for = _asked_for.get()
    if isinstance(asked_for, Mapping):
        return asked_for.get(name, portable)
    library = _loader.op_library()
    wanted = asked_for or _loader.forced() or implementation
    if _is_keras_exporting() or library is None or wanted == "portable":
        return portable
    _mark(library)
    return getattr(library, name)
