# SPDX-License-Identifier: Apache-2.0
"""Tests that wrong arguments are answered in words, without TensorFlow."""

import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

import tf_deform
import tf_deform_cli
from tf_deform import _run_folder, _settings

HOME = pathlib.Path(tf_deform.__file__).parent.parent
DETECT, SEGMENT = ["train", "detect"], ["train", "segment"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> pathlib.Path:
    """Makes a working folder with files to name."""
    for name in ("photos", "labels", "done", "empty"):
        (tmp_path / name).mkdir()
    for name in ("boxes.json", "one.png", "m.keras", "done/notes.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Called(NamedTuple):
    """Holds the end of a command, and what it would have run."""

    status: int
    stdout: str
    stderr: str
    found: dict | None


@pytest.fixture
def call(files, monkeypatch, capsys):
    """Returns a function that runs the command up to its task."""

    def run(*arguments) -> Called:
        tasks = []
        monkeypatch.setattr(
            tf_deform_cli, "_run_task", lambda *task: tasks.append(task) or 0
        )
        try:
            status = tf_deform_cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
        found = tasks[0][1] if tasks else None
        return Called(status, *capsys.readouterr(), found)

    return run


GOOD = ["--data", "voc:photos", "--out", "run"]
WRONG = {
    "no command": (["train"], "are required: detect|segment"),
    "no such command": (
        ["train", "classify"],
        "argument detect|segment: invalid choice: 'classify'",
    ),
    "no out": ([*DETECT, "--data", "voc:photos"], "required: --out"),
    "no data": ([*DETECT, "--out", "run"], "Expected --data. Received: none"),
    "resume without data": (
        [*DETECT, "--out", "empty", "--resume"],
        "Expected --data, as there is no run in ",
    ),
    "a misspelled option": (
        [*DETECT, *GOOD, "--batchsize", "4", "--vall=0.5"],
        "unrecognized arguments: --batchsize 4 --vall=0.5. Did you mean "
        "--batch-size, --val?",
    ),
    "form": (
        [*DETECT, "--out", "run", "--data", "csv:photos"],
        "Expected voc:ROOT or voc:ROOT:PART or coco:FILE or "
        "coco:FILE,IMAGES or "
        "yolo:ROOT or yolo:ROOT:PART. Received: 'csv:photos'",
    ),
    "no form": ([*DETECT, "--out", "run", "--data", "photos"], "'photos'"),
    "no root": (
        [*DETECT, "--out", "run", "--data", "voc:foto"],
        "/foto is none. Received: 'voc:foto'",
    ),
    "no root of a split": (
        [*DETECT, "--out", "run", "--data", "voc:foto:train"],
        "/foto is none",
    ),
    "a form of another task": (
        [*DETECT, "--out", "run", "--data", "masks:photos,labels"],
        "Expected voc:ROOT",
    ),
    "one folder": (
        [*SEGMENT, "--out", "run", "--data", "masks:photos"],
        "Expected masks:IMAGES,LABELS. Received",
    ),
    "no labels": (
        [*SEGMENT, "--out", "run", "--data", "masks:photos,masks"],
        "whose LABELS is a folder",
    ),
    "no file of boxes": (
        [*DETECT, "--out", "run", "--data", "coco:photos,photos"],
        "whose FILE is a file",
    ),
    "share": (
        [*DETECT, *GOOD, "--val", "20"],
        "a share above 0 and below 1, such as 0.2, or photographs, voc:ROOT",
    ),
    "share not a number": ([*DETECT, *GOOD, "--val", "nan"], "a share above"),
    "validation": ([*DETECT, *GOOD, "--val", "voc:no"], "/no is none"),
    "size": ([*DETECT, *GOOD, "--size", "650"], "a multiple of 32, 64 to 8192"),
    "size too small": ([*SEGMENT, "--size", "32"], "'32'"),
    "batch": ([*DETECT, *GOOD, "--batch-size", "0"], "a whole number"),
    "batch not whole": ([*DETECT, *GOOD, "--batch-size", "2.5"], "'2.5'"),
    "rate": ([*DETECT, *GOOD, "--lr", "0"], "a number above 0"),
    "rate infinite": ([*DETECT, *GOOD, "--lr", "inf"], "a number above 0"),
    "rate not a number": ([*DETECT, *GOOD, "--lr=nan"], "Received: 'nan'"),
    "steps": ([*DETECT, *GOOD, "--steps", "-3"], "--steps"),
    "validations": ([*SEGMENT, "--val-every", "0"], "of at least 1. Received"),
    "scales": ([*DETECT, *GOOD, "--anchor-scales", "4,-2"], "above 0 and at"),
    "scales twice": ([*DETECT, *GOOD, "--anchor-scales", "4,4"], "all differ"),
    "scales of a segmenter": (
        [*SEGMENT, "--data", "masks:photos,labels", "--out", "r"]
        + ["--anchor-scales", "4"],
        "unrecognized arguments: --anchor-scales 4",
    ),
    "seed": ([*DETECT, *GOOD, "--seed", "1e3"], "a whole number 0 to"),
    "stages": ([*DETECT, *GOOD, "--deform", "c5-c3"], "such as c3-c5"),
    "stages by name": ([*DETECT, *GOOD, "--deform", "all"], "such as c3-c5"),
    "backbone": (
        [*DETECT, *GOOD, "--backbone", "no/m.keras"],
        "Expected a file that exists",
    ),
    "weights": (
        [*DETECT, *GOOD, "--weights", "w.h5"],
        "Expected imagenet, none or a file that exists. Received: 'w.h5'",
    ),
    "pooling": ([*DETECT, *GOOD, "--pooling", "max"], "align or deform or"),
    "pooling of rfcn": (
        [*DETECT, *GOOD, "--model", "rfcn", "--pooling", "deform"],
        "Expected --pooling for faster-rcnn alone",
    ),
    "stride": (
        [*SEGMENT, "--output-stride", "4"],
        "Expected 8 or 16 or 32. Received: '4'",
    ),
    "classes": ([*DETECT, *GOOD, "--classes", "cat,cat"], "all differ"),
    "precision": (
        [*DETECT, *GOOD, "--mixed-precision=float64"],
        "bfloat16 or float16",
    ),
    "an option of another task": (
        [*SEGMENT, "--data", "masks:photos,labels", "--out", "r", "--crowds=x"],
        "unrecognized arguments: --crowds=x",
    ),
    "out with other things": (
        [*DETECT, "--data", "voc:photos", "--out", "done"],
        "with other things",
    ),
    "out is a file": (
        [*DETECT, "--data", "voc:photos", "--out", "one.png", "--resume"],
        "a file with other things",
    ),
    "no model": (["eval", "no.keras", "--data", "voc:photos"], "MODEL"),
    "eval without data": (["eval", "m.keras"], "required: --data"),
    "no picture": (["show", "m.keras", "no.png", "--out", "x"], "'no.png'"),
    "score": (
        ["show", "m.keras", "one.png", "--out", "x", "--score", "2"],
        "of at least 0 and at most 1",
    ),
    "format": (["export", "m.keras", "m.pt"], "model.onnx, model.tflite or"),
    "folder of the export": (
        ["export", "m.keras", "no/m.onnx"],
        "a path in a folder that exists",
    ),
    "portable": (
        ["export", "m.keras", "m.tflite", "--portable"],
        "Expected --portable for a folder alone",
    ),
    "base": (
        [*DETECT, "--out=r", "--data=yolo:photos", "--base=1"],
        "Expected --base for voc photographs alone. Received: yolo:",
    ),
    "first id": (
        [*DETECT, *GOOD, "--first-id=1"],
        "Expected --first-id for yolo photographs alone. Received: voc:",
    ),
    "sample": (
        ["export", "m.keras", "m.onnx", "--sample", "m.keras", "no.jpg"],
        "Expected a file that exists. Received: 'no.jpg'",
    ),
    "tolerance": (
        ["export", "m.keras", "m.onnx", "--tolerance", "1.5"],
        "Expected a number above 0 and at most 1. Received: '1.5'",
    ),
    "demo": (["demo", "birds"], "Expected trees or digits"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, call):
    arguments, words = WRONG[case]
    result = call(*arguments)
    assert result.status == 2, result.stderr
    said, more = result.stderr.splitlines()
    assert said.startswith(("tf-deform: ", "tf-deform "))
    assert words in said
    assert re.fullmatch(r"See `tf-deform [a-z ]*--help`", more)
    assert (result.stdout, result.found) == ("", None)


@pytest.mark.parametrize("arguments", [DETECT, SEGMENT, ["eval"], ["demo"]])
def test_help(arguments, call):
    result = call(*arguments, "--help")
    assert result.status == 0
    assert result.stderr == ""
    assert "--out FOLDER" in result.stdout
    assert "The exit status is 0 if all is done" in result.stdout


def test_tensorflow_is_not_loaded_before_the_task(files):
    """Tests exit statuses where TensorFlow is broken."""
    (files / "broken").mkdir()
    for name in ("tensorflow", "keras", "numpy"):
        (files / f"broken/{name}.py").write_text("raise ImportError('absent')")
    command = "import tf_deform_cli as c; exit(c.main())"

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", command, *arguments],
            env=os.environ | {"PYTHONPATH": f"broken{os.pathsep}{HOME}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    wrong = run(*DETECT, *GOOD, "--size", "7")
    assert wrong.returncode == 2
    assert "absent" not in wrong.stderr
    right = run(*DETECT, *GOOD, "--size", "96")
    assert right.returncode == 1
    assert "absent" in right.stderr
    assert "Traceback" not in right.stderr
    assert not (files / "run").exists()


def test_what_the_task_gets(call, files):
    options = ["--lr", ".1", "--val-every", "50", "--anchor-scales", "2,4.5"]
    found = call(*DETECT, *GOOD, "--mixed-precision", *options).found
    assert found == _settings.defaults("train_detector") | {
        "data": f"voc:{files}/photos",
        "out": f"{files}/run",
        "mixed_precision": "bfloat16",
        "lr": 0.1,
        "val_every": 50,
        "anchor_scales": [2.0, 4.5],
    }
    found = call("show", "m.keras", "one.png", "photos", "--out", "p").found
    assert found["images"] == [f"{files}/one.png", f"{files}/photos"]


@pytest.fixture
def kept(files) -> pathlib.Path:
    """Makes the folder of a run that was killed, with settings of its own."""
    settings = _settings.defaults("train_detector") | {
        "task": "train_detector",
        "data": f"voc:{files / 'photos'}",
        "size": 96,
        "classes": ["cat", "dog"],
    }
    (files / "run").mkdir()
    (files / "run/settings.json").write_text(json.dumps(settings))
    (files / "run/files.json").write_text("{}")
    (files / "run/log.txt").write_text("")
    (files / "run/last.keras").write_text("")
    return files / "run"


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ([*DETECT, *GOOD], 2, "or --resume. Received: "),
        ([*DETECT, *GOOD, "--resume"], 0, ""),
        ([*DETECT, "--out", "run", "--resume"], 0, ""),
        (
            [*DETECT, "--out=run", "--resume", "--classes=cat,dog"],
            0,
            "",
        ),
        (
            [*DETECT, *GOOD, "--resume", "--batch-size", "4"],
            2,
            "Expected --batch-size to be 2, as in the run in ",
        ),
        (
            [*DETECT, *GOOD, "--resume", "--size", "128"],
            2,
            "Expected --size to be 96, as in the run in ",
        ),
        (
            [*DETECT, "--out=run", "--resume", "--data=voc:labels"],
            2,
            "Expected --data to be 'voc:",
        ),
        (
            [*DETECT, "--out=run", "--resume", "--classes=dog,cat"],
            2,
            "Expected --classes to be ['cat', 'dog']",
        ),
        (
            [*DETECT, "--out=run", "--resume", "--steps=90"],
            2,
            "Expected --steps to be left out, as in the run in ",
        ),
        (
            [*DETECT, "--out=run", "--resume", "--epochs=11"],
            2,
            "Expected --epochs to be 12 or more, as in the run in ",
        ),
        (
            [*SEGMENT, "--out", "run", "--resume"],
            2,
            "to have a run of train_segmenter. Received: one of train_detector",
        ),
    ],
)
def test_the_settings_of_a_run_to_resume(arguments, status, words, call, kept):
    result = call(*arguments)
    assert result.status == status
    assert words in result.stderr
    if status == 0:
        assert (result.found["size"], result.found["resume"]) == (96, True)


def test_a_run_to_resume_may_grow(call, kept):
    found = call(*DETECT, "--out=run", "--resume", "--epochs=13").found
    assert (found["epochs"], found["steps"]) == (13, None)
    settings = json.loads((kept / "settings.json").read_text())
    settings["steps"] = 200
    (kept / "settings.json").write_text(json.dumps(settings))
    found = call(*DETECT, "--out=run", "--resume", "--steps=201").found
    assert found["steps"] == 201
    # Epochs do not count in this run.
    assert call(*DETECT, "--out=run", "--resume", "--epochs=13").status == 2


def test_a_run_that_saved_nothing_may_begin_anew(call, kept):
    """Tests what is left where the weights could not be fetched."""
    (kept / "last.keras").unlink()
    assert call(*DETECT, *GOOD, "--weights", "none").status == 0
    assert call(*DETECT, "--out=run", "--resume").found["size"] == 96


def test_a_run_from_before_there_was_a_setting(call, kept):
    settings = json.loads((kept / "settings.json").read_text())
    for name in ("val_every", "anchor_scales"):
        del settings[name]
    (kept / "settings.json").write_text(json.dumps(settings))
    found = call(*DETECT, "--out=run", "--resume").found
    assert (found["val_every"], found["anchor_scales"]) == (None, None)
    result = call(*DETECT, "--out=run", "--resume", "--anchor-scales=4")
    assert "Expected --anchor-scales to be left out" in result.stderr


def test_a_run_whose_photographs_are_gone(call, kept, files):
    (files / "photos").rmdir()
    result = call(*DETECT, "--out", "run", "--resume")
    assert result.status == 2
    assert "whose ROOT is a folder" in result.stderr


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_broken_settings(text, call, kept):
    (kept / "settings.json").write_text(text)
    result = call(*DETECT, *GOOD, "--resume")
    assert result.status == 2
    assert "to be the settings of a run" in result.stderr


def test_what_a_run_leaves_that_had_no_photographs_yet(call, kept):
    """Tests a kill before the settings, and an end by broken photographs."""
    (kept / "last.keras").unlink()
    (kept / "files.json").unlink()
    assert call(*DETECT, *GOOD, "--skip-broken").status == 0
    (kept / "settings.json").unlink()
    (kept / ".tf_deform-partial-0a1b2c3d").mkdir()
    assert call(*DETECT, *GOOD).status == 0


# The functions of Python.


@pytest.mark.parametrize("task", _settings.TASKS)
def test_functions_take_the_settings(task):
    """Tests names, defaults and order of the arguments of the functions."""
    from tf_deform import tasks

    parameters = inspect.signature(getattr(tasks, task)).parameters
    found = {
        name: ... if p.default is p.empty else p.default
        for name, p in parameters.items()
    }
    expected = {
        name: setting.default for name, setting in _settings.TASKS[task].items()
    }
    if "epochs" in expected:
        expected["epochs"] = None  # A run to resume may have had others.
    assert found == expected


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("size", 100, "Expected `size` to be a multiple of 32"),
        ("size", 96.0, "Received: 96.0"),
        ("lr", True, "Expected `lr` to be a number"),
        ("jit", 1, "Expected `jit` to be True or False"),
        ("val", True, "Expected `val` to be a share"),
        ("weights", 3, "Expected `weights` to be imagenet"),
        ("deform", None, "Expected `deform` to be none or stages"),
        ("classes", ["a", 3], "Expected `classes` to be names"),
        ("classes", 3, "Expected `classes` to be names"),
        ("out", 7, "Expected `out` to be a path"),
        ("backbone", "res net", "such as resnet50, or a .keras file"),
        ("val_every", 2.5, "Expected `val_every` to be a whole number"),
        ("anchor_scales", [4, "x"], "Expected `anchor_scales` to be numbers"),
        ("anchor_scales", [], "Expected `anchor_scales` to be numbers"),
        ("anchor_scales", True, "Expected `anchor_scales` to be numbers"),
    ],
)
def test_wrong_values_of_python(name, value, words):
    with pytest.raises(ValueError, match=words):
        _settings.check("train_detector", {name: value})


