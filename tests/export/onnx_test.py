# SPDX-License-Identifier: Apache-2.0
"""Tests ONNX: the operator, opsets, resizing, and refusals with reasons."""

import functools
import types

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import tf2onnx.optimizer
from exported import (
    CLOSE,
    assert_close,
    check,
    check_onnx,
    randomise,
    small_model,
    write,
)
from operands import random

import tf_deform
from tf_deform.export import _onnx_graph, _onnx_handlers
from tf_deform.layers import DeformableConv2D

KERNEL = random(3, 3, 4, 4, seed=1) / 5
X = random(3, 8, 9, 4, seed=2)


@pytest.mark.parametrize("opset", [19, 20, 21, 22])
def test_onnx_has_the_standards_operator(opset, tmp_path):
    options = {"offset_groups": 4, "groups": 2, "strides": (1, 2)}
    model = small_model(kernel_size=3, **options)
    write("onnx", model, tmp_path / "model.onnx", opset=opset)
    proto = onnx.load(tmp_path / "model.onnx")
    versions = {item.domain: item.version for item in proto.opset_import}
    assert versions[""] == opset
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    (node,) = (n for n in proto.graph.node if n.op_type == "DeformConv")
    attributes = {
        attribute.name: onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
    }
    expected = {"strides": [1, 2], "kernel_shape": [3, 3], "group": 2}
    for name, value in {**expected, "offset_group": 4}.items():
        assert attributes[name] == value
    # The graph has one path, whatever the sizes are.
    kinds = {node.op_type for node in proto.graph.node}
    assert not {"If", "Loop", "GatherND"} & kinds


def test_onnx_pads_where_strides_leave_pixels(tmp_path):
    image = keras.Input((None, None, 3), name="image")
    outputs = [
        DeformableConv2D(4, kernel, strides=stride, padding="same")(image)
        for kernel, stride in ((1, 4), (3, 8), (2, 5))
    ]
    model = randomise(keras.Model(image, outputs))
    samples = [{"image": random(1, n, 23, 3, seed=n)} for n in range(4, 17)]
    check("onnx", model, tmp_path / "model", *samples)


def test_opsets_differ_in_what_is_known():
    """Tests that only operators in `CHANGED` differ between the opsets."""
    schemas = onnx.defs.get_all_schemas_with_history()
    changed = set()
    for name in {schema.name for schema in schemas if not schema.domain}:
        try:
            old = onnx.defs.get_schema(name, _onnx_handlers.OPSET, "")
        except onnx.defs.SchemaError:
            continue  # newer than OPSET
        for opset in () if old.deprecated else range(19, 23):
            new = onnx.defs.get_schema(name, opset, "")
            inputs = [[x.name for x in schema.inputs] for schema in (old, new)]
            attributes = new.attributes.items()
            defaults = {key: x.default_value for key, x in attributes}
            same = (
                not new.deprecated
                and new.min_input <= old.min_input
                and inputs[1][: len(inputs[0])] == inputs[0]
                and all(
                    key in defaults and defaults[key] == x.default_value
                    for key, x in old.attributes.items()
                )
                and all(
                    key in old.attributes for key, x in attributes if x.required
                )
            )
            if not same:
                changed.add(name)
    # Their inputs changed in meaning, not in form.
    assert changed | {"GroupNormalization"} == set(_onnx_graph.CHANGED)


# Resizing.
v1 = tf.compat.v1.image
METHODS = {
    "bicubic": functools.partial(tf.image.resize, method="bicubic"),
    "old_bicubic": v1.resize_bicubic,
    "bilinear": tf.image.resize,
    "nearest": functools.partial(tf.image.resize, method="nearest"),
    "old_nearest": v1.resize_nearest_neighbor,
    "corners_nearest": functools.partial(
        v1.resize_nearest_neighbor, align_corners=True
    ),
    "corners": functools.partial(v1.resize_bilinear, align_corners=True),
}


