# SPDX-License-Identifier: Apache-2.0
"""Lists wrong calls of every op, and the words that the error must have.

Every error is a `ValueError`, a `TypeError` or an `InvalidArgumentError`; its
text says what was expected and what was received. Wrong values of arguments
other than operands are in `arguments.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from every_op import OPS

from tf_deform.ops import (
    deformable_conv2d,
    deformable_psroi_pool,
    deformable_roi_align,
)

ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)


def words(error: BaseException) -> str:
    """Returns the words that are ours: TensorFlow adds the op and its place."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = re.sub(r"^\{\{function_node .*?\}\} ", "", text)
    if text.startswith("Graph execution error"):
        text = text[text.index("Expected ") :]
    return re.split(r" for '\{\{node| \[Op:|\n\t \[\[", text)[0].strip()


@dataclasses.dataclass(frozen=True)
class BadCall:
    """Describes changes of a good call, and the words of the error.

    `expected` and `received` are regular expressions. Where they stand, the
    text reads "Expected ... Received: ...".
    """

    name: str
    changes: dict
    expected: str
    received: str

    def check(self, error: BaseException) -> None:
        ours = f"Expected.*{self.expected}.*Received: .*{self.received}"
        assert re.search(ours, words(error), re.DOTALL), words(error)


def build(function: Callable, specs: tuple, options: tuple) -> tuple:
    """Builds a call in a graph, from (name, type, shape) of each operand."""
    with tf.Graph().as_default() as graph:
        tensors = {
            name: dtype and tf.compat.v1.placeholder(dtype, shape)
            for name, dtype, shape in specs
        }
        result = function(**tensors, **dict(options))
    return tf.compat.v1.Session(graph=graph), tensors, result


def in_graph(
    function: Callable,
    operands: dict,
    options: dict,
    known: bool,
    build: Callable = build,
) -> Any:
    """Runs `function` in a graph that knows all shapes of operands, or none."""
    specs = tuple(
        (name, None, None)
        if x is None
        else (name, x.dtype, tuple(x.shape) if known else None)
        for name, x in operands.items()
    )
    session, tensors, result = build(function, specs, tuple(options.items()))
    feeds = {
        tensors[name]: np.asarray(x)
        for name, x in operands.items()
        if x is not None
    }
    return session.run(result, feeds)


# A graph that knows no shapes serves many calls.
in_graph_once = functools.partial(
    in_graph, known=False, build=functools.cache(build)
)


def zeros(*shape: int, dtype: str = "float32") -> tf.Tensor:
    if dtype == "string":
        return tf.fill(shape, "0")
    return tf.zeros(shape, dtype)


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
    op.function: {k: x.shape for k, x in op.draw()[0].items()} | op.options
    for op in OPS
} | {deformable_conv2d: CONV2D}


def _shapes(*rows: tuple) -> list[BadCall]:
    """Makes bad calls of (operand, words of the error, wrong shapes)."""
    return [
        BadCall(
            f"{name} {shape}",
            {name: zeros(*shape)},
            right if "`" in right else f"`{name}`.*{right}",
            # The whole shape, unless it is written in several ways.
            re.escape(f"{name}.shape={shape if len(shape) > 1 else ''}"),
        )
        for name, right, *shapes in rows
        for shape in shapes
    ]


def _types(*rows: tuple[str, str, str]) -> list[BadCall]:
    """Makes bad calls of (operands, words of the error, wrong types)."""
    return [
        BadCall(
            f"{names} of {dtype}",
            {name: dtype for name in names.split()},
            f"`{names.split()[0]}`.*{right}",
            dtype,
        )
        for names, right, dtypes in rows
        for dtype in dtypes.split()
    ]


def _changes(*rows: tuple[dict, str, str]) -> list[BadCall]:
    return [BadCall(str(changes), changes, *texts) for changes, *texts in rows]


