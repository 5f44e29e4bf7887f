# SPDX-License-Identifier: Apache-2.0
"""Tests what is said where tensorflow_addons cannot be."""

import pathlib
import runpy
import sys

import pytest

from tf_deform._keras import keras
from tf_deform.training import _addons

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples/addons_segmentation.py"
TEXT = (
    "which runs with TensorFlow 2.15 and.*Received: TensorFlow .* and the err"
)


@pytest.fixture(autouse=True)
def without_addons(monkeypatch):
    """Makes the import fail, as it does on newer TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorflow_addons", None)


def test_import():
    with pytest.raises(ImportError, match=TEXT):
        _addons.import_addons()


def test_the_example():
    pytest.importorskip("skimage", reason="the scenes need it")
    with pytest.raises(ImportError, match=TEXT.replace("which", "whose.*")):
        runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("kind", ["LAMB", "MultiOptimizer"])
def test_a_saved_optimizer(kind):
    saved = {
        "class_name": "tf_deform>DeformableOptimizer",
        "registered_name": "tf_deform>DeformableOptimizer",
        "config": {
            "optimizer": {"class_name": f"Addons>{kind}", "config": {}},
            "offset_multiplier": 0.1,
        },
    }
    with pytest.raises(ImportError, match=TEXT):
        keras.optimizers.deserialize(saved)
