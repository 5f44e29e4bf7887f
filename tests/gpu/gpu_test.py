# SPDX-License-Identifier: Apache-2.0
"""Tests the ops on a GPU against the same ops in float64 on the CPU.

The other tests run on a GPU too (`make gpu-check-tf`), with settings that make
results reproducible. The tests here use TensorFlow's default settings. Without
a GPU the kernels are emulated (emulated_gpu.py), on smaller operands.
"""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable

import emulated_gpu
import every_op
import numpy as np
import pytest
import tensorflow as tf
from operands import DTYPES, Conv2DCase
from tolerances import GPU, GPU_TF32

import tf_deform

DEVICE = os.environ.get("TF_DEFORM_TEST_DEVICE")
TESTS = pathlib.Path(__file__).parents[1]
FOLDERS = [str(TESTS / name) for name in ("gpu", "lib")]
# A process cannot go back to an earlier setting.
SETTINGS = ("default", "float32", "deterministic")
CALLS = (*every_op.OPS, every_op.CONV2D_FIELDS)


def draw(call: every_op.Op, dtype: str) -> tuple[dict, list, dict]:
    """Returns operands by name, gradients of all outputs, and options."""
    if call.function is every_op.CONV2D.function:
        # Two blocks of pixels, and groups that are large enough for products.
        size = ((19, 17), 40, 72) if DEVICE else ((9, 5), 16, 20)
        modulation = call.options["modulation"]
        case = Conv2DCase(
            3, *size, (3, 3), groups=2, offset_groups=4, modulation=modulation
        )
        given, output_grad, options = every_op.conv2d_call(case, dtype)
        return given, [output_grad], options
    given, output_grad = call.draw(dtype, larger=12 if DEVICE else 2)
    if call is every_op.ROI_ALIGN:
        return given, [output_grad], call.options
    # TensorFlow would fill the gradient of the counts by a kernel of its own.
    output_grads = [output_grad, np.zeros(output_grad.shape, np.float32)]
    return given, output_grads, call.options | {"return_count": True}


def main(device: str) -> None:
    """Prints a line of JSON for all settings, ops, types, modes and results."""
    # Otherwise TensorFlow moves calls without a kernel to the CPU.
    tf.config.set_soft_device_placement(False)
    for settings, call, dtype in itertools.product(SETTINGS, CALLS, DTYPES):
        experimental = tf.config.experimental
        experimental.enable_tensor_float_32_execution(settings == "default")
        if settings == "deterministic":
            experimental.enable_op_determinism()
        given, output_grads, options = draw(call, dtype)

        def compute(given, output_grads, call=call, options=options):
            sources = {k: x for k, x in given.items() if k != "rois"}
            with tf.GradientTape() as tape:
                tape.watch(sources)
                outputs = tf.nest.flatten(call.function(**given, **options))
            gradients = tape.gradient(outputs, sources, output_grads)
            return [*outputs, *gradients.values()]

        def run_on(place, function, operands):
            with tf.device(place):
                operands = tf.nest.map_structure(
                    lambda x: tf.identity(tf.constant(x)), operands
                )
                return function(*operands)

        operands = given, output_grads
        exact = tf.nest.map_structure(np.float64, operands)
        exact[1][1:] = output_grads[1:]
        expected = run_on("/CPU:0", compute, exact)
        for mode in ("eager", "graph"):
            function = tf.function(compute) if mode == "graph" else compute
            results = run_on(device, function, operands)
            again = results
            if settings == "deterministic":
                again = run_on(device, function, operands)
            for one, two, wanted in zip(results, again, expected, strict=True):
                wanted = wanted.numpy()
                error = np.abs(one.numpy().astype(np.float64) - wanted).max()
                line = {
                    "what": [settings, str(call), dtype, mode],
                    "device": one.device,
                    "error": float(error / np.abs(wanted).max()),
                    "same": one.numpy().tobytes() == two.numpy().tobytes(),
                }
                print(json.dumps(line))


@functools.cache
def run_main(run: Callable[..., str]) -> list[dict]:
    """Calls `main` in a process of its own; returns the lines."""
    printed = run(
        f"import sys; sys.path[1:1] = {FOLDERS}\n"
        "import gpu_test; gpu_test.main(*sys.argv[1:])",
        DEVICE or "/GPU:0",
    )
    return [json.loads(line) for line in printed.splitlines()]


@emulated_gpu.needs_compiler
@pytest.mark.parametrize("op", [*map(str, CALLS)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_cpu_in_float64(op, settings, run_python_as_it_is):
    """Tests TensorFlow's defaults. They allow tf32, and any order of sums."""
    run = run_python_as_it_is if DEVICE else emulated_gpu.build().run
    results = [r for r in run_main(run) if r["what"][:2] == [settings, op]]
    num_results = {
        "conv2d": 5,
        "psroi_pool": 4,
        "roi_align": 3,
        "conv2d, fields": 4,
    }[op]
    assert len(results) == 4 * 2 * num_results
    for result in results:
        dtype = result["what"][2]
        tolerance = GPU[dtype].of_largest
        if tf32 := settings == "default" and dtype == "float32":
            tolerance = GPU_TF32.of_largest
        assert result["device"].endswith(DEVICE or "GPU:0"), result
        assert result["error"] <= tolerance, result
        if tf32 and op.startswith("conv2d"):
            # TF32 is in use: all results are products.
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
