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
from exported import assert_close, run, write
from litert_models import (
    make_rois,
    pooling_model,
    randomise,
    small_model,
    smooth,
)
from operands import random

from tf_deform import export, ops
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

KINDS = ("float16", "dynamic", "int8")


# Errors as shares of the largest number. Each limit is some ten times the error
# found here, and a tenth of the error of positions in 8 bits.
QUANTIZED = {"float16": 0.005, "dynamic": 0.06, "int8": 0.08}


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


# Quantized files.
INT8 = schema.TensorType.INT8


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        *((kind, {}) for kind in KINDS),
        *(
            (kind, {"modulation": None, "groups": 2, "offset_groups": 4})
            for kind in KINDS
        ),
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
    model = small_model(**arguments)
    height, width = arguments.get("size", (28, 36))
    calibration = [smooth(2, height, width, 3, seed=n) for n in range(4)]
    report = write(
        "litert",
        model,
        tmp_path / "model",
        quantize=kind,
        calibration=iter(calibration),
    )
    assert report.shapes == [{"image": (2, height, width, 3)}]
    assert report.differences["output_0"] < QUANTIZED[kind]
    batch = arguments.get("batch", 3)
    # Values beyond the calibrated ranges would be cut off.
    image = np.concatenate(calibration)[-batch:]
    received = run("litert", report.path, {"image": image})
    assert_close(received["output_0"], model(image), QUANTIZED[kind])
    assert received["output_0"].dtype == "float32"


@pytest.mark.parametrize("size", [128, 200])
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_int8_of_large_maps(size, boundary, tmp_path):
    """Tests large maps.

    Positions in 8 bits are off by pixels, or do not run.
    """
    model = small_model(boundary=boundary)
    image = smooth(1, size, size, 3)
    write(
        "litert",
        model,
        tmp_path / "model",
        quantize="int8",
        calibration=[image],
    )
    received = run("litert", tmp_path / "model", {"image": image})
    expected = np.asarray(model(image))
    error = received["output_0"] - expected
    # Compares the root mean square, because single pixels lie where "clamp"
    # jumps.
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 0.05


def test_sizes_differ_from_those_of_the_calibration(tmp_path):
    model = small_model()
    images = smooth(3, 40, 30, 3)
    write(
        "litert",
        model,
        tmp_path / "model",
        quantize="int8",
        calibration=[images, smooth(1, 20, 24, 3)],
    )
    image = images[:, 2:39, 5:26]
    received = run("litert", tmp_path / "model", {"image": image})
    assert_close(received["output_0"], model(image), QUANTIZED["int8"])


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
    model = keras.Model(image, last(layer(x)))
    randomise(model)
    images = (smooth(4, 21, 18, 3) * 20 + 128).clip(0, 255).astype("uint8")
    path = tmp_path / "model"
    sizes = [images, images[:1, :, :-2], np.tile(images, (1, 2, 1, 1))]
    write("litert", model, path, quantize="int8", calibration=sizes)
    for given in sizes:
        received = run("litert", path, {"image": given})
        assert_close(received["output_0"], model(given), QUANTIZED["int8"])
    # A program that does not resize the input gets the size of one image.
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (detail,) = interpreter.get_input_details()
    assert detail["shape"].tolist() == [1, 21, 18, 3]
    assert detail["shape_signature"].tolist() == [-1, -1, -1, 3]


@pytest.mark.parametrize(
    "following",
    [
        keras.layers.Conv2D(2, 1, name="following"),
        keras.layers.DepthwiseConv2D(3, name="following"),
        keras.layers.Dense(5, name="following"),
        keras.layers.Conv2DTranspose(2, 3, strides=2, name="following"),
        DeformableConv2D(2, 3, padding="same", name="following"),
    ],
)
def test_int8_of_results_that_are_used(following, tmp_path):
    """Tests results of the model that a later layer also uses.

    The quantizer would lose such results behind their rounded copies.
    """
    inner = small_model((12, 14))
    outputs = {"y": inner.output, "z": following(inner.output)}
    model = randomise(keras.Model(inner.input, outputs))
    images = smooth(8, 12, 14, 3)
    path = tmp_path / "model"
    write("litert", model, path, quantize="int8", calibration=[images])
    received = run("litert", path, {"image": images})
    for name, expected in model(images).items():
        assert_close(received[name], expected, QUANTIZED["int8"])


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("int8", lambda: DeformablePSROIPooling(2, 3, 1.0)),
        ("int8", lambda: DeformableROIPooling(3, 1.0, units=(16,))),
        (
            "dynamic",
            lambda: DeformableROIAlign(3, 1.0, sampling_ratio=2, units=(16,)),
        ),
        ("int8", lambda: DeformableROIAlign(3, 1.0)),
    ],
    ids=["psroi", "roi", "align-dynamic", "align"],
)
def test_quantized_pooling(kind, layer, tmp_path):
    model = pooling_model(layer())
    batches = [
        {"features": smooth(2, 20, 24, 6, seed=n), "rois": make_rois(2, 7, n)}
        for n in range(4)
    ]
    report = write(
        "litert",
        model,
        tmp_path / "model",
        quantize=kind,
        calibration=batches,
    )
    assert report.differences["output_0"] < QUANTIZED[kind]


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


