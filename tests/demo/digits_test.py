# SPDX-License-Identifier: Apache-2.0
"""Tests the demo of digits on few scenes and steps."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform import demo, visualization
from tf_deform.demo import _digit_scenes, _digits


@pytest.fixture(scope="module")
def parameters():
    found = {}
    for name, arms, build in (
        ("segment", _digits.SEGMENTERS, _digits.build_segmenter),
        ("detect", _digits.DETECTORS, _digits.build_detector),
    ):
        for arm in arms:
            keras.utils.clear_session(free_memory=False)
            model = build(arm, 0)
            layers = tf_deform.deformable_layers(model)
            found[name, arm] = (model.count_params(), len(layers))
    return found


def test_arms_differ_in_what_they_are_named_for(parameters):
    deformable = {name: count for name, (_, count) in parameters.items()}
    assert deformable == {
        ("segment", "plain"): 0,
        ("segment", "plain-wide"): 0,
        ("segment", "plain-deep"): 0,
        ("segment", "plain-dilated"): 0,
        ("segment", "dcn-v1"): 2,
        ("segment", "dcn-v2"): 2,
        ("detect", "plain"): 0,
        ("detect", "dcn"): 2,
        ("detect", "dpool"): 0,
        ("detect", "both"): 2,
    }
    sizes = {arm: n for (name, arm), (n, _) in parameters.items()}
    segment = {
        arm: n
        for (name, arm), (n, _) in parameters.items()
        if name == "segment"
    }
    # The wide one has at least as many parameters as any deformable one.
    assert segment["plain-wide"] >= segment["dcn-v2"] > segment["dcn-v1"]
    assert segment["plain"] == segment["plain-dilated"] < segment["plain-deep"]
    assert sizes["both"] > sizes["dcn"] and sizes["both"] > sizes["dpool"]


def test_arms_of_a_seed_begin_alike():
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3))
    plain, deformable, other = (
        _digits.build_segmenter(arm, seed)(images)
        for arm, seed in (("plain", 3), ("dcn-v2", 3), ("plain", 4))
    )
    np.testing.assert_allclose(deformable, plain, rtol=0, atol=1e-5)
    assert np.abs(other - plain).max() > 1e-2


def test_detectors_of_a_seed_begin_alike():
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3))
    boxes = np.float32([[(3, 5, 20, 31)], [(30, 2, 61, 25)]])
    found = []
    for arm, seed in (("plain", 3), ("both", 3), ("plain", 4)):
        model = _digits.build_detector(arm, seed)
        outputs = model.trunk(images)
        parts = model._judge(outputs["maps"], tf.constant(boxes), False)
        parts += outputs["objectness"][0], outputs["deltas"][0]
        found.append(np.concatenate([np.ravel(part) for part in parts]))
    plain, deformable, other = found
    np.testing.assert_allclose(deformable, plain, rtol=0, atol=1e-6)
    assert np.abs(other - plain).max() > 5e-4


def test_dilation_that_follows_sizes(tmp_path, monkeypatch):
    _digit_scenes.write(tmp_path / "scenes", train=0, val=4, test=0)
    model = _digits.build_segmenter("dcn-v2", 0)

    def measure(network, layer, images, boxes):
        assert network is model.backbone and images.shape == (4, 64, 64, 3)
        assert set(boxes[:, 0]) == {0, 1, 2, 3}
        areas = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
        if layer.name == "conv5":
            return np.ones_like(areas)
        areas[0] = np.nan
        return -areas

    monkeypatch.setattr(visualization, "effective_dilation", measure)
    found = _digits.follow_sizes(model, tmp_path / "scenes/val")
    assert found == {"conv4": pytest.approx(-1), "conv5": None}


def test_every_deformable_arm_is_compared_with_those_before_it(tmp_path):
    task = _digits._Task(
        "segment", tmp_path, None, ("mIoU",), ["plain", "plain-b", "c", "d"]
    )
    assert set(task.pairs()) == {
        ("c", "plain"),
        ("c", "plain-b"),
        ("d", "plain"),
        ("d", "plain-b"),
        ("d", "c"),
    }


def test_both_tasks_are_trained(tmp_path, monkeypatch):
    few = functools.partial(_digit_scenes.write, train=40, val=0, test=3)
    monkeypatch.setattr(_digit_scenes, "write", few)
    monkeypatch.setattr(_digits, "_EPOCHS", 2)
    monkeypatch.setattr(_digits, "_BATCH", 5)
    monkeypatch.setattr(
        _digits, "_FEW", {"segment": ("plain", "dcn-v2"), "detect": ("both",)}
    )
    metrics = demo.digits(tmp_path, (1,), 2)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert [r["arm"] for r in metrics["segment"]["results"]] == [
        "plain",
        "dcn-v2",
    ]
    (pair,) = metrics["segment"]["differences"]
    scores = [result["mIoU"] for result in metrics["segment"]["results"]]
    assert pair["per_seed"] == [scores[1] - scores[0]]
    assert set(metrics["segment"]["follows_sizes"]) == {"conv4", "conv5"}
    for name in ("predictions", "sampling", "detections", "parts"):
        picture = keras.utils.load_img(tmp_path / f"{name}.png")
        assert len(np.unique(picture)) > 9, name
    (detector,) = metrics["detect"]["results"]
    assert 0 <= detector["AP"] <= 1
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == [
        "detect-both-seed1",
        "segment-dcn-v2-seed1",
        "segment-plain-seed1",
    ]
    for folder in folders:
        files = {path.name for path in (tmp_path / "runs" / folder).iterdir()}
        assert files == {"model.keras", "result.json", "settings.json"}

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(_digits._Task, "_run", refuse)
    assert demo.digits(tmp_path, (1,), 2) == metrics
