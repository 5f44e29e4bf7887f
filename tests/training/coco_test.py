# SPDX-License-Identifier: Apache-2.0
"""Tests average precision, with pycocotools as the oracle."""

import contextlib
import copy
import io
import json
import logging
import math
import sys

import numpy as np
import pytest

from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)
pytest.importorskip("faster_coco_eval")

from tf_deform.training import (  # noqa: E402
    BestAndLast,
    CocoCallback,
    CocoEvaluator,
    EmaEvaluation,
    TensorBoardLogs,
)

NAMES = ["tree", "stop sign", "Bäume/alt", "never"]


def judge(coco, results, most, folder):
    """Returns what pycocotools computes of two files, by its places."""
    coco_file, results_file = folder / "coco.json", folder / "results.json"
    coco_file.write_text(json.dumps(coco))
    results_file.write_text(json.dumps(results))
    api = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = api.COCO(str(coco_file))
        found = truth.loadRes(str(results_file))
        judge = evaluation.COCOeval(truth, found, "bbox")
        judge.params.maxDets = [most] * 3  # It wants three.
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][..., 2]

    def mean(part):
        part = part[part > -1]
        return part.mean() if part.size else math.nan

    classes = sorted(item["id"] for item in coco["categories"])
    names = {item["id"]: item["name"] for item in coco["categories"]}
    return {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
        "APs": mean(precision[..., 1]),
        "APm": mean(precision[..., 2]),
        "APl": mean(precision[..., 3]),
        **{
            f"AP/{names[number]}": mean(precision[:, :, i, 0])
            for i, number in enumerate(classes)
        },
        "max_detections": most,
    }


def ids_from_zero(count, rng):
    return list(range(count))


def sparse_ids(count, rng):
    return rng.choice(2**40, count, replace=False).tolist()


def text_ids(count, rng):
    return [f"{n:03}.png" for n in rng.permutation(count)]


def mixed_ids(count, rng):
    return [n if n % 2 else str(n) for n in range(5, count + 5)]


def boxes_of(rng, count):
    """Returns boxes of all sizes, in 16ths of pixels as float32 holds them."""
    size = np.exp(rng.uniform(np.log(4), np.log(200), (count, 2)))
    low = rng.uniform(0, 300, (count, 2))
    boxes = np.concatenate([low, low + size], 1)
    return np.round(boxes * 16).astype("float32") / 16