def resize_by_all(x, size):
    return {name: method(x, size) for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """Returns images, sizes and a file's results, by old and new size."""
    function = tf.function(
        resize_by_all,
        [
            tf.TensorSpec((None, None, None, 3), "float32", "x"),
            tf.TensorSpec((2,), "int32", "size"),
        ],
    )
    path = tmp_path_factory.mktemp("resized") / "model"
    write("onnx", function, path, sample=[random(1, 5, 7, 3), [8, 9]])
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    found = {}
    for old in range(1, 65):
        x = np.repeat(random(1, old, 2, 1, seed=old), 3, axis=3)
        for new in range(1, 65):
            size = np.array([new, 3], "int32")
            values = session.run(None, {"x": x, "size": size})
            found[old, new] = x, size, dict(zip(names, values, strict=True))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_of_sizes(method, resized):
    """Tests all pairs up to 64; compares the values of a few of each size."""
    step, tolerance = 16, 2e-5
    if "nearest" in method:
        step, tolerance = 4, 0
    elif "bicubic" in method:
        # TensorFlow keeps the weights of four pixels in a table of 1024 steps.
        tolerance = 4e-3
    for (old, new), (x, size, outputs) in resized.items():
        received = outputs[method]
        assert received.shape == (1, new, 3, 3)
        if method == "nearest" or (old + new) % step == 0:
            expected = METHODS[method](x, size)
            assert_close(received, expected, tolerance, f"{old} to {new}")


PAIRS = [(25, 38), (60, 500), (33, 47), (7, 3)]


def test_models_of_fixed_size(tmp_path):
    """Tests several methods of `tf.image.resize`, and Keras' layers."""
    specs = [
        tf.TensorSpec((None, old, old, 3), "float32", f"x{old}")
        for old, _ in PAIRS
    ]
    layer = keras.layers.Resizing(11, 13, crop_to_aspect_ratio=True)
    upsampling = keras.layers.UpSampling2D(3, interpolation="bilinear")

    def body(*images):
        outputs = {}
        for x, (old, new) in zip(images, PAIRS, strict=True):
            for kind, value in resize_by_all(x, (new, 5)).items():
                outputs[f"{old}_{kind}"] = value
            outputs[f"{old}_up"] = upsampling(x)
            outputs[f"{old}_layer"] = layer(x)
        return outputs

    sample = [random(2, old, old, 3) for old, _ in PAIRS]
    function = tf.function(body, specs)
    check_onnx(function, tmp_path / "model", [sample], 22, 1e-3)


def test_resizing_of_bytes(tmp_path):
    """Tests resizing images of bytes.

    TensorFlow returns floats, or bytes for the nearest pixel.
    """
    function = tf.function(
        lambda x: resize_by_all(x, (11, 13)),
        [tf.TensorSpec((None, None, 9, 3), "uint8", "x")],
    )
    sample = random(2, 8, 9, 3, dtype="uint8")
    check_onnx(function, tmp_path / "model", [(sample,)], 19, 1e-3)


def test_deformable_models_of_fixed_size(tmp_path):
    images, outputs = [], []
    for old, new in ((25, 38), (60, 50), (33, 47)):
        images.append(keras.Input((old, old, 3), name=f"x{old}"))
        x = DeformableConv2D(3, 3, padding="same")(images[-1])
        x = keras.layers.Resizing(new, new)(x)
        x = DeformableConv2D(3, 3, padding="same")(x)
        outputs.append(keras.layers.Resizing(old, new, "nearest")(x))
    model = keras.Model(images, outputs)
    report = write("onnx", model, tmp_path / "model")
    assert max(report.differences.values()) < CLOSE


def function_of(body, **specs):
    return tf.function(
        body, [tf.TensorSpec(*spec, name) for name, spec in specs.items()]
    )


def of_image(body):
    return function_of(body, x=((1, 8, 9, 3), "float32"))


def suppress(sigma):
    return function_of(
        lambda boxes, scores: tf.image.non_max_suppression_with_scores(
            boxes, scores, 5, 0.5, soft_nms_sigma=sigma
        )[1],
        boxes=((None, 4), "float32"),
        scores=((None,), "float32"),
    )


def convolve_in(dtype):
    kernel = tf.cast(KERNEL, dtype)
    return function_of(
        lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"), x=((1, 8, 9, 4), dtype)
    )


def test_hard_suppression_is_exported(tmp_path):
    boxes = np.float32([[0, 0, 2, 2], [0, 1, 2, 3], [5, 5, 6, 7]])
    scores = np.float32([0.9, 0.8, 0.7])
    check_onnx(suppress(0.0), tmp_path / "model", [(boxes, scores)])


def test_crops_are_exported(tmp_path):
    function = function_of(
        lambda x, boxes: tf.image.crop_and_resize(x, boxes, [0, 2], (3, 4)),
        x=((None, None, None, 4), "float32"),
        boxes=((None, 4), "float32"),
    )
    boxes = np.float32(
        [
            [[0.1, 0.2, 0.6, 0.8], [0, 0, 1, 1]],
            [[-0.3, 0.2, 0.6, 1.4], [0.8, 0.9, 0.1, 0.2]],
        ]
    )
    check_onnx(function, tmp_path / "model", [(X, each) for each in boxes])


# What cannot be exported, and the reasons that are told.
REASONS = {
    f"soft suppression, {sigma}": (suppress(sigma), "non-max.*soft_nms_sigma")
    for sigma in (0.1, 0.5, 0.99, 1.0, 3.0)
}
REASONS |= {
    dtype: (convolve_in(dtype), f"(?s:.*){dtype}")
    for dtype in ("float64", "bfloat16")
}
REASONS |= {
    "area": (
        of_image(lambda x: tf.image.resize(x, (4, 5), "area")),
        "'area'.*'nearest'",
    ),
    "area-in-cond": (
        of_image(
            lambda x: tf.cond(
                tf.reduce_sum(x) > 0,
                lambda: tf.image.resize(x, (8, 9), "area"),
                lambda: x,
            )
        ),
        "'area'.*'nearest'",
    ),
    "antialias": (
        of_image(lambda x: tf.image.resize(x, (4, 5), antialias=True)),
        "ScaleAndTranslate",
    ),
    "crop": (
        of_image(
            lambda x: tf.image.crop_and_resize(
                x, [[0.1, 0.2, 0.6, 0.8]], [0], (4, 5), "nearest"
            )
        ),
        "'bilinear'.*'nearest'",
    ),
    "switch": (
        of_image(
            lambda x: tf.switch_case(
                tf.cast(x[0, 0, 0, 0], "int32"),
                [lambda: x, lambda: -x, lambda: 2 * x],
            )
        ),
        "switch_case",
    ),
    "scan": (
        of_image(
            lambda x: keras.ops.scan(lambda c, y: (c + y, c), x[0, 0], x[0])[1]
        ),
        "keras.ops.scan.*tf.scan",
    ),
    "bitcast": (of_image(lambda x: tf.bitcast(x, "int32")), "Bitcast"),
    "qr-in-map": (
        of_image(lambda x: tf.map_fn(lambda h: tf.linalg.qr(h)[0], x)),
        "Qr",
    ),
    # tf2onnx only logs what its handlers raise.
    "combined suppression": (
        function_of(
            lambda boxes, scores: tf.image.combined_non_max_suppression(
                boxes, scores, 3, 3
            )[0],
            boxes=((1, 5, 2, 4), "float32"),
            scores=((1, 5, 2), "float32"),
        ),
        "Received: .* boxes shared across",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_is_told(case, tmp_path):
    function, reason = REASONS[case]
    with pytest.raises(
        (ValueError, RuntimeError), match=f"Expected .*{reason}"
    ):
        write("onnx", function, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_our_handlers_raise_is_told(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of cheese")

    monkeypatch.setitem(_onnx_handlers.HANDLERS, "SelectV2", fail)
    function = of_image(lambda x: tf.where(x > 0, x, -2 * x))
    with pytest.raises(ValueError, match="Received: out of cheese"):
        write("onnx", function, tmp_path / "model")


def test_optimizers_that_fail_are_left_out(tmp_path, monkeypatch):
    """Tests one that fails after it has changed the graph."""

    def fail(graph, iteration):
        failed.append(iteration)
        for node in graph.get_nodes():
            graph.remove_node(node.name)
        raise RuntimeError("out of cheese")

    failed = []
    optimizer = types.SimpleNamespace(optimize=fail, graph_been_opt=False)
    monkeypatch.setitem(
        tf2onnx.optimizer._optimizers, "remove_identity", lambda: optimizer
    )
    function = of_image(lambda x: tf.where(x > 0, x, -2 * x))
    check_onnx(function, tmp_path / "model", [[random(1, 8, 9, 3)]])
    assert len(failed) > 1


def test_float64_where_it_is_held(tmp_path):
    function = function_of(
        lambda x, o: tf_deform.ops.deformable_conv2d(
            x, tf.cast(KERNEL, "float64"), o, padding="same"
        ),
        x=((None, None, None, 4), "float64"),
        o=((None, None, None, 18), "float64"),
    )
    sample = (X.astype("float64"), random(3, 8, 9, 18, seed=3, dtype="float64"))
    check_onnx(function, tmp_path / "model", [sample], 19, 1e-12)


def test_an_onnxruntime_that_is_too_old(tmp_path, monkeypatch):
    def raise_as_1_23(*_, **__):
        raise RuntimeError(
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an "
            "implementation for DeformConv(19) node with name 'a'"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", raise_as_1_23)
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    image = keras.Input((6, 7, 3))
    model = keras.Model(image, DeformableConv2D(2, 3)(image))
    with pytest.raises(RuntimeError, match="1.23.2 is there; 1.25 is the fir"):
        tf_deform.export.onnx(model, tmp_path / "m.onnx", verbose=False)
    assert not list(tmp_path.iterdir())
