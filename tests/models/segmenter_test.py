# SPDX-License-Identifier: Apache-2.0
"""Tests `tf_deform.models.Segmenter`."""

from __future__ import annotations

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tf_deform
from tf_deform import _loader, export, models
from tf_deform.models import Segmenter

layers = keras.layers
SIZE = 80  # of images
COLOURS = np.uint8([[200, 30, 60], [50, 180, 20], [10, 70, 220]])


def make_network(size: int | None = SIZE) -> keras.Model:
    """Makes a small network of stride 32."""
    image = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 255, dtype="float32")(image)
    x = layers.Conv2D(4, 3, 2, padding="same", name="c1")(x)
    for level, width in ((2, 5), (3, 6), (4, 7), (5, 8)):
        options = {"padding": "same", "activation": "softplus"}
        x = layers.Conv2D(width, 3, 2, name=f"c{level}", **options)(x)
        x = layers.Conv2D(width, 3, name=f"c{level}_a", **options)(x)
    return keras.Model(image, x, name="small")


def make(**arguments) -> Segmenter:
    keras.utils.set_random_seed(3)
    arguments = {"num_classes": 4, "filters": 9, **arguments}
    return Segmenter(make_network(), image_size=SIZE, **arguments)


def displaced(**arguments) -> Segmenter:
    """Makes a model with displacements that are not zero."""
    model = make(**arguments)
    tf_deform.make_deformable(model, "c3-", verbose=False)
    rng = np.random.default_rng(4)
    for layer in tf_deform.deformable_layers(model):
        layer.offset_bias.assign(rng.normal(0, 0.7, layer.offset_bias.shape))
    return model


