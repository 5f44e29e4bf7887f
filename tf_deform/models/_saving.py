# SPDX-License-Identifier: Apache-2.0
"""Keeps deformable layers in files of models that make their own layers.

A functional or sequential model is saved with its layers. A subclassed model,
one of KerasHub, or a layer with layers inside is saved by the arguments of its
constructor, which would make plain layers again. Its object therefore changes
its class, to a subclass of the same name whose config holds the plain one's and
a list of the layers that are deformable or dilated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D

_NAME = "Deformed"
REGISTERED_NAME = f"tf_deform>{_NAME}"
# What `adopt` is told of a layer.
_OPTIONS = (
    "modulation",
    "offset_groups",
    "boundary",
    "offset_dilation_rate",
    "implementation",
    "freeze_kernel",
)


def keep(model: Any) -> None:
    """Makes the files of a model, and of all models in it, hold its layers."""
    for holder in _holders(model):
        if not _saves_its_layers(holder):
            mark(holder)


def mark(holder: Any) -> None:
    """Changes the class of a model or layer."""
    if not is_marked(holder):
        object.__setattr__(holder, "__class__", _subclass(type(holder)))


def is_marked(holder: Any) -> bool:
    """Tells whether `mark` has changed the class of a model or layer."""
    return isinstance(holder, _Deformed)


def _holders(layer: Any) -> Iterator[Any]:
    """Yields the models and layers that hold deformable layers."""
    inside = _keras.flatten_layers(layer)
    for one in [layer, *inside]:
        found = _keras.flatten_layers(one)
        if any(isinstance(each, DeformableConv2D) for each in found):
            yield one


def _saves_its_layers(layer: Any) -> bool:
    kind = type(layer)
    stock = (keras.Model, keras.Sequential, _keras.Functional)
    # A wrapper's config holds its layer.
    return kind in stock or isinstance(layer, keras.layers.Wrapper)


def _convolutions(layer: Any) -> list[Any]:
    """Returns what may be deformable, in an order that a new model has too.

    Names are neither unique nor the same in a new model.
    """
    return [
        each
        for each in _keras.flatten_layers(layer)
        if type(each) is keras.layers.Conv2D
        or isinstance(each, DeformableConv2D)
    ]


@keras.saving.register_keras_serializable(package="tf_deform", name=_NAME)
class _Deformed:
    """Saves a model or layer as what it was, with a list of its layers.

    Every subclass is registered by the same name, so that a new process, which
    has made none of them, finds this class.
    """

    _base: type

    def get_config(self) -> dict[str, Any]:
        # Serializes this object as if its class had not changed.
        plain = object.__new__(type(self)._base)
        vars(plain).update(vars(self))
        saved = keras.saving.serialize_keras_object(plain)
        saved.pop("compile_config", None)  # which this object's config has
        layers = _convolutions(self)
        changed = {
            str(index): found
            for index, layer in enumerate(layers)
            if (found := _describe(layer)) is not None
        }
        return {"plain": saved, "count": len(layers), "changed": changed}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        config = dict(config)
        count, changed = config.pop("count"), config.pop("changed")
        plain = dict(config.pop("plain"))
        # Who loads a preset may give other arguments of the plain model.
        plain["config"] = {**plain["config"], **config}
        made = keras.saving.deserialize_keras_object(
            plain, custom_objects=custom_objects
        )
        layers = _convolutions(made)
        changed = {int(index): each for index, each in changed.items()}
        problem = _misfit(made, layers, count, changed)
        if problem:
            raise ValueError(
                f"Expected model or layer {made.name!r} of the file to have "
                f"{count} convolutions, as when it was saved, "
                f"{len(changed)} of them changed. Received: {problem}. "
                "The code that makes it, or its package, has changed"
            )
        for index, each in changed.items():
            layer = layers[index]
            if each["options"] and not isinstance(layer, DeformableConv2D):
                DeformableConv2D.adopt(layer, **each["options"])
            layer.dilation_rate = tuple(each["dilation_rate"])
            if each["options"]:
                layer._set_flags(each.get("trainable"))
        keep(made)
        return made


def _describe(layer: Any) -> dict[str, Any] | None:
    """Returns what a plain model's file does not say of a convolution."""
    is_deformable = isinstance(layer, DeformableConv2D)
    if not is_deformable and tuple(layer.dilation_rate) == (1, 1):
        return None
    config = layer.get_config() if is_deformable else {}
    return {
        "kernel_size": list(layer.kernel_size),
        "filters": layer.filters,
        "dilation_rate": list(layer.dilation_rate),
        "options": {name: config[name] for name in _OPTIONS if name in config},
        "trainable": layer._flags() if is_deformable else None,
    }


def _misfit(
    made: Any, layers: list[Any], count: int, changed: dict[int, Any]
) -> str | None:
    if len(layers) != count:
        built = "" if made.built else ", in a model that is not built"
        return f"{len(layers)}{built}"
    for index, each in changed.items():
        layer = layers[index]
        size, filters = tuple(each["kernel_size"]), each["filters"]
        if not layer.built:
            return f"layer {layer.name!r} without weights"
        if (tuple(layer.kernel_size), layer.filters) != (size, filters):
            return (
                f"for a kernel of {size} and {filters} filters, layer "
                f"{layer.name!r} with {tuple(layer.kernel_size)} and "
                f"{layer.filters}"
            )
    return None


@functools.cache
def _subclass(base: type) -> type:
    """Makes the subclass of a model's or layer's class, once."""
    body = {
        "_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    made = type(base.__name__, (_Deformed, base), body)
    register = keras.saving.register_keras_serializable("tf_deform", _NAME)
    return register(made)
