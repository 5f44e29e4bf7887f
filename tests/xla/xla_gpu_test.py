# SPDX-License-Identifier: Apache-2.0
"""Tests the calls of XLA on "CUDA", on machines without a GPU.

The ops are compiled for a GPU up to XLA's own module (HLO), which needs no GPU.
Then XLA runs each custom call of the module on the host, attributes and
workspace included: the function that is registered for "CUDA", with emulated
kernels (emulated_gpu.py). On a GPU xla_test.py covers the same.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import re
import sys

import emulated_gpu
import every_op
import numpy as np
import pytest
import tensorflow as tf
import xla_test
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tolerances import GPU, GPU_TF32

from tf_deform import _loader

TYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
TYPES |= {"f64": "float64", "u8": "uint8"}

# Two blocks of pixels, without groups, which would be too small for products.
CONV2D = dataclasses.replace(
    every_op.CONV2D,
    full=dict(
        batch=5, size=(8, 9), filters=10, offset_groups=2, strides=(2, 1)
    ),
)
OPS = {call.name: call for call in (CONV2D, *every_op.OPS[1:])}
SETTINGS = ("default", "float32", "deterministic")
CASES = list(itertools.product(OPS, xla_test.TYPES, (False, True)))

_CALL = re.compile(
    r" = \((?P<results>.*)\) custom-call\((?P<operands>.*?)\), "
    r'custom_call_target="(?P<target>.*?)".*backend_config=(?P<attributes>\{.*})'
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Call:
    """Holds a custom call in the text of an HLO module."""

    def __init__(self, match: re.Match):
        self.target = match["target"]
        self.attributes = match["attributes"]
        self.operands = _SHAPE.findall(match["operands"])
        self.results = _SHAPE.findall(match["results"])

    def run_on_host(self, operands: list[tf.Tensor]) -> list[tf.Tensor]:
        """Runs the call on the host; returns all results but the workspace."""

        def types(shapes) -> list[str]:
            prefix = {"u8": "ui8"}
            return [
                "tensor<{}{}>".format(
                    "".join(f"{size}x" for size in dims.split(",") if size),
                    prefix.get(element, element),
                )
                for element, dims in shapes
            ]

        names = [f"%arg{i}" for i in range(len(operands))]
        given, made = types(self.operands), types(self.results)
        signature = ", ".join(map("{}: {}".format, names, given))
        results = self.results[:-1]
        values = ", ".join(f"%0#{i}" for i in range(len(results)))
        returned = ", ".join(made[:-1])
        module = f"""
            func.func public @main({signature}) -> ({returned}) {{
              %0:{len(made)} = stablehlo.custom_call @"CUDA:{self.target}"(
                  {", ".join(names)}) {{
                api_version = 4 : i32, backend_config = {self.attributes}
              }} : ({", ".join(given)}) -> ({", ".join(made)})
              return {values} : {returned}
            }}"""
        return gen_xla_ops.xla_call_module(
            args=operands,
            version=9,
            module=module.encode(),
            Sout=[[int(n) for n in d.split(",") if n] for _, d in results],
            Tout=[TYPES[element] for element, _ in results],
            platforms=["CPU"],
            dim_args_spec=[],
            function_list=[],
            has_token_input_output=False,
            disabled_checks=[],
        )


def compiled_for_a_gpu(function, operands) -> list[Call]:
    """Returns the custom calls of a function compiled by XLA for a GPU."""
    make_text = tf.function(
        function, jit_compile=True
    ).experimental_get_compiler_ir(*operands)
    text = make_text(stage="hlo", platform_name="GPU")
    return [Call(match) for match in _CALL.finditer(text)]


def main(plugin: str) -> None:
    """Runs all calls in all settings; prints a line of JSON for every result.

    Determinism comes last, as TensorFlow cannot switch it off.
    """
    _loader.op_library()
    emulate = ctypes.CDLL(plugin).TfDeformEmulateXlaOnCuda
    last_stream = ctypes.CDLL(_loader.LIBRARY).TfDeformEmulatedStream
    emulate.restype = last_stream.restype = ctypes.c_void_p
    stream = emulate()
    assert stream, "not all ops are registered for CUDA"

    for settings in SETTINGS:
        is_default = settings == "default"
        tf.config.experimental.enable_tensor_float_32_execution(is_default)
        if settings == "deterministic":
            tf.config.experimental.enable_op_determinism()
            tf.random.set_seed(0)  # TensorFlow draws a number to find a device
        wanted = (
            f"allow_tf32 = {int(is_default)} :",
            f"deterministic = {int(settings == 'deterministic')} :",
        )

        def run(call, operands, wanted=wanted):
            assert all(text in call.attributes for text in wanted)
            results = call.run_on_host(operands)
            assert last_stream() == stream
            return results

        for case in CASES:
            print(json.dumps([settings, case, measure(run, *case)]))


def measure(run_call, name: str, dtype: str, displaced: bool) -> list[float]:
    """Returns the error of each result of both custom calls."""
    call = OPS[name]
    operands, output_grad = xla_test.draw(call, dtype, displaced)

    def run(operands, output_grad):
        outputs, gradients = call.results(operands, output_grad)
        gradients = [gradients[x] for x in operands if x in gradients]
        return tf.nest.flatten(outputs) + gradients

    exact = {k: tf.cast(x, "float64") for k, x in operands.items()}
    expected = run(exact, tf.cast(output_grad, "float64"))
    forward, backward = compiled_for_a_gpu(run, (operands, output_grad))
    assert forward.target == f"TfDeform>{name}"
    assert backward.target == f"TfDeform>{name}Grad"
    given = list(operands.values())
    results = run_call(forward, given)
    results += run_call(backward, [*given, output_grad])
    errors = []
    for one, exact in zip(results, expected, strict=True):
        error = np.abs(tf.cast(one, exact.dtype) - exact).max()
        errors.append(float(error / np.abs(exact).max()))
    return errors


@pytest.fixture(scope="module")
def found():
    """Returns the errors by settings and case, from one process."""
    emulated = emulated_gpu.build()
    printed = emulated.run(
        f"import sys; sys.path[1:] = {sys.path}\n"
        "import xla_gpu_test; xla_gpu_test.main(sys.argv[1])",
        emulated.plugin,
        device=False,
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    return {(settings, *case): errors for settings, case, errors in lines}


@emulated_gpu.needs_compiler
@pytest.mark.skipif(
    not _loader.has_xla(), reason="this TensorFlow has no headers of XLA"
)
@pytest.mark.skipif(
    "TF_DEFORM_TEST_DEVICE" in os.environ, reason="xla_test.py shows it"
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", OPS)
def test_calls_for_cuda(name, settings, found):
    for case in CASES:
        _, dtype, _ = case
        if case[0] != name:
            continue
        is_tf32 = settings == "default" and dtype == "float32"
        tolerance = (GPU_TF32 if is_tf32 else GPU[dtype]).of_largest
        for error in found[(settings, *case)]:
            assert error <= tolerance, case
            if is_tf32 and name == "DeformableConv2D":
                assert error > 1e-5, case  # all are products
