# SPDX-License-Identifier: Apache-2.0
"""Tests the messages of exports for wrong files and impossible signatures."""

import functools
import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from operands import random

from tf_deform import export
from tf_deform.export import _common
from tf_deform.layers import DeformableConv2D

PATH = pathlib.Path("model.onnx")
save = functools.partial(export.saved_model, verbose=False)


def compare(expected, received, tolerance=1e-3):
    sample = _common.Sample({"x": np.zeros((2, 3))}, {"y": expected})
    return _common.compare([sample], lambda _: {"y": received}, PATH, tolerance)


@pytest.mark.parametrize("tolerance", [1e-3, np.inf])
@pytest.mark.parametrize(
    "expected,received",
    [
        ((2, 3, 8, 9, 5), (2, 2, 8, 9, 5)),
        ((2, 3), (3, 2)),
        ((2, 3), (6,)),
        ((4, 1), (4,)),
        ((), (1,)),
        ((0, 3), (0, 4)),
        ((5,), (0,)),
    ],
)
def test_other_shapes_are_named(expected, received, tolerance):
    """Tests that the message advises no tolerance, which would not help."""
    with pytest.raises(RuntimeError) as error:
        compare(np.zeros(expected), np.zeros(received), tolerance)
    text = str(error.value)
    assert f"the shape {expected}, as the model does" in text
    assert f"Received: {received}, for inputs of the shapes" in text
    assert "inf" not in text
    assert "tolerance" not in text


@pytest.mark.parametrize(
    "expected,received,text",
    [
        ([1, 2, 3], [1, np.nan, 3], "NaN at 1 of 3 places where the model has"),
        ([np.nan] * 2, [1, 2], "NaN at 0 of 2 places .* and none at 2 places"),
        ([1, 2], [np.inf, 2], "Received: infinity at 1 of 2 places"),
        ([1, -np.inf], [1, 2], "-infinity at 0 of 2 .* and none at 1 places"),
        ([np.inf, 1], [-np.inf, 1], "infinity at 0 of 2 .* none at 1 places"),
        ([0, 0], [0, 0.25], "up to 0.25 where all should be 0"),
        ([1, 2], [1, 2.5], "a difference of 0.25"),
    ],
)
def test_differences_that_are_no_number_are_told(expected, received, text):
    with pytest.raises(RuntimeError, match=f"{text}.* in 'y'") as error:
        compare(np.array(expected, float), np.array(received, float))
    assert "difference of inf" not in str(error.value)


_VALUES = [1.0, -4.0, np.nan, np.inf]


@pytest.mark.parametrize(
    ("expected", "received", "difference"),
    [
        (_VALUES, _VALUES, 0),
        (_VALUES, [1, -3, np.nan, np.inf], 0.25),
        (_VALUES, [1, -4, 0, np.inf], np.inf),
        (_VALUES, [1, -4, np.nan, -np.inf], np.inf),
        (_VALUES, _VALUES[:3], np.inf),
        ([0.0, 0.0], [1.0, 1.0], np.inf),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0),
        ([b"a", b"b"], ["a", "c"], 0.5),
        ([1, 2, 300, 4], [1, 2, 3, 4], 0.25),
        ([True, False], [True, True], 0.5),
    ],
)
def test_differences(expected, received, difference):
    """Tests the number that is reported, also for NaN and infinities."""
    found = _common.measure_difference(np.array(expected), received)
    assert found == difference


def test_an_output_that_is_missing():
    sample = _common.Sample({"x": np.zeros(2)}, {"y": np.zeros(2)})
    with pytest.raises(RuntimeError, match=r"to run with inputs.*'y'"):
        _common.compare([sample], lambda _: {"z": 0}, PATH, 1)


