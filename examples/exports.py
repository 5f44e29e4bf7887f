# SPDX-License-Identifier: Apache-2.0
"""What the examples share: models written for other programs, and run there."""

import functools
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_deform import export

# What is written, and how.
FORMATS = {
    "saved_model": export.saved_model,
    "saved_model_portable": functools.partial(
        export.saved_model, implementation="portable"
    ),
    "model.onnx": export.onnx,
    "model.tflite": export.litert,
}


def export_all(
    model: keras.Model | Callable[..., Any],
    images: np.ndarray,
    folder: pathlib.Path,
    names: tuple[str, ...] = tuple(FORMATS),
) -> dict[str, dict[str, float]]:
    """Writes a model in several formats and runs each in a fresh process.

    Args:
        model: a model of one input, or a `tf.function`.
        images: its input, for which all of them are compared.
        folder: receives the files.
        names: which of `FORMATS`.

    Returns:
        For each file and each output the largest absolute difference from
        what the model gives here, relative to the largest number.
    """
    outputs = model(images)
    if not isinstance(outputs, dict):
        outputs = {"output_0": outputs}
    serve = pathlib.Path(__file__).with_name("serve.py")
    differences = {}
    for name in names:
        FORMATS[name](model, folder / name, sample=images, verbose=False)
        native = ["--native"] if name == "saved_model" else []
        with tempfile.TemporaryDirectory() as scratch:
            given = pathlib.Path(scratch) / "images.npy"
            answer = pathlib.Path(scratch) / "outputs.npz"
            np.save(given, images)
            subprocess.run(
                [sys.executable, serve, folder / name, given, answer, *native],
                check=True,
            )
            there = dict(np.load(answer))
        differences[name] = {
            key: float(
                np.abs(there[key].astype("float64") - value).max()
                / max(np.abs(value).max(), 1e-30)
            )
            for key, value in keras.tree.map_structure(
                np.asarray, outputs
            ).items()
        }
    return differences


def report(differences: dict[str, dict[str, float]], images: int) -> str:
    """Returns a table of what `export_all` returned."""
    keys = list(next(iter(differences.values())))
    lines = [
        f"| in a fresh process, {images} scenes | {' | '.join(keys)} |",
        f"|---|{'---:|' * len(keys)}",
    ]
    for name, found in differences.items():
        cells = [f"{found[key]:.1g}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
