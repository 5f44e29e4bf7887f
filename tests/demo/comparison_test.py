# SPDX-License-Identifier: Apache-2.0
"""Tests comparisons of arms: over seeds, and over images drawn anew."""

import json

import numpy as np
import pytest
import scipy.stats

from tf_deform.demo import _compare
from tf_deform.training import CocoEvaluator


def read(result):
    return result["score"]


def result(arm, seed, score, **others):
    return {"arm": arm, "seed": seed, "score": score, **others}


def test_differences_pair_seeds():
    results = [
        result("plain", 0, 0.5),
        result("plain", 2, 0.25),
        result("plain", 1, 0.125),
        result("new", 1, 0.25),
        result("new", 2, 0.75),
        result("new", 0, 0.75),
        result("alone", 7, 1.0),
    ]
    pairs = [("new", "plain"), ("alone", "plain"), ("missing", "plain")]
    (pair,) = _compare.differences(results, read, pairs)
    assert (pair["arm"], pair["base"]) == ("new", "plain")
    assert pair["seeds"] == [0, 1, 2]
    assert pair["per_seed"] == [0.25, 0.125, 0.5]
    assert pair["mean"] == pytest.approx(0.875 / 3)
    low, high = pair["interval_over_seeds"]
    half = scipy.stats.t.ppf(0.975, 2) * np.std([0.25, 0.125, 0.5], ddof=1)
    half /= np.sqrt(3)
    assert (low, high) == pytest.approx((0.875 / 3 - half, 0.875 / 3 + half))
    single = _compare.differences(results[:1] + results[5:6], read, pairs[:1])
    assert single[0]["per_seed"] == [0.25]
    assert "interval_over_seeds" not in single[0]


def test_photographs_without_objects():
    """Tests AP that is no number: NaN here, and None from a file."""
    nan = float("nan")
    results = [
        result("plain", 0, nan, parameters=1, ms_per_step=10.0),
        result("plain", 1, 0.25, parameters=1, ms_per_step=10.0),
        result("new", 0, None, parameters=2, ms_per_step=7.4),
        result("new", 1, 0.5, parameters=2, ms_per_step=7.4),
    ]
    pairs = [("new", "plain")]
    (pair,) = _compare.differences(results, read, pairs)
    assert pair["per_seed"] == [0.25]
    assert (pair["seeds"], pair["not_measured"]) == ([1], [0])
    assert "interval_over_seeds" not in pair
    text = "new against plain: +25.0 points of AP"
    text += " (it is no number for the seeds 0)"
    assert _compare.sentence(pair, "AP") == text
    (pair,) = _compare.differences(results[::2], read, pairs)
    assert (pair["mean"], pair["seeds"]) == (None, [])
    text = "new against plain: AP is no number, as where there is no object"
    assert _compare.sentence(pair, "AP") == text
    lines = _compare.table(results[::2], {"AP": read}).splitlines()
    assert lines[2:] == ["| plain | 1 | none | 10 |", "| new | 2 | none | 7 |"]
    assert _compare.percentiles(np.array([nan, 2.0, 2.0])) == [2.0, 2.0]


def test_table_and_sentence():
    results = [
        result("plain", 0, 0.5, parameters=1234, ms_per_step=10.0),
        result("plain", 1, 0.7, parameters=1234, ms_per_step=30.0),
        result("new", 0, 0.25, parameters=56, ms_per_step=7.4),
    ]
    assert _compare.table(results, {"mIoU": read}).splitlines() == [
        "| model | parameters | mIoU | ms per step |",
        "|---|---:|---:|---:|",
        "| plain | 1,234 | 0.600 ± 0.141 | 20 |",
        "| new | 56 | 0.250 | 7 |",
    ]
    pair = {"arm": "new", "base": "plain", "mean": -0.0123}
    text = "new against plain: -1.2 points of AP"
    assert _compare.sentence(pair, "AP") == text
    pair["interval_over_tiles"] = [-0.02, 0.015]
    text += ", 95 % interval over tiles -2.0 to +1.5"
    assert _compare.sentence(pair, "AP") == text


def test_run_is_done_once(tmp_path):
    settings = {"arm": "plain", "seed": 3}
    folder = tmp_path / "runs" / "one"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _compare.run_once(folder, settings, interrupted)
    done = _compare.run_once(folder, settings, lambda: {"score": 0.5})
    assert done == {**settings, "score": 0.5}
    # The second call finds the result.
    assert _compare.run_once(folder, settings, interrupted) == done
    with pytest.raises(ValueError, match="one to hold a run.*'seed': 4.*Remov"):
        _compare.run_once(folder, {**settings, "seed": 4}, interrupted)


TRUTH = {
    "images": [{"id": n, "width": 9, "height": 9} for n in (1, 2, 3)],
    "categories": [{"id": 1, "name": "Tree"}],
    "annotations": [
        {
            "id": n,
            "image_id": image,
            "category_id": 1,
            "bbox": [n, 1, 2, 3],
            "area": 6,
            "iscrowd": 0,
        }
        for n, image in enumerate((1, 3, 3), start=1)
    ],
}


def found(*numbers):
    objects = TRUTH["annotations"]
    return [
        {
            "image_id": objects[n]["image_id"],
            "category_id": 1,
            "bbox": objects[n]["bbox"],
            "score": 0.5,
        }
        for n in numbers
    ]


def recall(coco, items):
    """Counts what was found; fails if truth and results do not fit."""
    ids = [item["id"] for item in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert [image["id"] for image in coco["images"]] == [1, 2, 3]
    objects = {
        (item["image_id"], tuple(item["bbox"])) for item in coco["annotations"]
    }
    assert {(i["image_id"], tuple(i["bbox"])) for i in items} <= objects
    return [len(items), len(objects)]


def test_bootstrap_draws_images_with_all_that_is_theirs():
    before = json.dumps(TRUTH)
    drawn = _compare.bootstrap(
        TRUTH, [found(0, 1, 2), found(1, 2)], recall, draws=200
    )
    assert json.dumps(TRUTH) == before
    assert drawn.shape == (200, 2, 2)
    # The first model finds everything. Image 2 is empty, so a draw of three
    # images has 0 to 6 objects, and 3 on average.
    np.testing.assert_array_equal(drawn[:, 0, 0], drawn[:, 0, 1])
    assert set(drawn[:, 0, 1]) == set(range(7))
    assert drawn[:, 0, 1].mean() == pytest.approx(3, abs=0.3)
    # The second one misses the object of image 1, as often as that is drawn.
    missed = drawn[:, 1, 1] - drawn[:, 1, 0]
    assert set(missed) == {0, 1, 2, 3}
    assert missed.mean() == pytest.approx(1, abs=0.2)
    np.testing.assert_array_equal(drawn[:, 0, 1], drawn[:, 1, 1])


def test_bootstrap_of_average_precision():
    def measure(coco, items):
        return CocoEvaluator(coco, 10).measure(items)["AP"]

    drawn = _compare.bootstrap(
        TRUTH, [found(0, 1, 2), found(1, 2)], measure, draws=30
    )
    perfect, worse = drawn.T
    assert set(perfect[~np.isnan(perfect)]) == {1.0}
    assert np.nanmin(worse) == 0 and np.nanmax(worse) == 1
    low, high = _compare.percentiles(np.arange(401.0))
    assert (low, high) == (10, 390)
