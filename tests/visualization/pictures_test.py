# SPDX-License-Identifier: Apache-2.0
"""Tests what pictures show, and how wide layers look, by numbers."""

import dataclasses
import sys

import numpy as np
import pytest
import tensorflow as tf
from matplotlib import pyplot
from operands import random

import tf_deform
from tf_deform import layers, visualization
from tf_deform._keras import keras
from tf_deform.visualization import _rois, _tree, _walk

SIZE = (40, 48)


@pytest.fixture(autouse=True)
def no_window():
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def make_model():
    """Makes a model of a plain and two deformable layers."""
    image = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(4, 3, 2, padding="same", name="stem")(image)
    for index in range(2):
        x = layers.DeformableConv2D(
            4,
            3,
            padding="same",
            modulation="2sigmoid",
            name=f"deformed_{index}",
        )(x)
    model = keras.Model(image, x)
    for index, layer in enumerate(tf_deform.deformable_layers(model)):
        for weight in (layer.offset_kernel, layer.offset_bias):
            weight.assign(random(*weight.shape, seed=index) * 0.3)
    return model


def dots(ax):
    """Returns the places and areas of dots, from the last layer down."""
    found = [
        (c.get_offsets().data[:, ::-1], c.get_sizes()) for c in ax.collections
    ]
    return found[::-1]


def test_the_picture_shows_the_tree(tmp_path):
    model, image = make_model(), random(*SIZE, 3)
    ax = visualization.plot_sampling(model, image, (21.2, 30))
    first, last = tf_deform.deformable_layers(model)
    inputs = keras.Model(model.input, last.input)(image[None])
    # An even size is padded at its end alone: cell i lies at pixel 2 i + 1.
    cell = (10, 15)
    places = visualization.sampling_locations(last, inputs)[0][cell][0]
    weights = visualization.sampling_modulation(last, inputs)[0][cell][0]
    (top, sizes), (below, _) = dots(ax)
    np.testing.assert_allclose(top, 2 * places + 1, atol=1e-5)
    np.testing.assert_allclose(sizes / sizes.max(), weights / weights.max())
    ((marked),) = [line.get_xydata() for line in ax.lines]
    np.testing.assert_allclose(marked, [[31, 21]])
    # All that the first layer reads for the samples changes the cell.
    assert len(below) > 9
    ax.figure.savefig(tmp_path / "sampling.png")
    assert (tmp_path / "sampling.png").stat().st_size > 1000

    one = dots(visualization.plot_sampling(model, image, (21, 30), depth=1))
    assert len(one) == 1
    every = visualization.plot_sampling(model, image, (21, 30), ".", depth=9)
    assert len(dots(every)) == 3
    plain = visualization.plot_sampling(
        model, image, (21, 30), [model.get_layer("stem")]
    )
    expected = np.stack(
        np.meshgrid([20, 21, 22], [30, 31, 32], indexing="ij"), -1
    )
    np.testing.assert_allclose(dots(plain)[0][0], expected.reshape(-1, 2))


def test_the_tree_has_the_shares_of_a_linear_model():
    """Tests weights against gradients, where kernels are even."""
    model = make_model()
    for layer in tf_deform.deformable_layers(model):
        layer.kernel.assign(np.full(layer.kernel.shape, 1 / 36))
    image = random(*SIZE, 3)
    calls = _walk.walk(model, tf.constant(image[None]), "deformed")
    cell = (9, 14)
    levels = _tree.follow(calls, 1, cell)
    features = keras.Model(model.input, calls[0].layer.input)(image[None])
    # The displacements stay, so that the model is linear in the map.
    given = [
        tf.constant(
            (call.locations - regular(call)).reshape(1, *call.size, -1),
            "float32",
        )
        for call in calls
    ]
    factors = [
        tf.constant(call.modulation.reshape(1, *call.size, -1), "float32")
        for call in calls
    ]
    maps = tf.constant(features)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        x = maps
        for call, offset, factor in zip(calls, given, factors):
            x = tf_deform.ops.deformable_conv2d(
                x, call.layer.kernel.value, offset, factor, padding="same"
            )
        result = x[0, cell[0], cell[1], 0]
    gradient = np.array(tape.gradient(result, maps))[0, ..., 0]
    spread = _tree._spread(whole(calls[0]), levels[-1])
    # Each layer takes a quarter of a channel, and the second sums up four.
    np.testing.assert_allclose(spread / 4, gradient, rtol=1e-3, atol=1e-6)
    assert np.count_nonzero(gradient) > 30


