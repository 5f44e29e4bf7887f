# SPDX-License-Identifier: Apache-2.0
"""Tests the numbers in the explorer's page; a browser's test shows them."""

import base64
import json
import re
import zlib

import numpy as np
import tensorflow as tf
from surgery_models import displace, filled, make_composite, make_nested

import tf_deform
from tf_deform.visualization import _walk


def fields_of(data, index):
    """Returns an image's displacements and weights by layer."""
    stored = zlib.decompress(base64.b64decode(data["images"][index]["fields"]))
    low, high = np.frombuffer(stored, "u1").reshape(2, -1)
    numbers = np.stack((low, high), -1).reshape(-1).view("<i2")
    found = []
    for layer in data["layers"]:
        shape = (3, layer["groups"], len(layer["taps"]), *layer["size"])
        size = np.prod(shape)
        values, numbers = numbers[:size].reshape(shape), numbers[size:]
        values = np.transpose(values, (3, 4, 1, 2, 0))
        steps = [layer["offsetStep"]] * 2 + [layer["weightStep"]]
        found.append(values * steps)
    assert len(numbers) == 0
    return found


def test_the_page_has_the_numbers_of_every_layer(tmp_path):
    # JPEG keeps colours of large areas alone.
    images = np.random.default_rng(1).uniform(0, 1, (2, 2, 5, 3))
    images = images.repeat(16, 1).repeat(8, 2).astype("float32")
    for make in (make_nested, make_composite):
        model = filled(make)
        tf_deform.make_deformable(model, verbose=False)
        displace(model)
        path = tmp_path / "explorer.html"
        tf_deform.visualization.explorer(model, images, path)
        (text,) = re.findall(
            '<script type="application/json" id="data">(.*?)</script>',
            path.read_text(),
        )
        data = json.loads(text)
        calls = _walk.walk(model, tf.constant(images))
        assert [layer["name"] for layer in data["layers"]] == [
            call.name for call in calls
        ]
        assert len(calls) == len(tf_deform.deformable_layers(model))
        for index in range(2):
            fields = fields_of(data, index)
            for layer, call, values in zip(data["layers"], calls, fields):
                cells = np.stack(
                    np.meshgrid(*map(np.arange, call.size), indexing="ij"), -1
                )[:, :, None, None]
                taps = np.multiply(layer["scale"], layer["taps"])
                centres = np.array(layer["start"]) + layer["step"] * cells
                moved = values[..., :2] * layer["scale"]
                np.testing.assert_allclose(
                    centres + taps + moved,
                    call.inputs.place(call.locations[index]),
                    atol=1 / 32 + 1e-6,
                )
                np.testing.assert_allclose(
                    values[..., 2], call.modulation[index], atol=1 / 256 + 1e-6
                )
            photo = base64.b64decode(data["images"][index]["photo"])
            shown = tf.io.decode_jpeg(photo).numpy()
            assert shown.shape == (32, 40, 3)
            assert abs(shown - 255 * images[index]).mean() < 10
