# SPDX-License-Identifier: Apache-2.0
"""Tests arguments and calls that do not fit a layer.

tests/ops/arguments_test.py passes unusable values to each argument alone;
shapes, and what is judged by layers alone, are tested here.
"""

import re

import keras
import numpy as np
import pytest
from bad_calls import ERRORS
from layer_cases import (
    DENSE,
    KINDS,
    POOLS,
    displaced,
    given_call,
    new,
    own_call,
    plain_call,
    symbols,
    tensors,
)

every_pool = pytest.mark.parametrize("kind", POOLS)
FACTORS = [
    (-0.5, r"-0\.5"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (-float("inf"), "-inf"),
]
UNITS = [(8, "8"), ({8}, r"\{8\}"), ((8, 0), "0"), ([(8, 4)], r"\(8, 4\)")]
BAD_ARGUMENTS = [
    *[
        (kind, {name: value}, f"Expected `{name}` .*Received: .*{text}")
        for kind in POOLS
        for name, rows in [
            ("spatial_scale", [*FACTORS, (0, "0")]),
            (KINDS[kind].factor, FACTORS),
            ("units", UNITS if kind in DENSE else []),
        ]
        for value, text in rows
    ],
    *[
        (
            "psroi",
            {"num_classes": number},
            "Expected `output_dim` .*multiple.*"
            f"Received: output_dim=6, num_classes={number}",
        )
        for number in (4, 5, 12)
    ],
    *[
        ("conv2d", {name: value}, text)
        for name, value, text in [
            ("groups", 3, "`filters`.*groups.*Received: filters=4, groups=3"),
            ("kernel_size", "3x3", "`kernel_size`.*3x3"),
            ("padding", "causal", "`padding`.*causal"),
            ("modulation", "softmax", "`modulation`.*sigmoid.*'softmax'"),
            ("modulation", True, "`modulation`.*sigmoid.*Received: .*True"),
            ("boundary", "reflect", "`boundary`.*zeros.*clamp.*'reflect'"),
            ("boundary", None, "`boundary`.*zeros.*clamp.*Received: .*None"),
            ("activation", "nope", "activation.*nope"),
            ("kernel_initializer", "nope", "initializer.*nope"),
            ("no_such_argument", 1, "no_such_argument"),
        ]
    ],
]


@pytest.mark.parametrize(("kind", "config", "text"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(kind, config, text):
    with pytest.raises((ValueError, TypeError), match=f"(?s){text}"):
        new(kind, **config)


@pytest.mark.parametrize("filters", [None, "3", 2.5, True])
def test_filters_are_an_integer(filters):
    with pytest.raises(TypeError, match="Expected `filters` .* Received: "):
        new("conv2d", filters=filters)


# Shapes. A call whose shape is changed, the words of the error before
# "Received", which is the last of the changes, and arguments of the layer. The
# convolution's output has 7x8 pixels, and 2 offset groups have 36 channels of
# offset and 18 of modulator.
OFFSET = (2, 7, 8, 36)
FIRST = {"data_format": "channels_first"}
MOVES = r"\(num_rois, 2, pooled_h, pooled_w\)"
BAD_SHAPES = [
    *[
        ("conv2d", changes, text, {})
        for changes, text in [
            ({"offset": (2, 7, 8, 18)}, "`offset`.*36"),
            ({"offset": (2, 9, 10, 36)}, "`offset`.*7"),
            ({"offset": (2, 7, 9, 36)}, "`offset`.*8"),
            ({"offset": (1, 7, 8, 36)}, "`offset`"),
            ({"offset": (2, 7, 288)}, "`offset`.*4"),
            ({"offset": OFFSET, "modulator": OFFSET}, "`modulator`.*18"),
            ({"offset": OFFSET, "modulator": (2, 8, 7, 18)}, "`modulator`.*7"),
            ({"offset": OFFSET, "modulator": (2, 7, 144)}, "`modulator`.*4"),
            (
                {"modulator": (2, 7, 8, 18)},
                r"`modulator`.*`offset`.*Received: .*\(2, 7, 8, 18\)",
            ),
            ({"inputs": (2, 9, 10)}, "`inputs`.*rank 4"),
            ({"inputs": (2, 2, 10, 12)}, "height.*3.*Received: .*height.*2"),
        ]
    ],
    ("conv2d", {}, "offset_groups.*Received: .*5", {"offset_groups": 5}),
    ("conv2d", {}, "width.*11.*Received.*width.*10", {"kernel_size": (3, 11)}),
    ("conv2d", {"offset": OFFSET}, "`offset`", FIRST),
    ("psroi", {"trans": (7, 5, 2, 5)}, "second dimension of `trans` ", FIRST),
    *[
        (kind, {**more, **changes}, text, {})
        for kind in POOLS
        for changes, text in [
            ({"rois": (None, 4)}, "`rois`.*5"),
            ({"rois": (7, 6)}, "`rois`.*5"),
            ({"rois": (5,)}, "`rois`.*rank 2"),
            ({"rois": (2, 7, 5)}, "`rois`.*rank 2"),
            ({"inputs": (11, 12, 36)}, "`inputs`.*rank 4"),
            ({"inputs": (1, 2, 11, 12, 36)}, "`inputs`.*rank 4"),
            ({"inputs": (36,)}, "`inputs`.*rank 4"),
            ({"inputs": ()}, "`inputs`.*rank 4"),
        ]
        for more in [{}]
        + [{"trans_inputs": (2, 11, 12, 7)}] * (kind == "psroi")
    ],
    *[
        ("psroi", {**more, "inputs": (None, 11, 12, channels)}, text, config)
        for channels, text, config in [
            *[(channels, "`inputs`.*36", {}) for channels in (35, 37, 6, 0)],
            (36, "`inputs`.*54", {"output_dim": 9}),
            (36, "`inputs`.*72", {"group_size": None}),
        ]
        for more in ({}, {"trans_inputs": (None, 11, 12, 7)})
    ],
    *[
        ("psroi", changes, text, {})
        for changes, text in [
            ({"trans": (7, 5, 2, 6)}, "`trans`.*2"),
            ({"trans": (7, 2, 4, 6)}, "`trans`.*5"),
            ({"trans": (6, 2, 5, 6)}, "`trans`.*7"),
            ({"trans": (7, 2, 5, 5)}, "`trans`"),
            ({"trans": (7, 2, 5, 0)}, "`trans`"),
            ({"trans": (7, 2, 5, 8)}, "output_dim"),
            ({"trans": (7, 2, 5)}, "`trans`.*rank 4"),
            ({"trans_inputs": (11, 12, 7)}, "`trans_inputs`.*rank 4"),
            ({"trans_inputs": (1, 2, 11, 12, 7)}, "`trans_inputs`.*rank 4"),
            ({"trans_inputs": (7,)}, "`trans_inputs`.*rank 4"),
            ({"trans_inputs": (2, 7)}, "`trans_inputs`.*rank 4"),
            ({"trans_inputs": ()}, "`trans_inputs`.*rank 4"),
            ({"trans_inputs": (3, 11, 12, 7)}, "`trans_inputs`.*batch"),
        ]
    ],
    ("psroi", {"trans": (7, 2, 5, 6)}, "`trans`.*3", {"part_size": None}),
    *[
        (kind, {"offset": offset}, text, {})
        for kind in DENSE
        for offset, text in [
            ((7, 4, 3, 2), "`offset`.*height 3"),
            ((7, 3, 5, 2), "`offset`.*width 4"),
            ((6, 3, 4, 2), "`offset`.*7"),
            ((7, 3, 4, 1), "`offset`.*2"),
            ((7, 3, 4, 4), "`offset`.*2"),
            ((7, 24), "`offset`.*rank 4"),
        ]
    ],
    *[
        (kind, {name: shape}, f"`{name}`{text}", FIRST)
        for kind, name, shape, text in [
            ("align", "offset", (7, 3, 4, 2), f" to have height 3 {MOVES}"),
            ("align", "offset", (7, 24), f" to have rank 4 {MOVES}"),
            (
                "pool",
                "offset",
                (7, 3, 3, 4),
                f" to have a second dimension of 2 {MOVES}",
            ),
            ("pool", "offset", (6, 2, 3, 4), " to have .*7"),
            ("psroi", "trans", (7, 2, 5, 6), " to have "),
            ("psroi", "inputs", (2, 11, 12, 36), " to have 36 "),
            (
                "psroi",
                "inputs",
                (36, 11, 12),
                r" to have rank 4 \(batch, output_dim \* group_h \* group_w, "
                r"height, width\)",
            ),
            (
                "psroi",
                "trans_inputs",
                (3, 4, 11, 12),
                " to have the batch .*Received: inputs.shape="
                r"\(2, 36, 11, 12\), trans_inputs.shape=\(3, 4, 11, 12\)",
            ),
            (
                "align",
                "inputs",
                (2, 6, 11),
                r" to have rank 4 \(batch, channels, height, width\)",
            ),
        ]
    ],
]


@pytest.mark.parametrize("how", ["symbolic", "compute_output_shape", "eager"])
@pytest.mark.parametrize(
    ("kind", "changes", "text", "config"), BAD_SHAPES, ids=str
)
def test_shapes_that_do_not_fit(kind, changes, text, config, how):
    """Tests errors before a layer runs, and those of the op that it runs."""
    call = {"inputs": (2, 11, 12, KINDS[kind].channels), "rois": (7, 5)}
    if kind == "conv2d":
        config = {"filters": 8, "offset_groups": 2, **config}
        call = {"inputs": (2, 9, 10, 12)}
    if config.get("data_format") == "channels_first":
        batch, *size, channels = call["inputs"]
        call["inputs"] = (batch, channels, *size)
    call |= changes
    if how == "eager":
        call = {
            name: tuple(2 if n is None else n for n in shape)
            for name, shape in call.items()
        }
    if "Received" not in text:
        name = [*changes][-1]
        text += f".*Received: .*{name}.shape={re.escape(str(call[name]))}"
    layer = new(kind, **config)
    errors = ERRORS if how == "eager" else ValueError
    with pytest.raises(errors, match=f"(?s)Expected .*{text}"):
        if how == "symbolic":
            layer(**tensors(call))
        elif how == "eager":
            layer(**{k: np.zeros(v, np.float32) for k, v in call.items()})
        else:
            layer.compute_output_shape(
                **{f"{name}_shape": shape for name, shape in call.items()}
            )


@every_pool
def test_wrong_shapes_for_a_layer_that_is_built(kind):
    layer, call = displaced(kind), own_call(kind)
    with pytest.raises(ERRORS, match=r"Expected `rois`.*5.*Received.*\(7, 4\)"):
        layer(**{**call, "rois": call["rois"][:, :4]})
    call = given_call(kind)
    name = KINDS[kind].given
    with pytest.raises(
        ERRORS, match=rf"Expected `{name}`.*Received: .*{name}.shape=\(6, "
    ):
        layer(**{**call, name: call[name][:6]})


@pytest.mark.parametrize("make", [keras.KerasTensor, np.zeros])
def test_channels_of_another_number(make):
    """Tests what Keras refuses when the convolution is built, or called."""
    layer = new("conv2d")
    layer.build((None, 9, 10, 12))
    with pytest.raises(ValueError, match=r"(?s)xpected.*12.*\(2, 9, 10, 6\)"):
        layer(make((2, 9, 10, 6)))
    with pytest.raises(
        ValueError, match="(?s)channels.*groups.*eceived:? .*12"
    ):
        new("conv2d", filters=8, groups=8)(make((2, 9, 10, 12)))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_a_branch_needs_are_unknown(kind, data_format):
    name = "trans_inputs" if kind == "psroi" else "inputs"
    call = tensors({k: v.shape for k, v in own_call(kind).items()})
    call[name] = keras.KerasTensor((2, None, 11, None))
    with pytest.raises(
        ValueError,
        match=f"Expected the channels of `{name}` to be known. Received: "
        rf"{name}.shape=\(2, None, 11, None\)",
    ):
        new(kind, data_format=data_format)(**call)


# Displacements that a layer has no use for, or lacks.


def test_both_given():
    call = {**own_call("psroi"), **given_call("psroi")}
    symbolic = tensors({k: v.shape for k, v in call.items()})
    match = r"Expected .*`trans`.*`trans_inputs`.* Received: both"
    for layer, values in [
        (new("psroi"), call),
        (new("psroi"), symbolic),
        (displaced("psroi"), call),
    ]:
        with pytest.raises(ValueError, match=match):
            layer(**values)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    ("kind", "good", "text"),
    [
        *[(kind, given_call, "`offset`.*'head'.*Received") for kind in DENSE],
        (
            "psroi",
            plain_call,
            r"no `trans_inputs`.*'head'.*Received: .*\(.*, 11, 12, 7\)",
        ),
    ],
)
def test_a_layer_that_was_built_without_a_branch(kind, good, text, symbolic):
    """Tests that a model is refused when it is made, not when it runs."""
    layer = new(kind, name="head")
    layer(**good(kind))
    call = own_call(kind)
    with pytest.raises(ValueError, match=f"Expected {text}"):
        layer(**(symbols(call) if symbolic else call))
