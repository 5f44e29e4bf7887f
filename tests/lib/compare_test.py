# SPDX-License-Identifier: Apache-2.0
"""Tests that the shared comparison fails when it should, and says why."""

import re

import numpy as np
import operands
import pytest
import tensorflow as tf
import tolerances
from compare import (
    Tolerance,
    assert_close,
    assert_equal,
    assert_finite_differences,
    assert_same_bits,
)

NAN, INF = np.nan, np.inf


def message(*arguments, **options) -> str:
    """Returns the message of a comparison that has to fail."""
    with pytest.raises(AssertionError) as error:
        assert_close(*arguments, **options)
    return str(error.value)


def test_message_names_case_place_numbers_and_share():
    expected = np.arange(24.0).reshape(2, 3, 4)
    actual = expected.astype(np.float32)
    actual[1, 2, 0] += 0.5
    actual[0, 1, 3] -= 0.25
    text = message(
        {"output": expected, "gradients": {"offset": actual}},
        {"output": expected, "gradients": {"offset": expected}},
        1e-3,
        case="seed 7, float32",
    )
    assert text.splitlines() == [
        "seed 7, float32: result[gradients][offset][1, 2, 0]: expected 20, "
        "received 20.5 (float32), off by 0.5, allowed 0.023",
        "  outside: 2 of 24 elements (8.33 %)",
        "  result[gradients][offset][0, 1, 3]: expected 7, "
        "received 6.75 (float32), off by 0.25, allowed 0.023",
    ]


def test_message_lists_few_of_many():
    text = message(np.ones((50, 2)), np.zeros((50, 2)), name="output")
    assert len(text.splitlines()) == 6
    assert "outside: 100 of 100 elements (100 %)" in text


@pytest.mark.parametrize(
    ("tolerance", "expected", "passes", "fails"),
    [
        (0.01, [0, 0, 10], [0.09, 0, 10], [0.11, 0, 10]),
        (Tolerance(0.01), [0, 0, 10], [0, 0, 10.09], [0, 0, 10.11]),
        (Tolerance(0.01, 20), [0, 0, 10], [0, 0.19, 10], [0, 0.21, 10]),
        (Tolerance(of_each=0.01), [0, 0, 10], [0, 0, 10.09], [0, 1e-9, 10]),
        (Tolerance(0.01, 0, 0.01), [0, 10], [0.09, 10.19], [0.11, 10.19]),
        (Tolerance(), [0, 0, 10], [0, 0, 10], [0, 0, np.nextafter(10, 11)]),
        (0.5, [1], [1.5], [1.6]),  # as large as allowed
        # Infinities do not widen the error that is allowed.
        (0.01, [INF, 1, NAN], [INF, 1.009, NAN], [INF, 1.011, NAN]),
    ],
)
def test_allowed_errors(tolerance, expected, passes, fails):
    passes, fails, expected = map(np.float64, (passes, fails, expected))
    assert_close(passes, expected, tolerance)
    message(fails, expected, tolerance)
    message(-fails, expected, tolerance)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (actual, expected)
        for actual in (0.0, NAN, INF, -INF)
        for expected in (0.0, NAN, INF)
        if str(actual) != str(expected)
    ],
)
def test_not_finite_where_another_is_expected(actual, expected):
    text = message(np.array([actual, 1]), np.array([expected, 1]), 1e9)
    assert "outside: 1 of 2 elements (50 %)" in text
    assert text.startswith("result[0]: ")
    assert_equal(np.array([actual, 1]), np.array([actual, 1]))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int64", "bool"]
)
@pytest.mark.parametrize("make", [np.array, tf.constant])
def test_every_type(make, dtype):
    values = np.array([0, 1, 1], operands.numpy_type(dtype))
    others = np.array([0, 1, 0], operands.numpy_type(dtype))
    assert_equal(make(values), values, dtype=dtype)
    assert_equal(make(values), values, dtype=tf.as_dtype(dtype))
    text = message(make(others), values, 0.5)
    assert text.startswith("result[2]: expected ")
    assert f"({dtype})" in text


