# SPDX-License-Identifier: Apache-2.0
"""Tests the demo of trees on drawn photographs, with a small backbone."""

import contextlib
import functools
import io
import json

import keras
import numpy as np
import PIL.Image
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_resnet import BLOCKS, Writer

import tf_deform
from tf_deform import data, demo, models
from tf_deform.demo import _compare, _fetch, _photographs, _trees

# Numbers of images of the sets; width and height of all.
COUNTS = {"train": 2, "val": 1, "yellowstone": 3, "florida": 1, "california": 1}
SIZE = (70, 61)
RESULT = {"parameters": 1, "ms_per_step": 1.0} | {
    name: {"AP": 0.5, "AP50": 0.5} for name in _photographs.TESTS
}


def write_sets(folder):
    """Draws dark trees on light ground."""
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        for number in range(count):
            pixels = rng.integers(200, 240, (*SIZE[::-1], 3)).astype("uint8")
            corners = rng.integers(0, 40, (3, 2))
            boxes = np.concatenate([corners, corners + (13, 17)], 1)
            for x1, y1, x2, y2 in boxes:
                pixels[y1:y2, x1:x2] //= 4
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)
            # The last tree of a test photograph is not counted.
            shares = [1, 1, 1 if name == "train" else 0.3]
            root = _photographs._voc(path.name, SIZE, boxes, np.array(shares))
            root.write(path.with_suffix(".xml"))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    writer = Writer()
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return writer.save(path, writer.resnet())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_photographs, "write", write_sets)
    monkeypatch.setattr(_trees, "_SIZE", 64)
    monkeypatch.setattr(_trees, "_EPOCHS", 2)
    monkeypatch.setattr(models, "predictions", predictions)
    monkeypatch.setattr(
        _compare, "bootstrap", functools.partial(_compare.bootstrap, draws=20)
    )
    monkeypatch.setattr(
        _trees,
        "thin_resnet50",
        functools.partial(_trees.thin_resnet50, blocks=BLOCKS),
    )


def predictions(model, photographs):
    """Adds to what the model finds the trees, moved, some twice."""
    rng = np.random.default_rng(1)
    for number, found in _predictions(model, photographs):
        boxes = photographs[number - 1].boxes
        boxes = np.concatenate([boxes, boxes[:1]])
        boxes = np.concatenate([boxes + rng.normal(0, 1, boxes.shape)])
        yield (
            number,
            {
                "boxes": np.concatenate([found["boxes"], boxes]),
                "scores": np.append(found["scores"], rng.random(len(boxes))),
                "labels": np.append(found["labels"], [0] * len(boxes)),
            },
        )


_predictions = models.predictions


