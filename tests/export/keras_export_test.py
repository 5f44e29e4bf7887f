# SPDX-License-Identifier: Apache-2.0
"""Tests Keras' own `Model.export` in every format that Keras knows."""

import contextlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf2onnx
from exported import assert_close, call, compile_openvino, load, randomise
from operands import random

import tf_deform
from tf_deform import layers

# The end that Keras requires of a path, by format.
FORMATS = {
    "tf_saved_model": "model",
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "litert": "model.tflite",
}
OTHERS = [name for name in FORMATS if name != "tf_saved_model"]


def read(kind, path):
    """Returns a function that runs a file as others do, who know no ops."""
    if kind == "openvino":
        return compile_openvino(path, has_extension=False)
    return load(kind, path)


def check(kind, model, folder, *samples):
    """Compares Keras' export of a model with the model; returns the path."""
    __tracebackhide__ = True
    call(model, samples[0])  # Keras exports only models that were called.
    path = folder / FORMATS[kind]
    model.export(str(path), format=kind, verbose=False)
    run = read(kind, str(path))
    for sample in samples:
        received, expected = run(sample), call(model, sample)
        if len(expected) == 1:  # Its name depends on the format.
            received = {"output_0": next(iter(received.values()))}
        for name, value in expected.items():
            assert_close(received[name], value, name=name)
    return path


def convolution(**arguments):
    """Has a small kernel: without the op each tap becomes many operators."""
    image = keras.Input((7, 9, 4), name="image")
    arguments = {"padding": "same", "modulation": "2sigmoid", **arguments}
    layer = layers.DeformableConv2D(6, 2, **arguments)
    return randomise(keras.Model(image, layer(image)))


IMAGE = {"image": random(2, 7, 9, 4)}


