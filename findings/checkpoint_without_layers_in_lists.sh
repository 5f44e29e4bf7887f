#!/bin/sh
# tf.train.Checkpoint of a Keras 3 model lacks the layers that it holds in lists.
#
# Surprise: a subclassed model keeps its blocks in a list, as most do. Keras 3 trains
# them, counts them among `model.weights`, and writes them with `save_weights`; Keras 2
# had them in checkpoints too. One would guess that `tf.train.Checkpoint(model=model)`
# holds every weight, or that restoring says what it misses. It holds the layers that
# are attributes alone. Layers in a list or dictionary are missing without a word, and
# after `restore` into a new model both `assert_existing_objects_matched()` and
# `assert_consumed()` pass, while those layers keep their random weights: TensorFlow
# sees no such object in either model. A Sequential in place of the list is saved.
#
# Versions: see pip below; the same with Keras 3.5.0 on TensorFlow 2.18.1. Source: this
# program.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import keras
import numpy as np
import tensorflow as tf

folder = sys.argv[1]


class Model(keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = keras.layers.Dense(3, name="stem")
        self.blocks = [keras.layers.Dense(3, name="in_list")]
        self.heads = {"one": keras.layers.Dense(3, name="in_dictionary")}
        self.tail = keras.Sequential([keras.layers.Dense(3, name="in_model")])

    def call(self, x):
        x = self.heads["one"](self.blocks[0](self.stem(x)))
        return self.tail(x)


old, new = Model(), Model()
for model in (old, new):
    model(np.ones((2, 3), "float32"))
path = tf.train.Checkpoint(model=old).write(f"{folder}/checkpoint")
print("in the checkpoint:")
for name, shape in tf.train.list_variables(path):
    print("  ", name, shape)
status = tf.train.Checkpoint(model=new).read(path)
status.assert_consumed().assert_existing_objects_matched()
print("restored; both asserts pass")
same = {
    one.path.split("/")[-2]: bool(np.array_equal(one.numpy(), other.numpy()))
    for one, other in zip(old.weights, new.weights)
    if one.name == "kernel"
}
print("restored kernels:", same)
expected = {"stem": True, "in_list": False, "in_dictionary": False}
if same != {**expected, "in_model": True}:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null
