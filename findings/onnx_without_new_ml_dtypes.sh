#!/bin/sh
# pip installs onnx 1.19.0 beside TensorFlow 2.15, where it cannot be imported.
#
# Surprise: TensorFlow 2.15 holds ml_dtypes at 0.3. Newer releases of onnx ask for
# ml_dtypes 0.5 or newer, so one would guess that pip takes the newest onnx that
# works without it, 1.18.0. It takes 1.19.0, whose metadata asks for any ml_dtypes,
# and `pip check` finds nothing wrong. `import onnx` raises AttributeError about
# float4_e2m1fn, a type of ml_dtypes 0.5. 1.19.1 asks for ml_dtypes 0.5.
#
# Versions: see pip below; ml_dtypes 0.3.2 stands for TensorFlow 2.15.1, which
# requires ml-dtypes~=0.3.1; Python 3.9 to 3.11. Source: this program, and the
# metadata of the two releases.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=python3.11
command -v $python >/dev/null || python=python3.10
$python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ml-dtypes~=0.3.1" "numpy<2" "onnx<1.24"
"$folder/venv/bin/pip" check
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

version = importlib.metadata.version("onnx")
try:
    import onnx
except AttributeError as error:
    said = str(error)
else:
    said = f"imported from {onnx.__file__}"
print("onnx", version, "ml_dtypes", importlib.metadata.version("ml_dtypes"))
print(said)
if version != "1.19.0" or "float4_e2m1fn" not in said:
    sys.exit("something else than before")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