@contextlib.contextmanager
def without_copies():
    """Lets errors of tf2onnx' optimizers through; tf2onnx then copies nothing.

    It would copy a large graph for each of them, to leave out those that fail.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF2ONNX_CATCH_ERRORS", "FALSE")
        yield


def has_native_ops(path):
    return b"TfDeform>Deformable" in (path / "saved_model.pb").read_bytes()


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory):
    """Returns the outputs of a file of all layers, and of the model."""
    image = keras.Input((7, 9, 4), name="image")
    maps = keras.Input((7, 9, 8), name="maps")
    rois = keras.Input((5,), name="rois")
    psroi = layers.DeformablePSROIPooling(2, 2, 0.25, sample_per_part=2)
    outputs = {
        "zeros": convolution(strides=2)(image),
        "clamp": convolution(boundary="clamp", modulation=None)(image),
        "psroi": psroi(maps, rois, trans_inputs=maps),
        "align": layers.DeformableROIAlign(3, 0.25, 1)(maps, rois),
    }
    model = randomise(keras.Model([image, maps, rois], outputs))
    boxes = [[0, 2, 1, 20, 25], [1, 0, 3, 35, 17], [-1, 0, 0, 0, 0]]
    sample = {"maps": random(3, 7, 9, 8), "rois": np.float32(boxes)}
    sample = {**IMAGE, **sample}
    expected = call(model, sample)
    path = tmp_path_factory.mktemp("exported") / FORMATS[request.param]
    with without_copies():
        model.export(str(path), format=request.param, verbose=False)
    if request.param == "tf_saved_model":
        assert has_native_ops(path)
    return read(request.param, str(path))(sample), expected


@pytest.mark.parametrize("name", ["zeros", "clamp", "psroi", "align"])
def test_every_format_runs_elsewhere(name, exported):
    """Tests that only SavedModels contain native ops."""
    received, expected = exported
    assert_close(received[name], expected[name])


SAME = [
    {"dilation_rate": 2},
    {"dilation_rate": (3, 1), "boundary": "clamp"},
    {"dilation_rate": (1, 2), "kernel_size": (2, 4), "groups": 2},
    {"dilation_rate": 2, "strides": 2},
    {"dilation_rate": (1, 3), "kernel_size": 2, "strides": (3, 1)},
    {"kernel_size": (1, 3), "strides": 3},
]


@pytest.mark.parametrize("kind", OTHERS)
def test_same_padding_of_unknown_sizes(kind, tmp_path):
    """Tests "same" padding with dilations, which ONNX Runtime does not know."""
    image = keras.Input((None, None, 4), name="image")
    outputs = {}
    for number, arguments in enumerate(SAME):
        arguments = {"kernel_size": 3, "modulation": "sigmoid", **arguments}
        layer = layers.DeformableConv2D(4, padding="same", **arguments)
        outputs[f"case_{number}"] = layer(image)
    model = randomise(keras.Model(image, outputs))
    shapes = (2, 7, 9, 4), (1, 10, 6, 4)
    with without_copies():
        check(kind, model, tmp_path, *({"image": random(*x)} for x in shapes))


@pytest.mark.parametrize("implementation", ["native", "portable"])
def test_saved_models_inside_implementation(implementation, tmp_path):
    with tf_deform.implementation(implementation):
        path = check("tf_saved_model", convolution(), tmp_path, IMAGE)
    assert has_native_ops(path) == (implementation == "native")


def test_only_what_is_exported_is_portable(tmp_path):
    model = convolution()
    call(model, IMAGE)
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    graph = tf.function(model).get_concrete_function(IMAGE["image"]).graph
    assert "TfDeform>DeformableConv2D" in {
        op.type for op in graph.get_operations()
    }


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("sort", ["subclass", "loop"])
def test_kinds_of_models(kind, sort, tmp_path):
    """Tests that an export overrides a file and the implementation around it.

    A model that is no functional one is inside one implementation, a loop
    inside the other.
    """
    layer = layers.DeformableConv2D(3, 2, modulation="sigmoid")
    name = "input" if kind == "openvino" else "args_0"
    sample, around = {name: random(2, 7, 9, 4)}, "portable"
    if sort == "subclass":

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def call(self, inputs):
                return self.layer(inputs)

        model = Model()
    else:
        sample, around = {"image": random(2, 3, 7, 9, 4)}, "native"
        inputs = keras.Input((3, 7, 9, 4), name="image")
        outputs = keras.layers.TimeDistributed(layer)(inputs)
        model = keras.Model(inputs, outputs)
    call(model, sample)
    randomise(model)
    (tmp_path / FORMATS[kind]).write_bytes(b"what was there")
    with tf_deform.implementation(around):
        check(kind, model, tmp_path, sample)


def traced_before():
    """Returns a model whose function was traced earlier, with native ops."""
    layer = layers.DeformableConv2D(3, 2)
    function = tf.function(layer, [tf.TensorSpec((None, 7, 9, 4))])
    function.get_concrete_function()

    class Holder(keras.layers.Layer):
        def call(self, inputs):
            return function(inputs)

    image = keras.Input((7, 9, 4), name="image")
    model = keras.Model(image, Holder()(image))
    call(model, IMAGE)
    return model


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_cannot_be_exported_raises(kind, tmp_path):
    """Tests that an error leaves the previous file, or no file."""
    model = traced_before()
    for before in (None, b"what was there"):
        path = tmp_path / FORMATS[kind]
        if before:
            path.write_bytes(before)
        with pytest.raises(Exception, match="TfDeform>DeformableConv2D"):
            model.export(str(path), format=kind, verbose=False)
        files = [path] if before else []
        assert list(tmp_path.iterdir()) == files
        assert not before or path.read_bytes() == before


@pytest.mark.parametrize("kind", OTHERS)
def test_conditions(kind, tmp_path):
    """Tests convolutions inside of conditions.

    There tf2onnx writes convolutions that no runtime loads, Keras' too.
    """
    layer = layers.DeformableConv2D(3, 2)

    class Choice(keras.layers.Layer):
        def build(self, shape):
            self.layer = layer
            self.layer.build(shape)

        def compute_output_shape(self, shape):
            return self.layer.compute_output_shape(shape)

        def call(self, inputs):
            return keras.ops.cond(
                keras.ops.sum(inputs) > 0,
                lambda: self.layer(inputs),
                lambda: -self.layer(inputs),
            )

    inputs = keras.Input((7, 9, 4), name="image")
    model = randomise(keras.Model(inputs, Choice()(inputs)))
    path = tmp_path / FORMATS[kind]
    if kind == "onnx":
        call(model, IMAGE)
        path.write_bytes(b"what was there")
        with pytest.raises(ValueError, match="Use tf_deform.export.onnx"):
            model.export(str(path), format=kind, verbose=False)
        assert path.read_bytes() == b"what was there"
    else:
        check(kind, model, tmp_path, IMAGE, {"image": -IMAGE["image"]})


def test_litert_traces_anew(tmp_path):
    """Tests exports by way of a SavedModel.

    TensorFlow traces its functions again.
    """
    check("litert", traced_before(), tmp_path, IMAGE)


def test_a_loaded_saved_model_to_onnx(tmp_path):
    path = check("tf_saved_model", convolution(), tmp_path, IMAGE)
    loaded = keras.layers.TFSMLayer(str(path), "serve")
    image = keras.Input((7, 9, 4), name="image")
    outer = keras.Model(image, loaded(image))
    call(outer, IMAGE)
    with pytest.raises(ValueError, match="TfDeform>DeformableConv2D"):
        outer.export(str(tmp_path / "x.onnx"), format="onnx", verbose=False)
    assert not (tmp_path / "x.onnx").exists()


def test_pytorchs_format_needs_its_backend(tmp_path):
    with pytest.raises(ValueError, match="requires PyTorch backend"):
        convolution().export(str(tmp_path / "model.pt2"), format="torch")
    assert not list(tmp_path.iterdir())


def test_tf2onnx_called_by_others():
    """Tests that tf2onnx refuses native ops, also if Keras does not call it."""
    layer = layers.DeformableConv2D(3, 2)
    function = tf.function(layer, [tf.TensorSpec((1, 7, 9, 4))])
    with pytest.raises(ValueError, match="TfDeform>DeformableConv2D"):
        tf2onnx.convert.from_function(function, function.input_signature)


def test_tf2onnx_that_is_there_already(monkeypatch):
    from tf_deform import _tf2onnx

    monkeypatch.setattr(tf2onnx.handler.tf_op, "_OPSETS", {"": []})
    before = list(sys.meta_path)
    _tf2onnx.watch()
    versions = tf2onnx.handler.tf_op.get_opsets()[""]
    assert any("TfDeform>DeformableConv2D" in found for found in versions)
    assert sys.meta_path == before


def test_tf2onnx_is_imported_by_those_who_want_it(run_python):
    """Tests also that the list of ops is what the library registers."""
    run_python("""
import sys, tf_deform
from tensorflow.python.framework import kernels
from tf_deform import _tf2onnx

found = {kernel.op for kernel in kernels.get_all_registered_kernels().kernel}
found = {name for name in found if name.startswith("TfDeform>")}
marker = "TfDeform>ImportTfDeformOrLoadItsOpLibrary"
assert found == {*_tf2onnx.OPS, marker}, found
assert "tf2onnx" not in sys.modules
ours = [x for x in sys.meta_path if type(x).__module__ == "tf_deform._tf2onnx"]
assert len(ours) == 1
import tf2onnx.handler
versions = tf2onnx.handler.tf_op.get_opsets()[""]
for op in _tf2onnx.OPS:
    assert any(op in found for found in versions), op
assert ours[0] not in sys.meta_path
""")
