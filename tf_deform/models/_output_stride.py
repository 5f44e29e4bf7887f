# SPDX-License-Identifier: Apache-2.0
"""Makes models whose maps stay finer, for segmentation."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.models import _saving, _strides, _surgery

_HUB = "stackwise_num_strides"  # an argument of KerasHub's residual networks


def set_output_stride(model: keras.Model, output_stride: int) -> keras.Model:
    """Makes a model with the same weights whose coarsest maps are finer.

    Layers that would go beyond the stride get stride 1, and what follows them
    is dilated, so that every tap reads what it read before: at every cell that
    the old map had, the new one has the same value where no border is near.

        backbone = keras.applications.ResNet50(include_top=False)
        backbone = tf_deform.set_output_stride(backbone, 16)
        tf_deform.make_deformable(backbone, "c4-c5", offset_dilation_rate=1)

    Source: Chen et al. 2017, "Rethinking Atrous Convolution", arXiv:1706.05587,
    section 3.1.

    Args:
        model: A functional or sequential model, functional models in it
            included, or a residual network of KerasHub; not deformable yet:
            this comes first, and then `make_deformable`.
        output_stride: 16 or 8: pixels of the image for one of the coarsest
            map, in each direction.

    Returns:
        A new model, not compiled. `model` stays as it is.

    Raises:
        TypeError: `model` is no model of this Keras.
        ValueError: `output_stride` is another number, the model is of another
            kind, is no coarser, has layers that cannot be dilated, as
            deformable ones, or is one of KerasHub's that is deformable or
            dilated already.
    """
    _surgery.check_model(model)
    if isinstance(output_stride, bool) or output_stride not in (8, 16):
        raise ValueError(
            f"Expected `output_stride` to be 16 or 8. Received: {output_stride}"
        )
    level = {8: 3, 16: 4}[output_stride]
    if _saving.is_marked(model):
        raise ValueError(
            "Expected `model` as its class makes it, before `set_output_stride`"
            " and `make_deformable`, in this order. Received: "
            f"{model.name!r}, a {type(model).__name__} whose convolutions are "
            "deformable or dilated already. Make the model anew, call "
            "`set_output_stride` once, and then `make_deformable`"
        )
    is_hub = _HUB in _arguments(model)
    if not is_hub and not _is_functional(model):
        raise ValueError(
            "Expected `model` to be functional or sequential, with all its "
            "layers, or a residual network of KerasHub. Received: "
            f"{model.name!r} of the class {type(model).__name__}. Give the "
            "backbone of a larger model, before `make_deformable`"
        )
    calls = _strides.measure(model)
    if max((call.after for call in calls), default=0) <= level:
        raise ValueError(
            f"Expected `model` to be coarser than output_stride={output_stride}"
            f". Received: {model.name!r}, whose coarsest stride is "
            f"{2 ** max((call.after for call in calls), default=0)}"
        )
    if is_hub:
        return _rebuild_hub(model, calls, level)
    changes = _changes(calls, level)
    config = _edit(model, model.get_config(), changes)
    try:
        made = type(model).from_config(config)
        made.set_weights(model.get_weights())
    except Exception as error:
        raise ValueError(
            "Expected `model` to consist of layers that can be dilated. "
            f"Received: {model.name!r}: {error}"
        ) from error
    return made


def _arguments(model: Any) -> Mapping[str, Any]:
    try:
        return model.get_config()
    except NotImplementedError:
        return {}


def _is_functional(model: Any) -> bool:
    """Tells whether a model's config holds all layers that have strides."""
    if type(model) not in (
        keras.Model,
        keras.Sequential,
        _keras.Functional,
    ):
        return False
    return all(
        _is_functional(layer)
        for layer in model.layers
        if isinstance(layer, keras.Model)
        or any(map(_strides.is_convolution, _keras.flatten_layers(layer)))
    )