def random_set(seed, make_ids, images=7, most=9):
    """Returns a file as tools write it, a clean one, and detections."""
    rng = np.random.default_rng(seed)
    image_ids, category_ids = make_ids(images, rng), make_ids(len(NAMES), rng)
    order = list(range(len(NAMES)))
    if all(isinstance(i, int) for i in category_ids):
        order = np.argsort(category_ids).tolist()
    wild = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [
            {"id": i, "name": name} for i, name in zip(category_ids, NAMES)
        ],
        "annotations": [],
    }
    clean = {
        "images": [{"id": n} for n in range(1, images + 1)],
        "categories": [
            {"id": k, "name": NAMES[c]} for k, c in enumerate(order, start=1)
        ],
        "annotations": [],
    }
    # Of equal scores in several images, those of the lowest ids come first.
    numbers = range(1, images + 1)
    if all(isinstance(i, int) for i in image_ids):
        numbers = 1 + np.argsort(np.argsort(image_ids))
    found, results = [], []
    for number, image_id in zip(map(int, numbers), image_ids):
        count = int(rng.integers(0, most + 1)) * (number != 2)
        boxes, kinds = boxes_of(rng, count), rng.integers(0, 3, count)
        for box, kind in zip(boxes.astype(float), kinds):
            x, y, width, height = *box[:2], *(box[2:] - box[:2])
            rare = rng.random(3)
            flag = ["iscrowd", "difficult", "ignore"][rng.integers(3)]
            item = {
                "image_id": image_id,
                "category_id": category_ids[kind],
                "bbox": [x, y, width, height],
                "id": len(wild["annotations"]),
                "iscrowd": 0,
                "area": width * height / 2,
            }
            if rare[0] < 0.1:
                item[flag] = 1
            if rare[1] < 0.2:
                del item["area"], item["iscrowd"]
            if rare[0] < 0.1 and flag == "iscrowd":
                item["iscrowd"] = True
            wild["annotations"].append(item)
            clean["annotations"].append(
                {
                    "id": len(clean["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1 + order.index(kind),
                    "bbox": item["bbox"],
                    "area": item.get("area", width * height),
                    "iscrowd": int(rare[0] < 0.1),
                }
            )
            if rare[2] < 0.1:
                wild["annotations"].append({**item, "bbox": [x, y, 0, height]})
        wrong = int(rng.integers(0, most + 1))
        boxes = np.concatenate(
            [
                boxes + rng.normal(0, 2, (count, 4)).round(1).astype("float32"),
                boxes_of(rng, wrong),
                np.full((3, 4), -1, "float32"),
            ]
        )
        labels = np.concatenate([kinds, rng.integers(0, 4, wrong), [-1] * 3])
        labels = np.array(
            [order.index(k) if k >= 0 else -1 for k in labels], "int32"
        )
        scores = rng.integers(0, 50, len(labels)).astype("float32") / 50
        if number == 3:
            continue  # An image in which nothing was looked for.
        mixed = rng.permutation(len(labels))
        boxes, labels, scores = boxes[mixed], labels[mixed], scores[mixed]
        found.append(
            (image_id, {"boxes": boxes, "scores": scores, "labels": labels})
        )
        for box, label, score in zip(boxes.astype(float), labels, scores):
            if label >= 0:
                results.append(
                    {
                        "image_id": number,
                        "category_id": int(label) + 1,
                        "bbox": [*box[:2], *(box[2:] - box[:2])],
                        "score": float(score),
                    }
                )
    return wild, clean, found, results


@pytest.mark.parametrize(
    "make_ids", [ids_from_zero, sparse_ids, text_ids, mixed_ids]
)
@pytest.mark.parametrize("seed", range(6))
def test_random_sets(seed, make_ids, tmp_path):
    wild, clean, found, results = random_set(seed, make_ids)
    most = [100, 500, 4][seed % 3]
    before = copy.deepcopy(wild)
    evaluator = CocoEvaluator(wild, most)
    metrics = evaluator.evaluate(found)
    assert wild == before
    expected = judge(clean, results, most, tmp_path)
    assert metrics == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert list(metrics) == list(expected)
    # What is written gives the same numbers in other programs.
    written = judge(evaluator.coco, evaluator.results(found), most, tmp_path)
    assert metrics == pytest.approx(written, abs=1e-12, nan_ok=True)
    assert math.isnan(metrics["AP/never"])
    assert 0 < metrics["AP"] < 0.9


@pytest.mark.parametrize("most, ap", [(100, 0.7), (150, 1), (500, 1)])
def test_more_objects_than_coco_counts(most, ap, tmp_path):
    """Tests 150 objects in one image, which are all found."""
    grid = np.stack(np.meshgrid(np.arange(15), np.arange(10)), -1) * 20.0
    low = grid.reshape(-1, 2)
    boxes = np.concatenate([low, low + 15], 1)
    coco = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [*box, 15, 15]}
            for i, box in enumerate(low.tolist(), start=1)
        ],
    }
    objects = {
        "boxes": boxes,
        "scores": np.linspace(1, 0.5, 150),
        "labels": np.zeros(150, int),
    }
    evaluator = CocoEvaluator(coco, most)
    metrics = evaluator.evaluate([(1, objects)])
    # Of the recalls 0, .01, ... 1 those up to 100 / 150 are reached.
    expected = 1 if ap == 1 else 67 / 101
    assert metrics["AP"] == pytest.approx(expected, abs=1e-9)
    assert metrics["max_detections"] == most
    results = evaluator.results([(1, objects)])
    assert metrics == pytest.approx(
        judge(evaluator.coco, results, most, tmp_path), abs=1e-12, nan_ok=True
    )


def two_objects(first_id=1):
    return {
        "images": [{"id": 7}, {"id": 9}],
        "categories": [{"id": 3, "name": "x"}, {"id": 5, "name": "y"}],
        "annotations": [
            {
                "id": first_id + i,
                "image_id": image,
                "category_id": category,
                "bbox": [x, 5, 20, 22],
                "area": 440,
                "iscrowd": 0,
            }
            for i, (image, category, x) in enumerate([(7, 5, 4), (9, 3, 10)])
        ],
    }


def perfect():
    return [
        (image, objects([[x, 5, x + 20, 27]], [0.9], [label]))
        for image, label, x in ((7, 1, 4), (9, 0, 10))
    ]


def objects(boxes, scores, labels):
    return {"boxes": boxes, "scores": scores, "labels": labels}


@pytest.mark.parametrize("first_id", [0, 1])
def test_annotation_ids_from_zero(first_id):
    """Tests what both libraries get wrong: they take the id 0 for none."""
    metrics = CocoEvaluator(two_objects(first_id)).evaluate(perfect())
    assert metrics["AP"] == metrics["AP/x"] == metrics["AP/y"] == 1


