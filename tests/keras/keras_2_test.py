# SPDX-License-Identifier: Apache-2.0
"""Runs tests of this folder on Keras 2, where tf_keras is installed, too."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from tf_deform._keras import KERAS_2

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.skipif(
    KERAS_2 or importlib.util.find_spec("tf_keras") is None,
    reason="all tests run on Keras 2, or it is not installed",
)
@pytest.mark.parametrize(
    "name", ["either_layers", "either_files", "across", "either_export"]
)
def test_on_keras_2(name, run_python_as_it_is):
    script = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    # The other Keras' files of `across` are tested in this process.
    options = ["-q", "-p", "no:cacheprovider", "-k", "not other"]
    printed = run_python_as_it_is(
        script,
        FOLDER / f"{name}_test.py",
        *options,
        f"--rootdir={FOLDER.parents[1]}",
        f"--config-file={FOLDER.parents[1] / 'pyproject.toml'}",
        TF_USE_LEGACY_KERAS=1,
    )
    assert " passed" in printed
