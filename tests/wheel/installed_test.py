# SPDX-License-Identifier: Apache-2.0
"""Tests the package as it is installed, with any TensorFlow, Keras and Python.

`make wheel-test` runs these tests in every environment that the wheel supports,
without the project's sources; `make test` runs them on this tree's build.
Nothing here is newer than Python 3.9.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info, _loader, ops

PACKAGE = pathlib.Path(tf_deform.__file__).parent
GOLDEN = pathlib.Path(__file__).parents[1] / "build" / "golden"
MINOR = ".".join(tf.__version__.split(".")[:2])
# What matrix.py expects of its environment.
INSTALLED = json.loads(os.environ.get("TF_DEFORM_TEST_INSTALLED", "null"))
OUT = os.environ.get("TF_DEFORM_TEST_OUT")
IS_NATIVE = INSTALLED is None or INSTALLED["native"]
# These versions load each other's libraries, and compute rightly with them.
ALIKE = {"2.18", "2.19"}

native = pytest.mark.skipif(not IS_NATIVE, reason="this wheel has no libraries")
from_wheel = pytest.mark.skipif(
    INSTALLED is None, reason="not installed by tests/wheel/matrix.py"
)
several = pytest.mark.skipif(
    len(_build_info.LIBRARIES) < 2, reason="built for one TensorFlow"
)


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def draw_calls():
    """Returns a call of each op: function, operands, options."""
    rng = np.random.default_rng(7)

    def draw(*shape, scale=1.0):
        return tf.constant(scale * rng.normal(size=shape).astype("float32"))

    sides = rng.uniform(1, 9, (5, 4)).cumsum(1)[:, [0, 1, 3, 2]]
    rois = np.concatenate([rng.integers(0, 2, (5, 1)), sides], 1)
    rois = tf.constant(rois.astype("float32"))
    return {
        "deformable_conv2d": (
            ops.deformable_conv2d,
            (
                draw(2, 9, 11, 6),
                draw(3, 3, 6, 20),
                draw(2, 9, 11, 18, scale=2.0),
                draw(2, 9, 11, 9),
            ),
            {"padding": "same"},
        ),
        "deformable_psroi_pool": (
            ops.deformable_psroi_pool,
            (draw(2, 9, 11, 18), rois, draw(5, 3, 3, 2)),
            {"output_dim": 2, "spatial_scale": 0.5, "pooled_size": 3},
        ),
        "deformable_roi_align": (
            ops.deformable_roi_align,
            (draw(2, 9, 11, 6), rois, draw(5, 3, 3, 2)),
            {"spatial_scale": 0.5, "pooled_size": 3},
        ),
    }


def results(function, operands, options, **more):
    """Returns the output and all gradients."""
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output = function(*operands, **options, **more)
        loss = tf.reduce_sum(output * tf.sin(tf.range(output.shape[-1] * 1.0)))
    return [output, *filter(tf.is_tensor, tape.gradient(loss, operands))]


@from_wheel
def test_where_it_is_installed():
    assert tf.__version__ == INSTALLED["tensorflow"]
    assert "site-packages" in str(PACKAGE)
    assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang")))


@native
def test_the_library_that_fits_is_loaded():
    assert _loader.op_library() is not None
    assert pathlib.Path(_loader.LIBRARY).name == f"_ops_{MINOR}.so"
    has_interface = int(MINOR.split(".")[1]) >= 17
    assert _loader.supports_jit() == has_interface


@pytest.mark.skipif(IS_NATIVE, reason="has libraries")
def test_the_package_without_libraries():
    """Tests one warning, and portable ops."""
    result = run(sys.executable, "-c", "import tf_deform; tf_deform.ops")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "Expected the native ops of tf_deform" in result.stderr
    assert _loader.op_library() is None


@pytest.mark.parametrize("name", sorted(draw_calls()))
def test_results(name):
    """Tests results and gradients against the ops of stock TensorFlow.

    With native ops, writes a hash of them: `matrix.py` compares it with other
    versions'.
    """
    function, operands, options = draw_calls()[name]
    received = results(function, operands, options)
    expected = results(function, operands, options, implementation="portable")
    assert len(received) == len(expected)
    for one, other in zip(received, expected):
        largest = np.abs(other).max()
        assert largest > 0.1
        np.testing.assert_allclose(one, other, atol=1e-4 * largest)
    if OUT and IS_NATIVE:
        content = b"".join(np.asarray(x).tobytes() for x in received)
        os.makedirs(OUT, exist_ok=True)
        with open(os.path.join(OUT, f"{name}.sha256"), "w") as file:
            file.write(hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", sorted(draw_calls()))
def test_compiled_by_xla(name):
    """Tests the same bits as eager; where XLA has no ops, an error in words."""
    function, operands, options = draw_calls()[name]
    compiled = tf.function(
        lambda *x: results(function, x, options), jit_compile=True
    )
    if not _loader.supports_jit():
        with pytest.raises(tf.errors.InvalidArgumentError, match="TfDeform"):
            compiled(*operands)
        return
    for one, other in zip(compiled(*operands), results(*draw_calls()[name])):
        if _loader.op_library() is None:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(one, other)


LATE = """
import sys
import numpy as np
import tensorflow as tf

