#!/bin/sh
# In TensorFlow, a reshape to the right shape leaves a tensor in the wrong one.
#
# Surprise: with oneDNN (the default on most CPUs), the convolution of an empty
# batch has its input's shape, (0, 8, 8, 4) where (0, 8, 8, 5) is right. Eagerly,
# `tf.reshape` mends it. In a `tf.function` that knows the image's size, it does
# nothing: the function says (None, 8, 8, 5) of its result, returns (0, 8, 8, 4),
# and `tf.shape` behind the reshape gives that, too, so that what is built from it
# (`concat` here) fails or is wrong. One would guess that what `tf.reshape` returns
# has the shape that it was given. With an unknown size, or without Grappler's
# arithmetic optimizer or oneDNN, it has.
#
# Versions: see pip below; Python 3.10 to 3.13, x86. Source: this program; the
# optimizer drops a reshape whose result has its input's inferred shape
# (tensorflow/core/grappler/optimizers/arithmetic_optimizer.cc), and what is
# inferred of a convolution is right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import tensorflow as tf

kernel = tf.ones((3, 3, 4, 5))
empty = tf.zeros((0, 8, 8, 4))
right, wrong = [0, 8, 8, 5], [0, 8, 8, 4]


def convolve(x, reshape):
    y = tf.nn.conv2d(x, kernel, 1, "SAME")
    if reshape:
        batch, height, width, _ = tf.unstack(tf.shape(x))
        height, width = x.shape[1] or height, x.shape[2] or width
        y = tf.reshape(y, (batch, height, width, 5))
    return y, tf.shape(y)


def run(size, reshape):
    """The shape of the result, and what `tf.shape` says of it."""
    function = tf.function(
        lambda x: convolve(x, reshape),
        input_signature=[tf.TensorSpec((None, size, size, 4))],
    )
    said = function.get_concrete_function().structured_outputs[0].shape
    y, shape = function(empty)
    print(
        f"size {size}, reshape {reshape}: said to be {said},",
        f"is {y.shape}, tf.shape {shape.numpy()}",
    )
    return y.shape.as_list(), shape.numpy().tolist()


@tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 4))])
def append(x):
    return tf.concat([convolve(x, True)[0], tf.ones((1, 8, 8, 5))], 0)


print("oneDNN:", os.environ["TF_ENABLE_ONEDNN_OPTS"])
found = {
    "eager": convolve(empty, False)[0].shape.as_list(),
    "eager, reshape": convolve(empty, True)[0].shape.as_list(),
    "size": run(8, False),
    "size, reshape": run(8, True),
    "reshape": run(None, True),
}
try:
    found["appended"] = append(empty).shape.as_list()
except tf.errors.InvalidArgumentError as error:
    found["appended"] = "raises"
    told = [line for line in str(error).splitlines() if "shape" in line]
    print("concat:", *told)
tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
found["size, reshape, no optimizer"] = run(8, True)
print(found)
onednn = os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
expected = {
    "eager": wrong if onednn else right,
    "eager, reshape": right,
    "size": (wrong, wrong) if onednn else (right, right),
    "size, reshape": (wrong, wrong) if onednn else (right, right),
    "reshape": (right, right),
    "appended": "raises" if onednn else [1, 8, 8, 5],
    "size, reshape, no optimizer": (right, right),
}
sys.exit(found != expected)
PYTHON
for onednn in 0 1; do
    TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=$onednn \
        "$folder/venv/bin/python" "$folder/run.py"
done
