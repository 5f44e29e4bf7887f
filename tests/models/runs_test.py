# SPDX-License-Identifier: Apache-2.0
"""Tests whole runs of both examples: files, serving, and resuming."""

import csv
import functools
import json
import pathlib
import signal
import subprocess
import sys
from types import ModuleType

import keras
import numpy as np
import pytest
import runs
import segmentation
import tensorflow as tf
from detection import detector, serve, train
from detection_test import encode, random_images

# The scripts, the arms that they compare by default, and what they export. All
# formats of the detector are tested in demo_formats_test.py.
EXAMPLES = {
    "segmentation": (segmentation, ("plain", "dcn-v2"), []),
    "detection": (train, ("plain", "both"), ["--formats", "litert"]),
}
SMALL = ["--train", "64", "--val", "4", "--test", "8"]
SMALL += ["--steps", "8", "--epoch-steps", "2"]


def command(
    script: ModuleType, out: pathlib.Path, *arguments: object
) -> list[str]:
    return list(map(str, [script.__file__, "--out", out, *SMALL, *arguments]))


def run(*arguments: object) -> str:
    return subprocess.run(
        [sys.executable, *command(*arguments)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a function that runs an example's default arms, once."""

    @functools.cache
    def finish(name: str) -> tuple[pathlib.Path, str]:
        out = tmp_path_factory.mktemp(name) / "run"
        script, _, formats = EXAMPLES[name]
        return out, run(script, out, *formats)

    return finish


@pytest.mark.parametrize("name", EXAMPLES)
def test_writes_everything_that_it_promises(name, finished):
    out, printed = finished(name)
    _, (plain, deformable), _ = EXAMPLES[name]
    metrics = json.loads((out / "metrics.json").read_text())
    arms = {result["arm"]: result for result in metrics["results"]}
    assert set(arms) == {plain, deformable}
    assert all(result["ms_per_step"] > 0 for result in arms.values())
    assert arms[deformable]["parameters"] > arms[plain]["parameters"]
    assert f"| {deformable} |" in printed
    assert not list((out / "runs").glob("*/*.weights.h5"))
    if name == "segmentation":
        followed = metrics["follows_sizes"]
        assert followed and all(abs(value) <= 1 for value in followed.values())
    exported = metrics["exports"]
    formats = {"model.tflite"}
    pictures = ["sampling.png", "predictions.png"]
    if name == "segmentation":
        formats |= {"saved_model", "saved_model_portable", "model.onnx"}
        assert all(0 <= result["miou"] <= 1 for result in arms.values())
        for differences in exported.values():
            assert differences["output_0"] <= 1e-4
    else:
        pictures = ["detections.png", "parts.png"]
        for result in arms.values():
            assert 0 <= result["ap75"] <= result["ap50"] <= 1
        # Eight steps teach nothing, and the output says so.
        assert metrics["comparable"] is False
        assert "Too poor to be compared" in printed
        # The differences themselves are tested in demo_formats_test.py.
        for differences in exported.values():
            assert set(differences) == {"boxes", "scores", "labels", "valid"}
        saved = metrics["saved_model"]
        assert saved["detections"] > 0
        assert saved["max_box_difference"] <= 1e-3
        assert saved["max_score_difference"] <= 1e-5
    assert set(exported) == formats
    for file in (*formats, *pictures, "metrics.json"):
        assert (out / file).stat().st_size > 0


def test_serves_images_of_any_size_and_kind(finished):
    out, _ = finished("detection")
    # Without the object itself, its variables would be gone.
    served = tf.saved_model.load(out / "saved_model")
    serve = served.serve
    scene = random_images(64, 64)
    model = keras.saving.load_model(
        out / "runs" / "both-seed0" / "model.keras", compile=False
    )
    here = model.detect(scene[None, ..., None])
    there = serve(tf.constant([encode(scene, "PNG")]))
    np.testing.assert_array_equal(there["valid"], here["valid"])
    np.testing.assert_allclose(there["boxes"], here["boxes"], atol=1e-3)

    sizes = [(64, 64), (1, 1), (7, 300), (301, 33), (65, 63), (200, 150)]
    colour = [random_images(*size, 3) for size in sizes]
    files = [
        encode(pixels, kind, mode)
        for pixels in colour
        for kind, mode in (
            ("JPEG", None),
            ("JPEG", "L"),
            ("PNG", None),
            ("PNG", "L"),
            ("PNG", "RGBA"),
            ("PNG", "LA"),
            ("PNG", "P"),
        )
    ]
    files.append(encode(random_images(20, 30).astype("uint16") * 257, "PNG"))
    found = {
        name: value.numpy() for name, value in serve(tf.constant(files)).items()
    }
    limits = np.repeat([size[::-1] for size in sizes], 7, axis=0)
    limits = np.concatenate((limits, [(30, 20)]))
    assert found["boxes"].shape == (len(files), detector.MAX_DETECTIONS, 4)
    assert np.all(found["boxes"] >= 0)
    assert np.all(found["boxes"] <= np.tile(limits, 2)[:, None])
    for i, count in enumerate(found["valid"]):
        assert set(found["labels"][i, :count]) <= {b"%d" % i for i in range(10)}
        assert np.all(np.diff(found["scores"][i, :count]) <= 0)
    # A file's answer does not depend on its neighbours.
    alone = serve(tf.constant(files[20:21]))
    np.testing.assert_allclose(alone["boxes"][0], found["boxes"][20], atol=1e-3)

    empty = serve(tf.zeros((0,), "string"))
    assert empty["boxes"].shape == (0, detector.MAX_DETECTIONS, 4)
    assert empty["valid"].shape == (0,)
    with pytest.raises(tf.errors.InvalidArgumentError, match="PNG"):
        serve(tf.constant([files[0], b"no image"]))


@pytest.fixture
def call(monkeypatch, capsys):
    """Returns a function that runs a script here; returns what it printed.

    A script that ends with an error ends with one clear line.
    """

    def main(script: ModuleType, *arguments: object, fails: bool) -> str:
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        if not fails:
            script.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            script.main()
        assert error.value.code
        return f"{capsys.readouterr().err}{error.value}"

    return main


def test_serve_names_the_file_that_is_no_image(finished, call, tmp_path):
    out, _ = finished("detection")
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.png"
    good.write_bytes(encode(random_images(50, 40), "JPEG"))
    bad.write_bytes(b"no image")
    arguments = [out / "saved_model", good, bad]
    arguments += ["--out", tmp_path / "boxes.json"]
    said = call(serve, "serve.py", *arguments, fails=True)
    assert "Expected a JPEG or PNG" in said and "bad.png" in said
    assert not list(tmp_path.glob("boxes.json*"))


def test_a_finished_run_is_not_trained_again(finished, call):
    out, _ = finished("segmentation")
    before = json.loads((out / "metrics.json").read_text())["results"]
    arguments = command(segmentation, out, "--formats")
    printed = call(segmentation, *arguments, fails=False)
    assert printed.count("done before") == 2
    after = json.loads((out / "metrics.json").read_text())["results"]
    assert after == before


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("detection", ["--steps", 7]),  # no multiple of an epoch's
        ("detection", ["--train", 63]),
        ("segmentation", ["--steps", 22]),
    ],
)
def test_other_settings_do_not_continue_a_run(name, arguments, finished, call):
    out, _ = finished(name)
    script = EXAMPLES[name][0]
    said = call(script, *command(script, out, *arguments), fails=True)
    assert "Expected" in said and "Received" in said


