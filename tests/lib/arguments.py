# SPDX-License-Identifier: Apache-2.0
"""Lists every argument of every function and layer, and its wrong values.

A new argument of a function or layer is entered in KIND_OF.
"""

import decimal
import fractions
import inspect
import re

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from bad_calls import OPERANDS

from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)
from tf_deform.ops import (
    deformable_conv2d,
    deformable_psroi_pool,
    deformable_roi_align,
)


class Strange:
    """Belongs to no type that a library knows; has a long `repr`."""

    def __repr__(self) -> str:
        return "strange " * 1000


def symbolic_tensor() -> tf.Tensor:
    """Returns a tensor of another graph than the graph in which it is used."""
    with tf.Graph().as_default():
        return tf.compat.v1.placeholder(tf.int32, ())


# Values that are no number, list of numbers, option or tensor of numbers.
NONSENSE = [
    *("two", "2", b"2", bytearray(b"2"), np.array("2"), tf.constant("2")),
    *(1j, np.complex64(2), np.array(2 + 0j)),
    *(np.array([2, None], dtype=object), np.array(2, dtype=object), Strange()),
    *({"height": 2, "width": 2}, {2, 3}, lambda: 2, int, ..., slice(2, 3)),
    *(np.timedelta64(2), np.datetime64("2020-01-01"), ValueError("2")),
    *(tf.sparse.from_dense([[2.0, 0.0]]), tf.ragged.constant([[2.0], []])),
    *([[2], [2, 3]], [2, "two"], [2, None]),  # ragged or mixed
    *(tf.float32, tf.data.Dataset.range(2)),
]
KERAS_TENSORS = [keras.KerasTensor((2,)), keras.KerasTensor((), "int32")]
SYMBOLS = [*KERAS_TENSORS, symbolic_tensor(), tf.TensorSpec((2,))]
NOT_FINITE = [float("nan"), np.float32("nan"), float("inf"), -np.inf]
BOOLEANS = [True, False, np.True_, np.array(True), tf.constant(True)]
FRACTIONS = [
    *(2.0, 2.5, np.float32(2), np.array(2.0), tf.constant(2.0)),
    *(ml_dtypes.bfloat16(2), decimal.Decimal(2), fractions.Fraction(2)),
]
HUGE = [2**31, 2**40, 2**62, 2**64, 2**70, -(2**64), 10**400]
ARRAYS = [np.array([2]), np.array([2, 2, 2])]
LISTS = [(), (2,), [2], (2, 2, 2), ([2], [2])]
PAIRS = [(2, 2), np.array([2, 2])]
PARTS = [(2, 2.0), (True, 2), (2, "2"), (2, float("nan"))]

ANYTHING = [*NONSENSE, *SYMBOLS, *NOT_FINITE]
INTEGER = [*ANYTHING, *BOOLEANS, *FRACTIONS, *HUGE, *LISTS, *ARRAYS]
PAIR = [*INTEGER, *PARTS, np.array([2.0, 2.0]), 0, -1, (1, 0), (2, -1)]
NUMBER = [*ANYTHING, *BOOLEANS, *LISTS, *ARRAYS, *PAIRS, None]
NUMBER += ["0.25", -0.5, 10**400]
OPTION = [*INTEGER, 0, "", "ZEROS", "reflect"]
KINDS = {
    "integer": [*INTEGER, *PAIRS, None],
    "count": [*INTEGER, *PAIRS, None, 0, -1],
    "pair": [*PAIR, None],
    "pair or None": PAIR,
    "padding": [
        *(*INTEGER, *PARTS, np.array([2.0, 2.0]), None, -1, "full", ""),
        *((1, -1), ((0, -1), (0, 0)), ((1, True), (1, 1)), (1, "same")),
        *((1, (1, 1)), ((1, 2), 3), ((1, 2, 3), (1, 2))),
        *(((1, 1), (1, 1), (1, 1)), ((0, 0),) * 4),
    ],
    "number": NUMBER,
    "positive number": [*NUMBER, 0, 0.0, -0.0],
    "option": [*OPTION, None],
    "option or None": OPTION,
    "boolean": [
        *(*ANYTHING, *FRACTIONS, *HUGE, *LISTS, *ARRAYS, *PAIRS, None, 2, -1),
    ],
    "units": [
        *(*ANYTHING, *BOOLEANS, *FRACTIONS, *HUGE, *PARTS, None),
        *(8, (8, 0), [8, -1], np.array([8, 4])),
    ],
}
# The kind of each argument of functions and layers; of one alone, by its name.
KIND_OF = {
    "boundary": "option",
    "data_format": "option or None",
    "dilation_rate": "pair",
    "filters": "count",
    "gamma": "number",
    "group_size": "pair or None",
    "groups": "count",
    "implementation": "option",
    "kernel_size": "pair",
    "modulation": "option",
    "DeformableConv2D.modulation": "option or None",
    "DeformableROIAlign.modulation": "option or None",
    "num_classes": "count",
    "offset_dilation_rate": "pair or None",
    "offset_groups": "count",
    "output_dim": "count",
    "padding": "padding",
    "part_size": "pair or None",
    "pooled_size": "pair",
    "return_count": "boolean",
    "sample_per_part": "count",
    "sampling_ratio": "integer",
    "spatial_scale": "positive number",
    "strides": "pair",
    "trans_std": "number",
    "units": "units",
    "freeze_kernel": "boolean",
    "use_bias": "boolean",
}

