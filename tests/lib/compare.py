# SPDX-License-Identifier: Apache-2.0
"""Compares results for all tests; messages tell what is wrong, and where.

Nothing here needs TensorFlow: the tests of the core run without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_SHOWN = 5  # elements that a message lists


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Gives the largest error allowed for an element expected to be `e`.

    The error is `of_largest * max(at_least, largest) + of_each * abs(e)`, where
    `largest` is the largest finite magnitude expected of the whole array.
    """

    of_largest: float = 0.0
    at_least: float = 0.0
    of_each: float = 0.0

    def allowed(self, expected: np.ndarray) -> np.ndarray:
        """Returns the error allowed for each element of `expected`."""
        magnitude = np.where(np.isfinite(expected), np.abs(expected), 0)
        largest = max(self.at_least, magnitude.max(initial=0))
        return self.of_largest * largest + self.of_each * magnitude


EXACT = Tolerance()


def assert_close(
    actual: Any,
    expected: Any,
    tolerance: Tolerance | float = EXACT,
    *,
    case: object = "",
    name: str = "result",
    dtype: object = None,
) -> None:
    """Compares values, shapes and, if it is given, the type of `actual`.

    Both are arrays, tensors or numbers, or dicts, lists and tuples of the
    same structure; None equals None alone. A `tolerance` that is a number is
    a share of the largest number expected. NaN and infinities have to be at
    the same places, and nowhere else. `case` describes the call, `name` the
    value: the message begins with both, and a nested value is named by its
    keys, as in `gradients[offset]`.
    """
    __tracebackhide__ = True
    if not isinstance(tolerance, Tolerance):
        tolerance = Tolerance(float(tolerance))
    problem = _compare(actual, expected, tolerance, name, dtype)
    if problem:
        raise AssertionError(f"{case}: {problem}" if str(case) else problem)


def assert_equal(actual: Any, expected: Any, **options: object) -> None:
    """Compares as `assert_close` does, without any error allowed."""
    __tracebackhide__ = True
    assert_close(actual, expected, EXACT, **options)


def assert_same_bits(
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    case: object = "",
) -> None:
    """Compares types, shapes and bytes, by name: -0 is not 0 here."""
    __tracebackhide__ = True
    assert actual.keys() == expected.keys(), (
        f"{case}: expected {sorted(expected)}, received {sorted(actual)}"
    )
    for name, array in actual.items():
        kinds = [(x.dtype, x.shape) for x in (array, expected[name])]
        if kinds[0] != kinds[1]:
            raise AssertionError(
                f"{case}: {name}: expected {kinds[1]}, received {kinds[0]}"
            )
        if array.tobytes() != expected[name].tobytes():
            assert_close(array, expected[name], case=case, name=name)
            raise AssertionError(f"{case}: {name}: a sign or a NaN differs")


def _compare(
    actual: Any,
    expected: Any,
    tolerance: Tolerance,
    name: str,
    dtype: object,
) -> str:
    """Returns a description of the differences, or an empty text."""
    problem = f"{name}: expected {_kind(expected)}, received {_kind(actual)}"
    if expected is None or actual is None:
        return "" if actual is expected else problem
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or actual.keys() != expected.keys():
            return problem
        pairs = [(key, actual[key], expected[key]) for key in expected]
    elif isinstance(expected, (list, tuple)) and _is_nested(expected, actual):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(
            expected
        ):
            return problem
        names = getattr(expected, "_fields", range(len(expected)))
        pairs = list(zip(names, actual, expected))
    else:
        return _compare_arrays(actual, expected, tolerance, name, dtype)
    found = (
        _compare(one, two, tolerance, f"{name}[{key}]", dtype)
        for key, one, two in pairs
    )
    return next(filter(None, found), "")


def _is_nested(expected: list | tuple, actual: object) -> bool:
    """Returns whether lists are compared by element, not as an array."""
    return isinstance(actual, (list, tuple)) or any(
        x is None or hasattr(x, "shape") for x in expected
    )


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an array of shape {np.shape(value)}"


def _compare_arrays(
    actual: Any,
    expected: Any,
    tolerance: Tolerance,
    name: str,
    dtype: object,
) -> str:
    actual, expected = np.asarray(actual), np.asarray(expected)
    wanted = getattr(dtype, "name", dtype)  # a type of NumPy or TensorFlow
    if wanted is not None and actual.dtype.name != wanted:
        return f"{name}: expected {wanted}, received {actual.dtype.name}"
    if actual.shape != expected.shape:
        return (
            f"{name}: expected the shape {expected.shape}, "
            f"received {actual.shape}"
        )
    outside, error, allowed = _outside(actual, expected, tolerance)
    if not outside.any():
        return ""
    return _report(name, actual, expected, outside, error, allowed)


def _outside(
    actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the wrong elements, the errors, and the errors allowed."""
    same = np.asarray(actual == expected)
    # Large integers are compared before they are rounded to float64.
    actual, expected = (x.astype(np.float64) for x in (actual, expected))
    same = same | (np.isnan(actual) & np.isnan(expected))
    finite = np.isfinite(actual) & np.isfinite(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(finite, np.abs(actual - expected), np.inf)
    allowed = np.broadcast_to(tolerance.allowed(expected), expected.shape)
    return ~same & ~((error > 0) & (error <= allowed)), error, allowed


def _report(
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    outside: np.ndarray,
    error: np.ndarray,
    allowed: np.ndarray,
) -> str:
    excess = np.where(outside, error - allowed, -np.inf).reshape(-1)
    worst = np.argsort(-excess, kind="stable")[: min(_SHOWN, outside.sum())]
    lines = []
    for flat in worst:
        index = np.unravel_index(flat, outside.shape)
        place = f"[{', '.join(map(str, index))}]" if index else ""
        lines.append(
            f"{name}{place}: expected {_text(expected[index])}, "
            f"received {_text(actual[index])} ({actual.dtype}), "
            f"off by {error[index]:.3g}, allowed {allowed[index]:.3g}"
        )
    count, size = outside.sum(), outside.size
    share = f"outside: {count} of {size} elements ({100 * count / size:.3g} %)"
    return "\n  ".join([lines[0], share, *lines[1:]])


def _text(number: Any) -> str:
    if isinstance(number, (np.integer, np.bool_)):
        return str(number)
    return f"{float(number):.9g}"


def assert_finite_differences(
    rng: np.random.Generator,
    loss: Callable[[], float],
    operand: np.ndarray,
    gradient: np.ndarray,
    *,
    name: str = "operand",
    how_many: int = 60,
) -> None:
    """Compares some slopes of `loss` with `gradient`.

    The loss is linear in each single number of an operand, up to the next place
    where its slope jumps.
    """
    __tracebackhide__ = True
    assert gradient.shape == operand.shape, name
    flat, step = operand.reshape(-1), 1e-4
    for index in rng.permutation(flat.size)[:how_many]:
        value = flat[index]
        flat[index] = value + step
        above = loss()
        flat[index] = value - step
        below = loss()
        flat[index] = value
        slope = (above - below) / (2 * step)
        received = gradient.reshape(-1)[index]
        if not abs(slope - received) < 1e-9:
            place = tuple(map(int, np.unravel_index(index, operand.shape)))
            raise AssertionError(
                f"gradient of {name}{list(place)}: expected the slope "
                f"{slope:.9g}, received {received:.9g}, allowed 1e-09"
            )
