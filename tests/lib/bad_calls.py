# SPDX-License-Identifier: Apache-2.0
"""Lists wrong calls of every op, and the words that the error must have.

Every error is a `ValueError`, a `TypeError` or an `InvalidArgumentError`; its
text says what was expected and what was received.
"""

import dataclasses
import re

import numpy as np
import tensorflow as tf

from tf_deform.ops import (
    deformable_conv2d,
    deformable_psroi_pool,
    deformable_roi_align,
)

ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)


@dataclasses.dataclass(frozen=True)
class BadCall:
    """Describes changes of a good call, and the words of the error.

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
        # TensorFlow appends the op and its attributes, which are no words of
        # ours.
        text = re.split(r" for '\{\{node| \[Op:", str(error))[0]
        ours = f"Expected.*{self.expected}.*Received: .*{self.received}"
        patterns = [ours] + ([self.tensorflow] if self.tensorflow else [])
        assert any(re.search(p, text, re.DOTALL) for p in patterns), text


def zeros(*shape: int, dtype: str = "float32") -> tf.Tensor:
    if dtype == "string":
        return tf.fill(shape, "0")
    return tf.zeros(shape, dtype)


def shape(name: str, *sizes: int) -> str:
    """Returns a regular expression for `name.shape=(2, 9, ...)` in a text."""
    return re.escape(f"{name}.shape=({', '.join(map(str, sizes))})")


# Good calls; the convolution has a 3x2 kernel, 2 offset groups and 7x9 output
# pixels. Every bad call differs from a good call only in what its `changes`
# name. A tuple under the name of an operand is a shape.
OPERANDS = ["inputs", "kernel", "rois", "offset", "trans", "mask"]
CONV2D = {
    "inputs": (2, 9, 10, 12),
    "kernel": (3, 2, 12, 8),
    "offset": (2, 7, 9, 24),
    "mask": (2, 7, 9, 12),
    "offset_groups": 2,
}
GOOD = {
    deformable_conv2d: CONV2D,
    deformable_psroi_pool: {
        "inputs": (2, 8, 9, 36),
        "rois": (7, 5),
        "trans": (7, 5, 2, 6),
        "output_dim": 6,
        "spatial_scale": 0.25,
        "pooled_size": (3, 4),
        "group_size": (3, 2),
        "part_size": (5, 2),
    },
    deformable_roi_align: {
        "inputs": (2, 8, 9, 6),
        "rois": (7, 5),
        "offset": (7, 3, 4, 2),
        "spatial_scale": 0.25,
        "pooled_size": (3, 4),
    },
}


def _wrong_shapes(rows: list) -> list[BadCall]:
    """Makes bad calls of (operand, fault, words of the error, shape)."""
    return [
        BadCall(
            f"{name} {what} {sizes}",
            {name: zeros(*sizes)},
            right,
            shape(name, *sizes) if len(sizes) > 1 else f"{name}.shape=",
        )
        for name, what, right, sizes in rows
    ]


def _wrong_values(rows: list) -> list[BadCall]:
    """Makes bad calls of (argument, value, received value in the error)."""
    return [
        BadCall(
            f"{name}={str(value)[:30]} {type(value).__name__}",
            {name: value},
            f"`{name}`",
            received,
        )
        for name, values in rows
        for value, received in values
    ]


def _wrong_types(name: str, good: tuple, dtypes: str, right: str) -> list:
    return [
        BadCall(
            f"{name} of {dtype}",
            {name: zeros(*good, dtype=dtype)},
            f"`{name}`.*{right}",
            dtype,
        )
        for dtype in dtypes.split()
    ]


# Refused by the shape: the graph builder raises ValueError as soon as shapes
# are known, the kernel raises InvalidArgumentError when it runs.
CONV2D_SHAPES = [
    *_wrong_shapes(
        [
            *[
                (name, "rank", f"`{name}`.*(rank 4|4 dimensions)", sizes)
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
            ],
            ("offset", "channels", "`offset`.*24", (2, 7, 9, 12)),
            ("offset", "channels, one more", "`offset`.*24", (2, 7, 9, 25)),
            ("offset", "channels, none", "`offset`.*24", (2, 7, 9, 0)),
            ("offset", "batch", "`offset`.*2", (3, 7, 9, 24)),
            ("offset", "batch, one for all", "`offset`.*2", (1, 7, 9, 24)),
            ("offset", "batch, none", "`offset`.*2", (0, 7, 9, 24)),
            ("offset", "height", "`offset`.*7", (2, 8, 9, 24)),
            ("offset", "width", "`offset`.*9", (2, 7, 8, 24)),
            ("offset", "sizes, swapped", "`offset`.*7", (2, 9, 7, 24)),
            ("mask", "channels", "`mask`.*12", (2, 7, 9, 24)),
            ("mask", "channels, one for all", "`mask`.*12", (2, 7, 9, 1)),
            ("mask", "batch", "`mask`.*2", (1, 7, 9, 12)),
            ("mask", "height", "`mask`.*7", (2, 1, 9, 12)),
            ("mask", "width", "`mask`.*9", (2, 7, 1, 12)),
            (
                "kernel",
                "channels, no divisor",
                "channels.*`kernel`",
                (3, 2, 5, 8),
            ),
            ("kernel", "channels, more", "channels.*`kernel`", (3, 2, 24, 8)),
            ("kernel", "channels, none", "`kernel`", (3, 2, 0, 8)),
            ("kernel", "filters", "(filters|`kernel`).*3", (3, 2, 4, 8)),
            ("kernel", "height 0", "`kernel`", (0, 2, 12, 8)),
            ("kernel", "width 0", "`kernel`", (3, 0, 12, 8)),
        ]
    ),
    *[
        BadCall(
            f"{groups} offset_groups",
            {
                "offset_groups": groups,
                "offset": zeros(2, 7, 9, 12 * groups),
                "mask": zeros(2, 7, 9, 6 * groups),
            },
            "`?offset_groups`?",
            rf"(offset_groups={groups}|inputs\.shape=\(2, 9, 10, 12\))",
        )
        for groups in (5, 24)  # no divisor of the channels, and larger
    ],
    *[
        BadCall(f"{changes}", changes, expected, received)
        for changes, expected, received in [
            ({"inputs": (2, 2, 10, 12)}, "height.*3", "height.*2"),
            ({"inputs": (2, 9, 1, 12)}, "width.*2", "width.*1"),
            ({"dilation_rate": (5, 1)}, "height.*11", "height.*9"),
        ]
    ],
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
SHAPES_OF_BOTH = [
    ("inputs", "rank", "`inputs`.*4", (8, 9, 36)),
    ("inputs", "rank", "`inputs`.*4", (1, 2, 8, 9, 36)),
    ("inputs", "rank", "`inputs`.*4", ()),
    ("rois", "rank", "`rois`.*2", (5,)),
    ("rois", "rank", "`rois`.*2", (1, 7, 5)),
    ("rois", "rank", "`rois`.*2", ()),
    ("rois", "columns", "`rois`.*5", (7, 4)),
    ("rois", "columns", "`rois`.*5", (7, 6)),
    ("rois", "columns", "`rois`.*5", (7, 0)),
]

BAD_SHAPES = {
    deformable_conv2d: CONV2D_SHAPES,
    deformable_psroi_pool: [
        *_wrong_shapes(
            [
                *SHAPES_OF_BOTH,
                ("inputs", "channels, one less", "36", (2, 8, 9, 35)),
                ("inputs", "channels, one more", "36", (2, 8, 9, 37)),
                ("inputs", "channels of one group", "36", (2, 8, 9, 6)),
                ("inputs", "channels, none", "36", (2, 8, 9, 0)),
                ("trans", "rank", "`trans`.*4", (7, 5, 12)),
                ("trans", "rank", "`trans`.*4", (7, 5, 2, 3, 2)),
                ("trans", "rank", "`trans`.*4", ()),
                ("trans", "rois, one less", "`trans`.*7", (6, 5, 2, 6)),
                ("trans", "rois, one for all", "`trans`.*7", (1, 5, 2, 6)),
                ("trans", "rois, none", "`trans`.*7", (0, 5, 2, 6)),
                ("trans", "part height", "`trans`.*5", (7, 3, 2, 6)),
                ("trans", "part width", "`trans`.*2", (7, 5, 4, 6)),
                ("trans", "parts, swapped", "`trans`.*5", (7, 2, 5, 6)),
                ("trans", "channels, odd", "`trans`", (7, 5, 2, 5)),
                ("trans", "channels, none", "`trans`", (7, 5, 2, 0)),
                ("trans", "channels, 4 classes", "output_dim", (7, 5, 2, 8)),
                ("trans", "channels, 7 classes", "output_dim", (7, 5, 2, 14)),
            ]
        ),
        BadCall(
            "one ROI less than displacements",
            {"rois": zeros(6, 5)},
            "`trans`.*6",
            shape("trans", 7, 5, 2, 6),
        ),
        BadCall(
            "another output_dim",
            {"output_dim": 9},
            "`inputs`.*54",
            shape("inputs", 2, 8, 9, 36),
        ),
        BadCall(
            "another group_size",
            {"group_size": (2, 2)},
            "`inputs`.*24",
            shape("inputs", 2, 8, 9, 36),
        ),
        BadCall(
            "group_size left to pooled_size",
            {"group_size": None},
            "`inputs`.*72",
            shape("inputs", 2, 8, 9, 36),
        ),
        BadCall(
            "part_size left to pooled_size",
            {"part_size": None},
            "`trans`.*3",
            shape("trans", 7, 5, 2, 6),
        ),
    ],
    deformable_roi_align: [
        *_wrong_shapes(
            [
                *SHAPES_OF_BOTH,
                ("offset", "rank", "`offset`.*4", (7, 3, 8)),
                ("offset", "rank", "`offset`.*4", (7, 3, 4, 1, 2)),
                ("offset", "rank", "`offset`.*4", ()),
                ("offset", "rois, one less", "`offset`.*7", (6, 3, 4, 2)),
                ("offset", "rois, one for all", "`offset`.*7", (1, 3, 4, 2)),
                ("offset", "rois, none", "`offset`.*7", (0, 3, 4, 2)),
                ("offset", "height", "`offset`.*3", (7, 1, 4, 2)),
                ("offset", "width", "`offset`.*4", (7, 3, 5, 2)),
                ("offset", "sizes, swapped", "`offset`.*3", (7, 4, 3, 2)),
                ("offset", "channels, one", "`offset`.*2", (7, 3, 4, 1)),
                ("offset", "channels, more", "`offset`.*2", (7, 3, 4, 4)),
                ("offset", "channels, none", "`offset`.*2", (7, 3, 4, 0)),
            ]
        ),
        BadCall(
            "one ROI more than displacements",
            {"rois": zeros(8, 5)},
            "`offset`.*8",
            shape("offset", 7, 3, 4, 2),
        ),
        BadCall(
            "another pooled_size",
            {"pooled_size": 3},
            "`offset`.*3",
            shape("offset", 7, 3, 4, 2),
        ),
    ],
}

REALS = [
    [(-0.25, r"-0\.25"), (float("nan"), "nan"), (float("inf"), "inf")],
    [(float("-inf"), "-inf"), ("0.25", "'0.25'"), (None, "None")],
    [((0.25, 0.25), r"\(0.25, 0.25\)"), (1j, "1j"), (10**400, "1329 bits")],
]
SIZES = [
    [(0, "0"), (-1, "-1"), ((1, 0), "0"), ((-3, 4), "-3")],
    [((1, 2, 3), r"\(1, 2, 3\)"), ((1,), r"\(1,\)"), ((), r"\(\)")],
    [("3", "'3'"), ((1, "2"), "'2'"), (1.5, "1.5"), (True, "True")],
    [({"h": 1}, "{'h': 1}"), (2**70, str(2**70)), (2**62, str(2**62))],
]
VALUES_OF_BOTH = [
    *[("spatial_scale", values) for values in REALS],
    ("spatial_scale", [(0, "0"), (0.0, "0"), (-0.0, "0")]),
    *[("pooled_size", values) for values in SIZES],
    ("pooled_size", [(None, "None")]),
]


def _wrong_types_of_both(inputs: tuple, name: str, good: tuple) -> list:
    """Makes bad calls of the shapes of the inputs and of `name`."""
    numbers = "bool string complex64"
    return [
        *_wrong_types("inputs", inputs, f"int32 uint8 {numbers}", "float32"),
        *_wrong_types("rois", (7, 5), numbers, ""),
        *_wrong_types(name, good, f"int32 {numbers}", "float"),
        BadCall("inputs=None", {"inputs": None}, "`inputs`", "None"),
        BadCall("rois=None", {"rois": None}, "`rois`", "None"),
    ]


# Refused by the value or the type of an argument.
CONV2D_VALUES = [
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
            {"inputs": zeros(*CONV2D["inputs"], dtype=dtype)},
            "`inputs`.*float32",
            dtype,
        )
        for dtype in ["int32", "uint8", "bool", "string", "complex64"]
    ],
    *[
        BadCall(
            f"inputs and kernel of {dtype}",
            {
                "inputs": zeros(*CONV2D["inputs"], dtype=dtype),
                "kernel": zeros(*CONV2D["kernel"], dtype=dtype),
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
                "inputs": zeros(*CONV2D["inputs"], dtype=inputs),
                "kernel": zeros(*CONV2D["kernel"], dtype=kernel),
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
            {name: zeros(*CONV2D[name], dtype=dtype)},
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


BAD_VALUES = {
    deformable_conv2d: CONV2D_VALUES,
    deformable_psroi_pool: [
        *_wrong_values(
            [
                *VALUES_OF_BOTH,
                *[("trans_std", values) for values in REALS],
                *[("group_size", values) for values in SIZES],
                *[("part_size", values) for values in SIZES],
                ("output_dim", [(0, "0"), (-6, "-6"), (2.5, "2.5")]),
                ("output_dim", [("6", "'6'"), (None, "None"), (True, "True")]),
                ("output_dim", [((3, 3), r"\(3, 3\)")]),
                ("sample_per_part", [(0, "0"), (-4, "-4"), (4.0, "4.0")]),
                ("sample_per_part", [("4", "'4'"), (None, "None")]),
                ("sample_per_part", [((4, 4), r"\(4, 4\)")]),
                ("sample_per_part", [(True, "True"), (2**40, str(2**40))]),
            ]
        ),
        *_wrong_types_of_both((2, 8, 9, 36), "trans", (7, 5, 2, 6)),
    ],
    deformable_roi_align: [
        *_wrong_values(
            [
                *VALUES_OF_BOTH,
                *[("gamma", values) for values in REALS],
                ("sampling_ratio", [(2.0, "2.0"), ("2", "'2'")]),
                ("sampling_ratio", [(None, "None"), (True, "True")]),
                ("sampling_ratio", [((2, 2), r"\(2, 2\)")]),
                ("sampling_ratio", [(2**31, str(2**31)), (2**70, str(2**70))]),
            ]
        ),
        *_wrong_types_of_both((2, 8, 9, 6), "offset", (7, 3, 4, 2)),
    ],
}


def _rois_with(index: float, row: int = 5, corner: float = 1.0) -> tf.Tensor:
    rois = np.zeros((7, 5), np.float32)
    rois[row, 0], rois[row, 3] = index, corner
    return tf.constant(rois)


# Refused by the values of `rois`, which no graph knows before it runs.
BAD_DATA = [
    *[
        BadCall(
            f"batch index {index}, corner {corner}",
            {"rois": _rois_with(index, row, corner)},
            "the batch indices in `rois`.* below 2",
            rf"rois\[{row}, 0\]={text}",
        )
        for index, row, corner, text in [
            (2, 5, 1.0, "2"),
            (2, 0, np.nan, "2"),
            (3, 6, 1.0, "3"),
            (100, 5, 1.0, "100"),
            (2.5, 5, 1.0, r"2\.5"),
            (0.5, 4, 1.0, r"0\.5"),
            (-0.5, 5, 1.0, r"-0\.5"),
            (-7.25, 5, np.inf, r"-7\.25"),
            (1e30, 5, 1.0, r"1e\+30"),
            (np.inf, 5, 1.0, "inf"),
            (np.nan, 5, 1.0, "-?nan"),
            (np.nan, 5, np.nan, "-?nan"),
            (2.0**31, 5, 1.0, "2.*"),
            (2.0**64, 5, 1.0, "1.8.*"),
        ]
    ],
    BadCall(
        "batch index of an integer ROI",
        {"rois": tf.constant([[0, 0, 0, 1, 1]] * 6 + [[2, 0, 0, 1, 1]])},
        "the batch indices in `rois`.* below 2",
        r"rois\[6, 0\]=2",
    ),
]


BAD_BEFORE_RUNNING = {op: BAD_SHAPES[op] + BAD_VALUES[op] for op in GOOD}


def arguments_of(op, changes: dict) -> tuple[dict, dict]:
    """Returns the operands and the options of a call."""
    arguments = {**GOOD[op], **changes}
    operands = {
        name: zeros(*value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
        if name in OPERANDS
    }
    options = {k: v for k, v in arguments.items() if k not in OPERANDS}
    return operands, options


def rows_of(bad_calls: dict) -> dict:
    """Returns the op and the bad call, for `pytest.mark.parametrize`."""
    rows = [(op, bad) for op, calls in bad_calls.items() for bad in calls]
    return {
        "argnames": ("op", "bad_call"),
        "argvalues": rows,
        "ids": [f"{op.__name__}-{bad.name}" for op, bad in rows],
    }
