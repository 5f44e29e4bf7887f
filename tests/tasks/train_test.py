# SPDX-License-Identifier: Apache-2.0
"""Tests whole runs: what they write, the same bits twice, kills, failures."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_runs import SETTINGS, SMALL

import tf_deform
import tf_deform_cli
from tf_deform import data, tasks
from tf_deform.tasks import _models, _run, _setup, _train

HOME = pathlib.Path(tf_deform.__file__).parent.parent
COMMAND = f"""
import tf_deform_cli
before = tf_deform_cli._run_task
def run(*arguments):
    from tf_deform.models import FasterRCNN
    FasterRCNN.__init__.__kwdefaults__.update({SMALL})
    return before(*arguments)
tf_deform_cli._run_task = run
exit(tf_deform_cli.main())
"""


def options(backbone, **settings) -> list[str]:
    """Returns the options of a command."""
    found = []
    for name, value in ({"backbone": backbone} | SETTINGS | settings).items():
        name = "--" + name.replace("_", "-")
        if value is True:
            found.append(name)
        elif value is not None:
            found.append(f"{name}={value}")
    return found


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(HOME)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(path: pathlib.Path) -> list[np.ndarray]:
    return keras.saving.load_model(path, compile=False).get_weights()


def assert_same_weights(one: pathlib.Path, other: pathlib.Path) -> None:
    pairs = list(zip(weights(one), weights(other), strict=True))
    assert len(pairs) > 20
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


KEPT = {
    "best.keras",
    "files.json",
    "last.keras",
    "log.txt",
    "metrics.json",
    "pictures",
    "settings.json",
    "tensorboard",
    "versions.json",
}


def test_the_folder_of_a_detector(detector, photographs, backbone):
    out, found = detector
    assert {path.name for path in out.iterdir()} == KEPT | {
        "results.json",
        "truth.json",
    }
    settings = json.loads((out / "settings.json").read_text())
    assert settings["task"] == "train_detector"
    assert settings["backbone"] == str(backbone)
    assert settings["deform"] == "c3-c5"
    assert "out" not in settings
    assert settings.items() >= SETTINGS.items()
    versions = json.loads((out / "versions.json").read_text())
    assert versions["tensorflow"] == tf.__version__
    assert {"pillow", "faster-coco-eval", "keras"} < set(versions)
    files = json.loads((out / "files.json").read_text())
    assert len(files["training"]["files"]) == 7
    for path, digest in files["training"]["files"].items():
        content = pathlib.Path(path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    assert list((out / "tensorboard").rglob("events*"))
    assert (out / "pictures/validation-7.png").exists()
    # Truth and detections stand side by side, below their titles.
    with Image.open(out / "pictures/validation-1.png") as picture:
        assert picture.width == 96 + 8 + 96
        assert 64 < picture.height < 96
    assert (out / "pictures/sampling.png").exists()
    assert json.loads((out / "metrics.json").read_text()).keys() == set(found)


def test_classes_are_joined_by_name(detector):
    """Tests the ids of the validation, which has the classes the other way."""
    out, found = detector
    assert {"AP/blue", "AP/red"} < set(found["validation"])
    model = keras.saving.load_model(out / "best.keras", compile=False)
    assert tuple(model.class_names) == ("blue", "red")
    truth = json.loads((out / "truth.json").read_text())
    names = [item["name"] for item in truth["categories"]]
    assert names == ["blue", "red"]
    first = truth["annotations"][0]
    assert first["bbox"] == [10, 12, 30, 32]
    assert names[first["category_id"] - 1] == "blue"


def test_metrics_are_those_of_pycocotools(detector):
    out, found = detector
    pycocotools = pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(out / "truth.json"))
        results = truth.loadRes(str(out / "results.json"))
        judge = COCOeval(truth, results, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert pycocotools and len(results.anns) > 0
    measures = found["validation"]
    for name, expected in zip(
        ("AP", "AP50", "AP75"), judge.stats, strict=False
    ):
        assert measures[name] == pytest.approx(expected, abs=1e-6)


def test_the_log(detector):
    out, _ = detector
    text = (out / "log.txt").read_text()
    for words in (
        "7 photographs",
        "Classes: blue, red",
        "objects: ",
        "Step 4 of 5, epoch 1 of 1.25, ",
        "Step 5 of 5, epoch 1.25 of 1.25, ",
        " s a step, ",
        # There is no object of this size.
        "val_APl none",
        "  APl             none",
        "Validation of best.keras, the model after step ",
        "val_AP",
        "learning rate 0.02 after 0 steps",
        "Deformable layers of the backbone",
        "Done: ",
    ):
        assert words in text, text
    # Names of classes would fill the lines.
    assert "AP/blue" not in text.split("Validation of best")[0]
    assert "nan" not in text


def test_the_folder_of_a_segmenter(segmenter):
    out, found = segmenter
    assert {path.name for path in out.iterdir()} == KEPT
    files = json.loads((out / "files.json").read_text())
    assert len(files["training"]["files"]) == 2 * 5
    assert len(files["validation"]["files"]) == 2 * 2
    assert 0 <= found["validation"]["mIoU"] <= 1
    assert {"IoU/none", "IoU/blue", "IoU/red"} < set(found["validation"])
    assert found["best"]["val_mIoU"] == pytest.approx(
        found["validation"]["mIoU"], abs=1e-6
    )
    assert len(list((out / "pictures").glob("validation-*.png"))) == 2


@pytest.mark.parametrize("val_every, kept", [(None, 4), (3, 3)])
def test_the_same_bits_after_a_kill(
    val_every, kept, detector, photographs, backbone, tmp_path
):
    """Tests a run that is killed by SIGKILL and resumed without its settings.

    The first run ran in this process, and was validated after each pass.
    """
    out, found = detector
    arguments = [
        *("train", "detect", "--data", f"voc:{photographs}/voc", "--val"),
        f"coco:{photographs}/coco.json,{photographs}/images",
        *options(backbone, val_every=val_every),
        *("--out", tmp_path / "run"),
    ]
    process = start(*arguments)
    end = time.monotonic() + 300
    while not (tmp_path / "run/last.keras").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run/metrics.json").exists()
    process = start("train", "detect", "--out", tmp_path / "run", "--resume")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed == ""
    assert f"Going on after step {kept} of 5" in errors
    assert_same_weights(out / "last.keras", tmp_path / "run/last.keras")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [(logs["step"], logs["epoch"]) for logs in metrics["history"]] == [
        (kept, kept / 4),
        (5, 1.25),
    ]
    if val_every:
        return
    assert_same_weights(out / "best.keras", tmp_path / "run/best.keras")
    for name in ("metrics.json", "results.json", "files.json"):
        assert (out / name).read_text() == (tmp_path / "run" / name).read_text()
    assert read_state(out) == read_state(tmp_path / "run")


def read_state(out: pathlib.Path) -> bytes:
    """Returns what the last file knows besides weights."""
    with zipfile.ZipFile(out / "last.keras") as archive:
        return archive.read("tf_deform/state.json")


# Failures.


@pytest.fixture
def train(photographs, backbone, tmp_path):
    """Returns a function that trains a segmenter in run/."""
    return functools.partial(
        tasks.train_segmenter,
        f"masks:{photographs}/images,{photographs}/masks",
        tmp_path / "run",
        backbone=backbone,
        deform="none",
        **SETTINGS | {"deterministic": False, "steps": 4},
    )


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interruption_is_told_once(
    photographs, backbone, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(_setup, "read_parts", interrupt)
    out = tmp_path / "run"
    arguments = ["train", "detect", "--data", f"voc:{photographs}/voc"]
    arguments += ["--out", str(out), "--backbone", str(backbone)]
    assert tf_deform_cli.main(arguments) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("Interrupted. With --resume")
    assert said.endswith("begins anew, as nothing was saved yet")
    assert (out / "log.txt").read_text().count("Interrupted") == 1
    # Without the folder of a run.
    monkeypatch.setattr(_models, "load", interrupt)
    arguments = ["eval", str(backbone), "--data", f"voc:{photographs}/voc"]
    assert tf_deform_cli.main(arguments) == 1
    assert capsys.readouterr().err == "Interrupted\n"


def test_a_backbone_of_another_size(photographs, tmp_path, capsys):
    image = keras.Input((64, 48, 3))
    maps = keras.layers.Conv2D(4, 3, 4, "same")(image)
    keras.Model(image, maps).save(tmp_path / "fixed.keras")
    arguments = ["train", "detect", "--data", f"voc:{photographs}/voc"]
    arguments += ["--backbone", str(tmp_path / "fixed.keras"), "--size", "96"]
    assert tf_deform_cli.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Expected `size` (--size) to be that of the images of" in said
    assert said.endswith("fixed.keras, 64x48. Received: 96")


def test_a_backbone_without_images(photographs, tmp_path, capsys):
    numbers = keras.Input((10,))
    model = keras.Model(numbers, keras.layers.Dense(2)(numbers))
    model.save(tmp_path / "other.keras")
    arguments = ["train", "detect", "--data", f"voc:{photographs}/voc"]
    arguments += ["--backbone", str(tmp_path / "other.keras"), "--size", "96"]
    assert tf_deform_cli.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "Expected" in capsys.readouterr().err.splitlines()[-1]


def test_seconds_of_a_step(monkeypatch, caplog):
    """Tests a clock: the first step compiles, and validation is no step."""
    now = [0.0]
    monkeypatch.setattr(_train.time, "perf_counter", lambda: now[0])
    log = _train._StepLog(start=6, steps=11, pass_steps=4)
    for seconds in ([9, 0.5, 1.0], [2, 4]):
        log.on_epoch_begin(0)
        for step, passed in enumerate(seconds):
            now[0] += passed
            log.on_train_batch_end(step)
        now[0] += 30
        with caplog.at_level(logging.INFO, "tf_deform"):
            log.on_epoch_end(0, {"loss": 1.23456, "val_APs": float("nan")})
    one, other = caplog.messages
    assert one == (
        "Step 9 of 11, epoch 2.25 of 2.75, 0.75 s a step, 40 s with "
        "validation: loss 1.235, val_APs none"
    )
    assert other.startswith("Step 11 of 11, epoch 2.75 of 2.75, 3 s a step, 36")


def test_seconds_where_the_first_step_is_alone(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(_train.time, "perf_counter", lambda: now[0])
    log = _train._StepLog(start=0, steps=2, pass_steps=4)
    for passed in (9, 2):
        log.on_epoch_begin(0)
        now[0] += passed
        log.on_train_batch_end(0)
        now[0] += 30
        with caplog.at_level(logging.INFO, "tf_deform"):
            log.on_epoch_end(0, {})
    assert " 9 s a step, 39 s with" in caplog.messages[0]
    assert " 2 s a step, 32 s with" in caplog.messages[1]


@pytest.mark.parametrize(
    "quiet, steps, lefts",
    [
        (False, 100, ("24 minutes", "23 minutes")),
        (False, 11, ("2 minutes", "30 s")),
        (True, 100, ()),
    ],
)
def test_a_line_each_minute(quiet, steps, lefts, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(_train.time, "perf_counter", lambda: now[0])
    log = _train._StepLog(start=0, steps=steps, pass_steps=4, quiet=quiet)
    log.on_epoch_begin(0)
    with caplog.at_level(logging.INFO, "tf_deform"):
        for step in range(9):
            now[0] += 15
            log.on_train_batch_end(step)
    # The first step, which compiles, tells nothing of those to come.
    assert caplog.messages == (
        []
        if quiet
        else [
            f"Step {step} of {steps}, 15 s a step: {left} to go, without "
            "validation"
            for step, left in zip((5, 9), lefts)
        ]
    )


def test_the_bar_counts_no_epochs(capsys):
    """Tests Keras' bar, whose epochs need not be passes."""
    bar = _train._Bar()
    bar.set_params({"verbose": 1, "epochs": 3, "steps": 2})
    bar.on_train_begin()
    bar.on_epoch_begin(0)
    bar.on_train_batch_end(0, {"loss": 1.0})
    printed = capsys.readouterr().out
    assert "1/2" in printed and "Epoch" not in printed


