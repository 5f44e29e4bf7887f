# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU next to the same in float64 on the CPU.

The other tests run on a GPU too (`make gpu-check-tf`), with settings that make
results reproducible. Here are the settings that people have.
"""

import json
import os

import pytest

DEVICE = os.environ.get("TF_DEFORM_TEST_DEVICE")
pytestmark = pytest.mark.skipif(
    DEVICE is None, reason="needs a GPU: make gpu-check-tf"
)

OPS = ("conv", "psroi", "align")
# Largest error, as a part of the largest value expected.
TOLERANCE = {
    "float64": 1e-9,
    "float32": 1e-4,
    "float16": 4 * 2**-11,
    "bfloat16": 4 * 2**-8,
}
TF32_TOLERANCE = 4e-3

# Arguments: operator, device, whether tf32 is allowed, whether the same bits
# are required. Prints a line of JSON for every type, mode and result.
_COMPARE = """
import json
import sys

import numpy as np
import tensorflow as tf

from tf_deform import ops

op, device, tf32, deterministic = sys.argv[1:]
tf.config.experimental.enable_tensor_float_32_execution(tf32 == "1")
if deterministic == "1":
    tf.config.experimental.enable_op_determinism()
# What the device has no kernel for is an error, not moved to the CPU.
tf.config.set_soft_device_placement(False)

rng = np.random.default_rng(0)
if op == "conv":
    shapes = [(3, 19, 17, 40), (3, 3, 20, 72), (3, 19, 17, 72), (3, 19, 17, 36)]
    values = [rng.normal(size=shape) for shape in shapes]
    values[2] = (np.floor(8 * values[2]) + 0.5) / 8
    grad_output = rng.normal(size=(3, 19, 17, 72))

    def function(inputs, kernel, offset, mask):
        return ops.deformable_conv2d(
            inputs, kernel, offset, mask, padding="same", offset_groups=4
        )

else:
    corners = np.floor(rng.uniform(-20, 300, (90, 2, 2)))
    index = rng.integers(-1, 3, (90, 1))
    rois = np.concatenate([index, corners.min(1), corners.max(1) + 9], axis=1)
    sizes = dict(pooled_size=(5, 4), spatial_scale=1 / 16)
    if op == "psroi":
        values = [rng.normal(size=(3, 19, 17, 108))]
        values += [rng.normal(size=(90, 5, 4, 6))]
        grad_output = rng.normal(size=(90, 5, 4, 12))
    else:
        values = [rng.normal(size=(3, 19, 17, 44))]
        values += [rng.normal(size=(90, 5, 4, 2))]
        grad_output = rng.normal(size=(90, 5, 4, 44))

    def function(inputs, moved):
        given = tf.cast(rois, moved.dtype)
        if op == "psroi":
            return ops.deformable_psroi_pool(
                inputs, given, moved, output_dim=12, group_size=3, **sizes
            )
        return ops.deformable_roi_align(inputs, given, moved, **sizes)


def call(operands, grad_output):
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output = function(*operands)
    return [output, *tape.gradient(output, operands, grad_output)]


def run(values, grad_output, place, call):
    with tf.device(place):
        operands = [tf.identity(tf.constant(value)) for value in values]
        return call(operands, tf.identity(tf.constant(grad_output)))


for dtype in ("float64", "float32", "float16", "bfloat16"):
    T = tf.as_dtype(dtype).as_numpy_dtype
    wide = np.float64 if dtype == "float64" else np.float32
    # The first operands have the type, the last are coordinates.
    typed = 2 if op == "conv" else 1
    given = [v.astype(T if i < typed else wide) for i, v in enumerate(values)]
    given_grad = grad_output.astype(T)
    exact = [value.astype(np.float64) for value in given]
    expected = run(exact, given_grad.astype(np.float64), "/CPU:0", call)
    for mode, function_ in (("eager", call), ("graph", tf.function(call))):
        results = run(given, given_grad, device, function_)
        again = run(given, given_grad, device, function_)
        for i, (one, two, wanted) in enumerate(zip(results, again, expected)):
            wanted = wanted.numpy()
            error = np.abs(one.numpy().astype(np.float64) - wanted).max()
            print(
                json.dumps(
                    {
                        "what": [dtype, mode, i],
                        "device": one.device,
                        "error": float(error / np.abs(wanted).max()),
                        "same": one.numpy().tobytes() == two.numpy().tobytes(),
                    }
                )
            )
"""


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("settings", ["default", "float32", "deterministic"])
def test_equals_the_cpu_in_float64(op, settings, run_python_as_it_is):
    """By TensorFlow's default, tf32 is allowed and no order of sums is kept."""
    printed = run_python_as_it_is(
        _COMPARE,
        op,
        DEVICE,
        int(settings == "default"),
        int(settings == "deterministic"),
    )
    results = [json.loads(line) for line in printed.splitlines()]
    num_operands = 4 if op == "conv" else 2
    assert len(results) == 4 * 2 * (1 + num_operands)
    for result in results:
        dtype, *_ = result["what"]
        tolerance = TOLERANCE[dtype]
        if settings == "default" and dtype == "float32":
            tolerance = TF32_TOLERANCE
        assert result["device"].endswith(DEVICE.lstrip("/")), result
        assert result["error"] <= tolerance, result
        if settings == "deterministic":
            assert result["same"], result
