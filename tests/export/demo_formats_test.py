# SPDX-License-Identifier: Apache-2.0
"""Tests that the examples' models give the same results in every format.

Features agree to 1e-4 of the largest, boxes and labels are the same in the same
order, and scores agree to 1e-3, for any batch and size; XLA compiles for given
sizes. The portable SavedModel, ONNX and LiteRT also run in processes that know
nothing else (`examples/serve.py`); OpenVINO reads the former two.
"""

import exports
import keras
import numpy as np
import pytest
import segmentation
import tensorflow as tf
from detection import detector
from detection_test import make_detector, random_boxes, random_scores
from exported import FORMATS, compile_openvino, load, run, write
from operands import random

from tf_deform import _loader

# The models, and the names of their inputs.
INPUTS = {"segmenter": "image", "features": "image", "detections": "images"}
SUBJECTS = tuple(INPUTS)
STOCK = ("portable", "onnx", "litert")
READ_BY_OPENVINO = {
    (subject, kind) for subject in SUBJECTS for kind in ("portable", "onnx")
} - {("detections", "portable")}
SHAPES = ((1, 64, 64, 1), (3, 48, 96, 1), (2, 100, 40, 1))

with_xla = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)


def make_segmenter():
    """Makes a segmenter that displaces samples, like a trained model."""
    keras.utils.set_random_seed(2)
    model = segmentation.build_model("dcn-v2", None)
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.1))
    return model


def make_features():
    """Makes the detector up to the maps from which regions are pooled."""
    model = make_detector("both", None)
    names = ("scores", "boxes", "features")
    maps = dict(zip(names, model.output["maps"], strict=True))
    return keras.Model(model.inputs, maps)


def make_cutting_detector():
    """Makes a detector some of whose boxes are clipped to nothing."""
    model = make_detector("both", None)
    # Boxes move to the left, and regions become narrower.
    model.get_layer("anchor_deltas").weights[1].assign(
        np.tile(np.float32((-8, 0, 0, 0)), len(detector.ANCHORS))
    )
    model.get_layer("box_maps").weights[1].assign(
        np.repeat(np.float32((-8, 0, -8, 0)), detector.BINS**2)
    )
    return model


def assert_same_features(received, expected):
    for name, value in expected.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(received[name], value, 0, 1e-4 * largest)


def assert_same_detections(received, expected):
    assert np.all(expected["valid"].numpy() > 3)
    np.testing.assert_array_equal(received["valid"], expected["valid"])
    np.testing.assert_array_equal(received["labels"], expected["labels"])
    # The error is in pixels.
    np.testing.assert_allclose(received["boxes"], expected["boxes"], 0, 1e-3)
    np.testing.assert_allclose(received["scores"], expected["scores"], 0, 1e-3)


def make(subject):
    """Returns the model to export, its function, and the comparison."""
    if subject == "detections":
        model = make_cutting_detector()
        return model.detect, model._detect, assert_same_detections
    model = {"segmenter": make_segmenter, "features": make_features}[subject]()

    def function(images):
        outputs = model(images, training=False)
        return outputs if isinstance(outputs, dict) else {"output_0": outputs}

    return model, function, assert_same_features


@pytest.mark.parametrize("how", ["graph", pytest.param("xla", marks=with_xla)])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_graph_and_xla(subject, how):
    _, function, assert_same = make(subject)
    compiled = tf.function(function, jit_compile=how == "xla")
    for shape in SHAPES[:2]:
        images = tf.constant(random(*shape, dtype="uint8"))
        assert_same(compiled(images), function(images))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_exported(subject, kind, tmp_path):
    """Tests files here and, for the detector, in a process of their own.

    The examples' tests run a segmenter's files in processes, and a detector's
    native SavedModel.
    """
    exportable, function, assert_same = make(subject)
    path = tmp_path / exports.FORMATS[kind]
    write(kind, exportable, path)
    readers = [load(kind, path)]
    if (subject, kind) in READ_BY_OPENVINO:
        readers.append(compile_openvino(path))
    for shape in SHAPES:
        images = random(*shape, dtype="uint8")
        expected = function(tf.constant(images))
        for read in readers:
            assert_same(read({INPUTS[subject]: images}), expected)
    if subject == "detections" and kind in STOCK:
        assert_same(exports.run_alone(path, images, native=False), expected)


@pytest.mark.slow
def test_openvino_reads_the_portable_detector(tmp_path):
    """Tests what `test_exported` leaves out, as OpenVINO takes long to compile.

    There OpenVINO reads the detector's ONNX file, and the portable SavedModels
    of the others.
    """
    model, function, assert_same = make("detections")
    write("portable", model, tmp_path / "model")
    read = compile_openvino(tmp_path / "model")
    for shape in SHAPES:
        images = random(*shape, dtype="uint8")
        assert_same(read({"images": images}), function(tf.constant(images)))


