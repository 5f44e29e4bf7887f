# SPDX-License-Identifier: Apache-2.0
"""Tests arithmetic with boxes, in TensorFlow and where models are exported."""

import numpy as np
import pytest
import tensorflow as tf
from detectors import measure_overlaps
from exported import FILES, compile_openvino, run, write

from tf_deform import _loader
from tf_deform.models import _boxes, _pyramid

STOCK = ("portable", "onnx", "litert")
with_xla = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)


def random_boxes(rng, *shape, size=64):
    """Draws boxes of all sizes, cut at an image's edges."""
    middles = rng.uniform(-4, size + 4, (*shape, 2))
    sides = rng.uniform(2, size / 2, (*shape, 2))
    corners = (middles - sides / 2, middles + sides / 2)
    return np.concatenate(corners, -1).clip(0, size).astype("float32")


def test_strides_of_maps_of_all_sizes():
    """A map of half the cells, rounded up, has twice the stride."""
    for size in range(9, 700):
        cells = size
        for level in range(1, 8):
            cells = -(-cells // 2)
            if cells > 1:  # A single cell may have any large stride.
                found = _pyramid.stride_of(tf.zeros((1, cells, cells, 1)), size)
                assert found == 2**level, (size, level)
    # A map without borders.
    assert _pyramid.stride_of(tf.zeros((1, 6, 6, 1)), 224) == 32


def test_anchors_are_those_of_other_detectors():
    """MMDetection's anchors of stride 4 with its defaults, in its order."""
    anchors = _boxes.make_anchors((3, 2), 4, [8], [0.5, 1, 2])
    long, short = 16 * 2**0.5, 16 / 2**0.5
    first = [
        (-long, -short, long, short),
        (-16, -16, 16, 16),
        (-short, -long, short, long),
    ]
    assert anchors.shape == (18, 4) and anchors.dtype == np.float32
    np.testing.assert_allclose(anchors[:3], first, 1e-6)
    np.testing.assert_allclose(anchors[3:6], first + np.array([4, 0, 4, 0]))
    np.testing.assert_allclose(anchors[6:9], first + np.array([0, 4, 0, 4]))
    more = _boxes.make_anchors((1, 1), 16, [2, 3], [1])
    assert more.tolist() == [[-16, -16, 16, 16], [-24, -24, 24, 24]]


def test_deltas():
    anchors = np.float32([[10, 20, 30, 60], [0, 0, 8, 8]])
    boxes = np.float32([[14, 20, 34, 60], [0, 0, 16, 4]])
    deltas = _boxes.encode(anchors, boxes, (0.1, 0.1, 0.2, 0.2))
    expected = [
        (2, 0, 0, 0),
        (5, -2.5, 5 * np.log(2), -5 * np.log(2)),
    ]
    np.testing.assert_allclose(deltas, expected, 1e-6)
    back = _boxes.decode(anchors, deltas, (0.1, 0.1, 0.2, 0.2))
    np.testing.assert_allclose(back, boxes, 1e-6, 1e-5)


def test_deltas_of_odd_boxes_are_finite():
    odd = np.float32(
        [(-1, -1, -1, -1), (5, 5, 5, 9), (9, 9, 3, 2), (0, 0, 1e9, 1e9)]
    )
    for anchors in (odd, odd[::-1]):
        deltas = _boxes.encode(anchors, odd, (0.1, 0.1, 0.2, 0.2))
        assert np.all(np.isfinite(deltas))
    large = np.float32([(0, 0, 900, -900), (0, 0, 1e4, 1e4)])
    boxes = _boxes.decode(np.float32([[0, 0, 16, 32]] * 2), large, [1] * 4)
    widths = boxes.numpy()[:, 2] - boxes.numpy()[:, 0]
    np.testing.assert_allclose(widths, 1000, 1e-4)


def test_overlaps():
    rng = np.random.default_rng(0)
    boxes, others = random_boxes(rng, 1, 30), random_boxes(rng, 1, 20)
    boxes[0, :3] = [(-1, -1, -1, -1), (9, 9, 3, 3), (4, 4, 4, 8)]
    others[0, :3] = boxes[0, :3]
    found = _boxes.overlaps(tf.constant(boxes), tf.constant(others))[0]
    expected = measure_overlaps(boxes[0], others[0])
    np.testing.assert_allclose(found, expected, 1e-5)
    assert not np.any(found[:3]) and not np.any(found[:, :3])


def test_each_object_gets_its_best_anchor():
    anchors = np.float32([(0, 0, 10, 10), (0, 0, 20, 20), (40, 40, 60, 60)])
    truth = np.float32(
        [
            # The second anchor is the best of both, and overlaps the first of
            # them more; the last object touches no anchor.
            [(0, 0, 19, 19), (10, 10, 20, 20), (70, 70, 80, 80)],
            [(-1, -1, -1, -1)] * 3,
        ]
    )
    best, index, forced = _boxes.match(anchors, tf.constant(truth), 0.0)
    assert forced.numpy().tolist() == [[False, True, False], [False] * 3]
    assert index[0, 1] == 0 and index[0, 0] == 0
    np.testing.assert_allclose(
        best[0], measure_overlaps(anchors, truth[0]).max(1), 1e-5
    )
    # The second anchor overlaps the first object more, but is the best one of
    # the second object.
    anchors = np.float32([(0, 0, 20, 20), (10, 0, 30, 20)])
    truth = np.float32([[(0, 0, 20, 20), (24, 0, 30, 20)]])
    _, index, forced = _boxes.match(anchors, tf.constant(truth), 0.0)
    assert index.numpy().tolist() == [[0, 1]] and np.all(forced)


def test_choice_at_random():
    wanted = np.array([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5], bool)
    scores = np.float32([[0.2, 0.9, 0.4, 0.7, 0.99]] * 3)

    def choose(most, counts):
        counts = tf.constant(counts, "int32")
        return _boxes.choose(wanted, scores, most, counts).numpy().astype(int)

    assert choose(3, [2, 2, 2]).tolist() == [
        [0, 1, 0, 1, 0],
        [0, 1, 0, 0, 0],
        [0] * 5,
    ]
    assert choose(3, [0, 0, 0]).sum() == 0
    assert choose(5, [5, 1, 3]).tolist() == wanted.astype(int).tolist()


def test_regions():
    boxes = np.float32(
        [[(1, 2, 3, 4), (-1,) * 4], [(5, 6, 7, 8), (0, 0, 9, 9)]]
    )
    wanted = np.array([[True, True], [True, False]])
    rois = _boxes.to_rois(tf.constant(boxes), wanted, last=1.0)
    assert rois.numpy().tolist() == [
        [0, 1, 2, 2, 3],
        [-1, -1, -1, -2, -2],
        [1, 5, 6, 6, 7],
        [-1, 0, 0, 8, 8],
    ]


def suppress(boxes, scores, classes, size, max_overlap):
    """Returns rows of box, score and class; 0 beyond the last one."""
    places, real = _boxes.suppress(boxes, scores, size, max_overlap, classes)
    boxes, scores, classes = (
        tf.gather(x, places, batch_dims=1) for x in (boxes, scores, classes)
    )
    return {
        "boxes_out": tf.where(real[..., None], boxes, 0.0),
        "scores_out": tf.where(real, scores, 0.0),
        "classes_out": tf.where(real, classes, 0),
        "valid": tf.reduce_sum(tf.cast(real, "int32"), -1),
    }


@pytest.mark.parametrize("max_overlap", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_suppression_is_that_of_the_native_op(max_overlap, jit_compile):
    """The op takes a score for each class; here each box has one class."""
    rng = np.random.default_rng(1)
    count, labels, size = 300, 3, 200
    boxes = random_boxes(rng, 4, count)
    scores = np.sort(rng.permutation(4 * count).reshape(4, count))[:, ::-1]
    scores = (scores / (4 * count)).astype("float32")
    classes = rng.integers(0, labels, (4, count)).astype("int32")
    # The op keeps boxes of no area.
    real = np.all(boxes[..., 2:] > boxes[..., :2], -1)
    assert not real.all()
    one = np.eye(labels, dtype="float32")[classes] * (scores * real)[..., None]
    op = tf.image.combined_non_max_suppression(
        boxes[:, :, None], one, size, size, max_overlap, 0.0, clip_boxes=False
    )
    function = tf.function(
        lambda *x: suppress(*x, size, max_overlap), jit_compile=jit_compile
    )
    found = function(boxes, scores, classes)
    assert 20 < np.min(op[3]) and np.max(op[3]) <= size
    for name, expected in zip(
        ("boxes_out", "scores_out", "classes_out", "valid"), op, strict=True
    ):
        np.testing.assert_array_equal(found[name], expected, name)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_chain_takes_as_many_guesses_as_boxes(jit_compile):
    """Of boxes that overlap their neighbours alone, every second one stays."""
    count = 99
    starts = np.arange(count, dtype="float32")
    boxes = np.stack([starts, 0 * starts, starts + 2, 0 * starts + 1], -1)[None]
    function = tf.function(
        lambda boxes: _boxes.suppress(
            boxes, tf.ones((1, count)), count + 1, 0.3
        ),
        jit_compile=jit_compile,
    )
    places, real = function(tf.constant(boxes))
    assert real.numpy().sum() == 50
    assert places.numpy()[0, :50].tolist() == list(range(0, count, 2))


COUNT, CHOSEN, MAX_OVERLAP = 24, 20, 0.4999


def make_choices():
    """Returns boxes, scores and classes that a suppression may get wrong."""
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, COUNT)
    scores = np.linspace(0.9, 0.1, COUNT)
    # Halves of each other, and others beside them.
    halves = np.array([(0, 0, 8, 8), (0, 0, 4, 8), (0, 0, 8, 4)], "float32")
    halves = np.concatenate([halves + 9 * i for i in range(8)])
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
    no_number = scores.copy()
    no_number[::5] = np.nan
    choices = [
        (boxes, scores),
        (halves, scores),
        (some_empty, scores),
        (np.repeat(empty, 4, axis=0), scores),
        (boxes, np.full(COUNT, 0.5)),
        (np.repeat(boxes[:12], 2, 0), np.repeat(scores[:12], 2, 0)),
        (boxes, no_number),
        (boxes, 0 * scores),
        (boxes - (64, 0, 64, 0), scores),
    ]
    boxes, scores = (np.stack(x) for x in zip(*choices, strict=True))
    classes = rng.integers(0, 2, scores.shape)
    return (
        boxes.astype("float32"),
        scores.astype("float32"),
        classes.astype("int32"),
    )


def choose_one_by_one(boxes, scores, classes):
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1)
    overlap = measure_overlaps(boxes, boxes)
    kept = []
    for index in range(COUNT):
        if not scores[index] > 0 or not areas[index] > 0:
            continue
        goes = overlap[index] > MAX_OVERLAP
        if not any(goes[i] and classes[i] == classes[index] for i in kept):
            kept.append(index)
    kept = kept[:CHOSEN]
    rows = np.zeros((CHOSEN, 6), "float32")
    rows[: len(kept)] = np.concatenate(
        [boxes[kept], scores[kept, None], classes[kept, None]], -1
    )
    return rows, len(kept)


