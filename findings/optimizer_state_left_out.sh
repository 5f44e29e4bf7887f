#!/bin/sh
# A file's optimizer state that does not fit is left out with a warning.
#
# Surprise: `load_weights` and `load_model` are strict about a model's weights: a shape
# that differs is an error. One would expect the same of the optimizer's. Its state is
# skipped with a warning, for a model that has meanwhile frozen a layer, too: training
# goes on with moments of zero and from step 0, so that a schedule warms up again.
#
# Versions: see pip below. Source: this program.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import os
import sys
import warnings

import keras
import numpy as np


def make(frozen):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, trainable=not frozen)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


model = make(False)
model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=5, verbose=0)
path = os.path.join(os.path.dirname(__file__), "model.keras")
model.save(path)
other = make(True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    other.load_weights(path)
same = [np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights())]
steps = int(model.optimizer.iterations), int(other.optimizer.iterations)
said = [str(w.message)[:60] for w in caught if "optimizer" in str(w.message)]
print("weights equal:", all(same), "steps before and after:", steps, said)
if not all(same) or steps != (5, 0) or not said:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