@pytest.mark.parametrize("received", [(1.0, 2.0), (2.0, 1.0)])
def test_the_largest_difference_of_all_samples_counts(received):
    """Tests a difference in the first sample alone, and in the last alone."""
    samples = [
        _common.Sample({"x": np.zeros(2)}, {"y": np.full(3, 2.0)}) for _ in "ab"
    ]
    outputs = iter(received * 2)

    def run(_):
        return {"y": np.full(3, next(outputs))}

    found = _common.compare(samples, run, PATH, np.inf)
    assert found == {"y": pytest.approx(0.5)}
    with pytest.raises(RuntimeError, match="Nothing was written"):
        _common.compare(samples, run, PATH, 0.4)


def test_a_model_that_gives_other_shapes(tmp_path):
    """Tests a model of unknown batch and time.

    Keras takes the batch for the time there.
    """
    inputs = keras.Input((None, 8, 9, 4))
    layer = DeformableConv2D(5, 3, padding="same")
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    with pytest.raises(RuntimeError) as error:
        save(model, tmp_path / "model", sample=random(2, 3, 8, 9, 4))
    assert "(2, 3, 8, 9, 5), as the model does" in str(error.value)
    assert "Received: (2, 2, 8, 9, 5)" in str(error.value)
    assert os.listdir(tmp_path) == []


def make_model(size=(8, 9), **arguments):
    image = keras.Input((*size, 3), **arguments)
    return keras.Model(image, DeformableConv2D(2, 3)(image))


def spec(*shape, dtype="float32"):
    return tf.TensorSpec(shape, dtype)


@pytest.mark.parametrize(
    "signature",
    [
        [spec(None, 8, 9, 4)],  # channels
        [spec(None, 8, 10, 3)],  # width
        [spec(None, None, 9, 3)],  # height
        [spec(None, 9, 3)],  # rank
        [tf.TensorSpec(None)],
        [spec(None, 8, 9, 3), spec(None, 8, 9, 3)],  # number
        [spec(None, 8, 9, 3, dtype="string")],  # type
    ],
)
@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_signatures_that_contradict_the_model(kind, signature, tmp_path):
    model = make_model()
    if kind == "sequential":
        model = keras.Sequential([keras.Input((8, 9, 3)), model])
    with pytest.raises(ValueError, match="Expected `input_signature` to") as e:
        save(model, tmp_path / "x", input_signature=signature)
    assert "sample" not in str(e.value)
    assert "(None, 8, 9, 3) float32. Received" in str(e.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "signature",
    [
        [spec(4, 8, 9, 3)],
        [spec(1, 8, 9, 3, dtype="uint8")],
        [spec(None, 8, 9, 3, dtype="float16")],
    ],
)
def test_signatures_that_narrow_the_model(signature, tmp_path):
    for model in (make_model(), make_model((None, 9), batch_size=2)):
        save(model, tmp_path / "x", input_signature=signature)


def test_signatures_of_functions(tmp_path):
    model, path = make_model(), tmp_path / "model"
    two = tf.function(lambda x, y: model(x) + y)
    one = tf.function(lambda x: x + 1, [spec(None, 8)])
    arguments = "one tf.TensorSpec for each.*x, y"
    takes = r"takes: \(None, 8\) float32"
    image = spec(2, 8, 9, 3)
    for function, signature, text in (
        (two, [image], arguments),
        (two, [image, spec(), spec()], arguments),
        (one, [spec(None, 9)], takes),
        (one, [spec(None, None)], takes),
        (one, [spec(8)], takes),
    ):
        with pytest.raises(ValueError, match=text):
            save(function, path, input_signature=signature)
    save(one, path, input_signature=[spec(3, 8)])


def test_a_signature_that_only_running_refutes(tmp_path):
    """Tests a model that says nothing about its inputs."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = DeformableConv2D(3, 3)

        def call(self, inputs):
            return self.layer(inputs)

    model = Model()
    model(random(1, 8, 9, 2))
    for shape in ((None, 8, 9, 5), (None, 8, 9), (None, 2, 9, 2)):
        with pytest.raises(ValueError, match=r"Expected `input_signature` \(o"):
            save(model, tmp_path / "x", input_signature=[spec(*shape)])
    assert os.listdir(tmp_path) == []