# Runs a script after a change of its module `runs`.
CHANGED = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[2]))
import runs

def kill(self, batch, logs=None):
    if int(self.model.optimizer.iterations) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

exec(sys.argv[1])
sys.argv[:] = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The run ends in the middle of its third epoch, or after training: it neither
# draws nor exports.
KILLED = "runs.SaveState.on_train_batch_end = kill"
TRAINED = "runs.report = lambda *_: sys.exit(0)"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_killed_run_resumes_where_it_was(name, finished, tmp_path):
    whole, _ = finished(name)
    script, (_, arm), _ = EXAMPLES[name]
    arguments = command(script, tmp_path, "--arms", arm)
    folder = pathlib.Path("runs") / f"{arm}-seed0"
    for change, status, start in (
        (KILLED, -signal.SIGKILL, 0),
        (TRAINED, 0, 4),
    ):
        assert not (tmp_path / folder / "result.json").exists()
        result = subprocess.run(
            [sys.executable, "-uc", CHANGED, change, runs.__file__, *arguments],
            capture_output=True,
            text=True,
        )
        assert result.returncode == status, result.stderr
        assert f"from step {start} to 8" in result.stdout

    logs, results, weights = [], [], []
    for out in (whole / folder, tmp_path / folder):
        with open(out / "log.csv") as file:
            logs.append(list(csv.DictReader(file)))
        results.append(json.loads((out / "result.json").read_text()))
        model = keras.saving.load_model(out / "model.keras", compile=False)
        weights.append([item.value.numpy() for item in model.variables])
    assert [row["epoch"] for row in logs[1]] == [str(i) for i in range(4)]
    if name == "segmentation":  # sums may depend on threads
        assert results[0]["miou"] == results[1]["miou"]
        return
    for row in [*logs[0], *logs[1]]:
        del row["seconds"]
    for result in results:
        del result["ms_per_step"]
    assert logs[0] == logs[1]
    assert results[0] == results[1]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
