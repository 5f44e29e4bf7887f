# SPDX-License-Identifier: Apache-2.0
"""Finds the deformable convolutions of a model."""

from __future__ import annotations

from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers.deformable_conv2d import DeformableConv2D


def deformable_layers(model: keras.layers.Layer) -> list[DeformableConv2D]:
    """Returns the deformable convolutions of a model, in its order.

    Layers within layers and models are among them, each once.

    Args:
        model: A model or layer.

    Returns:
        The layers.

    Raises:
        TypeError: `model` is no layer or model of the Keras that `tf.keras` is.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(not_a_model(model))
    found = [model, *_keras.flatten_layers(model)]
    return [layer for layer in found if isinstance(layer, DeformableConv2D)]


def not_a_model(model: Any) -> str:
    """Returns what to say of what is no model of the right Keras."""
    return (
        f"Expected `model` to be a model of {keras.__name__} "
        f"{keras.__version__}, which is TensorFlow's `tf.keras`. Received: "
        f"{str(model)[:80]} of type {type(model).__module__}."
        f"{type(model).__qualname__}"
    )
