# SPDX-License-Identifier: Apache-2.0
"""Tests the examples on few scenes: files, printing, resuming."""

import functools
import json
import re
import sys
import zipfile

import detection
import keras
import numpy as np
import pytest
import segmentation
import tensorflow as tf

import tf_deform
from tf_deform import demo, tasks, training

EXAMPLES = {"segmentation": segmentation, "detection": detection}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Returns a function that runs an example; returns what it printed."""
    few = functools.partial(demo.digit_scenes, train=11, val=5, test=7)
    monkeypatch.setattr(demo, "digit_scenes", few)

    def run(name, *arguments):
        script = EXAMPLES[name]
        monkeypatch.setattr(script, "EPOCH", 2)
        monkeypatch.setattr(script, "BATCH", 5)
        words = [script.__file__, "--out", tmp_path / "run", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        script.main()
        return capsys.readouterr().out

    return run


def read_history(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("tf_deform/state.json"))["history"]


@pytest.mark.parametrize(
    "name, measure",
    [
        ("segmentation", r"mIoU on unseen scenes: 0\.\d{3}"),
        ("detection", r"On unseen scenes: AP 0\.\d{3}, AP50 0\.\d{3}"),
    ],
)
def test_what_it_writes(name, measure, call, tmp_path):
    out = tmp_path / "run"
    printed = call(name, "--epochs", 1)
    assert re.search(measure, printed)
    model = keras.saving.load_model(out / "best.keras")
    assert len(tf_deform.deformable_layers(model.backbone)) == 2
    if name == "detection":
        assert model.pooling == "deform"
    assert (out / "model.onnx").stat().st_size > 0
    (scene, *_) = sorted((out / "scenes/test/images").iterdir())
    served = tf.saved_model.load(out / "served")
    found = served.serve(tf.constant([scene.read_bytes()]))
    image = np.stack([np.asarray(keras.utils.load_img(scene))])
    if name == "segmentation":
        ids = model.predict_on_batch(image.astype("float32")).argmax(-1)
        assert np.mean(found["ids"] == ids) > 0.999
    else:
        expected = model.predict_image(image[0])
        assert found["valid"].numpy() == [len(expected["scores"])]
        scores = found["scores"][0, : len(expected["scores"])]
        np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_repeated_call_goes_on(name, call, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(
        tasks, "export_model", lambda model, path: exported.append(path.name)
    )
    call(name, "--plain", "--epochs", 1)
    last = tmp_path / "run/last.keras"
    first = read_history(last)
    model = keras.saving.load_model(tmp_path / "run/best.keras")
    assert not tf_deform.deformable_layers(model)
    assert getattr(model, "pooling", "plain") == "plain"
    call(name, "--plain", "--epochs", 2)
    history = read_history(last)
    assert [record["step"] for record in history] == [2, 4]
    assert history[:1] == first
    assert exported == 2 * ["served", "model.onnx"]
    if name == "segmentation":  # Nothing is left to train.
        monkeypatch.setattr(training.BestAndLast, "on_epoch_end", None)
        call(name, "--plain", "--epochs", 2)
