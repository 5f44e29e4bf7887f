# SPDX-License-Identifier: Apache-2.0
"""Tests that covers hold every pair of settings in rows that are not slow."""

import itertools

import pairwise
import pytest

AXES = {
    "a": [1, 2, 3],
    "b": ["x", "y"],
    "c": [(1, 2), None, True, "z"],
    "d": [0, 5],
}


@pytest.mark.parametrize("how_many", [2, 3, 4])
def test_a_cover_holds_every_pair_and_the_grid_every_row(how_many):
    axes = dict(list(AXES.items())[:how_many])
    parameters = pairwise.grid(axes).args[1]
    every = [p.values for p in parameters]
    fast = [p.values for p in parameters if not p.marks]
    assert every == list(itertools.product(*axes.values()))
    wanted, held = (
        {
            pair
            for row in some
            for pair in itertools.combinations(enumerate(row), 2)
        }
        for some in (every, fast)
    )
    assert held == wanted
    assert len(fast) < len(every) or how_many == 2


def test_a_missing_pair_is_noticed(monkeypatch):
    whole = pairwise.pairwise
    monkeypatch.setattr(pairwise, "pairwise", lambda axes: whole(axes)[1:])
    with pytest.raises(AssertionError, match="a cover lacks"):
        pairwise.grid(AXES)


def test_an_axis_of_several_parameters():
    axes = {"y, x": [(1, 2), (3, 4)], "dtype": ["a", "b"]}
    names, parameters = pairwise.grid(axes).args
    assert names == ["y", "x", "dtype"]
    assert [p.values for p in parameters] == [
        (*pair, dtype) for pair in axes["y, x"] for dtype in axes["dtype"]
    ]
