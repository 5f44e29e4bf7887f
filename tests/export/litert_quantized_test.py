# SPDX-License-Identifier: Apache-2.0
"""Tests LiteRT files in 8 and 16 bits, and their calibration."""

import gc
import os
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from exported import assert_close, compare_outputs, load, run, write
from operands import random

from tf_deform import export, ops
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

# Errors as shares of the largest number. Each limit is some ten times the error
# found here, and a tenth of the error of positions in 8 bits.
QUANTIZED = {"float16": 0.005, "dynamic": 0.06, "int8": 0.08}
INT8 = schema.TensorType.INT8


def quantize(model, path, kind="int8", **arguments):
    return write("litert", model, path, quantize=kind, **arguments)


# Models whose numbers stay in a range.


def randomise(model):
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        taps = np.prod(weight.shape[:-1]) if len(weight.shape) > 1 else 100
        weight.assign(rng.normal(size=weight.shape) / np.sqrt(taps))
    return model


def small_model(size=(None, None), channels=3, batch=None, **arguments):
    image = keras.Input((*size, channels), batch_size=batch, name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    arguments = {"padding": "same", "modulation": "2sigmoid", **arguments}
    x = DeformableConv2D(8, 3, name="deformable", **arguments)(x)
    return randomise(keras.Model(image, keras.layers.Conv2D(4, 1)(x)))


def side_by_side(models):
    """Returns one model of all outputs, for the inputs of the first model."""
    inputs = models[0].inputs
    return keras.Model(inputs, [model(inputs) for model in models])


def smooth(*shape, seed=0):
    """Draws images whose neighbouring pixels are alike, like a camera's."""
    images = random(*shape, seed=seed)
    for axis in (1, 2):
        images = sum(np.roll(images, n, axis) for n in range(-3, 4)) / 3
    return images.astype("float32")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("float16", {}),
        ("dynamic", {}),
        ("int8", {}),
        (
            "int8",
            {"size": (29, 33), "padding": ((1, 0), (2, 3)), "strides": (1, 2)},
        ),
        (
            "int8",
            {
                "size": (24, 20),
                "batch": 2,
                "dilation_rate": 2,
                "padding": "valid",
            },
        ),
    ],
)
def test_quantized_convolutions(kind, arguments, tmp_path):
    """Tests also sizes that are not those of the calibration."""
    groups = {"modulation": None, "groups": 2, "offset_groups": 4}
    models = [small_model(**arguments), small_model(**arguments, **groups)]
    model = side_by_side(models)
    size = arguments.get("size", (28, 36))
    calibration = [smooth(2, *size, 3, seed=n) for n in range(4)]
    # Values beyond the calibrated ranges would be cut off.
    images = np.concatenate(calibration)[-arguments.get("batch", 3) :]
    samples = [{"image": images}]
    if "size" not in arguments:
        calibration.append(smooth(1, 20, 24, 3))
        samples.append({"image": images[:, 2:25, 5:26]})
    path = tmp_path / "model"
    report = quantize(model, path, kind, calibration=iter(calibration))
    assert report.shapes == [{"image": (2, *size, 3)}]
    assert max(report.differences.values()) < QUANTIZED[kind]
    compare_outputs(load("litert", path), model, samples, QUANTIZED[kind])


def test_int8_of_large_maps(tmp_path):
    """Tests large maps.

    Positions in 8 bits are off by pixels, or do not run.
    """
    boundaries = ("zeros", "clamp")
    model = side_by_side([small_model(boundary=name) for name in boundaries])
    images = [smooth(1, size, size, 3) for size in (128, 200)]
    quantize(model, tmp_path / "model", calibration=images)
    read = load("litert", tmp_path / "model")
    for image in images:
        received = read({"image": image})
        for index, expected in enumerate(model(image)):
            error = received[f"output_{index}"] - expected
            # Compares the root mean square, because single pixels lie where
            # "clamp" jumps.
            share = np.sqrt(np.mean(error**2) / np.mean(expected**2))
            assert share < 0.05, (boundaries[index], image.shape)


