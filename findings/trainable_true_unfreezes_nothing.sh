#!/bin/sh
# `model.trainable = True` unfreezes no layer of a Keras 3 model that is trainable.
#
# Surprise: Keras' guide says that setting `trainable` on a model sets it on all layers
# inside. So who has frozen some layers one by one for the first epochs would write
# `model.trainable = True` to train all of them from then on, as worked in Keras 2
# (tf_keras 2.21 still does it). With Keras 3 on TensorFlow the frozen layers stay
# frozen, without a word: an attribute that already has this value is not assigned at
# all, because TensorFlow's trackable objects skip such assignments, and a model's own
# flag was True all the time. False first, then True, works.
#
# Versions: see pip below; the same with Keras 3.5.0 on TensorFlow 2.18.1. Source: this
# program; the order of classes by which `keras.Model` finds `__setattr__`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import keras

inputs = keras.Input((4,))
first, second = keras.layers.Dense(3), keras.layers.Dense(2)
model = keras.Model(inputs, second(first(inputs)))
first.trainable = False
model.trainable = True
found = [first.trainable, len(model.trainable_weights)]
print("after True:", found)
model.trainable = False
model.trainable = True
after = [first.trainable, len(model.trainable_weights)]
print("after False and True:", after)
if found != [False, 2] or after != [True, 4]:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
