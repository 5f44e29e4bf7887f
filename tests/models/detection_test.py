# SPDX-License-Identifier: Apache-2.0
"""Tests the model of the detection example; `runs_test.py` tests runs."""

import io
import json
import types

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from detection import detector, export, train

from tf_deform import _loader
from tf_deform.demo import _digit_scenes as digit_scenes

CATEGORIES = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]


def encode(pixels: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = PIL.Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def displace(model: keras.Model) -> None:
    """Gives the branches weights, so that samples are displaced."""
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.1))


def make_detector(arm: str, image_size: int | None = 64) -> detector.Detector:
    """Makes a detector that displaces and has varied scores, as if trained."""
    keras.utils.set_random_seed(2)
    model = detector.Detector(arm, image_size=image_size)
    displace(model)
    for variable in model.trainable_variables:
        if "score_maps/kernel" in variable.path:
            variable.assign(10 * variable)
    return model


def random_boxes(*shape: int) -> np.ndarray:
    """Draws boxes of all sizes in an image of 64 pixels, cut at its edges."""
    rng = np.random.default_rng(len(shape))
    middles = rng.uniform(-4, 68, (*shape, 2))
    sizes = rng.uniform(2, 34, (*shape, 2))
    corners = (middles - sizes / 2, middles + sizes / 2)
    return np.concatenate(corners, axis=-1).clip(0, 64).astype("float32")


def random_scores(*shape: int) -> np.ndarray:
    """Draws scores that all differ."""
    count = int(np.prod(shape))
    scores = np.random.default_rng(1).permutation(count) / count
    return scores.reshape(shape).astype("float32")


# Boxes, scores of a few classes, the number wanted, the largest overlap, and
# the score to exceed. Only equal boxes have equal scores, because the native op
# defines no order for equal scores.
CHOICES = {
    "random": (random_boxes(3, 100), random_scores(3, 100, 4), 30, 0.5, 0.2),
    "one-image": (random_boxes(1, 64), random_scores(1, 64, 1), 9, 0.7, 0.0),
    "none-above": (random_boxes(2, 20), random_scores(2, 20, 3), 7, 0.5, 1.0),
    "at-the-score": (random_boxes(1, 4), np.full((1, 4, 1), 0.5), 3, 0.5, 0.5),
    "few": (random_boxes(2, 3), random_scores(2, 3, 2), 20, 0.5, 0.1),
    "twins": (
        np.repeat(random_boxes(3, 12), 2, axis=1),
        np.repeat(random_scores(3, 12, 1), 2, axis=1),
        20,
        0.5,
        0.1,
    ),
    "no-score": (
        random_boxes(2, 9),
        np.pad(random_scores(2, 4, 3), ((0, 0), (5, 0), (0, 0))),
        20,
        0.5,
        0.0,
    ),
}


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("choice", CHOICES)
def test_suppression_is_that_of_the_native_op(choice, how):
    boxes, scores, size, *limits = CHOICES[choice]
    boxes = tf.constant(boxes, "float32")
    scores = tf.constant(scores, "float32")
    # This case keeps boxes of no area.
    real = tf.reduce_all(boxes[..., 2:] > boxes[..., :2], -1, keepdims=True)
    oracle = tf.image.combined_non_max_suppression(
        boxes[:, :, None],
        tf.where(real, scores, 0.0),
        size,
        size,
        *limits,
        clip_boxes=False,
    )

    def suppress(boxes, scores):
        return detector.suppress(boxes, scores, size, *limits)

    if how != "eager":
        suppress = tf.function(
            suppress,
            [tf.TensorSpec((None, *x.shape[1:])) for x in (boxes, scores)],
            jit_compile=how == "xla",
        )
    for got, want in zip(suppress(boxes, scores), oracle, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_of_equal_scores_the_first_comes_first(jit_compile):
    boxes = tf.constant([[(i, 0, i + 2, 2) for i in range(8)]], "float32")
    suppress = tf.function(
        lambda boxes: detector.suppress(boxes, tf.ones((1, 8, 2)), 9, 0.3),
        jit_compile=jit_compile,
    )
    # Neighbours overlap by a third.
    chosen, _, classes, valid = suppress(boxes)
    assert chosen[0, :, 0].numpy().tolist() == [0, 2, 4, 6, 0, 2, 4, 6, 0]
    assert classes[0].numpy().tolist() == [0] * 4 + [1] * 4 + [0]
    assert valid.numpy().tolist() == [8]


@pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)
@pytest.mark.parametrize("image_size", [64, None])
def test_xla_detects_the_same(image_size):
    model = make_detector("both", image_size)

    def run(images):
        return model(images), model.detect(images)

    images = random_images(2, 64, 64, 1)
    outputs, found = run(images)
    compiled, detected = tf.function(run, jit_compile=True)(images)
    for name in ("objectness", "proposals", "logits", "box_deltas"):
        np.testing.assert_allclose(compiled[name], outputs[name], atol=1e-4)
    assert np.all(found["valid"].numpy() > 3)
    np.testing.assert_array_equal(detected["valid"], found["valid"])
    np.testing.assert_array_equal(detected["labels"], found["labels"])
    np.testing.assert_allclose(detected["boxes"], found["boxes"], atol=1e-3)
    np.testing.assert_allclose(detected["scores"], found["scores"], atol=1e-4)


