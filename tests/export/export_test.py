# SPDX-License-Identifier: Apache-2.0
"""Tests that exports in all formats give the results of the model.

The writing of files, and refusals, are tested in writing_test.py.
"""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import (
    CLOSE,
    FORMATS,
    assert_close,
    load,
    make_rois,
    pooling_model,
    randomise,
    run,
    small_model,
    write,
)
from operands import random

from tf_deform.layers import DeformableConv2D

CONVOLUTIONS = [
    {},
    {"modulation": None, "use_bias": False},
    {"modulation": "sigmoid", "offset_groups": 2, "groups": 2},
    {"strides": 2, "activation": "relu"},
    {"strides": 2, "offset_groups": 2},
    {"strides": (3, 2), "kernel_size": (2, 5), "dilation_rate": (3, 1)},
    {"padding": ((2, 0), (1, 3)), "dilation_rate": 2, "strides": (1, 2)},
    {"padding": "valid", "kernel_size": (4, 1), "offset_groups": 8},
    {"boundary": "clamp", "offset_groups": 4},
    {"boundary": "clamp", "strides": 2, "modulation": None},
    {"groups": 2, "dilation_rate": 2},
    {"kernel_size": (2, 4)},  # Pads one pixel more at the end.
]
SHAPES = [(1, 20, 17, 3), (4, 23, 32, 3)]


@pytest.fixture(scope="module", params=[*FORMATS, "openvino"])
def convolutions(request, tmp_path_factory):
    """Returns the outputs of a file of all convolutions and of the model."""
    keras.utils.set_random_seed(0)
    outputs = [small_model(**arguments) for arguments in CONVOLUTIONS]
    image = keras.Input((None, None, 3), name="image")
    model = keras.Model(image, [each(image) for each in outputs])
    path = tmp_path_factory.mktemp("convolutions") / "model"
    kind = "onnx" if request.param == "openvino" else request.param
    report = write(kind, model, path)
    assert len(report.differences) == len(CONVOLUTIONS)
    assert max(report.differences.values()) < CLOSE
    assert report.shapes == [
        {"image": (2, 64, 96, 3)},
        {"image": (3, 96, 64, 3)},
    ]
    read = load(request.param, report.path)
    images = [random(*shape, seed=shape[1]) for shape in SHAPES]
    return [
        (read({"image": image}), model(image, training=False))
        for image in images
    ]


@pytest.mark.parametrize(
    "index",
    range(len(CONVOLUTIONS)),
    ids=lambda index: str(CONVOLUTIONS[index]),
)
def test_convolutions(convolutions, index):
    name = f"output_{index}"
    for shape, (received, expected) in zip(SHAPES, convolutions, strict=True):
        assert_close(received[name], expected[index], name=f"of {shape}")