def _changes(
    calls: Sequence[_strides.Call], level: int
) -> dict[int, dict[str, Any]]:
    """Returns new arguments of layers by the layers' ids."""
    changes: dict[int, dict[str, Any]] = {}
    for call in calls:
        layer, factor = call.layer, 2 ** max(0, call.before - level)
        found: dict[str, Any] = {}
        if call.after > max(call.before, level):
            found = _without_strides(layer, call)
            changes.update(_centred(call, factor))
        elif factor == 1:
            continue
        if isinstance(layer, keras.layers.ZeroPadding2D) and factor > 1:
            found["padding"] = [
                [factor * pixels for pixels in side] for side in layer.padding
            ]
        elif isinstance(layer, DeformableConv2D) and factor > 1:
            raise _cannot(
                layer,
                "whose displacements would be as many pixels of a finer map, "
                "and so look less far. Call `set_output_stride` first, and "
                "then `make_deformable`",
            )
        elif _strides.is_convolution(layer) and factor > 1:
            found["dilation_rate"] = [factor * x for x in layer.dilation_rate]
        elif hasattr(layer, "pool_size") and factor > 1:
            if max(layer.pool_size) > 1:
                raise _cannot(layer, "which cannot be dilated")
        if found and changes.setdefault(id(layer), found) != found:
            raise _cannot(layer, "which works at several strides")
    return changes


def _without_strides(layer: Any, call: _strides.Call) -> dict[str, Any]:
    if _keras.sublayers(layer):
        return {}  # Its layers are looked at.
    strides = getattr(layer, "strides", None)
    if strides is None:
        raise _cannot(layer, "which makes maps coarser in another way")
    factor = 2 ** (call.after - call.before)
    if set(_pair(strides)) != {factor} or call.after - call.before != 1:
        raise _cannot(layer, f"with strides {strides}, not 2")
    found: dict[str, Any] = {"strides": 1}
    is_pool = hasattr(layer, "pool_size") and max(_pair(layer.pool_size)) > 1
    # ConvNeXt cuts maps into squares: the last cells lack a part of theirs.
    is_cut = getattr(layer, "kernel_size", None) == (factor, factor)
    if is_pool or is_cut:
        found["padding"] = "same"
    return found


def _centred(call: _strides.Call, factor: int) -> dict[int, dict[str, Any]]:
    """Returns what pads the input of a layer that loses its strides.

    MobileNet and EfficientNet pad even maps at the end alone, by as much as
    strides of 2 need: without strides, a cell would be missing.
    """
    source = call.source
    if not isinstance(source, keras.layers.ZeroPadding2D):
        return {}
    if not _strides.is_convolution(call.layer) or all(
        first == last for first, last in source.padding
    ):
        return {}
    sizes = [
        factor * rate * (size - 1)
        for rate, size in zip(
            _pair(call.layer.dilation_rate), call.layer.kernel_size
        )
    ]
    return {id(source): {"padding": [[n // 2, n - n // 2] for n in sizes]}}


def _pair(value: Any) -> Sequence[int]:
    return value if isinstance(value, (tuple, list)) else (value, value)


def _cannot(layer: Any, reason: str) -> ValueError:
    return ValueError(
        "Expected `model` to grow coarser by convolutions and pooling of "
        f"strides 2, and then to have convolutions alone. Received: layer "
        f"{_keras.path_of(layer)!r}, a {type(layer).__name__}, {reason}"
    )


def _edit(
    model: Any, config: dict[str, Any], changes: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    """Returns a model's config with other arguments of layers."""
    config = copy.deepcopy(config)
    by_name = {layer.name: layer for layer in model.layers}
    for entry in config["layers"]:
        layer = by_name.get(entry["config"].get("name"))
        if layer is None:
            continue
        entry.pop("build_config", None)  # It has the old shapes.
        if isinstance(layer, keras.Model):
            entry["config"] = _edit(layer, entry["config"], changes)
        else:
            inner = getattr(layer, "layer", layer)  # of a wrapper
            part = entry["config"]
            if inner is not layer:
                part = part["layer"]["config"]
            part.update(changes.get(id(inner), {}))
    return config


def _rebuild_hub(model: Any, calls: Sequence[_strides.Call], level: int) -> Any:
    """Makes a residual network of KerasHub, and dilates its convolutions."""
    config = model.get_config()
    strides = list(config[_HUB])
    coarsest = max(call.after for call in calls)
    stage = len(strides)
    while coarsest > level and stage > 0:
        stage -= 1
        if strides[stage] == 2:
            strides[stage] = 1
            coarsest -= 1
    config[_HUB] = strides
    made = type(model).from_config(config)
    made.set_weights(model.get_weights())
    factors = {
        id(call.layer): 2 ** max(0, call.before - level) for call in calls
    }
    # Layers that pad come and go with strides.
    old, new = (
        [x for x in _keras.flatten_layers(each) if _strides.is_convolution(x)]
        for each in (model, made)
    )
    for one, other in zip(old, new):
        factor = factors.get(id(one), 1)
        if factor > 1:
            other.dilation_rate = tuple(factor * x for x in one.dilation_rate)
    _saving.mark(made)
    return made
