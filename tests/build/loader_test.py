# SPDX-License-Identifier: Apache-2.0
"""Tests loading the op library more than once in a process, in every order.

Which library is loaded: `libraries_test.py`.
"""

import json
import pathlib
import shutil

import pytest

import tf_deform
from tf_deform import _build_info, _loader

CORE = pathlib.Path(_loader.LIBRARY).with_name(_build_info.CORE)
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
def attempt(step, *arguments):
    try:
        step(*arguments)
    except (ImportError, tf.errors.FailedPreconditionError) as error:
        print(f"{type(error).__name__}: {error}")
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
# Runs each script in a copy of this process, which has imported TensorFlow, and
# has not used it yet. The import takes seconds.
FORK = """
import json, traceback
os.chdir(sys.argv[2])
OTHER = os.path.abspath("other.so")
for name, script in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    output = os.open(f"{name}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        exec(script)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)
"""
# Prints the warnings of the import.
WARNINGS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tf_deform
for warning in caught:
    if "tf_deform" in str(warning.message):
        print(warning.category.__name__, warning.message)
work()
"""
# In the folder are the library as `same.so` (a link) and `copy.so`, the core,
# and both of another version, as `other.so` and its core.
SCRIPTS = {
    # The ops that are registered already are used.
    "ours, then others": (
        "ours(); load('./copy.so'); load('./same.so'); work()"
    ),
    "copy": "load(os.path.abspath('copy.so')); ours(); work()",
    "link": "load(os.path.abspath('same.so')); ours(); work()",
    "relative": "load('./same.so'); ours(); work()",
    "same": "load(os.path.realpath('same.so')); ours(); work()",
    # A script loads model and library from a folder, and uses the package.
    "model": """
import tf_deform
call = tf.Module()
call.run = tf.function(
    lambda x: tf_deform.ops.deformable_conv2d(
        x, tf.ones((1, 1, 2, 3)), x * 0.0),
    input_signature=[tf.TensorSpec((1, 4, 5, 2))])
tf.saved_model.save(call, "model")
load("./copy.so")
loaded = tf.saved_model.load("model")
print(tf.reduce_sum(loaded.run(tf.ones((1, 4, 5, 2)))))
work()
""",
    "other first": "load(OTHER); attempt(ours); attempt(ours)",
    "other afterwards": "ours(); attempt(load, OTHER); work()",
    # Ops are registered without TensorFlow's functions for them.
    "something else": """
import ctypes
ctypes.CDLL(os.path.abspath("copy.so"))
attempt(ours)
""",
    "warnings": "import os\n"
    + WARNINGS
    + "assert os.environ['TF_USE_LEGACY_KERAS'] == '0'\n",
    # `importlib.reload`, and an import after all modules were removed.
    "anew": """
import tf_deform
for name in sorted(name for name in sys.modules if "tf_deform" in name):
    if name != "tf_deform._build_info":
        importlib.reload(sys.modules[name])
work()
for name in [name for name in sys.modules if "tf_deform" in name]:
    del sys.modules[name]
work()
""",
}


def replace(content: bytes, old: str, new: str) -> bytes:
    assert content.count(old.encode()) == 1
    return content.replace(old.encode(), new.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_python) -> pathlib.Path:
    """Makes a folder with libraries, and with the outputs of all scripts."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "same.so").symlink_to(LIBRARY)
    shutil.copy(LIBRARY, folder / "copy.so")
    shutil.copy(CORE, folder)
    version = tf_deform.__version__
    # The new text is as long as the old text: nothing in the file may move.
    other = "9" * len(version)
    other_core = CORE.name.replace(version, other)
    library = replace(LIBRARY.read_bytes(), f"\0{version}\0", f"\0{other}\0")
    library = replace(library, CORE.name, other_core)
    (folder / "other.so").write_bytes(library)
    core = replace(CORE.read_bytes(), CORE.name, other_core)
    (folder / other_core).write_bytes(core)
    arguments = START + FORK, json.dumps(SCRIPTS), folder
    run_python(*arguments, TF_USE_LEGACY_KERAS=0)
    return folder


@pytest.fixture
def output(folder):
    """Returns a function that returns a script's output."""
    return lambda name: (folder / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    "name", ["ours, then others", "copy", "link", "relative", "same"]
)
def test_loaded_twice(name, output):
    """Tests that the ops that are registered already are used."""
    printed = output(name)
    assert "works" in printed
    assert ("functions True" in printed) == (name != "ours, then others")
    assert printed.count("functions") == 1 + ("others" in name)


def test_a_model_beside_a_copy(output):
    printed = output("model")
    assert "120" in printed
    assert "works" in printed


def test_another_version_first(output, folder):
    """Tests that the second version registers nothing.

    The error is raised again at every try.
    """
    printed = output("other first")
    assert "functions True" in printed
    said = [line for line in printed.splitlines() if "ImportError" in line]
    assert len(said) == 2
    for line in said:
        assert "Expected one version of tf_deform's op library" in line
        assert f"{LIBRARY} of version {tf_deform.__version__}" in line
        assert f"{folder}/other.so of version 9" in line


def test_another_version_afterwards(output, folder):
    printed = output("other afterwards")
    assert "Error: Expected one version of tf_deform's op library" in printed
    assert f"after {LIBRARY} of version {tf_deform.__version__}" in printed
    assert f"{folder}/other.so" in printed
    assert "works" in printed


def test_loaded_by_something_else(output, folder):
    printed = output("something else")
    assert "ImportError: Expected tf_deform's op library" in printed
    assert f"{folder}/copy.so" in printed
    assert str(LIBRARY) in printed


def test_modules_are_loaded_anew(output):
    assert output("anew").count("works") == 2


def test_versions_are_the_same():
    header = (LIBRARY.parents[1] / "cc/tf/library.h").read_text()
    assert f'kVersion[] = "{tf_deform.__version__}"' in header


def test_keras_3_is_asked_for(output):
    """Tests TF_USE_LEGACY_KERAS=0, with which all scripts above run."""
    printed = output("warnings")
    assert "works" in printed
    assert "RuntimeWarning" not in printed
    assert "TF_USE_LEGACY_KERAS=1" not in printed
