# SPDX-License-Identifier: Apache-2.0
"""Exports KerasHub's models that were made deformable: `docs/surgery.md`.

    python tests/lib/hub_exports.py [NAME ...]

prints the rows of the table.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import zoo

import tf_deform
from tf_deform import export

FORMATS = ("portable", "native", "onnx", "litert")
# Reads files as programs do that have none of Keras, KerasHub and, but for the
# native SavedModel, tf_deform.
READ = """
import sys
import numpy as np

folder, *kinds = sys.argv[1:]
images = np.load(f"{folder}/images.npy")


def run(kind):
    path = f"{folder}/{kind}"
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {given.name: images})))
    if kind == "litert":
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(path).get_signature_runner("serving_default")
        (name,) = runner.get_input_details()
        return runner(**{name: images})
    import tensorflow as tf

    if kind == "native":
        import tf_deform
    loaded = tf.saved_model.load(path).signatures["serving_default"]
    (name,) = loaded.structured_input_signature[1]
    outputs = loaded(**{name: tf.constant(images)})
    return {name: value.numpy() for name, value in outputs.items()}


for kind in kinds:
    np.savez(f"{folder}/{kind}.npz", **run(kind))
assert "keras_hub" not in sys.modules
"""


def displace(model: keras.Model) -> None:
    """Sets branches, and leaves other weights as they are.

    D-FINE takes the best of its tokens, in their order: with other weights than
    its first ones, random tokens are so much alike that rounding decides.
    """
    rng = np.random.default_rng(7)
    for layer in tf_deform.deformable_layers(model):
        for weight, scale in (
            (layer.offset_kernel, 0.01),
            (layer.offset_bias, 1),
        ):
            weight.assign(rng.normal(scale=scale, size=weight.shape))


def write(kind: str, model: keras.Model, path: pathlib.Path) -> None:
    if kind in ("native", "portable"):
        options = dict(image_bytes=False, verbose=False)
        export.saved_model(model, path, kind, **options)
    else:
        getattr(export, kind)(model, path, verbose=False)


def examine(
    model: keras.Model, folder: pathlib.Path, kinds: tuple[str, ...] = FORMATS
) -> dict[str, float]:
    """Exports a model, and runs the files in a new process.

    Returns:
        For each format, the largest difference of an output to the model's,
        over the largest number of that output.
    """
    displace(model)
    _, *size = model.input_shape
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *size)).astype("float32")
    np.save(folder / "images.npy", images)
    for kind in kinds:
        write(kind, model, folder / kind)
    home = str(pathlib.Path(tf_deform.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", READ, folder, *kinds],
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    outputs = export._source.name_outputs(model(images, training=False))
    expected = {name: np.asarray(value) for name, value in outputs.items()}
    found = {}
    for kind in kinds:
        received = np.load(folder / f"{kind}.npz")
        if set(received) != set(expected):
            raise RuntimeError(f"{kind}: {set(received)} for {set(expected)}")
        found[kind] = max(
            float(np.abs(received[name] - value).max())
            / max(float(np.abs(value).max()), 1e-30)
            for name, value in expected.items()
        )
    return found


def line(name: str, found: dict[str, float]) -> str:
    """Returns a row of the table."""
    order = ("native", "portable", "onnx", "litert")
    cells = [f"{found[kind]:.0e}" if found[kind] else "0" for kind in order]
    return f"| {name.removeprefix('KerasHub ')} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for name, make in zoo.MODELS.items():
        asked = sys.argv[1:]
        if "KerasHub" in name and (not asked or any(x in name for x in asked)):
            keras.utils.set_random_seed(0)
            model = make()
            tf_deform.make_deformable(model, verbose=False)
            with tempfile.TemporaryDirectory() as folder:
                found = examine(model, pathlib.Path(folder))
            print(line(name, found), flush=True)
