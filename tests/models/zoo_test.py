# SPDX-License-Identifier: Apache-2.0
"""Tests that well-known networks become deformable: `docs/surgery.md`."""

import pathlib

import pytest
import zoo

TABLE = pathlib.Path(__file__).parents[2] / "docs/surgery.md"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_network(name, tmp_path):
    row = zoo.examine(name, tmp_path)
    assert row.difference <= 1e-5
    assert row.moved > 0
    assert row.reloaded == 0
    if "KerasHub" in name:
        assert row.kind in name
    else:
        assert row.kind == "Functional"
    # The difference is another on other processors.
    expected = zoo.line(name, row).split("|")
    (line,) = [x for x in TABLE.read_text().splitlines() if f"| {name} |" in x]
    found = line.split("|")
    assert found[:4] + found[5:] == expected[:4] + expected[5:]
