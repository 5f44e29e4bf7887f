# SPDX-License-Identifier: Apache-2.0
"""Calls that are wrong: each is answered by an error that a person can use.

The error is a `ValueError`, a `TypeError` or an `InvalidArgumentError`, and
its text says what was expected and what was received.
"""

import dataclasses
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_deform.layers import DeformableConv2D
from tf_deform.ops import deformable_conv2d

ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)


@dataclasses.dataclass(frozen=True)
class BadCall:
    """What is changed of a good call, and what the text must say then.

    `expected` and `received` are regular expressions. Where they stand, the
    text reads "Expected ... Received: ..."; `tensorflow` is an alternative
    for the few calls that TensorFlow itself refuses before we see them.
    """

    name: str
    changes: dict
    expected: str
    received: str
    tensorflow: str | None = None

    def check(self, error: BaseException) -> None:
        # TensorFlow appends the op and its attributes: not what we said.
        text = re.split(r" for '\{\{node| \[Op:", str(error))[0]
        ours = f"Expected.*{self.expected}.*Received: .*{self.received}"
        patterns = [ours] + ([self.tensorflow] if self.tensorflow else [])
        assert any(re.search(p, text, re.DOTALL) for p in patterns), text


def zeros(*shape: int, dtype: str = "float32") -> tf.Tensor:
    if dtype == "string":
        return tf.fill(shape, "0")
    return tf.zeros(shape, dtype)


def shape(name: str, *sizes: int) -> str:
    """A regular expression for `name.shape=(2, 9, ...)` in a text."""
    return re.escape(f"{name}.shape=({', '.join(map(str, sizes))})")


# A good call: 3x2 kernel, 2 offset groups, 7x9 output pixels. Every bad call
# differs from it in what its `changes` name, and in nothing else.
GOOD = {
    "inputs": (2, 9, 10, 12),
    "kernel": (3, 2, 12, 8),
    "offset": (2, 7, 9, 24),
    "mask": (2, 7, 9, 12),
    "offset_groups": 2,
}
OPERANDS = ["inputs", "kernel", "offset", "mask"]

