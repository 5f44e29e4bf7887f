# SPDX-License-Identifier: Apache-2.0
"""Tests errors for wrong arguments and calls of `DeformableConv2D`."""

import re

import keras
import numpy as np
import pytest
from bad_calls import ERRORS

from tf_deform.layers import DeformableConv2D


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"filters": 0}, "filters.*Received: 0"),
        ({"filters": -3}, "filters.*Received: -3"),
        ({"filters": 2.5}, "filters.*2.5"),
        ({"filters": "8"}, "filters.*'8'"),
        ({"kernel_size": 0}, "kernel_size.*0"),
        ({"kernel_size": -1}, "kernel_size.*-1"),
        ({"kernel_size": (3, 0)}, "kernel_size.*0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size.*pair.*3, 3, 3"),
        ({"kernel_size": "3x3"}, "kernel_size.*3x3"),
        ({"kernel_size": None}, "kernel_size.*None"),
        ({"strides": 0}, "strides.*0"),
        ({"strides": (1, 2, 3)}, "strides.*pair.*1, 2, 3"),
        ({"strides": -1}, "strides.*-1"),
        ({"dilation_rate": 0}, "dilation_rate.*0"),
        ({"dilation_rate": (1, 1, 1)}, "dilation_rate.*1, 1, 1"),
        ({"offset_dilation_rate": 0}, "offset_dilation_rate.*0"),
        ({"offset_dilation_rate": (1, 1, 1)}, "offset_dilation_rate.*1, 1, 1"),
        ({"padding": "full"}, "padding.*full"),
        ({"padding": "causal"}, "padding.*causal"),
        ({"padding": -1}, "padding.*-1"),
        ({"padding": ((1, 2), 3)}, r"padding.*\(1, 2\), 3"),
        ({"padding": (1, 2, 3)}, "padding.*1, 2, 3"),
        ({"padding": 1.5}, "padding.*1.5"),
        ({"data_format": "NHWC"}, "data_format.*nhwc"),
        ({"groups": 0}, "groups.*Received: 0"),
        ({"groups": -1}, "groups.*Received: -1"),
        ({"groups": 3}, "filters.*groups.*Received: filters=8, groups=3"),
        ({"offset_groups": 0}, "Expected.*offset_groups.*Received: .*0"),
        ({"offset_groups": -2}, "Expected.*offset_groups.*Received: .*-2"),
        ({"offset_groups": 1.5}, "Expected.*offset_groups.*Received: .*1.5"),
        (
            {"modulation": "softmax"},
            "Expected.*modulation.*sigmoid.*Received:.*softmax",
        ),
        (
            {"modulation": True},
            "Expected.*modulation.*sigmoid.*Received:.*True",
        ),
        (
            {"boundary": "reflect"},
            "Expected.*boundary.*zeros.*clamp.*Received:.*reflect",
        ),
        (
            {"boundary": None},
            "Expected.*boundary.*zeros.*clamp.*Received:.*None",
        ),
        ({"activation": "nope"}, "activation.*nope"),
        ({"kernel_initializer": "nope"}, "initializer.*nope"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
    ids=str,
)
def test_layer_constructor(changes, text):
    arguments = {"filters": 8, "kernel_size": 3, **changes}
    with pytest.raises((ValueError, TypeError)) as info:
        DeformableConv2D(**arguments)
    assert re.search(text, str(info.value), re.DOTALL), str(info.value)


