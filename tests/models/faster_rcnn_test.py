# SPDX-License-Identifier: Apache-2.0
"""Tests FasterRCNN, and what it has in common with RFCN."""

import io

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from detectors import (
    SIZE,
    count_found,
    liven,
    make_backbone,
    make_faster_rcnn,
    make_rfcn,
    make_scenes,
    measure,
    measure_overlaps,
    paint,
    train,
)
from exported import FILES, FORMATS, compile_openvino, load, write

import tf_deform
from tf_deform import _loader, data
from tf_deform.models import FasterRCNN, _serving, predictions, serving

MAKERS = {"faster-rcnn": make_faster_rcnn, "rfcn": make_rfcn}
with_xla = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(1)
    return train(make_faster_rcnn(class_names=("red", "blue")), 180)


def assert_same(received, expected, of_boxes=0.0, of_scores=0.0):
    np.testing.assert_array_equal(received["valid"], expected["valid"])
    np.testing.assert_array_equal(received["labels"], expected["labels"])
    for name, error in (("boxes", of_boxes), ("scores", of_scores)):
        np.testing.assert_allclose(received[name], expected[name], 0, error)


def test_align_learns(trained):
    found, wrong = measure(trained)
    assert found > 0.9 and wrong < 0.15


@pytest.mark.parametrize(
    "pooling", [pytest.param("deform", marks=pytest.mark.slow), "moddeform"]
)
def test_displaced_bins_learn(pooling):
    keras.utils.set_random_seed(1)
    model = train(make_faster_rcnn(pooling, make_backbone(2, 3)), 240)
    found, wrong = measure(model)
    assert found > 0.9 and wrong < 0.15
    # Regions as small as here are pooled from the first map.
    weights = model.poolings[0].trainable_weights
    assert len(weights) == (4 if pooling == "moddeform" else 2)
    assert all(np.abs(weight).max() > 1e-5 for weight in weights)


