# SPDX-License-Identifier: Apache-2.0
"""Tests every argument of every function and layer with unusable values.

The answer is an error of ours that names the argument, and not an error of the
libraries below, which often describes their internals. Good values are accepted
in every form that users have.
"""

import decimal
import fractions
import json
import re

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from arguments import (
    BAD_MAPS,
    BAD_TENSORS,
    CALLABLES,
    EVERY_ARGUMENT,
    FUNCTIONS,
    KERAS_TENSORS,
    KIND_OF,
    KINDS,
    LAYER_CALLS,
    LAYERS,
)
from bad_calls import ERRORS, OPERANDS, in_graph, words
from layer_cases import channels_first as to_channels_first

import tf_deform
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIPooling,
)

PLAIN = (int, float, complex, str, tuple, dict, type(None))


def refusal(function, name, value, **arguments) -> str:
    """Returns the words of the error, which must be ours and name `name`.

    Other answers are an AssertionError. Of an argument that is no operand, the
    words show plain values of Python.
    """
    try:
        result = function(**{**arguments, name: value})
    except ERRORS as error:
        text = words(error)
    except BaseException as error:
        raise AssertionError(
            f"{type(error).__name__}: {error!s:.200}"
        ) from None
    else:
        raise AssertionError(f"was accepted: {result!r:.100}")
    assert re.match(f"(?s)Expected .*`{name}`.*Received: ", text), text[:200]
    assert len(text) < 1000, text
    if name in KIND_OF and isinstance(value, PLAIN):
        parts = [value, *tf.nest.flatten(value)]
        shown = [f"{part!r:.50}" for part in parts]
        shown += ["0"] * (value == 0) + ["bits"] * (value == 10**400)
        # A data format is read in any case, as by Keras.
        received = text[text.rindex("Received: ") :].lower()
        assert any(part.lower() in received for part in shown), text
    return text


def check_all(values, check):
    """Calls `check` with every value; a failure says which values failed."""
    wrong = []
    for value in values:
        try:
            check(value)
        except AssertionError as failure:
            what = f"{type(value).__name__} {value!r:.50}"
            wrong.append(f"{what}: {failure!s:.300}")
    assert not wrong


def test_the_good_calls_are_good():
    for function, call in CALLABLES.items():
        function(**call)


def test_there_are_enough_kinds():
    assert all(len(values) >= 40 for values in KINDS.values())


@pytest.mark.parametrize(("function", "name", "kind"), EVERY_ARGUMENT)
def test_every_argument(function, name, kind):
    check_all(
        KINDS[kind],
        lambda value: refusal(function, name, value, **CALLABLES[function]),
    )


def arguments_where(wanted):
    """Returns `parametrize` over the arguments whose kind is wanted.

    `wanted` gets whether the argument is a layer's, and its kind.
    """
    rows = [row for row in EVERY_ARGUMENT if wanted(row[0] in LAYERS, row[2])]
    return pytest.mark.parametrize(("function", "name", "kind"), rows)


@arguments_where(lambda of_layer, kind: not of_layer)
def test_every_argument_elsewhere(function, name, kind):
    """Tests graphs, and portable ops, which say the same."""

    def run_in_graph(known):
        return lambda **call: in_graph(
            function,
            {k: x for k, x in call.items() if k in OPERANDS},
            {k: x for k, x in call.items() if k not in OPERANDS},
            known,
        )

    def check(value):
        call = FUNCTIONS[function]
        for known in (True, False):
            refusal(run_in_graph(known), name, value, **call)
        if name != "implementation":
            portable = {**call, "implementation": "portable"}
            assert refusal(function, name, value, **portable) == refusal(
                function, name, value, **call
            )

    check_all(KINDS[kind], check)


def test_implementation():
    def run(implementation):
        with tf_deform.implementation(implementation):
            pass

    check_all(
        KINDS["option"], lambda value: refusal(run, "implementation", value)
    )


# Good values are good in every form. By the kind of an argument: what a layer
# makes of a value, and forms of the value.

TWOS = [
    2,
    np.int8(2),
    np.uint64(2),
    np.array(2),
    tf.constant(2),
    tf.Variable(2),
]
THREE_AND_TWO = [
    *((3, 2), [3, 2], np.array([3, 2]), (np.int64(3), np.array(2))),
    *(tf.constant([3, 2]), [tf.constant(3), 2]),
]
HALVES = [
    *(0.5, np.float16(0.5), np.float64(0.5), np.array(0.5), tf.constant(0.5)),
    *(ml_dtypes.bfloat16(0.5), np.longdouble(0.5), tf.Variable(0.5)),
    *(decimal.Decimal("0.5"), fractions.Fraction(1, 2)),
]
GOOD = {
    "count": [(2, TWOS)],
    "integer": [(2, TWOS)],
    "number": [(2, TWOS), (0.5, HALVES)],
    "positive number": [(2, TWOS), (0.5, HALVES)],
    "pair": [((2, 2), TWOS), ((3, 2), THREE_AND_TWO)],
    "pair or None": [((2, 2), TWOS), ((3, 2), THREE_AND_TWO)],
    "padding": [
        (((2, 2), (2, 2)), TWOS),
        (((3, 3), (2, 2)), THREE_AND_TWO),
    ],
    "units": [((2, 2), [[two, two] for two in TWOS])],
    "boolean": [
        (False, [False, 0, np.False_, np.array(False)]),
        (True, [True, 1, np.True_, np.array(True)]),
    ],
}


