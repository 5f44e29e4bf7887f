# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of ROI pooling: each gets an error that a person can use.

The error is a `ValueError`, a `TypeError` or an `InvalidArgumentError`, and
its text says what was expected and what was received.
"""

import re

import numpy as np
import pytest
import tensorflow as tf
from bad_calls_test import ERRORS, BadCall, shape, zeros

from tf_deform.ops import deformable_psroi_pool, deformable_roi_align

# Good calls. Every bad call differs from one of them in what its `changes`
# name, and in nothing else. A tuple under the name of an operand is a shape.
OPERANDS = ["inputs", "rois", "trans", "offset"]
GOOD = {
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
    """From (operand, what is wrong, what the text must say, shape)."""
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
    """From (argument, value, what the text must say was received)."""
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

# Refused by the shape: the graph builder says it with ValueError as soon as
# shapes are known, the kernel with InvalidArgumentError when it runs.
BAD_SHAPES = {
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

# Refused by the value or the type of an argument.
BAD_VALUES = {
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
        *_wrong_types("inputs", (2, 8, 9, 36), "int32 uint8", "float32"),
        *_wrong_types("inputs", (2, 8, 9, 36), "bool string", "float32"),
        *_wrong_types("inputs", (2, 8, 9, 36), "complex64", "float32"),
        *_wrong_types("rois", (7, 5), "bool string complex64", ""),
        *_wrong_types("trans", (7, 5, 2, 6), "int32 bool", "float"),
        *_wrong_types("trans", (7, 5, 2, 6), "string complex64", "float"),
        BadCall("inputs=None", {"inputs": None}, "`inputs`", "None"),
        BadCall("rois=None", {"rois": None}, "`rois`", "None"),
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
        *_wrong_types("inputs", (2, 8, 9, 6), "int32 uint8", "float32"),
        *_wrong_types("inputs", (2, 8, 9, 6), "bool string", "float32"),
        *_wrong_types("inputs", (2, 8, 9, 6), "complex64", "float32"),
        *_wrong_types("rois", (7, 5), "bool string complex64", ""),
        *_wrong_types("offset", (7, 3, 4, 2), "int32 bool", "float"),
        *_wrong_types("offset", (7, 3, 4, 2), "string complex64", "float"),
        BadCall("inputs=None", {"inputs": None}, "`inputs`", "None"),
        BadCall("rois=None", {"rois": None}, "`rois`", "None"),
    ],
}


def _rois_with(index: float, row: int = 5, corner: float = 1.0) -> tf.Tensor:
    rois = np.zeros((7, 5), np.float32)
    rois[row, 0], rois[row, 3] = index, corner
    return tf.constant(rois)


# Refused by what `rois` hold: no graph can know before it runs.
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


def _pairs(bad_calls: dict | list) -> dict:
    """The op and the bad call, for `parametrize`."""
    if isinstance(bad_calls, list):
        bad_calls = {op: bad_calls for op in GOOD}
    rows = [(op, bad) for op, calls in bad_calls.items() for bad in calls]
    return {
        "argnames": ("op", "bad_call"),
        "argvalues": rows,
        "ids": [f"{op.__name__}-{bad.name}" for op, bad in rows],
    }


BAD_BEFORE_RUNNING = {op: BAD_SHAPES[op] + BAD_VALUES[op] for op in GOOD}


def _arguments(op, changes: dict) -> tuple[dict, dict]:
    """Returns the operands and the options of a call."""
    arguments = {**GOOD[op], **changes}
    operands = {
        name: zeros(*value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
        if name in OPERANDS
    }
    options = {k: v for k, v in arguments.items() if k not in OPERANDS}
    return operands, options


def _graph(op, operands: dict, options: dict, known: bool):
    """The op in a `tf.function`, with every shape known, or none."""
    present = {name: x for name, x in operands.items() if x is not None}
    absent = {name: x for name, x in operands.items() if x is None}

    @tf.function(
        input_signature=[
            tf.TensorSpec(x.shape if known else None, x.dtype)
            for x in present.values()
        ]
    )
    def graph(*tensors):
        return op(
            **dict(zip(present, tensors, strict=True)), **absent, **options
        )

    return graph, list(present.values())


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_are_good(op):
    operands, options = _arguments(op, {})
    expected = op(**operands, **options)
    assert expected.shape == (7, 3, 4, 6)
    for known in (True, False):
        graph, tensors = _graph(op, operands, options, known)
        np.testing.assert_array_equal(graph(*tensors), expected)


def test_there_are_enough_of_them():
    for op in GOOD:
        assert len(BAD_SHAPES[op] + BAD_VALUES[op] + BAD_DATA) >= 60


@pytest.mark.parametrize(**_pairs(BAD_BEFORE_RUNNING))
def test_eager(op, bad_call):
    operands, options = _arguments(op, bad_call.changes)
    with pytest.raises(ERRORS) as info:
        op(**operands, **options)
    bad_call.check(info.value)


@pytest.mark.parametrize(**_pairs(BAD_BEFORE_RUNNING))
def test_graph_with_known_shapes(op, bad_call):
    """Refused while the graph is built, before anything runs."""
    operands, options = _arguments(op, bad_call.changes)
    graph, _ = _graph(op, operands, options, known=True)
    with pytest.raises((ValueError, TypeError)) as info:
        graph.get_concrete_function()
    bad_call.check(info.value)


@pytest.mark.parametrize(**_pairs(BAD_BEFORE_RUNNING))
def test_graph_with_unknown_shapes(op, bad_call):
    """What the graph cannot know the kernel refuses."""
    operands, options = _arguments(op, bad_call.changes)
    graph, tensors = _graph(op, operands, options, known=False)
    with pytest.raises(ERRORS) as info:
        graph(*tensors)
    bad_call.check(info.value)


@pytest.mark.parametrize(**_pairs(BAD_SHAPES))
def test_bad_shape_under_a_tape(op, bad_call):
    """The gradient does not get in the way of the error."""
    operands, options = _arguments(op, bad_call.changes)
    with tf.GradientTape() as tape, pytest.raises(ERRORS) as info:
        tape.watch(list(operands.values()))
        op(**operands, **options)
    bad_call.check(info.value)


@pytest.mark.parametrize("mode", ["eager", "known", "unknown"])
@pytest.mark.parametrize(**_pairs(BAD_DATA))
def test_batch_indices(op, bad_call, mode):
    operands, options = _arguments(op, bad_call.changes)
    graph, tensors = _graph(op, operands, options, known=mode == "known")
    with pytest.raises(tf.errors.InvalidArgumentError) as info:
        op(**operands, **options) if mode == "eager" else graph(*tensors)
    bad_call.check(info.value)


@pytest.mark.parametrize("op", GOOD)
def test_batch_indices_of_float64_inputs(op):
    """What float32 would round to an integer is none."""
    rois = np.zeros((7, 5))
    rois[3, 0] = 1 + 1e-12
    operands, options = _arguments(op, {})
    operands["inputs"] = tf.cast(operands["inputs"], tf.float64)
    op(**operands, **options)
    operands["rois"] = rois
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"rois\[3, 0\]"):
        op(**operands, **options)


@pytest.mark.parametrize("op", GOOD)
def test_no_image_has_no_batch_index(op):
    operands, options = _arguments(op, {})
    operands["inputs"] = operands["inputs"][:0]
    with pytest.raises(tf.errors.InvalidArgumentError, match="below 0"):
        op(**operands, **options)
    operands["rois"] = operands["rois"] - 1
    assert not op(**operands, **options).numpy().any()


@pytest.mark.parametrize("op", GOOD)
def test_options_are_keywords(op):
    operands, options = _arguments(op, {})
    with pytest.raises(TypeError):
        op(*operands.values(), *options.values())
    for name in options:
        if name not in ("group_size", "part_size"):
            some = {k: v for k, v in options.items() if k != name}
            with pytest.raises(TypeError, match=name):
                op(**operands, **some)
    with pytest.raises(TypeError, match="data_format"):
        op(**operands, **options, data_format="NCHW")


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("value", [tf.ragged.constant([[1.0], []]), object()])
def test_what_is_no_dense_tensor_is_named(op, name, value):
    operands, options = _arguments(op, {})
    if name in operands:
        operands[name] = value
        with pytest.raises(
            TypeError, match=f"Expected `{name}` .* Received: .*"
        ):
            op(**operands, **options)


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-38, 3e38, 1e300])
def test_extreme_scales_give_an_answer(op, scale):
    """Finite and positive: an output of zeros and edges, or an error."""
    operands, options = _arguments(op, {"spatial_scale": scale})
    operands["inputs"] = tf.ones_like(operands["inputs"])
    for dtype in (tf.float32, tf.float64):
        operands["inputs"] = tf.cast(operands["inputs"], dtype)
        try:
            output = op(**operands, **options).numpy()
        except ERRORS as error:
            assert re.search("Expected.*`spatial_scale`.*Received", str(error))
        else:
            assert set(output.ravel()) <= {0.0, 1.0}
