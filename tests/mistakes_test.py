# SPDX-License-Identifier: Apache-2.0
"""Tests that the list of mistakes fits the sources."""

import mistakes
import pytest
from mistake_list import MISTAKES


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_there_is_one_place_for_every_mistake(mistake):
    places = [
        (str(path), match.start()) for path, match in mistakes.find(mistake)
    ]
    assert len(places) == 1, places
    assert mistake.new.split() != mistake.old.split()
    assert mistakes.find_tests(mistake)


def test_names_of_mistakes_are_unique():
    names = [mistake.name for mistake in MISTAKES]
    assert len(names) == len(set(names)) >= 40
