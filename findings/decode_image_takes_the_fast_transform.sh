#!/bin/sh
# tf.io.decode_image reads other pixels from a JPEG file than Pillow does.
#
# Surprise: TensorFlow and Pillow both decode JPEG by libjpeg-turbo, so one would guess
# the same pixels, or differences of 1. But TensorFlow asks for the fast, inexact
# inverse transform unless it is told otherwise, and Pillow for the accurate one: two
# thirds of the values of the picture below differ, by up to 4.
# `decode_jpeg(dct_method="INTEGER_ACCURATE")` gives Pillow's pixels to the bit;
# `decode_image`, the only one that takes whatever kind of file comes, has no such
# argument. So a model that learned from what Pillow reads is served other pixels, and
# scores near a limit fall on its other side.
#
# Versions: see pip below. Source: this program; the argument `dct_method` of
# tf.io.decode_jpeg.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0 pillow==12.3.0
"$python" - <<'PY'
import io

import numpy as np
import tensorflow as tf
from PIL import Image

noise = np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8)
file = io.BytesIO()
Image.fromarray(noise).resize((320, 192)).save(file, "jpeg", quality=90)
data = file.getvalue()
pillow = np.asarray(Image.open(io.BytesIO(data))).astype(int)
found = {}
for name, pixels in {
    "decode_image": tf.io.decode_image(data),
    "decode_jpeg": tf.io.decode_jpeg(data),
    "accurate": tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE"),
}.items():
    apart = np.abs(pixels.numpy().astype(int) - pillow)
    found[name] = apart.max()
    print(f"{name}: {(apart > 0).mean():.1%} of values differ, by up to {apart.max()}")
assert found["decode_image"] == found["decode_jpeg"] > 2
assert found["accurate"] == 0
PY