tf.random.set_seed(1)
images = tf.random.normal((1, 8, 9, 3))
if sys.argv[1] == "compiled":
    tf.function(tf.nn.relu, jit_compile=True)(images)
import tf_deform

layer = tf_deform.layers.DeformableConv2D(4, 3, modulation="sigmoid")
layer(images)
layer.offset_bias.assign(tf.random.normal(layer.offset_bias.shape))

def run():
    with tf.GradientTape() as tape:
        tape.watch(images)
        loss = tf.reduce_sum(tf.sin(layer(images)))
    return loss, tape.gradient(loss, images)

for one, other in zip(run(), tf.function(run, jit_compile=True)()):
    # The loss is a sum of 168 sines, which may nearly cancel.
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
"""


@native
@pytest.mark.skipif(not _loader.supports_jit(), reason="no XLA for ops")
@pytest.mark.parametrize("before", ["run", "compiled"])
def test_loaded_after_the_first_op(before):
    """Tests XLA, which makes its list of kernels when the first op runs."""
    result = run(sys.executable, "-c", LATE, before)
    assert result.returncode == 0, result.stderr[-3000:]


@native
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_[0-9]")))
def test_saved_models_of_the_project(path):
    """Tests files with operands, and results of the op that wrote them."""
    with np.load(path / "expected.npz") as file:
        arrays = [file[key] for key in file.files]
    model = tf.saved_model.load(str(path))
    if path.name.startswith("exported"):
        received, expected = [model.serve(arrays[0])], arrays[1:]
    else:
        received, expected = model(*map(tf.constant, arrays[:3])), arrays[3:]
    assert len(received) == len(expected)
    for one, other in zip(received, expected):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@native
def test_instruction_set():
    """Tests that the core uses what the processor has.

    A linker's own table of features, which nobody filled, once gave the slowest
    code without a word.
    """
    flags = re.search(
        "^flags.*$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE
    )[0].split()
    expected = "baseline"
    if {"avx2", "fma", "f16c"} <= set(flags):
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
            expected = "avx512"
    code = "import ctypes, sys; core = ctypes.CDLL(sys.argv[1])\n"
    code += "core.TfDeformInstructionSet.restype = ctypes.c_char_p\n"
    code += "print(core.TfDeformInstructionSet().decode())"
    core = PACKAGE / _build_info.CORE
    found = run(sys.executable, "-c", code, core, TF_DEFORM_MAX_ISA="avx512")
    assert found.stdout.strip() == expected, found.stderr


def others():
    return sorted(_build_info.LIBRARIES.keys() - {MINOR})


@several
@pytest.mark.parametrize("other", others())
def test_the_loader_refuses_other_libraries(other, monkeypatch):
    wrong = PACKAGE / f"_ops_{other}.so"
    monkeypatch.setattr(_loader, "LIBRARY", str(wrong))
    with pytest.raises(ImportError) as error:
        _loader.op_library.__wrapped__()
    assert f"TensorFlow {MINOR}" in str(error.value)
    assert f"for TensorFlow {other}" in str(error.value)


BY_HAND = """
import sys
import tensorflow as tf
try:
    library = tf.load_op_library(sys.argv[1])
except tf.errors.NotFoundError as error:
    print("refused", "undefined symbol" in str(error))
except tf.errors.FailedPreconditionError as error:
    print("refused", f"TensorFlow {tf.__version__}" in str(error))
else:
    x = tf.random.normal((1, 6, 7, 3))
    kernel = tf.random.normal((3, 3, 3, 5))
    y = library.tf_deform_deformable_conv2d(
        inputs=x, kernel=kernel, offset=tf.zeros((1, 6, 7, 18)), mask=[],
        strides=[1, 1], dilations=[1, 1], padding="SAME")
    print(float(tf.reduce_max(tf.abs(y - tf.nn.conv2d(x, kernel, 1, "SAME")))))
"""


@several
@pytest.mark.parametrize("other", others())
def test_other_libraries_by_hand(other):
    """Tests `tf.load_op_library` alone: an error, never a crash.

    Most libraries lack a symbol. TensorFlow 2.16 with CUDA has all that 2.17's
    library needs, and crashed when ops registered themselves for XLA.
    """
    result = run(sys.executable, "-c", BY_HAND, PACKAGE / f"_ops_{other}.so")
    assert result.returncode == 0, result.stderr
    printed = result.stdout.strip()
    if {other, MINOR} == ALIKE:
        assert float(printed) < 1e-5
    else:
        assert printed == "refused True"


@native
def test_commands():
    library = run(sys.executable, "-m", "tf_deform", "library")
    assert library.stdout.strip() == _loader.LIBRARY, library.stderr
    doctor = run(sys.executable, "-m", "tf_deform", "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
