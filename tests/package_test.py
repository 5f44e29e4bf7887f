# SPDX-License-Identifier: Apache-2.0
"""Installation, loading, and the promise that saved models stay loadable."""

import ctypes
import importlib.metadata
import pathlib
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info, _loader

PACKAGE = pathlib.Path(tf_deform.__file__).parent
GOLDEN = pathlib.Path(__file__).parent / "golden"


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
    """The check comes before the library is loaded."""
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


@pytest.mark.parametrize("missing", ["_ops.so", "_build_info.py"])
def test_import_of_a_package_that_was_not_built(
    run_python, copy_of_the_package, missing
):
    (copy_of_the_package / missing).unlink()
    printed = run_python(BROKEN, copy_of_the_package.parent)
    assert "ImportError: Expected" in printed
    assert "pip install" in printed


def test_both_builds_take_the_same_sources():
    root = pathlib.Path(__file__).parent.parent
    setup, build = (root / "setup.py").read_text(), (root / "BUILD").read_text()
    for glob in ("cc/core/*.cc", "cc/tf/*.cc"):
        assert f'"{glob}"' in setup
        assert f'"{glob}"' in build


def test_no_flag_ties_the_binary_to_this_processor():
    root = pathlib.Path(__file__).parent.parent
    for name in ("setup.py", "BUILD", ".bazelrc", "Makefile"):
        assert "-march" not in (root / name).read_text()


def test_core_in_the_package_has_c_entry_points():
    core = ctypes.CDLL(str(PACKAGE / "_core.so"))
    core.TfDeformInstructionSet.restype = ctypes.c_char_p
    assert core.TfDeformInstructionSet() in (b"baseline", b"avx2", b"avx512")


def write_golden(folder: pathlib.Path) -> None:
    """How `golden/deformable_conv2d_1` was made; never to be made anew.

    All attributes of both ops differ from their defaults, and the gradient op
    is in the graph.
    """
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 2, 6)).astype(np.float32)

    class Golden(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, None, 4)),
                tf.TensorSpec((None, None, None, 24)),
                tf.TensorSpec((None, None, None, 12)),
            ]
        )
        def __call__(self, inputs, offset, mask):
            with tf.GradientTape() as tape:
                tape.watch([inputs, offset, mask])
                output = tf_deform.ops.deformable_conv2d(
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
            return output, *tape.gradient(output, [inputs, offset, mask])

    inputs = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    offset = rng.normal(size=(2, 3, 6, 24)).astype(np.float32)
    mask = rng.normal(size=(2, 3, 6, 12)).astype(np.float32)
    golden = Golden()
    results = golden(inputs, offset, mask)
    tf.saved_model.save(golden, folder)
    np.savez_compressed(
        folder / "expected.npz",
        *(inputs, offset, mask, *(result.numpy() for result in results)),
    )


@pytest.mark.parametrize("name", ["deformable_conv2d_1"])
def test_golden_saved_models_load(name):
    """Written once by `write_golden`, read by every version after it."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        arrays = [file[key] for key in file.files]
    model = tf.saved_model.load(GOLDEN / name)
    for received, expected in zip(model(*arrays[:3]), arrays[3:], strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)
