# SPDX-License-Identifier: Apache-2.0
"""Makes the convolutions of a model deformable, in place."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    _adoption,
)
from tf_deform.layers._roi_layer import DisplacedROILayer
from tf_deform.layers._search import not_a_model
from tf_deform.models import _saving, _strides

_MOST_NAMES = 8
Select = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Change:
    """Describes a layer that became deformable.

    Attributes:
        path: The layer's path (on Keras 2 its name).
        stride: The stride of its output: pixels of the image in each
            direction for one of the map; 0 if it was not measured.
        kernel_size: Height and width of the kernel.
        weights: The number of weights of the branch.
    """

    path: str
    stride: int
    kernel_size: tuple[int, int]
    weights: int


@dataclasses.dataclass(frozen=True)
class Surgery:
    """Describes the result of `make_deformable`.

    Attributes:
        changed: The layers that became deformable.
        skipped: Path and reason of each convolution that was asked for and
            stayed as it was.
        weights: The number of weights before and after.
    """

    changed: tuple[Change, ...]
    skipped: tuple[tuple[str, str], ...]
    weights: tuple[int, int]

    def __str__(self) -> str:
        rows = [("layer", "stride", "kernel", "weights")]
        for one in self.changed:
            size = "x".join(map(str, one.kernel_size))
            stride = str(one.stride or "")
            rows.append((one.path, stride, size, f"+{one.weights:,}"))
        before, after = self.weights
        rows.append(
            (f"{len(self.changed)} layers", "", "", f"{before:,} -> {after:,}")
        )
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  "
            f"{row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}"
            for row in rows
        ]
        reasons = collections.defaultdict(list)
        for path, reason in self.skipped:
            reasons[reason].append(path)
        for reason, paths in reasons.items():
            lines.append(f"as they were: {_list(paths)}: {reason}")
        return "\n".join(lines)


def make_deformable(
    model: keras.Model,
    stages: str = "c3-c5",
    layers: str | Sequence[str] | Select | None = None,
    modulation: str | None = "2sigmoid",
    offset_groups: int = 1,
    boundary: str = "zeros",
    offset_dilation_rate: int | Sequence[int] | None = None,
    implementation: str = "native",
    verbose: bool = True,
) -> Surgery:
    """Makes convolutions of a model deformable, in place.

    Each chosen `Conv2D` becomes a `DeformableConv2D` with the same weights and
    a branch that starts at zero, so that the model computes what it computed
    before (with `modulation` None or "2sigmoid"), and trains, saves and exports
    as before. The objects stay the same: names, paths, flags of training,
    shared layers, models within models. Files of the model are loaded after
    `import tf_deform`.

        model = keras.applications.ResNet50()
        tf_deform.make_deformable(model)  # 13 layers, c3 to c5

    Load the weights of a plain model before the call, or with
    `tf_deform.load_plain_weights` after it. Compile after the call.

    Source of c3 to c5: Zhu et al. 2018, "Deformable ConvNets v2",
    arXiv:1811.11168, section 3.1.

    Args:
        model: A built model of the Keras that `tf.keras` is.
        stages: Layers by the stride of their output, which is measured: `cN`
            has stride `2 ** N`, in pixels of the image. "c5", "c3-c5" or "c4-"
            (c4 and coarser). Of a model with a `backbone`, as KerasHub's tasks
            are, the backbone alone is looked at; and of any model, the layers
            that come before its maps grow finer again.
        layers: In place of `stages`: a regular expression that is searched for
            in a layer's path, several of them, or a function from a layer to a
            bool.
        modulation, offset_groups, boundary: As in
            `tf_deform.layers.DeformableConv2D`.
        offset_dilation_rate, implementation: As in
            `tf_deform.layers.DeformableConv2D`.
        verbose: Whether to print the result.

    Returns:
        What was changed, and what was not, with the reason.

    Raises:
        TypeError: An argument has another type.
        ValueError: The model has no weights yet, or an optimizer with state;
            no layer is found; an option does not fit a layer. The model is then
            as it was.
    """
    check_model(model)
    options = dict(
        modulation=modulation,
        offset_groups=offset_groups,
        boundary=boundary,
        offset_dilation_rate=offset_dilation_rate,
        implementation=implementation,
    )
    DeformableConv2D(1, 2, **options)  # Checks the options, with any model.
    found = [
        x for x in _keras.flatten_layers(model) if _strides.is_convolution(x)
    ]
    strides: Mapping[int, Sequence[int]] = {}
    if layers is None:
        found, strides, candidates = _by_stage(model, stages, found)
        asked = f"stages={stages!r}"
    else:
        select = selector(layers, "layers")
        candidates = found
        found = [layer for layer in found if select(layer)]
        asked = f"layers={layers!r}"
    chosen, skipped = [], []
    for layer in found:
        reason = _adoption.why_not(layer)
        if reason is None and layers is None:
            reason = _too_large(layer)
        if reason is None:
            chosen.append(layer)
        else:
            skipped.append((_keras.path_of(layer), reason))
    if not chosen:
        raise ValueError(_nothing(model, asked, skipped, candidates, strides))
    for layer in chosen:
        _adoption.prepare(DeformableConv2D, layer, options)
    before = model.count_params()
    changed = []
    for layer in chosen:
        DeformableConv2D.adopt(layer, **options)
        weights = sum(math.prod(w.shape) for w in layer._branch().values())
        stride = 2 ** max(strides.get(id(layer), ()), default=-1)
        changed.append(
            Change(
                _keras.path_of(layer),
                int(stride),
                tuple(layer.kernel_size),
                weights,
            )
        )
    _saving.keep(model)
    _keras.forget_functions(model)
    report = Surgery(
        tuple(changed), tuple(skipped), (before, model.count_params())
    )
    if verbose:
        print(report)
    return report


def has_branch(layer: Any) -> bool:
    """Tells whether a layer learns displacements by weights of its own."""
    if isinstance(layer, DeformableConv2D):
        return layer.offset_kernel is not None
    kinds = (DisplacedROILayer, DeformablePSROIPooling)
    return isinstance(layer, kinds) and bool(_keras.own_variables(layer))


def selector(layers: Any, name: str) -> Select:
    """Returns a function that tells whether a layer is asked for.

    Raises:
        TypeError: `layers` is none of what it may be.
        ValueError: A text is not a regular expression.
    """
    if callable(layers):
        return layers
    texts = [layers] if isinstance(layers, str) else layers
    if not isinstance(texts, (list, tuple)) or not all(
        isinstance(text, str) for text in texts
    ):
        raise TypeError(
            f"Expected `{name}` to be a regular expression, several of them, "
            f"or a function of a layer. Received: {layers!r}"
        )
    try:
        patterns = [re.compile(text) for text in texts]
    except re.error as error:
        raise ValueError(
            f"Expected `{name}` to be regular expressions. Received: "
            f"{layers!r}: {error}"
        ) from error
    return lambda layer: any(
        pattern.search(_keras.path_of(layer)) for pattern in patterns
    )


def check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(not_a_model(model))
    if not model.built or not model.weights:
        raise ValueError(
            f"Expected `model` to be built. Received: {model.name!r}, which "
            f"has no weights{'' if model.built else ' yet'}. Call it on data "
            "first"
        )
    if _keras.is_optimizer_built(model):
        raise ValueError(
            "Expected `model` without a trained optimizer, which knows nothing "
            f"of new weights. Received: {model.name!r}, whose optimizer has "
            "taken steps. Compile it again, with a new optimizer, before this"
        )


def encoder_of(model: Any) -> Any:
    """Returns the part of a model that its stages are counted in."""
    for name in ("backbone", "image_encoder"):
        inner = getattr(model, name, None)
        if isinstance(inner, keras.Model):
            return encoder_of(inner)
    return model


def _by_stage(
    model: Any, stages: str, found: Sequence[Any]
) -> tuple[list[Any], dict[int, list[int]], list[Any]]:
    """Returns layers of stages, strides of all by id, and all in question."""
    wanted = _strides.parse(stages)
    if wanted is None:
        raise ValueError(
            'Expected `stages` like "c5", "c3-c5" or "c4-". Received: '
            f"{stages!r}"
        )
    strides = collections.defaultdict(list)
    outside = set()
    for call in _strides.measure(encoder_of(model)):
        strides[id(call.layer)].append(call.after)
        if not call.is_inside:
            outside.add(id(call.layer))
    candidates = [
        layer
        for layer in found
        if id(layer) in strides and id(layer) not in outside
    ]
    chosen = [
        layer
        for layer in candidates
        if all(level in wanted for level in strides[id(layer)])
    ]
    return chosen, strides, candidates


def _too_large(layer: Any) -> str | None:
    """Returns why a branch is not made unless its layer is named, or None."""
    channels = _adoption.input_channels(layer)
    if layer.groups == channels and channels > 1:
        return (
            "one filter for each channel, of which the branch would have many "
            "times the weights (to change it, name it in `layers`)"
        )
    return None


def _nothing(
    model: Any,
    asked: str,
    skipped: Sequence[tuple[str, str]],
    candidates: Sequence[Any],
    strides: Mapping[int, Sequence[int]],
) -> str:
    """Returns what to say where no layer can be changed."""
    parts = [f"{asked}, which finds none in {model.name!r}"]
    if skipped:
        shown = [f"{path}: {reason}" for path, reason in skipped]
        parts = [f"{asked}, of which {_list(shown)}"]
    able = [layer for layer in candidates if _adoption.why_not(layer) is None]
    names = []
    for layer in able:
        level = max(strides.get(id(layer), ()), default=None)
        stage = "" if level is None else f" (c{level})"
        names.append(f"{_keras.path_of(layer)}{stage}")
    parts.append(f"Layers that can be changed: {_list(names) or 'none'}")
    return "Expected a convolution to change. Received: " + ". ".join(parts)


def _list(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMES
    shown = ", ".join(texts[:_MOST_NAMES])
    return shown + (f" and {more} more" if more > 0 else "")
