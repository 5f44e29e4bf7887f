# SPDX-License-Identifier: Apache-2.0
"""Tests what Keras 2 and 3 read of each other: `docs/compatibility.md`.

Read are the golden files of both, files of the Keras at hand, and files that
this environment's other Keras writes, if it has one.
"""

from __future__ import annotations

import importlib.util
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from keras_files import KINDS, make, own_layers, run, serving, train, write

import tf_deform
from tf_deform._keras import KERAS_2, keras
from tf_deform._loader import op_library

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/build/golden"

# Ways to load, as the documentation calls them.
LOAD = "`load_model`"
ANEW = "`load_model(compile=False)`"
WEIGHTS = "`load_weights`"
SERVE = "`tf.saved_model.load`"
RESTORE = "`restore`"
PLAIN = "`tf_deform.load_plain_weights`"

# For each format: how Keras 3 reads the files of Keras 2, and Keras 2 those of
# Keras 3; then how each reads its own. None: that Keras does not write it.
WAYS = {
    "model.keras": (WEIGHTS, WEIGHTS, LOAD, LOAD),
    "model.h5": (ANEW, WEIGHTS, LOAD, ANEW),
    "model.weights.h5": (WEIGHTS,) * 4,
    "weights.h5": (WEIGHTS, None, WEIGHTS, None),
    "saved": (SERVE, None, LOAD, None),
    "exported": (SERVE,) * 4,
    "serving": (SERVE,) * 4,
    "checkpoint": (PLAIN, PLAIN, RESTORE, RESTORE),
    "layers": (RESTORE,) * 4,
}
# What holds the graph of a model, and so the names of its ops.
GRAPHS = ("saved", "exported", "serving")
# A row of the documentation for each format.
ROWS = {
    "model.keras": '`model.save("m.keras")`',
    "model.h5": '`model.save("m.h5")`',
    "model.weights.h5": '`model.save_weights("m.weights.h5")`',
    "weights.h5": '`model.save_weights("m.h5")`',
    "saved": '`model.save("folder")`',
    "exported": '`model.export("folder")`',
    "serving": "`tf_deform.export.saved_model`",
    "checkpoint": "`tf.train.Checkpoint` of a model",
    "layers": "`tf.train.Checkpoint` of our layers",
}


def way_of(name: str, kind: str, writer: int) -> str | None:
    """Returns how this Keras reads a file."""
    reader = 2 if KERAS_2 else 3
    columns = [(2, 3), (3, 2), (2, 2), (3, 3)]
    way = WAYS[name][columns.index((writer, reader))]
    if (name, kind, writer, reader) == ("model.h5", "regions", 2, 3):
        return WEIGHTS  # Keras 3 does not read calls with several tensors.
    if name == "layers" and kind == "stock":
        return None
    return way


@pytest.fixture(
    scope="module", params=["golden 2", "golden 3", "this", "other"]
)
def written(request, tmp_path_factory, run_python_as_it_is):
    """Returns a folder of files, its writer (Keras 2 or 3), and whether its
    graphs of our layers have native ops.
    """
    folder = tmp_path_factory.mktemp("files")
    if request.param == "this":
        for kind in KINDS:
            write(folder / kind, kind)
        return folder, 2 if KERAS_2 else 3, op_library() is not None
    if request.param != "other":
        writer = int(request.param[-1])
        with tarfile.open(GOLDEN / f"keras_{writer}.tar.xz") as archive:
            archive.extractall(folder)
        return folder, writer, True
    name = "keras" if keras.__name__ == "tf_keras" else "tf_keras"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = (ROOT / "tests/lib/keras_files.py").read_text()
    use = "0" if name == "keras" else "1"
    run_python_as_it_is(script, folder, TF_USE_LEGACY_KERAS=use)
    return folder, 3 if KERAS_2 else 2, op_library() is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
def test_a_file(name, kind, written):
    folder, writer, is_native = written
    way = way_of(name, kind, writer)
    if way is None:
        return
    is_native = is_native and name in GRAPHS and kind != "stock"
    if is_native and op_library() is None:
        pytest.skip("a package without libraries runs no native graph")
    path = folder / kind / name
    expected = np.load(folder / kind / "expected.npy")

    def check(model):
        np.testing.assert_allclose(run(model, kind), expected, 1e-5, 1e-6)

    if way == SERVE:
        check(serving(path))
        return
    if way in (RESTORE, PLAIN):
        model = make(kind)
        parts = {"model": model}
        if name == "layers":
            # All other weights come from another file.
            model.load_weights(str(path.with_name("model.weights.h5")))
            parts = own_layers(model)
            for layer in parts.values():
                layer.set_weights([0.01 + 0 * x for x in layer.get_weights()])
        status = tf.train.Checkpoint(**parts).read(str(path))
        if way == PLAIN:
            with pytest.raises(AssertionError):
                status.assert_existing_objects_matched()
            tf_deform.load_plain_weights(model, path)
            check(model)
            return
        status.assert_existing_objects_matched()
        check(model)
        return
    if way == WEIGHTS:
        model = make(kind)
        model.load_weights(str(path))
        check(model)
        if name in ("model.keras", "model.h5"):
            with pytest.raises(TypeError):
                keras.models.load_model(path, compile=False)
        return
    model = keras.models.load_model(path, compile=way != ANEW)
    check(model)
    if way == ANEW:
        model.compile("sgd", "mean_squared_error")
    train(model, kind)


def test_the_table():
    """Tests the table of the documentation."""
    lines = [
        "| written by | Keras 2's, in Keras 3 | Keras 3's, in Keras 2 |",
        "|---|---|---|",
    ]
    for name, ways in WAYS.items():
        cells = [way or "not written" for way in ways[:2]]
        lines.append(f"| {ROWS[name]} | {' | '.join(cells)} |")
    text = (ROOT / "docs/compatibility.md").read_text()
    assert "\n".join(lines) in text, "\n".join(lines)
