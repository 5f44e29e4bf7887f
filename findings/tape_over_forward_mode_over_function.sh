#!/bin/sh
# TensorFlow's tape over forward mode is silently wrong through a tf.function.
#
# Surprise: a Hessian product may be taken in two orders. Forward mode over a
# tape is right, with and without functions. A tape over forward mode (a
# GradientTape around a ForwardAccumulator) is right for eager operations, but
# as soon as a part of the model is a tf.function, the result is another
# number, without an error or a warning. One would guess that a function
# changes nothing. One around all of it does not help, while one is inside.
# Whoever uses this order has to call what the function was made of.
#
# Versions: see pip below; Python 3.10 or newer. Sources: TensorFlow's
# tensorflow/python/eager/forwardprop.py and the forward-mode functions in
# tensorflow/python/eager/polymorphic_function/concrete_function.py.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import tensorflow as tf

x = tf.constant([0.3, 0.7], tf.float64)
direction = tf.constant([1.0, 2.0], tf.float64)


def cube(x):
    return x**3


def tape_over_forward(inner):
    with tf.GradientTape() as tape:
        tape.watch(x)
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            y = tf.reduce_sum(tf.sin(inner(x)))
        product = accumulator.jvp(y)
    return tape.gradient(product, x)


def forward_over_tape(inner):
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(inner(x)))
        gradient = tape.gradient(y, x)
    return accumulator.jvp(gradient)


# Of sin(x**3), by hand.
z = x.numpy()
right = (6 * z * np.cos(z**3) - 9 * z**4 * np.sin(z**3)) * direction.numpy()
function = tf.function(cube)
seen = {
    "forward over tape, eager": forward_over_tape(cube),
    "forward over tape, function": forward_over_tape(function),
    "tape over forward, eager": tape_over_forward(cube),
    "tape over forward, function": tape_over_forward(function),
    "tape over forward, in a function": tf.function(tape_over_forward)(cube),
    "tape over forward, function in one": tf.function(tape_over_forward)(
        function
    ),
}
print("by hand:", right)
wrong = []
for name, value in seen.items():
    print(f"{name}:", value.numpy())
    if not np.allclose(value, right):
        wrong.append(name)
print("wrong:", wrong)
sys.exit(
    wrong
    != ["tape over forward, function", "tape over forward, function in one"]
)
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null
