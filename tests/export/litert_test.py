# SPDX-License-Identifier: Apache-2.0
"""LiteRT files: quantized ones, other types, places that are none."""

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
from exported import assert_close, random, run, write
from tensorflow.core.protobuf import saved_model_pb2

import tf_deform
from tf_deform import export, ops
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

KINDS = ("float16", "dynamic", "int8")
# Of the largest number. Each is some ten times what is found here, and a
# tenth of what positions in 8 bits make.
QUANTIZED = {"float16": 0.005, "dynamic": 0.06, "int8": 0.08}


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


def smooth(*shape, seed=0):
    """Images of which neighbours are alike, as those of a camera are."""
    images = random(*shape, seed=seed)
    for axis in (1, 2):
        images = sum(np.roll(images, n, axis) for n in range(-3, 4)) / 3
    return images.astype("float32")


def read_operations(path):
    """Kind, names and types of operands, and name, of each operation."""
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
    # What lies beyond the ranges that were seen would be cut off.
    image = np.concatenate(calibration)[-batch:]
    received = run("litert", report.path, {"image": image})
    assert_close(received["output_0"], model(image), QUANTIZED[kind])
    assert received["output_0"].dtype == "float32"


@pytest.mark.parametrize("size", [128, 200])
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_int8_of_large_maps(size, boundary, tmp_path):
    """Positions in 8 bits are off by pixels, or do not run at all."""
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
    # Not the largest: single pixels lie where "clamp" jumps.
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
    """The quantizer loads a file with images of one pixel: too small here."""
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
    # What a program gets that asks for nothing: one image.
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
    """The quantizer would lose such a result behind its rounded copy."""
    inner = small_model((12, 14))
    outputs = {"y": inner.output, "z": following(inner.output)}
    model = randomise(keras.Model(inner.input, outputs))
    images = smooth(8, 12, 14, 3)
    path = tmp_path / "model"
    write("litert", model, path, quantize="int8", calibration=[images])
    received = run("litert", path, {"image": images})
    for name, expected in model(images).items():
        assert_close(received[name], expected, QUANTIZED["int8"])


def pooling_model(layer):
    features = keras.Input((20, 24, 6), name="features")
    rois = keras.Input((5,), name="rois")
    x = keras.layers.Conv2D(18, 3, padding="same")(features)
    x = keras.layers.Flatten()(layer(x, rois))
    return randomise(
        keras.Model([features, rois], keras.layers.Dense(5, name="last")(x))
    )


def make_rois(batch, number, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 10, (number, 2))
    end = start + rng.uniform(4, 12, (number, 2))
    index = rng.integers(0, batch, (number, 1))
    return np.concatenate([index, start, end], 1).astype("float32")


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
    """Regions from a convolution, suppressed in a loop, and pooled."""
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
        # Clipped, as proposals are: some have no area.
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
    function.layers = (model, boxes, scores)  # Kept alive.
    return function


def test_detectors(tmp_path):
    """What decides places computes in float32, and suppression is right."""
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
        # No box is there twice, as one without area would be.
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
    # The one before and the one behind the deformable layer, and its taps.
    assert len(in_8_bits) == 1 + 1 + 9
    assert "boxes" not in names and "scores" not in names
    assert "deformable_1/Conv2D" not in names


def test_loops_and_attention(tmp_path):
    """Weights in a loop are found to be such, and products of activations."""
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
    # The same ranges: those of all images, not of the last ones.
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


# Portable SavedModels in TensorFlow's own converter.

CONTROL = {"If", "StatelessIf", "While", "StatelessWhile", "Case"}


def count_control(folder):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    nodes = [
        *graph.node,
        *(n for f in graph.library.function for n in f.node_def),
    ]
    # Keras' own endpoints and ours; what restores variables has none.
    return sum(node.op in CONTROL for node in nodes)


@pytest.mark.parametrize("by", ["tf_deform", "keras"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: small_model((16, 18), boundary="clamp", padding=1),
        lambda: pooling_model(DeformablePSROIPooling(2, 3, 1.0)),
        lambda: pooling_model(DeformableROIPooling(3, 1.0)),
        lambda: pooling_model(DeformableROIAlign(3, 1.0)),
    ],
    ids=["clamp", "psroi", "roi", "align"],
)
def test_portable_saved_models_have_no_branches(by, make, tmp_path):
    model = make()
    if by == "tf_deform":
        sample = None
        if len(model.inputs) == 2:
            sample = [random(2, 20, 24, 6), make_rois(2, 5)]
        arguments = {"sample": sample, "image_bytes": False}
        write("portable", model, tmp_path / "model", **arguments)
    else:
        with tf_deform.implementation("portable"):
            model.export(tmp_path / "model", verbose=False)
    assert count_control(tmp_path / "model") == 0