def test_the_same_annotation_ids():
    coco = two_objects()
    coco["annotations"][1]["id"] = coco["annotations"][0]["id"]
    assert CocoEvaluator(coco).evaluate(perfect())["AP"] == 1


def test_a_file(tmp_path):
    path = tmp_path / "val.json"
    path.write_text("\ufeff" + json.dumps(two_objects(0)), encoding="utf-8")
    evaluator = CocoEvaluator(path)
    assert evaluator.classes == ("x", "y")
    assert evaluator.evaluate(perfect())["AP"] == 1


@pytest.mark.parametrize("found", [[], [(7, objects([], [], []))]])
def test_nothing_found(found):
    metrics = CocoEvaluator(two_objects()).evaluate(found)
    assert metrics["AP"] == metrics["AP50"] == metrics["AP/x"] == 0
    assert math.isnan(metrics["APl"])


@pytest.mark.parametrize("found", [[], perfect()])
def test_no_objects(found):
    coco = {**two_objects(), "annotations": []}
    metrics = CocoEvaluator(coco).evaluate(found)
    assert metrics.pop("max_detections") == 100
    assert all(map(math.isnan, metrics.values()))


def test_sizes_of_a_missing_area():
    coco = two_objects()
    coco["annotations"][0].update(bbox=[4, 5, 40, 40], area=0)
    del coco["annotations"][1]["area"]
    found = [
        (7, objects([[4, 5, 44, 45]], [0.9], [1])),
        (9, objects([[10, 5, 30, 27]], [0.9], [0])),
    ]
    metrics = CocoEvaluator(coco).evaluate(found)
    assert metrics["APs"] == metrics["APm"] == 1
    assert math.isnan(metrics["APl"])


@pytest.mark.parametrize("flag", ["iscrowd", "ignore", "difficult"])
@pytest.mark.parametrize("value", [1, True, "1"])
def test_what_is_not_judged(flag, value):
    """Tests that an object is neither missed nor wrong if it is found."""
    coco = two_objects()
    coco["annotations"][0][flag] = value
    for found in (perfect(), perfect()[1:]):
        metrics = CocoEvaluator(coco).evaluate(found)
        assert metrics["AP"] == 1
        assert math.isnan(metrics["AP/y"])
    coco["annotations"][0][flag] = type(value)(0) if value is True else "0"
    assert CocoEvaluator(coco).evaluate(perfect()[1:])["AP"] == 0.5


def test_notes(caplog):
    coco = two_objects()
    del coco["annotations"][0]["area"]
    coco["annotations"] += [
        {"id": 41, "image_id": 7, "category_id": 3, "bbox": [1, 2, 0, 5]},
        {"id": 42, "image_id": 7, "category_id": 3},
        {"id": 43, "image_id": 7, "category_id": 3, "bbox": [1, 2, "x", 5]},
    ]
    with caplog.at_level(logging.WARNING, "tf_deform"):
        evaluator = CocoEvaluator(coco)
    left_out, without_area = evaluator.notes
    assert "3 annotations, with the ids 41, 42, 43" in left_out
    assert "`area`" in without_area and "1 annotations" in without_area
    assert all(note in caplog.text for note in evaluator.notes)
    assert len(evaluator.coco["annotations"]) == 2
    assert evaluator.evaluate(perfect())["AP"] == 1


def wrong_truth(**changes):
    return {**two_objects(), **changes}


@pytest.mark.parametrize(
    "coco, text",
    [
        (wrong_truth(categories=[]), "Expected categories in the ground tr"),
        (wrong_truth(images=[{"id": 7}, {"id": "7"}]), "'7' more than once"),
        (wrong_truth(images=[{"file_name": "a"}]), "each image .* have an id"),
        (
            wrong_truth(categories=[{"id": 0, "name": "x"}] * 2),
            "each category .* '0' more than once",
        ),
        (
            wrong_truth(
                categories=[{"id": i, "name": "x"} for i in range(3, 6)]
            ),
            "names of their own. Received: 'x', 'x' more than once",
        ),
        (wrong_truth(images=[{"id": 7}]), "annotation 2 with image_id 9"),
        (
            wrong_truth(categories=[{"id": 5, "name": "y"}]),
            "annotation 2 with category_id 3",
        ),
        (wrong_truth(annotations={"a": 1}), "`annotations` .* list of objects"),
    ],
)
def test_wrong_truth(coco, text):
    with pytest.raises(ValueError, match=text):
        CocoEvaluator(coco)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_no_json(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="Expected .*a.json to "):
        CocoEvaluator(path)


