# SPDX-License-Identifier: Apache-2.0
"""Tests that OpenVINO reads our exports, with the results of the model.

OpenVINO reads ONNX files, from a path, with the extension of the examples, and
portable SavedModels without the extension. Most tests compute in float32. The
rounding of OpenVINO's default precision is tested too, and so are later
conversions of ONNX files (`benchmarks/conversions.py`). Loops are tested in
onnx_control_flow_test.py.
"""

import conversions
import keras
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import tensorflow as tf
from exported import assert_close, compare_outputs, compile_openvino, write
from operands import random

import tf_deform

# Convolutions that pad the results of slices, whose sizes are unknown.
PADDINGS = [
    {"padding": ((4, 3), (5, 2))},
    {"padding": ((0, 0), (7, 0))},
    {"padding": ((9, 9), (9, 9)), "strides": 2},
    {"padding": ((6, 6), (6, 6)), "dilation_rate": 3},
    {"padding": "same", "strides": (2, 3)},
    {"padding": ((3, 3), (3, 3)), "kernel_size": 1},
]


def test_wide_padding_of_unknown_sizes(tmp_path):
    image = keras.Input((None, None, 3), name="x")
    outputs = {}
    # Without the operator each tap becomes many operators.
    for boundary, size in (("zeros", 3), ("clamp", 2)):
        for number, arguments in enumerate(PADDINGS):
            arguments = {"kernel_size": size, "boundary": boundary, **arguments}
            layer = tf_deform.layers.DeformableConv2D(2, **arguments)
            outputs[f"{boundary}_{number}"] = layer(image)
    model = keras.Model(image, outputs)
    for variable in model.trainable_variables:
        variable.assign(tf.random.stateless_normal(variable.shape, (1, 2)) / 5)
    path = tmp_path / "model.onnx"
    write("onnx", model, path)
    samples = [{"x": random(2, 12, 17, 3)}, {"x": random(1, 40, 31, 3)}]
    compare_outputs(compile_openvino(path), model, samples)


CUTS = {
    "rows": lambda x: x[:, 1:],
    "strides": lambda x: x[:, :, ::2],
    "last": lambda x: x[:, -5:, 1:],
    "inside": lambda x: x[:, 1:-1, 2:-2],
    "channels": lambda x: x[..., :3],
    "turned": lambda x: tf.reverse(x, (1,)),
}


def test_slices_without_an_end(tmp_path):
    """Tests sizes, which stay int32 if a convolution pads a slice's result."""
    kernel = tf.constant(random(3, 3, 3, 2))

    def pad(x):
        y = tf.nn.conv2d(x, kernel, 1, ((0, 0), (9, 9), (9, 9), (0, 0)))
        _, height, width, _ = tf.unstack(tf.shape(y))
        lines = tf.reshape(tf.range(height), (1, height, 1, 1))
        columns = tf.reshape(tf.range(width), (1, 1, width, 1))
        return y + tf.cast(lines - columns, "float32")

    function = tf.function(
        lambda x: {name: pad(cut(x)) for name, cut in CUTS.items()},
        [tf.TensorSpec((None, None, None, 3), name="x")],
    )
    path = tmp_path / "model.onnx"
    write("onnx", function, path)
    sample = {"x": random(2, 12, 17, 3)}
    compare_outputs(compile_openvino(path), function, [sample])


def test_openvino_reads_onnx_of_others(tmp_path):
    """Tests files of other writers: with a bias, with attributes left out."""
    x, w, b = random(1, 4, 6, 7), random(5, 4, 3, 3, seed=1), random(5, seed=2)
    offset = random(1, 18, 4, 5, seed=3)
    float_ = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DeformConv", ["x", "w", "o", "b"], ["y"])],
        "graph",
        [
            onnx.helper.make_tensor_value_info("x", float_, x.shape),
            onnx.helper.make_tensor_value_info("o", float_, offset.shape),
        ],
        [onnx.helper.make_tensor_value_info("y", float_, (1, 5, 4, 5))],
        [onnx.numpy_helper.from_array(w, "w")]
        + [onnx.numpy_helper.from_array(b, "b")],
    )
    opsets = [onnx.helper.make_opsetid("", 19)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(proto, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (expected,) = session.run(None, {"x": x, "o": offset})
    compiled = compile_openvino(tmp_path / "model.onnx")
    (received,) = compiled([x, offset]).values()
    assert_close(received, expected)


def test_default_precision_moves_samples(tmp_path):
    """Tests bfloat16, OpenVINO's default where the processor has it."""
    capabilities = openvino.Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )
    if "BF16" not in capabilities:
        pytest.skip("the processor has no bfloat16")
    model = conversions.make_model("zeros")
    inputs = conversions.make_inputs("zeros", 256)
    expected = model(inputs).numpy()
    errors = {}
    for kind in ("onnx", "portable"):
        path = tmp_path / f"{kind}.onnx"
        write(kind, model, path)
        for precision in ("f32", "bf16"):
            compiled = compile_openvino(path, precision)
            (received,) = compiled(inputs).values()
            error = np.abs(received - expected).max()
            errors[kind, precision] = error / np.abs(expected).max()
    assert max(errors["onnx", "f32"], errors["portable", "f32"]) < 1e-5
    # The operator rounds values; gathers round places as well.
    assert errors["portable", "bf16"] > 3 * errors["onnx", "bf16"]


# Root mean square differences given in the documentation, in percent of the
# largest number, for safe and for unsafe conversions.
WEIGHTS = {"openvino.save_model (weights in float16), f32": 0.05}
EIGHT_BITS = {
    "quantize_dynamic": 1,
    "quantize_static(nodes_to_exclude=nodes)": 1,
}
SAFE = {
    "zeros": WEIGHTS
    | EIGHT_BITS
    | {"quantize_static": 1, "convert_float_to_float16": 0.05},
    "clamp": WEIGHTS | EIGHT_BITS,
    "roi": WEIGHTS | EIGHT_BITS,
}
UNSAFE = {
    "zeros": {},
    "clamp": {"quantize_static": 1},
    "roi": {"quantize_static": 10},
}


@pytest.mark.parametrize("kind", SAFE)
def test_later_conversions(kind, tmp_path):
    inputs = conversions.make_inputs(kind, 64)
    expected = conversions.make_model(kind)(inputs).numpy()
    found = dict(conversions.convert(kind, 64, tmp_path))
    for names, good in ((SAFE[kind], True), (UNSAFE[kind], False)):
        for name, limit in names.items():
            _, mean = conversions.measure(found[name]()(inputs), expected)
            assert (mean < limit) == good, name
