# SPDX-License-Identifier: Apache-2.0
"""Tests what is told and made before the first step of training."""

import logging
import shutil
import sys

import numpy as np
import pytest
from detectors import make_faster_rcnn
from small_runs import SETTINGS

from tf_deform import _settings, data, tasks, training
from tf_deform.tasks import _setup, _train


class Stopped(Exception):
    pass


def stop(*_):
    raise Stopped


@pytest.mark.parametrize("tile", [96, 97])
def test_tiles_that_are_larger_than_photographs(
    tile, photographs, backbone, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(_setup, "make_backbone", stop)
    with pytest.raises(Stopped):
        tasks.train_segmenter(
            f"masks:{photographs}/images,{photographs}/masks",
            tmp_path / "run",
            val=f"masks:{photographs}/images,{photographs}/masks",
            backbone=backbone,
            tile=tile,
            **SETTINGS,
        )
    assert "for validation are few" not in caplog.text
    told = "97 pixels: the longest side is 96, and" in caplog.text
    assert told == (tile == 97)


def test_few_photographs_for_validation(
    photographs, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(_setup, "make_backbone", stop)
    with pytest.raises(Stopped):
        tasks.train_detector(
            f"voc:{photographs}/voc", tmp_path / "run", val=0.5
        )
    assert "4 photographs for validation are few" in caplog.text


def test_a_missing_extra_is_told_before_weights_are_fetched(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(_setup, "make_backbone", stop)
    with pytest.raises(ImportError, match=r"tf-deform\[train\]"):
        tasks.train_detector(f"voc:{photographs}/voc", tmp_path / "run")


def test_more_objects_than_detections(photographs, caplog):
    val = data.read(f"voc:{photographs}/voc")
    settings = {**SETTINGS, "tile": None, "max_detections": 1}
    model = make_faster_rcnn()
    with caplog.at_level(logging.WARNING, "tf_deform"):
        _train._report_objects(val, val, model, settings)
        assert "has 2 objects, of which 1 can be found" in caplog.text
        caplog.clear()
        _train._report_objects(
            val, val, model, settings | {"max_detections": 2}
        )
    assert not caplog.text


@pytest.mark.parametrize(
    "box, tile, told",
    [
        # Anchors are of 16 to 64 pixels here.
        ((10, 10, 15, 15), None, "smaller --anchor-scales (now 4), a larger "),
        ((10, 10, 15, 15), 64, "a larger --size or a smaller --tile"),
        ((0, 0, 63, 2), None, ""),  # No anchor is as long and thin.
        ((10, 10, 30, 30), None, None),
    ],
)
def test_what_gives_objects_an_anchor(box, tile, told, caplog):
    photograph = data.Photograph(
        "a.png",
        height=64,
        width=64,
        boxes=np.float32([box]),
        labels=np.int32([0]),
    )
    part = data.Annotations(("a", "b"), (photograph,))
    settings = {**SETTINGS, "data": "x", "tile": tile, "max_detections": 9}
    with caplog.at_level(logging.INFO, "tf_deform"):
        _train._report_objects(part, part, make_faster_rcnn(), settings)
    if told is None:
        assert "without an anchor" not in caplog.text
    elif told:
        assert told in caplog.text
    else:
        assert caplog.messages[-1].endswith("such as a.png")


def test_objects_of_tiles_have_the_anchors_of_tiles(caplog):
    """A photograph of nine tiles: objects lie all over it, and across edges."""
    corners = [(x, y) for x in range(5, 170, 23) for y in range(9, 170, 19)]
    small = np.float32([(x, y, x + 20, y + 18) for x, y in corners])
    large = np.float32([(0, 0, 192, 120)])  # A tile shows 64 x 64 of it.
    sides = {"height": 192, "width": 192}
    settings = {**SETTINGS, "data": "x", "tile": 64, "max_detections": 99}
    for boxes in (small, np.concatenate([small, large])):
        labels = np.zeros(len(boxes), "int32")
        photograph = data.Photograph(
            "a.png", **sides, boxes=boxes, labels=labels
        )
        part = data.Annotations(("a", "b"), (photograph,))
        caplog.clear()
        with caplog.at_level(logging.INFO, "tf_deform"):
            _train._report_objects(part, part, make_faster_rcnn(), settings)
        assert "Each has an anchor" in caplog.text
        assert ("a tile shows less than 40 %" in caplog.text) == (
            boxes is not small
        )
    # A tile that shows all of the photograph shows it small.
    caplog.clear()
    settings["tile"] = 512
    with caplog.at_level(logging.INFO, "tf_deform"):
        _train._report_objects(part, part, make_faster_rcnn(), settings)
    anchors = make_faster_rcnn().anchors()
    report = training.anchor_report(boxes / 8, anchors)
    assert sum(report.without.values()) == len(small)
    assert f"{len(small)} of them" in caplog.text


def test_large_objects_without_an_anchor():
    boxes = np.float32([[0, 0, 60, 60]])
    model = make_faster_rcnn(anchor_scales=(0.5, 1.5))
    said = _train._advise(boxes, model, {"tile": None})
    assert said == ". For large ones, add larger --anchor-scales (now 0.5, 1.5)"


@pytest.mark.parametrize(
    "model, scales, expected",
    [
        ("faster-rcnn", None, (8,)),
        ("faster-rcnn", [2, 4], (2, 4)),
        ("rfcn", None, (4, 8, 16, 32)),
        ("rfcn", [3], (3,)),
    ],
)
def test_scales_of_anchors(
    model, scales, expected, photographs, backbone, tmp_path, monkeypatch
):
    made = []

    def keep(model, settings):
        made.append(model)
        raise Stopped

    monkeypatch.setattr(_setup, "prepare", keep)
    with pytest.raises(Stopped):
        tasks.train_detector(
            f"voc:{photographs}/voc",
            tmp_path / "run",
            backbone=backbone,
            model=model,
            anchor_scales=scales,
            **SETTINGS,
        )
    assert made[0].anchor_scales == expected


@pytest.mark.parametrize(
    "task, model, form, expected",
    [
        (
            *("detector", "faster-rcnn", "voc"),
            {"fpn_channels": 24, "head_units": 96},
        ),
        ("detector", "rfcn", "voc", {"rpn_channels": 48, "channels": 96}),
        ("segmenter", None, "masks", {"filters": 96}),
    ],
)
def test_channels(
    task, model, form, expected, sources, backbone, tmp_path, monkeypatch
):
    made = []

    def keep(model, settings):
        made.append(model)
        raise Stopped

    monkeypatch.setattr(_setup, "prepare", keep)
    options = SETTINGS | ({"model": model} if model else {})
    with pytest.raises(Stopped):
        getattr(tasks, f"train_{task}")(
            sources[form],
            tmp_path / "run",
            backbone=backbone,
            channels=24,
            **options,
        )
    assert {name: getattr(made[0], name) for name in expected} == expected


def test_images_beside_the_folder_annotations(sources, tmp_path):
    """Tests COCO's layout, which a task reads as `tf_deform.data` does."""
    file, images = sources["coco"].removeprefix("coco:").split(",")
    shutil.copytree(images, tmp_path / "set/images")
    (tmp_path / "set/annotations").mkdir()
    shutil.copy(file, tmp_path / "set/annotations/all.json")
    source = f"coco:{tmp_path}/set/annotations/all.json"
    settings = _settings.check("evaluate", {"data": source})
    found = _setup.read(
        {"skip_broken": False, "classes": None, "crowds": "ignore"},
        settings["data"],
    )
    assert found.photographs


def test_no_objects(photographs, backbone, tmp_path):
    (tmp_path / "voc").mkdir()
    for suffix in ("png", "xml"):
        for number in (0, 3):
            source = photographs / f"voc/3.{suffix}"
            text = source.read_bytes().replace(b"3.png", b"%d.png" % number)
            (tmp_path / f"voc/{number}.{suffix}").write_bytes(text)
    with pytest.raises(ValueError, match="Expected objects to learn from"):
        tasks.train_detector(
            f"voc:{tmp_path}/voc",
            tmp_path / "run",
            backbone=backbone,
            classes=["blue"],
            **SETTINGS,
        )
