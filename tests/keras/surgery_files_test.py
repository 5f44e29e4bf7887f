# SPDX-License-Identifier: Apache-2.0
"""Tests files of models that were made deformable, on every Keras."""

from __future__ import annotations

import inspect
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from surgery_models import (
    GOLDEN,
    MAKERS,
    assert_near,
    change,
    displace,
    filled,
    images,
    make_composite,
    make_functional,
    make_shared,
    make_subclassed,
    run,
)

import tf_deform
from tf_deform._keras import KERAS_2, keras
from tf_deform._loader import op_library

every_model = pytest.mark.parametrize("make", MAKERS)
RELOAD = """
import sys
import numpy as np
import tf_deform
from tf_deform._keras import KERAS_2, keras

folder, kind, code = sys.argv[1:]
if code:
    sys.path.insert(0, code)
    import surgery_models
if kind == "keras":
    model = keras.models.load_model(f"{folder}/model.keras")
else:
    import tensorflow as tf
    model = tf.saved_model.load(f"{folder}/saved")
images = np.load(f"{folder}/images.npy")
outputs = (model if kind == "keras" else model.serve)(images)
outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
if isinstance(outputs[0], dict):
    outputs = outputs[0].values()
np.save(f"{folder}/{kind}.npy", np.concatenate([np.ravel(v) for v in outputs]))
print(len(tf_deform.deformable_layers(model)) if kind == "keras" else "")
"""
OWN_CODE = (make_composite, make_subclassed)


@every_model
def test_files(make, tmp_path, run_python_as_it_is, request):
    """Tests a file in a process that has imported `tf_deform` alone."""
    if make is make_shared:
        make().save(tmp_path / "stock.keras")
        try:
            keras.models.load_model(tmp_path / "stock.keras")
        except ValueError as error:
            pytest.skip(
                f"Keras {keras.__version__} reads no such file: {error}"
            )
    model = filled(make)
    change(model)
    displace(model)
    if make is make_functional:
        tf_deform.train_only(model, "offsets")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images())
    code = str(request.path.parents[1] / "lib") if make in OWN_CODE else ""
    said = run_python_as_it_is(RELOAD, tmp_path, "keras", code)
    assert int(said.split()[-1]) == MAKERS[make]
    np.testing.assert_array_equal(np.load(tmp_path / "keras.npy"), run(model))
    # Weights go to a model that was made deformable in the same way.
    other = make()
    change(other)
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    other.load_weights(path)
    np.testing.assert_array_equal(run(other), run(model))


@every_model
def test_exports(make, tmp_path, run_python_as_it_is):
    model = filled(make)
    change(model)
    displace(model)
    options = {"image_bytes": False, "sample": images(), "verbose": False}
    if make is make_subclassed:
        spec = tf.TensorSpec((None, *images().shape[1:]), tf.float32)
        options["input_signature"] = [spec]
    implementation = "native" if op_library() is not None else "portable"
    tf_deform.export.saved_model(
        model, tmp_path / "saved", implementation, **options
    )
    np.save(tmp_path / "images.npy", images())
    run_python_as_it_is(RELOAD, tmp_path, "saved", "")
    # The file's graph is fused, and rounds otherwise than the model's ops. Each
    # displaced layer magnifies that: images that differ in their last bits give
    # outputs that differ by 1e-4 of the largest.
    assert_near(np.load(tmp_path / "saved.npy"), run(model), 3e-4)


def test_a_model_that_is_trained_is_resumed(tmp_path):
    model = filled(make_subclassed)
    change(model)
    x, y = images(), np.zeros((2, 4, 5, 3), "float32")
    model.compile(keras.optimizers.Adam(1e-2), "mean_squared_error")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    losses = [
        each.fit(x, y, epochs=2, verbose=0).history["loss"]
        for each in (model, other)
    ]
    np.testing.assert_array_equal(*losses)
    assert type(other).__name__ == "Subclassed"


def test_copies():
    """Tests what Keras makes by a model's config."""
    model = filled(make_composite)
    change(model)
    other = type(model).from_config(model.get_config())
    assert len(tf_deform.deformable_layers(other)) == 7
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(run(other), run(model))
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(run(other), run(model))


def test_a_file_that_no_longer_fits(tmp_path, monkeypatch):
    """Tests code that has changed since the file was written."""
    import surgery_models

    model = filled(make_composite)
    change(model)
    model.save(tmp_path / "model.keras")
    original = surgery_models.Block.__init__

    def other(self, filters, **kwargs):
        original(self, filters, **kwargs)
        self.more = self.more * 0

    def call(self, x):
        return self.last["one"](self.first(x))

    def build(self, shape):
        for each in (self.first, self.last["one"]):
            each.build(shape)
        self.built = True

    monkeypatch.setattr(surgery_models.Block, "__init__", other)
    monkeypatch.setattr(surgery_models.Block, "call", call)
    monkeypatch.setattr(surgery_models.Block, "build", build)
    with pytest.raises((ValueError, TypeError), match="3 convolutions, as whe"):
        keras.models.load_model(tmp_path / "model.keras")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    name = f"surgery_keras_{2 if KERAS_2 else 3}.tar.xz"
    path = pathlib.Path(__file__).parents[1] / "build/golden" / name
    with tarfile.open(path) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("make", GOLDEN)
def test_files_of_the_oldest_versions(make, golden):
    model = keras.models.load_model(golden / f"{make.__name__}.keras")
    expected = np.load(golden / f"{make.__name__}.npy")
    assert_near(run(model), expected)
    for layer in tf_deform.deformable_layers(model):
        assert layer.freeze_kernel


SAVES = inspect.signature(keras.Model.save_weights).parameters


@pytest.mark.skipif("max_shard_size" not in SAVES, reason="no shards")
def test_shards_of_weights(tmp_path):
    model, other = filled(make_subclassed), make_subclassed()
    change(model)
    change(other)
    displace(model)
    path = tmp_path / "model.weights.json"
    model.save_weights(path, max_shard_size=1e-5)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    other.load_weights(path)
    np.testing.assert_array_equal(run(other), run(model))


@every_model
def test_plain_weights_come_before_or_by_their_own_function(make, tmp_path):
    plain, model = filled(make), make()
    path = str(tmp_path / "plain.weights.h5")
    plain.save_weights(path)
    change(model)
    with pytest.raises(ValueError, match="load_plain_weights"):
        model.load_weights(path)
    tf_deform.load_plain_weights(model, path)
    assert_near(run(model), run(plain))