# Refused by the shape: the graph builder raises ValueError as soon as shapes
# are known, the kernel raises InvalidArgumentError when it runs.
_RANK = "(rank 4|4 dimensions)"
_OF_BOTH = [
    ("inputs", "4", (8, 9, 36), (1, 2, 8, 9, 36), ()),
    ("rois", "2", (5,), (1, 7, 5), ()),
    ("rois", "5", (7, 4), (7, 6), (7, 0)),
]
BAD_SHAPES = {
    deformable_conv2d: [
        *_shapes(
            ("inputs", _RANK, (9, 10, 12), (1, 2, 9, 10, 12), ()),
            ("kernel", _RANK, (3, 2, 12), (1, 3, 2, 12, 8)),
            ("offset", _RANK, (2, 7, 9, 2, 12), (7, 9, 24), ()),
            ("mask", _RANK, (7, 9, 12), (2, 7, 9, 2, 6), ()),
            ("offset", "24", (2, 7, 9, 12), (2, 7, 9, 25), (2, 7, 9, 0)),
            ("offset", "2", (3, 7, 9, 24), (1, 7, 9, 24), (0, 7, 9, 24)),
            ("offset", "7", (2, 8, 9, 24), (2, 9, 7, 24)),
            ("offset", "9", (2, 7, 8, 24)),
            ("mask", "12", (2, 7, 9, 24), (2, 7, 9, 1)),
            ("mask", "2", (1, 7, 9, 12)),
            ("mask", "7", (2, 1, 9, 12)),
            ("mask", "9", (2, 7, 1, 12)),
            ("kernel", "channels.*`kernel`", (3, 2, 5, 8), (3, 2, 24, 8)),
            ("kernel", "(filters|`kernel`).*3", (3, 2, 4, 8)),
            ("kernel", "", (3, 2, 0, 8), (0, 2, 12, 8), (3, 0, 12, 8)),
        ),
        *_changes(
            ({"inputs": (2, 2, 10, 12)}, "height.*3", "height.*2"),
            ({"inputs": (2, 9, 1, 12)}, "width.*2", "width.*1"),
            ({"dilation_rate": (5, 1)}, "height.*11", "height.*9"),
            ({"dilation_rate": 2**62}, "`dilation_rate`", r"\d{10}"),
            ({"dilation_rate": (1, 2**63 - 1)}, "`dilation_rate`", r"\d{10}"),
            ({"padding": 2**62}, "`padding`", r"\d{10}"),
            ({"padding": ((0, 2**63 - 1), (0, 0))}, "`padding`", r"\d{10}"),
            *(
                (
                    {"modulation": modulation},
                    "no `mask` where `offset`",
                    r"mask\.shape=(None|\(2, 7, 9, 12\))",
                )
                for modulation in ("none", "sigmoid", "2sigmoid")
            ),
            *(
                (
                    {"modulation": modulation, "mask": None, "offset": shape},
                    f"`offset`.*{right}",
                    re.escape(f"offset.shape={shape}"),
                )
                for modulation, shape, right in (
                    ("none", (2, 7, 9, 36), r"24 channels \(2 \* "),
                    ("sigmoid", (2, 7, 9, 24), r"36 channels \(3 \* "),
                    ("2sigmoid", (2, 7, 9, 37), r"36 channels \(3 \* "),
                    ("2sigmoid", (2, 8, 9, 36), "7"),
                    ("sigmoid", (7, 9, 36), f"{_RANK}.*kernel_w \\* 3"),
                )
            ),
            *(
                (
                    {
                        "offset_groups": groups,  # no divisor, and larger
                        "offset": (2, 7, 9, 12 * groups),
                        "mask": (2, 7, 9, 6 * groups),
                    },
                    "`?offset_groups`?",
                    rf"(offset_groups={groups}|inputs\.shape=\(2, 9, 10, 12\))",
                )
                for groups in (5, 24)
            ),
        ),
    ],
    deformable_psroi_pool: [
        *_shapes(
            *_OF_BOTH,
            ("inputs", "36", *((2, 8, 9, n) for n in (35, 37, 6, 0))),
            ("trans", "4", (7, 5, 12), (7, 5, 2, 3, 2), ()),
            ("trans", "7", (6, 5, 2, 6), (1, 5, 2, 6), (0, 5, 2, 6)),
            ("trans", "5", (7, 3, 2, 6), (7, 2, 5, 6)),
            ("trans", "2", (7, 5, 4, 6)),
            ("trans", "", (7, 5, 2, 5), (7, 5, 2, 0)),
            ("trans", "`?output_dim`?", (7, 5, 2, 8), (7, 5, 2, 14)),
        ),
        *_changes(
            ({"rois": (6, 5)}, "`trans`.*6", r"trans\.shape=\(7, 5, 2, 6\)"),
            *(
                (changes, f"`inputs`.*{channels}", r"inputs.*\(2, 8, 9, 36\)")
                for changes, channels in (
                    ({"output_dim": 9}, 54),
                    ({"group_size": (2, 2)}, 24),
                    ({"group_size": None}, 72),
                )
            ),
            ({"part_size": None}, "`trans`.*3", r"trans.*\(7, 5, 2, 6\)"),
        ),
    ],
    deformable_roi_align: [
        *_shapes(
            *_OF_BOTH,
            ("offset", "4", (7, 3, 8), (7, 3, 4, 1, 2), ()),
            ("offset", "7", (6, 3, 4, 2), (1, 3, 4, 2), (0, 3, 4, 2)),
            ("offset", "3", (7, 1, 4, 2), (7, 4, 3, 2)),
            ("offset", "4", (7, 3, 5, 2)),
            ("offset", "2", (7, 3, 4, 1), (7, 3, 4, 4), (7, 3, 4, 0)),
            ("inputs", "", (2, 8, 9, 0)),
        ),
        *_changes(
            ({"rois": (8, 5)}, "`offset`.*8", r"offset.*\(7, 3, 4, 2\)"),
            ({"pooled_size": 3}, "`offset`.*3", r"offset.*\(7, 3, 4, 2\)"),
        ),
    ],
}