def test_integers_that_float64_cannot_tell_apart():
    big = np.array([2**60, 5])
    assert_equal(big, big)
    text = message(big + [1, 0], big, 1e-3)
    assert f"expected {2**60}, received {2**60 + 1} " in text


def test_equal_structures():
    x = np.zeros(3)
    assert_equal([x, None, (x, x)], [x, None, [x, x]])
    assert_equal({"a": x, "b": None}, {"b": None, "a": x})
    assert_equal([1.0, 2.0], [1.0, 2.0])
    assert_equal(np.array([[1.0], [2.0]]), [[1.0], [2.0]])
    assert_equal(np.zeros((0, 3)), np.zeros((0, 3)))


X, ARRAY = np.zeros(3), "an array of shape (3,)"


@pytest.mark.parametrize(
    ("actual", "expected", "text"),
    [
        (np.zeros(()), X, ": expected the shape (3,), received ()"),
        (X[:0], X, ": expected the shape (3,), received (0,)"),
        ([X, X], [X, None], f"[1]: expected None, received {ARRAY}"),
        ([X], [X, X], ": expected a list of 2, received a list of 1"),
        (X, [X, X], f": expected a list of 2, received {ARRAY}"),
        ({"a": X}, {"b": X}, ": expected the keys ['b'], received the keys"),
        (X, {"b": X}, f": expected the keys ['b'], received {ARRAY}"),
        ([1.0, 2.5], [1.0, 2.0], "[1]: expected 2, received 2.5"),
    ],
)
def test_other_shapes_and_structures(actual, expected, text):
    assert message(actual, expected).startswith(f"result{text}")


def test_other_types():
    text = message(X, X, dtype="bfloat16", name="output", case=3)
    assert text == "3: output: expected bfloat16, received float64"


def test_a_failed_comparison_points_at_the_test():
    with pytest.raises(AssertionError) as error:
        assert_close(np.ones(2), np.zeros(2), case="bfloat16, groups 2")
    text = str(error.getrepr())
    assert "bfloat16, groups 2: result[0]: expected 0, received 1" in text
    assert re.search(r"compare_test\.py:\d+: AssertionError$", text)
    assert "def _compare" not in text


def test_tolerances_of_16_bit_types_are_few_units():
    for name, table in vars(tolerances).items():
        if isinstance(table, dict) and name.isupper() and name != "HALF_UNIT":
            assert set(table) == set(operands.DTYPES), name
            assert table["float32"].of_largest < 4e-4, name
            assert table["float64"].of_largest <= 1e-9, name


def test_finite_differences_name_the_slope():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3))
    factors = rng.normal(size=(2, 3))

    def loss():
        return float((x * factors).sum())

    assert_finite_differences(rng, loss, x, factors)
    wrong = factors.copy()
    wrong[1, 2] += 1e-6
    with pytest.raises(AssertionError, match=r"gradient of x\[1, 2\]: expect"):
        assert_finite_differences(rng, loss, x, wrong, name="x")


def test_gradients_have_the_names_of_operands():
    x, y = operands.random(2, 3), operands.random(2, 3, seed=1)
    output, gradients = operands.forward_and_gradients(
        lambda x, y, z: (x * y, x), {"x": x, "y": y, "z": None}, 2 * x
    )
    assert_equal(output, (x * y, x))
    assert_close(gradients, {"x": 2 * x * y, "y": 2 * x * x}, 1e-6)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"output": -np.zeros(2)}, "2 threads: output: a sign"),
        ({"output": np.arange(2.0)}, r"output\[1\].*off by 1"),
        ({}, r"received \['output'\]"),
        ({"output": np.zeros((1, 2))}, "output: expected .*float64"),
        ({"output": np.zeros(2, int)}, "output: expected .*float64"),
    ],
)
def test_bits_are_compared_by_name(other, text):
    both = {"output": np.zeros(2), "count": np.ones(2)}
    assert_same_bits(both, {k: v.copy() for k, v in both.items()})
    other = both | other if other else {"output": both["output"]}
    with pytest.raises(AssertionError, match=text):
        assert_same_bits(other, both, "2 threads")
