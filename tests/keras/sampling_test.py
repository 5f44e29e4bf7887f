# SPDX-License-Identifier: Apache-2.0
"""Tests where convolutions are said to sample, by changing pixels.

A pixel around a location that is said to be sampled changes its output, and no
other pixel does.
"""

import numpy as np
import pytest
from operands import random

from tf_deform import visualization
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D

SIZE = (7, 9)
CHANNELS = 4
PADDINGS = ("same", "valid", 1, ((2, 0), (1, 3)))


def configs():
    """Draws configs: each of them runs with both boundaries."""
    rng = np.random.default_rng(0)
    for index in range(12):
        pairs = rng.integers(1, 4, (3, 2)).tolist()
        kernel, strides, dilation = (tuple(pair) for pair in pairs)
        if index % 4 == 1:  # valid
            dilation = (1, 1)
        yield dict(
            kernel_size=kernel,
            strides=strides,
            dilation_rate=dilation,
            padding=PADDINGS[index % 4],
            offset_groups=(1, 2)[index // 4 % 2],
            modulation=(None, "sigmoid", "2sigmoid")[index % 3],
            offset_dilation_rate=(None, 1, (2, 1))[index // 2 % 3],
        )


def swapped(value, data_format):
    """Returns maps, which are in channels last, in a data format."""
    first = data_format == "channels_first"
    return np.moveaxis(value, -1, 1) if first else value


def unswapped(value, data_format):
    first = data_format == "channels_first"
    return np.moveaxis(value, 1, -1) if first else np.array(value)


def reads(locations, boundary, height, width):
    """Returns which pixels are read at locations `(..., 2)`.

    The result is `(..., height, width)`. It is written for itself, one pixel at
    a time.
    """
    y, x = (locations[..., axis, None, None] for axis in (0, 1))
    if boundary == "zeros":
        inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    else:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        y, x = np.minimum(y, height - 1), np.minimum(x, width - 1)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return inside & (abs(y - rows) < 1) & (abs(x - columns) < 1)


def changed(run, inputs, group, groups):
    """Returns which outputs change when a pixel does: (pixels, out_h, out_w).

    A pixel's channels of one offset group are changed.
    """
    height, width, channels = inputs.shape
    size = channels // groups
    images = np.repeat(inputs[None], height * width, 0)
    for index in range(height * width):
        y, x = divmod(index, width)
        images[index, y, x, group * size : (group + 1) * size] += 3
    before = run(np.repeat(inputs[None], height * width, 0))
    return (run(images) != before).any(-1)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
@pytest.mark.parametrize("index, config", list(enumerate(configs())))
def test_a_sampled_pixel_changes_its_output_and_no_other(
    index, config, boundary, data_format
):
    config = {**config, "boundary": boundary}
    inputs = random(*SIZE, CHANNELS, seed=index)
    maps = swapped(inputs[None], data_format)
    layer = DeformableConv2D(3, data_format=data_format, **config)
    layer(maps)
    kernel, bias = layer.offset_kernel, layer.offset_bias
    kernel.assign(random(*kernel.shape, seed=1) * 0.3)
    bias.assign(random(*bias.shape, seed=2))
    locations = visualization.sampling_locations(layer, maps)
    factors = visualization.sampling_modulation(layer, maps)
    groups = config["offset_groups"]
    taps = np.prod(config["kernel_size"])
    assert locations.shape[0] == 1 and locations.shape[3:] == (groups, taps, 2)
    assert factors.shape == locations.shape[:-1]

    # The branch's displacements depend on all pixels, so a second layer is
    # given them; it computes the same.
    modulation = config.pop("modulation")
    del config["offset_dilation_rate"]
    given = DeformableConv2D(3, data_format=data_format, **config)
    count = locations.shape[1:3]
    zeros = np.zeros((1, *count, groups * taps * 2))
    given(maps, offset=swapped(zeros, data_format))
    given.set_weights(layer.get_weights()[:2])
    moved = locations - visualization.sampling_locations(
        given, maps, swapped(zeros, data_format)
    )
    offset = moved.reshape(1, *count, -1).astype("float32")
    modulator = factors.reshape(1, *count, -1).astype("float32")

    def run(images):
        others = (np.repeat(x, len(images), 0) for x in (offset, modulator))
        operands = (swapped(x, data_format) for x in (images, *others))
        return unswapped(given(*operands), data_format)

    own = unswapped(layer(maps), data_format)
    np.testing.assert_allclose(run(inputs[None]), own, rtol=1e-4, atol=1e-4)
    if modulation is None:
        assert (factors == 1).all()
    for group in range(groups):
        pixels = reads(locations[0, :, :, group], boundary, *SIZE)
        pixels = pixels.any(2).reshape(*count, -1)
        found = changed(run, inputs, group, groups)
        assert found.any() and not found.all()
        np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), found)
        there = visualization.sampling_locations(
            given, maps, swapped(offset, data_format)
        )
        np.testing.assert_allclose(there, locations, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4), (1, 3)])
def test_a_plain_convolution(padding, strides, dilation, kernel_size):
    layer = keras.layers.Conv2D(
        3, kernel_size, strides, padding=padding, dilation_rate=dilation
    )
    inputs = random(*SIZE, CHANNELS)
    layer(inputs[None])
    locations = visualization.sampling_locations(layer, inputs[None])
    assert (visualization.sampling_modulation(layer, inputs[None]) == 1).all()
    pixels = reads(locations[0, :, :, 0], "zeros", *SIZE).any(2)
    found = changed(lambda images: np.array(layer(images)), inputs, 0, 1)
    np.testing.assert_array_equal(
        np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), -1, 0), found
    )


def test_half_a_layer_is_in_whole_numbers():
    """Tests that the locations of a 16-bit layer are not rounded to 16 bits."""
    layer = DeformableConv2D(2, 3, dtype="mixed_bfloat16", padding="same")
    maps = random(1, 4, 300, 2)
    layer(maps)
    layer.offset_bias.assign(np.full(18, 0.25))
    locations = visualization.sampling_locations(layer, maps)
    assert locations[0, 0, 290, 0, 4].tolist() == [0.25, 290.25]


def test_wrong_arguments_are_refused():
    maps = random(1, 5, 6, 2)
    with pytest.raises(TypeError, match="Conv2D of .* Received: <.*Dense"):
        visualization.sampling_locations(keras.layers.Dense(2), maps)
    with pytest.raises(TypeError, match="Received: .*Transpose"):
        visualization.sampling_locations(
            keras.layers.Conv2DTranspose(2, 3), maps
        )
    with pytest.raises(ValueError, match="which has no weights yet"):
        visualization.sampling_locations(DeformableConv2D(2, 3), maps)
    plain = keras.layers.Conv2D(2, 3)
    plain(maps)
    with pytest.raises(ValueError, match="Received: offset for layer"):
        visualization.sampling_locations(plain, maps, np.zeros((1, 3, 4, 18)))
    layer = DeformableConv2D(2, 3)
    layer(maps, offset=np.zeros((1, 3, 4, 18)))
    with pytest.raises(ValueError, match="no branch of its own"):
        visualization.sampling_locations(layer, maps)
    with pytest.raises(ValueError, match="Expected `offset` to have"):
        visualization.sampling_locations(layer, maps, np.zeros((1, 3, 4, 9)))
    for wrong in (maps[0], maps[..., :1]):
        with pytest.raises(ValueError, match="rank 4 and 2 channels"):
            visualization.sampling_locations(plain, wrong)
