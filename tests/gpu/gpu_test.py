# SPDX-License-Identifier: Apache-2.0
"""Tests the ops on a GPU against the same ops in float64 on the CPU.

The other tests run on a GPU too (`make gpu-check-tf`), with settings that make
results reproducible. The tests here use TensorFlow's default settings. Without
a GPU the kernels are emulated (emulated_gpu.py), on smaller operands.
"""

import json
import os

import emulated_gpu
import pytest
from tolerances import GPU, GPU_TF32

import tf_deform

DEVICE = os.environ.get("TF_DEFORM_TEST_DEVICE")

OPS = ("conv", "psroi", "align")
# Arguments: operator, device, whether it is emulated, whether tf32 is allowed,
# whether the same bits are required. Prints a line of JSON for every type, mode
# and result.
_COMPARE = """
import json
import sys

import numpy as np
import tensorflow as tf

from tf_deform import ops

op, device, emulated, tf32, deterministic = sys.argv[1:]
tf.config.experimental.enable_tensor_float_32_execution(tf32 == "1")
if deterministic == "1":
    tf.config.experimental.enable_op_determinism()
# What the device has no kernel for is an error, not moved to the CPU.
tf.config.set_soft_device_placement(False)

rng = np.random.default_rng(0)
# Emulated: still two blocks of pixels.
image = (3, 9, 5) if emulated == "1" else (3, 19, 17)
num_rois = 12 if emulated == "1" else 90
if op == "conv":
    shapes = [(*image, 40), (3, 3, 20, 72), (*image, 72), (*image, 36)]
    if emulated == "1":
        shapes[:2] = [(*image, 16), (3, 3, 8, 20)]
    values = [rng.normal(size=shape) for shape in shapes]
    values[2] = (np.floor(8 * values[2]) + 0.5) / 8
    grad_output = rng.normal(size=(*image, shapes[1][-1]))

    def function(inputs, kernel, offset, mask):
        return ops.deformable_conv2d(
            inputs, kernel, offset, mask, padding="same", offset_groups=4
        )

else:
    corners = np.floor(rng.uniform(-20, 300, (num_rois, 2, 2)))
    index = rng.integers(-1, 3, (num_rois, 1))
    rois = np.concatenate([index, corners.min(1), corners.max(1) + 9], axis=1)
    sizes = dict(pooled_size=(5, 4), spatial_scale=1 / 16)
    if op == "psroi":
        values = [rng.normal(size=(*image, 108))]
        values += [rng.normal(size=(num_rois, 5, 4, 6))]
        grad_output = rng.normal(size=(num_rois, 5, 4, 12))
    else:
        values = [rng.normal(size=(*image, 44))]
        values += [rng.normal(size=(num_rois, 5, 4, 2))]
        grad_output = rng.normal(size=(num_rois, 5, 4, 44))

    def function(inputs, moved):
        given = rois.astype(moved.dtype.as_numpy_dtype)
        if op == "align":
            return ops.deformable_roi_align(inputs, given, moved, **sizes)
        options = dict(output_dim=12, group_size=3, return_count=True)
        return ops.deformable_psroi_pool(
            inputs, given, moved, **options, **sizes
        )


def call(operands, grad_outputs):
    with tf.GradientTape() as tape:
        tape.watch(operands)
        outputs = tf.nest.flatten(function(*operands))
    return outputs + tape.gradient(outputs, operands, grad_outputs)


def run(values, grad_output, place, call):
    grad_outputs = [grad_output]
    if op == "psroi":  # TensorFlow would fill that of the counts itself
        grad_outputs.append(np.zeros(grad_output.shape, np.float32))
    with tf.device(place):
        operands = [tf.identity(tf.constant(value)) for value in values]
        grad_outputs = [tf.identity(tf.constant(g)) for g in grad_outputs]
        return call(operands, grad_outputs)


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
        again = results
        if deterministic == "1":
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


@emulated_gpu.needs_compiler
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("settings", ["default", "float32", "deterministic"])
def test_equals_the_cpu_in_float64(op, settings, run_python_as_it_is):
    """Tests TensorFlow's defaults. They allow tf32, and any order of sums."""
    run = run_python_as_it_is if DEVICE else emulated_gpu.build().run
    printed = run(
        _COMPARE,
        op,
        DEVICE or "/GPU:0",
        int(DEVICE is None),
        int(settings == "default"),
        int(settings == "deterministic"),
    )
    results = [json.loads(line) for line in printed.splitlines()]
    num_results = {"conv": 5, "psroi": 4, "align": 3}[op]
    assert len(results) == 4 * 2 * num_results
    for result in results:
        dtype, *_ = result["what"]
        tolerance = GPU[dtype].of_largest
        if settings == "default" and dtype == "float32":
            tolerance = GPU_TF32.of_largest
        assert result["device"].endswith(DEVICE or "GPU:0"), result
        assert result["error"] <= tolerance, result
        if tolerance == GPU_TF32.of_largest and op == "conv":
            # TF32 is in use: all five results are products.
            assert result["error"] > 1e-5, result
        if settings == "deterministic":
            assert result["same"], result


_WITHOUT_DRIVER = """
import numpy as np
import tensorflow as tf

from tf_deform import ops

operands = [np.ones((1, 5, 4, 2), "f"), np.ones((3, 3, 2, 6), "f")]
operands += [np.zeros((1, 3, 2, 18), "f")]
for _ in range(2):
    try:
        with tf.device("/GPU:0"):
            ops.deformable_conv2d(*operands)
    except tf.errors.InternalError as error:
        print(error.message)
    with tf.device("/CPU:0"):
        print(ops.deformable_conv2d(*operands).numpy().sum())
"""


@emulated_gpu.needs_compiler
@pytest.mark.skipif(DEVICE is not None, reason="there is a driver")
@pytest.mark.skipif(
    not tf_deform.is_built_with_cuda(), reason="built without nvcc"
)
def test_without_a_driver_the_gpu_fails_and_the_cpu_goes_on():
    """Tests the real kernels. TensorFlow believes that there is a GPU."""
    printed = emulated_gpu.build().run(_WITHOUT_DRIVER, emulated=False)
    error, value, *again = printed.splitlines()
    built = tf_deform._build_info.CUDA_VERSION
    assert f"Expected a GPU driver for CUDA {built.split('.')[0]}" in error
    assert f"built with CUDA {built}. Received: no driver" in error
    assert float(value) == 648.0  # 6 pixels, 6 filters, 9 taps, 2 channels
    assert again == [error, value]