@pytest.mark.parametrize("kind", FORMATS)
def test_static_sizes_and_pixels(kind, tmp_path):
    model = small_model((21, 18), channels=1, dtype="uint8", strides=2)
    report = write(kind, model, tmp_path / "model")
    image = random(5, 21, 18, 1, dtype="uint8")
    received = run(kind, report.path, {"image": image})
    assert_close(received["output_0"], model(image, training=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_uint8_for_a_model_of_floats(kind, tmp_path):
    model = small_model()
    signature = [tf.TensorSpec((None, 32, None, 3), "uint8", "pixels")]
    write(kind, model, tmp_path / "model", input_signature=signature)
    pixels = random(2, 32, 40, 3, dtype="uint8")
    received = run(kind, tmp_path / "model", {"pixels": pixels})
    assert_close(received["output_0"], model(pixels, training=False))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_given_offsets(kind, boundary, tmp_path):
    inputs = keras.Input((None, None, 4), name="inputs")
    offset = keras.Input((None, None, 18), name="offset")
    modulator = keras.Input((None, None, 9), name="modulator")
    layer = DeformableConv2D(3, 3, padding="same", boundary=boundary)
    model = keras.Model(
        [inputs, offset, modulator], layer(inputs, offset, modulator)
    )

    def values(batch, height, width):
        return {
            "inputs": random(batch, height, width, 4),
            "offset": random(batch, height, width, 18, seed=1),
            "modulator": random(batch, height, width, 9, seed=2),
        }

    write(kind, model, tmp_path / "model", sample=values(2, 7, 8))
    given = values(3, 9, 6)
    # These places lie outside of the image.
    given["offset"][0, 2, 3, :4] = np.nan, np.inf, -np.inf, 1e30
    received = run(kind, tmp_path / "model", given)
    assert np.isfinite(received["output_0"]).all()
    assert_close(received["output_0"], model(list(given.values())))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layer", ["psroi", "roi", "align", "align-samples"])
def test_pooling(kind, layer, tmp_path):
    model = pooling_model(layer)
    sample = {"features": random(2, 20, 24, 18), "rois": make_rois(2, 9)}
    write(kind, model, tmp_path / "model", sample=sample)
    given = {
        "features": random(3, 17, 21, 18, seed=1),
        "rois": make_rois(3, 13, seed=1),
    }
    # Rows that are no regions, each for another reason.
    given["rois"][[1, 2, 3, 5], [1, 2, 3, 4]] = np.nan, np.inf, -np.inf, 1e30
    received = run(kind, tmp_path / "model", given)["output_0"]
    assert_close(received, model(list(given.values())))
    assert not received[given["rois"][:, 0] < 0].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_names_and_nested_outputs(kind, tmp_path):
    a, b = (keras.Input((8, 9, 2), name=name) for name in ("a", "b"))
    y = DeformableConv2D(3, 3)(a)
    z = (y + 1.0, keras.layers.Flatten()(b))
    model = randomise(keras.Model({"a": a, "b": b}, {"y": y, "z": z}))
    report = write(kind, model, tmp_path / "model")
    assert list(report.differences) == ["y", "z_0", "z_1"]
    given = {"b": random(2, 8, 9, 2), "a": random(2, 8, 9, 2, seed=1)}
    received = run(kind, report.path, given)
    expected = model(given)
    assert_close(received["y"], expected["y"])
    assert_close(received["z_0"], expected["z"][0])
    assert_close(received["z_1"], expected["z"][1])


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_and_subclassed_models(kind, tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = DeformableConv2D(3, 3, padding=1)

        def call(self, inputs):
            return self.layer(inputs)

    model = Model()
    x = random(2, 8, 9, 2)
    model(x)
    spec = tf.TensorSpec((None, None, None, 2), "float32", "x")

    @tf.function(input_signature=[spec, tf.TensorSpec((), "float32")])
    def function(x, factor):
        y = model(x)
        if factor > 2:  # of Autograph
            y *= factor
        return {"y": y, "rows": tf.shape(y)[1]}

    expected = function(x, 3.0)
    write(kind, function, tmp_path / "function")
    given = {"x": x, "factor": np.array(3, "float32")}
    received = run(kind, tmp_path / "function", given)
    assert_close(received["y"], expected["y"])
    assert received["rows"] == 8

    with pytest.raises(ValueError, match="Expected `input_signature`"):
        write(kind, model, tmp_path / "model")
    write(kind, model, tmp_path / "model", input_signature=[spec])
    received = run(kind, tmp_path / "model", {"x": x})
    assert_close(received["output_0"], model(x))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_mixed_precision(kind, policy, tmp_path):
    """Compares to the type's rounding.

    ONNX and LiteRT files compute in float32.
    """
    keras.config.set_dtype_policy(policy)
    model = small_model((16, 20), dtype="uint8")
    weights = model.get_weights()
    write(kind, model, tmp_path / "model")
    assert model.get_layer("deformable").compute_dtype == policy[6:]
    image = random(2, 16, 20, 3, dtype="uint8")
    received = run(kind, tmp_path / "model", {"image": image})["output_0"]
    if kind in ("onnx", "litert"):
        keras.config.set_dtype_policy("float32")
        model = small_model((16, 20), dtype="uint8")
        model.set_weights(weights)
        assert_close(received, model(image, training=False))
    else:
        rounding = 2.0**-10 if policy == "mixed_float16" else 2.0**-7
        expected = model(image, training=False)
        # TensorFlow's graphs round less often than its eager mode.
        assert_close(received, expected, 4 * rounding)


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_were_traced_before(kind, tmp_path):
    """Tests a traced function that holds native ops.

    The export traces the function anew.
    """
    layer = DeformableConv2D(3, 3, boundary="clamp")
    spec = tf.TensorSpec((None, 8, 9, 2), "float32", "x")
    inner = tf.function(layer, [spec], autograph=False)
    x = random(2, 8, 9, 2)
    expected = inner(x)
    outer = tf.function(lambda x: inner(x), [spec])
    write(kind, outer, tmp_path / "model")
    received = run(kind, tmp_path / "model", {"x": x})
    assert_close(received["output_0"], expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_cannot_be_traced_anew(kind, tmp_path):
    """Tests that an export does not hide native ops that are left."""

    class Conditional(keras.layers.Layer):
        """Has a function that Autograph must read.

        Functions of Keras need no Autograph.
        """

        def __init__(self, boundary):
            super().__init__()
            self.convolution = DeformableConv2D(2, 3, boundary=boundary)
            self.function = tf.function(self.double_if_large)

        def double_if_large(self, x):
            y = self.convolution(x)
            if tf.reduce_max(y) > 1:
                y *= 2.0
            return y

        def call(self, inputs):
            return self.function(inputs)

    image = keras.Input((8, 9, 2), name="image")
    model = keras.Model(image, Conditional("clamp")(image))
    x = random(2, 8, 9, 2)
    expected = model(x)
    if kind == "native":
        write(kind, model, tmp_path / "model")
        received = run(kind, tmp_path / "model", {"image": x})
        assert np.array_equal(received["output_0"], expected)
        return
    with pytest.raises(ValueError, match="TfDeform>.*traced before"):
        write(kind, model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_autograph_must_read(kind, tmp_path):
    """Tests that such functions stay functions.

    The export inlines all others.
    """

    class Conditional(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.function = tf.function(self.double_if_large)

        def double_if_large(self, x):
            if tf.reduce_max(x) > 1:
                x *= 2.0
            return x

        def call(self, inputs):
            return self.function(inputs)

    image = keras.Input((8, 9, 2), name="image")
    x = DeformableConv2D(3, 3)(image)
    model = randomise(keras.Model(image, Conditional()(x)))
    write(kind, model, tmp_path / "model")
    assert not tf.config.functions_run_eagerly()
    for scale in (0.01, 9):  # below and above the condition's limit
        given = scale * random(2, 8, 9, 2)
        received = run(kind, tmp_path / "model", {"image": given})
        assert_close(received["output_0"], model(given))


# Layers that models contain besides.


def assert_exports(kind, model, path, *inputs, names=None):
    report = write(kind, model, path)
    keys = names or list(report.shapes[0])
    received = run(kind, path, dict(zip(keys, inputs, strict=True)))
    expected = model(*inputs) if names else model(inputs[0], training=False)
    assert_close(received["output_0"], expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_around(kind, tmp_path):
    """Tests constants, groups, gelu, dilations, strides beyond the kernel."""
    image = keras.Input((None, None, 4), name="image")
    mean, variance = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 1.0, 0.5]
    x = keras.layers.Normalization(mean=mean, variance=variance)(image)
    x = keras.layers.Conv2D(6, 3, groups=2, padding="same")(x)
    x = keras.layers.Activation("gelu")(x)
    x = keras.layers.Conv2D(6, 3, dilation_rate=2, padding="same")(x)
    x = keras.layers.Conv2D(6, 1, strides=2, padding="same")(x)
    x = DeformableConv2D(6, 2, strides=3, padding="same")(x)
    x = keras.layers.Conv2D(5, 2, strides=(3, 2), padding="same")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = randomise(keras.Model(image, x), 0.2)
    for size in ((40, 31), (37, 48)):
        assert_exports(kind, model, tmp_path / "model", random(2, *size, 4))


@pytest.mark.parametrize("kind", FORMATS)
def test_loops(kind, tmp_path):
    layer = DeformableConv2D(2, 3, strides=1, padding="same")
    x = random(2, 8, 9, 2)
    layer(x)
    spec = tf.TensorSpec((None, None, None, 2), "float32", "x")

    @tf.function(input_signature=[spec])
    def function(x):
        for _ in tf.range(tf.shape(x)[0]):
            x = layer(x) + 0.5 * x
        return x

    assert_exports(kind, function, tmp_path / "model", x, names=["x"])


@pytest.mark.parametrize("kind", FORMATS)
def test_sequential_models_take_any_batch(kind, tmp_path):
    model = keras.Sequential([DeformableConv2D(3, 3), keras.layers.ReLU()])
    model(random(2, 8, 9, 2))
    assert_exports(kind, model, tmp_path / "model", random(5, 8, 9, 2))


@pytest.mark.parametrize("kind", FORMATS)
def test_classes(kind, tmp_path):
    """Tests outputs that are integers.

    The difference is how many of them differ, not by how much.
    """
    model = small_model((16, 20))
    logits = model.get_layer("deformable").output
    large = keras.ops.any(logits > 0.5, axis=-1)
    best = keras.ops.cast(keras.ops.top_k(logits, 1)[1], "int64")
    classes = keras.Model(model.inputs, {"large": large, "best": best})
    report = write(kind, classes, tmp_path / "model")
    assert set(report.differences) == {"large", "best"}
    image = random(3, 16, 20, 3)
    received = run(kind, tmp_path / "model", {"image": image})
    expected = classes(image, training=False)
    for name, value in expected.items():
        assert np.array_equal(received[name], value)


def test_names_that_meet(tmp_path):
    spec = tf.TensorSpec((None, 4), "float32", "x")
    path = tmp_path / "model"

    def function(outputs):
        return tf.function(outputs, [spec])

    twice = function(lambda x: {"a": [x + 1, x + 3], "a_0": x + 2})
    none = function(lambda x: {"a": x, "b": None})
    for bad in (twice, none, function(lambda x: {})):
        for kind in FORMATS:
            with pytest.raises(ValueError, match="Expected .*output"):
                write(kind, bad, path)
    with pytest.raises(ValueError, match="other names than the inputs'"):
        write("onnx", function(lambda x: {"x": 2 * x}), path)
    assert os.listdir(tmp_path) == []
    x = random(3, 4)
    for kind in FORMATS:
        # This output is passed through.
        path = tmp_path / kind
        write(kind, function(lambda x: [x, x]), path)
        received = run(kind, path, {"x": x})
        assert np.array_equal(received["output_0"], x)
        assert np.array_equal(received["output_1"], x)
        a = keras.Input((4,), name="self")
        b = keras.Input((4,), name="größe")
        c = keras.Input((4,), name="gr e")
        model = keras.Model([a, b, c], a + 2 * b + 3 * c)
        names = list(write(kind, model, path).shapes[0])
        assert len(set(names)) == 3
        values = [random(3, 4, seed=i) for i in range(3)]
        received = run(kind, path, dict(zip(names, values, strict=True)))
        assert_close(received["output_0"], model(values))
