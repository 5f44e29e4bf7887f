# SPDX-License-Identifier: Apache-2.0
"""Loads the op library that fits this TensorFlow, once.

TensorFlow's C++ interface changes between minor versions, so the package has a
library for each of them, all linked to one core.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
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


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


# The library for this TensorFlow, which may not be there.
LIBRARY = os.path.join(
    os.path.dirname(__file__), f"_ops_{_minor(tf.__version__)}.so"
)
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
    return has_xla() and (
        is_built_with_cuda() or not tf.config.list_physical_devices("GPU")
    )


def has_xla() -> bool:
    """Tells whether the library for this TensorFlow connects ops with XLA.

    TensorFlow 2.15 and 2.16 do not have the interface for it.
    """
    _, xla = _build_info.LIBRARIES.get(_minor(tf.__version__), ("", False))
    return xla


def check_version(installed: str) -> None:
    """Raises ImportError unless there is a library for a TensorFlow version."""
    if _minor(installed) in _build_info.LIBRARIES:
        if os.path.exists(LIBRARY):
            _check_file(installed)
        return
    versions = ", ".join(_build_info.LIBRARIES)
    newest = list(_build_info.LIBRARIES)[-1]
    raise ImportError(
        f"Expected TensorFlow {versions}, for which this tf_deform "
        f"({_build_info.VERSION}) has op libraries. Received: TensorFlow "
        f"{installed}. Run `pip install 'tensorflow=={newest}.*'`; or build in "
        "the project's folder with `pip install --no-build-isolation --no-deps "
        f"--force-reinstall .`; or set {VARIABLE}=portable to use stock "
        "TensorFlow ops, which are slower and take more memory."
    )


def _check_file(installed: str) -> None:
    """Raises ImportError if the library's file is for another TensorFlow.

    The file tells this without being loaded: another version's library may
    load, and then crash.
    """
    with open(LIBRARY, "rb") as file:
        found = re.search(
            rb"\0tf_deform for TensorFlow ([^\0]+)\0", file.read()
        )
    built = found[1].decode() if found else "of unknown version"
    if _minor(built) != _minor(installed):
        raise ImportError(
            f"Expected {LIBRARY} to be for TensorFlow {_minor(installed)}, "
            f"which is {installed} here. Received: a library for TensorFlow "
            f"{built}. Install tf_deform anew."
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
    if _build_info.LIBRARIES:
        check_version(tf.__version__)
        if os.path.exists(LIBRARY):
            return _load()
    text = (
        f"Expected the native ops of tf_deform at {LIBRARY}. Received: no such "
        "file. On Linux with an x86-64 processor, run `pip install tf-deform` "
        "or, in the project's folder, `pip install .`"
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
