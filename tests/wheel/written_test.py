# SPDX-License-Identifier: Apache-2.0
"""Tests that every version reads what every other version has written.

The folder `written` has a file of each TensorFlow and Keras that the wheel
supports. `make wheel-test` writes them anew, below its `--out`; to commit them,
copy them from there.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform._keras import keras
from tf_deform._loader import op_library

FOLDER = pathlib.Path(__file__).parent / "written"
OUT = os.environ.get("TF_DEFORM_TEST_OUT")
NAME = f"tensorflow-{tf.__version__}-keras-{keras.__version__}"


def make_model(layer):
    rng = np.random.default_rng(3)
    inputs = keras.Input((8, 9, 3), name="images")
    outputs = layer(4, 3, padding="same", activation="relu", name="first")(
        inputs
    )
    outputs = keras.layers.Conv2D(2, 1, name="last")(outputs)
    model = keras.Model(inputs, outputs)
    model.set_weights(
        [
            rng.normal(size=weight.shape).astype("float32")
            for weight in model.get_weights()
        ]
    )
    return model


def deformable(*arguments, **options):
    return tf_deform.layers.DeformableConv2D(
        *arguments, modulation="2sigmoid", **options
    )


def images():
    return np.random.default_rng(4).normal(size=(2, 8, 9, 3)).astype("float32")


def close(received, expected):
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(OUT is None, reason="not run by tests/wheel/matrix.py")
def test_write(tmp_path):
    if op_library() is None:
        pytest.skip("a package without libraries writes no native model")
    model = make_model(deformable)
    make_model(keras.layers.Conv2D).save(tmp_path / "stock.keras")
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    for implementation in ("native", "portable"):
        tf_deform.export.saved_model(
            model, tmp_path / implementation, implementation, verbose=False
        )
    np.savez(tmp_path / "expected.npz", outputs=model(images()))
    os.makedirs(OUT, exist_ok=True)
    shutil.make_archive(os.path.join(OUT, NAME), "zip", tmp_path)


@pytest.fixture(
    scope="module", params=sorted(path.stem for path in FOLDER.glob("*.zip"))
)
def written(request, tmp_path_factory):
    """Returns the folder of files that a version has written, and its name."""
    folder = tmp_path_factory.mktemp("written")
    with zipfile.ZipFile(FOLDER / f"{request.param}.zip") as file:
        file.extractall(folder)
    return folder, request.param


@pytest.fixture
def expected(written):
    with np.load(written[0] / "expected.npz") as file:
        return file["outputs"]


@pytest.mark.parametrize("implementation", ["native", "portable"])
def test_saved_model(implementation, written, expected):
    if implementation == "native" and op_library() is None:
        pytest.skip("a package without libraries runs no native model")
    model = tf.saved_model.load(str(written[0] / implementation))
    close(model.serve(images()), expected)


def test_keras_file(written, expected):
    """Tests the format, where this Keras reads stock layers in it."""
    folder, name = written
    writer = name.rpartition("-")[2]
    if writer.split(".")[0] != keras.__version__.split(".")[0]:
        pytest.skip(f"Keras {writer[0]}'s .keras is not for another Keras")
    try:
        keras.models.load_model(folder / "stock.keras")
    except (TypeError, ValueError) as error:
        pytest.skip(
            f"Keras {keras.__version__} reads no Conv2D of {writer}: "
            f"{type(error).__name__}"
        )
    close(keras.models.load_model(folder / "model.keras")(images()), expected)


def test_weights(written, expected):
    """Tests weights of any Keras, in any Keras."""
    model = make_model(deformable)
    model.set_weights([0 * weight for weight in model.get_weights()])
    model.load_weights(written[0] / "model.weights.h5")
    close(model(images()), expected)
