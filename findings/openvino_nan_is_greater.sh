#!/bin/sh
# On the CPU, OpenVINO finds NaN greater than every number.
#
# Surprise: `nan > x` and `nan >= x` are true, `nan < x` and `nan <= x` false:
# so `x > limit` lets NaN pass, and is not what `limit < x` says. One would guess
# that all four are false, as IEEE 754, NumPy, ONNX and TensorFlow have it, and
# that a graph means the same with its operands exchanged. Seen on a processor
# with AVX-512, with shapes known and unknown.
#
# Versions: see pip below; Python 3.10 or newer. Source: this program; OpenVINO's
# own was not read.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import openvino
from openvino import opset13

values = np.array([[np.nan, 1, -1, np.inf] * 4], "float32")
limit = opset13.constant(np.float32(0.5))
wrong = []
for name in ("greater", "greater_equal", "less", "less_equal", "equal"):
    given = opset13.parameter([-1, -1], np.float32)
    node = getattr(opset13, name)(given, limit)
    compiled = openvino.compile_model(openvino.Model([node], [given]), "CPU")
    found = compiled([values])[0]
    expected = getattr(np, name)(values, 0.5)
    print(name, "of", values[0, :4], "and 0.5:", found[0, :4])
    if not np.array_equal(found, expected):
        wrong.append(name)
print("not what NumPy says:", wrong)
sys.exit(wrong != ["greater", "greater_equal"])
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
