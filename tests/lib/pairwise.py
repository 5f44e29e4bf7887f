# SPDX-License-Identifier: Apache-2.0
"""Chooses few rows of a grid that hold every pair of its settings."""

import itertools
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def all_rows(axes: dict[str, list]) -> list[Row]:
    """Returns the whole grid."""
    return [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def pairs_of(row: Row) -> Iterator[tuple]:
    """Yields the pairs of settings that a row holds."""
    return itertools.combinations(row.items(), 2)


def pairwise(axes: dict[str, list]) -> list[Row]:
    """Chooses few rows in which any two settings of any two axes meet."""
    missing = {
        pair: None
        for first, second in itertools.combinations(axes, 2)
        for pair in itertools.product(
            [(first, value) for value in axes[first]],
            [(second, value) for value in axes[second]],
        )
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name, values in axes.items():
            if name not in row:
                row[name] = max(
                    values,
                    key=lambda value, name=name: sum(
                        pair in missing
                        for item in row.items()
                        for pair in (
                            (item, (name, value)),
                            ((name, value), item),
                        )
                    ),
                )
        row = {name: row[name] for name in axes}
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append(row)
    return rows


def grid(axes: dict[str, list]) -> Any:
    """Returns `pytest.mark.parametrize` over the whole grid of `axes`.

    An axis `"y, x"` has pairs and is two parameters. Rows beyond a cover of all
    pairs of settings are marked slow. At import it is checked that the cover
    lacks no pair.
    """
    import pytest

    # Numbers stand for settings, because not all settings can be compared.
    numbers = {name: list(range(len(values))) for name, values in axes.items()}
    cover = {tuple(row.values()) for row in pairwise(numbers)}
    rows = [tuple(row.values()) for row in all_rows(numbers)]
    _check_pairs(cover, rows)
    names = [name.split(", ") for name in axes]

    def settings(row: tuple) -> list:
        flat = []
        for parts, values, number in zip(
            names, axes.values(), row, strict=True
        ):
            flat += values[number] if len(parts) > 1 else [values[number]]
        return flat

    parameters = [
        pytest.param(
            *settings(row),
            marks=() if row in cover else pytest.mark.slow,
            id="-".join(map(str, settings(row))),
        )
        for row in rows
    ]
    return pytest.mark.parametrize(sum(names, []), parameters)


def _check_pairs(cover: set[tuple], rows: list[tuple]) -> None:
    held, wanted = (
        {pair for row in some for pair in pairs_of_values(row)}
        for some in (cover, rows)
    )
    if wanted - held:
        raise AssertionError(f"a cover lacks {wanted - held}")


def pairs_of_values(row: tuple) -> Iterator[tuple]:
    """Yields the pairs of (axis, value) that a row holds."""
    return itertools.combinations(enumerate(row), 2)
