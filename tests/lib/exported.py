# SPDX-License-Identifier: Apache-2.0
"""Writes models for other programs, and runs them as these programs do."""

import compare
import keras
import numpy as np
import onnx
import onnxruntime
import openvino
import openvino_extension
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tolerances import ANOTHER_ORDER

from tf_deform import export
from tf_deform.export import _onnx_graph
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

CLOSE = ANOTHER_ORDER.of_largest
# Maps each format to its file or folder.
FILES = {
    "native": "saved_model",
    "portable": "saved_model_portable",
    "onnx": "model.onnx",
    "litert": "model.tflite",
}
FORMATS = tuple(FILES)


def write(kind, model, path, **arguments):
    """Exports without printing.

    Portable SavedModels take no files of images unless a test asks for it,
    because stock ops take long to trace, once for each endpoint.
    """
    arguments = {"verbose": False, **arguments}
    if kind == "portable":
        arguments.setdefault("image_bytes", False)
    if kind in ("native", "portable"):
        return export.saved_model(model, path, kind, **arguments)
    return getattr(export, kind)(model, path, **arguments)


def load(kind, path):
    """Returns a function that runs a file: inputs and outputs by name."""
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(
            zip(names, session.run(names, inputs), strict=True)
        )
    if kind == "openvino":
        return compile_openvino(path)
    if kind == "litert":
        interpreter = Interpreter(str(path))
        runner = interpreter.get_signature_runner("serving_default")
        return lambda inputs: runner(**inputs)
    loaded = tf.saved_model.load(path)

    def serve(inputs):
        outputs = loaded.signatures["serving_default"](
            **{name: tf.constant(value) for name, value in inputs.items()}
        )
        return {name: value.numpy() for name, value in outputs.items()}

    return serve


def run(kind, path, inputs):
    """Runs an exported file once."""
    return load(kind, path)(inputs)


def call(model, inputs):
    """Returns the outputs of a model or a function by the names in a file."""
    values = list(inputs.values())
    if isinstance(model, keras.Model):
        values = values if len(values) > 1 else values[0]
        outputs = model(values, training=False)
    else:
        outputs = model(*map(tf.constant, values))
    if isinstance(outputs, dict):
        return outputs
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return {f"output_{index}": value for index, value in enumerate(outputs)}


def check(kind, model, path, *samples, tolerance=CLOSE, **arguments):
    """Exports a model, and compares it with its file for all samples.

    A sample holds the inputs by name, in the model's order. Returns the report.
    """
    __tracebackhide__ = True
    report = write(kind, model, path, **arguments)
    compare_outputs(load(kind, path), model, samples, tolerance)
    return report


def compare_outputs(read, model, samples, tolerance=CLOSE):
    """Compares the outputs of a file that was read with those of its model."""
    __tracebackhide__ = True
    for number, sample in enumerate(samples):
        received = read(sample)
        for name, value in call(model, sample).items():
            where = f"{name} of sample {number}"
            assert_close(received[name], value, tolerance, where)


def compile_openvino(path, precision="f32", has_extension=True):
    """Returns a function that runs a file or SavedModel in OpenVINO."""
    core = openvino.Core()
    if has_extension:
        core.add_extension(openvino_extension.deform_conv())
    options = {"INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(path, "CPU", options)
    # A SavedModel's outputs without a name get their tensors' names.
    return lambda inputs: {
        output.any_name: value for output, value in compiled(inputs).items()
    }


def assert_close(received, expected, tolerance=CLOSE, name="result"):
    """Compares a file's results with its model's results, types included."""
    __tracebackhide__ = True
    dtype = np.asarray(expected).dtype
    compare.assert_close(received, expected, tolerance, dtype=dtype, name=name)


def randomise(model, scale=0.3):
    """Sets weights that leave nothing at zero. New branches are zero."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        values = rng.normal(size=weight.shape) * scale
        if "variance" in weight.path:
            values = 1 + np.abs(values)
        weight.assign(values)
    return model


def small_model(size=(None, None), channels=3, dtype="float32", **arguments):
    """Returns a plain convolution, a deformable one, and a score.

    The kernel is small, as formats without the op have many for each tap.
    """
    image = keras.Input((*size, channels), dtype=dtype, name="image")
    x = image
    if dtype == "uint8":
        x = keras.layers.Rescaling(1 / 127, offset=-1)(image)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same")(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    arguments = {
        "kernel_size": 2,
        "padding": "same",
        "modulation": "2sigmoid",
        **arguments,
    }
    x = DeformableConv2D(6, name="deformable", **arguments)(x)
    x = keras.layers.Conv2D(5, 1, activation="softmax")(x)
    return randomise(keras.Model(image, x))


def make_rois(batch, count, seed=0):
    """Returns regions inside and across edges, and padding; scale 1/4."""
    rng = np.random.default_rng(seed)
    image = np.arange(count)[:, None] % (batch + 1) - 1
    corner = rng.uniform(-20, 60, (count, 2))
    other = corner + rng.uniform(1, 70, (count, 2))
    return np.concatenate([image, corner, other], 1).astype("float32")


POOLING = {
    "psroi": lambda: DeformablePSROIPooling(
        2, 3, 0.25, sample_per_part=2, trans_std=0.3
    ),
    "roi": lambda: DeformableROIPooling(3, 0.25, 3, trans_std=0.3, units=(7,)),
    "align": lambda: DeformableROIAlign((3, 2), 0.25, gamma=0.3, units=(7,)),
    "samples": lambda: DeformableROIAlign(2, 0.25, sampling_ratio=3),
    "modulated": lambda: DeformableROIAlign(
        (2, 3), 0.25, gamma=0.3, units=(7, 5), modulation="sigmoid"
    ),
}


def pooling_model(kind):
    """Returns a pooling layer over maps of 18 channels, with its own branch."""
    features = keras.Input((None, None, 18), name="features")
    rois = keras.Input((5,), name="rois")
    branch = {"trans_inputs": features} if kind == "psroi" else {}
    outputs = POOLING[kind]()(features, rois, **branch)
    return randomise(keras.Model([features, rois], outputs))


def check_onnx(function, path, samples, opset=19, tolerance=CLOSE):
    """Checks the ONNX file of a function; returns the types of its nodes."""
    __tracebackhide__ = True
    names = [spec.name for spec in function.input_signature]
    samples = [dict(zip(names, sample, strict=True)) for sample in samples]
    arguments = {"opset": opset, "sample": samples[0], "tolerance": tolerance}
    check("onnx", function, path, *samples, **arguments)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(x.domain, x.version) for x in proto.opset_import] == [("", opset)]
    return [node.op_type for node in _onnx_graph.walk(proto.graph)]
