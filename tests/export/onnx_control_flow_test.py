# SPDX-License-Identifier: Apache-2.0
"""Tests ONNX conditions and loops around the operator.

TensorFlow and Keras make them.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import assert_close, check_onnx, run, write
from operands import random

import tf_deform
from tf_deform.layers import DeformableConv2D

KERNEL = random(3, 3, 4, 4, seed=1) / 5
KERNELS = {
    "array": KERNEL,
    "variable": tf.Variable(KERNEL),
    "tensor": tf.constant(KERNEL),
}
IMAGE = tf.TensorSpec((None, None, None, 4), "float32", "x")
OFFSET = tf.TensorSpec((None, None, None, 18), "float32", "o")
X, SHIFTS = random(3, 8, 9, 4, seed=2), random(3, 8, 9, 18, seed=3)


def convolve(x, o, kernel=KERNELS["tensor"], mask=None, **options):
    options = {"padding": "same", **options}
    return tf_deform.ops.deformable_conv2d(x, kernel, o, mask, **options)


# Control flow. Each function takes images, offsets and a kernel.
def loop(x, o, kernel, steps=3, **options):
    return tf.while_loop(
        lambda i, h: i < steps,
        lambda i, h: (i + 1, tf.tanh(convolve(h, o, kernel, **options))),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def condition(x, o, kernel, **options):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, o, kernel, **options),
        lambda: x,
    )


def scan(x, o, kernel, **options):
    return tf.scan(
        lambda h, step: tf.tanh(convolve(h, step[None], kernel, **options)),
        o,
        x[:1],
    )


def each(x, o, kernel, **options):
    return tf.map_fn(
        lambda pair: convolve(pair[0][None], pair[1][None], kernel, **options)[
            0
        ],
        (x, o),
        fn_output_signature=tf.TensorSpec((None, None, 4)),
    )


def kernel_for_each(x, o, kernel):
    kernels = tf.stack([kernel, 2 * kernel, -kernel])
    return tf.map_fn(
        lambda item: convolve(item[0][None], item[1][None], item[2])[0],
        (x, o, kernels),
        fn_output_signature=tf.TensorSpec((None, None, 4)),
    )


def kernel_that_changes(x, o, kernel):
    return tf.while_loop(
        lambda i, h, k: i < 3,
        lambda i, h, k: (i + 1, convolve(h, o, k), k * 0.9),
        (0, x, kernel),
        shape_invariants=(
            tf.TensorShape(()),
            IMAGE.shape,
            tf.TensorShape((3, 3, 4, 4)),
        ),
    )[1]


def condition_in_loop(x, o, kernel):
    return tf.while_loop(
        lambda i, h: i < 3,
        lambda i, h: (
            i + 1,
            tf.cond(i > 1, lambda: convolve(h, o, kernel), lambda: tf.tanh(h)),
        ),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def loop_in_condition(x, o, kernel):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: loop(x, o, kernel),
        lambda: loop(x, -o, kernel, 2),
    )


def conditions_in_conditions(x, o, kernel):
    return tf.case(
        [
            (tf.reduce_sum(x) > 9, lambda: convolve(x, o, kernel)),
            (tf.reduce_sum(x) > 0, lambda: convolve(x, -o, 2 * kernel)),
        ],
        default=lambda: condition(-x, o, kernel),
    )


def one_function_twice(x, o, kernel):
    @tf.function
    def inner(x, o):
        for _ in tf.range(2):
            if tf.reduce_sum(x) > 0:
                x = convolve(x, o, kernel)
        return tf.ensure_shape(x, IMAGE.shape)

    return inner(x, o) + inner(x, 2 * o)


def call_in_loop(x, o, kernel):
    @tf.function
    def inner(x):
        for _ in tf.range(2):
            x = convolve(x, o, kernel)
        return tf.ensure_shape(x, IMAGE.shape)

    return tf.while_loop(
        lambda i, h: i < 2,
        lambda i, h: (i + 1, tf.tanh(inner(h))),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def groups_and_mask(x, o, kernel):
    return scan(
        x,
        o,
        kernel[:, :, :2],
        mask=tf.sigmoid(o[:1, :, :, :9]),
    )


def offset_groups_and_strides(x, o, kernel):
    offset = tf.concat([o, -o], -1)[:, ::2, ::2]
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, offset, kernel, strides=2, offset_groups=2),
        lambda: x[:, ::2, ::2],
    )


def dilated(x, o, kernel):
    offset = o[:, 2:-2, 2:-2]
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, offset, kernel, padding="valid", dilation_rate=2),
        lambda: x[:, 2:-2, 2:-2],
    )


def clamped(x, o, kernel):
    return condition(x, o, kernel, boundary="clamp")


CONTROL_FLOW = [
    (loop, "tensor", 19),
    (loop, "variable", 22),
    (condition, "array", 19),
    (condition, "variable", 20),
    (condition, "tensor", 21),
    (scan, "tensor", 20),
    (each, "tensor", 22),
    (kernel_for_each, "variable", 19),
    (kernel_that_changes, "tensor", 19),
    (condition_in_loop, "variable", 21),
    (loop_in_condition, "tensor", 22),
    (conditions_in_conditions, "variable", 19),
    (one_function_twice, "tensor", 19),
    (call_in_loop, "variable", 20),
    (groups_and_mask, "variable", 22),
    (offset_groups_and_strides, "tensor", 19),
    (dilated, "variable", 19),
    (clamped, "tensor", 19),
]


@pytest.mark.parametrize(
    ("body", "kernel", "opset"),
    CONTROL_FLOW,
    ids=[f"{f.__name__}-{kernel}" for f, kernel, _ in CONTROL_FLOW],
)
def test_functions_with_control_flow(body, kernel, opset, tmp_path):
    function = tf.function(
        lambda x, o: body(x, o, KERNELS[kernel]), [IMAGE, OFFSET]
    )
    samples = [
        (x, o)
        for x, o in (
            (np.abs(X), SHIFTS),
            (-np.abs(X), SHIFTS),
            (np.abs(X[:, :5, :7]) / 90, SHIFTS[:, :5, :7]),
        )
    ]
    nodes = check_onnx(function, tmp_path / "model", samples, opset)
    assert "Loop" in nodes or "If" in nodes
    assert ("DeformConv" in nodes) == (body is not clamped)


@pytest.mark.parametrize("opset", [19, 22])
def test_a_kernel_that_is_an_input(opset, tmp_path):
    kernel = tf.TensorSpec(KERNEL.shape, "float32", "k")
    function = tf.function(
        lambda x, o, k: condition(x, o, k) + loop(x, o, k),
        [IMAGE, OFFSET, kernel],
    )
    samples = [(np.abs(X), SHIFTS, KERNEL), (-np.abs(X), SHIFTS, 2 * KERNEL)]
    nodes = check_onnx(function, tmp_path / "model", samples, opset)
    assert nodes.count("DeformConv") == 2


def test_pooling_in_control_flow(tmp_path):
    rois = np.array(
        [
            [0, 1, 1, 20, 30],
            [1, 0, 0, 9, 9],
            [-1, 0, 0, 0, 0],
            [2, 3, 3, 60, 50],
        ],
        "float32",
    )
    shifts = tf.constant(random(4, 3, 3, 2))

    def align(x):
        return tf_deform.ops.deformable_roi_align(
            x, rois, shifts, pooled_size=3, spatial_scale=0.25
        )

    def psroi(x):
        return tf_deform.ops.deformable_psroi_pool(
            x,
            rois,
            shifts,
            output_dim=1,
            group_size=2,
            part_size=3,
            pooled_size=3,
            spatial_scale=0.25,
        )

    def body(x):
        return {
            "cond": tf.cond(
                tf.reduce_sum(x) > 0, lambda: align(x), lambda: align(x) * 0
            ),
            "map": tf.map_fn(lambda s: psroi(x * s), tf.constant([1.0, 2.0])),
        }

    function = tf.function(body, [IMAGE])
    check_onnx(function, tmp_path / "model", [(np.abs(X),), (-np.abs(X),)])


class Under(keras.layers.Layer):
    """Runs a layer under a condition or in a loop, by Keras' functions."""

    def __init__(self, layer, form):
        super().__init__()
        self.layer, self.form = layer, form

    def build(self, shape):
        self.layer.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        ops = keras.ops
        if self.form == "cond":
            return ops.cond(ops.mean(x) > 0, lambda: self.layer(x), lambda: x)
        if self.form == "while":
            return ops.while_loop(
                lambda i, h: i < 2,
                lambda i, h: (i + 1, self.layer(h)),
                (0, x),
            )[1]
        if self.form == "fori":
            return ops.fori_loop(0, 2, lambda i, h: self.layer(h), x)
        return ops.map(lambda image: self.layer(image[None])[0], x)