def fail_at(monkeypatch, step: int, error: BaseException):
    """Lets training fail after a step."""
    right = _train._Guard.on_train_batch_end

    def fail(self, batch, logs=None):
        right(self, batch, logs)
        if self._step == step:
            raise error

    monkeypatch.setattr(_train._Guard, "on_train_batch_end", fail)


def test_an_interruption_leaves_a_run_to_resume(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(batch_size=3)
    text = (tmp_path / "run/log.txt").read_text()
    assert text.count("Interrupted") == 1
    assert "run goes on from its last validation" in text
    with pytest.raises(FileExistsError, match="or `resume`"):
        train(batch_size=3)
    with pytest.raises(ValueError, match="Expected `batch_size` to be 3"):
        train(batch_size=2, resume=True)
    # What is left out is as it was.
    found = train(batch_size=3, resume=True, steps=None)
    assert [logs["step"] for logs in found["history"]] == [2, 4]
    # A run that is done is judged once more, not trained.
    np.testing.assert_equal(train(batch_size=3, resume=True), found)
    text = (tmp_path / "run/log.txt").read_text()
    assert "All 4 steps are done: the run is judged once more" in text
    # Unless it is to go on for longer.
    for steps in (5, 6):
        longer = train(batch_size=3, resume=True, steps=steps)
    assert [logs["step"] for logs in longer["history"]] == [2, 4, 5, 6]
    np.testing.assert_equal(longer["history"][:2], found["history"])
    text = (tmp_path / "run/log.txt").read_text()
    assert "The run goes on to 5 steps, in place of 4: " in text
    assert "The run goes on to 6 steps, in place of 5: " in text
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["steps"] == 6


def test_too_little_memory(train, tmp_path, monkeypatch):
    error = tf.errors.ResourceExhaustedError(None, None, "OOM of [9,9]\nat x")
    fail_at(monkeypatch, 1, error)
    with pytest.raises(MemoryError, match="2 images of 64 pixels. Received: O"):
        train()
    assert "Traceback" in (tmp_path / "run/log.txt").read_text()


def test_a_loss_that_is_no_number():
    guard = _train._Guard(start=4, steps=9)
    guard.on_train_batch_end(0, {"loss": 1.5})
    with pytest.raises(FloatingPointError, match="Received: nan at step 6. "):
        guard.on_train_batch_end(1, {"loss": np.nan})


def test_weights_that_are_no_numbers(train, tmp_path, monkeypatch):
    """Tests what a loss does not show: on a CPU relu makes zeros of NaN."""
    right = data.segmentation_batches

    def broken(*args, **kwargs):
        return right(*args, **kwargs).enumerate().map(break_third)

    def break_third(step, batch):
        images, masks = batch
        return tf.where(step == 2, np.nan, images), masks

    monkeypatch.setattr(data, "segmentation_batches", broken)
    with pytest.raises(FloatingPointError, match="Expected "):
        train()
    assert not (tmp_path / "run/last.keras").exists()


@pytest.mark.parametrize("change", ["mask", "photograph", "more"])
def test_other_files_in_a_run_to_resume(
    change, photographs, backbone, tmp_path, monkeypatch
):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for i in range(3):
            file = f"{name}/{i}.png"
            (tmp_path / file).write_bytes((photographs / file).read_bytes())
    arguments = {"backbone": backbone, "val": 0.5, **SETTINGS}
    source = f"masks:{tmp_path}/images,{tmp_path}/masks"

    def call(**more):
        monkeypatch.setattr(_setup, "make_backbone", stop)
        with contextlib.suppress(Stopped):
            tasks.train_segmenter(source, tmp_path / "run", **arguments | more)

    call()
    call(resume=True)
    with pytest.raises(ValueError, match="Expected `seed` to be 3"):
        call(resume=True, seed=4)
    # Nothing is saved yet, so a new run may begin, with other settings.
    call(seed=4)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["seed"] == 4
    arguments["seed"] = 4
    first = tmp_path / "images/0.png"
    if change == "mask":
        Image.new("L", (96, 64)).save(tmp_path / "masks/0.png")
        words = "another content of .*/masks/0.png"
    elif change == "photograph":
        Image.new("RGB", (96, 64)).save(first)
        words = "another content of .*/images/0.png"
    else:
        for name in ("images", "masks"):
            file = f"{name}/4.png"
            (tmp_path / file).write_bytes((photographs / file).read_bytes())
        words = "a further one, |none at "
    with pytest.raises(ValueError, match=words):
        call(resume=True)


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


def test_two_processes_in_one_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    with _run.logging_to(tmp_path / "run/log.txt"):
        with pytest.raises(BlockingIOError, match="no other process to train"):
            train()


def test_the_logger_is_as_it_was(detector):
    logger = logging.getLogger("tf_deform")
    assert logger.level == logging.NOTSET
    assert not logger.handlers
    assert keras.mixed_precision.dtype_policy().name == "float32"


def test_letterboxed_boxes_are_reported(detector):
    """Tests that sizes in the log are those that the model sees."""
    out, _ = detector
    text = (out / "log.txt").read_text()
    assert "8 objects: " in text
    assert data.examples_per_epoch  # the package is the one that is tested


@pytest.mark.parametrize("wanted", [None, "bfloat16"])
def test_a_backbone_keeps_its_precision(wanted, backbone, caplog):
    """Tests that the log tells when this contradicts the option."""
    settings = {
        "backbone": str(backbone),
        "weights": None,
        "size": 64,
        "mixed_precision": wanted,
    }
    with caplog.at_level("INFO", "tf_deform"):
        _setup.make_backbone(settings)
    told = "computes in float32, as it was saved" in caplog.text
    assert told == (wanted is not None)
