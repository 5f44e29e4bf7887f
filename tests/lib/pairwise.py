# SPDX-License-Identifier: Apache-2.0
"""Chooses few rows of a grid that hold every pair of its settings."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

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
    # Numbers stand for settings, because not all settings can be compared.
    numbers = {name: list(range(len(values))) for name, values in axes.items()}
    cover, rows = pairwise(numbers), all_rows(numbers)
    held, wanted = (
        {pair for row in some for pair in pairs_of(row)}
        for some in (cover, rows)
    )
    if wanted - held:
        raise AssertionError(f"a cover lacks {wanted - held}")
    parameters = []
    for row in rows:
        settings = []
        for name, number in row.items():
            value = axes[name][number]
            settings += value if ", " in name else [value]
        parameters.append(
            pytest.param(
                *settings,
                marks=() if row in cover else pytest.mark.slow,
                id="-".join(map(str, settings)),
            )
        )
    return pytest.mark.parametrize(", ".join(axes).split(", "), parameters)
