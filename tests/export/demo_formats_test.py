# SPDX-License-Identifier: Apache-2.0
"""Tests that the demo's models give the same results in every format.

Each file is read by a process that knows nothing else of the model: ONNX and
LiteRT files without TensorFlow, portable SavedModels without the package.
"""

import numpy as np
import pytest
from detectors import liven
from exported import FILES, write

from tf_deform.demo import _digit_models

# Reads files in the folder in turn, and writes what each computes.
READ = """
import sys

import numpy as np

folder, *kinds = sys.argv[1:]
images = np.load(f"{folder}/images.npy")


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images})))


def litert(path):
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(path).get_signature_runner()(image=images)


def portable(path):
    import tensorflow as tf

    serve = tf.saved_model.load(path).signatures["serving_default"]
    return {k: v.numpy() for k, v in serve(image=tf.constant(images)).items()}


def native(path):
    import tf_deform

    return portable(path)


for kind, name in zip(kinds[::2], kinds[1::2]):
    found = globals()[kind](f"{folder}/{name}")
    np.savez(f"{folder}/{kind}.npz", **found)
    assert ("tensorflow" in sys.modules) == (kind in ("portable", "native"))
    assert ("tf_deform" in sys.modules) == (kind == "native")
"""


def make_images():
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (3, 64, 64, 3)).astype("float32")


@pytest.mark.parametrize("subject", ["segmenter", "detector"])
def test_every_format_in_a_fresh_process(
    subject, tmp_path, run_python_as_it_is
):
    images = make_images()
    np.save(tmp_path / "images.npy", images)
    if subject == "segmenter":
        model = liven(_digit_models.build_segmenter("dcn-v2", 2))
        expected = {"output_0": model.predict_on_batch(images)}
    else:
        model = liven(_digit_models.build_detector("both", 2))
        expected = model.detect(images)
        assert expected["valid"].min() > 3
    for kind, name in FILES.items():
        write(kind, model, tmp_path / name, sample=images)
    for kinds in (("onnx", "litert"), ("portable", "native")):
        arguments = [word for kind in kinds for word in (kind, FILES[kind])]
        run_python_as_it_is(READ, tmp_path, *arguments)
    for kind in FILES:
        found = np.load(tmp_path / f"{kind}.npz")
        assert set(found) == set(expected)
        for name, value in expected.items():
            if value.dtype.kind == "i":
                np.testing.assert_array_equal(found[name], value, kind)
            else:
                largest = np.abs(value).max()
                np.testing.assert_allclose(
                    found[name], value, 0, 1e-4 * largest, err_msg=kind
                )
