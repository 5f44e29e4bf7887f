# SPDX-License-Identifier: Apache-2.0
"""Keras' own `Model.export`, in every format that Keras knows."""

import itertools
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import tensorflow as tf
import tf2onnx
from ai_edge_litert.interpreter import Interpreter
from exported import assert_close
from operands import random

import tf_deform
from tf_deform import layers

# What Keras wants a path to end with.
FORMATS = {
    "tf_saved_model": "model",
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "litert": "model.tflite",
}
OTHERS = [name for name in FORMATS if name != "tf_saved_model"]


def displace(model):
    """Weights that leave nothing at zero: branches start there."""
    rng = np.random.default_rng(3)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) * 0.3)
    return model


def convolution(**arguments):
    image = keras.Input((7, 9, 4), name="image")
    layer = layers.DeformableConv2D(
        6, 3, **{"padding": "same", "modulation": "2sigmoid", **arguments}
    )
    model = displace(keras.Model(image, layer(image)))
    return model, [random(2, 7, 9, 4)]


def pooling(kind):
    maps = keras.Input((7, 9, 8), name="maps")
    rois = keras.Input((5,), name="rois")
    if kind == "psroi":
        layer = layers.DeformablePSROIPooling(2, 2, 0.25)
        pooled = layer(maps, rois, trans_inputs=maps)
    else:
        pooled = layers.DeformableROIAlign(3, 0.25, 2)(maps, rois)
    model = displace(keras.Model([maps, rois], pooled))
    boxes = [[0, 2, 1, 20, 25], [1, 0, 3, 35, 17], [-1, 0, 0, 0, 0]]
    return model, [random(3, 7, 9, 8), np.float32(boxes)]


MODELS = {
    "zeros": lambda: convolution(strides=2),
    "clamp": lambda: convolution(boundary="clamp", modulation=None),
    "psroi": lambda: pooling("psroi"),
    "align": lambda: pooling("align"),
}


def run(kind, path, inputs):
    """The first output, as the format's own runtime computes it."""
    if kind == "tf_saved_model":
        loaded = tf.saved_model.load(path)
        return loaded.serve(inputs if len(inputs) > 1 else inputs[0])
    if kind == "onnx":
        onnx.checker.check_model(path)
        session = onnxruntime.InferenceSession(path)
        names = [value.name for value in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True)))[0]
    if kind == "openvino":
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", options)
        return compiled(inputs)[0]
    interpreter = Interpreter(path)
    details = interpreter.get_input_details()
    # In the order of names: "maps", "rois".
    details.sort(key=lambda detail: detail["name"])
    for detail, value in zip(details, inputs, strict=True):
        interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def has_native_ops(path):
    return b"TfDeform>Deformable" in (path / "saved_model.pb").read_bytes()


@pytest.mark.parametrize(
    "name,kind",
    [
        *itertools.product(["zeros", "clamp", "psroi"], FORMATS),
        *(("align", kind) for kind in ("onnx", "litert")),
    ],
)
def test_every_format_runs_elsewhere(name, kind, tmp_path):
    """Native ops stay in SavedModels alone."""
    model, inputs = MODELS[name]()
    expected = model(inputs if len(inputs) > 1 else inputs[0])
    path = tmp_path / FORMATS[kind]
    model.export(str(path), format=kind, verbose=False)
    assert_close(np.asarray(run(kind, str(path), inputs)), expected)
    if kind == "tf_saved_model":
        assert has_native_ops(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dilation_rate": 2},
        {"dilation_rate": (3, 1), "boundary": "clamp"},
        {"dilation_rate": (1, 2), "kernel_size": (2, 4), "groups": 2},
        {"dilation_rate": 2, "strides": 2},
        {"dilation_rate": (1, 3), "kernel_size": 2, "strides": (3, 1)},
        {"kernel_size": (1, 3), "strides": 3},
    ],
)
@pytest.mark.parametrize("kind", OTHERS)
def test_same_padding_of_unknown_sizes(kind, arguments, tmp_path):
    """ONNX Runtime knows no "same" with dilations."""
    image = keras.Input((None, None, 4))
    arguments = {"kernel_size": 3, "modulation": "sigmoid", **arguments}
    layer = layers.DeformableConv2D(4, padding="same", **arguments)
    model = displace(keras.Model(image, layer(image)))
    path = tmp_path / FORMATS[kind]
    model(random(1, 5, 5, 4))
    model.export(str(path), format=kind, verbose=False)
    for shape in ((2, 7, 9, 4), (1, 10, 6, 4)):
        x = random(*shape)
        assert_close(np.asarray(run(kind, str(path), [x])), model(x))


@pytest.mark.parametrize("implementation", ["native", "portable"])
@pytest.mark.parametrize("kind", FORMATS)
def test_inside_implementation(kind, implementation, tmp_path):
    """An export replaces what is there, whatever was asked for around it."""
    model, inputs = convolution()
    expected = model(inputs[0])
    path = tmp_path / FORMATS[kind]
    if kind != "tf_saved_model":
        path.write_bytes(b"what was there")
    with tf_deform.implementation(implementation):
        model.export(str(path), format=kind, verbose=False)
    assert_close(np.asarray(run(kind, str(path), inputs)), expected)
    if kind == "tf_saved_model":
        assert has_native_ops(path) == (implementation == "native")


