#!/bin/sh
# A `Resizing` layer puts all layers after it into training mode.
#
# Guess: `model(x)`, without `training`, is inference: batch normalization takes its
# moving averages, dropout does nothing, as the guides say of calls without the argument.
# Surprise: `Resizing.call` has `training=True` as its default, as augmentations have.
# Keras takes the default of the first layer that has one for the whole rest of a model
# that is called without the argument. So a functional model with a Resizing layer
# normalizes by the batch and drops units in `model(x)`; `predict` and
# `model(x, training=False)` are right. KerasHub's DeepLabV3 has such layers.
#
# Versions: see pip below. Source: this program; call contexts in keras/src/layers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import keras
import numpy as np


def make(resizes):
    image = x = keras.Input((4, 4, 3))
    if resizes:
        x = keras.layers.Resizing(4, 4)(x)
    return keras.Model(image, keras.layers.BatchNormalization()(x))


ones, found = np.ones((2, 4, 4, 3), "float32"), {}
for resizes in (False, True):
    model = make(resizes)
    found[resizes] = [
        round(float(np.max(outputs)), 2)
        for outputs in (
            model(ones, training=False),
            model.predict(ones, verbose=0),
            model(ones),
        )
    ]
    print("Resizing:", resizes, "largest output (told, predict, untold):", found[resizes])
if found != {False: [1.0, 1.0, 1.0], True: [1.0, 1.0, 0.0]}:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
