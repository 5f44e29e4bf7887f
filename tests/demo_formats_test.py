# SPDX-License-Identifier: Apache-2.0
"""The examples' models give the same wherever they run.

Features to 1e-4 of the largest, the same boxes and labels in the same order,
scores to 1e-3; of any batch and size, but for XLA's, which are those that it
compiles for. The portable SavedModel, ONNX and LiteRT also in processes that
know nothing else (`examples/serve.py`).
"""

import exports
import keras
import numpy as np
import pytest
import segmentation
import tensorflow as tf
from detection_test import make_detector
from exported import FORMATS, random, run, write

from tf_deform import _loader

# And what their input is called.
INPUTS = {"segmenter": "image", "features": "image", "detections": "images"}
SUBJECTS = tuple(INPUTS)
SHAPES = ((1, 64, 64, 1), (3, 48, 96, 1), (2, 100, 40, 1))

with_xla = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)


def make_segmenter():
    """A segmenter that displaces, as if it had been trained."""
    keras.utils.set_random_seed(2)
    model = segmentation.build_model("dcn-v2", None)
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.1))
    return model


def make_features():
    """The detector up to the maps that regions are pooled from."""
    model = make_detector("both", None)
    names = ("scores", "boxes", "features")
    maps = dict(zip(names, model.output["maps"], strict=True))
    return keras.Model(model.inputs, maps)


def assert_same_features(received, expected):
    for name, value in expected.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(received[name], value, 0, 1e-4 * largest)


def assert_same_detections(received, expected):
    assert np.all(expected["valid"].numpy() > 3)
    np.testing.assert_array_equal(received["valid"], expected["valid"])
    np.testing.assert_array_equal(received["labels"], expected["labels"])
    # In pixels.
    np.testing.assert_allclose(received["boxes"], expected["boxes"], 0, 1e-3)
    np.testing.assert_allclose(received["scores"], expected["scores"], 0, 1e-3)


def make(subject):
    """What is exported, the same as a function, and the comparison."""
    if subject == "detections":
        model = make_detector("both", None)
        return model.detect, model._detect, assert_same_detections
    model = {"segmenter": make_segmenter, "features": make_features}[subject]()

    def function(images):
        outputs = model(images, training=False)
        return outputs if isinstance(outputs, dict) else {"output_0": outputs}

    return model, function, assert_same_features


@pytest.mark.parametrize("how", ["graph", pytest.param("xla", marks=with_xla)])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_graph_and_xla(subject, how):
    _, function, assert_same = make(subject)
    compiled = tf.function(function, jit_compile=how == "xla")
    for shape in SHAPES[:2]:
        images = tf.constant(random(*shape, dtype="uint8"))
        assert_same(compiled(images), function(images))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_exported(subject, kind, tmp_path):
    exportable, function, assert_same = make(subject)
    path = tmp_path / exports.FORMATS[kind]
    write(kind, exportable, path)
    for shape in SHAPES:
        image = random(*shape, dtype="uint8")
        received = run(kind, path, {INPUTS[subject]: image})
        assert_same(received, function(tf.constant(image)))
    images = random(5, 64, 64, 1, dtype="uint8")
    received = exports.run_alone(path, images, native=kind == "native")
    assert_same(received, function(tf.constant(images)))
