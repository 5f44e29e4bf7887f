# SPDX-License-Identifier: Apache-2.0
"""Tests ONNX conditions and loops around the operator.

TensorFlow and Keras make them. A file holds all cases of one opset, as writing
files takes most of the time. OpenVINO reads the loops, too.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import check, check_onnx, compare_outputs, compile_openvino
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
X, SHIFTS = np.abs(random(3, 8, 9, 4, seed=2)), random(3, 8, 9, 18, seed=3)


def convolve(x, o, kernel, mask=None, **options):
    options = {"padding": "same", **options}
    return tf_deform.ops.deformable_conv2d(x, kernel, o, mask, **options)


# Control flow. Each function takes images, offsets and a kernel, and may use
# Autograph.


def loop(x, o, kernel, times=3, **options):
    return tf.while_loop(
        lambda i, h: i < times,
        lambda i, h: (i + 1, tf.tanh(convolve(h, o, kernel, **options))),
        (0, x),
        shape_invariants=(tf.TensorShape(()), x.shape),
    )[1]


def nested(x, o, kernel):
    for _ in tf.range(2):
        x = loop(x, o, kernel, 2)
    return x


def until_small(x, o, kernel):
    while tf.reduce_max(tf.abs(x)) > 0.05:
        x = tf.tanh(convolve(x, o, kernel)) / 2
    return x


def if_positive(x, then, otherwise):
    return tf.cond(tf.reduce_sum(x) > 0, then, otherwise)


def condition(x, o, kernel, **options):
    return if_positive(x, lambda: convolve(x, o, kernel, **options), lambda: x)


def scan(x, o, kernel, **options):
    return tf.scan(
        lambda h, step: tf.tanh(convolve(h, step[None], kernel, **options)),
        o,
        x[:1],
    )


def each(x, o, kernel):
    return tf.map_fn(
        lambda pair: convolve(pair[0][None], pair[1][None], kernel)[0],
        (x, o),
        fn_output_signature=tf.TensorSpec(x.shape[1:]),
    )


def kernel_for_each(x, o, kernel):
    return tf.map_fn(
        lambda item: convolve(item[0][None], item[1][None], item[2])[0],
        (x, o, tf.stack([kernel, 2 * kernel, -kernel])),
        fn_output_signature=tf.TensorSpec(x.shape[1:]),
    )


def kernel_that_changes(x, o, kernel):
    for _ in tf.range(3):
        x, kernel = convolve(x, o, kernel), 0.9 * kernel
    return x


def condition_in_loop(x, o, kernel):
    for i in tf.range(3):
        x = convolve(x, o, kernel) if i > 1 else tf.tanh(x)
    return x


def loop_in_condition(x, o, kernel):
    return if_positive(
        x, lambda: loop(x, o, kernel), lambda: loop(x, -o, kernel, 2)
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

    for _ in tf.range(2):
        x = tf.tanh(inner(x))
    return x


def groups_and_mask(x, o, kernel):
    mask = tf.sigmoid(o[:1, :, :, :9])
    return scan(x, o, kernel[:, :, :2], mask=mask)


def offset_groups_and_strides(x, o, kernel):
    offset = tf.concat([o, -o], -1)[:, ::2, ::2]
    return if_positive(
        x,
        lambda: convolve(x, offset, kernel, strides=2, offset_groups=2),
        lambda: x[:, ::2, ::2],
    )


def dilated(x, o, kernel):
    offset, options = o[:, 2:-2, 2:-2], {"padding": "valid"}
    return if_positive(
        x,
        lambda: convolve(x, offset, kernel, dilation_rate=2, **options),
        lambda: x[:, 2:-2, 2:-2],
    )


def clamped(x, o, kernel):
    """Has two taps only, as each tap becomes many operators."""
    return condition(x, o[..., :4], kernel[:1, :2], boundary="clamp")


# By opset: functions, each with the kind of its kernel and the number of
# operators that it becomes.
CONTROL_FLOW = {
    19: [
        (loop, "tensor", 1),
        (condition, "array", 1),
        (kernel_for_each, "variable", 1),
        (kernel_that_changes, "tensor", 1),
        (conditions_in_conditions, "variable", 3),
        (one_function_twice, "tensor", 2),
        (offset_groups_and_strides, "tensor", 1),
        (dilated, "variable", 1),
    ],
    20: [
        (condition, "variable", 1),
        (scan, "tensor", 1),
        (call_in_loop, "variable", 1),
    ],
    21: [
        (condition, "tensor", 1),
        (condition_in_loop, "variable", 1),
        (clamped, "tensor", 0),
    ],
    22: [
        (loop, "variable", 1),
        (each, "tensor", 1),
        (loop_in_condition, "tensor", 2),
        (groups_and_mask, "variable", 1),
    ],
}
SAMPLES = [
    (X, SHIFTS),
    (-X, SHIFTS),
    (X[:, :5, :7] / 90, SHIFTS[:, :5, :7]),
]


def make_function(bodies, specs):
    """Returns a function of all bodies, for kernels of the given kinds."""

    def run(x, o):
        outputs = {}
        for name, (body, kind) in bodies.items():
            with tf.name_scope(name):
                outputs[name] = body(x, o, KERNELS[kind])
        return outputs

    return tf.function(run, specs)


@pytest.mark.parametrize("opset", CONTROL_FLOW)
def test_functions_with_control_flow(opset, tmp_path):
    bodies = {
        body.__name__: (body, kind) for body, kind, _ in CONTROL_FLOW[opset]
    }
    function = make_function(bodies, [IMAGE, OFFSET])
    nodes = check_onnx(function, tmp_path / "model", SAMPLES, opset)
    wanted = sum(count for *_, count in CONTROL_FLOW[opset])
    assert nodes.count("DeformConv") == wanted


@pytest.mark.parametrize(
    ("known", "bodies"),
    [
        (False, {"loop": loop, "each_image": each}),
        (
            True,
            {
                "loop": loop,
                "clamped": functools.partial(loop, boundary="clamp"),
                "nested": nested,
                "until_small": until_small,
                "each_frame": scan,
            },
        ),
    ],
    ids=["any size", "fixed"],
)
def test_loops_in_openvino(known, bodies, tmp_path):
    specs = [IMAGE, OFFSET]
    if known:
        specs = [
            tf.TensorSpec((3, 8, 9, x.shape[-1]), name=x.name) for x in specs
        ]
    bodies = {name: (body, "tensor") for name, body in bodies.items()}
    function = make_function(bodies, specs)
    path = tmp_path / "model.onnx"
    nodes = check_onnx(function, path, SAMPLES[:1])
    assert nodes.count("Loop") >= len(bodies)
    sample = {"x": X, "o": SHIFTS}
    compare_outputs(compile_openvino(path), function, [sample])


@pytest.mark.parametrize("opset", [19, 22])
def test_a_kernel_that_is_an_input(opset, tmp_path):
    kernel = tf.TensorSpec(KERNEL.shape, "float32", "k")
    function = tf.function(
        lambda x, o, k: condition(x, o, k) + loop(x, o, k),
        [IMAGE, OFFSET, kernel],
    )
    samples = [(X, SHIFTS, KERNEL), (-X, SHIFTS, 2 * KERNEL)]
    nodes = check_onnx(function, tmp_path / "model", samples, opset)
    assert nodes.count("DeformConv") == 2


def test_pooling_in_control_flow(tmp_path):
    rois = np.float32(
        [
            [0, 1, 1, 20, 30],
            [1, 0, 0, 9, 9],
            [-1, 0, 0, 0, 0],
            [2, 3, 3, 60, 50],
        ]
    )
    shifts = tf.constant(random(4, 3, 3, 2))
    place = {"pooled_size": 3, "spatial_scale": 0.25}
    groups = {"output_dim": 1, "group_size": 2, "sample_per_part": 2}

    def align(x):
        return tf_deform.ops.deformable_roi_align(
            x, rois, shifts, sampling_ratio=2, **place
        )

    def psroi(x):
        return tf_deform.ops.deformable_psroi_pool(
            x, rois, shifts, **groups, **place
        )

    def body(x):
        return {
            "cond": if_positive(
                x, lambda: align(x), lambda: tf.zeros((4, 3, 3, 4))
            ),
            "map": tf.map_fn(lambda s: psroi(x * s), tf.constant([1.0, 2.0])),
        }

    function = tf.function(body, [IMAGE])
    check_onnx(function, tmp_path / "model", [(X,), (-X,)])


class Under(keras.layers.Layer):
    """Runs a layer under a condition or in a loop, by Keras' functions."""

    def __init__(self, form, layer):
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

    def __init__(self, kernel_size=3, **options):
        super().__init__()
        self.state_size = self.output_size = 8 * 9 * 2
        options["padding"] = "same"
        self.layer = DeformableConv2D(2, kernel_size, **options)

    def build(self, shape):
        self.layer.build((None, 8, 9, 4))

    def call(self, frame, states):
        ops = keras.ops
        maps = [ops.reshape(x, (-1, 8, 9, 2)) for x in (frame, states[0])]
        maps = ops.tanh(self.layer(ops.concatenate(maps, -1)))
        outputs = ops.reshape(maps, (-1, self.state_size))
        return outputs, [outputs]


