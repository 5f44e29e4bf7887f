#!/bin/sh
# OpenVINO reads a valid ONNX file from memory that it cannot read from a path.
#
# Surprise: a Loop whose body hands one of its values on unchanged (the body's
# input is its output, as tf2onnx writes what a loop does not change) loads with
# `read_model(bytes)` and gives the right numbers; `read_model(path)` of the same
# bytes raises OpConversionFailure. An Identity in the body mends it. One would
# guess that a path and its content are read by the same code.
#
# Versions: see pip below; Python 3.10 or newer. Source: the error's text, a
# check in OpenVINO's ONNX frontend, op/loop.cpp, that counts the body's inputs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 openvino==2026.4.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

folder = sys.argv[1]


def info(name, kind=TensorProto.FLOAT, shape=(2,)):
    return helper.make_tensor_value_info(name, kind, shape)


def make(copy):
    """Adds `step` to `x` three times; `step` is carried along."""
    nodes = [
        helper.make_node("Add", ["sum", "kept"], ["next"]),
        helper.make_node("Identity", ["on"], ["go"]),
    ]
    if copy:
        nodes.append(helper.make_node("Identity", ["kept"], ["copy"]))
    body = helper.make_graph(
        nodes,
        "body",
        [
            info("i", TensorProto.INT64, ()),
            info("on", TensorProto.BOOL, ()),
            info("sum"),
            info("kept"),
        ],
        [
            info("go", TensorProto.BOOL, ()),
            info("next"),
            info("copy" if copy else "kept"),
        ],
    )
    loop = helper.make_node(
        "Loop", ["count", "", "x", "step"], ["y", "unused"], body=body
    )
    graph = helper.make_graph(
        [loop],
        "graph",
        [info("x"), info("step")],
        [info("y")],
        [numpy_helper.from_array(np.array(3), "count")],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def load(model):
    try:
        compiled = openvino.Core().compile_model(
            openvino.Core().read_model(model), "CPU"
        )
    except RuntimeError:
        return "raises"
    given = {"x": np.float32([1, 2]), "step": np.float32([10, 20])}
    return compiled(given)[0].tolist()


found = []
for copy in (False, True):
    content = make(copy)
    path = f"{folder}/model_{copy}.onnx"
    with open(path, "wb") as file:
        file.write(content)
    found += [load(content), load(path)]
    print("Identity in the body:", copy, "bytes, path:", found[-2:])
right = [31.0, 62.0]
sys.exit(found != [right, "raises", right, right])
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