@pytest.mark.parametrize("batch", [None, 1])
def test_int8_by_tensorflows_converter(batch, tmp_path):
    """Tests small maps, whose positions 8 bits can hold."""
    model = small_model((16, 16), batch=batch)
    write("portable", model, tmp_path / "folder")
    images = smooth(8, 16, 16, 3)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(tmp_path / "folder"), signature_keys=["serving_default"]
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: (
        {"image": image[None]} for image in images
    )
    (tmp_path / "model").write_bytes(converter.convert())
    received = run("litert", tmp_path / "model", {"image": images[:1]})
    assert_close(received["output_0"], model(images[:1]), 0.1)


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Conv2D(4, 5),
        keras.layers.DepthwiseConv2D(7),
        keras.layers.AveragePooling2D(3),
        DeformableConv2D(6, 3, groups=3),
        DeformableConv2D(4, 3, dilation_rate=2, modulation="sigmoid"),
    ],
)
def test_int8_of_unknown_sizes_without_padding(layer, tmp_path):
    """Tests maps that would be too small.

    The quantizer loads a file with images of one pixel.
    """
    image = keras.Input((None, None, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    last = keras.layers.Conv2D(3, 3, name="last")
    model = randomise(keras.Model(image, last(layer(x))))
    images = (smooth(4, 21, 18, 3) * 20 + 128).clip(0, 255).astype("uint8")
    path = tmp_path / "model"
    sizes = [images, images[:1, :, :-2], np.tile(images, (1, 2, 1, 1))]
    quantize(model, path, calibration=sizes)
    samples = [{"image": given} for given in sizes]
    compare_outputs(load("litert", path), model, samples, QUANTIZED["int8"])
    # A program that does not resize the input gets the size of one image.
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (detail,) = interpreter.get_input_details()
    assert detail["shape"].tolist() == [1, 21, 18, 3]
    assert detail["shape_signature"].tolist() == [-1, -1, -1, 3]


def test_int8_of_results_that_are_used(tmp_path):
    """Tests results of the model that a later layer also uses.

    The quantizer would lose such results behind their rounded copies.
    """
    inner = small_model((12, 14))
    outputs = {}
    for index, following in enumerate(
        (
            keras.layers.Conv2D(2, 1),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.Dense(5),
            keras.layers.Conv2DTranspose(2, 3, strides=2),
            DeformableConv2D(2, 3, padding="same"),
        )
    ):
        used = keras.layers.Conv2D(3, 1)(inner.output)
        outputs[f"used_{index}"] = used
        outputs[f"following_{index}"] = following(used)
    model = randomise(keras.Model(inner.input, outputs))
    images = smooth(8, 12, 14, 3)
    path = tmp_path / "model"
    quantize(model, path, calibration=[images])
    samples = [{"image": images}]
    compare_outputs(load("litert", path), model, samples, QUANTIZED["int8"])


@pytest.mark.parametrize("kind", ["dynamic", "int8"])
def test_quantized_pooling(kind, tmp_path):
    features = keras.Input((20, 24, 6), name="features")
    rois = keras.Input((5,), name="rois")
    x = keras.layers.Conv2D(18, 3, padding="same")(features)
    outputs = []
    for layer in (
        DeformablePSROIPooling(2, 3, 1.0),
        DeformableROIPooling(3, 1.0, units=(16,)),
        DeformableROIAlign(3, 1.0, sampling_ratio=2, units=(16,)),
        DeformableROIAlign(3, 1.0),
        DeformableROIAlign(3, 1.0, modulation="sigmoid"),
    ):
        pooled = keras.layers.Flatten()(layer(x, rois))
        outputs.append(keras.layers.Dense(5)(pooled))
    model = randomise(keras.Model([features, rois], outputs))

    def draw(seed):
        rng = np.random.default_rng(seed)
        start = rng.uniform(0, 10, (7, 2))
        end = start + rng.uniform(4, 12, (7, 2))
        index = rng.integers(0, 2, (7, 1))
        regions = np.concatenate([index, start, end], 1).astype("float32")
        return {"features": smooth(2, 20, 24, 6, seed=seed), "rois": regions}

    calibration = [draw(seed) for seed in range(4)]
    report = quantize(model, tmp_path / "x", kind, calibration=calibration)
    assert len(report.differences) == 5
    assert max(report.differences.values()) < QUANTIZED[kind]


def make_detector():
    """Makes regions by a convolution, suppresses some, pools the others.

    The suppression is a loop.
    """
    model = small_model((16, 20), channels=4)
    boxes = keras.layers.Conv2D(4, 1, name="boxes")
    scores = keras.layers.Conv2D(1, 1, name="scores")
    rng = np.random.default_rng(0)
    for layer in (boxes, scores):
        layer.build((None, 16, 20, 4))
        layer.kernel.assign(0.5 * rng.normal(size=layer.kernel.shape))

    def detect(image):
        maps = model(image)
        moved = tf.reshape(boxes(maps), (320, 4))
        y, x = tf.meshgrid(tf.range(16.0), tf.range(20.0), indexing="ij")
        corner = tf.reshape(tf.stack([y, x], -1), (320, 2))
        found = tf.concat([corner - 3, corner + 3], 1) + moved
        # Boxes are clipped, as proposals are: some have no area.
        found = tf.clip_by_value(found, 0.0, [12.0, 15.0, 12.0, 15.0])
        score = tf.sigmoid(tf.reshape(scores(maps), (320,)))
        area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
        score = tf.where(area > 0, score, -1.0)
        chosen, count = tf.image.non_max_suppression_padded(
            found,
            score,
            8,
            0.4999,
            score_threshold=0.0,
            pad_to_max_output_size=True,
        )
        real = tf.range(8) < count
        found = tf.where(real[:, None], tf.gather(found, chosen), -1.0)
        index = tf.where(real, 0.0, -1.0)[:, None]
        rois = tf.concat([index, tf.gather(found, [1, 0, 3, 2], axis=1)], 1)
        return {
            "boxes": found,
            "count": count,
            "pooled": ops.deformable_roi_align(
                maps, rois, pooled_size=3, spatial_scale=1.0, sampling_ratio=2
            ),
        }

    specs = [tf.TensorSpec((1, 16, 20, 4), name="image")]
    function = tf.function(detect, input_signature=specs)
    function.layers = (model, boxes, scores)  # kept alive
    return function


def read_operations(path):
    """Returns kind, operand names, operand types and name of each operation."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    kinds = {
        number: kind
        for kind, number in vars(schema.BuiltinOperator).items()
        if isinstance(number, int)
    }
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
            tensors = [*operator.inputs, *operator.outputs]
            types = [graph.tensors[t].type for t in tensors if t >= 0]
            name = graph.tensors[operator.outputs[0]].name.decode()
            found.append((kind, types, name))
    return found


def test_detectors(tmp_path):
    """Tests that ops for places stay in float32.

    Suppression must be right, too.
    """
    function = make_detector()
    path, images = tmp_path / "float32", smooth(1, 16, 20, 4)
    write("litert", function, path, sample=images)
    read = load("litert", path)
    for seed in range(6):
        image = smooth(1, 16, 20, 4, seed=seed)
        received, expected = read({"image": image}), function(image)
        assert received["count"] == expected["count"] > 2
        for name in ("boxes", "pooled"):
            assert_close(received[name], expected[name])
        # No box appears twice, as a box without area would.
        real = received["boxes"][: received["count"]]
        assert len(np.unique(real, axis=0)) == len(real)
    calibration = [smooth(1, 16, 20, 4, seed=n) for n in range(4)]
    arguments = {"calibration": calibration, "tolerance": 2}
    report = quantize(function, tmp_path / "int8", **arguments)
    assert report.size < path.stat().st_size
    in_8_bits = [
        (kind, name)
        for kind, types, name in read_operations(report.path)
        if INT8 in types and kind not in ("QUANTIZE", "DEQUANTIZE")
    ]
    kinds = {kind for kind, _ in in_8_bits}
    assert kinds == {"CONV_2D", "FULLY_CONNECTED"}
    names = "\n".join(name for _, name in in_8_bits)
    # The layers before and behind the deformable layer, and its taps.
    assert len(in_8_bits) == 1 + 1 + 9
    assert "boxes" not in names and "scores" not in names
    assert "deformable_1/Conv2D" not in names


def test_loops_and_attention(tmp_path):
    """Tests weights in a loop, and products of activations.

    The quantizer has to tell them apart.
    """
    image = keras.Input((6, 8, 8), name="image")
    x = DeformableConv2D(8, 3, padding="same")(image)
    x = keras.layers.Reshape((48, 8))(x)
    x = keras.layers.MultiHeadAttention(2, 8)(x, x)
    model = randomise(keras.Model(image, keras.layers.Reshape((6, 8, 8))(x)))
    kernel = tf.constant(random(3, 3, 8, 8) / 8)

    def repeat(image):
        def step(x):
            return [tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))]

        (x,) = tf.while_loop(
            lambda x: tf.reduce_max(x) > 0.01,
            step,
            [model(image)],
            maximum_iterations=3,
        )
        return x

    specs = [tf.TensorSpec((1, 6, 8, 8), name="image")]
    function = tf.function(repeat, input_signature=specs)
    calibration = [smooth(1, 6, 8, 8, seed=n) for n in range(4)]
    for kind, limit in QUANTIZED.items():
        path = tmp_path / kind
        report = quantize(function, path, kind, calibration=calibration)
        assert report.differences["output_0"] < limit, kind


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_quantized_mixed_policies(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = small_model((20, 24))
    keras.config.set_dtype_policy("float32")
    images = smooth(4, 20, 24, 3)
    report = quantize(model, tmp_path / "model", calibration=[images])
    assert report.differences["output_0"] < QUANTIZED["int8"]
    assert model(images).dtype == policy.removeprefix("mixed_")


# Calibration.


@pytest.fixture(scope="module")
def model():
    """Returns a model that no test changes."""
    return small_model((10, 12))


def test_batches_are_taken_one_by_one(model, tmp_path):
    alive = []

    def read():
        for seed in range(6):
            gc.collect()
            assert sum(item() is not None for item in alive) <= 2
            batch = smooth(1, 10, 12, 3, seed=seed)
            alive.append(weakref.ref(batch))
            yield {"image": batch}
            del batch

    arguments = {"calibration": read(), "sample": smooth(1, 10, 12, 3, seed=7)}
    quantize(model, tmp_path / "model", **arguments)
    assert len(alive) == 6


def test_a_sample_that_is_large_enough(model, tmp_path):
    sample = smooth(32, 10, 12, 3)
    report = quantize(model, tmp_path / "model", sample=sample)
    assert report.shapes == [{"image": (32, 10, 12, 3)}]
    dataset = tf.data.Dataset.from_tensor_slices(sample).batch(8)
    arguments = {"calibration": dataset, "sample": sample}
    again = quantize(model, tmp_path / "again", **arguments)
    # The ranges are those of all images, not only of the last images.
    assert again.differences == report.differences


def fail():
    yield smooth(1, 10, 12, 3)
    raise OSError("the disk is gone")


CALIBRATIONS = [
    ([], ValueError, "at least one batch. Received: none"),
    (iter(()), ValueError, "at least one batch"),
    (smooth(4, 10, 12, 3), TypeError, r"\(4, 10, 12, 3\)"),
    ({"image": 1}, TypeError, "Received: dict"),
    ("images", TypeError, "Received: str"),
    (32, TypeError, "Received: int"),
    ([smooth(4, 10, 3, 3)], ValueError, r"\(4, 10, 3, 3\)"),
    ([smooth(10, 12, 3)[0]], ValueError, "`calibration`"),
    ([smooth(1, 10, 12, 3), None], ValueError, "in `calibration` .*'image'"),
    ([smooth(0, 10, 12, 3)], ValueError, "finite numbers, and not none"),
    ([np.full((1, 10, 12, 3), np.nan)], ValueError, "with others"),
    ([(smooth(1, 10, 12, 3), 0)], ValueError, "1 arrays, for .*Received: 2"),
    ([{"images": 1}], ValueError, r"the keys \['image'\]"),
    (fail(), OSError, "the disk is gone"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"quantize": "int4"}, ValueError, "Expected `quantize` to be None, "),
        ({"quantize": True}, ValueError, "Received: True"),
        ({}, ValueError, r"Expected `calibration` .* Received: neither"),
        ({"sample": smooth(31, 10, 12, 3)}, ValueError, "sample of 31 images"),
        *(({"calibration": x}, *expected) for x, *expected in CALIBRATIONS),
    ],
)
def test_bad_calibration(arguments, error, text, model, tmp_path):
    arguments = {"quantize": "int8", **arguments}
    with pytest.raises(error, match=text):
        write("litert", model, tmp_path / "model", **arguments)
    assert os.listdir(tmp_path) == []


def test_models_without_weights_and_without_the_quantizer(
    model, tmp_path, monkeypatch
):
    image = keras.Input((10, 12, 3))
    plain = keras.Model(image, keras.layers.ReLU()(image))
    arguments = {"calibration": [random(1, 10, 12, 3)]}
    with pytest.raises(ValueError, match="product with weights.*one without"):
        quantize(plain, tmp_path / "model", **arguments)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    for kind in ("dynamic", "int8"):
        with pytest.raises(ImportError, match=r"'tf-deform\[litert\]'"):
            quantize(model, tmp_path / "model", kind, **arguments)
    assert os.listdir(tmp_path) == []


def test_report_of_a_quantized_export(model, tmp_path, capsys):
    images = [smooth(4, 10, 12, 3)]
    path = tmp_path / "model"
    report = export.litert(model, path, "int8", calibration=images)
    said = capsys.readouterr()
    assert "Quantizing ... " in said.out and str(report) in said.out
    assert "it/s" not in said.err