def test_only_what_is_exported_is_portable(tmp_path):
    model, inputs = convolution()
    model(inputs[0])
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    graph = tf.function(model).get_concrete_function(inputs[0]).graph
    assert "TfDeform>DeformableConv2D" in {
        op.type for op in graph.get_operations()
    }


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("sort", ["subclass", "loop"])
def test_kinds_of_models(kind, sort, tmp_path):
    layer = layers.DeformableConv2D(3, 3, modulation="sigmoid")
    image = random(2, 7, 9, 4)
    if sort == "subclass":

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def call(self, inputs):
                return self.layer(inputs)

        model = Model()
    else:
        image = random(2, 3, 7, 9, 4)
        inputs = keras.Input(image.shape[1:])
        outputs = keras.layers.TimeDistributed(layer)(inputs)
        model = keras.Model(inputs, outputs)
    model(image)
    displace(model)
    path = tmp_path / FORMATS[kind]
    model.export(str(path), format=kind, verbose=False)
    received = run(kind, str(path), [image])
    assert_close(np.asarray(received), model(image))


def traced_before():
    """A model that holds native ops in a function of an earlier time."""
    layer = layers.DeformableConv2D(3, 3)
    function = tf.function(layer, [tf.TensorSpec((None, 7, 9, 4))])
    function.get_concrete_function()

    class Holder(keras.layers.Layer):
        def call(self, inputs):
            return function(inputs)

    image = keras.Input((7, 9, 4))
    model = keras.Model(image, Holder()(image))
    model(random(1, 7, 9, 4))
    return model


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_cannot_be_exported_raises(kind, tmp_path):
    """And leaves what is there, or nothing."""
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
    """In them tf2onnx writes convolutions, Keras' too, that nothing loads."""
    layer = layers.DeformableConv2D(3, 3)
    image = random(2, 7, 9, 4)

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

    inputs = keras.Input((7, 9, 4))
    model = displace(keras.Model(inputs, Choice()(inputs)))
    path = tmp_path / FORMATS[kind]
    if kind == "onnx":
        model(image)
        path.write_bytes(b"what was there")
        with pytest.raises(ValueError, match="Use tf_deform.export.onnx"):
            model.export(str(path), format=kind, verbose=False)
        assert path.read_bytes() == b"what was there"
        return
    model.export(str(path), format=kind, verbose=False)
    for given in (image, -image):
        received = np.asarray(run(kind, str(path), [given]))
        assert_close(received, model(given))


def test_litert_traces_anew(tmp_path):
    """By way of a SavedModel, for which TensorFlow traces functions again."""
    model, image = traced_before(), random(1, 7, 9, 4)
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    assert_close(run("litert", path, [image]), model(image))


def test_a_loaded_saved_model_to_onnx(tmp_path):
    model, inputs = MODELS["psroi"]()
    model.export(str(tmp_path / "native"), verbose=False)
    loaded = keras.layers.TFSMLayer(str(tmp_path / "native"), "serve")
    given = [keras.Input(x.shape[1:]) for x in inputs]
    outer = keras.Model(given, loaded(given))
    outer(inputs)
    with pytest.raises(ValueError, match="TfDeform>DeformablePSROIPool"):
        outer.export(str(tmp_path / "x.onnx"), format="onnx", verbose=False)
    assert not (tmp_path / "x.onnx").exists()


def test_pytorchs_format_needs_its_backend(tmp_path):
    model, _ = convolution()
    with pytest.raises(ValueError, match="requires PyTorch backend"):
        model.export(str(tmp_path / "model.pt2"), format="torch")
    assert not list(tmp_path.iterdir())


def test_tf2onnx_called_by_others():
    """It refuses native ops, also where Keras does not call it."""
    layer = layers.DeformableConv2D(3, 3)
    function = tf.function(layer, [tf.TensorSpec((1, 7, 9, 4))])
    with pytest.raises(ValueError, match="TfDeform>DeformableConv2D"):
        tf2onnx.convert.from_function(function, function.input_signature)


def refuses():
    """Whether tf2onnx's registry has the handlers."""
    versions = tf2onnx.handler.tf_op.get_opsets()[""]
    return any("TfDeform>DeformableConv2D" in found for found in versions)


def test_tf2onnx_that_is_there_already(monkeypatch):
    from tf_deform import _tf2onnx

    monkeypatch.setattr(tf2onnx.handler.tf_op, "_OPSETS", {"": []})
    before = list(sys.meta_path)
    _tf2onnx.watch()
    assert refuses()
    assert sys.meta_path == before


def test_tf2onnx_is_imported_by_those_who_want_it(run_python):
    run_python("""
import sys, tf_deform
assert "tf2onnx" not in sys.modules
ours = [x for x in sys.meta_path if type(x).__module__ == "tf_deform._tf2onnx"]
assert len(ours) == 1
import tf2onnx.handler
versions = tf2onnx.handler.tf_op.get_opsets()[""]
assert any("TfDeform>DeformableROIAlign" in found for found in versions)
assert ours[0] not in sys.meta_path
""")


def test_every_native_op_is_refused(run_python):
    """Compares the list with what loading the library registers."""
    printed = run_python("""
import tf_deform
from tensorflow.python.framework import kernels
from tf_deform import _tf2onnx

found = {kernel.op for kernel in kernels.get_all_registered_kernels().kernel}
found = {name for name in found if name.startswith("TfDeform>")}
assert found == {*_tf2onnx.OPS, "TfDeform>ImportTfDeformOrLoadItsOpLibrary"}
print("equal")
""")
    assert printed == "equal\n"
