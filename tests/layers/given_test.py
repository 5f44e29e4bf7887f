# SPDX-License-Identifier: Apache-2.0
"""Tests displacements that the caller gives, of all layers."""

import numpy as np
import pytest
from compare import assert_close, assert_equal
from layer_cases import (
    CALLS,
    KINDS,
    MODULATIONS,
    POOLS,
    by_hand,
    by_the_op,
    channels_first,
    displaced,
    given_call,
    new,
    own_call,
    plain_call,
    value_and_gradients,
)
from operands import random

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("kind", "config", "unused"),
    [(kind, {}, None) for kind in POOLS]
    + [("psroi", {}, "trans")]  # plain pooling, for which a branch has no input
    + [
        ("conv2d", {"modulation": modulation}, unused)
        for modulation in MODULATIONS
        for unused in (None, "modulator")
    ],
)
def test_given_displacements(kind, config, unused, data_format):
    """Tests that values are used unchanged; without a modulator it is 1."""
    call, layer = given_call(kind), new(kind, data_format=data_format, **config)
    call.pop(unused, None)
    first = data_format == "channels_first"
    output = layer(**(channels_first(call) if first else call))
    output = np.moveaxis(output, 1, 3) if first else output
    kernel = ["kernel", "bias"] if kind == "conv2d" else []
    assert [v.name for v in layer.weights] == kernel
    assert layer.offset_kernel is None and layer.offset_bias is None
    assert_equal(output, by_the_op(layer, *call.values()))
    assert_close(output, by_hand(layer, *call.values()), 1e-5)


@pytest.mark.parametrize("modulator", [True, False])
@pytest.mark.parametrize("offset_groups", [2, 3])
def test_given_offset_groups(offset_groups, modulator):
    layer = new("conv2d", offset_groups=offset_groups)
    call = [random(2, 8, 9, 6), 2 * random(2, 6, 7, 18 * offset_groups, seed=1)]
    if modulator:
        call.append(random(2, 6, 7, 9 * offset_groups, seed=2))
    assert_close(layer(*call), by_hand(layer, *call), 1e-5)


@pytest.mark.parametrize(
    ("kind", "source"), [*[(k, "given") for k in KINDS], ("psroi", "plain")]
)
def test_the_branch_does_not_run(kind, source):
    """Tests that a branch full of NaN has no effect."""
    layer, call = displaced(kind), CALLS[source](kind)
    before = layer(**call)
    branch = [v for v in layer.weights if v.name.startswith("offset_")]
    for variable in branch:
        variable.assign(np.full(variable.shape, np.nan))
    output, _, gradients = value_and_gradients(layer, call, branch)
    assert_equal(output, before)
    assert gradients == [None, None]


@every_kind
def test_given_by_position(kind):
    call, layer = given_call(kind), new(kind)
    assert_equal(layer(*call.values()), layer(**call))
    call, layer = own_call(kind), displaced(kind)
    arguments = list(call.values())
    if kind == "psroi":
        arguments.insert(2, None)
    assert_equal(layer(*arguments), layer(**call))


@every_kind
def test_gradients_reach_given_displacements(kind):
    layer, call = new(kind), given_call(kind)
    layer(**call)

    def function(**operands):
        return by_the_op(layer, *operands.values())

    expected = value_and_gradients(function, call)
    for name, gradient in expected[1].items():
        assert gradient is None if name == "rois" else np.any(gradient)
    assert_equal(value_and_gradients(layer, call), expected)


@pytest.mark.parametrize("source", CALLS)
@pytest.mark.parametrize("kind", POOLS)
def test_a_factor_of_zero_switches_displacements_off(kind, source):
    """Tests all sources, and displacements of zero with another factor."""
    call = CALLS[source](kind)
    layer = displaced(kind, **{KINDS[kind].factor: 0})
    plain = by_hand(layer, *plain_call(kind).values())
    assert_close(layer(**call), plain, 1e-5)
    if source == "given":
        call[KINDS[kind].given] *= 0
        assert_close(new(kind)(**call), plain, 1e-5)


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_given_displacements_tell_their_own_number_of_classes(classes):
    call, layer = plain_call("psroi"), new("psroi")
    call["trans"] = 0.8 * random(7, 2, 5, 2 * classes)
    assert_close(layer(**call), by_hand(layer, *call.values()), 1e-5)
