# SPDX-License-Identifier: Apache-2.0
"""Turns a built `Conv2D` into a `DeformableConv2D`, in place."""

from __future__ import annotations

from typing import Any

from tf_deform import _keras
from tf_deform._keras import keras

# What a deformable layer has, and a plain one has not.
_OWN = (
    "padding",
    "dilation_rate",
    "offset_groups",
    "modulation",
    "boundary",
    "offset_dilation_rate",
    "implementation",
    "supports_jit",
)


def why_not(layer: Any) -> str | None:
    """Returns why a layer cannot be changed with the same results, or None."""
    kind = type(layer).__name__
    if hasattr(layer, "offset_groups"):
        return "deformable already"
    if not isinstance(layer, keras.layers.Conv2D) or isinstance(
        layer, (keras.layers.DepthwiseConv2D, keras.layers.Conv2DTranspose)
    ):
        return f"a {kind}, not a Conv2D"
    if type(layer) is not keras.layers.Conv2D:
        return f"a {kind}, a subclass of Conv2D that may compute otherwise"
    if not layer.built:
        return "no weights yet"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantized ({layer.quantization_mode})"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled, which has to come after the branch"
    if tuple(layer.kernel_size) == (1, 1):
        return "a kernel of one tap, whose place is no shape to learn"
    return None


def input_channels(conv: Any) -> int:
    """Returns the number of channels that a built convolution reads."""
    return int(conv.kernel.shape[2]) * conv.groups


def prepare(kind: type, conv: Any, options: dict[str, Any]) -> Any:
    """Checks that a layer can be changed; returns what it will be, unbuilt.

    Raises:
        TypeError: An option has another type.
        ValueError: The layer cannot be changed, or an option does not fit.
    """
    reason = why_not(conv)
    if reason is not None:
        raise ValueError(
            "Expected a built keras.layers.Conv2D with a kernel of several "
            f"taps. Received: layer {getattr(conv, 'name', conv)!r}: {reason}"
        )
    config = conv.get_config()
    twin = kind.from_config({**config, "name": f"{conv.name}_", **options})
    channels = input_channels(conv)
    if channels % twin.offset_groups:
        raise ValueError(
            "Expected `offset_groups` to divide the input channels of layer "
            f"{conv.name!r}. Received: offset_groups={twin.offset_groups}, "
            f"{channels} channels"
        )
    return twin


def adopt(kind: type, conv: Any, options: dict[str, Any]) -> Any:
    """Implements `DeformableConv2D.adopt`."""
    twin = prepare(kind, conv, options)
    channels = input_channels(conv)
    # Keras saves no flags of variables; those of the kernel are kept.
    weights = [conv.kernel] + [conv.bias] * conv.use_bias
    frozen = not any(_keras.is_trainable(conv, weight) for weight in weights)
    _keras.change_class(conv, kind, twin)
    for name in _OWN:
        setattr(conv, name, getattr(twin, name))
    conv._freeze_kernel = twin.freeze_kernel or (conv.trainable and frozen)
    with _keras.unlocked(conv):
        conv._build_branch(channels)
    for weight in conv._branch().values():
        _keras.set_trainable(weight, conv.trainable)
    conv._track_kernel()
    shape = (None, None, None, channels)
    conv._keep_shapes(inputs_shape=conv._to_data_format(shape))
    if conv.freeze_kernel:
        conv._apply_freeze()
    return conv
