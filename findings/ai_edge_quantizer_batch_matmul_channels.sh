#!/bin/sh
# ai-edge-quantizer's default makes of a batched product one that is only zeros.
#
# Surprise: a product of a batch with constant matrices, quantized to 8 bits with
# `add_static_config`, is off by 1 % of the largest number if the matrices share
# one scale; with a scale for each column (the default, and more exact wherever
# else weights are 8 bits) it is off by 100 %: every number is 0. Nothing is said,
# neither by the quantizer nor by LiteRT, with or without XNNPACK. `matmul` with
# one matrix becomes FULLY_CONNECTED, which is right in both. One would guess that
# a finer scale is no worse, or is refused where no kernel takes it.
#
# Versions: see pip below; Python 3.11. Source: the files that are made (one scale
# or five), run here; `add_static_config` in ai_edge_quantizer/recipe_manager.py
# for the default.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q \
    tensorflow==2.21.0 ai-edge-litert==2.3.0 ai-edge-quantizer==0.10.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_quantizer import qtyping, quantizer, recipe_manager

random = np.random.default_rng(0)
x = random.normal(size=(4, 9, 6)).astype("float32")
Granularity = qtyping.QuantGranularity
RESOLVERS = ("BUILTIN", "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "BUILTIN_REF")


def convert(matrices):
    @tf.function(input_signature=[tf.TensorSpec(x.shape, name="x")])
    def multiply(x):
        return {"y": tf.matmul(x, matrices)}

    # The module gives the file a signature, which calibration asks for.
    module = tf.Module()
    module.multiply = multiply
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [multiply.get_concrete_function()], module
    )
    return bytes(converter.convert())


def quantize(content, name, arguments):
    recipe = recipe_manager.RecipeManager()
    operation = qtyping.TFLOperationName(name)
    recipe.add_static_config(".*", operation, 8, 8, *arguments)
    maker = quantizer.Quantizer(content, recipe.get_quantization_recipe())
    [signature] = Interpreter(model_content=content).get_signature_list()
    ranges = maker.calibrate({signature: [{"x": x}]})
    return bytes(maker.quantize(ranges).quantized_model)


def run(content, resolver):
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=getattr(OpResolverType, resolver),
    )
    interpreter.allocate_tensors()
    [given] = interpreter.get_input_details()
    [found] = interpreter.get_output_details()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(found["index"])


failed = []
for name, shape in (("BATCH_MATMUL", (4, 6, 5)), ("FULLY_CONNECTED", (6, 5))):
    matrices = random.normal(size=shape).astype("float32")
    expected = x.astype("float64") @ matrices
    content = convert(matrices)
    files = {"float32": content}
    for kind, arguments in (
        ("one scale", [Granularity.TENSORWISE]),
        ("a scale for each column", [Granularity.CHANNELWISE]),
        ("the default", []),
    ):
        files[kind] = quantize(content, name, arguments)
    for kind, file in files.items():
        for resolver in RESOLVERS:
            found = run(file, resolver)
            error = np.abs(found - expected).max() / np.abs(expected).max()
            print(
                f"{name}, {kind}, {resolver}: error {error:.4f},",
                f"numbers from {found.min():.2f} to {found.max():.2f}",
            )
            if error > 0.03:
                failed.append((name, kind, resolver, found.any()))
wrong = [
    ("BATCH_MATMUL", kind, resolver, False)
    for kind in ("a scale for each column", "the default")
    for resolver in RESOLVERS
]
sys.exit(failed != wrong)
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py"