def judge_by_hand(folder, name):
    """Returns AP and AP50 as pycocotools computes them from the files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(folder / f"truth-{name}.json")
        found = truth.loadRes(str(folder / f"results-{name}.json"))
        judge = COCOeval(truth, found, "bbox")
        # pycocotools reads the third number alone.
        judge.params.maxDets = [1, 10, 500]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, 2]
    return precision.mean(), precision[0].mean()


def test_both_arms_are_trained_and_compared(
    small, weights, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    metrics = demo.trees(out, (3,), 4, weights)
    assert json.loads((out / "metrics.json").read_text())["results"]
    assert [r["arm"] for r in metrics["results"]] == ["plain", "deformable"]
    assert metrics["photographs"]["yellowstone"]["trees"] == 6
    for result in metrics["results"]:
        folder = out / "runs" / f"{result['arm']}-seed3"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            ["model.keras", "result.json", "settings.json"]
            + [f"results-{name}.json" for name in _photographs.TESTS]
            + [f"truth-{name}.json" for name in _photographs.TESTS]
        )
        for name in _photographs.TESTS:
            by_hand = judge_by_hand(folder, name)
            measured = [result[name][metric] for metric in ("AP", "AP50")]
            assert 0.1 < measured[0] < 0.95
            np.testing.assert_allclose(measured, by_hand, atol=1e-6)
    plain, deformable = (
        keras.saving.load_model(out / "runs" / f"{arm}-seed3" / "model.keras")
        for arm in ("plain", "deformable")
    )
    assert not tf_deform.deformable_layers(plain)
    layers = tf_deform.deformable_layers(deformable)
    assert len(layers) == sum(BLOCKS[1:])
    assert any(np.any(layer.offset_kernel) for layer in layers)
    for name in ("boxes.png", "sampling.png"):
        assert np.asarray(PIL.Image.open(out / name)).std() > 10
    for pair in metrics["differences"]:
        tiles = pair["photograph"] == "yellowstone"
        assert ("interval_over_tiles" in pair) == tiles

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(_trees._Runs, "_run", refuse)
    assert demo.trees(out, (3,), 4, weights)["results"] == metrics["results"]
    with pytest.raises(ValueError, match="plain-seed3 to hold a run"):
        demo.trees(out, (3,), 6, weights)


def test_a_deformable_model_starts_as_the_plain_one(small, weights):
    image = np.full((1, 64, 64, 3), 90, "float32")
    image[:, 20:40, 10:30] = 200
    plain, deformable = (
        _trees.build(str(weights), stages, 5).trunk(image)
        for stages in _trees.ARMS.values()
    )
    for one, other in zip(plain["maps"], deformable["maps"]):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_stem_and_second_stage_are_frozen(small, weights):
    model = _trees.build(str(weights), "c3-c5", 5)
    names = {v.path for v in model.backbone.trainable_variables}
    assert names
    assert not any("conv1" in n or "conv2_block" in n for n in names)
    assert not any("_bn" in name for name in names)
    assert any("offset_kernel" in name for name in names)


def test_equal_time_means_more_steps(small, weights, tmp_path, monkeypatch):
    # The step times are made up: no test depends on a clock.
    timed = {"ratio": 1.6}
    monkeypatch.setattr(_trees._Runs, "time_steps", lambda *_: timed)
    monkeypatch.setattr(_trees._Runs, "_run", lambda *_: RESULT)
    monkeypatch.setattr(_trees, "_add_tiles", lambda *_: None)
    monkeypatch.setattr(_trees, "_draw", lambda *_: None)
    metrics = demo.trees(tmp_path / "out", (3, 4), 4, weights)
    assert [(r["arm"], r["steps"]) for r in metrics["results"][::2]] == [
        ("plain", 4),
        ("deformable", 4),
        ("plain, as long", 6),  # 3.2 in each of 2 epochs
    ]
    assert metrics["step_times"] == timed
    assert {p["base"] for p in metrics["differences"]} == {
        "plain",
        "plain, as long",
    }
    assert _trees._steps_as_long(1.08, 1200) == 1296


def test_steps_are_timed_in_turns(small, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(_trees, "_TURNS", 3)
    monkeypatch.setattr(_trees, "_STEPS_A_TURN", 2)
    sets = _trees.read_sets(write_sets(tmp_path / "sets"))
    runs = _trees._Runs(tmp_path / "runs", sets, str(weights))
    timed = runs.time_steps(8)
    assert timed["ms_per_step"].keys() == {"plain", "deformable"}
    assert min(timed["ms_per_step"].values()) > 0
    assert len(timed["ratios"]) == 3
    assert timed["ratio"] == np.median(timed["ratios"]) > 0
    assert runs.time_steps(8) == timed  # Read, not taken anew.


@pytest.mark.parametrize(
    "full, seeds, steps", ((False, 1, 320), (True, 3, 800))
)
def test_quick_and_full(full, seeds, steps, monkeypatch):
    monkeypatch.setattr(demo, "trees", lambda *settings: settings)
    out, given, *rest = demo.run("trees", "out", full)
    assert (out, len(set(given)), rest) == ("out", seeds, [steps, None])


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8. Received: 12"):
        demo.trees(tmp_path / "out", steps=12)
    with pytest.raises(ValueError, match="trees or digits. Received: 'leaves'"):
        demo.run("leaves")
    with pytest.raises(ValueError, match="`weights` for trees alone"):
        demo.run("digits", weights="file.onnx")
    with pytest.raises(AttributeError, match="no attribute 'leaves'"):
        demo.leaves  # noqa: B018
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not _fetch.is_fetched(_fetch.PHOTOGRAPHS), reason="never fetched here"
)
def test_published_photographs_are_read(tmp_path):
    sets = _trees.read_sets(_photographs.write(tmp_path / "photographs"))
    assert {a.classes for a in sets.values()} == {("Tree",)}
    (train,) = sets["train"].photographs
    assert data.read_image(train.path).shape == (2056, 2299, 3)
    assert (~train.difficult).sum() == 473
    assert train.boxes.max() == 2299