# Shapes: 3x3 "valid" over 9x10 gives 7x8; 2 offset groups have 36 channels of
# offset and 18 of modulator.
GOOD_OFFSET, GOOD_MODULATOR = (2, 7, 8, 36), (2, 7, 8, 18)


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "eager"])
@pytest.mark.parametrize(
    ("inputs", "offset", "modulator", "changes", "text"),
    [
        (
            (2, 9, 10, 12),
            (2, 7, 8, 18),
            None,
            {},
            r"Expected.*`offset`.*36.*Received: .*\(2, 7, 8, 18\)",
        ),
        (
            (2, 9, 10, 12),
            (2, 9, 10, 36),
            None,
            {},
            r"Expected.*`offset`.*7.*Received: .*\(2, 9, 10, 36\)",
        ),
        (
            (2, 9, 10, 12),
            (2, 7, 9, 36),
            None,
            {},
            r"Expected.*`offset`.*8.*Received: .*\(2, 7, 9, 36\)",
        ),
        (
            (2, 9, 10, 12),
            (1, 7, 8, 36),
            None,
            {},
            r"Expected.*`offset`.*Received: .*\(1, 7, 8, 36\)",
        ),
        (
            (2, 9, 10, 12),
            (2, 7, 288),
            None,
            {},
            r"Expected.*`offset`.*4.*Received: .*\(2, 7, 288\)",
        ),
        (
            (2, 9, 10, 12),
            GOOD_OFFSET,
            (2, 7, 8, 36),
            {},
            r"Expected.*`modulator`.*18.*Received: .*\(2, 7, 8, 36\)",
        ),
        (
            (2, 9, 10, 12),
            GOOD_OFFSET,
            (2, 8, 7, 18),
            {},
            r"Expected.*`modulator`.*7.*Received: .*\(2, 8, 7, 18\)",
        ),
        (
            (2, 9, 10, 12),
            GOOD_OFFSET,
            (2, 7, 144),
            {},
            r"Expected.*`modulator`.*4.*Received: .*\(2, 7, 144\)",
        ),
        (
            (2, 9, 10, 12),
            None,
            GOOD_MODULATOR,
            {},
            "Expected.*`offset`.*`modulator`|`modulator`.*`offset`",
        ),
        (
            (2, 9, 10, 12),
            None,
            None,
            {"groups": 8, "offset_groups": 1},
            "channels.*groups.*[Rr]eceived:? .*(groups=8|12)",
        ),
        (
            (2, 9, 10, 12),
            None,
            None,
            {"offset_groups": 5},
            "Expected.*offset_groups.*Received: .*(offset_groups=5|12)",
        ),
        (
            (2, 9, 10),
            None,
            None,
            {},
            r"[Ee]xpected.*(ndim|rank|4).*\(2, 9, 10\)",
        ),
        (
            (2, 2, 10, 12),
            None,
            None,
            {},
            "Expected.*height.*3.*Received: .*height.*2",
        ),
        (
            (2, 9, 10, 12),
            None,
            None,
            {"kernel_size": (3, 11)},
            "Expected.*width.*11.*Received: .*width.*10",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_layer_call(inputs, offset, modulator, changes, text, symbolic):
    """Tests symbolic and eager calls of the layer.

    `compute_output_shape` refuses symbolic calls.
    """
    arguments = {"filters": 8, "kernel_size": 3, "offset_groups": 2, **changes}
    layer = DeformableConv2D(**arguments)
    make = keras.KerasTensor if symbolic else np.zeros
    displacements = {
        name: make(value)
        for name, value in {"offset": offset, "modulator": modulator}.items()
        if value is not None
    }
    with pytest.raises(ERRORS) as info:
        layer(make(inputs), **displacements)
    assert re.search(text, str(info.value), re.DOTALL), str(info.value)


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "eager"])
def test_layer_built_for_other_channels(symbolic):
    layer = DeformableConv2D(8, 3)
    layer.build((None, 9, 10, 12))
    make = keras.KerasTensor if symbolic else np.zeros
    with pytest.raises(ValueError, match=r"(?s)xpected.*12.*\(2, 9, 10, 6\)"):
        layer(make((2, 9, 10, 6)))


def test_layer_needs_a_number_of_channels():
    with pytest.raises(ValueError, match="(?s)channel.*None"):
        DeformableConv2D(8, 3)(keras.KerasTensor((2, 9, 10, None)))


def test_layer_channels_first_offset_is_refused_in_the_other_order():
    layer = DeformableConv2D(8, 3, data_format="channels_first")
    with pytest.raises(ERRORS, match="(?s)Expected.*`offset`.*Received"):
        layer(
            keras.KerasTensor((2, 12, 9, 10)),
            offset=keras.KerasTensor((2, 7, 8, 18)),
        )


@pytest.mark.parametrize("filters", [None, "3", 2.5, True])
def test_filters_are_an_integer(filters):
    with pytest.raises(TypeError, match="Expected `filters` .* Received: "):
        DeformableConv2D(filters, 3)
