#!/bin/sh
# Under op determinism, a parallel `map` runs its `tf.numpy_function` one at a time.
#
# Surprise: `Dataset.map(..., num_parallel_calls=4)` keeps the order of its elements by
# itself, so one would expect a deterministic run to call the function in parallel, as
# any other: reading files by Pillow or OpenCV is where pipelines need it. By default
# the function counts as stateful, and with `enable_op_determinism()` stateful ops in a
# map make it sequential, without a word. `stateful=False` brings parallel calls back.
#
# Versions: see pip below. Source: this program; docs of
# tf.config.experimental.enable_op_determinism, which name stateful ops in datasets.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import sys
import threading
import time

import numpy as np
import tensorflow as tf

tf.config.experimental.enable_op_determinism()


def most_at_once(stateful):
    lock, running, most = threading.Lock(), [0], [0]

    def read(index):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return np.int64(index)

    dataset = tf.data.Dataset.range(12).map(
        lambda i: tf.numpy_function(read, [i], tf.int64, stateful=stateful),
        num_parallel_calls=4,
    )
    assert [int(i) for i in dataset] == list(range(12))
    return most[0]


found = most_at_once(True), most_at_once(False)
print("calls at once, by default and with stateful=False:", found)
if found[0] != 1 or not found[1] > 1:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