# A good call of each function, with all operands, the optional one last.
INPUTS = tf.ones((1, 5, 6, 4))
ROIS = tf.constant([[0, 1.0, 1, 3, 4]])
FUNCTIONS = {
    deformable_conv2d: {
        "inputs": INPUTS,
        "kernel": tf.ones((2, 2, 4, 4)),
        "offset": tf.zeros((1, 4, 5, 8)),
        "mask": tf.ones((1, 4, 5, 4)),
    },
    deformable_psroi_pool: {
        "inputs": INPUTS,
        "rois": ROIS,
        "trans": tf.zeros((1, 2, 2, 2)),
        "output_dim": 1,
        "spatial_scale": 0.5,
        "pooled_size": 2,
    },
    deformable_roi_align: {
        "inputs": INPUTS,
        "rois": ROIS,
        "offset": tf.zeros((1, 2, 2, 2)),
        "spatial_scale": 0.5,
        "pooled_size": 2,
    },
}
# Good arguments of each layer, and a call with displacements.
_ROI = {"pooled_size": 2, "spatial_scale": 0.5}
_POOLED = {
    "inputs": np.ones((1, 5, 6, 4), np.float32),
    "rois": np.float32([[0, 1, 1, 3, 4]]),
    "offset": np.zeros((1, 2, 2, 2), np.float32),
}
LAYERS = {
    DeformableConv2D: {"filters": 4, "kernel_size": 2},
    DeformablePSROIPooling: {"output_dim": 4, **_ROI},
    DeformableROIPooling: _ROI,
    DeformableROIAlign: _ROI,
}
LAYER_CALLS = {
    DeformableConv2D: {
        "inputs": _POOLED["inputs"],
        "offset": np.zeros((1, 4, 5, 8), np.float32),
        "modulator": np.ones((1, 4, 5, 4), np.float32),
    },
    DeformablePSROIPooling: {
        "inputs": np.ones((1, 5, 6, 16), np.float32),
        "rois": _POOLED["rois"],
        "trans": _POOLED["offset"],
    },
    DeformableROIPooling: _POOLED,
    DeformableROIAlign: _POOLED,
}
CALLABLES = FUNCTIONS | LAYERS
# Keras' own arguments, which a layer hands on unchanged.
_OF_KERAS = re.compile(
    "activation|.*_(initializer|regularizer|constraint)|kwargs"
)
# The function, the name of an argument that is no operand, and its kind.
EVERY_ARGUMENT = [
    (function, name, KIND_OF.get(f"{function.__name__}.{name}", KIND_OF[name]))
    for function in CALLABLES
    for name in inspect.signature(function).parameters
    if name not in OPERANDS and not _OF_KERAS.fullmatch(name)
]


# Tensors.

# Maps may be images of integers, or masks.
BAD_MAPS = [
    *(*NONSENSE, np.zeros((0, 2), "U1"), ["a", "b"], 2**70),
    *([[[1.0]], [[1.0], [2.0]]], [tf.ones((2, 2)), tf.ones((2, 3))]),
    *(np.zeros((2, 2), "datetime64[s]"), (tf.ones(2), tf.ones(3))),
    np.zeros(2, [("y", "f4"), ("x", "f4")]),
    tf.quantization.quantize([1.0, 2.0], 0.0, 2.0, tf.quint8).output,
]
BAD_TENSORS = [*BAD_MAPS, True, np.ones((2, 2), bool)]