def test_paths_become_absolute(tmp_path, monkeypatch):
    """Tests that a run can go on from another working folder."""
    (tmp_path / "a,b").mkdir()
    (tmp_path / "c:d").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"data": "voc:c:d", "val": "0.25", "out": "x/../y"}
    assert _settings.check("train_detector", given) == {
        "data": f"voc:{tmp_path}/c:d",
        "val": 0.25,
        "out": f"{tmp_path}/y",
    }
    for name in ("a,b,c:d", "c:d,a,b", "c:d/*.jpg,a,b/*_ids.png"):
        data = {"data": f"masks:{name}"}
        found = _settings.check("train_segmenter", data)["data"]
        halves = name.replace("a,b", f"{tmp_path}/a,b")
        assert found == f"masks:{halves.replace('c:d', f'{tmp_path}/c:d')}"
    found = _settings.check("train_detector", {"data": "voc:c:d:val"})
    assert found == {"data": f"voc:{tmp_path}/c:d:val"}
    (tmp_path / "a,b/c.json").touch()
    found = _settings.check("evaluate", {"data": "coco:a,b/c.json,c:d"})
    assert found == {"data": f"coco:{tmp_path}/a,b/c.json,{tmp_path}/c:d"}
    found = _settings.check("evaluate", {"data": "coco:a,b/c.json"})
    assert found == {"data": f"coco:{tmp_path}/a,b/c.json"}


def test_missing_settings_of_python(tmp_path):
    table = _settings.TASKS["train_detector"]
    with pytest.raises(ValueError, match="Expected `data`. Received: none"):
        _run_folder.open_run("train_detector", table, {"out": tmp_path})