@arguments_where(lambda of_layer, kind: kind in GOOD)
def test_every_form_of_good_values(function, name, kind):
    def outcome(value):
        """Returns a layer's attribute, the op's results or its error."""
        try:
            result = function(**{**CALLABLES[function], name: value})
        except ERRORS as error:  # Other arguments no longer fit.
            assert not words(error).startswith(f"Expected `{name}`")
            return words(error)
        if function in LAYERS:
            json.dumps(result.get_config())
            result = getattr(result, name)
            return type(result) if kind == "boolean" else None, result
        return [x.numpy().tolist() for x in tf.nest.flatten(result)]

    def check(value):
        assert outcome(value) == outcome(plain)

    for plain, forms in GOOD[kind]:
        if function in LAYERS:
            assert outcome(plain)[1] == plain
        check_all(forms, check)


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
@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in FUNCTIONS for name in FUNCTIONS[f] if name in OPERANDS],
)
def test_every_operand(function, name, implementation):
    call = {**FUNCTIONS[function], "implementation": implementation}
    *_, optional = (name for name in call if name in OPERANDS)
    bad = [*BAD_TENSORS, *KERAS_TENSORS]
    check_all(
        bad if name == optional else [*bad, None],
        lambda value: refusal(function, name, value, **call),
    )


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("layer", "name"),
    [(layer, name) for layer in LAYERS for name in LAYER_CALLS[layer]]
    + [(DeformablePSROIPooling, "trans_inputs")],
)
def test_every_argument_of_a_layers_call(layer, name, data_format):
    """Passes arguments by name and by position. The layer is new or built."""
    good = LAYER_CALLS[layer]
    if name == "trans_inputs":
        good = {"inputs": good["inputs"], "rois": good["rois"]}
    if data_format == "channels_first":
        good = to_channels_first(good)
    new = {**LAYERS[layer], "data_format": data_format}
    built = layer(**new)
    built(**good)

    def check(value):
        for target in (layer(**new), built):
            refusal(target, name, value, **good)
            if name in good:

                def by_position(target=target, **arguments):
                    return target(*arguments.values())

                refusal(by_position, name, value, **good)

    bad = BAD_MAPS if name in ("inputs", "trans_inputs") else BAD_TENSORS
    bad = [
        *bad,
        # Tensors of Keras are good here, except for these.
        keras.KerasTensor((1, 5), sparse=True),
        keras.KerasTensor((1, 5), "string"),
    ]
    check_all([*bad, None] if name in ("inputs", "rois") else bad, check)


@pytest.mark.parametrize("layer", LAYERS)
def test_lists_of_numbers_are_arrays_to_a_layer(layer):
    call = LAYER_CALLS[layer]
    target = layer(**LAYERS[layer])
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
        layer(**LAYERS[layer])(**call)


@pytest.mark.parametrize("layer", LAYERS)
def test_maps_and_rois_in_one_list(layer):
    """Passes maps and ROIs in one list, as to layers of other packages."""
    with pytest.raises(TypeError, match="Expected `inputs` .*Received: "):
        layer(**LAYERS[layer])([*LAYER_CALLS[layer].values()])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("layer", "name", "shape", "of_the_op"),
    [
        *(
            (DeformableConv2D, "modulator", shape, "mask")
            for shape in [
                (1, 4, 5, 5),
                (1, 3, 5, 4),
                (1, 4, 6, 4),
                (2, 4, 5, 4),
            ]
        ),
        (DeformableROIPooling, "offset", (3, 2, 2, 2), "trans"),
    ],
)
def test_errors_name_the_layers_argument(
    layer, name, shape, of_the_op, data_format, symbolic
):
    """Tests the name, and the order in which the shape was given."""
    call = {**LAYER_CALLS[layer], name: np.ones(shape, np.float32)}
    if data_format == "channels_first":
        call = to_channels_first(call)
    received = re.escape(f"{name}.shape={call[name].shape}")
    if symbolic:
        call = {k: keras.KerasTensor(v.shape) for k, v in call.items()}
    with pytest.raises(
        ERRORS, match=f"(?s)Expected `{name}` .*Received: .*{received}"
    ) as info:
        layer(**LAYERS[layer], data_format=data_format)(**call)
    assert f"`{of_the_op}`" not in str(info.value)
    assert f"{of_the_op}.shape" not in str(info.value)