def test_boxes_beside_the_image_are_among_those():
    model = make_cutting_detector()
    images = tf.constant(random(*SHAPES[0], dtype="uint8"))
    outputs = model(images)
    size = SHAPES[0][1:3]
    anchors = detector.make_anchors(*(x // detector.STRIDE for x in size))
    boxes = detector.decode(anchors, outputs["anchor_deltas"], *size)
    _, best = tf.math.top_k(outputs["objectness"], detector.CANDIDATES)
    areas = measure(tf.gather(boxes, best, batch_dims=1).numpy())
    assert np.sum(areas == 0) > 10 and np.sum(areas > 0) > 40

    proposals = outputs["proposals"].numpy()
    real = proposals[..., 2] >= 0
    assert np.all(measure(proposals[real]) > 0)
    boxes = detector.decode(proposals, outputs["box_deltas"], *size).numpy()
    assert np.sum(measure(boxes[real]) == 0) > 3
    found = model.detect(images)
    valid = found["valid"].numpy()[0]
    assert np.all(measure(found["boxes"].numpy()[0, :valid]) > 0)


def measure(boxes):
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


COUNT, CLASSES, CHOSEN, MIN_SCORE = 24, 3, 20, np.float32(0.1)


def make_choices():
    """Returns boxes and scores that a suppression may get wrong."""
    rng = np.random.default_rng(0)
    boxes = random_boxes(COUNT)
    scores = random_scores(COUNT, CLASSES)
    descending = np.sort(scores, axis=0)[::-1]
    # Boxes of whole pixels: halves of each other, and others beside them.
    halves = np.array([(0, 0, 8, 8), (0, 0, 4, 8), (0, 0, 8, 4)], "float32")
    halves = np.concatenate([halves + 9 * i for i in range(8)])
    # Boxes at the image's edge or corner; a line, a point, reversed ones,
    # padding.
    empty = np.array(
        [
            (0, 10, 0, 30),
            (0, 0, 0, 0),
            (64, 64, 64, 64),
            (5, 7, 25, 7),
            (30, 30, 20, 20),
            (-1, -1, -1, -1),
        ],
        "float32",
    )
    some_empty = np.where(np.arange(COUNT)[:, None] % 3, boxes, empty[0])
    some_empty[: len(empty)] = empty
    nan = np.where(rng.random(scores.shape) < 0.3, np.nan, scores)
    choices = {
        "random": (boxes, scores),
        "halves": (halves, descending),
        "empty-first": (some_empty, descending),
        "all-empty": (np.repeat(empty, 4, axis=0), descending),
        "equal-scores": (boxes, np.full_like(scores, 0.5)),
        "at-the-score": (boxes, np.full_like(scores, MIN_SCORE)),
        "twins": (np.repeat(boxes[:12], 2, 0), np.repeat(scores[:12], 2, 0)),
        "no-number": (boxes, nan),
        "none": (boxes, np.zeros_like(scores)),
        "beside": (boxes - (64, 0, 64, 0), scores),
    }
    boxes, scores = (np.stack(x) for x in zip(*choices.values(), strict=True))
    return boxes.astype("float32"), scores.astype("float32")


def choose(boxes, scores):
    """Computes `detector.suppress` box by box."""
    areas = measure(boxes.astype("float64"))
    entries = [
        (-scores[box, label], label, box)
        for box in range(COUNT)
        for label in range(CLASSES)
        if scores[box, label] > MIN_SCORE and areas[box] > 0
    ]
    kept = []
    for _, label, box in sorted(entries):
        for _, other_label, other in kept:
            common = np.concatenate(
                (
                    np.maximum(boxes[box, :2], boxes[other, :2]),
                    np.minimum(boxes[box, 2:], boxes[other, 2:]),
                )
            )
            common = measure(common.astype("float64"))
            union = areas[box] + areas[other] - common
            overlaps = common > detector.DETECTION_OVERLAP * union
            if label == other_label and overlaps:
                break
        else:
            kept.append((scores[box, label], label, box))
    kept = kept[:CHOSEN]
    rows = np.zeros((CHOSEN, 6), "float32")
    for row, (score, label, box) in zip(rows, kept, strict=False):
        row[:] = (*boxes[box], score, label)
    return rows, len(kept)


@pytest.mark.parametrize(
    "how", ["eager", "graph", pytest.param("xla", marks=with_xla), *STOCK]
)
def test_suppression(how, tmp_path):
    boxes, scores = make_choices()
    inputs = {"boxes": boxes, "scores": scores}
    limits = (CHOSEN, detector.DETECTION_OVERLAP, MIN_SCORE)

    def suppress(boxes, scores):
        found = detector.suppress(boxes, scores, *limits)
        names = ("boxes_out", "scores_out", "classes", "valid")
        return dict(zip(names, found, strict=True))

    specs = [
        tf.TensorSpec((None, *value.shape[1:]), name=name)
        for name, value in inputs.items()
    ]
    function = tf.function(suppress, specs, jit_compile=how == "xla")
    results = [suppress(**inputs) if how == "eager" else function(**inputs)]
    if how in STOCK:
        path = tmp_path / exports.FORMATS[how]
        # Random boxes have no results to compare with.
        write(how, function, path, sample=inputs)
        results = [run(how, path, inputs)]
        if how != "litert":
            results.append(compile_openvino(path)(inputs))
    chosen = [choose(*each) for each in zip(boxes, scores, strict=True)]
    rows, counts = (np.stack(x) for x in zip(*chosen, strict=True))
    expected = {
        "boxes_out": rows[..., :4],
        "scores_out": rows[..., 4],
        "classes": rows[..., 5],
        "valid": counts,
    }
    for found in results:
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, name)