class Align(keras.layers.Layer):
    """Aligns the remembered maps with the next frame."""

    def __init__(self, **options):
        super().__init__()
        self.state_size = self.output_size = 8 * 9 * 2
        self.layer = DeformableConv2D(2, 3, padding="same", **options)

    def build(self, shape):
        self.layer.build((None, 8, 9, 4))

    def call(self, frame, states):
        ops = keras.ops
        maps = [ops.reshape(x, (-1, 8, 9, 2)) for x in (frame, states[0])]
        maps = ops.tanh(self.layer(ops.concatenate(maps, -1)))
        outputs = ops.reshape(maps, (-1, self.state_size))
        return outputs, [outputs]


def deformable(filters=4, **options):
    return DeformableConv2D(filters, 3, padding="same", **options)


MAPS, FRAMES, FLAT = (8, 9, 4), (3, 8, 9, 4), (None, 8 * 9 * 2)
LAYERS = {
    "cond": (MAPS, lambda: Under(deformable(), "cond")),
    "cond of any size": ((None, None, 4), lambda: Under(deformable(), "cond")),
    "cond, modulated": (
        MAPS,
        lambda: Under(deformable(modulation="sigmoid"), "cond"),
    ),
    "cond, plain": (
        MAPS,
        lambda: Under(keras.layers.Conv2D(4, 3, padding="same"), "cond"),
    ),
    "cond, separable": (
        MAPS,
        lambda: Under(
            keras.layers.SeparableConv2D(4, 3, padding="same"), "cond"
        ),
    ),
    "while": (MAPS, lambda: Under(deformable(modulation="2sigmoid"), "while")),
    "fori": (MAPS, lambda: Under(deformable(groups=2), "fori")),
    "map": (MAPS, lambda: Under(deformable(offset_groups=2), "map")),
    "RNN": (FLAT, lambda: keras.layers.RNN(Align(modulation="sigmoid"))),
    "RNN, clamped": (
        FLAT,
        lambda: keras.layers.RNN(
            Align(boundary="clamp"), return_sequences=True, go_backwards=True
        ),
    ),
    "TimeDistributed": (
        FRAMES,
        lambda: keras.layers.TimeDistributed(deformable(5)),
    ),
    "ConvLSTM2D": (
        FRAMES,
        lambda: keras.Sequential(
            [keras.layers.ConvLSTM2D(3, 3, padding="same"), deformable(2)]
        ),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_control_flow(kind, tmp_path):
    keras.utils.set_random_seed(0)
    shape, make = LAYERS[kind]
    image = keras.Input(shape, name="x")
    model = keras.Model(image, make()(image))
    for weight in model.weights:
        if "offset" in weight.path:
            weight.assign(random(*weight.shape) / 5)
    opset = 19 if len(kind) % 2 else 22
    known = [old or new for old, new in zip(shape, (5, 7), strict=False)]
    image = np.abs(random(2, *known, *shape[2:]))
    write("onnx", model, tmp_path / "model", opset=opset, sample=image)
    for x in (image, -image):
        received = run("onnx", tmp_path / "model", {"x": x})
        assert_close(received["output_0"], model(x, training=False))


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Conv2D(3, 3),
        keras.layers.Conv2D(3, 3, strides=2, padding="same"),
        keras.layers.MaxPooling2D(2),
        deformable(3),
        deformable(3, boundary="clamp", modulation="sigmoid"),
    ],
)
def test_frames_of_unknown_number(layer, tmp_path):
    """Tests loops of unknown length.

    Only Python knows the shape of a loop's list.

    The batch has as many frames as sequences, because in a graph Keras 3.15
    counts the sequences.
    """
    frames = keras.Input((None, 6, 7, 2), name="x")
    model = keras.Model(frames, keras.layers.TimeDistributed(layer)(frames))
    for seed, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=seed) / 5)
    x = random(3, 3, 6, 7, 2)
    write("onnx", model, tmp_path / "model", sample=x)
    received = run("onnx", tmp_path / "model", {"x": x[:2, :2]})
    assert_close(received["output_0"], model(x[:2, :2]))
