#!/bin/sh
# Under op determinism, a sum of four tensors changes from call to call.
#
# Surprise: `enable_op_determinism()` promises the same bits for the same inputs, and
# names the ops that cannot keep it by errors. But `tf.add_n` adds in the order of its
# inputs only if it can write its result over the first one. While another op, a metric
# for instance, still has to read the first one, the sum begins with the first input
# that nobody waits for, and whether somebody waits is a matter of threads. In a
# `tf.function` a chain `a + b + c + d` does so too, as the graph optimizer makes an
# AddN of it. The usual sum of losses in a training step has that form: weights stay the
# same, the logged loss is one unit of the last place off. `tf.reduce_sum(tf.stack(...))`
# does not have it.
#
# Versions: see pip below. Source: this program; tensorflow/core/kernels/aggregate_ops.cc
# (forwarding of inputs), tensorflow/core/grappler/optimizers/arithmetic_optimizer.cc.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import collections
import sys

import numpy as np
import tensorflow as tf

tf.config.experimental.enable_op_determinism()
# Numbers whose sum depends on the order.
TERMS = [-0.77395606, -0.43887845, -0.85859793, -0.697368]
rng = np.random.default_rng(0)
MATRICES = rng.normal(size=(2, 64, 64)).astype("float32")


def sums(add):
    metrics = tf.Variable(0.0), tf.Variable(0.0)

    @tf.function
    def step(terms, one, two):
        a, b, c, d = (tf.abs(term) for term in terms)
        # Two products of one length, each on a thread of its own.
        one, two = tf.reduce_sum(one @ one), tf.reduce_sum(two @ two)
        for metric, term in zip(metrics, (a, b)):
            metric.assign_add(one * term)
        return add([a, b, c, d + 0.0 * two])

    terms = [tf.constant(term) for term in TERMS]
    matrices = [tf.constant(matrix) for matrix in MATRICES]
    return collections.Counter(
        float(step(terms, *matrices)) for _ in range(20_000)
    )


found = {
    "add_n": sums(tf.add_n),
    "chain": sums(lambda terms: terms[0] + terms[1] + terms[2] + terms[3]),
    "stack": sums(lambda terms: tf.reduce_sum(tf.stack(terms))),
}
for name, counts in found.items():
    print(f"{name}: {dict(counts)}")
if [len(counts) > 1 for counts in found.values()] != [True, True, False]:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
