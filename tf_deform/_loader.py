# SPDX-License-Identifier: Apache-2.0
"""Loads the shared object with the ops, once, if it fits this TensorFlow."""

import contextlib
import ctypes
import functools
import os
import warnings
from types import ModuleType

import tensorflow as tf

try:
    from tf_deform import _build_info
except ImportError as error:
    raise ImportError(
        "Expected tf_deform to be built. Received: a source tree without "
        "built ops. Run `pip install .` (or, for development, `pip install "
        "-e .`) in the project's folder, and start Python elsewhere."
    ) from error

LIBRARY = os.path.join(os.path.dirname(__file__), "_ops.so")
IMPLEMENTATIONS = ("native", "portable")
VARIABLE = "TF_DEFORM_IMPLEMENTATION"
_AN_OP = "tf_deform_deformable_conv2d"


def is_built_with_cuda() -> bool:
    """Tells whether this package has kernels for GPUs.

    A package without them was built without nvcc, and a model on a GPU runs its
    deformable layers on the CPU.

    Returns:
        True or False. The answer says nothing about this machine: a package
        with GPU kernels also works where there is no GPU.
    """
    return _build_info.CUDA_VERSION is not None and os.path.exists(LIBRARY)


def supports_jit() -> bool:
    """Tells whether the ops compile inside `jit_compile=True` on this machine.

    On a machine with a GPU, XLA compiles for the GPU and cannot leave an op to
    the CPU, so the package must have GPU kernels. Portable ops always compile.
    """
    if op_library() is None:
        return True
    return _build_info.XLA and (
        is_built_with_cuda() or not tf.config.list_physical_devices("GPU")
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_version(built: str, installed: str) -> None:
    """Raises ImportError unless both versions have the same minor version.

    TensorFlow's C++ interface changes between minor versions: a shared object
    that was built against another minor version would crash at best.
    """
    if _minor(built) != _minor(installed):
        raise ImportError(
            f"Expected TensorFlow {_minor(built)}, which this tf_deform was "
            f"built against ({built}). Received: TensorFlow {installed}. Run "
            f"`pip install 'tensorflow=={_minor(built)}.*'`, or rebuild in the "
            "project's folder with `pip install --no-build-isolation "
            "--no-deps --force-reinstall .`"
        )


@functools.cache
def forced() -> str | None:
    """Returns the implementation that the environment asks for, or None."""
    value = os.environ.get(VARIABLE) or None
    if value not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f'Expected the environment variable {VARIABLE} to be "native", '
            f'"portable" or not set. Received: {value!r}'
        )
    return value


def _load() -> ModuleType:
    """Loads the library, or takes the ops of a copy that was loaded before."""
    # The registration fails with this error if a copy of another version was
    # loaded; see below.
    with contextlib.suppress(tf.errors.FailedPreconditionError):
        module = tf.load_op_library(LIBRARY)
        if hasattr(module, _AN_OP):
            return module
    # TensorFlow generates Python functions only for the ops that a file
    # registers while it is loaded, and returns the same functions later only
    # for the name by which the file was loaded then.
    library = ctypes.CDLL(LIBRARY)
    path, version = (
        ctypes.CFUNCTYPE(ctypes.c_char_p)((name, library))().decode()
        for name in ("TfDeformRegisteredBy", "TfDeformRegisteredVersion")
    )
    if version != _build_info.VERSION:
        raise ImportError(
            "Expected one version of tf_deform's op library in a process. "
            f"Received: {LIBRARY} of version {_build_info.VERSION} after "
            f"{path} of version {version}"
        )
    module = tf.load_op_library(path)
    if not hasattr(module, _AN_OP):
        raise ImportError(
            "Expected tf_deform's op library to be loaded by TensorFlow. "
            f"Received: {path}, loaded in another way, before {LIBRARY}. "
            "Import tf_deform first."
        )
    return module


@functools.cache
def op_library() -> ModuleType | None:
    """Returns the module of the ops' generated Python wrappers, or None.

    It is None where the portable implementation replaces the ops: on a platform
    for which there is no binary, or because the environment says so.
    """
    if forced() == "portable":
        return None
    if os.path.exists(LIBRARY):
        check_version(_build_info.TENSORFLOW_VERSION, tf.__version__)
        return _load()
    text = (
        f"Expected the native ops of tf_deform at {LIBRARY}. Received: no such "
        "file. Run `pip install .` (or `pip install -e .`) in the project's "
        "folder"
    )
    if forced() == "native":
        raise ImportError(f"{text}, or unset {VARIABLE}.")
    warnings.warn(
        f"{text}, or set {VARIABLE}=portable if this is meant. Until then "
        "stock TensorFlow ops are used, which give the same results but are "
        "slower and take more memory.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