def deformable(filters=4, kernel_size=3, **options):
    return DeformableConv2D(filters, kernel_size, padding="same", **options)


# By kind of inputs: the opset, the shape of the inputs, and the layers.
LAYERS = {
    "maps": (
        19,
        (8, 9, 4),
        lambda: [
            Under("cond", deformable()),
            Under("cond", deformable(modulation="sigmoid")),
            Under("cond", keras.layers.Conv2D(4, 3, padding="same")),
            Under("cond", keras.layers.SeparableConv2D(4, 3, padding="same")),
            Under("while", deformable(modulation="2sigmoid")),
            Under("fori", deformable(groups=2)),
            Under("map", deformable(offset_groups=2)),
        ],
    ),
    "maps of any size": (
        22,
        (None, None, 4),
        lambda: [Under("cond", deformable())],
    ),
    "flat frames": (
        22,
        (None, 8 * 9 * 2),
        lambda: [
            keras.layers.RNN(Align(modulation="sigmoid")),
            keras.layers.RNN(
                Align((1, 2), boundary="clamp"),
                return_sequences=True,
                go_backwards=True,
            ),
        ],
    ),
    "frames": (
        19,
        (3, 8, 9, 4),
        lambda: [
            keras.layers.TimeDistributed(deformable(5)),
            keras.Sequential(
                [keras.layers.ConvLSTM2D(3, 3, padding="same"), deformable(2)]
            ),
        ],
    ),
    # Only Python knows the shape of a loop's list. The batch has as many frames
    # as sequences, because in a graph Keras 3.15 counts the sequences.
    "frames of unknown number": (
        19,
        (None, 6, 7, 2),
        lambda: [
            keras.layers.TimeDistributed(layer)
            for layer in (
                keras.layers.Conv2D(3, 3),
                keras.layers.Conv2D(3, 3, strides=2, padding="same"),
                keras.layers.MaxPooling2D(2),
                deformable(3),
                deformable(3, (1, 2), boundary="clamp", modulation="sigmoid"),
            )
        ],
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_control_flow(kind, tmp_path):
    opset, shape, make = LAYERS[kind]
    image = keras.Input(shape, name="x")
    model = keras.Model(image, [layer(image) for layer in make()])
    for seed, weight in enumerate(model.weights):
        if "offset" in weight.path or "unknown number" in kind:
            weight.assign(random(*weight.shape, seed=seed) / 5)
    known = [old or new for old, new in zip(shape, (3, 7), strict=False)]
    x = np.abs(random(3, *known, *shape[2:]))
    samples = [{"x": x}, {"x": -x}]
    if "unknown number" in kind:
        samples = [{"x": x[:2, :2]}]
    path = tmp_path / "model"
    check("onnx", model, path, *samples, opset=opset, sample=x)