# Refused by the shape: the graph builder says it with ValueError as soon as
# shapes are known, the kernel with InvalidArgumentError when it runs.
BAD_SHAPES = [
    BadCall(
        f"{name} of rank {len(sizes)}",
        {name: zeros(*sizes)},
        f"`{name}`.*(rank 4|4 dimensions)",
        shape(name, *sizes) if len(sizes) > 1 else f"{name}.shape=",
    )
    for name, sizes in [
        ("inputs", (9, 10, 12)),
        ("inputs", (1, 2, 9, 10, 12)),
        ("inputs", ()),
        ("kernel", (3, 2, 12)),
        ("kernel", (1, 3, 2, 12, 8)),
        ("offset", (2, 7, 9, 2, 12)),
        ("offset", (7, 9, 24)),
        ("offset", ()),
        ("mask", (7, 9, 12)),
        ("mask", (2, 7, 9, 2, 6)),
        ("mask", ()),
    ]
]
BAD_SHAPES += [
    BadCall(
        f"{name} has a wrong {what}",
        {name: zeros(*sizes)},
        f"`{name}`.*{right}",
        shape(name, *sizes),
    )
    for name, what, right, sizes in [
        ("offset", "number of channels", "24", (2, 7, 9, 12)),
        ("offset", "number of channels, one more", "24", (2, 7, 9, 25)),
        ("offset", "number of channels, none", "24", (2, 7, 9, 0)),
        ("offset", "batch", "2", (3, 7, 9, 24)),
        ("offset", "batch, one for all", "2", (1, 7, 9, 24)),
        ("offset", "batch, none", "2", (0, 7, 9, 24)),
        ("offset", "height", "7", (2, 8, 9, 24)),
        ("offset", "width", "9", (2, 7, 8, 24)),
        ("offset", "height and width, swapped", "7", (2, 9, 7, 24)),
        ("mask", "number of channels", "12", (2, 7, 9, 24)),
        ("mask", "number of channels, one for all", "12", (2, 7, 9, 1)),
        ("mask", "batch", "2", (1, 7, 9, 12)),
        ("mask", "height", "7", (2, 1, 9, 12)),
        ("mask", "width", "9", (2, 7, 1, 12)),
    ]
]
BAD_SHAPES += [
    BadCall(
        "channels not divisible by those of the kernel",
        {"kernel": zeros(3, 2, 5, 8)},
        "channels.*`kernel`",
        shape("kernel", 3, 2, 5, 8),
    ),
    BadCall(
        "more channels in the kernel than in the inputs",
        {"kernel": zeros(3, 2, 24, 8)},
        "channels.*`kernel`",
        shape("kernel", 3, 2, 24, 8),
    ),
    BadCall(
        "kernel without channels",
        {"kernel": zeros(3, 2, 0, 8)},
        "`kernel`",
        shape("kernel", 3, 2, 0, 8),
    ),
    BadCall(
        "filters not divisible by groups",
        {"kernel": zeros(3, 2, 4, 8)},
        "(filters|`kernel`).*3",
        shape("kernel", 3, 2, 4, 8),
    ),
    BadCall(
        "channels not divisible by offset_groups",
        {
            "offset_groups": 5,
            "offset": zeros(2, 7, 9, 60),
            "mask": zeros(2, 7, 9, 30),
        },
        "`?offset_groups`?",
        r"(offset_groups=5|inputs\.shape=\(2, 9, 10, 12\))",
    ),
    BadCall(
        "more offset_groups than channels",
        {
            "offset_groups": 24,
            "offset": zeros(2, 7, 9, 288),
            "mask": zeros(2, 7, 9, 144),
        },
        "`?offset_groups`?",
        r"(offset_groups=24|inputs\.shape=\(2, 9, 10, 12\))",
    ),
    BadCall(
        "kernel of height 0",
        {"kernel": zeros(0, 2, 12, 8)},
        "`kernel`",
        shape("kernel", 0, 2, 12, 8),
    ),
    BadCall(
        "kernel of width 0",
        {"kernel": zeros(3, 0, 12, 8)},
        "`kernel`",
        shape("kernel", 3, 0, 12, 8),
    ),
    BadCall(
        "kernel higher than the inputs",
        {"inputs": zeros(2, 2, 10, 12)},
        "height.*3",
        "height.*2",
    ),
    BadCall(
        "kernel wider than the inputs",
        {"inputs": zeros(2, 9, 1, 12)},
        "width.*2",
        "width.*1",
    ),
    BadCall(
        "dilated kernel higher than the inputs",
        {"dilation_rate": (5, 1)},
        "height.*11",
        "height.*9",
    ),
    *[
        BadCall(
            f"{name}={value} overflows",
            {name: value},
            f"`{name}`",
            "(" + "|".join(re.findall(r"\d{10,}", str(value))) + ")",
        )
        for name, value in [
            ("dilation_rate", 2**62),
            ("dilation_rate", (1, 2**63 - 1)),
            ("padding", 2**62),
            ("padding", ((0, 2**63 - 1), (0, 0))),
        ]
    ],
]