# Refused by the type of an operand.
_NUMBERS = "bool string complex64"
BAD_TYPES = {
    op.function: [
        *_types(
            ("inputs", "float32", f"int32 uint8 {_NUMBERS}"),
            *(
                (name, "", _NUMBERS)
                if name == "rois"
                else (name, "float", f"int32 int64 {_NUMBERS}")
                for name in op.draw()[0]
                if name not in ("inputs", "kernel")
            ),
        ),
        *(
            BadCall(f"{name} is None", {name: None}, f"`{name}`", "None")
            for name in ("inputs", "kernel", "rois")
            if name in GOOD[op.function]
        ),
    ]
    for op in OPS
}
BAD_TYPES[deformable_conv2d] += [
    BadCall("offset is None", {"offset": None}, "`offset`", "None"),
    *_types(("inputs kernel", "float32", "int32 complex64")),
    *(
        BadCall(
            f"inputs of {inputs}, kernel of {kernel}",
            {"inputs": inputs, "kernel": kernel},
            f"`kernel`.*{inputs}",
            kernel,
        )
        for inputs, kernel in [
            ("float32", "float64"),
            ("float16", "float32"),
            ("bfloat16", "float16"),
            ("float32", "int32"),
        ]
    ),
]


def _bad_index(row: int, index: float, corner: float = 1.0) -> BadCall:
    rois = np.zeros((7, 5), np.float32)
    rois[row, 0], rois[row, 3] = index, corner
    return BadCall(
        f"batch index {index}, corner {corner}",
        {"rois": tf.constant(rois)},
        "the batch indices in `rois`.* below 2",
        rf"rois\[{row}, 0\]=-?{re.escape(f'{abs(index):g}')}$",
    )


# Refused by the values of `rois`, which no graph knows before it runs.
_INDICES = [2, 3, 100, 2.5, 0.5, -0.5, 1e30, np.inf, np.nan, 2.0**31, 2.0**64]
BAD_DATA = [
    *(_bad_index(row % 7, index) for row, index in enumerate(_INDICES)),
    _bad_index(0, 2, np.nan),
    _bad_index(5, -7.25, np.inf),
    _bad_index(5, np.nan, np.nan),
    BadCall(
        "batch index of an integer ROI",
        {"rois": tf.constant([[0, 0, 0, 1, 1]] * 6 + [[2, 0, 0, 1, 1]])},
        "the batch indices in `rois`.* below 2",
        r"rois\[6, 0\]=2$",
    ),
]


def arguments_of(op: Callable, changes: dict) -> tuple[dict, dict]:
    """Returns the operands and the options of a call.

    A change of an operand is a value, a shape, or the name of a type.
    """
    operands, options = {}, {}
    for name, value in {**GOOD[op], **changes}.items():
        if name not in OPERANDS:
            options[name] = value
        elif isinstance(value, str):
            operands[name] = zeros(*GOOD[op][name], dtype=value)
        else:
            is_shape = isinstance(value, tuple)
            operands[name] = zeros(*value) if is_shape else value
    return operands, options


def rows_of(*tables: dict) -> dict:
    """Returns the op and the bad call, for `pytest.mark.parametrize`."""
    rows = [
        (op, bad)
        for table in tables
        for op, calls in table.items()
        for bad in calls
    ]
    return {
        "argnames": ("op", "bad_call"),
        "argvalues": rows,
        "ids": [f"{op.__name__}-{bad.name}" for op, bad in rows],
    }
