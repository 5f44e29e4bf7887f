# SPDX-License-Identifier: Apache-2.0
"""Tests which Keras the layers are made of, and what the other one is told."""

from __future__ import annotations

import importlib.util

import pytest

from tf_deform._keras import KERAS_2, keras

BOTH = all(map(importlib.util.find_spec, ("keras", "tf_keras")))
# Whether TF_USE_LEGACY_KERAS chooses between Keras 2 and 3 here.
needs_both = pytest.mark.skipif(not BOTH, reason="one Keras is installed")
keras_3 = pytest.mark.skipif(KERAS_2, reason="of Keras 3")

ATTEMPT = """
import os
import sys
import tensorflow as tf

def attempt(function):
    try:
        function()
    except Exception as error:
        print(type(error).__name__, error)

def load():
    import tf_deform
"""


def test_layers_are_those_of_tensorflow():
    import tensorflow as tf

    from tf_deform.layers import DeformableConv2D

    assert issubclass(DeformableConv2D, tf.keras.layers.Conv2D)
    assert issubclass(DeformableConv2D, keras.layers.Conv2D)
    assert KERAS_2 == keras.__version__.startswith("2.")


def test_no_keras(run_python_as_it_is):
    name = keras.__name__
    printed = run_python_as_it_is(
        f"import sys; sys.modules[{name!r}] = None\n{ATTEMPT}\nattempt(load)"
    )
    assert "ImportError Expected a Keras for TensorFlow" in printed
    assert "Run `pip install " in printed


@pytest.mark.parametrize("version", ["2.14.0", "3.0.5", "3.4.1", "1.2"])
def test_an_old_keras(version, run_python_as_it_is):
    printed = run_python_as_it_is(
        f"{ATTEMPT}\ntf.keras.layers\nimport {keras.__name__} as keras\n"
        f"keras.__version__ = {version!r}\nattempt(load)"
    )
    assert "ImportError Expected Keras 2.15, or 3.5 or newer" in printed
    assert f"Received: {keras.__name__} {version}" in printed


@keras_3
def test_another_backend(run_python_as_it_is):
    """Tests a backend whose package is missing, and one that runs."""
    missing = run_python_as_it_is(
        f"{ATTEMPT}\nattempt(load)", KERAS_BACKEND="jax"
    )
    runs = run_python_as_it_is(
        f"{ATTEMPT}\nimport keras\nkeras.backend.backend = lambda: 'jax'\n"
        "attempt(load)"
    )
    assert "ImportError Expected Keras to run on TensorFlow" in runs
    for printed in (missing, runs):
        assert "ImportError Expected" in printed
        assert "KERAS_BACKEND=tensorflow" in printed


@keras_3
@pytest.mark.skipif(BOTH, reason="tf_keras is installed")
def test_keras_2_is_asked_for_and_missing(run_python_as_it_is):
    printed = run_python_as_it_is(
        f"{ATTEMPT}\nattempt(load)", TF_USE_LEGACY_KERAS=1
    )
    assert "ImportError Expected a Keras for TensorFlow" in printed
    assert "pip install 'tf-keras==" in printed
    assert "unset the environment variable TF_USE_LEGACY_KERAS" in printed


WITH_BOTH = """
import keras, tf_keras, numpy as np
import tf_deform
from tf_deform import layers
own = tf_deform._keras.keras
other = keras if own is tf_keras else tf_keras
print("own", own.__name__)
image = np.ones((1, 8, 9, 3), "float32")
rois = np.array([[0, 1, 1, 5, 5]], "float32")

def functional():
    layers.DeformableConv2D(4, 3)(other.Input((8, 9, 3)))

def second_argument():
    layers.DeformableROIAlign(2, 1.0)(own.Input((8, 9, 3)),
                                      rois=other.Input((5,)))

class Subclassed(other.Model):
    def __init__(self):
        super().__init__()
        self.own = layers.DeformableConv2D(4, 3)

    def call(self, x):
        return self.own(x)

def eager():
    Subclassed()(image)

def in_graph():
    tf.function(Subclassed())(image)

def sequential():
    other.Sequential([layers.DeformableConv2D(4, 3)])(image)

for function in (functional, second_argument, eager, in_graph):
    print(function.__name__, end=" ")
    attempt(function)
print("sequential", end=" ")
attempt(sequential)

# Beside models of the other Keras, and in those of its own, all is well.
other.Sequential([other.layers.Conv2D(4, 3)])(image)
model = own.Sequential([layers.DeformableConv2D(4, 3)])
assert model(image).shape == (1, 6, 7, 4)
"""


@needs_both
@pytest.mark.parametrize("own,use", [("keras", "0"), ("tf_keras", "1")])
def test_the_other_keras(own, use, run_python_as_it_is):
    """Tests that no model of the other Keras takes a layer in silence."""
    printed = run_python_as_it_is(ATTEMPT + WITH_BOTH, TF_USE_LEGACY_KERAS=use)
    lines = printed.splitlines()
    assert f"own {own}" in lines
    for name in ("functional", "second_argument", "eager", "in_graph"):
        (line,) = (line for line in lines if line.startswith(name))
        assert "Error" in line, line
        text = printed[printed.index(line) :].split("\nsequential")[0]
        assert "to be used with " + own in text
        assert "of " + ("tf_keras 2" if own == "keras" else "keras 3") in text
    (line,) = (line for line in lines if line.startswith("sequential"))
    assert "Error" in line