@pytest.mark.parametrize(
    "most, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_wrong_numbers_of_detections(most, error):
    with pytest.raises(error, match="max_detections"):
        CocoEvaluator(two_objects(), most)


BOX = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "found, text",
    [
        ([(8, objects([BOX], [1.0], [0]))], "the image 8, which is not in it"),
        ([(7, objects([BOX], [1.0], [0]))] * 2, "the image 7 again"),
        ([(7, objects([BOX], [1.0], [2]))], "below 2.* Received: 2 for .* 7"),
        ([(7, objects([BOX], [1.0], [-2]))], "Received: -2 for"),
        ([(7, objects([BOX], [1.0], [0.0]))], "integer labels .* float64"),
        ([(7, objects([BOX], [1.0, 2.0], [0]))], r"\(1, 4\), \(2,\) and"),
        ([(7, objects([BOX[:3]], [1.0], [0]))], r"\(1, 3\), \(1,\) and"),
        ([(7, objects([BOX], [np.nan], [0]))], "finite .* the image 7"),
        ([(7, objects([[*BOX[:3], np.inf]], [1.0], [0]))], "finite"),
    ],
)
def test_wrong_detections(found, text):
    with pytest.raises(ValueError, match=text):
        CocoEvaluator(two_objects()).evaluate(found)


def test_padding_may_hold_anything():
    padded = objects([[4, 5, 24, 27], [np.nan] * 4], [0.9, np.nan], [1, -1])
    found = [(7, padded), perfect()[1]]
    assert CocoEvaluator(two_objects()).evaluate(found)["AP"] == 1


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r'pip install "tf-deform\[train\]"'):
        CocoEvaluator(two_objects())


def fit(callbacks, epochs=3, verbose=0):
    """Trains a model of one weight that does not change."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    model.optimizer.learning_rate = 0.0
    ones = np.ones((4, 1))
    return model.fit(
        ones, ones, epochs=epochs, callbacks=callbacks, verbose=verbose
    )


def test_logs_come_before_checkpoints(tmp_path, capfd):
    """Tests the callback with progress bar, checkpoint and TensorBoard."""
    answers = iter([[], perfect(), perfect()[:1]])
    callback = CocoCallback(CocoEvaluator(two_objects()), lambda: next(answers))
    checkpoints = BestAndLast(tmp_path / "run", "val_AP")
    history = fit(
        [callback, checkpoints, TensorBoardLogs(tmp_path / "logs")], verbose=1
    )
    assert history.history["val_AP"] == [0, 1, 0.5]
    assert history.history["val_AP/y"] == [0, 1, 1]
    assert history.history["val_max_detections"] == [100] * 3
    assert checkpoints.best["epoch"] == 2
    assert [logs["val_AP"] for logs in checkpoints.history] == [0, 1, 0.5]
    assert "val_AP/x: 1.0000" in capfd.readouterr().out


def test_keras_own_callbacks_take_names_of_classes(tmp_path):
    pytest.importorskip("tensorboard", reason="Keras' callback needs it")
    coco = two_objects()
    coco["categories"][0]["name"] = "Bäume / alt (x=1)"
    callback = CocoCallback(CocoEvaluator(coco), perfect)
    fit([callback, keras.callbacks.TensorBoard(tmp_path)], verbose=1)


@pytest.mark.parametrize(
    "frequency, epochs, judged", [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5])]
)
def test_frequency(frequency, epochs, judged, tmp_path):
    evaluator = CocoEvaluator(two_objects())
    callback = CocoCallback(evaluator, perfect, frequency)
    checkpoints = BestAndLast(tmp_path, "val_AP")
    fit([callback, checkpoints], epochs)
    assert judged == [
        logs["epoch"] for logs in checkpoints.history if "val_AP" in logs
    ]


def test_averages_are_judged():
    ema = EmaEvaluation(0.5)
    seen = []
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")

    def predict():
        seen.append(model.get_weights())
        return perfect()

    callback = CocoCallback(CocoEvaluator(two_objects()), predict, ema=ema)
    ones = np.ones((4, 1))
    model.fit(ones, ones, callbacks=[ema, callback], verbose=0)
    for found, average, live in zip(
        seen[0], ema.variables, model.get_weights()
    ):
        np.testing.assert_array_equal(found, average)
        assert (found != live).any()


def test_wrong_arguments_of_the_callback():
    evaluator = CocoEvaluator(two_objects())
    with pytest.raises(TypeError, match="`predict` to be a function"):
        CocoCallback(evaluator, [])
    with pytest.raises(ValueError, match="frequency"):
        CocoCallback(evaluator, list, 0)
