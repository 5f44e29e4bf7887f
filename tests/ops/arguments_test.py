# SPDX-License-Identifier: Apache-2.0
"""Every argument of every function and layer, given what it cannot use.

The answer is an error of ours that names the argument, and not one of the
libraries below, which often say what went wrong inside of them. What is good
is taken in every form in which people have it.
"""

import decimal
import fractions
import inspect
import json
import re

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import tf_deform
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

ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)


class Strange:
    """Something that no library knows, with a long name for itself."""

    def __repr__(self) -> str:
        return "strange " * 1000


def symbolic_tensor() -> tf.Tensor:
    """A tensor of a graph that is not the one in which it is used."""
    with tf.Graph().as_default():
        return tf.compat.v1.placeholder(tf.int32, ())


# What is no number, no list of numbers, no option and no tensor of numbers.
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

INTEGER = {**NONSENSE, **NOT_FINITE, **BOOLEANS, **FRACTIONS, **HUGE, **LISTS}
KINDS = {
    "integer": {**INTEGER, **PAIRS, **NONE},
    "count": {**INTEGER, **PAIRS, **NONE, "0": 0, "-1": -1},
    "pair": {**INTEGER, **PARTS, **NONE, "0": 0, "(2, -1)": (2, -1)},
    "pair or None": {**INTEGER, **PARTS, "0": 0, "(2, -1)": (2, -1)},
    "padding": {
        **INTEGER,
        **PARTS,
        **NONE,
        "-1": -1,
        "three sides": ((1, 1), (1, 1), (1, 1)),
        "a number and a pair": (1, (1, 1)),
        "a pair of True": ((1, True), (1, 1)),
        "full": "full",
    },
    "number": {
        **NONSENSE,
        **NOT_FINITE,
        **BOOLEANS,
        **LISTS,
        **PAIRS,
        **NONE,
        "-0.5": -0.5,
        "10**400": 10**400,
    },
    "option": {
        **NONSENSE,
        **NOT_FINITE,
        **BOOLEANS,
        **FRACTIONS,
        **HUGE,
        **LISTS,
        "empty": "",
    },
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
KINDS["option or None"] = KINDS["option"]
KINDS["option"] = {**KINDS["option"], **NONE}

# A good call of each, and the kind of each argument but tensors.
INPUTS = tf.ones((1, 5, 6, 4))
ROIS = tf.constant([[0, 1.0, 1, 3, 4]])
FUNCTIONS = {
    deformable_conv2d: (
        {
            "inputs": INPUTS,
            "kernel": tf.ones((2, 2, 4, 4)),
            "offset": tf.zeros((1, 4, 5, 8)),
            "mask": tf.ones((1, 4, 5, 4)),
        },
        {
            "strides": "pair",
            "padding": "padding",
            "dilation_rate": "pair",
            "offset_groups": "count",
            "boundary": "option",
            "implementation": "option",
        },
    ),
    deformable_psroi_pool: (
        {
            "inputs": INPUTS,
            "rois": ROIS,
            "trans": tf.zeros((1, 2, 2, 2)),
            "output_dim": 1,
            "spatial_scale": 0.5,
            "pooled_size": 2,
        },
        {
            "output_dim": "count",
            "spatial_scale": "number",
            "pooled_size": "pair",
            "group_size": "pair or None",
            "part_size": "pair or None",
            "sample_per_part": "count",
            "trans_std": "number",
            "return_count": "boolean",
            "implementation": "option",
        },
    ),
    deformable_roi_align: (
        {
            "inputs": INPUTS,
            "rois": ROIS,
            "offset": tf.zeros((1, 2, 2, 2)),
            "spatial_scale": 0.5,
            "pooled_size": 2,
        },
        {
            "pooled_size": "pair",
            "spatial_scale": "number",
            "sampling_ratio": "integer",
            "gamma": "number",
            "implementation": "option",
        },
    ),
}
LAYERS = {
    DeformableConv2D: (
        {"filters": 4, "kernel_size": 2},
        {
            "filters": "count",
            "kernel_size": "pair",
            "strides": "pair",
            "padding": "padding",
            "data_format": "option or None",
            "dilation_rate": "pair",
            "groups": "count",
            "use_bias": "boolean",
            "offset_groups": "count",
            "modulation": "option or None",
            "boundary": "option",
            "offset_dilation_rate": "pair or None",
            "implementation": "option",
        },
    ),
    DeformablePSROIPooling: (
        {"output_dim": 4, "pooled_size": 2, "spatial_scale": 0.5},
        {
            "output_dim": "count",
            "pooled_size": "pair",
            "spatial_scale": "number",
            "group_size": "pair or None",
            "part_size": "pair or None",
            "sample_per_part": "count",
            "trans_std": "number",
            "num_classes": "count",
            "data_format": "option or None",
            "implementation": "option",
        },
    ),
    DeformableROIPooling: (
        {"pooled_size": 2, "spatial_scale": 0.5},
        {
            "pooled_size": "pair",
            "spatial_scale": "number",
            "sample_per_part": "count",
            "trans_std": "number",
            "units": "units",
            "data_format": "option or None",
            "implementation": "option",
        },
    ),
    DeformableROIAlign: (
        {"pooled_size": 2, "spatial_scale": 0.5},
        {
            "pooled_size": "pair",
            "spatial_scale": "number",
            "sampling_ratio": "integer",
            "gamma": "number",
            "units": "units",
            "data_format": "option or None",
            "implementation": "option",
        },
    ),
}
# Keras' own, which a layer hands on as they are.
OF_KERAS = re.compile("activation|.*_(initializer|regularizer|constraint)|kw")
OPERANDS = ("inputs", "kernel", "offset", "mask", "rois", "trans")
CALLABLES = {**FUNCTIONS, **LAYERS}
EVERY_ARGUMENT = [
    (function, name)
    for function, (_, kinds) in CALLABLES.items()
    for name in kinds
]


def assert_ours(error: BaseException, *names: str) -> None:
    """It says first what was expected, then what came, of which argument."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = re.sub(r"^\{\{function_node .*?\}\} ", "", text)
    assert text.startswith("Expected "), text
    assert re.search(f"`({'|'.join(names)})`.*Received: ", text, re.DOTALL)
    assert len(text) < 1000, text


def refused(function, names: list[str], **arguments) -> list[str]:
    """What is wrong with the answer, if anything."""
    try:
        result = function(**arguments)
    except ERRORS as error:
        try:
            assert_ours(error, *names)
        except AssertionError as failure:
            return [f"{type(error).__name__}: {str(failure)[:200]}"]
        return []
    except BaseException as error:
        return [f"{type(error).__name__}: {str(error)[:200]}"]
    return [f"was accepted: {result!r:.100}"]


def test_the_good_calls_are_good():
    for function, (call, _) in FUNCTIONS.items():
        function(**call)
    for layer, (arguments, _) in LAYERS.items():
        layer(**arguments)


def test_no_argument_is_missing_here():
    for function, (_, kinds) in CALLABLES.items():
        parameters = [
            name
            for name in inspect.signature(function).parameters
            if not OF_KERAS.fullmatch(name) and name not in OPERANDS
        ]
        assert parameters == [*kinds, *["kwargs"] * (function in LAYERS)]


def test_there_are_enough_kinds():
    assert all(len(values) >= 40 for values in KINDS.values())


@pytest.mark.parametrize(("function", "name"), EVERY_ARGUMENT)
def test_every_argument(function, name):
    call, kinds = CALLABLES[function]
    wrong = {}
    for what, value in KINDS[kinds[name]].items():
        answer = refused(function, [name], **{**call, name: value})
        if answer:
            wrong[what] = answer[0]
    assert not wrong


@pytest.mark.parametrize("mode", ["portable", "graph"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_elsewhere(function, mode):
    """Eager, native ops are not the only place that judges."""
    call, kinds = FUNCTIONS[function]
    wrong = {}
    for name, kind in kinds.items():
        for what, value in KINDS[kind].items():
            arguments = {**call, name: value}
            if mode == "portable":
                if name == "implementation":
                    continue
                run = function
                arguments["implementation"] = "portable"
            else:

                def run(**arguments):
                    with tf.Graph().as_default():
                        return function(
                            **{
                                key: tf.compat.v1.placeholder(
                                    value.dtype, value.shape
                                )
                                if key in call and key in OPERANDS
                                else value
                                for key, value in arguments.items()
                            }
                        )

            answer = refused(run, [name], **arguments)
            if answer:
                wrong[name, what] = answer[0]
    assert not wrong


@pytest.mark.parametrize("what", KINDS["option"])
def test_implementation(what):
    def run():
        with tf_deform.implementation(KINDS["option"][what]):
            pass

    assert not refused(run, ["implementation"])


# What is good is good in every form.


@pytest.mark.parametrize(
    "two",
    [2, np.int8(2), np.uint64(2), np.array(2), tf.constant(2), tf.Variable(2)],
    ids=repr,
)
@pytest.mark.parametrize(("function", "name"), EVERY_ARGUMENT)
def test_integers_of_every_kind(function, name, two):
    call, kinds = CALLABLES[function]
    kind = kinds[name]
    if kind.startswith("option") or kind == "boolean":
        return
    if function in LAYERS:
        if kind == "units":
            layer = function(**call, units=[two, two])
            assert layer.units == (2, 2)
        else:
            layer = function(**{**call, name: two})
            expected = {"padding": ((2, 2), (2, 2))}.get(name, (2, 2))
            if kind in ("count", "integer", "number"):
                expected = 2
            assert getattr(layer, name) == expected
        json.dumps(layer.get_config())
    elif name in ("output_dim", "offset_groups"):
        with pytest.raises(ERRORS, match="channels"):  # Of other operands.
            function(**{**call, name: two})
    elif name == "padding":
        with pytest.raises(ERRORS, match="to have height"):
            function(**{**call, name: two})
    elif name in ("strides", "dilation_rate"):
        with pytest.raises(ERRORS, match="to have (height|width)"):
            function(**{**call, name: two})
    else:
        expected = function(**{**call, name: 2})
        np.testing.assert_array_equal(function(**{**call, name: two}), expected)


@pytest.mark.parametrize(
    "pair",
    [(3, 2), [3, 2], np.array([3, 2]), (np.int64(3), np.array(2))]
    + [tf.constant([3, 2]), [tf.constant(3), 2]],
    ids=str,
)
@pytest.mark.parametrize(("function", "name"), EVERY_ARGUMENT)
def test_pairs_of_every_kind(function, name, pair):
    call, kinds = CALLABLES[function]
    if function not in LAYERS or not kinds[name].startswith("pad"):
        if function not in LAYERS or not kinds[name].startswith("pair"):
            return
    layer = function(**{**call, name: pair})
    expected = ((3, 3), (2, 2)) if name == "padding" else (3, 2)
    assert getattr(layer, name) == expected
    json.dumps(layer.get_config())


@pytest.mark.parametrize(
    "half",
    [0.5, np.float16(0.5), np.float64(0.5), np.array(0.5), tf.constant(0.5)]
    + [ml_dtypes.bfloat16(0.5), decimal.Decimal("0.5")]
    + [fractions.Fraction(1, 2), np.longdouble(0.5), tf.Variable(0.5)],
    ids=repr,
)
@pytest.mark.parametrize(("function", "name"), EVERY_ARGUMENT)
def test_numbers_of_every_kind(function, name, half):
    call, kinds = CALLABLES[function]
    if kinds[name] != "number":
        return
    result = function(**{**call, name: half})
    if function in LAYERS:
        assert getattr(result, name) == 0.5
        json.dumps(result.get_config())
    else:
        expected = function(**{**call, name: 0.5})
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("false", [False, 0, np.False_, np.array(False)])
def test_booleans_of_every_kind(false):
    layer = DeformableConv2D(4, 2, use_bias=false)
    assert layer.use_bias is False
    json.dumps(layer.get_config())
    call, _ = FUNCTIONS[deformable_psroi_pool]
    assert deformable_psroi_pool(**call, return_count=false).shape.rank == 4
    assert len(deformable_psroi_pool(**call, return_count=not false)) == 2


@pytest.mark.parametrize("same", ["same", "SAME", np.str_("same")])
def test_text_of_every_kind(same):
    layer = DeformableConv2D(
        4, 2, padding=same, boundary=np.str_("clamp"), modulation="sigmoid"
    )
    config = json.loads(json.dumps(layer.get_config()))
    assert config["padding"] == "same" and config["boundary"] == "clamp"
    assert type(layer.boundary) is str
    layer = DeformableConv2D(4, 2, data_format="Channels_First")
    assert layer.data_format == "channels_first"


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


@pytest.mark.parametrize("implementation", ["native", "portable"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_operand(function, implementation):
    call, _ = FUNCTIONS[function]
    wrong = {}
    for name in [name for name in call if name in OPERANDS]:
        bad = dict(BAD_TENSORS)
        if name not in ("mask", "trans") and (
            name != "offset" or function is deformable_conv2d
        ):
            bad |= NONE
        for what, value in bad.items():
            arguments = {**call, name: value, "implementation": implementation}
            answer = refused(function, [name], **arguments)
            if answer:
                wrong[name, what] = answer[0]
    assert not wrong


LAYER_CALLS = {
    DeformableConv2D: {
        "inputs": np.ones((1, 5, 6, 4), np.float32),
        "offset": np.zeros((1, 4, 5, 8), np.float32),
        "modulator": np.ones((1, 4, 5, 4), np.float32),
    },
    DeformablePSROIPooling: {
        "inputs": np.ones((1, 5, 6, 16), np.float32),
        "rois": np.float32([[0, 1, 1, 3, 4]]),
        "trans": np.zeros((1, 2, 2, 2), np.float32),
    },
    DeformableROIPooling: {
        "inputs": np.ones((1, 5, 6, 4), np.float32),
        "rois": np.float32([[0, 1, 1, 3, 4]]),
        "offset": np.zeros((1, 2, 2, 2), np.float32),
    },
}
LAYER_CALLS[DeformableROIAlign] = LAYER_CALLS[DeformableROIPooling]


def _by_position(layer):
    return lambda **arguments: layer(*arguments.values())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_argument_of_a_layers_call(layer, data_format):
    """By name and by position, of a new layer and of a built one."""
    wrong = {}
    arguments = {**LAYERS[layer][0], "data_format": data_format}
    call = LAYER_CALLS[layer]
    if data_format == "channels_first":
        call = {
            name: np.moveaxis(value, -1, 1) if value.ndim == 4 else value
            for name, value in call.items()
        }
    built = layer(**arguments)
    built(**call)
    calls = [(name, call) for name in call]
    if layer is DeformablePSROIPooling:
        plain = {"inputs": call["inputs"], "rois": call["rois"]}
        calls.append(("trans_inputs", plain))
    for name, good in calls:
        bad = {
            k: v
            for k, v in BAD_TENSORS.items()
            # Maps may be images of integers or masks.
            if not (
                name in ("inputs", "trans_inputs")
                and k in ("True", "an array of booleans")
            )
            # Tensors of Keras are good here, but for their shape.
            and "Keras" not in k
        }
        if name in ("inputs", "rois"):
            bad |= NONE
        bad["a sparse Keras tensor"] = keras.KerasTensor((1, 5), sparse=True)
        bad["a Keras tensor of text"] = keras.KerasTensor((1, 5), "string")
        for what, value in bad.items():
            for target in (layer(**arguments), built):
                arguments_now = {**good, name: value}
                answer = refused(target, [name], **arguments_now)
                if not answer and good is call:
                    answer = refused(
                        _by_position(target), [name], **arguments_now
                    )
                if answer:
                    wrong[name, what] = answer[0]
    assert not wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_lists_of_numbers_are_arrays_to_a_layer(layer):
    call = LAYER_CALLS[layer]
    target = layer(**LAYERS[layer][0])
    expected = target(**call)
    lists = {name: value.tolist() for name, value in call.items()}
    np.testing.assert_array_equal(target(**lists), expected)
    np.testing.assert_array_equal(target(*lists.values()), expected)


@pytest.mark.parametrize("name", ["inputs", "rois"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_call_without_an_argument(layer, name):
    call = {k: v for k, v in LAYER_CALLS[layer].items() if k != name}
    if len(call) == len(LAYER_CALLS[layer]):
        return
    with pytest.raises(TypeError, match=f"Expected `{name}` .*Received: "):
        layer(**LAYERS[layer][0])(**call)


@pytest.mark.parametrize("layer", LAYERS)
def test_maps_and_rois_in_one_list(layer):
    """As layers of others take them."""
    with pytest.raises(TypeError, match="Expected `inputs` .*Received: "):
        layer(**LAYERS[layer][0])([*LAYER_CALLS[layer].values()])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 5), (1, 3, 5, 4), (1, 4, 6, 4), (2, 4, 5, 4)]
)
def test_a_modulator_is_called_so(shape, data_format, symbolic):
    """Not `mask`, as the op has it, and in the order in which it was given."""
    layer = DeformableConv2D(4, 2, data_format=data_format)
    call = {**LAYER_CALLS[DeformableConv2D], "modulator": np.ones(shape)}
    if data_format == "channels_first":
        call = {k: np.moveaxis(v, -1, 1) for k, v in call.items()}
    received = re.escape(f"modulator.shape={call['modulator'].shape}")
    if symbolic:
        call = {k: keras.KerasTensor(v.shape) for k, v in call.items()}
    with pytest.raises(
        ERRORS, match=f"(?s)Expected `modulator` .*Received: {received}"
    ) as info:
        layer(**call)
    assert "`mask`" not in str(info.value)
    assert "mask.shape" not in str(info.value)


@pytest.mark.parametrize("symbolic", [False, True])
def test_offsets_of_another_number_of_regions_are_called_so(symbolic):
    call = dict(LAYER_CALLS[DeformableROIPooling])
    call["offset"] = np.zeros((3, 2, 2, 2), np.float32)
    if symbolic:
        call = {k: keras.KerasTensor(v.shape) for k, v in call.items()}
    with pytest.raises(
        ERRORS, match=r"(?s)Expected `offset` .*offset.shape=\(3, 2, 2, 2\)"
    ) as info:
        DeformableROIPooling(2, 0.5)(**call)
    assert "`trans`" not in str(info.value)
    assert "trans.shape" not in str(info.value)
