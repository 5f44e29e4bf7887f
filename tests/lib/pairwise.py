# SPDX-License-Identifier: Apache-2.0
"""Few rows of a grid that hold every pair of its settings."""

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
    """Few rows in which any two settings of any two axes meet."""
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
