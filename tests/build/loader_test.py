# SPDX-License-Identifier: Apache-2.0
"""Tests loading the op library more than once in a process, in every order."""

import pathlib
import shutil

import pytest

import tf_deform
from tf_deform import _loader

LIBRARY = pathlib.Path(_loader.LIBRARY)

START = """
import importlib, os, sys
import numpy as np
import tensorflow as tf
def ours():
    import tf_deform
def load(path):
    module = tf.load_op_library(path)
    print("functions", hasattr(module, "tf_deform_deformable_conv2d"))
def work():
    import tf_deform
    x = tf.ones((1, 4, 5, 2))
    call = tf.function(tf_deform.ops.deformable_conv2d, jit_compile=True)
    operands = x, tf.ones((1, 1, 2, 3)), tf.zeros((1, 4, 5, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf_deform.ops.deformable_conv2d(*operands)
    assert tf.reduce_sum(y) == tf.reduce_sum(call(*operands)) == 120
    assert np.all(tape.gradient(y, x) == 3)
    rois = tf.constant([[0.0, 0, 0, 3, 3]])
    tf_deform.ops.deformable_roi_align(x, rois, pooled_size=2, spatial_scale=1)
    tf_deform.ops.deformable_psroi_pool(
        x, rois, output_dim=2, group_size=1, pooled_size=2, spatial_scale=1)
    print("works")
"""


@pytest.fixture
def copy(tmp_path):
    return pathlib.Path(shutil.copy(LIBRARY, tmp_path / "beside_a_model.so"))


@pytest.fixture
def another_version(copy):
    """Copies the library and changes the version that the copy reports."""
    version = tf_deform.__version__.encode() + b"\0"
    content = copy.read_bytes()
    assert content.count(b"\0" + version) == 1
    # The new text is as long as the old text: nothing in the file may move.
    other = b"9" * (len(version) - 1) + b"\0"
    copy.write_bytes(content.replace(b"\0" + version, b"\0" + other))
    return copy


@pytest.mark.parametrize(
    ("first", "loads"),
    [
        ("ours", "copy"),
        ("ours", "link"),
        ("file", "copy"),
        ("file", "link"),
        ("file", "relative"),
        ("file", "same"),
    ],
)
def test_loaded_twice(run_python, tmp_path, copy, first, loads):
    """Tests that the ops that are registered already are used."""
    (tmp_path / "link.so").symlink_to(LIBRARY)
    path = {
        "copy": str(copy),
        "link": str(tmp_path / "link.so"),
        "relative": "./" + LIBRARY.name,
        "same": str(LIBRARY),
    }[loads]
    steps = ["ours()", "load(sys.argv[1])"]
    printed = run_python(
        START
        + "os.chdir(sys.argv[2])\n"
        + "\n".join(steps if first == "ours" else steps[::-1])
        + "\nwork()\n",
        path,
        LIBRARY.parent if loads == "relative" else tmp_path,
    )
    assert "works" in printed
    assert ("functions True" in printed) == (first == "file")


def test_a_model_beside_a_copy(run_python, tmp_path, copy):
    """Tests a script that loads model and library from a folder.

    The package is used in the same process.
    """
    printed = run_python(
        START
        + """
import tf_deform
call = tf.Module()
call.run = tf.function(
    lambda x: tf_deform.ops.deformable_conv2d(
        x, tf.ones((1, 1, 2, 3)), x * 0.0),
    input_signature=[tf.TensorSpec((1, 4, 5, 2))])
tf.saved_model.save(call, sys.argv[1])
load(sys.argv[2])
loaded = tf.saved_model.load(sys.argv[1])
print(tf.reduce_sum(loaded.run(tf.ones((1, 4, 5, 2)))))
work()
""",
        tmp_path / "model",
        copy,
    )
    assert "120" in printed
    assert "works" in printed


def test_another_version_first(run_python, another_version):
    """Tests that the second version registers nothing.

    The error is raised again at every try.
    """
    printed = run_python(
        START
        + """
load(sys.argv[1])
for _ in range(2):
    try:
        ours()
    except ImportError as error:
        print("ImportError:", error)
""",
        another_version,
    )
    assert "functions True" in printed
    said = [line for line in printed.splitlines() if "ImportError" in line]
    assert len(said) == 2
    for line in said:
        assert "Expected one version of tf_deform's op library" in line
        assert f"{LIBRARY} of version {tf_deform.__version__}" in line
        assert f"{another_version} of version 9" in line


def test_another_version_afterwards(run_python, another_version):
    printed = run_python(
        START
        + """
ours()
try:
    load(sys.argv[1])
except tf.errors.FailedPreconditionError as error:
    print("Error:", error)
work()
""",
        another_version,
    )
    assert "Error: Expected one version of tf_deform's op library" in printed
    assert f"after {LIBRARY} of version {tf_deform.__version__}" in printed
    assert str(another_version) in printed
    assert "works" in printed


def test_loaded_by_something_else(run_python, copy):
    """Tests ops that are registered without TensorFlow's functions for them."""
    printed = run_python(
        START
        + """
import ctypes
ctypes.CDLL(sys.argv[1])
try:
    ours()
except ImportError as error:
    print("ImportError:", error)
""",
        copy,
    )
    assert "ImportError: Expected tf_deform's op library" in printed
    assert str(copy) in printed
    assert str(LIBRARY) in printed


def test_modules_are_loaded_anew(run_python):
    """Tests `importlib.reload`, and an import after removing all modules."""
    printed = run_python(
        START
        + """
import tf_deform
for name in sorted(name for name in sys.modules if "tf_deform" in name):
    if name != "tf_deform._build_info":
        importlib.reload(sys.modules[name])
work()
for name in [name for name in sys.modules if "tf_deform" in name]:
    del sys.modules[name]
work()
"""
    )
    assert printed.count("works") == 2


def test_versions_are_the_same():
    header = (LIBRARY.parents[1] / "cc/tf/library.h").read_text()
    assert f'kVersion[] = "{tf_deform.__version__}"' in header


@pytest.mark.parametrize("value", ["0", "1"])
def test_legacy_keras(run_python, value):
    """Tests that functions work beside Keras 2.

    Its models refuse Keras 3 layers.
    """
    printed = run_python(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tf_deform
for warning in caught:
    if "tf_deform" in str(warning.message):
        print(warning.category.__name__, warning.message)
"""
        + START
        + "work()\n",
        TF_USE_LEGACY_KERAS=value,
    )
    assert "works" in printed
    assert ("RuntimeWarning Expected Keras 3" in printed) == (value == "1")
    assert ("TF_USE_LEGACY_KERAS=1" in printed) == (value == "1")