def test_the_tree_gives_parallel_branches_equal_shares():
    """Tests weights against gradients, as above."""
    image = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(4, 3, 2, padding="same", name="stem")(image)
    kind = dict(filters=4, padding="same", modulation="2sigmoid")
    branches = [
        layers.DeformableConv2D(kernel_size=size, name=f"deformed_{i}", **kind)
        for i, size in enumerate((3, (1, 5)))
    ]
    x = keras.layers.Average()([layer(x) for layer in branches])
    x = layers.DeformableConv2D(kernel_size=3, name="deformed_2", **kind)(x)
    model = keras.Model(image, x)
    for index, layer in enumerate(tf_deform.deformable_layers(model)):
        layer.offset_bias.assign(random(*layer.offset_bias.shape, seed=index))
        taps = np.prod(layer.kernel_size)
        layer.kernel.assign(np.full(layer.kernel.shape, 1 / (4 * taps)))
    image = random(*SIZE, 3)
    calls = _walk.walk(model, tf.constant(image[None]))
    cell = (9, 14)
    levels = _tree.follow(calls, 2, cell)
    assert [level.call for level in levels] == calls[::-1]
    assert len(_tree.follow(calls, 2, cell, depth=2)) == 2
    rest = keras.Model(branches[0].input, x)
    maps = tf.constant(keras.Model(model.input, branches[0].input)(image[None]))
    # Displacements are biases alone, so that the model is linear in the map.
    with tf.GradientTape() as tape:
        tape.watch(maps)
        result = rest(maps)[0, cell[0], cell[1], 0]
    gradient = np.array(tape.gradient(result, maps))[0, ..., 0]
    found = sum(_tree._spread(whole(calls[0]), level) for level in levels[1:])
    np.testing.assert_allclose(found / 4, gradient, rtol=1e-3, atol=1e-6)
    assert np.count_nonzero(gradient) > 30


def whole(call):
    """Returns a call whose cells are the pixels of the given call's input."""
    return dataclasses.replace(
        call,
        outputs=call.inputs,
        locations=np.zeros((1, *call.input_size, 1, 1, 2)),
    )


def regular(call):
    """Returns where a plain layer of three taps samples."""
    y, x = np.meshgrid(*map(np.arange, call.size), indexing="ij")
    cells = np.stack((y, x), -1)[None, :, :, None, None]
    taps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    return cells + taps.reshape(1, 1, 1, 1, 9, 2)


def make_roi_layer(kind):
    if kind == "align":
        return layers.DeformableROIAlign((2, 3), 0.5, 4)
    if kind == "pool":
        return layers.DeformableROIPooling((2, 3), 0.5, 8)
    return layers.DeformablePSROIPooling(
        1, (2, 3), 0.5, group_size=1, part_size=(2, 1), sample_per_part=8
    )


@pytest.mark.parametrize("source", ["given", "branch"])
@pytest.mark.parametrize("kind", ["align", "pool", "psroi"])
def test_parts_are_where_bins_read(kind, source):
    layer = make_roi_layer(kind)
    maps = tf.constant(random(1, 24, 26, 1))
    roi = (0, 12.0, 10.0, 35.0, 33.0)
    rois = tf.constant([roi])
    shape = (1, 2, 1 if kind == "psroi" else 3, 2)
    given = {} if source == "branch" else {"displacements": random(*shape)}
    name = "trans" if kind == "psroi" else "offset"
    call = {name: given["displacements"]} if given else {}
    if kind == "psroi" and source == "branch":
        given = call = {"trans_inputs": random(1, 24, 26, 1, seed=3)}
    layer(maps, rois, **call)
    if source == "branch":
        for weight in (layer.offset_kernel, layer.offset_bias):
            weight.assign(random(*weight.shape, seed=1) * 0.8)
    bins, moved = _rois.parts(layer, maps, roi, **given)
    assert abs(moved - bins).max() > 1
    with tf.GradientTape(persistent=True) as tape:
        # The branch's displacements stay what they are.
        fixed = _rois._shifts(
            layer,
            maps,
            rois,
            given.get("displacements"),
            given.get("trans_inputs"),
        ).reshape(1, 2, 3, 2)
        fixed = fixed[:, :, :1] if kind == "psroi" else fixed
        tape.watch(maps)
        outputs = layer._pool(maps, rois, tf.constant(fixed, "float32"))
        outputs = tf.unstack(tf.reshape(outputs, (-1,)))
    for output, (x1, y1, x2, y2) in zip(outputs, moved):
        share = np.array(tape.gradient(output, maps))[0, ..., 0]
        np.testing.assert_allclose(share.sum(), 1, atol=1e-4)
        middle = [
            np.arange(len(each)) @ each for each in (share.sum(1), share.sum(0))
        ]
        # A map's pixel is two pixels wide.
        middle = 2 * np.array(middle) + 0.5
        expected = np.array(((y1 + y2) / 2, (x1 + x2) / 2))
        if kind != "align":  # Samples lie at the start of an eighth of a bin.
            expected -= np.array((y2 - y1, x2 - x1)) / 16
        np.testing.assert_allclose(middle, expected, atol=1e-4)


