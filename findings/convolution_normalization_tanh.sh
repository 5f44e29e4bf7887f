#!/bin/sh
# On a CPU, TensorFlow cannot run a convolution, a normalization and tanh in a graph.
#
# Surprise: convolution, batch normalization as in inference, tanh is an ordinary chain,
# as in the last layers of generators of images. It runs eagerly, and one would guess
# that it runs in a `tf.function` too, where the optimizer of graphs fuses such chains
# only if it has a kernel for them. It fuses tanh as it does relu, elu and leaky relu,
# and the kernel then raises "UnimplementedError: Fusion is not implemented:
# [FusedBatchNorm,Tanh]". The weights have to be variables, as constants are folded.
# Models of Keras 2 meet it in `predict`, and in `fit` with a frozen normalization;
# those of Keras 3 do not, which normalizes with other ops.
#
# Versions: see pip below; the same with 2.15.1 to 2.19.1. Source: this program.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import tensorflow as tf

images = tf.random.normal((2, 8, 8, 4))
kernel = tf.Variable(tf.random.normal((3, 3, 4, 4)))
scale, variance = tf.Variable(tf.ones(4)), tf.Variable(tf.ones(4))
shift, mean = tf.Variable(tf.zeros(4)), tf.Variable(tf.zeros(4))


def run(activation):
    maps = tf.nn.conv2d(images, kernel, 1, "SAME")
    maps, _, _ = tf.compat.v1.nn.fused_batch_norm(
        maps, scale, shift, mean, variance, is_training=False
    )
    return activation(maps)


found = {}
for activation in (tf.nn.relu, tf.nn.elu, tf.nn.leaky_relu, tf.tanh):
    run(activation)
    try:
        tf.function(run)(activation)
        found[activation.__name__] = "runs"
    except tf.errors.UnimplementedError as error:
        found[activation.__name__] = error.message.splitlines()[-2].strip()
for name, what in found.items():
    print(f"{name}: {what}")
if "not implemented" not in found.pop("tanh") or set(found.values()) != {"runs"}:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