@pytest.mark.parametrize("kind", MAKERS)
def test_result(kind):
    """Tests types, order and padding; uint8 and float images are alike."""
    model = liven(MAKERS[kind](min_score=0.2, max_detections=70))
    images = make_scenes(5)[0]
    found = model.detect(images)
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "boxes": ((5, 70, 4), "float32"),
        "scores": ((5, 70), "float32"),
        "labels": ((5, 70), "int32"),
        "valid": ((5,), "int32"),
    }
    assert 0 < found["valid"].min() and found["valid"].max() < 65
    for row, count in enumerate(found["valid"]):
        boxes, scores, labels = (
            found[name][row] for name in ("boxes", "scores", "labels")
        )
        assert np.all(boxes[:count] >= 0) and np.all(boxes <= SIZE)
        assert np.all(boxes[:count, 2:] > boxes[:count, :2])
        assert np.all(np.diff(scores) <= 0) and np.all(scores[:count] > 0.2)
        assert set(labels[:count]) <= {0, 1}
        assert np.all(boxes[count:] == -1) and np.all(labels[count:] == -1)
        assert not np.any(scores[count:])
    boxes, labels = found["boxes"][0], found["labels"][0]
    close = measure_overlaps(boxes, boxes) > 0.5001
    np.fill_diagonal(close, False)
    # Classes are judged one by one.
    assert close.any() and not np.any(close & (labels[:, None] == labels))
    assert_same(model.detect(images.astype("uint8")), found)
    assert_same(model(tf.constant(images, "uint8")), found, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_are_finite_whatever_the_objects(kind):
    model = MAKERS[kind]()
    model.min_anchor_overlap = 0.0  # Every object gets some anchor.
    images = make_scenes(2)[0]
    boxes = np.float32([(5, 5, 30, 40), (10, 10, 40, 30)])
    odd = {
        "none": np.zeros((2, 0, 4)),
        "padding": np.full((2, 2, 4), -1),
        "inverted": np.repeat(boxes[:, None, [2, 3, 0, 1]], 2, 1),
        "empty": np.repeat(boxes[:, None, [0, 1, 0, 1]], 2, 1),
        "outside": np.repeat(boxes[:, None] + 100, 2, 1),
        "whole": np.tile([0, 0, SIZE, SIZE], (2, 2, 1)),
        "of-a-pixel": np.tile([9, 9, 10, 10], (2, 2, 1)),
        "huge": np.tile([-1e9, -1e9, 1e9, 1e9], (2, 2, 1)),
        "infinite": np.tile([-np.inf, 0, np.inf, 9], (2, 2, 1)),
        "no-number": np.full((2, 2, 4), np.nan),
    }
    model.compile(keras.optimizers.SGD(1e-3))
    for name, boxes in odd.items():
        labels = np.full(boxes.shape[:2], -1 if name == "padding" else 1)
        objects = {"boxes": boxes.astype("float32"), "labels": labels}
        logs = model.train_on_batch(images, objects, return_dict=True)
        assert all(np.isfinite(value) for value in logs.values()), name
        has_objects = name in ("whole", "of-a-pixel", "huge", "infinite")
        assert (logs["rpn_box"] > 0) == has_objects, name
        model.reset_metrics()
    blank = np.zeros((1, SIZE, SIZE, 3), "uint8")
    assert np.all(np.isfinite(model.detect(blank)["boxes"]))
    for weight in model.weights:
        assert np.all(np.isfinite(weight)), weight.path


def test_a_label_too_many():
    model = make_faster_rcnn()
    objects = make_scenes(1)[1]
    with pytest.raises(Exception, match="labels below num_classes=2"):
        model._read_objects({**objects, "labels": 1 + objects["labels"]})


def compute_losses(model, images, objects, training=True):
    model.reset_metrics()
    outputs = model(images, training=True) if training else None
    loss = model.compute_loss(images, objects, outputs, training=training)
    parts = [float(model.trackers[name].result()) for name in model.trackers]
    np.testing.assert_allclose(float(loss), sum(parts), 1e-5)
    return parts


def test_samples_depend_on_seed_and_step_alone():
    """Tests what a run that goes on after a break relies on."""
    images, objects = make_scenes(4)
    first = make_faster_rcnn()
    other = make_faster_rcnn(seed=1)
    other.set_weights(first.get_weights())
    losses = {}
    for name, model in (("first", first), ("again", first), ("other", other)):
        model.compile(keras.optimizers.SGD(0.0))
        for step in (0, 7):
            model.optimizer.iterations.assign(step)
            losses[name, step] = compute_losses(model, images, objects)
            # As in training, whatever is detected.
            alone = compute_losses(model, images, objects, training=False)
            assert alone == losses[name, step]
    assert losses["first", 0] == losses["again", 0]
    assert losses["first", 7] == losses["again", 7]
    assert losses["first", 0] != losses["first", 7]
    assert losses["first", 0] != losses["other", 0]
    # There is no state of random numbers to keep.
    assert len(first.variables) == len(first.weights)


@pytest.mark.parametrize("kind", MAKERS)
def test_scores_start_at_one_in_a_hundred(kind):
    keras.utils.set_random_seed(0)
    model = MAKERS[kind]()
    images, _ = make_scenes(2)
    outputs = model(images, training=True)
    objectness = tf.sigmoid(tf.concat(outputs["objectness"], 1))
    boxes = tf.constant([[[8.0, 8, 40, 56], [20, 10, 50, 40]]] * 2)
    logits, _ = model._judge(outputs["maps"], boxes, False)
    odds = tf.exp(logits[..., :-1] - logits[..., -1:])
    # The kernels' first values move single scores by up to 7 % (six seeds), and
    # these means by up to 1.3 %.
    for shares, start in ((objectness, 0.00995), (odds, 0.01005)):
        np.testing.assert_allclose(np.mean(shares), start, rtol=0.02)


def test_losses_are_added_in_a_fixed_order():
    """Tests for sums that begin with the input that no tracker waits for."""
    model = make_faster_rcnn()
    model.trainable_weights[0].regularizer = keras.regularizers.L2(1e-3)
    images, objects = make_scenes(1)

    @tf.function
    def add():
        outputs = model(images, training=True)
        return model.compute_loss(images, objects, outputs)

    graph = add.get_concrete_function().graph
    assert len(model.losses) == 1
    sums = [op for op in graph.get_operations() if op.type == "AddN"]
    assert all(op.outputs[0].shape.rank for op in sums)


def test_logs():
    model = make_rfcn()
    images, objects = make_scenes(2)
    model.compile("sgd")
    logs = model.test_on_batch(images, objects, return_dict=True)
    assert set(logs) == {"loss", "rpn_class", "rpn_box", "class", "box"}


def test_regions_are_pooled_from_the_map_of_their_size():
    model = make_faster_rcnn(image_size=512)
    sides = [20, 111, 113, 223, 225, 500]
    boxes = np.float32([[(0, 0, side, side) for side in sides]])
    maps = [
        tf.fill((1, 512 // stride, 512 // stride, 16), float(stride))
        for stride in (4, 8, 16)
    ]
    bins = model._pool(maps, tf.constant(boxes)).numpy()
    levels = [4, 4, 8, 8, 16, 16]
    # A region's border reaches beyond the map by half a cell.
    assert bins[:, 3, 3, 0].tolist() == levels
    padding = model._pool(maps, tf.fill((1, 2, 4), -1.0))
    assert padding.shape == (2, 7, 7, 16) and not np.any(padding)


def test_anchors():
    model = make_faster_rcnn(anchor_scales=(4, 6))
    cells = sum((SIZE // stride) ** 2 for stride in (4, 8, 16, 32))
    assert model.anchors().shape == (6 * cells, 4)
    sides = np.sqrt(np.diff(model.anchors()[:, ::2]).prod(-1))
    assert sides.min() > 0


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", MAKERS)
def test_boxes_are_float32_under_every_policy(kind, policy):
    """Tests that float16, whose steps are half a pixel here, rounds no box."""
    size = 1024
    model = liven(MAKERS[kind](dtype=policy, image_size=size, min_score=0.01))
    image = np.random.default_rng(0).uniform(0, 255, (1, size, size, 3))
    found = model.detect(image)
    boxes = found["boxes"][0, : found["valid"][0]]
    assert len(boxes) > 3 and boxes.dtype == np.float32
    assert not np.array_equal(boxes, boxes.astype("float16"))
    outputs = model(tf.constant(image), training=True)
    assert outputs["objectness"][0].dtype == policy[len("mixed_") :]
    # Nor does it round an image's colours.
    exact = model.trunk(tf.constant(image, "float32"), training=True)
    for name in ("objectness", "deltas"):
        np.testing.assert_array_equal(outputs[name][0], exact[name][0])
    anchors = model.anchors()
    assert anchors.dtype == np.float32 and anchors.max() > 1024


RELOAD = """
import sys
import numpy as np
import keras
import tf_deform
data = dict(np.load(sys.argv[2]))
model = keras.saving.load_model(sys.argv[1])
found = model.detect(data.pop("images"))
for name, value in data.items():
    np.testing.assert_array_equal(found[name], value)
layers = len(tf_deform.deformable_layers(model))
print(model.class_names, model.dtype_policy.name, layers)
"""


@pytest.mark.parametrize(
    "kind, when", [("faster-rcnn", "before"), ("rfcn", "after")]
)
def test_files(kind, when, tmp_path, run_python):
    """Tests detectors whose backbone is made deformable before or after."""
    backbone = make_backbone(2, 4) if kind == "faster-rcnn" else None
    backbone = backbone or make_backbone(3, 4)
    changed = []

    def change(model):
        report = tf_deform.make_deformable(model, "c3-c4", verbose=False)
        changed.extend(report.changed)

    if when == "before":
        change(backbone)
    model = MAKERS[kind](
        backbone=backbone, class_names=["red", "blue"], dtype="mixed_bfloat16"
    )
    images = make_scenes(2)[0]
    liven(model)
    if when == "after":
        before = model.detect(images)
        change(model)
        assert_same(model.detect(images), before, 1e-3, 1e-4)
        liven(model)
    found = model.detect(images)
    assert found["valid"].min() > 2
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", images=images, **found)
    output = run_python(RELOAD, tmp_path / "model.keras", tmp_path / "data.npz")
    last = output.strip().split("\n")[-1]
    assert len(changed) == 4
    assert last == "('red', 'blue') mixed_bfloat16 4"


# The formats that take long to write have little to do with the kind.
EXPORTS = [
    pytest.param(kind, how, marks=mark)
    for kind in MAKERS
    for how in ("xla", *FORMATS)
    for mark in [
        pytest.mark.slow
        if kind == "rfcn" and how not in ("xla", "onnx")
        else ()
    ]
]


@pytest.mark.parametrize("kind, how", EXPORTS)
def test_exports_find_the_same(kind, how, tmp_path):
    pooling = {"faster-rcnn": "moddeform", "rfcn": "deform"}[kind]
    backbone = make_backbone(2, 3) if kind == "faster-rcnn" else None
    model = MAKERS[kind](pooling, backbone, min_score=0.15)
    tf_deform.make_deformable(model, "c3", verbose=False)
    liven(model)
    images = make_scenes(3)[0]
    expected = model.detect(images)
    assert expected["valid"].min() > 3
    if how == "xla":
        compiled = tf.function(model, jit_compile=True)
        assert_same(compiled(tf.constant(images)), expected, 1e-3, 1e-4)
        return
    path = tmp_path / FILES[how]
    write(how, model, path, sample=images)
    readers = [load(how, path)]
    if how == "onnx":
        readers.append(compile_openvino(path))
    for read in readers:
        for few in (images, images[:1]):
            found = read({"image": few})
            some = {name: value[: len(few)] for name, value in expected.items()}
            assert_same(found, some, 1e-3, 1e-4)


def make_photograph():
    """Paints objects all over a photograph larger than the model's images."""
    boxes = [
        (x, y, x + 14 + (x + y) % 9, y + 12 + (3 * x + y) % 11)
        for y in range(3, 120, 29)
        for x in range(4, 160, 31)
    ]
    labels = [index % 2 for index in range(len(boxes))]
    return paint(140, 190, boxes, labels), boxes, labels


def test_tiles_find_each_object_once(trained):
    image, boxes, labels = make_photograph()
    found = trained.predict_image(image, tile=SIZE, overlap=0.5)
    right, wrong = count_found(found, boxes, labels)
    assert right >= 0.9 * len(boxes) and wrong <= 0.1 * len(boxes)
    assert found["boxes"].dtype == np.float32
    assert found["labels"].dtype == np.int32
    assert np.all(np.diff(found["scores"]) <= 0)
    # Each tile would find the objects of four others.
    whole = trained.predict_image(image)
    assert len(whole["scores"]) <= trained.max_detections < len(boxes)


def test_predictions_of_photographs(trained, tmp_path):
    image, boxes, _ = make_photograph()
    parts = [image[:SIZE, :SIZE], image]
    for name, part in zip("ab", parts):
        PIL.Image.fromarray(part).save(tmp_path / f"{name}.png")
        voc = "<annotation><object><name>x</name><bndbox><xmin>1</xmin>"
        voc += "<ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        (tmp_path / f"{name}.xml").write_text(f"{voc}</annotation>")
    photographs = data.read(f"voc:{tmp_path}").photographs
    for tile in (None, SIZE):
        found = predictions(trained, photographs, tile)
        for count, (number, objects) in enumerate(found, start=1):
            assert number == count
            expected = trained.predict_image(parts[number - 1], tile)
            # Of the larger one as a whole, objects are smaller than learned.
            assert len(expected["scores"]) > 0 or (number, tile) == (2, None)
            assert_same_objects(objects, expected)
        assert count == 2
    # A model keeps the tiles that it learned from.
    config = {**trained.get_config(), "tile": SIZE}
    model = FasterRCNN.from_config(config)
    model.set_weights(trained.get_weights())
    assert_same_objects(model.predict_image(image), expected)


def assert_same_objects(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, 1e-5, 1e-5)


def test_a_tile_is_seen_in_its_own_size(trained):
    """An image of a tile's size gives what it gives alone, scaled."""
    image, boxes, labels = make_photograph()
    part = image[:SIZE, :SIZE]
    alone = trained.detect(part[None])
    count = alone["valid"][0]
    for tile in (None, SIZE):
        found = trained.predict_image(part, tile)
        expected = alone["boxes"][0, :count]
        np.testing.assert_allclose(found["boxes"], expected, 1e-5, 1e-5)
    twice = part.repeat(2, 0).repeat(2, 1)
    found = trained.predict_image(twice, 2 * SIZE)
    shrunk = tf.image.resize(twice, (SIZE, SIZE), antialias=True)
    shrunk = trained.detect(shrunk[None].numpy())
    count = shrunk["valid"][0]
    for name, scale in (("boxes", 2), ("scores", 1), ("labels", 1)):
        expected = scale * shrunk[name][0, :count]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    assert min(count, alone["valid"][0]) > 0
    # A narrow photograph is not enlarged to a tile.
    narrow = np.full((SIZE, SIZE, 3), 114, "uint8")
    narrow[:40, :30] = part[:40, :30]
    expected = trained.detect(narrow[None])
    found = trained.predict_image(narrow[:40, :30], SIZE)
    # Boxes are cut at its edge, where some then cover each other.
    limits = np.float32([30, 40, 30, 40])
    cut = np.minimum(expected["boxes"][0, : expected["valid"][0]], limits)
    np.testing.assert_allclose(found["boxes"][0], cut[0], 1e-5, 1e-5)
    for box in found["boxes"]:
        assert np.any(np.isclose(box, cut, atol=1e-4).all(-1))
    real = cut[(cut[:, :2] < cut[:, 2:]).all(-1)]
    overlaps = measure_overlaps(real, found["boxes"]).max(1)
    assert np.all(overlaps > trained.max_overlap)


def test_which_boxes_of_tiles_stay():
    # Box, score, label, tile, and whether its tile cuts it.
    rows = [
        ((0, 0, 20, 20), 0.6, 0, 0, False),
        ((12, 0, 20, 20), 0.9, 0, 1, True),  # a part of the one before
        ((12, 0, 20, 20), 0.8, 1, 1, True),  # of another class
        ((0, 0, 7, 20), 0.5, 0, 1, False),  # whole: another object
        ((12, 0, 20, 19), 0.4, 0, 0, True),  # beside the first, in one tile
        ((40, 0, 60, 20), 0.7, 0, 2, True),  # parts of a large object
        ((56, 0, 80, 20), 0.3, 0, 3, True),
        ((57, 0, 80, 20), 0.2, 0, 4, True),
        ((1, 0, 20, 20), 0.1, 0, 5, False),  # the first one once more
    ]
    boxes, scores, labels, tiles, cut = zip(*rows, strict=True)
    rows = {
        "boxes": np.float32(boxes),
        "scores": np.float32(scores),
        "labels": np.array(labels),
        "tile": np.array(tiles),
        "cut": np.array(cut),
    }
    assert _serving._merge(rows, 0.5).tolist() == [2, 5, 0, 3, 4, 6]


def test_bad_photographs(trained):
    image = make_photograph()[0]
    for bad in (image[..., 0], image / 255, image[:0]):
        with pytest.raises(ValueError, match="Expected `image`"):
            trained.predict_image(bad)
    with pytest.raises(ValueError, match="tile=0"):
        trained.predict_image(image, 0)
    with pytest.raises(ValueError, match="overlap=1"):
        trained.predict_image(image, 64, 1)


def test_serving(trained, tmp_path):
    image = make_photograph()[0][: SIZE - 3, :SIZE]
    images = [image, image[:40, :50], image[:, :, :1].repeat(3, 2)]
    files = []
    for kind, pixels in zip(("PNG", "PNG", "JPEG"), images, strict=True):
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, kind)
        files.append(file.getvalue())
    archive = keras.export.ExportArchive()
    archive.track(trained)
    archive.add_endpoint("serve", serving(trained))
    archive.write_out(tmp_path / "served", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "served")
    serve = loaded.serve
    found = {k: v.numpy() for k, v in serve(tf.constant(files)).items()}
    assert found["valid"].max() > 2
    for row, pixels in enumerate(images[:2]):
        expected = trained.predict_image(pixels)
        count = found["valid"][row]
        assert count == len(expected["boxes"])
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name][row, :count], value, 1e-4, 1e-3
            )
        names = [(b"red", b"blue")[i] for i in expected["labels"]]
        assert found["names"][row].tolist() == names + [b""] * (10 - count)
        assert np.all(found["labels"][row, count:] == -1)
    # A camera that is held upright stores a turned image and says so.
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x112] = 6
    stored = PIL.Image.fromarray(image).transpose(PIL.Image.Transpose.ROTATE_90)
    stored.save(file, "JPEG", quality=100, subsampling=0, exif=exif)
    turned = serve(tf.constant([file.getvalue()]))
    pixels = np.asarray(PIL.Image.open(file))
    expected = trained.predict_image(np.rot90(pixels, -1))
    count = len(expected["boxes"])
    assert turned["valid"].numpy() == [count]
    assert count > 0
    np.testing.assert_allclose(
        turned["boxes"][0, :count], expected["boxes"], 1e-4, 1e-3
    )
    none = serve(tf.constant([], tf.string))
    assert none["boxes"].shape == (0, 10, 4)
    with pytest.raises(TypeError, match="to be a FasterRCNN, RFCN"):
        serving(trained.backbone)


BAD = {
    "expected-pooling": (ValueError, {"pooling": "max"}),
    "class_names": (ValueError, {"class_names": ["one"]}),
    "anchor_scales": (ValueError, {"anchor_scales": ()}),
    "image_size": (ValueError, {"image_size": 0}),
    "proposals": (TypeError, {"proposals": 1.5}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    error, arguments = BAD[name]
    with pytest.raises(error, match=name.split("-")[-1]):
        make_faster_rcnn(**arguments)


def test_backbones():
    model = FasterRCNN(
        "resnet50", 3, image_size=64, fpn_channels=8, head_units=8
    )
    assert model._scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    # Sizes that are no multiples of a stride.
    small = make_backbone(2, 5, 2)
    model = FasterRCNN(
        keras.Model(small.inputs, list(small.output.values())),
        1,
        image_size=100,
        fpn_channels=8,
        head_units=8,
        proposals=9,
    )
    shapes = [len(anchors) for anchors in model._anchors]
    assert shapes == [3 * n**2 for n in (25, 13, 7, 4, 2)]
    assert model.detect(np.zeros((1, 100, 100, 3)))["boxes"].shape[1] == 100
    maps = {name: small.output[name] for name in ("P2", "P4")}
    with pytest.raises(ValueError, match="P2 to have twice the cells"):
        make_faster_rcnn(backbone=keras.Model(small.inputs, maps))
    maps = {"features": small.output["P3"]}
    with pytest.raises(ValueError, match="features"):
        make_faster_rcnn(backbone=keras.Model(small.inputs, maps))
