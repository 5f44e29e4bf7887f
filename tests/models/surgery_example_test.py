# SPDX-License-Identifier: Apache-2.0
"""Tests the example that trains offsets alone, by a short run of it."""

import numpy as np
import surgery


def test_offsets_alone_give_accuracy_back():
    results = surgery.run(0, first=150, steps=60)
    upright, deformed, _ = results["nothing"]
    assert upright > deformed + 0.2
    for arm in surgery.ARMS:
        assert results[arm][1] > deformed + 0.1, arm
    offsets, plain, both = (results[arm][2] for arm in surgery.ARMS)
    assert 0 < offsets < plain
    assert both == offsets + plain
    lines = surgery.table([results, results]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*results]


def test_digits_are_the_same_every_time():
    part = slice(0, 3)
    one, other = (surgery.digits(1, part, 2, True) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[0].shape == (6, surgery.SIZE, surgery.SIZE, 1)
    assert one[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert 0.9 < one[0].max() <= 1
    assert np.any(one[0] != surgery.digits(2, part, 2, True)[0])
    # No ink is cut off by the edge.
    many = surgery.digits(0, slice(0, 200), 2, True)[0][..., 0]
    edge = np.ones_like(many[0], bool)
    edge[1:-1, 1:-1] = False
    assert many[:, edge].sum() < 0.01 * many.sum()
