#!/bin/sh
# A valid model that ONNX Runtime runs without its optimizations fails with them.
#
# Surprise: a cubic Resize that halves a map runs, for channels first; between
# two Transposes (channels last outside, as every model from TensorFlow) it runs
# with optimizations off or basic, and raises with the default ones, as soon as
# the map becomes smaller. They move the Transpose behind the Resize, whose kernel
# then sees channels last, which it takes for growing maps only. One would guess
# that an optimizer asks the kernel before it changes what that gets.
# Enlarging, and linear instead of cubic, are right at every level.
#
# Versions: see pip below; Python 3.10 or newer. Sources: onnxruntime's
# transpose optimizer (core/optimizer/transpose_optimization) and the checks of
# scales in core/providers/cpu/tensor/upsamplebase.h.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")


def make(mode, size):
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Resize", ["t", "", "", "sizes"], ["r"], mode=mode),
        helper.make_node("Transpose", ["r"], ["y"], perm=[0, 2, 3, 1]),
    ]
    shape = [1, 8, 8, 3]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
        [numpy_helper.from_array(np.array([1, 3, size, size]), "sizes")],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


x = np.random.default_rng(0).random((1, 8, 8, 3), "float32")
failed = []
for mode in ("linear", "cubic"):
    for size in (16, 4):
        for level in LEVELS:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = getattr(
                onnxruntime.GraphOptimizationLevel, level
            )
            try:
                session = onnxruntime.InferenceSession(
                    make(mode, size), options, ["CPUExecutionProvider"]
                )
                [y] = session.run(None, {"x": x})
                told = f"runs, {y.shape}"
            except Exception as error:
                told = " ".join(str(error).split())[:240]
                failed.append((mode, size, level))
            print(f"{mode}, 8 to {size}, {level}: {told}")
sys.exit(failed != [("cubic", 4, "ORT_ENABLE_ALL")])
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
