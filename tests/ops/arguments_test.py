# SPDX-License-Identifier: Apache-2.0
"""Tests every argument of every function and layer with unusable values.

The answer is an error of ours that names the argument, and not an error of the
libraries below, which often describes their internals. Good values are accepted
in every form that users have.
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
from arguments import (
    BAD_TENSORS,
    CALLABLES,
    EVERY_ARGUMENT,
    FUNCTIONS,
    KINDS,
    LAYER_CALLS,
    LAYERS,
    NONE,
    OF_KERAS,
    OPERANDS,
)

import tf_deform
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIPooling,
)
from tf_deform.ops import deformable_conv2d, deformable_psroi_pool

ERRORS = (ValueError, TypeError, tf.errors.InvalidArgumentError)


def assert_ours(error: BaseException, *names: str) -> None:
    """Checks that the text tells the expected, the received, the argument."""
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = re.sub(r"^\{\{function_node .*?\}\} ", "", text)
    assert text.startswith("Expected "), text
    assert re.search(f"`({'|'.join(names)})`.*Received: ", text, re.DOTALL)
    assert len(text) < 1000, text


def refused(function, names: list[str], **arguments) -> list[str]:
    """Returns a list with one fault of the answer, or an empty list."""
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
    """Tests portable ops and graphs, which judge arguments as well."""
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


# Good values are good in every form.


def arguments_where(wanted):
    """Returns `parametrize` over the arguments whose kind is wanted.

    `wanted` gets whether the argument is a layer's, and its kind.
    """
    rows = [
        (function, name)
        for function, name in EVERY_ARGUMENT
        if wanted(function in LAYERS, CALLABLES[function][1][name])
    ]
    return pytest.mark.parametrize(("function", "name"), rows)


@pytest.mark.parametrize(
    "two",
    [2, np.int8(2), np.uint64(2), np.array(2), tf.constant(2), tf.Variable(2)],
    ids=repr,
)
@arguments_where(
    lambda of_layer, kind: kind != "boolean" and "option" not in kind
)
def test_integers_of_every_kind(function, name, two):
    call, kinds = CALLABLES[function]
    kind = kinds[name]
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
@arguments_where(
    lambda of_layer, kind: of_layer and kind.startswith(("pad", "pair"))
)
def test_pairs_of_every_kind(function, name, pair):
    call, _ = CALLABLES[function]
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
@arguments_where(lambda of_layer, kind: kind == "number")
def test_numbers_of_every_kind(function, name, half):
    call, _ = CALLABLES[function]
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


def _by_position(layer):
    return lambda **arguments: layer(*arguments.values())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_argument_of_a_layers_call(layer, data_format):
    """Passes arguments by name and by position. The layer is new or built."""
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
            # Tensors of Keras are good here, except for their shape.
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


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (layer, name)
        for layer, call in LAYER_CALLS.items()
        for name in ("inputs", "rois")
        if name in call
    ],
)
def test_a_call_without_an_argument(layer, name):
    call = {k: v for k, v in LAYER_CALLS[layer].items() if k != name}
    with pytest.raises(TypeError, match=f"Expected `{name}` .*Received: "):
        layer(**LAYERS[layer][0])(**call)


@pytest.mark.parametrize("layer", LAYERS)
def test_maps_and_rois_in_one_list(layer):
    """Passes maps and ROIs in one list, as to layers of other packages."""
    with pytest.raises(TypeError, match="Expected `inputs` .*Received: "):
        layer(**LAYERS[layer][0])([*LAYER_CALLS[layer].values()])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 5), (1, 3, 5, 4), (1, 4, 6, 4), (2, 4, 5, 4)]
)
def test_a_modulator_is_called_so(shape, data_format, symbolic):
    """Tests that the error says `modulator`, not `mask` like the op.

    The order is the order in which it was given.
    """
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
