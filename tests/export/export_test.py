# SPDX-License-Identifier: Apache-2.0
"""Tests that exports in all formats give the results of the model.

The writing of files, and refusals, are tested in writing_test.py.
"""

import functools
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import (
    CLOSE,
    FORMATS,
    POOLING,
    assert_close,
    call,
    check,
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

every_format = pytest.mark.parametrize("kind", FORMATS)

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"modulation": None, "use_bias": False},
    {"modulation": "sigmoid", "offset_groups": 2, "groups": 2},
    {"strides": 2, "activation": "relu", "kernel_size": 3},
    {"strides": 2, "offset_groups": 2},
    {"strides": (3, 2), "kernel_size": (2, 5), "dilation_rate": (3, 1)},
    {"padding": ((2, 0), (1, 3)), "dilation_rate": 2, "strides": (1, 2)},
    {"padding": "valid", "kernel_size": (4, 1), "offset_groups": 8},
    {"boundary": "clamp", "offset_groups": 4},
    {"boundary": "clamp", "strides": 2, "modulation": None},
    {"groups": 2, "dilation_rate": 2, "kernel_size": 3},
    {"kernel_size": (2, 4)},  # Pads one pixel more at the end.
]
SHAPES = [(1, 20, 17, 3), (4, 23, 32, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a function that exports all convolutions to a format once."""

    @functools.cache
    def export(kind):
        keras.utils.set_random_seed(0)
        outputs = [small_model(**arguments) for arguments in CONVOLUTIONS]
        image = keras.Input((None, None, 3), name="image")
        model = keras.Model(image, [each(image) for each in outputs])
        path = tmp_path_factory.mktemp("convolutions") / "model"
        # Files of images are tested in image_files_test.py.
        others = {"image_bytes": False} if kind == "native" else {}
        report = write(kind, model, path, **others)
        assert len(report.differences) == len(CONVOLUTIONS)
        assert max(report.differences.values()) < CLOSE
        assert report.shapes == [
            {"image": (2, 64, 96, 3)},
            {"image": (3, 96, 64, 3)},
        ]
        return report.path, model

    return export


@pytest.fixture(scope="module", params=[*FORMATS, "openvino"])
def convolutions(request, files):
    """Returns the outputs of a file of all convolutions and of the model."""
    kind = request.param
    path, model = files("onnx" if kind == "openvino" else kind)
    read = load(kind, path)
    samples = [{"image": random(*shape, seed=shape[1])} for shape in SHAPES]
    return [(read(sample), call(model, sample)) for sample in samples]


@pytest.mark.parametrize(
    "index",
    range(len(CONVOLUTIONS)),
    ids=lambda index: str(CONVOLUTIONS[index]),
)
def test_convolutions(convolutions, index):
    name = f"output_{index}"
    for shape, (received, expected) in zip(SHAPES, convolutions, strict=True):
        assert_close(received[name], expected[name], name=f"of {shape}")


@pytest.fixture(scope="module", params=FORMATS)
def given(request, tmp_path_factory):
    """Returns inputs of a file of layers, its outputs, and the model's."""
    channels = {"maps": 4, "offset": 18, "modulator": 9, "features": 18}
    inputs = [
        keras.Input((None, None, size), name=name)
        for name, size in channels.items()
    ]
    inputs.append(keras.Input((5,), name="rois"))
    outputs = {}
    for boundary in ("zeros", "clamp"):
        layer = DeformableConv2D(3, 3, padding="same", boundary=boundary)
        outputs[boundary] = layer(*inputs[:3])
    for kind in POOLING:
        if kind != "modulated":
            outputs[kind] = pooling_model(kind)(inputs[3:])
    # The modulated layer has a file of its own: in the other it would shift the
    # random weights, of which some draws bring a bin of PS-ROI pooling so close
    # to a pixel's edge that rounding alone exceeds the bound.
    other = {"modulated": pooling_model("modulated")(inputs[3:])}
    models = [
        randomise(keras.Model(inputs, outputs)),
        randomise(keras.Model(inputs[3:], other)),
    ]

    def draw(*shape, regions):
        maps = {
            name: random(*shape, size, seed=seed)
            for seed, (name, size) in enumerate(channels.items())
        }
        return {**maps, "rois": make_rois(shape[0], regions, seed=shape[0])}

    sample = draw(3, 17, 21, regions=13)
    # Places outside of the image, and rows that are no regions, each for
    # another reason.
    bad = np.nan, np.inf, -np.inf, 1e30
    sample["offset"][0, 2, 3, :4] = bad
    sample["rois"][[1, 2, 3, 5], [1, 2, 3, 4]] = bad
    received, expected = {}, {}
    for index, model in enumerate(models):
        names = [tensor.name for tensor in model.inputs]
        first, second = (
            {name: values[name] for name in names}
            for values in (draw(2, 20, 24, regions=9), sample)
        )
        path = tmp_path_factory.mktemp("given") / f"model_{index}"
        write(request.param, model, path, sample=first)
        received.update(run(request.param, path, second))
        expected.update(call(model, second))
    return sample, received, expected


@pytest.mark.parametrize("name", ["zeros", "clamp", *POOLING])
def test_given_places(given, name):
    inputs, received, expected = given
    received = received[name]
    assert np.isfinite(received).all()
    assert_close(received, expected[name])
    if name in POOLING:
        assert not received[inputs["rois"][:, 0] < 0].any()


@every_format
def test_uint8_for_a_model_of_floats(kind, tmp_path):
    signature = [tf.TensorSpec((None, 32, None, 3), "uint8", "pixels")]
    sample = {"pixels": random(2, 32, 40, 3, dtype="uint8")}
    path = tmp_path / "model"
    check(kind, small_model(), path, sample, input_signature=signature)


@every_format
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
    for index in range(2):
        assert_close(received[f"z_{index}"], expected["z"][index])


@every_format
def test_functions_and_subclassed_models(kind, tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = DeformableConv2D(2, 3, padding=1)

        def call(self, inputs):
            return self.layer(inputs)

    model, x = Model(), random(2, 8, 9, 2)
    model(x)
    spec = tf.TensorSpec((None, None, None, 2), "float32", "x")

    @tf.function(input_signature=[spec, tf.TensorSpec((), "float32")])
    def function(x, factor):
        y = repeated = model(x)
        if factor > 2:  # of Autograph, as the loop
            y *= factor
        for _ in tf.range(tf.shape(x)[0]):
            repeated = model(repeated) + 0.5 * repeated
        return {"y": y, "repeated": repeated, "rows": tf.shape(y)[1]}

    sample = {"x": x, "factor": np.array(3, "float32")}
    assert call(function, sample)["rows"] == 8
    check(kind, function, tmp_path / "function", sample)

    path = tmp_path / "model"
    with pytest.raises(ValueError, match="Expected `input_signature`"):
        write(kind, model, path)
    check(kind, model, path, {"x": x}, input_signature=[spec])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@every_format
def test_mixed_precision(kind, policy, tmp_path):
    """Compares to the type's rounding.

    ONNX and LiteRT files compute in float32.
    """
    keras.config.set_dtype_policy(policy)
    model = small_model((16, 20), dtype="uint8")
    weights = model.get_weights()
    write(kind, model, tmp_path / "model")
    assert model.get_layer("deformable").compute_dtype == policy[6:]
    sample = {"image": random(2, 16, 20, 3, dtype="uint8")}
    received = run(kind, tmp_path / "model", sample)["output_0"]
    # TensorFlow's graphs round less often than its eager mode.
    tolerance = (
        4 * {"mixed_float16": 2.0**-10, "mixed_bfloat16": 2.0**-7}[policy]
    )
    if kind in ("onnx", "litert"):
        keras.config.set_dtype_policy("float32")
        model = small_model((16, 20), dtype="uint8")
        model.set_weights(weights)
        tolerance = CLOSE
    assert_close(received, call(model, sample)["output_0"], tolerance)


@every_format
def test_functions_that_were_traced_before(kind, tmp_path):
    """Tests a traced function that holds native ops.

    The export traces the function anew.
    """
    layer = DeformableConv2D(3, 3, boundary="clamp")
    spec = tf.TensorSpec((None, 8, 9, 2), "float32", "x")
    inner = tf.function(layer, [spec], autograph=False)
    x = random(2, 8, 9, 2)
    inner(x)
    outer = tf.function(lambda x: inner(x), [spec])
    check(kind, outer, tmp_path / "model", {"x": x})


class Conditional(keras.layers.Layer):
    """Has a function that Autograph must read; Keras' own need no Autograph."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.function = tf.function(self.double_if_large)

    def double_if_large(self, x):
        y = self.inner(x)
        if tf.reduce_max(y) > 1:
            y *= 2.0
        return y

    def call(self, inputs):
        return self.function(inputs)


@every_format
def test_functions_that_cannot_be_traced_anew(kind, tmp_path):
    """Tests that an export does not hide native ops that are left."""
    image = keras.Input((8, 9, 2), name="image")
    layer = Conditional(DeformableConv2D(2, 3, boundary="clamp"))
    model, path = keras.Model(image, layer(image)), tmp_path / "model"
    sample = {"image": random(2, 8, 9, 2)}
    call(model, sample)
    if kind == "native":
        check(kind, model, path, sample, tolerance=0)
        return
    with pytest.raises(ValueError, match="TfDeform>.*traced before"):
        write(kind, model, path)
    assert os.listdir(tmp_path) == []


@every_format
def test_functions_that_autograph_must_read(kind, tmp_path):
    """Tests that such functions stay functions.

    The export inlines all others.
    """
    image = keras.Input((8, 9, 2), name="image")
    x = DeformableConv2D(3, 3)(image)
    model = randomise(keras.Model(image, Conditional(tf.identity)(x)))
    # Below and above the condition's limit.
    samples = [{"image": scale * random(2, 8, 9, 2)} for scale in (0.01, 9)]
    check(kind, model, tmp_path / "model", *samples)
    assert not tf.config.functions_run_eagerly()


@every_format
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
    sizes = (40, 31), (37, 48)
    samples = [{"image": random(2, *size, 4)} for size in sizes]
    check(kind, model, tmp_path / "model", *samples)


@every_format
def test_sequential_models_take_any_batch(kind, tmp_path):
    model = keras.Sequential([DeformableConv2D(3, 3), keras.layers.ReLU()])
    model(random(2, 8, 9, 2))
    sample = {model.inputs[0].name: random(5, 8, 9, 2)}
    check(kind, model, tmp_path / "model", sample)


@every_format
def test_classes(kind, tmp_path):
    """Tests outputs that are integers.

    The difference is how many of them differ, not by how much.
    """
    model = small_model((16, 20))
    logits = model.get_layer("deformable").output
    large = keras.ops.any(logits > 0.5, axis=-1)
    best = keras.ops.cast(keras.ops.top_k(logits, 1)[1], "int64")
    classes = keras.Model(model.inputs, {"large": large, "best": best})
    sample = {"image": random(3, 16, 20, 3)}
    report = check(kind, classes, tmp_path / "model", sample, tolerance=0)
    assert set(report.differences) == {"large", "best"}


@every_format
def test_names_that_meet(kind, tmp_path):
    """Tests names that are no identifiers, and an input that is an output."""
    inputs = [
        keras.Input((4,), name=name) for name in ("self", "größe", "gr e")
    ]
    a, b, c = inputs
    model = keras.Model(inputs, [a + 2 * b + 3 * c, a, a])
    names = list(write(kind, model, tmp_path / "model").shapes[0])
    assert len(set(names)) == 3
    values = [random(3, 4, seed=i) for i in range(3)]
    sample = dict(zip(names, values, strict=True))
    received = run(kind, tmp_path / "model", sample)
    for name, value in call(model, sample).items():
        assert_close(received[name], value, name=name)


@every_format
def test_outputs_without_a_name_of_their_own(kind, tmp_path):
    spec = tf.TensorSpec((None, 4), "float32", "x")
    for outputs in (
        lambda x: {"a": [x + 1, x + 3], "a_0": x + 2},
        lambda x: {"a": x, "b": None},
        lambda x: {},
    ):
        with pytest.raises(ValueError, match="Expected .*output"):
            write(kind, tf.function(outputs, [spec]), tmp_path / "model")
    if kind == "onnx":
        with pytest.raises(ValueError, match="other names than the inputs'"):
            function = tf.function(lambda x: {"x": 2 * x}, [spec])
            write(kind, function, tmp_path / "model")
    assert os.listdir(tmp_path) == []