def test_detectors(tmp_path):
    """Tests that ops for places stay in float32.

    Suppression must be right, too.
    """
    function = make_detector()
    write(
        "litert",
        function,
        tmp_path / "float32",
        sample=smooth(1, 16, 20, 4),
    )
    for seed in range(6):
        image = smooth(1, 16, 20, 4, seed=seed)
        received = run("litert", tmp_path / "float32", {"image": image})
        expected = function(tf.constant(image))
        assert received["count"] == expected["count"] > 2
        for name in ("boxes", "pooled"):
            assert_close(received[name], expected[name])
        # No box appears twice, as a box without area would.
        real = received["boxes"][: received["count"]]
        assert len(np.unique(real, axis=0)) == len(real)
    calibration = [smooth(1, 16, 20, 4, seed=n) for n in range(4)]
    report = write(
        "litert",
        function,
        tmp_path / "int8",
        quantize="int8",
        calibration=calibration,
        tolerance=2,
    )
    assert report.size < (tmp_path / "float32").stat().st_size
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
    for kind in KINDS:
        report = write(
            "litert",
            function,
            tmp_path / kind,
            quantize=kind,
            calibration=[smooth(1, 6, 8, 8, seed=n) for n in range(4)],
        )
        assert report.differences["output_0"] < QUANTIZED[kind]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_quantized_mixed_policies(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = small_model((20, 24))
    keras.config.set_dtype_policy("float32")
    report = write(
        "litert",
        model,
        tmp_path / "model",
        quantize="int8",
        calibration=[smooth(4, 20, 24, 3)],
    )
    assert report.differences["output_0"] < QUANTIZED["int8"]
    assert model(smooth(1, 20, 24, 3)).dtype == policy.removeprefix("mixed_")


# Calibration.
def test_batches_are_taken_one_by_one(tmp_path):
    alive = []

    def read():
        for seed in range(6):
            gc.collect()
            assert sum(item() is not None for item in alive) <= 2
            batch = smooth(1, 20, 24, 3, seed=seed)
            alive.append(weakref.ref(batch))
            yield {"image": batch}
            del batch

    write(
        "litert",
        small_model((20, 24)),
        tmp_path / "model",
        quantize="int8",
        calibration=read(),
        sample=smooth(1, 20, 24, 3, seed=7),
    )
    assert len(alive) == 6


def test_a_sample_that_is_large_enough(tmp_path):
    model = small_model((10, 12))
    sample = smooth(32, 10, 12, 3)
    report = write(
        "litert", model, tmp_path / "model", quantize="int8", sample=sample
    )
    assert report.shapes == [{"image": (32, 10, 12, 3)}]
    dataset = tf.data.Dataset.from_tensor_slices(sample).batch(8)
    again = write(
        "litert",
        model,
        tmp_path / "again",
        quantize="int8",
        calibration=dataset,
        sample=sample,
    )
    # The ranges are those of all images, not only of the last images.
    assert again.differences == report.differences


def fail():
    yield smooth(1, 10, 12, 3)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"quantize": "int4"}, ValueError, "Expected `quantize` to be None, "),
        ({"quantize": True}, ValueError, "Received: True"),
        ({}, ValueError, r"Expected `calibration` .* Received: neither"),
        ({"sample": smooth(31, 10, 12, 3)}, ValueError, "sample of 31 images"),
        ({"calibration": []}, ValueError, "at least one batch. Received: none"),
        ({"calibration": iter(())}, ValueError, "at least one batch"),
        ({"calibration": smooth(4, 10, 12, 3)}, TypeError, r"\(4, 10, 12, 3\)"),
        ({"calibration": {"image": 1}}, TypeError, "Received: dict"),
        ({"calibration": "images"}, TypeError, "Received: str"),
        ({"calibration": 32}, TypeError, "Received: int"),
        (
            {"calibration": [smooth(4, 10, 3, 3)]},
            ValueError,
            r"\(4, 10, 3, 3\)",
        ),
        ({"calibration": [smooth(10, 12, 3)[0]]}, ValueError, "`calibration`"),
        (
            {"calibration": [smooth(1, 10, 12, 3), None]},
            ValueError,
            "in `calibration` to hold, for 'image'",
        ),
        (
            {"calibration": [smooth(0, 10, 12, 3)]},
            ValueError,
            "finite numbers, and not none",
        ),
        (
            {"calibration": [np.full((1, 10, 12, 3), np.nan)]},
            ValueError,
            "with others",
        ),
        (
            {"calibration": [(smooth(1, 10, 12, 3), np.zeros(1))]},
            ValueError,
            "1 arrays, for .*Received: 2",
        ),
        ({"calibration": [{"images": 1}]}, ValueError, r"the keys \['image'\]"),
        ({"calibration": fail()}, OSError, "the disk is gone"),
    ],
)
def test_bad_calibration(arguments, error, text, tmp_path):
    arguments = {"quantize": "int8", **arguments}
    with pytest.raises(error, match=text):
        write("litert", small_model((10, 12)), tmp_path / "model", **arguments)
    assert os.listdir(tmp_path) == []


def test_models_without_weights_and_without_the_quantizer(
    tmp_path, monkeypatch
):
    image = keras.Input((8, 9, 2))
    model = keras.Model(image, keras.layers.ReLU()(image))
    arguments = {"quantize": "int8", "calibration": [random(1, 8, 9, 2)]}
    with pytest.raises(ValueError, match="product with weights.*one without"):
        write("litert", model, tmp_path / "model", **arguments)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    for kind in ("dynamic", "int8"):
        arguments["quantize"] = kind
        with pytest.raises(ImportError, match=r"'tf-deform\[litert\]'"):
            write("litert", small_model((8, 9), 2), tmp_path / "m", **arguments)
    assert os.listdir(tmp_path) == []


def test_report_of_a_quantized_export(tmp_path, capsys):
    report = export.litert(
        small_model((10, 12)),
        tmp_path / "model",
        "int8",
        calibration=[smooth(4, 10, 12, 3)],
    )
    said = capsys.readouterr()
    assert "Quantizing ... " in said.out and str(report) in said.out
    assert "it/s" not in said.err
