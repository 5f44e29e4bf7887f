# SPDX-License-Identifier: Apache-2.0
"""Tests arguments and shapes that the layers that pool regions refuse."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
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
)

SIZES = [
    (0, "0"),
    (-1, "-1"),
    ((3, 0), "0"),
    ((-2, 3), "-2"),
    (2.0, "2.0"),
    ((3, 1.5), "1.5"),
    ("3", "'3'"),
    ((3, "3"), "'3'"),
    (True, "True"),
    ((3, False), "False"),
    ((1, 2, 3), r"\(1, 2, 3\)"),
    ([3], r"\[3\]"),
    ((), r"\(\)"),
    ({3, 4}, "{3, 4}"),
    (2**64, str(2**64)),
]


COUNTS = [
    (0, "0"),
    (-4, "-4"),
    (2.0, "2.0"),
    ("4", "'4'"),
    (True, "True"),
    (None, "None"),
    ((2, 2), r"\(2, 2\)"),
]


FACTORS = [
    (-0.5, r"-0\.5"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (-float("inf"), "-inf"),
    ("0.5", "'0.5'"),
    (True, "True"),
    (None, "None"),
    ((0.5, 0.5), r"\(0\.5, 0\.5\)"),
    (1j, "1j"),
]


UNITS = [
    (8, "8"),
    ("8", "'8'"),
    (None, "None"),
    ({8}, r"\{8\}"),
    ((8, 0), "0"),
    ((-8,), "-8"),
    ((8.0,), "8.0"),
    (("8",), "'8'"),
    ((True,), "True"),
    ([None], "None"),
    ([(8, 4)], r"\(8, 4\)"),
]


BAD_ARGUMENTS = [
    (kind, name, value, received)
    for kind, name, rows in [
        *[(kind, "pooled_size", [*SIZES, (None, "None")]) for kind in POOLS],
        *[(kind, "spatial_scale", [*FACTORS, (0, "0")]) for kind in POOLS],
        ("psroi", "group_size", SIZES),
        ("psroi", "part_size", SIZES),
        ("psroi", "output_dim", COUNTS),
        ("psroi", "num_classes", COUNTS),
        ("psroi", "sample_per_part", COUNTS),
        ("pool", "sample_per_part", COUNTS),
        ("psroi", "trans_std", FACTORS),
        ("pool", "trans_std", FACTORS),
        ("align", "gamma", FACTORS),
        ("align", "sampling_ratio", COUNTS[2:]),
        ("pool", "units", UNITS),
        ("align", "units", UNITS),
    ]
    for value, received in rows
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "received"), BAD_ARGUMENTS, ids=str
)
def test_bad_arguments(kind, name, value, received):
    with pytest.raises((ValueError, TypeError)) as info:
        new(kind, **{name: value})
    pattern = f"Expected `{name}` .*Received: .*{received}"
    assert re.search(pattern, str(info.value))


@pytest.mark.parametrize("num_classes", [4, 5, 12])
def test_classes_that_do_not_divide(num_classes):
    with pytest.raises(
        ValueError, match="Expected `output_dim` .*multiple"
    ) as e:
        new("psroi", num_classes=num_classes)
    assert f"Received: output_dim=6, num_classes={num_classes}" in str(e.value)


def test_both_given():
    call = {**own_call("psroi"), **given_call("psroi")}
    match = r"Expected .*`trans`.*`trans_inputs`.* Received: both"
    with pytest.raises(ValueError, match=match):
        new("psroi")(**call)
    symbols = {k: keras.KerasTensor(v.shape) for k, v in call.items()}
    with pytest.raises(ValueError, match=match):
        new("psroi")(**symbols)
    with pytest.raises(ValueError, match=match):
        displaced("psroi")(**call)


@pytest.mark.parametrize("kind", DENSE)
def test_a_layer_without_branch_needs_displacements(kind):
    layer = new(kind, name="head")
    layer(**given_call(kind))
    with pytest.raises(ValueError, match="Expected `offset`.*'head'.*Received"):
        layer(**own_call(kind))


def test_a_layer_without_branch_has_no_use_for_trans_inputs():
    layer = new("psroi", name="head")
    layer(**plain_call("psroi"))
    match = r"Expected no `trans_inputs`.*'head'.*Received: .*\(2, 11, 12, 7\)"
    with pytest.raises(ValueError, match=match):
        layer(**own_call("psroi"))


@pytest.mark.parametrize("kind", POOLS)
def test_the_same_in_a_symbolic_call(kind):
    """Tests that the error comes when a model is made, not when it runs."""
    layer = new(kind)
    layer(**(given_call if kind != "psroi" else plain_call)(kind))
    with pytest.raises(ValueError, match="Expected .*Received"):
        layer(**symbols(own_call(kind)))


# Shapes.


def _rejects(match: str, kind: str, shapes: dict, **config: object) -> None:
    """Checks that a symbolic call with wrong shapes raises a ValueError."""
    symbols = {k: keras.KerasTensor(v) for k, v in shapes.items()}
    with pytest.raises(ValueError, match=f"(?s)Expected .*{match}"):
        new(kind, **config)(**symbols)
    shapes = {f"{k}_shape": v for k, v in shapes.items()}
    with pytest.raises(ValueError, match=f"(?s)Expected .*{match}"):
        new(kind, **config).compute_output_shape(**shapes)


@pytest.mark.parametrize("mode", ["own", "given"])
@pytest.mark.parametrize("kind", POOLS)
def test_compute_output_shape(kind, mode):
    call = own_call(kind) if mode == "own" else given_call(kind)
    layer = new(kind)
    expected = (7, 3, 4, 6)
    assert layer(**call).shape == expected
    assert (
        layer.compute_output_shape(
            **{f"{k}_shape": v.shape for k, v in call.items()}
        )
        == expected
    )
    # The displacements tell the number of ROIs if no other operand does.
    shapes = {k: (None, *v.shape[1:]) for k, v in call.items()}
    symbols = {k: keras.KerasTensor(v) for k, v in shapes.items()}
    output = layer(**symbols)
    assert output.shape == (None, 3, 4, 6)
    assert output.dtype == "float32"
    shapes = {f"{k}_shape": v for k, v in shapes.items()}
    assert layer.compute_output_shape(**shapes) == (None, 3, 4, 6)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize(
    ("maps", "rois", "num_rois"),
    [
        ((None, None, None), (None, 5), None),
        ((None, None, None), (7, 5), 7),
        ((2, 8, None), (None, None), None),
        ((0, None, 9), (0, 5), 0),
        ((None, 0, 9), (3, None), 3),
    ],
)
def test_output_shape_of_unknown_sizes(maps, rois, num_rois, kind):
    shapes = {"inputs": (*maps, KINDS[kind].channels), "rois": rois}
    expected = (num_rois, 3, 4, 6)
    assert (
        new(kind)(**{k: keras.KerasTensor(v) for k, v in shapes.items()}).shape
        == expected
    )
    if kind == "psroi":
        shapes["trans_inputs"] = (None, None, None, 3)
        layer = new(kind)
        output = layer(**{k: keras.KerasTensor(v) for k, v in shapes.items()})
        assert output.shape == expected
        assert layer.offset_kernel.shape[2] == 3


MAPS = (None, 11, 12)


BAD_ROIS = [
    ((None, 4), r"`rois`.*5.*Received: rois\.shape=\(None, 4\)"),
    ((7, 6), r"`rois`.*5.*Received: rois\.shape=\(7, 6\)"),
    ((5,), r"`rois`.*rank 2.*Received: rois\.shape=\(5,\)"),
    ((2, 7, 5), r"`rois`.*rank 2.*Received: rois\.shape=\(2, 7, 5\)"),
]


@pytest.mark.parametrize(("shape", "match"), BAD_ROIS)
@pytest.mark.parametrize("kind", POOLS)
def test_wrong_rois_in_a_symbolic_call(kind, shape, match):
    shapes = {k: v.shape for k, v in own_call(kind).items()}
    _rejects(match, kind, {**shapes, "rois": shape})
    shapes.pop("trans_inputs", None)
    _rejects(match, kind, {**shapes, "rois": shape})


@pytest.mark.parametrize("shape", [(11, 12, 36), (1, 2, 11, 12, 36), (36,)])
@pytest.mark.parametrize("kind", POOLS)
def test_wrong_rank_of_inputs_in_a_symbolic_call(kind, shape):
    received = re.escape(f"Received: inputs.shape={shape}")
    match = f"`inputs`.*rank 4.*{received}"
    shapes = {k: v.shape for k, v in own_call(kind).items()}
    _rejects(match, kind, {**shapes, "inputs": shape})


@pytest.mark.parametrize("channels", [35, 37, 6, 0])
def test_wrong_channels_in_a_symbolic_call(channels):
    shapes = {"inputs": (None, 11, 12, channels), "rois": (None, 5)}
    received = rf"Received: inputs\.shape=\(None, 11, 12, {channels}\)"
    match = f"`inputs`.*36.*{received}"
    _rejects(match, "psroi", shapes)
    shapes["trans_inputs"] = (None, 11, 12, 7)
    _rejects(match, "psroi", shapes)
    # Channels that the layer's own arguments require instead of 36.
    shapes["inputs"] = (None, 11, 12, 36)
    _rejects("`inputs`.*54.*Received", "psroi", shapes, output_dim=9)
    _rejects("`inputs`.*72.*Received", "psroi", shapes, group_size=None)


BAD_TRANS = [
    ((7, 5, 2, 6), "`trans`.*2", {}),
    ((7, 2, 4, 6), "`trans`.*5", {}),
    ((6, 2, 5, 6), "`trans`.*7", {}),
    ((7, 2, 5, 5), "`trans`", {}),
    ((7, 2, 5, 0), "`trans`", {}),
    ((7, 2, 5, 8), "output_dim", {}),
    ((7, 2, 5), "`trans`.*rank 4", {}),
    ((7, 2, 5, 6), "`trans`.*3", {"part_size": None}),
]


@pytest.mark.parametrize(("shape", "match", "config"), BAD_TRANS)
def test_wrong_trans_in_a_symbolic_call(shape, match, config):
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5), "trans": shape}
    received = "Received: .*" + re.escape(f"trans.shape={shape}")
    _rejects(f"{match}.*{received}", "psroi", shapes, **config)


BAD_OFFSETS = [
    ((7, 4, 3, 2), "height 3"),
    ((7, 3, 5, 2), "width 4"),
    ((6, 3, 4, 2), "7"),
    ((7, 3, 4, 1), "2"),
    ((7, 24), "rank 4"),
]


@pytest.mark.parametrize(("shape", "match"), BAD_OFFSETS)
@pytest.mark.parametrize("kind", DENSE)
def test_wrong_offset_in_a_symbolic_call(kind, shape, match):
    """Tests a wrong number of ROIs, which the op judges.

    The text of the op may say `trans`.
    """
    shapes = {"inputs": (2, 11, 12, 6), "rois": (7, 5), "offset": shape}
    name = "(offset|trans)" if match == "7" else "offset"
    received = f"Received: {name}.shape=" + re.escape(str(shape))
    _rejects(f"`{name}`.*{match}.*{received}", kind, shapes)


@pytest.mark.parametrize("kind", ["pool", "align"])
def test_wrong_channels_of_an_offset_in_a_symbolic_call(kind):
    shapes = {"inputs": (2, 11, 12, 6), "rois": (7, 5)}
    _rejects("2.*Received", kind, {**shapes, "offset": (7, 3, 4, 4)})


@pytest.mark.parametrize(
    "shape", [(11, 12, 7), (1, 2, 11, 12, 7), (7,), (2, 7)]
)
def test_wrong_rank_of_trans_inputs_in_a_symbolic_call(shape):
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5), "trans_inputs": shape}
    received = re.escape(f"Received: trans_inputs.shape={shape}")
    _rejects(f"`trans_inputs`.*rank 4.*{received}", "psroi", shapes)


def test_another_batch_of_trans_inputs_in_a_symbolic_call():
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5)}
    shapes["trans_inputs"] = (3, 11, 12, 7)
    _rejects("`trans_inputs`.*batch.*Received.*3", "psroi", shapes)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("psroi", "inputs"),
        (
            "psroi",
            "trans_inputs",
        ),
        (
            "pool",
            "inputs",
        ),
        (
            "align",
            "inputs",
        ),
    ],
)
def test_a_map_that_is_a_number(kind, name):
    shapes = {k: v.shape for k, v in own_call(kind).items()}
    _rejects(f"`{name}`.*rank 4.*Received", kind, {**shapes, name: ()})


@pytest.mark.parametrize("kind", POOLS)
def test_channels_that_the_branch_needs_are_unknown(kind):
    shapes = {"inputs": (None, 11, 12, None), "rois": (None, 5)}
    match = r"Expected the channels of `inputs`.*Received.*\(None, 11, 12, None"
    if kind == "psroi":
        shapes["trans_inputs"] = shapes["inputs"]
        match = match.replace("inputs", "trans_inputs")
    with pytest.raises(ValueError, match=match):
        new(kind)(**{k: keras.KerasTensor(v) for k, v in shapes.items()})


@pytest.mark.parametrize("kind", POOLS)
def test_wrong_shapes_in_an_eager_call(kind):
    """Tests eager calls, which the kernel judges, with the same text."""
    errors = (ValueError, tf.errors.InvalidArgumentError)
    layer, call = displaced(kind), own_call(kind)
    with pytest.raises(errors, match=r"Expected `rois`.*5.*Received.*\(7, 4\)"):
        layer(**{**call, "rois": call["rois"][:, :4]})
    call = given_call(kind)
    name = KINDS[kind].given
    match = r"Expected `(trans|offset)`.*Received: .*\(6, "
    with pytest.raises(errors, match=match):
        layer(**{**call, name: call[name][:6]})


# The shapes are in channels first.


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (
            "align",
            {"offset": (7, 3, 4, 2)},
            "`offset` to have height 3 (num_rois, 2, pooled_h, pooled_w). "
            "Received: offset.shape=(7, 3, 4, 2)",
        ),
        (
            "pool",
            {"offset": (7, 3, 3, 4)},
            "`offset` to have a second dimension of 2 (num_rois, 2, pooled_h, "
            "pooled_w). Received: offset.shape=(7, 3, 3, 4)",
        ),
        (
            "pool",
            {"offset": (6, 2, 3, 4)},
            "`offset` to have .*7.*Received: offset.shape=(6, 2, 3, 4)",
        ),
        (
            "psroi",
            {"trans": (7, 2, 5, 6)},
            "`trans` to have .*Received: trans.shape=(7, 2, 5, 6)",
        ),
        (
            "psroi",
            {"trans": (7, 5, 2, 5)},
            "the second dimension of `trans` .*trans.shape=(7, 5, 2, 5)",
        ),
        (
            "psroi",
            {"inputs": (2, 11, 12, 36)},
            "`inputs` to have 36 .*Received: inputs.shape=(2, 11, 12, 36)",
        ),
        (
            "psroi",
            {"inputs": (36, 11, 12)},
            "`inputs` to have rank 4 (batch, output_dim * group_h * group_w, "
            "height, width). Received: inputs.shape=(36, 11, 12)",
        ),
        (
            "psroi",
            {"trans_inputs": (3, 4, 11, 12)},
            "`trans_inputs` to have the batch .*Received: inputs.shape=(2, 36, "
            "11, 12), trans_inputs.shape=(3, 4, 11, 12)",
        ),
        (
            "align",
            {"inputs": (2, 6, 11)},
            "`inputs` to have rank 4 (batch, channels, height, width). "
            "Received: inputs.shape=(2, 6, 11)",
        ),
        (
            "align",
            {"offset": (7, 24)},
            "`offset` to have rank 4 (num_rois, 2, pooled_h, pooled_w). "
            "Received: offset.shape=(7, 24)",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "eager"])
def test_messages_speak_of_what_was_passed(kind, changes, text, symbolic):
    shapes = {"inputs": (2, KINDS[kind].channels, 11, 12), "rois": (7, 5)}
    make = keras.KerasTensor if symbolic else np.zeros
    call = {name: make(size) for name, size in {**shapes, **changes}.items()}
    if not symbolic:
        call = {k: v.astype(np.float32) for k, v in call.items()}
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as info:
        new(kind, data_format="channels_first")(**call)
    pattern = re.escape(f"Expected {text}").replace(r"\.\*", ".*")
    assert re.search(pattern, str(info.value), re.DOTALL), str(info.value)


@pytest.mark.parametrize("kind", POOLS)
def test_unknown_channels(kind):
    name = "trans_inputs" if kind == "psroi" else "inputs"
    shapes = {"inputs": (2, KINDS[kind].channels, 11, 12), "rois": (7, 5)}
    shapes[name] = (2, None, 11, 12)
    with pytest.raises(
        ValueError,
        match=rf"Expected the channels of `{name}` to be known. Received: "
        rf"{name}.shape=\(2, None, 11, 12\)",
    ):
        new(kind, data_format="channels_first")(
            **{k: keras.KerasTensor(v) for k, v in shapes.items()}
        )


@pytest.mark.parametrize(
    "value",
    [
        "NHWC",
        "",
        "channels_middle",
        b"channels_last",
        1,
        True,
        ["channels_last"],
    ]
    + [np.array("channels_last"), tf.constant("channels_last"), 1.0, {}],
    ids=str,
)
@pytest.mark.parametrize("kind", POOLS)
def test_what_is_no_format(kind, value):
    with pytest.raises(ValueError, match="Expected `data_format` .*Received: "):
        new(kind, data_format=value)
