# SPDX-License-Identifier: Apache-2.0
"""Tests that rewriting graphs to 16 bits leaves positions alone.

TensorFlow may round values to 16 bits if the program asks for it. It may not
round positions: 600 pixels to the right, a bfloat16 is off by one or two. A
branch may compute displacements from rounded values: the native ops, whose
positions the rewriting never touches, then get the same displacements.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close
from tensorflow.core.protobuf import (
    config_pb2,
    device_properties_pb2,
    rewriter_config_pb2,
)
from tensorflow.python.framework import meta_graph
from tensorflow.python.grappler import cluster, tf_optimizer

import tf_deform
from tf_deform import ops

WIDTH = 600


def draw(seed, *shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return tf.constant(np.float32(rng.normal(scale=scale, size=shape)))


IMAGE = draw(0, 1, 6, WIDTH, 8)
WEIGHTS = [
    draw(1, 1, 1, 8, 8, scale=0.3),
    draw(2, 3, 3, 8, 27, scale=0.1),
    draw(3, 3, 3, 8, 4),
]


def convolve(image, weights, implementation, **options):
    """Makes features, then displacements and masks, by convolutions."""
    first, branch, kernel = weights
    features = tf.nn.conv2d(image, first, 1, "SAME")
    made = tf.nn.conv2d(features, branch, 1, "SAME")
    return ops.deformable_conv2d(
        features,
        kernel,
        made[..., :18],
        tf.sigmoid(made[..., 18:]),
        padding="same",
        implementation=implementation,
        **options,
    )


def convolve_fields(image, weights, implementation):
    """Makes the same, and leaves it to the op to take them apart."""
    first, branch, kernel = weights
    features = tf.nn.conv2d(image, first, 1, "SAME")
    return ops.deformable_conv2d(
        features,
        kernel,
        tf.nn.conv2d(features, branch, 1, "SAME"),
        padding="same",
        modulation="sigmoid",
        implementation=implementation,
    )


def pool(function, **options):
    def run(image, weights, implementation):
        """Makes boxes and displacements by convolutions, as in a detector."""
        first, branch, _ = weights
        features = tf.nn.conv2d(image, first, 1, "SAME")
        moves = tf.nn.conv2d(image, first[..., :4] * 0.1, 1, "SAME")
        moves = moves[0, 0, ::100]
        left = tf.range(WIDTH // 100, dtype=tf.float32)[:, tf.newaxis] * 100
        rest = left * 0
        boxes = [left + 0.3, rest + 0.4, left + 20.6, rest + 4.7]
        rois = tf.concat([rest, moves + tf.concat(boxes, 1)], 1)
        made = tf.nn.conv2d(image, branch, 1, "SAME")
        made = tf.reshape(made[0, 0, : WIDTH // 100, :8], (-1, 2, 2, 2))
        return function(
            features,
            rois,
            made,
            pooled_size=2,
            spatial_scale=1.0,
            implementation=implementation,
            **options,
        )

    return run


CALLS = {
    "convolve": convolve,
    "clamped": functools.partial(convolve, boundary="clamp"),
    "fields": convolve_fields,
    "psroi_pool": pool(ops.deformable_psroi_pool, output_dim=8, group_size=1),
    "roi_align": pool(ops.deformable_roi_align, sampling_ratio=2),
    "roi_align_adaptive": pool(ops.deformable_roi_align),
}


def error(received, expected):
    received, expected = np.float32(received), np.float32(expected)
    return np.sqrt(np.mean((received - expected) ** 2) / np.mean(expected**2))


@pytest.fixture
def bfloat16():
    name = "auto_mixed_precision_onednn_bfloat16"
    before = tf.config.optimizer.get_experimental_options().get(name, False)
    tf.config.optimizer.set_experimental_options({name: True})
    yield
    tf.config.optimizer.set_experimental_options({name: before})


def train(name, implementation, image):
    """Returns the output, and the gradients of image and weights."""
    tensors = [image, *WEIGHTS]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = CALLS[name](image, WEIGHTS, implementation)
        factors = tf.cast(tf.range(tf.size(output)), tf.float32)
        loss = tf.reduce_sum(
            output * tf.reshape(tf.cos(factors), tf.shape(output))
        )
    return [output, *tape.gradient(loss, tensors)]


@pytest.mark.cpu_only(reason="oneDNN")
@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_on_the_cpu(name, bfloat16):
    expected = train(name, "portable", IMAGE)
    native, portable = (
        tf.function(train)(name, implementation, IMAGE)
        for implementation in ("native", "portable")
    )
    # The graph has been rewritten.
    assert error(native[0], expected[0]) > 1e-4
    for part, other, right in zip(portable, native, expected, strict=True):
        if right is not None:
            assert error(part, right) < 1.5 * error(other, right) + 0.005


@pytest.mark.cpu_only(reason="oneDNN")
def test_bfloat16_of_the_layers(bfloat16, tmp_path):
    """Tests a model with branches of its own, from a file of stock ops."""
    inputs = keras.Input((4, WIDTH, 3))
    x = keras.layers.Conv2D(8, 3, padding="same")(inputs)
    layer = tf_deform.layers.DeformableConv2D(8, 3, padding="same")
    model = keras.Model(inputs, layer(x))
    shape = layer.offset_kernel.shape
    layer.offset_kernel.assign(draw(4, *shape, scale=0.2))
    image = draw(5, 1, 4, WIDTH, 3)
    expected = model(image)
    with tf_deform.implementation("portable"):
        model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert 1e-4 < error(loaded.serve(image), expected) < 0.02


def as_on_a_gpu(function):
    """Returns a graph as TensorFlow rewrites it to float16 for a GPU."""
    graph = function.get_concrete_function(tf.TensorSpec(IMAGE.shape)).graph
    inputs, outputs = graph.inputs, graph.outputs
    # Constants replace captured tensors.
    definition = graph.as_graph_def()
    place = "/job:localhost/replica:0/task:0/device:GPU:0"
    for node in definition.node:
        node.device = place
    with tf.Graph().as_default() as copy:
        tf.import_graph_def(definition, name="")
        model = meta_graph.create_meta_graph_def(graph=copy)
    fetches = model.collection_def["train_op"].node_list.value
    fetches.append(outputs[0].op.name)
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.auto_mixed_precision = rewriter_config_pb2.RewriterConfig.ON
    options.min_graph_nodes = -1
    options.optimizers.append("auto_mixed_precision")
    properties = device_properties_pb2.DeviceProperties(
        type="GPU",
        environment={"architecture": "9.0", "cuda": "12050", "cudnn": "9000"},
    )
    device = device_properties_pb2.NamedDevice(
        name=place, properties=properties
    )
    definition = tf_optimizer.OptimizeGraph(
        config, model, cluster=cluster.Cluster(devices=[device])
    )
    halves = sum(
        node.attr["T"].type == tf.float16.as_datatype_enum
        for node in definition.node
    )
    for node in definition.node:
        node.device = ""
    with tf.Graph().as_default() as copy:
        tf.import_graph_def(definition, name="")
        with tf.compat.v1.Session() as session:
            return halves, session.run(
                outputs[0].name, {inputs[0].name: IMAGE.numpy()}
            )


@pytest.mark.parametrize("name", CALLS)
def test_float16_on_a_gpu(name):
    """Tests the rewritten graph on the CPU, which runs float16, too."""

    def run(image):
        # Numbers that become constants of the graph.
        weights = [tf.constant(weight.numpy()) for weight in WEIGHTS]
        return CALLS[name](image, weights, "portable")

    halves, received = as_on_a_gpu(tf.function(run))
    assert halves > 5
    assert error(received, run(IMAGE)) < 0.005


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_of_what_keeps_positions(name):
    """Tests derivatives of any order and mode, vectorized and compiled."""

    def run(image):
        return CALLS[name](image, WEIGHTS, "portable")

    def slope(function, image):
        with tf.GradientTape() as tape:
            tape.watch(image)
            value = function(image)
        return tape.gradient(value, image)

    def gradient(image):
        return slope(lambda x: tf.reduce_sum(run(x) ** 2), image)

    def second(image):
        return slope(lambda x: tf.reduce_sum(gradient(x) * x), image)

    def forward(function):
        with tf.autodiff.ForwardAccumulator(image, image) as accumulator:
            output = function(image)
        return accumulator.jvp(output)

    image = IMAGE if "oi" in name else IMAGE[:, :, :40]
    assert_close(tf.function(second)(image), second(image), 1e-4)
    assert_close(forward(tf.function(run)), forward(run), 1e-4)
    # XLA compiles this pooling only for ROIs that are given.
    if name in ("convolve", "clamped", "fields"):
        compiled = tf.function(gradient, jit_compile=True)
        assert_close(compiled(image), gradient(image), 1e-4)


def test_vectorized():
    """Tests that TensorFlow itself vectorizes, without a loop."""
    images = draw(6, 3, 1, 4, 9, 8)

    def run(image):
        return convolve(image, WEIGHTS, "portable")

    received = tf.vectorized_map(run, images, fallback_to_while_loop=False)
    expected = tf.stack([run(image) for image in tf.unstack(images)])
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)
