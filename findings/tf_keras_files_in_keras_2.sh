#!/bin/sh
# A .keras file that tf_keras writes does not open in Keras 2.15.
#
# Surprise: tf_keras is Keras 2 under another name, for programs that stay with it
# on new TensorFlow, and it opens what Keras 2.15 has written. One would guess that
# a model of two stock layers also goes the other way, for example to a server
# that stays with TensorFlow 2.15. It does not: a functional model is written as a
# class of the private module tf_keras.src.engine.functional, which Keras 2.15
# does not know under this name, while the layers in the same file are written as
# those of `keras`; and an InputLayer has an argument, `optional`, that it refuses,
# although its value is the default. The weights alone (.weights.h5) go both ways.
#
# Versions: see pip below; Python 3.10 or 3.11. Source: this program, and the
# file's config.json.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PYTHON'
import sys

import numpy as np

keras = __import__(sys.argv[1])
folder = f"{sys.argv[2]}/{sys.argv[1]}"


def functional():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2)(inputs))


def sequential():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


for make in (functional, sequential):
    model = make()
    model.set_weights([np.arange(6.0).reshape(3, 2), np.ones(2)])
    model.save(f"{folder}_{make.__name__}.keras")
    model.save_weights(f"{folder}_{make.__name__}.weights.h5")
PYTHON
cat > "$folder/read.py" <<'PYTHON'
import sys

import numpy as np

keras = __import__(sys.argv[1])
folder = f"{sys.argv[2]}/{sys.argv[3]}"
for name in ("functional", "sequential"):
    try:
        model = keras.models.load_model(f"{folder}_{name}.keras")
    except TypeError as error:
        text = str(error)
        for word in ("tf_keras.src.engine.functional", "optional"):
            if word in text:
                print(name, "TypeError", word)
                break
        inputs = keras.Input((3,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
        if name == "sequential":
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.load_weights(f"{folder}_{name}.weights.h5")
    else:
        print(name, "opens")
    assert np.all(model(np.ones((1, 3))) == [[7, 10]])
PYTHON
python=python3.11
command -v $python >/dev/null || python=python3.10
$python -m venv "$folder/new"
"$folder/new/bin/pip" install -q tensorflow==2.21.0 tf-keras==2.21.0
$python -m venv "$folder/old"
"$folder/old/bin/pip" install -q tensorflow-cpu==2.15.1 keras==2.15.0
export TF_CPP_MIN_LOG_LEVEL=3
"$folder/new/bin/python" "$folder/write.py" tf_keras "$folder" 2>/dev/null
"$folder/old/bin/python" "$folder/write.py" keras "$folder" 2>/dev/null
echo "tf_keras 2.21 reads Keras 2.15:"
"$folder/new/bin/python" "$folder/read.py" tf_keras "$folder" keras \
  2>/dev/null | tee "$folder/forwards"
echo "Keras 2.15 reads tf_keras 2.21:"
"$folder/old/bin/python" "$folder/read.py" keras "$folder" tf_keras \
  2>/dev/null | tee "$folder/backwards"
printf 'functional opens\nsequential opens\n' | cmp - "$folder/forwards"
printf '%s\n' 'functional TypeError tf_keras.src.engine.functional' \
  'sequential TypeError optional' | cmp - "$folder/backwards"
