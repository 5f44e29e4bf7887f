# SPDX-License-Identifier: Apache-2.0
"""Tests installing, loading, and that old saved models stay loadable."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info, _loader

PACKAGE = pathlib.Path(tf_deform.__file__).parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[2]


def test_requires_the_minor_version_that_it_was_built_against():
    minor = ".".join(_build_info.TENSORFLOW_VERSION.split(".")[:2])
    required = importlib.metadata.requires("tf-deform")
    assert f"tensorflow=={minor}.*" in required
    assert importlib.metadata.version("tf-deform") == tf_deform.__version__


@pytest.mark.parametrize("installed", ["2.20.3", "2.22.0", "3.21.0"])
def test_other_minor_version_is_refused(installed):
    with pytest.raises(ImportError) as error:
        _loader.check_version("2.21.0", installed)
    text = str(error.value)
    assert "2.21" in text and installed in text
    assert "pip install 'tensorflow==2.21.*'" in text


@pytest.mark.parametrize("installed", ["2.21.0", "2.21.1", "2.21.0-rc1"])
def test_same_minor_version_is_accepted(installed):
    _loader.check_version("2.21.0", installed)


def test_both_builds_take_the_same_sources():
    setup = (ROOT / "setup.py").read_text() + (ROOT / "cc/build.py").read_text()
    bazel = (ROOT / "BUILD").read_text()
    for glob in ("cc/core/**/*.cc", "cc/*.cc"):
        assert f'"{glob}"' in setup
        assert f'"{glob}"' in bazel


def test_both_builds_compile_with_the_same_flags():
    """Tests that setup.py and Bazel use the same flags.

    A flag that one build lacks changes its code, and so its results.
    """
    spec = importlib.util.spec_from_file_location("build", ROOT / "cc/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    text = (ROOT / ".bazelrc").read_text()
    bazel = re.findall(r"^build .*", text, re.MULTILINE)
    flags = re.findall(r"--(?:copt|cxxopt)=(\S+)", " ".join(bazel))
    assert "build --compilation_mode=opt" in bazel
    # Bazel adds these flags itself.
    own = {"-DNDEBUG", "-fPIC", "-g0", "-I."}
    assert own < set(build.FLAGS)
    # setup.py compiles the core as C++17, and the sources that include
    # TensorFlow's headers without warnings about their macros; Bazel has one
    # set of flags for both.
    others = {"-std=c++17", "-Wno-deprecated-declarations"}
    setup = (ROOT / "setup.py").read_text()
    setup += (ROOT / "cc/build.py").read_text()
    assert all(f'"{flag}"' in setup for flag in others)
    assert set(flags) == set(build.FLAGS) - own | others


def test_no_flag_ties_the_binary_to_this_processor():
    for name in ("setup.py", "cc/build.py", "BUILD", ".bazelrc", "Makefile"):
        assert "-march" not in (ROOT / name).read_text()


def test_core_in_the_package_has_c_entry_points():
    core = ctypes.CDLL(str(PACKAGE / "_core.so"))
    core.TfDeformInstructionSet.restype = ctypes.c_char_p
    names = (b"baseline", b"avx2", b"avx512", b"avx512_bf16", b"amx")
    assert core.TfDeformInstructionSet() in names


@pytest.mark.parametrize(
    "name",
    [
        "deformable_conv2d_1",
        "deformable_conv2d_2",
        "deformable_psroi_pool_1",
        "deformable_roi_align_1",
        "exported_1",
    ],
)
def test_golden_saved_models_load(name):
    """Tests models of earlier versions, which every later version must load.

    Four return an op's output and gradients, and have no attribute at its
    default; the second convolution is of a layer's fields, one of which is NaN.
    They are differentiated again, which takes defaults for attributes that the
    file does not know. One is a layer that `export` wrote.
    """
    with np.load(GOLDEN / name / "expected.npz") as file:
        arrays = [file[key] for key in file.files]
    model = tf.saved_model.load(GOLDEN / name)
    if name.startswith("exported"):
        received, expected = [model.serve(arrays[0])], arrays[1:]
    else:
        operands, expected = [tf.constant(x) for x in arrays[:3]], arrays[3:]
        with tf.GradientTape() as tape:
            tape.watch(operands)
            received = model(*operands)
        gradients = tape.gradient(received[1:], operands)
        assert gradients[0] is not None
        for gradient in filter(tf.is_tensor, gradients):
            assert np.isfinite(gradient).all()
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