def images(count: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype("float32")


def masks(count: int = 2, void: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 4, (count, SIZE, SIZE, 1)).astype("int32")
    return np.where(rng.random(ids.shape) < void, 255, ids)


def make_of_colours() -> Segmenter:
    """Makes a model whose logits are the mean red, green and blue of cells."""
    image = keras.Input((SIZE, SIZE, 3))
    network = keras.Model(image, layers.AveragePooling2D(8)(image))
    model = Segmenter(network, 3, 8, image_size=SIZE, filters=3)
    for name in ("hidden", "score"):
        kernel = np.eye(3).reshape(1, 1, 3, 3)
        model.get_layer(name).set_weights([kernel, np.zeros(3)])
    return model


def photograph(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture of regions in three colours, and their ids."""
    y, x = np.mgrid[:height, :width]
    ids = np.where(x + y > 0.6 * (height + width), 2, 0)
    ids[np.hypot(y - 0.45 * height, x - 0.4 * width) < 0.25 * width] = 1
    return COLOURS[ids], ids


def inside(ids: np.ndarray, cells: int) -> np.ndarray:
    """Tells which pixels are `cells` pixels from any other region."""
    padded = np.pad(ids, cells, mode="edge")
    height, width = ids.shape
    moved = [
        padded[y : y + height, x : x + width]
        for y in (0, cells, 2 * cells)
        for x in (0, cells, 2 * cells)
    ]
    return np.all(np.stack(moved) == ids, 0)


# Logits.


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_logits_by_the_parts(stride):
    """Computes the head with NumPy, and the enlargement cell by cell."""
    names = ["P2", "P3", "P4", "P5"]
    if stride == 4:  # A backbone that ends there.
        network = make_network()
        x = {"P2": network.get_layer("c2_a").output}
        fine = keras.Model(network.input, x)
        model = Segmenter(fine, 4, stride, image_size=SIZE, filters=9)
        names = names[:1]
    else:
        model = make(output_stride=stride)
    maps = model.backbone(images())
    assert list(maps) == names
    cells = -(-SIZE // stride)
    x = np.array(maps[names[-1]], "float64")
    assert x.shape == (2, cells, cells, 5 if stride == 4 else 8)
    for name in ("hidden", "score"):
        kernel, bias = model.get_layer(name).get_weights()
        x = x @ np.float64(kernel[0, 0]) + bias
        if name == "hidden":
            x = np.maximum(x, 0)
    # The centre of pixel i is at (i + 0.5) / stride - 0.5 among the cells.
    place = (np.arange(SIZE) + 0.5) / stride - 0.5
    place = np.clip(place, 0, cells - 1)
    low = np.minimum(place.astype(int), cells - 2)
    share = place - low
    for axis in (1, 2):
        part = share.reshape((-1,) + (1,) * (3 - axis))
        x = (1 - part) * x.take(low, axis) + part * x.take(low + 1, axis)
    logits = model(images())
    assert logits.dtype == "float32"
    np.testing.assert_allclose(logits, x, atol=1e-5 * np.abs(x).max())
    assert np.std(logits) > 1e-3


def test_dilation_changes_no_cell_away_from_borders():
    """Compares with stride 32, of which the finer map has all cells."""
    size = 192
    coarse = make_network(size)
    for weight in coarse.weights:  # Zeros would come out in any case.
        if len(weight.shape) == 1:
            weight.assign(np.linspace(-0.3, 0.4, weight.shape[0]))
    fine = Segmenter(coarse, 4, 16, image_size=size).backbone
    rng = np.random.default_rng(2)
    given = rng.integers(0, 256, (1, size, size, 3)).astype("float32")
    expected = np.array(coarse(given))
    found = np.array(fine(given)["P5"])[:, 1::2, 1::2]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(found[inner], expected[inner], rtol=1e-4)


def test_integers_are_taken_as_pixels():
    model = make()
    given = images()
    np.testing.assert_array_equal(model(given.astype("uint8")), model(given))


@pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)
def test_xla_gives_the_same_logits():
    model = displaced()
    compiled = tf.function(model, jit_compile=True)(images())
    expected = np.array(model(images()))
    largest = np.abs(expected).max()
    np.testing.assert_allclose(compiled, expected, atol=1e-5 * largest)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    expected = np.array(make()(images()))
    keras.mixed_precision.set_global_policy(policy)
    model = make()
    model.compile("sgd")
    logits = model(images())
    assert logits.dtype == "float32"
    assert model.get_layer("hidden").compute_dtype == policy[6:]
    assert model.get_layer("score").compute_dtype == "float32"
    assert model.backbone.get_layer("c5").compute_dtype == policy[6:]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=0.02 * largest)
    loss = model.train_on_batch(images(), masks())
    assert np.isfinite(loss)


# Training.


def reference_loss(logits: np.ndarray, ids: np.ndarray) -> float:
    logits, ids = np.float64(logits), ids[..., 0]
    shifted = logits - logits.max(-1, keepdims=True)
    chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    counted = ids != 255
    return -chances[counted, ids[counted]].mean()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_loss_is_the_mean_over_pixels_that_count(jit_compile):
    if jit_compile and not _loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    model = displaced()
    model.compile("sgd", jit_compile=jit_compile)
    loss = model.test_on_batch(images(), masks())
    expected = reference_loss(np.array(model(images())), masks())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [("float32", False), ("float32", True), ("mixed_bfloat16", False)],
)
def test_a_batch_of_void_alone_changes_nothing(policy, jit_compile):
    if jit_compile and not _loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    keras.mixed_precision.set_global_policy(policy)
    model = displaced()
    model.compile("sgd", jit_compile=jit_compile)
    before = model.get_weights()
    assert model.train_on_batch(images(), masks(void=1)) == 0
    np.testing.assert_equal(model.get_weights(), before)


def test_it_learns(tmp_path):
    """Fits one scene, and goes on after the file was loaded."""
    model = displaced(num_classes=3)
    picture, ids = photograph(SIZE, SIZE)
    given = np.float32(picture[None])
    target = np.int32(ids[None, ..., None])
    target[:, :20] = 255
    data = tf.data.Dataset.from_tensors((given, target)).repeat()
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, metrics=["accuracy"], jit_compile=False)
    history = model.fit(data, steps_per_epoch=30, epochs=2, verbose=0).history
    assert history["loss"][1] < 0.5 * history["loss"][0]
    counted = target[0, ..., 0] != 255
    found = model.predict_image(picture)
    assert np.mean(found[counted] == ids[counted]) > 0.8
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    losses = [
        each.fit(data, steps_per_epoch=3, verbose=0).history["loss"]
        for each in (model, loaded)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_other_losses_and_ids():
    model = make(ignore_class=None)
    model.compile("sgd")
    assert np.isfinite(model.test_on_batch(images(), masks(void=0)))
    model = make(ignore_class=0)
    model.compile("sgd")
    assert model.test_on_batch(images(), 0 * masks()) == 0
    model.compile("sgd", "mse")
    target = np.zeros((2, SIZE, SIZE, 4), "float32")
    expected = np.mean(np.square(model(images())))
    loss = model.test_on_batch(images(), target)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_frozen_parts():
    model = displaced()
    trained = tf_deform.train_only(model, "c3-")
    names = {layer.name for layer in trained}
    assert {"c3", "c5_a", "hidden", "score"} <= names
    assert not {"c1", "c2", "c2_a"} & names


# Files.


_LOAD = """
import sys
import keras
import numpy as np
import tf_deform
model = keras.saving.load_model(sys.argv[1] + "/model.keras")
logits = model(np.load(sys.argv[1] + "/images.npy"))
np.save(sys.argv[1] + "/logits.npy", logits)
print(type(model).__name__, model.class_names, model.ignore_class)
"""


def test_a_fresh_process(tmp_path, run_python):
    model = displaced(class_names=["sky", "b", "c", "d"], output_stride=8)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images())
    said = run_python(_LOAD, tmp_path)
    assert said.strip() == "Segmenter ('sky', 'b', 'c', 'd') 255"
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_array_equal(logits, model(images()))


def test_config_holds_every_argument():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    arguments = {"output_stride": 8, "ignore_class": 3, "filters": 7}
    model = make(class_names=[*"abcd"], name="own", tile=20, **arguments)
    keras.mixed_precision.set_global_policy("float32")
    again = Segmenter.from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(again(images()), model(images()))
    for name in (*arguments, "class_names", "tile"):
        assert getattr(again, name) == getattr(model, name)
    assert again.name == "own"
    assert again.get_layer("hidden").compute_dtype == "bfloat16"


def test_weights_alone(tmp_path):
    model = displaced()
    model.save_weights(tmp_path / "model.weights.h5")
    other = displaced()
    for weight in other.weights:
        weight.assign(0 * weight)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(images()), model(images()))


# Photographs.


@pytest.mark.parametrize("size", [(SIZE, SIZE), (150, 210), (61, 37), (1, 3)])
def test_a_photograph_as_a_whole(size):
    model = make_of_colours()
    picture, ids = photograph(*size)
    found = model.predict_image(picture)
    assert found.shape == size and found.dtype == np.int32
    # Of a cell's 8 pixels the photograph has so many.
    near = int(np.ceil(1.5 * 8 * max(size) / SIZE))
    sure = inside(ids, near)
    assert min(size) < 30 or np.mean(sure) > 0.1
    np.testing.assert_array_equal(found[sure], ids[sure])
    if min(size) > 30:
        assert np.mean(found == ids) > 0.9


@pytest.mark.parametrize(
    ("tile", "overlap", "size"),
    [(SIZE, 0.25, (150, 210)), (50, 0.4, (61, 130)), (90, 0, (91, 60))],
)
def test_tiles(tile, overlap, size):
    """Takes each pixel from the tile whose centre is nearest, by hand."""
    model = make_of_colours()  # of noise, of which every tile has other cells
    rng = np.random.default_rng(7)
    picture = rng.integers(0, 256, (*size, 3)).astype("uint8")
    calls = []
    whole = Segmenter.predict_on_batch

    def predict_on_batch(x):
        calls.append(x)
        return whole(model, x)

    model.predict_on_batch = predict_on_batch
    found = model.predict_image(picture, tile, overlap)
    starts = []
    for extent in size:
        step = int(tile * (1 - overlap))
        count = max(-(-(extent - tile) // step), 0) + 1
        starts.append(
            [
                (extent - tile) * i // max(count - 1, 1) if extent > tile else 0
                for i in range(count)
            ]
        )
    assert len(calls) == len(starts[0]) * len(starts[1])
    parts = {
        (y, x): model.predict_image(
            # A smaller part fills less of the square.
            picture[y : y + tile, x : x + tile],
            tile,
        )
        for y in starts[0]
        for x in starts[1]
    }
    for row in range(size[0]):
        for column in range(size[1]):
            best = []
            for place, axis in ((row, starts[0]), (column, starts[1])):
                gaps = [abs(place + 0.5 - start - tile / 2) for start in axis]
                near = [s for s, gap in zip(axis, gaps) if gap < min(gaps) + 1]
                best.append([s for s in near if s <= place < s + tile])
            answers = {
                int(parts[y, x][row - y, column - x])
                for y in best[0]
                for x in best[1]
            }
            assert found[row, column] in answers
    assert len(np.unique(found)) > 1
    model.tile = tile  # as of a model that learned from tiles
    again = model.predict_image(picture, overlap=overlap)
    np.testing.assert_array_equal(again, found)


def png(picture: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


_SERVE = """
import sys
import numpy as np
import tensorflow as tf
import tf_deform
folder = sys.argv[1]
files = [open(f"{folder}/{i}.png", "rb").read() for i in range(3)]
served = tf.saved_model.load(f"{folder}/served")
found = served.serve(tf.constant(files))
np.savez(f"{folder}/found.npz", **found)
assert served.serve(tf.constant([], "string"))["ids"].shape[0] == 0
"""


def test_serving(tmp_path, run_python):
    model = displaced()
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", models.serving(model))
    archive.write_out(tmp_path / "served", verbose=False)
    sizes = [(90, 120), (33, 21), (SIZE, SIZE)]
    pictures = [photograph(*size)[0] for size in sizes]
    pictures[1] = pictures[1][..., 0]  # gray
    for index, picture in enumerate(pictures):
        (tmp_path / f"{index}.png").write_bytes(png(picture))
    run_python(_SERVE, tmp_path)
    with np.load(tmp_path / "found.npz") as found:
        ids = found["ids"]
        np.testing.assert_array_equal(found["sizes"], sizes)
    assert ids.shape == (3, 90, 120) and ids.dtype == np.int32
    pictures[1] = np.stack([pictures[1]] * 3, -1)
    for answer, (height, width), picture in zip(ids, sizes, pictures):
        expected = model.predict_image(picture)
        np.testing.assert_array_equal(answer[:height, :width], expected)
        assert np.all(answer[height:] == -1)
        assert np.all(answer[:, width:] == -1)


# Exports.


@pytest.mark.parametrize("kind", ["native", "portable", "onnx", "litert"])
def test_exports(kind, tmp_path):
    """The exports compare their files with the model."""
    model = displaced()
    options = {"sample": images(3), "verbose": False}
    if kind in ("native", "portable"):
        options["implementation"] = kind
        report = export.saved_model(model, tmp_path / "model", **options)
    else:
        suffix = {"onnx": "onnx", "litert": "tflite"}[kind]
        write = getattr(export, kind)
        report = write(model, tmp_path / f"model.{suffix}", **options)
    assert max(report.differences.values()) < 1e-4


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"output_stride": 2}, ValueError, "4, 8, 16 or 32. Received: 2"),
        ({"output_stride": 4}, ValueError, "16 or 8. Received: 4"),
        ({"output_stride": "16"}, TypeError, "`output_stride`"),
        ({"num_classes": 0}, ValueError, "`num_classes`"),
        ({"ignore_class": 2.5}, TypeError, "`ignore_class`"),
        ({"class_names": ["a"]}, ValueError, "num_classes=4 names"),
        ({"filters": 0}, ValueError, "`filters`"),
        ({"trainable": False}, TypeError, r"\['trainable'\]"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        make(**arguments)


def test_wrong_backbones():
    image = keras.Input((SIZE, SIZE, 3))
    fine = keras.Model(image, layers.AveragePooling2D(8)(image))
    with pytest.raises(ValueError, match="at most 8, the stride.*Received: 16"):
        Segmenter(fine, 4, image_size=SIZE)
    with pytest.raises(ValueError, match=r"\(80, 80\). Received: 96"):
        Segmenter(make_network(), 4, image_size=96)
    with pytest.raises(ValueError, match="a network of keras.applications"):
        Segmenter("resnet5", 4)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((5, 6, 3)),),
        (np.zeros((5, 6), np.uint8),),
        (np.zeros((0, 6, 3), np.uint8),),
        (np.zeros((5, 6, 3), np.uint8), 0),
        (np.zeros((5, 6, 3), np.uint8), 4, 1.0),
    ],
)
def test_wrong_photographs(arguments):
    with pytest.raises(ValueError, match="Expected `(image|tile)`"):
        make_of_colours().predict_image(*arguments)


@pytest.mark.parametrize("name", ["mobilenetv2", "mobilenetv3small"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_small_networks(name, output_stride):
    """Tests maps that are padded at the end alone, and weighed by means."""
    model = Segmenter(
        models.backbone(name, image_size=64),
        3,
        output_stride=output_stride,
        image_size=64,
        filters=4,
    )
    assert model.output_shape == (None, 64, 64, 3)
    found = model.get_layer("hidden").output.shape[1:3]
    assert found == (64 // output_stride, 64 // output_stride)