@pytest.mark.parametrize(
    "how", ["eager", "graph", pytest.param("xla", marks=with_xla), *STOCK]
)
def test_suppression_one_by_one(how, tmp_path):
    values = make_choices()
    inputs = dict(zip(("boxes", "scores", "classes"), values, strict=True))

    def function(boxes, scores, classes):
        return suppress(boxes, scores, classes, CHOSEN, MAX_OVERLAP)

    specs = [
        tf.TensorSpec((None, *value.shape[1:]), value.dtype, name)
        for name, value in inputs.items()
    ]
    graph = tf.function(function, specs, jit_compile=how == "xla")
    if how in STOCK:
        path = tmp_path / FILES[how]
        write(how, graph, path, sample=inputs)
        results = [run(how, path, inputs)]
        if how != "litert":
            results.append(compile_openvino(path)(inputs))
    else:
        results = [(function if how == "eager" else graph)(**inputs)]
    chosen = [choose_one_by_one(*each) for each in zip(*values, strict=True)]
    rows, counts = (np.stack(x) for x in zip(*chosen, strict=True))
    assert counts.max() > 9 and counts.min() == 0
    for found in results:
        np.testing.assert_array_equal(found["boxes_out"], rows[..., :4])
        np.testing.assert_array_equal(found["scores_out"], rows[..., 4])
        np.testing.assert_array_equal(found["classes_out"], rows[..., 5])
        np.testing.assert_array_equal(found["valid"], counts)
