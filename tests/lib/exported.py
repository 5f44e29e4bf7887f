# SPDX-License-Identifier: Apache-2.0
"""Writes models for other programs, and runs them as those do."""

import numpy as np
import onnxruntime
import openvino
import openvino_extension
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from tf_deform import export

# Float32 in another order, relative to the largest number.
CLOSE = 1e-5
FORMATS = ("native", "portable", "onnx", "litert")


def write(kind, model, path, **arguments):
    """Exports, without a word."""
    arguments = {"verbose": False, **arguments}
    if kind in ("native", "portable"):
        return export.saved_model(model, path, kind, **arguments)
    return getattr(export, kind)(model, path, **arguments)


def run(kind, path, inputs):
    """Runs what was exported; inputs and outputs by name."""
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))
    if kind == "openvino":
        return compile_openvino(path)(inputs)
    if kind == "litert":
        interpreter = Interpreter(str(path))
        return interpreter.get_signature_runner("serving_default")(**inputs)
    loaded = tf.saved_model.load(path)
    outputs = loaded.signatures["serving_default"](
        **{name: tf.constant(value) for name, value in inputs.items()}
    )
    return {name: value.numpy() for name, value in outputs.items()}


def compile_openvino(path, precision="f32"):
    """What runs an ONNX file or a portable SavedModel in OpenVINO."""
    core = openvino.Core()
    core.add_extension(openvino_extension.deform_conv())
    options = {"INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(path, "CPU", options)
    # The outputs of a SavedModel without a name have their tensors' names.
    return lambda inputs: {
        output.any_name: value for output, value in compiled(inputs).items()
    }


def assert_close(received, expected, tolerance=CLOSE):
    expected = np.asarray(expected)
    assert received.shape == expected.shape
    assert received.dtype == expected.dtype
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(received, expected, 0, tolerance * largest)


def random(*shape, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, shape, dtype)
    return rng.normal(size=shape).astype(dtype)
