#!/bin/sh
# With tf_keras 2.16 on Python 3.12, no layer gets weights after a seed was set.
#
# Surprise: tf_keras 2.16 is the Keras 2 for TensorFlow 2.16, whose wheels are the
# first for Python 3.12, and models train there. One would guess that a script
# which sets a seed first, as a careful one does, runs too. After
# `tf_keras.utils.set_random_seed` every initializer of a stock layer raises
# "TypeError: 'float' object cannot be interpreted as an integer": the seeded
# generator is Python's own, and is asked for a number up to 1e9, a float, which
# Python takes up to 3.11 and refuses since 3.12. Without a seed another generator
# is used, and nothing is wrong. 2.17 and 2.18 read the same; 2.19 mends it.
#
# Versions: see pip below; Python 3.12. Source: this program;
# _SEED_GENERATOR.generator.randint in tf_keras/src/backend.py.
set -eu
python=python3.12
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
  "$python" -c '' 2>/dev/null || python=$path
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.16.2 tf-keras==2.16.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import tf_keras as keras


def build():
    try:
        keras.layers.Dense(2).build((None, 3))
    except TypeError as error:
        return f"TypeError: {error}"
    return "built"


found = [build()]
keras.utils.set_random_seed(0)
found.append(build())
print("without a seed:", found[0])
print("with a seed:", found[1])
expected = "TypeError: 'float' object cannot be interpreted as an integer"
if found != ["built", expected]:
    sys.exit("something else than before")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
