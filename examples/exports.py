# SPDX-License-Identifier: Apache-2.0
"""Writes models for other programs and runs them, for all examples."""

import functools
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tf_deform import export

# Maps each format to its file or folder.
FORMATS = {
    "native": "saved_model",
    "portable": "saved_model_portable",
    "onnx": "model.onnx",
    "litert": "model.tflite",
}


def export_all(
    model: keras.Model | Callable[..., Any],
    images: np.ndarray,
    folder: pathlib.Path,
    formats: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Writes a model in several formats and runs each in a fresh process.

    Args:
        model: a model of one input, or a `tf.function`.
        images: its input, for which all formats are compared.
        folder: receives the files.
        formats: the chosen keys of `FORMATS`.

    Returns:
        For each file and each output the largest absolute difference from the
        model's output here, relative to the largest number; for integers the
        share of elements that differ.
    """
    outputs = model(images)
    if not isinstance(outputs, dict):
        outputs = {"output_0": outputs}
    expected = {name: np.asarray(value) for name, value in outputs.items()}
    differences = {}
    for kind in formats:
        path = folder / FORMATS[kind]
        if kind in ("native", "portable"):
            write = functools.partial(export.saved_model, implementation=kind)
        else:
            write = getattr(export, kind)
        write(model, path, sample=images, verbose=False)
        there = run_alone(path, images, native=kind == "native")
        differences[path.name] = {
            name: difference(value, there[name])
            for name, value in expected.items()
        }
    return differences


def run_alone(
    path: pathlib.Path, images: np.ndarray, native: bool
) -> dict[str, np.ndarray]:
    """Runs an exported model with `serve.py` in a fresh process."""
    serve = pathlib.Path(__file__).with_name("serve.py")
    with tempfile.TemporaryDirectory() as scratch:
        given = pathlib.Path(scratch) / "images.npy"
        answer = pathlib.Path(scratch) / "outputs.npz"
        np.save(given, images)
        command = [sys.executable, serve, path, given, answer]
        subprocess.run(command + ["--native"] * native, check=True)
        return dict(np.load(answer))


def difference(expected: np.ndarray, received: np.ndarray) -> float:
    if expected.dtype.kind in "iu":
        return float(np.mean(expected != received))
    largest = np.abs(expected).max()
    return float(np.abs(expected - received).max() / largest)


def report(differences: dict[str, dict[str, float]]) -> str:
    """Returns a table of the differences that `export_all` returned."""
    if not differences:
        return "(none)"
    keys = list(next(iter(differences.values())))
    lines = [
        f"| in a fresh process | {' | '.join(keys)} |",
        f"|---|{'---:|' * len(keys)}",
    ]
    for name, found in differences.items():
        cells = [f"{found[key]:.1g}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
