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
NONSENSE = {
    "text": "two",
    "a digit": "2",
    "bytes": b"2",
    "bytearray": bytearray(b"2"),
    "NumPy's text": np.array("2"),
    "a tensor of text": tf.constant("2"),
    "a complex number": 1j,
    "NumPy's complex number": np.complex64(2),
    "an array of complex numbers": np.array(2 + 0j),
    "an array of objects": np.array([2, None], dtype=object),
    "one object": np.array(2, dtype=object),
    "a dictionary": {"height": 2, "width": 2},
    "a set": {2, 3},
    "a function": lambda: 2,
    "a class": int,
    "a strange object": Strange(),
    "an ellipsis": ...,
    "a slice": slice(2, 3),
    "a duration": np.timedelta64(2),
    "a date": np.datetime64("2020-01-01"),
    "a sparse tensor": tf.sparse.from_dense([[2.0, 0.0]]),
    "a ragged tensor": tf.ragged.constant([[2.0], []]),
    "a ragged list": [[2], [2, 3]],
    "a mixed list": [2, "two"],
    "a list with None": [2, None],
    "a Keras tensor": keras.KerasTensor((2,)),
    "a Keras scalar": keras.KerasTensor((), "int32"),
    "a tensor of another graph": symbolic_tensor(),
    "a type": tf.float32,
    "a specification": tf.TensorSpec((2,)),
    "a data set": tf.data.Dataset.range(2),
    "an exception": ValueError("2"),
}
NOT_FINITE = {
    "NaN": float("nan"),
    "NumPy's NaN": np.float32("nan"),
    "infinity": float("inf"),
    "minus infinity": -np.inf,
}
BOOLEANS = {
    "True": True,
    "False": False,
    "NumPy's True": np.True_,
    "an array of True": np.array(True),
    "a tensor of True": tf.constant(True),
}
FRACTIONS = {
    "2.0": 2.0,
    "2.5": 2.5,
    "NumPy's 2.0": np.float32(2),
    "an array of 2.0": np.array(2.0),
    "a tensor of 2.0": tf.constant(2.0),
    "bfloat16": ml_dtypes.bfloat16(2),
    "a decimal": decimal.Decimal(2),
    "a fraction": fractions.Fraction(2),
}
NONE = {"None": None}
HUGE = {
    "2**31": 2**31,
    "2**62": 2**62,
    "2**64": 2**64,
    "-2**64": -(2**64),
    "10**400": 10**400,
}
LISTS = {
    "no numbers": (),
    "one number": (2,),
    "a list of one": [2],
    "an array of one": np.array([2]),
    "three numbers": (2, 2, 2),
    "an array of three": np.array([2, 2, 2]),
    "lists of one": ([2], [2]),
}
PAIRS = {"a pair": (2, 2), "an array of two": np.array([2, 2])}
PARTS = {
    "2.0 of two": (2, 2.0),
    "True of two": (True, 2),
    "text of two": (2, "2"),
    "an array of two 2.0": np.array([2.0, 2.0]),
    "NaN of two": (2, float("nan")),
}

INTEGER = NONSENSE | NOT_FINITE | BOOLEANS | FRACTIONS | HUGE | LISTS
NUMBER = {
    **NONSENSE,
    **NOT_FINITE,
    **BOOLEANS,
    **LISTS,
    **PAIRS,
    **NONE,
    "a digit and a point": "0.25",
    "-0.5": -0.5,
    "10**400": 10**400,
}
OPTION = (
    NONSENSE
    | NOT_FINITE
    | BOOLEANS
    | FRACTIONS
    | HUGE
    | LISTS
    | {
        "0": 0,
        "empty": "",
        "capital letters": "ZEROS",
        "of another library": "reflect",
    }
)
PAIR = (
    INTEGER
    | PARTS
    | {
        "0": 0,
        "-1": -1,
        "2**70": 2**70,
        "0 of two": (1, 0),
        "-1 of two": (2, -1),
    }
)
KINDS = {
    "integer": INTEGER | PAIRS | NONE,
    "count": INTEGER | PAIRS | NONE | {"0": 0, "-1": -1, "2**40": 2**40},
    "pair": PAIR | NONE,
    "pair or None": PAIR,
    "padding": {
        **INTEGER,
        **PARTS,
        **NONE,
        "-1": -1,
        "-1 of two": (1, -1),
        "-1 of four": ((0, -1), (0, 0)),
        "three sides": ((1, 1), (1, 1), (1, 1)),
        "four sides": ((0, 0),) * 4,
        "a number and a pair": (1, (1, 1)),
        "a pair and a number": ((1, 2), 3),
        "three numbers and a pair": ((1, 2, 3), (1, 2)),
        "a pair of True": ((1, True), (1, 1)),
        "a number and text": (1, "same"),
        "full": "full",
        "empty": "",
    },
    "number": NUMBER,
    "positive number": NUMBER | {"0": 0, "0.0": 0.0, "-0.0": -0.0},
    "option": OPTION | NONE,
    "option or None": OPTION,
    "boolean": {
        **NONSENSE,
        **NOT_FINITE,
        **FRACTIONS,
        **HUGE,
        **LISTS,
        **PAIRS,
        **NONE,
        "2": 2,
        "-1": -1,
    },
    "units": {
        **NONSENSE,
        **NOT_FINITE,
        **BOOLEANS,
        **FRACTIONS,
        **HUGE,
        **NONE,
        **{name: v for name, v in PARTS.items() if "array" not in name},
        "a number": 8,
        "0 among them": (8, 0),
        "-1 among them": [8, -1],
        "an array": np.array([8, 4]),
    },
}
# The kind of each argument of functions and layers.
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
    "modulation": "option or None",
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
    "use_bias": "boolean",
}

# A good call of each function, with all operands.
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
OPTIONAL = {
    deformable_conv2d: "mask",
    deformable_psroi_pool: "trans",
    deformable_roi_align: "offset",
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
OPERANDS = ("inputs", "kernel", "offset", "mask", "rois", "trans")
# Keras' own arguments, which a layer hands on unchanged.
_OF_KERAS = re.compile(
    "activation|.*_(initializer|regularizer|constraint)|kwargs"
)
# The function, the name of an argument that is no operand, and its kind.
EVERY_ARGUMENT = [
    (function, name, KIND_OF[name])
    for function in CALLABLES
    for name in inspect.signature(function).parameters
    if name not in OPERANDS and not _OF_KERAS.fullmatch(name)
]


# Tensors.

BAD_TENSORS = {
    name: NONSENSE[name]
    for name in NONSENSE
    if name not in ("a tensor of another graph", "a specification")
} | {
    "no number": np.zeros((0, 2), "U1"),
    "True": True,
    "a list of text": ["a", "b"],
    "a list of lists of unequal lengths": [[[1.0]], [[1.0], [2.0]]],
    "an array of booleans": np.ones((2, 2), bool),
    "an array of dates": np.zeros((2, 2), "datetime64[s]"),
    "an array of records": np.zeros(2, [("y", "f4"), ("x", "f4")]),
    "a quantized tensor": tf.quantization.quantize(
        [1.0, 2.0], 0.0, 2.0, tf.quint8
    ).output,
    "tensors in a tuple": (tf.ones(2), tf.ones(3)),
    "tensors in a list": [tf.ones((2, 2)), tf.ones((2, 3))],
    "2**70": 2**70,
}