# Refused by the value or the type of an argument.
BAD_VALUES = [
    *[
        BadCall(f"{name}={value!r}", {name: value}, f"`{name}`", received)
        for name, values in [
            ("strides", [(0, "0"), (-1, "-1"), ((1, 0), "0")]),
            ("strides", [((1, 2, 3), r"\(1, 2, 3\)"), ((1,), r"\(1,\)")]),
            ("strides", [((), r"\(\)"), ({"h": 1}, "{'h': 1}")]),
            ("strides", [("2", "'2'"), ((1, "2"), "'2'"), (1.5, "1.5")]),
            ("strides", [(True, "True"), (None, "None")]),
            ("dilation_rate", [(0, "0"), (-2, "-2"), ((0, 1), "0")]),
            ("dilation_rate", [((1, 1, 1), r"\(1, 1, 1\)"), (1.0, "1.0")]),
            ("dilation_rate", [("same", "'same'"), (None, "None")]),
            ("offset_groups", [(0, "0"), (-1, "-1"), (2.0, "2.0")]),
            ("offset_groups", [("2", "'2'"), ((1, 1), r"\(1, 1\)")]),
            ("offset_groups", [(None, "None"), (True, "True")]),
            ("boundary", [("reflect", "'reflect'"), ("ZEROS", "'ZEROS'")]),
            ("boundary", [("", "''"), (None, "None"), (0, "0")]),
            ("padding", [("full", "'full'"), ("", "''"), (-1, "-1")]),
            ("padding", [((1, -1), "-1"), (((0, -1), (0, 0)), "-1")]),
            ("padding", [((1, 2, 3), r"\(1, 2, 3\)"), (1.5, "1.5")]),
            ("padding", [(None, "None"), (True, "True")]),
            ("padding", [(((1, 2), 3), r"\(\(1, 2\), 3\)")]),
            ("padding", [(((1, 2, 3), (1, 2)), r"\(1, 2, 3\)")]),
            ("padding", [((1, "same"), "'same'")]),
            ("padding", [(((0, 0),) * 4, r"\(\(0, 0\), \(0, 0\), ")]),
        ]
        for value, received in values
    ],
    *[
        BadCall(
            f"inputs of {dtype}",
            {"inputs": zeros(*GOOD["inputs"], dtype=dtype)},
            "`inputs`.*float32",
            dtype,
        )
        for dtype in ["int32", "uint8", "bool", "string", "complex64"]
    ],
    *[
        BadCall(
            f"inputs and kernel of {dtype}",
            {
                "inputs": zeros(*GOOD["inputs"], dtype=dtype),
                "kernel": zeros(*GOOD["kernel"], dtype=dtype),
            },
            "`inputs`.*float32",
            dtype,
        )
        for dtype in ["int32", "complex64"]
    ],
    *[
        BadCall(
            f"inputs of {inputs}, kernel of {kernel}",
            {
                "inputs": zeros(*GOOD["inputs"], dtype=inputs),
                "kernel": zeros(*GOOD["kernel"], dtype=kernel),
            },
            f"`kernel`.*{inputs}",
            kernel,
        )
        for inputs, kernel in [
            ("float32", "float64"),
            ("float16", "float32"),
            ("bfloat16", "float16"),
            ("float32", "int32"),
        ]
    ],
    *[
        BadCall(
            f"{name} of {dtype}",
            {name: zeros(*GOOD[name], dtype=dtype)},
            f"`{name}`.*float",
            dtype,
        )
        for name in ["offset", "mask"]
        for dtype in ["int32", "string", "complex64", "bool"]
    ],
    *[
        BadCall(
            f"{name} is None",
            {name: None},
            f"`{name}`",
            "None",
            tensorflow="None values not supported|NoneType",
        )
        for name in ["inputs", "kernel", "offset"]
    ],
]


