# SPDX-License-Identifier: Apache-2.0
"""Tests installing, loading, and that old saved models stay loadable."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil

import keras
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


BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
# An editable installation would find in the source tree what the copy lacks.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
try:
    import tf_deform
except ImportError as error:
    print("ImportError:", error)
"""


@pytest.fixture
def copy_of_the_package(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tf_deform")
    return tmp_path / "tf_deform"


def test_import_next_to_another_tensorflow(run_python, copy_of_the_package):
    """Tests that the check precedes the loading of the library."""
    info = copy_of_the_package / "_build_info.py"
    info.write_text(
        re.sub(
            r"TENSORFLOW_VERSION = .*",
            'TENSORFLOW_VERSION = "2.4.1"',
            info.read_text(),
        )
    )
    (copy_of_the_package / "_ops.so").write_bytes(b"not a library")
    printed = run_python(BROKEN, copy_of_the_package.parent)
    assert "ImportError: Expected TensorFlow 2.4" in printed
    assert f"Received: TensorFlow {tf.__version__}" in printed
    assert "pip install 'tensorflow==2.4.*'" in printed


def test_import_of_a_package_that_was_not_built(
    run_python, copy_of_the_package
):
    """Tests a package without build information.

    The import works without the library alone: see implementation_test.py.
    """
    (copy_of_the_package / "_build_info.py").unlink()
    printed = run_python(BROKEN, copy_of_the_package.parent)
    assert "ImportError: Expected" in printed
    assert "pip install" in printed


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


def golden_function(name: str, rng: np.random.Generator):
    """Returns a function of three tensors; no attribute has its default."""
    if name == "deformable_conv2d_1":
        kernel = rng.normal(size=(3, 2, 2, 6)).astype(np.float32)
        return lambda inputs, offset, mask: tf_deform.ops.deformable_conv2d(
            inputs,
            kernel,
            offset,
            mask,
            strides=(2, 1),
            padding=((1, 0), (2, 1)),
            dilation_rate=(1, 2),
            offset_groups=2,
            boundary="clamp",
        )
    if name == "deformable_psroi_pool_1":
        return lambda inputs, rois, trans: tf_deform.ops.deformable_psroi_pool(
            inputs,
            rois,
            trans,
            output_dim=4,
            spatial_scale=0.3,
            pooled_size=(3, 2),
            group_size=(2, 1),
            part_size=(1, 2),
            sample_per_part=3,
            trans_std=0.2,
        )
    return lambda inputs, rois, offset: tf_deform.ops.deformable_roi_align(
        inputs,
        rois,
        offset,
        pooled_size=(3, 2),
        spatial_scale=0.3,
        sampling_ratio=3,
        gamma=0.2,
    )


ROIS = [[1, 2, 1, 15, 12.5], [0, -3, 4, 9, 22], [-1, 0, 0, 9, 9]]
# Operands, as signatures with shapes or as values.
GOLDENS = {
    "deformable_conv2d_1": [
        ((None, None, None, 4), (2, 6, 5, 4)),
        ((None, None, None, 24), (2, 3, 6, 24)),
        ((None, None, None, 12), (2, 3, 6, 12)),
    ],
    "deformable_psroi_pool_1": [
        ((None, None, None, 8), (2, 6, 5, 8)),
        ((None, 5), ROIS),
        ((None, 1, 2, 4), (3, 1, 2, 4)),
    ],
    "deformable_roi_align_1": [
        ((None, None, None, 4), (2, 6, 5, 4)),
        ((None, 5), ROIS),
        ((None, 3, 2, 2), (3, 3, 2, 2)),
    ],
}


def write_golden(name: str, folder: pathlib.Path) -> None:
    """Writes a folder of `golden`; kept as a record, never to be run again.

    The graph also holds the gradient op.
    """
    rng = np.random.default_rng(0)
    function = golden_function(name, rng)
    signatures, operands = zip(*GOLDENS[name], strict=True)

    class Golden(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec(s) for s in signatures])
        def __call__(self, *tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = function(*tensors)
            gradients = tape.gradient(output, tensors)
            return output, *(g for g in gradients if g is not None)

    arrays = [
        np.float32(operand)
        if isinstance(operand, list)
        else rng.normal(size=operand).astype(np.float32)
        for operand in operands
    ]
    golden = Golden()
    results = golden(*arrays)
    tf.saved_model.save(golden, folder)
    np.savez_compressed(
        folder / "expected.npz",
        *(*arrays, *(result.numpy() for result in results)),
    )


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_saved_models_load(name):
    """Tests models that `write_golden` wrote.

    Every later version must load them.
    """
    with np.load(GOLDEN / name / "expected.npz") as file:
        arrays = [file[key] for key in file.files]
    model = tf.saved_model.load(GOLDEN / name)
    for received, expected in zip(model(*arrays[:3]), arrays[3:], strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)


def write_golden_export(folder: pathlib.Path) -> None:
    """Writes `golden/exported_1`; kept as a record, never to be run again."""
    image = keras.Input((9, 8, 2), name="image")
    layer = tf_deform.layers.DeformableConv2D(3, 3, modulation="2sigmoid")
    model = keras.Model(image, layer(image))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    tf_deform.export.saved_model(model, folder, image_bytes=False)
    images = rng.normal(size=(2, 9, 8, 2)).astype(np.float32)
    outputs = model(images).numpy()
    np.savez_compressed(folder / "expected.npz", images, outputs)


def test_a_golden_export_loads():
    """Tests the file that `write_golden_export` wrote, with the marker op."""
    with np.load(GOLDEN / "exported_1" / "expected.npz") as file:
        images, expected = (file[key] for key in file.files)
    model = tf.saved_model.load(GOLDEN / "exported_1")
    received = model.serve(images)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)
