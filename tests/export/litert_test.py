# SPDX-License-Identifier: Apache-2.0
"""Tests LiteRT files: portable SavedModels as a source, other types, sizes."""

import os

import keras
import pytest
import tensorflow as tf
from exported import (
    POOLING,
    assert_close,
    make_rois,
    pooling_model,
    randomise,
    run,
    small_model,
    write,
)
from operands import random
from tensorflow.core.protobuf import saved_model_pb2

import tf_deform
from tf_deform.layers import DeformableConv2D

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
    # Searches all endpoints, Keras' own and ours. The function that restores
    # variables has no such operations.
    return sum(node.op in CONTROL for node in nodes)


@pytest.mark.parametrize("by", ["tf_deform", "keras"])
@pytest.mark.parametrize(
    "kind", ["clamp", "psroi", "roi", "align", "modulated"]
)
def test_portable_saved_models_have_no_branches(by, kind, tmp_path):
    if kind in POOLING:
        model = pooling_model(kind)
        sample = [random(2, 20, 24, 18), make_rois(2, 5)]
    else:
        model = small_model((16, 18), boundary="clamp", padding=1)
        sample = None
    if by == "tf_deform":
        write("portable", model, tmp_path / "model", sample=sample)
    else:
        with tf_deform.implementation("portable"):
            model.export(tmp_path / "model", verbose=False)
    assert count_control(tmp_path / "model") == 0


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
    before = [id(layer.dtype_policy) for layer in model._flatten_layers()]
    report = write(kind, model, tmp_path / "model")
    assert report.differences["output_0"] < 1e-5
    after = [id(layer.dtype_policy) for layer in model._flatten_layers()]
    assert after == before
    given = random(2, 10, 12, 3)
    received = run(kind, tmp_path / "model", {"image": given})["output_0"]
    expected = model(given)
    assert expected.dtype == dtype
    # Errors are roundings of the model in its own type.
    expected = tf.cast(expected, "float32")
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


# Layers that need known sizes.
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
            lambda image: enlarge()(image),
            [tf.TensorSpec((None, None, None, 3))],
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
    """Tests UpSampling2D, which computes a shape in the graph."""
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
