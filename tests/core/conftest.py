# SPDX-License-Identifier: Apache-2.0
"""Lets tests of the core run without TensorFlow and Keras."""

import pytest


@pytest.fixture(autouse=True)
def clean_keras() -> None:
    """Overrides the fixture of the same name for the layers' tests."""
