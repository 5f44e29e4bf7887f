# SPDX-License-Identifier: Apache-2.0
"""Tests the segmentation example: its model, and whole runs."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import digit_scenes
import keras
import numpy as np
import pytest
import segmentation
import tensorflow as tf

from tf_deform import _loader

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "segmentation.py"
SMALL = ["--train", "64", "--val", "4", "--test", "8"]
NO_EXPORT = ["--formats"]


def command(out: pathlib.Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--out", str(out), *SMALL, *arguments]


def run(out: pathlib.Path, *arguments: str) -> str:
    return subprocess.run(
        command(out, *arguments), check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """Runs both default arms; returns the folder and the output."""
    out = tmp_path_factory.mktemp("segmentation") / "run"
    return out, run(out, "--steps", "6")


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_model(image_size: int | None) -> keras.Model:
    """Makes a deformable model that displaces samples, like a trained model."""
    keras.utils.set_random_seed(2)
    model = segmentation.build_model("dcn-v2", image_size)
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.1))
    return model


@pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)
@pytest.mark.parametrize("image_size", [64, None])
def test_xla_gives_the_same_logits(image_size):
    model = make_model(image_size)
    images = random_images(2, 64, 64, 1)
    compiled = tf.function(model, jit_compile=True)(images)
    np.testing.assert_allclose(compiled, model(images), atol=1e-4)


def test_any_image_size_is_the_same_network(tmp_path):
    fixed, free = make_model(64), segmentation.build_model("dcn-v2", None)
    fixed.save_weights(tmp_path / "fixed.weights.h5")
    free.load_weights(tmp_path / "fixed.weights.h5")
    free.save(tmp_path / "free.keras")
    free = keras.saving.load_model(tmp_path / "free.keras")
    predict = tf.function(
        lambda images: free(images, training=False),
        [tf.TensorSpec((None, None, None, 1), "uint8")],
    )
    images = random_images(2, 64, 64, 1)
    np.testing.assert_array_equal(predict(images), fixed(images))
    logits = predict(random_images(2, 48, 80, 1))
    assert logits.shape == (2, 48, 80, digit_scenes.NUM_CLASSES)


def test_writes_everything_that_it_promises(finished):
    out, printed = finished
    for name in ("metrics.json", "predictions.png", "sampling.png"):
        assert (out / name).stat().st_size > 0
    metrics = json.loads((out / "metrics.json").read_text())
    arms = {result["arm"]: result for result in metrics["results"]}
    assert set(arms) == {"plain", "dcn-v2"}
    for result in arms.values():
        assert 0 <= result["miou"] <= 1
        assert result["ms_per_step"] > 0
    assert arms["dcn-v2"]["parameters"] > arms["plain"]["parameters"]
    assert "| dcn-v2 |" in printed
    exported = metrics["exports"]
    assert set(exported) == {
        "saved_model",
        "saved_model_portable",
        "model.onnx",
        "model.tflite",
    }
    for name, differences in exported.items():
        assert (out / name).exists()
        assert differences["output_0"] <= 1e-4


def test_a_finished_run_is_not_trained_again(finished):
    out, _ = finished
    before = (out / "metrics.json").read_text()
    assert run(out, "--steps", "6", *NO_EXPORT).count("done before") == 2
    assert (
        json.loads((out / "metrics.json").read_text())["results"]
        == (json.loads(before)["results"])
    )


def test_other_settings_do_not_continue_a_run(finished):
    out, _ = finished
    result = subprocess.run(
        command(out, "--steps", "7"), capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "Expected" in result.stderr and "Received" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_run_resumes_where_it_was(tmp_path):
    arguments = ("--arms", "dcn-v2", "--steps", "200", *NO_EXPORT)
    whole = run(tmp_path / "whole", *arguments)
    killed = tmp_path / "killed"
    state = killed / "runs" / "dcn-v2-seed0" / "state.weights.h5"
    process = subprocess.Popen(
        command(killed, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    resumed = run(killed, *arguments)
    assert "from step 0 to 200" in whole
    assert "from step 100 to 200" in resumed
    results = [
        json.loads((tmp_path / name / "metrics.json").read_text())["results"]
        for name in ("whole", "killed")
    ]
    assert results[0][0]["miou"] == results[1][0]["miou"]