def _arguments(bad_call: BadCall) -> tuple[dict, dict]:
    """Returns the operands and the options of a bad call."""
    arguments = {**GOOD, **bad_call.changes}
    operands = {
        name: zeros(*value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
        if name in OPERANDS
    }
    options = {k: v for k, v in arguments.items() if k not in OPERANDS}
    return operands, options


def _call_in_graph(operands: dict, options: dict, known: bool) -> object:
    """Calls the op in a `tf.function`, with every shape known, or none."""
    absent = {name: x for name, x in operands.items() if x is None}
    present = {name: x for name, x in operands.items() if x is not None}

    @tf.function(
        input_signature=[
            tf.TensorSpec(x.shape if known else None, x.dtype)
            for x in present.values()
        ]
    )
    def graph(*tensors):
        return deformable_conv2d(
            **dict(zip(present, tensors, strict=True)), **absent, **options
        )

    if known:  # No kernel runs: the graph alone must refuse.
        return graph.get_concrete_function()
    return graph(*present.values())


def _names(bad_calls: list[BadCall]) -> dict:
    return {"argvalues": bad_calls, "ids": [b.name for b in bad_calls]}


def test_the_good_call_is_good():
    good = BadCall("nothing wrong", {}, "", "")
    operands, options = _arguments(good)
    assert deformable_conv2d(**operands, **options).shape == (2, 7, 9, 8)
    _call_in_graph(operands, options, known=True)
    _call_in_graph(operands, options, known=False)


@pytest.mark.parametrize("bad_call", **_names(BAD_SHAPES + BAD_VALUES))
def test_eager(bad_call):
    operands, options = _arguments(bad_call)
    with pytest.raises(ERRORS) as info:
        deformable_conv2d(**operands, **options)
    bad_call.check(info.value)


@pytest.mark.parametrize("bad_call", **_names(BAD_SHAPES + BAD_VALUES))
def test_graph_with_known_shapes(bad_call):
    """Refused while the graph is built, before anything runs."""
    operands, options = _arguments(bad_call)
    with pytest.raises((ValueError, TypeError)) as info:
        _call_in_graph(operands, options, known=True)
    bad_call.check(info.value)


@pytest.mark.parametrize("bad_call", **_names(BAD_SHAPES))
def test_graph_with_unknown_shapes(bad_call):
    """The graph cannot know, so the kernel refuses."""
    operands, options = _arguments(bad_call)
    with pytest.raises(ERRORS) as info:
        _call_in_graph(operands, options, known=False)
    bad_call.check(info.value)


@pytest.mark.parametrize("bad_call", **_names(BAD_VALUES))
def test_bad_value_in_graph_with_unknown_shapes(bad_call):
    operands, options = _arguments(bad_call)
    with pytest.raises(ERRORS) as info:
        _call_in_graph(operands, options, known=False)
    bad_call.check(info.value)


def test_options_are_keywords():
    operands, _ = _arguments(BadCall("", {}, "", ""))
    with pytest.raises(TypeError):
        deformable_conv2d(*operands.values(), 1)


def test_unknown_option():
    operands, options = _arguments(BadCall("", {}, "", ""))
    with pytest.raises(TypeError, match="data_format"):
        deformable_conv2d(**operands, **options, data_format="NCHW")


@pytest.mark.parametrize(
    "bad_call", **_names([b for b in BAD_SHAPES if "offset" in b.changes])
)
def test_bad_shape_under_a_tape(bad_call):
    """The gradient does not get in the way of the error."""
    operands, options = _arguments(bad_call)
    with tf.GradientTape() as tape, pytest.raises(ERRORS) as info:
        tape.watch(list(operands.values()))
        deformable_conv2d(**operands, **options)
    bad_call.check(info.value)


# The layer.


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


# Shapes: 3x3 "valid" over 9x10 is 7x8, with 2 offset groups 36 channels of
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
    """`compute_output_shape` refuses while a model is being built."""
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


@pytest.mark.parametrize("name", ["inputs", "kernel", "offset"])
@pytest.mark.parametrize(
    "value", [None, tf.ragged.constant([[1.0], []]), object()]
)
def test_what_is_no_dense_tensor_is_named(name, value):
    operands = {
        "inputs": np.ones((2, 6, 7, 4), np.float32),
        "kernel": np.ones((3, 3, 4, 5), np.float32),
        "offset": np.zeros((2, 4, 5, 18), np.float32),
    }
    deformable_conv2d(**operands)
    operands[name] = value
    with pytest.raises(TypeError, match=f"Expected `{name}` .* Received: .*"):
        deformable_conv2d(**operands)


@pytest.mark.parametrize("filters", [None, "3", 2.5, True])
def test_filters_are_an_integer(filters):
    with pytest.raises(TypeError, match="Expected `filters` .* Received: "):
        DeformableConv2D(filters, 3)