@pytest.mark.parametrize("batch", [None, 1])
def test_int8_by_tensorflows_converter(batch, tmp_path):
    """As long as maps are small."""
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


# Types.


@pytest.mark.parametrize("kind", ["litert", "onnx"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_models_in_other_types(kind, dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    image = keras.Input((10, 12, 3), name="image")
    x = keras.layers.Conv2D(6, 3, padding="same")(image)
    x = keras.layers.BatchNormalization()(x)
    x = DeformableConv2D(4, 3, modulation="sigmoid")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = randomise(keras.Model(image, keras.layers.Dense(3)(x)))
    keras.config.set_dtype_policy("float32")
    before = [layer.dtype_policy for layer in model._flatten_layers()]
    report = write(kind, model, tmp_path / "model")
    assert report.differences["output_0"] < 1e-5
    after = [layer.dtype_policy for layer in model._flatten_layers()]
    assert all(x is y for x, y in zip(before, after, strict=True))
    given = random(2, 10, 12, 3)
    received = run(kind, tmp_path / "model", {"image": given})["output_0"]
    assert received.dtype == "float32"
    expected = model(given)
    assert expected.dtype == dtype
    # Roundings of the model in its own type.
    expected = np.asarray(tf.cast(expected, "float32"))
    assert_close(received, expected, 0.03 if dtype != "float64" else 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_functions_in_other_types(dtype, tmp_path):
    kernel = tf.cast(random(3, 3, 2, 4), dtype)
    function = tf.function(
        lambda image: tf.nn.conv2d(tf.cast(image, dtype), kernel, 1, "SAME"),
        input_signature=[tf.TensorSpec((None, 8, 9, 2), name="image")],
    )
    text = f"compute in float32. Received: Conv2D in {dtype}"
    with pytest.raises(ValueError, match=text):
        write("litert", function, tmp_path / "model")
    assert os.listdir(tmp_path) == []


# Layers that need to know sizes.


def between(layer, shape=(None, None, 3)):
    image = keras.Input(shape)
    return keras.Model(image, layer(image))


class Asks(keras.layers.Layer):
    def call(self, inputs):
        if tf.reduce_max(inputs) > 0:
            return inputs
        return -inputs

    def compute_output_shape(self, shape):
        return shape


class Walks(Asks):
    def call(self, inputs):
        for row in tf.transpose(inputs):
            inputs += tf.reduce_mean(row)
        return inputs


def enlarge(**arguments):
    arguments = {"interpolation": "bilinear", "name": "culprit", **arguments}
    return keras.layers.UpSampling2D(2, **arguments)


@pytest.mark.parametrize("kind", ["native", "onnx", "litert"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: between(enlarge()),
        lambda: between(enlarge(interpolation="bicubic"), (8, None, 3)),
        lambda: between(enlarge(data_format="channels_first")),
        lambda: between(between(enlarge(interpolation="lanczos3"))),
        lambda: between(
            keras.layers.TimeDistributed(enlarge()), (2, None, None, 3)
        ),
        lambda: keras.Sequential([keras.Input((None, None, 3)), enlarge()]),
        lambda: tf.function(
            lambda image: between_eager(image),
            input_signature=[tf.TensorSpec((None, None, None, 3))],
        ),
    ],
)
def test_layers_that_need_sizes(kind, make, tmp_path):
    text = (
        r"Received: layer 'culprit' \(UpSampling2D\).*`input_signature` or in "
        r"keras.Input, .*tf.image.resize"
    )
    with pytest.raises(ValueError, match=text):
        write(kind, make(), tmp_path / "model")
    assert os.listdir(tmp_path) == []
    assert keras.config.is_traceback_filtering_enabled()


def between_eager(image):
    return enlarge()(image)


@pytest.mark.parametrize("kind", ["native", "litert"])
@pytest.mark.parametrize("layer", [Asks, Walks])
def test_layers_that_need_values(kind, layer, tmp_path):
    model = between(layer(name="culprit"), (8, 8, 3))
    with pytest.raises(ValueError, match=rf"'culprit' \({layer.__name__}\)"):
        write(kind, model, tmp_path / "model")


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Conv2D(2, 3),
        DeformableConv2D(2, 3),
        keras.layers.DepthwiseConv2D(3),
    ],
)
def test_channels_that_the_converter_loses(layer, tmp_path):
    """Keras repeats pixels by way of a shape that is computed."""
    image = keras.Input((None, None, 3), name="image")
    outputs = layer(keras.layers.UpSampling2D((3, 2))(image))
    model = randomise(keras.Model(image, outputs))
    with pytest.raises(ValueError, match="`input_signature`.*UpSampling2D"):
        write("litert", model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    signature = [tf.TensorSpec((None, 6, 7, 3), "float32", "image")]
    write("litert", model, tmp_path / "model", input_signature=signature)


@pytest.mark.parametrize("kind", ["native", "litert"])
def test_sizes_given_in_the_signature(kind, tmp_path):
    specs = [tf.TensorSpec((None, 8, 9, 3), name="image")]
    write(kind, between(enlarge()), tmp_path / "model", input_signature=specs)


# Places that are none.

NOWHERE = (np.nan, np.inf, -np.inf, 1e10, -1e10, 3e38)


def check_places(function, tmp_path, given, spoil):
    """`spoil` names what becomes a place that is none, one by one."""
    sample = dict(given)
    write("litert", function, tmp_path / "model", sample=sample)
    for name in spoil:
        for value in NOWHERE:
            changed = {key: array.copy() for key, array in given.items()}
            flat = changed[name].reshape(-1)
            flat[:: max(flat.size // 7, 1)] = value
            received = run("litert", tmp_path / "model", changed)["output_0"]
            expected = function(*map(tf.constant, changed.values()))
            expected = np.asarray(expected)
            same = np.isnan(received) == np.isnan(expected)
            assert same.all(), (name, value)
            assert_close(np.nan_to_num(received), np.nan_to_num(expected), 1e-5)


@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_convolution_at_no_places(boundary, tmp_path):
    kernel = random(3, 3, 2, 4)
    given = {
        "image": random(2, 9, 10, 2),
        "offset": random(2, 9, 10, 18),
        "mask": random(2, 9, 10, 9),
    }
    function = tf.function(
        lambda image, offset, mask: ops.deformable_conv2d(
            image, kernel, offset, mask, padding="same", boundary=boundary
        ),
        input_signature=[tf.TensorSpec(x.shape) for x in given.values()],
    )
    check_places(function, tmp_path, given, ["offset"])
    # A sample outside is zero, whatever its mask.
    given["offset"][:, ::2] = 1e10
    for value in NOWHERE:
        given["mask"][:, ::2] = value
        received = run("litert", tmp_path / "model", given)["output_0"]
        expected = np.asarray(function(*map(tf.constant, given.values())))
        assert np.isfinite(expected).all()
        assert_close(received, expected)


def test_psroi_pooling_at_no_places(tmp_path):
    given = {
        "maps": random(2, 20, 24, 18),
        "rois": make_rois(2, 7),
        "trans": random(7, 3, 3, 2),
    }
    function = tf.function(
        lambda maps, rois, trans: ops.deformable_psroi_pool(
            maps, rois, trans, output_dim=2, spatial_scale=1.0, pooled_size=3
        ),
        input_signature=[tf.TensorSpec(x.shape) for x in given.values()],
    )
    check_places(function, tmp_path, given, ["trans"])
    # All of these are no regions: the index stays what it is.
    given["rois"][:, 0] = 1
    check_rois(function, tmp_path, given)


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_at_no_places(ratio, tmp_path):
    given = {
        "maps": random(2, 20, 24, 3),
        "rois": make_rois(2, 7),
        "offset": random(7, 3, 3, 2),
    }
    function = tf.function(
        lambda maps, rois, offset: ops.deformable_roi_align(
            maps,
            rois,
            offset,
            pooled_size=3,
            spatial_scale=1.0,
            sampling_ratio=ratio,
        ),
        input_signature=[tf.TensorSpec(x.shape) for x in given.values()],
    )
    check_places(function, tmp_path, given, ["offset"])
    check_rois(function, tmp_path, given)


def check_rois(function, tmp_path, given):
    for value in NOWHERE:
        changed = {key: array.copy() for key, array in given.items()}
        changed["rois"][[0, 2, 3, 5], [1, 2, 3, 4]] = value
        received = run("litert", tmp_path / "model", changed)["output_0"]
        expected = function(*map(tf.constant, changed.values()))
        assert_close(received, expected, 1e-5)


def test_a_branch_that_has_become_nan(tmp_path):
    model = small_model((10, 12))
    layer = model.get_layer("deformable")
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, np.nan))
    image = random(1, 10, 12, 3)
    assert np.isnan(model(image)).all()
    write("litert", model, tmp_path / "model", sample=image)
    received = run("litert", tmp_path / "model", {"image": image})["output_0"]
    assert np.isnan(received).all()


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