def test_the_picture_of_parts():
    layer = make_roi_layer("align")
    maps = random(1, 24, 26, 1)
    roi = (0, 12.0, 10.0, 35.0, 33.0)
    layer(maps, np.array([roi], "float32"))
    layer.offset_bias.assign(random(12))
    bins, moved = _rois.parts(layer, maps, roi)
    photo = random(48, 52, 1, dtype="uint8")
    for shown in (None, photo):
        ax = visualization.plot_roi_parts(layer, maps, roi, shown)
        drawn = [patch.get_bbox().extents for patch in ax.patches]
        np.testing.assert_allclose(drawn[::2], bins)
        np.testing.assert_allclose(drawn[1::2], moved)
        assert len(ax.images) == (shown is not None)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_plain_layer_has_its_own_dilation(dilation):
    image = keras.Input((*SIZE, 3))
    x = keras.layers.MaxPooling2D(2)(image)
    x = keras.layers.Conv2D(2, 3, dilation_rate=dilation, name="conv")(x)
    model = keras.Model(image, x)
    boxes = [(0, 10, 10, 30, 30), (1, 20, 20, 21, 21), (0, 0, 0, 0, 0)]
    found = visualization.effective_dilation(
        model, "conv", random(2, *SIZE, 3), boxes
    )
    np.testing.assert_allclose(found, [dilation, dilation, np.nan])


def test_the_dilation_is_that_of_cells_in_the_box():
    """Tests taps that a bright region spreads to twice their distance."""
    image = keras.Input((*SIZE, 1))
    x = keras.layers.AveragePooling2D(2)(image)
    model = keras.Model(
        image, layers.DeformableConv2D(1, 3, padding="same", name="conv")(x)
    )
    layer = model.get_layer("conv")
    kernel = np.zeros(layer.offset_kernel.shape, "float32")
    taps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    kernel[1, 1, 0] = taps.reshape(-1)
    layer.offset_kernel.assign(kernel)
    images = np.zeros((2, *SIZE, 1), "float32")
    images[1, 10:20, 20:30] = 1
    boxes = [(1, 20, 10, 29, 19), (1, 0, 30, 40, 39), (0, 20, 10, 29, 19)]
    boxes += [(1, 20, 0, 29, 19)]
    found = visualization.effective_dilation(model, layer, images, boxes)
    np.testing.assert_allclose(found, [2, 1, 1, 1.5])


def test_wrong_arguments_are_refused():
    model, image = make_model(), random(*SIZE, 3)
    plot, dilation = (
        visualization.plot_sampling,
        visualization.effective_dilation,
    )
    for error, match, call in (
        (ValueError, r"`point` to be \(y, x\)", lambda: plot(model, image, 3)),
        (
            TypeError,
            "`point` to be a number",
            lambda: plot(model, image, ("a", 2)),
        ),
        (ValueError, "`depth`", lambda: plot(model, image, (1, 2), depth=0)),
        (ValueError, "`image` to have", lambda: plot(model, image[0], (1, 2))),
        (
            ValueError,
            "Expected photographs",
            lambda: plot(model, image, (1, 2), photo=image[1:]),
        ),
        (
            ValueError,
            r"shape \(boxes, 5\)",
            lambda: dilation(model, "stem", image[None], [(1, 2, 3, 4)]),
        ),
        (
            ValueError,
            "images 0 to 0",
            lambda: dilation(model, "stem", image[None], [(1, 0, 0, 2, 2)]),
        ),
        (
            ValueError,
            "to name one layer",
            lambda: dilation(model, "deformed", image[None], [(0, 0, 0, 2, 2)]),
        ),
        (
            TypeError,
            "one that pools regions",
            lambda: visualization.plot_roi_parts(
                model.layers[1], image[None], (0, 1, 1, 5, 5)
            ),
        ),
        (
            ValueError,
            "`roi` to be",
            lambda: visualization.plot_roi_parts(
                make_roi_layer("pool"), image[None], (1, 1, 5, 5)
            ),
        ),
        (
            ValueError,
            "to have been called",
            lambda: visualization.plot_roi_parts(
                make_roi_layer("pool"), image[None], (0, 1, 1, 5, 5)
            ),
        ),
    ):
        with pytest.raises(error, match=match):
            call()


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"tf-deform\[plots\]"):
        visualization.plot_sampling(make_model(), random(*SIZE, 3), (1, 2))
