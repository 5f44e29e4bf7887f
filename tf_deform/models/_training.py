# SPDX-License-Identifier: Apache-2.0
"""Chooses which weights of a deformable model are trained."""

from __future__ import annotations

import math
from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.models import _strides, _surgery


def train_only(
    model: keras.Model,
    what: str = "offsets",
    freeze_batch_norm: bool = True,
) -> list[keras.layers.Layer]:
    """Freezes all weights of a model but those that are named.

    Compile the model afterwards: a compiled one does not notice.

    Args:
        model: A built model.
        what: "offsets": the branches of deformable convolutions, and all
            weights of layers that pool regions, which are branches too. "all".
            A stage such as "c4-": the layers that come after the last one of
            c3, heads included (`make_deformable` says what a stage is); "c4" or
            "c3-c4" train these stages alone. Any other text is a regular
            expression that is searched for in a layer's path.
        freeze_batch_norm: Whether layers of normalization over batches stay
            frozen, which then use their moving averages, also in training.

    Returns:
        The layers that train some of their weights.

    Raises:
        TypeError: `model` is no model of this Keras, or `what` no text.
        ValueError: The model has no weights yet, or an optimizer with state;
            nothing is found. The model is then as it was.
    """
    _surgery.check_model(model)
    if not isinstance(what, str):
        raise TypeError(
            'Expected `what` to be "offsets", "all", a stage such as "c4-" or '
            f"a regular expression. Received: {what!r}"
        )
    layers = [model, *_keras.flatten_layers(model)]
    leaves = [x for x in layers if _keras.own_variables(x)]
    chosen = _chosen(model, what, leaves)
    if freeze_batch_norm:
        kind = keras.layers.BatchNormalization
        chosen = [layer for layer in chosen if not isinstance(layer, kind)]
    if not chosen:
        raise ValueError(
            f"Expected `what` to name layers with weights. Received: {what!r}, "
            f"which names none of the {len(leaves)} of model {model.name!r}"
        )
    ids = {id(layer) for layer in chosen}
    shut = [x for x in leaves if id(x) not in ids and _keras.sublayers(x)]
    if shut and any(
        id(inner) in ids for x in shut for inner in _keras.flatten_layers(x)
    ):
        names = ", ".join(repr(_keras.path_of(layer)) for layer in shut)
        raise ValueError(
            "Expected layers with weights of their own to be frozen with the "
            f"layers inside of them. Received: {what!r}, which leaves out "
            f"{names} alone. Name them too"
        )
    # Keras 3 on TensorFlow leaves the layers of a model as they are where its
    # flag does not change.
    model.trainable = False
    model.trainable = True
    for layer in leaves:
        if isinstance(layer, DeformableConv2D):
            layer.freeze_kernel = what == "offsets"
        if id(layer) not in ids:
            layer.trainable = False
    _keras.forget_functions(model)
    return chosen


def _chosen(model: Any, what: str, leaves: list[Any]) -> list[Any]:
    if what == "all":
        return leaves
    if what == "offsets":
        return [layer for layer in leaves if _surgery.has_branch(layer)]
    wanted = _strides.parse(what)
    if wanted is None:
        select = _surgery.selector(what, "what")
        return [layer for layer in leaves if select(layer)]
    calls = _strides.measure(_surgery.encoder_of(model))
    return _of_stages(wanted, calls, leaves)


def _of_stages(
    wanted: range, calls: list[_strides.Call], leaves: list[Any]
) -> list[Any]:
    """Returns the layers of stages, and those that follow an open range.

    A stage begins with the first convolution that is as coarse, and has the
    normalizations and activations that come before the next one.
    """
    stages: dict[int, float] = {}
    stage = 0
    for call in calls:
        if call.is_inside and _strides.is_convolution(call.layer):
            stage = max(stage, call.after)
        stages.setdefault(id(call.layer), stage if call.is_inside else math.inf)
    is_open = wanted.stop == _strides.OPEN
    return [
        layer
        for layer in leaves
        # Heads come after all stages, and need not work on maps.
        if (level := stages.get(id(layer), math.inf)) in wanted
        or (is_open and level >= wanted.start)
    ]