def test_any_image_size_is_the_same_network(tmp_path):
    fixed, free = make_detector("both"), detector.Detector("both", 11, None)
    fixed.save_weights(tmp_path / "fixed.weights.h5")
    free.load_weights(tmp_path / "fixed.weights.h5")
    images = random_images(2, 64, 64, 1)
    truth = {
        "boxes": tf.constant([[(9, 9, 30, 40)], [(50, 50, 99, 99)]], "float32"),
        "labels": tf.constant([[3], [10]]),
    }
    losses = []
    for model in (fixed, free):
        outputs = model(images)
        losses.append(model.compute_loss(y=truth, y_pred=outputs))
    np.testing.assert_array_equal(*losses)
    found = fixed.detect(images)
    for model in (fixed, free):
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        for same in (model, again):
            for name, value in same.detect(images).items():
                np.testing.assert_array_equal(value, found[name])


@pytest.fixture(scope="module")
def models() -> dict[int | None, detector.Detector]:
    return {size: make_detector("both", size) for size in (64, None)}


@pytest.mark.parametrize(
    "height, width", [(96, 48), (32, 128), (4, 4), (4, 12), (30, 45), (1, 1)]
)
def test_images_of_any_size(height, width, models):
    model = models[None]
    images = random_images(2, height, width, 1)
    outputs = model(images)
    cells = -(-height // detector.STRIDE), -(-width // detector.STRIDE)
    anchors = detector.make_anchors(*cells).numpy()
    assert outputs["objectness"].shape == (2, len(anchors))
    middles = anchors.reshape(*cells, -1, 2, 2).mean(axis=(2, 3))
    np.testing.assert_allclose(middles[0, 0], (2, 2))
    np.testing.assert_allclose(
        middles[-1, -1], (4 * cells[1] - 2, 4 * cells[0] - 2)
    )
    proposals = outputs["proposals"].numpy()
    assert np.all(proposals[:, 0, 2:] > 0)
    assert np.all(proposals[..., 2:] <= 4 * np.array(cells[::-1]))
    found = model.detect(images)
    assert np.all(found["valid"].numpy() > 0)
    assert np.all(found["boxes"].numpy() >= 0)
    assert np.all(found["boxes"].numpy()[..., 2:] <= (width, height))
    truth = {
        "boxes": tf.constant([[(0, 0, width, height)]] * 2, "float32"),
        "labels": tf.fill((2, 1), 4),
    }
    assert np.isfinite(model.compute_loss(y=truth, y_pred=outputs))


def test_all_arms_start_as_the_same_network():
    images = random_images(2, 64, 64, 1)
    outputs = {}
    for arm in detector.ARMS:
        keras.utils.set_random_seed(1)
        outputs[arm] = detector.Detector(arm)(images, training=False)
    for arm in detector.ARMS:
        for name in ("objectness", "proposals", "logits", "box_deltas"):
            np.testing.assert_allclose(
                outputs[arm][name], outputs["plain"][name], atol=1e-4
            )


BOXES = {
    "none": [],
    "one-pixel": [(10, 20, 11, 21)],
    "corners": [(63, 63, 64, 64), (0, 0, 1, 1)],
    "leaving": [(-20, -30, 30, 90)],
    "outside": [(70, 70, 90, 90)],
    "empty": [(30, 30, 30, 30)],
    "far-away": [(0, 0, 64, 64), (1e6, -1e6, 2e6, 3e6), (5, 6, 25, 36)],
}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_loss_and_gradients_are_finite(boxes, models):
    model = models[64]
    truth = np.full((2, 3, 4), -1, "float32")
    labels = np.full((2, 3), -1, "int32")
    for i, box in enumerate(boxes):
        truth[0, i], labels[0, i] = box, 1 + i
    y = {"boxes": tf.constant(truth), "labels": tf.constant(labels)}
    with tf.GradientTape() as tape:
        outputs = model(random_images(2, 64, 64, 1), training=True)
        loss = model.compute_loss(y=y, y_pred=outputs)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert np.isfinite(loss)
    for variable, gradient in zip(
        model.trainable_variables, gradients, strict=True
    ):
        assert gradient is not None, variable.path
        assert np.all(np.isfinite(gradient)), variable.path


def test_bad_arguments():
    with pytest.raises(ValueError, match="Expected `arm`.*Received: 'other'"):
        detector.Detector("other")
    with pytest.raises(ValueError, match="multiple of 4 or None. Received: 30"):
        detector.Detector("plain", image_size=30)
    with pytest.raises(ValueError, match="`image_size`.*Received.*None"):
        export.make_server(detector.Detector("plain", 11, None), CATEGORIES)


def test_average_precision_of_right_and_of_no_detections(tmp_path, capsys):
    digit_scenes.write(tmp_path / "scenes", train=0, val=5, test=0)
    scenes, coco = train.read_scenes(tmp_path / "scenes" / "val")
    _, truth = scenes.batch(5).get_single_element()
    valid = np.sum(truth["labels"] > 0, axis=1)

    def model(valid):
        found = {
            "boxes": truth["boxes"],
            "labels": truth["labels"],
            "scores": tf.ones(truth["labels"].shape),
            "valid": tf.constant(valid),
        }
        return types.SimpleNamespace(detect=lambda images: found)

    assert set(train.evaluate(model(valid), scenes, coco).values()) == {1.0}
    assert set(train.evaluate(model(0 * valid), scenes, coco).values()) == {0.0}


@pytest.mark.parametrize(
    "images,categories,annotations",
    [
        ((7, 9), (3, 5), (0, 1)),
        ((7, 9), (3, 5), (0, 0)),
        ((7, 9), (3, 5), (4, 4)),
        ((7, 9), (3, 5), (-1, 0)),
        ((7, 9), (3, 5), (2**63, 2**40)),
        ((7, 9), (3, 5), ("b", "a")),
        ((7, 9), (3, 5), (None, None)),
        ((0, 1), (0, 1), (1, 0)),
        ((9, -7), (5, -3), (1, 2)),
        (("one", "two"), ("x", "y"), (1, 2)),
    ],
)
def test_ids_of_other_peoples_files(images, categories, annotations):
    """Tests ids of any form.

    Right boxes count as right, wrong boxes as wrong.
    """
    low, high = sorted(categories)
    boxes = [[4, 5, 20, 22], [10, 5, 20, 22]]
    coco = {
        "images": [{"id": image, "file_name": "x.png"} for image in images],
        "categories": [{"id": x, "name": str(x)} for x in categories],
        "annotations": [
            {
                "id": annotations[i],
                "image_id": images[i],
                "category_id": (high, low)[i],
                "bbox": boxes[i],
                "area": 440,
                "iscrowd": 0,
            }
            for i in range(2)
        ],
    }
    before = json.dumps(coco)
    scenes = tf.data.Dataset.from_tensors((np.zeros((64, 64, 1)), 0)).repeat(2)

    def evaluate(labels):
        corners = np.array(boxes, "float32")[:, None]
        corners[..., 2:] += corners[..., :2]
        found = {
            "boxes": tf.constant(corners),
            "labels": tf.constant(labels)[:, None],
            "scores": tf.ones((2, 1)),
            "valid": tf.ones(2, "int32"),
        }
        model = types.SimpleNamespace(detect=lambda pixels: found)
        return train.evaluate(model, scenes, coco)

    assert set(evaluate([2, 1]).values()) == {1.0}
    # One of two categories is never found.
    assert evaluate([2, 2])["ap"] == pytest.approx(0.5, abs=0.01)
    assert set(evaluate([1, 2]).values()) == {0.0}
    assert json.dumps(coco) == before


def test_boxes_come_back_in_the_pixels_of_each_image():
    def detect(images):
        assert images.shape[1:] == (64, 64, 1)
        count = tf.shape(images)[0]
        boxes = tf.constant(
            [[[0, 0, 64, 16], [8, 4, 16, 12], [0] * 4]], "float32"
        )
        return {
            "boxes": tf.repeat(boxes, count, axis=0),
            "scores": tf.repeat([[0.9, 0.8, 0.0]], count, axis=0),
            "labels": tf.repeat([[2, 1, 0]], count, axis=0),
            "valid": tf.fill((count,), 2),
        }

    model = types.SimpleNamespace(detect=detect, image_size=64)
    server = export.make_server(model, CATEGORIES)
    wide, high = random_images(30, 120), random_images(128, 32, 3)
    found = server(tf.constant([encode(wide, "PNG"), encode(high, "JPEG")]))
    # The wide box is 16 x 64 in the square, the high box 64 x 16; the rest of
    # each is cut off.
    np.testing.assert_allclose(
        found["boxes"][0, :2], [(0, 0, 120, 30), (15, 7.5, 30, 22.5)]
    )
    np.testing.assert_allclose(
        found["boxes"][1, :2], [(0, 0, 32, 32), (16, 8, 32, 24)]
    )
    assert found["class_ids"][0].numpy().tolist() == [7, 3, 0]
    assert found["labels"][0].numpy().tolist() == [b"seven", b"three", b""]
