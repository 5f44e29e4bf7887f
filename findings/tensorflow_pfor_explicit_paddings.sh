#!/bin/sh
# TensorFlow cannot vectorize the kernel's gradient of an explicitly padded
# convolution.
#
# Surprise: `tf.vectorized_map`, and `GradientTape.jacobian` with it, compute a
# convolution, its gradient of the input, and with "SAME" its gradient of the
# kernel (per-example gradients, Hessians). With a list of paddings, the gradient
# of the kernel alone raises: "explicit_paddings attribute must contain 8 values,
# but got: 0". One would guess that a function which `tf.map_fn` can run, and
# whose forward pass vectorizes, does not depend on how its padding is written.
# Padding by `tf.pad` before a "VALID" convolution works, and is the same.
#
# Versions: see pip below; Python 3.10 to 3.13. Source: this program; the
# converter of Conv2DBackpropFilter in tensorflow/python/ops/parallel_for/pfor.py
# hands on the kind of padding, without the numbers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import tensorflow as tf

draw = np.random.default_rng(0).normal
images = tf.constant(draw(size=(3, 6, 7, 2)), tf.float32)
kernel = tf.constant(draw(size=(3, 3, 2, 4)), tf.float32)
explicit = [[0, 0], [1, 1], [1, 1], [0, 0]]


def convolve(image, padding):
    image = image[None]
    if padding == "pad":
        image, padding = tf.pad(image, explicit), "VALID"
    return tf.nn.conv2d(image, kernel, 1, padding)[0]


def gradient(image, padding, of_kernel):
    with tf.GradientTape() as tape:
        tape.watch([image, kernel])
        loss = tf.reduce_sum(convolve(image, padding) ** 2)
    return tape.gradient(loss, kernel if of_kernel else image)


FUNCTIONS = {
    "convolution": convolve,
    "input's gradient": lambda image, padding: gradient(image, padding, False),
    "kernel's gradient": lambda image, padding: gradient(image, padding, True),
}


def compare(function, padding):
    """Whether vectorizing gives what a loop over the images gives."""
    expected = tf.stack([function(image, padding) for image in images])

    def of_one(image):
        return function(image, padding)

    looped = tf.map_fn(of_one, images)
    np.testing.assert_allclose(looped, expected, rtol=1e-4, atol=1e-4)
    try:
        received = tf.vectorized_map(of_one, images)
    except tf.errors.InvalidArgumentError as error:
        told = [x for x in str(error).splitlines() if "explicit_padd" in x]
        print("   ", *told)
        return "raises"
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)
    return "equal"


found = {}
for name, function in FUNCTIONS.items():
    for padding in ("SAME", "pad", explicit):
        kind = padding if isinstance(padding, str) else "explicit"
        found[name, kind] = compare(function, padding)
        print(f"{name}, {kind}: {found[name, kind]}")
expected = dict.fromkeys(found, "equal")
expected["kernel's gradient", "explicit"] = "raises"
sys.exit(found != expected)
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py"
