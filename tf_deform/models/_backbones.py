# SPDX-License-Identifier: Apache-2.0
"""Makes networks whose maps detectors and segmenters are built upon."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_deform import _files, _keras, _plain_weights
from tf_deform._keras import keras

# Pixels, of sizes that a model leaves open.
_SIZE = 256
_LEVELS = (2, 3, 4, 5)  # binary logarithms of the strides of P2 to P5


def backbone(
    name_or_model: str | keras.Model,
    weights: str | os.PathLike | None = None,
    image_size: int | None = None,
) -> keras.Model:
    """Makes a network from images to maps of strides 4, 8, 16 and 32.

        backbone = tf_deform.models.backbone("resnet50", "imagenet", 640)
        tf_deform.make_deformable(backbone, "c3-c5")
        tf_deform.train_only(backbone, "c3-")  # stem and batch norm frozen

    The maps are those that all finer information passes through: the last of
    each stride beside which no connection leads. Strides are measured, so any
    network will do that grows coarser step by step. A network that gives one
    cell less at a border, because it does not pad, has its maps padded with
    zeros, so that P3 of an image of 640 pixels has 80 cells.

    Args:
        name_or_model: The name of a network of `keras.applications`, such as
            "resnet50", "resnet50v2", "densenet121" or "efficientnetv2b0", in
            any case; its maps are made from RGB in 0..255 by what the network
            expects. Or a functional model of one image, for instance a
            backbone of KerasHub: the result has its layers, not copies, and
            takes images as the model does. Its maps are its `pyramid_outputs`;
            or its outputs, if they are named "P2" to "P5"; or are found as
            above.
        weights: None or "none": random ones, or those of the given model.
            "imagenet": those of `keras.applications`, which are downloaded
            once. Or a file of weights of the same network, with or without its
            top of dense layers: `.weights.h5`, `.keras`, `.h5`.
        image_size: Height and width of the images, in pixels. None: any, or
            those of the given model.

    Returns:
        A functional model from `(batch, image_size, image_size, 3)` to a
        dictionary of maps, "P2" of stride 4 to "P5" of stride 32, as far as the
        network has them.

    Raises:
        TypeError: `name_or_model` is neither a name nor a model.
        ValueError: There is no such network, or it has no such maps;
            `weights` do not fit; `image_size` is not that of the model.
        OSError: The weights cannot be downloaded, or the file not be read. The
            text says which file belongs where.
    """
    if image_size is not None and (
        isinstance(image_size, bool)
        or not isinstance(image_size, (int, np.integer))
        or image_size < 1
    ):
        raise ValueError(
            "Expected `image_size` to be a number of pixels, or None. "
            f"Received: {image_size!r}"
        )
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            'Expected keras.config.image_data_format() to be "channels_last". '
            f"Received: {keras.config.image_data_format()!r}"
        )
    if weights == "none":
        weights = None
    if isinstance(name_or_model, str):
        network = _application(name_or_model, weights, image_size)
    elif isinstance(name_or_model, keras.Model):
        network = name_or_model
        if weights == "imagenet":
            raise ValueError(
                'Expected "imagenet" with the name of a network. Received: '
                f"model {network.name!r}. Give a file of weights"
            )
    else:
        raise TypeError(
            "Expected `name_or_model` to be the name of a network of "
            "keras.applications or a keras.Model. Received: "
            f"{name_or_model!r:.80} of type {type(name_or_model).__name__}"
        )
    if weights not in (None, "imagenet"):
        _load(network, weights)
    return _with_size(_pyramid(network), image_size)


def _networks() -> dict[str, Callable[..., keras.Model]]:
    """Returns the functions of `keras.applications` by their names."""
    return {
        _plain(name): function
        for name, function in vars(keras.applications).items()
        if callable(function)
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _application(
    name: str, weights: Any, image_size: int | None
) -> keras.Model:
    """Makes a network of `keras.applications`, with its preprocessing."""
    networks = _networks()
    make = networks.get(_plain(name))
    if make is None:
        raise ValueError(
            f"Expected a network of keras.applications: "
            f"{', '.join(sorted(networks))}. Received: {name!r}"
        )
    image = keras.Input((image_size, image_size, 3), name="image")
    x = _preprocess(image, sys.modules[make.__module__].preprocess_input)
    options = {"include_top": False, "input_tensor": x}
    if weights != "imagenet":
        return make(weights=None, **options)
    with _keras.downloads() as asked:
        try:
            return make(weights="imagenet", **options)
        except Exception as error:
            if not asked:
                raise
            file, url, folder, sum_ = asked[-1]
            raise OSError(
                f"Expected the ImageNet weights of {name!r} at "
                f"{os.path.join(folder, file)}, or to download them from "
                f"{url}. Received: {error}. Put that file there (its MD5 or "
                f"SHA-256 sum is {sum_}), or give a file of weights: "
                "`weights=FILE`, on the command line `--weights FILE`. Or take "
                "a network of your own (`--backbone FILE`), or begin with "
                "random weights (`weights=None`, `--weights none`)"
            ) from error


def _preprocess(image: Any, preprocess_input: Callable[..., Any]) -> Any:
    """Applies what a network expects to RGB in 0..255.

    The function of `keras.applications` is measured: it may put channels in
    another order, and then scales and shifts each.
    """
    black = np.ravel(preprocess_input(np.zeros((1, 1, 1, 3))))
    primaries = 255 * np.eye(3)[:, None, None]
    change = preprocess_input(primaries).reshape(3, 3) - black
    order = np.argmax(change, 0)  # of each output, its input
    scale = change[order, range(3)] / 255
    if list(order) == [2, 1, 0]:
        image = keras.ops.flip(image, -1)
    elif list(order) != [0, 1, 2]:
        raise AssertionError(f"channels in the order {order}")
    if np.all(scale == 1) and not np.any(black):
        return image
    # 16 bits would round pixels.
    return keras.layers.Rescaling(
        scale.tolist(), black.tolist(), dtype="float32", name="preprocess"
    )(image)


def _load(network: keras.Model, weights: str | os.PathLike) -> None:
    """Loads a file of the network, or of the same one with its top."""
    path = _files.to_path(weights)
    try:
        _plain_weights.load(network, path, without_top=True)
    except ValueError as error:
        if path.suffix != ".h5" or path.name.endswith(".weights.h5"):
            raise
        try:  # Keras 1 had other names of weights.
            network.load_weights(path)
        except Exception:
            raise error from None


def _pyramid(network: keras.Model) -> keras.Model:
    """Makes a model of the network's maps, which shares its layers."""
    if isinstance(network, keras.Sequential) and network.built:
        network = keras.Model(
            network.inputs, network.outputs[0], name=network.name
        )
    if not isinstance(network, _keras.Functional):
        raise ValueError(
            "Expected a functional model, whose layers' outputs are known. "
            f"Received: {network.name!r} of the class {type(network).__name__}"
        )
    if len(network.inputs) != 1 or len(network.inputs[0].shape) != 4:
        shapes = [tuple(each.shape) for each in network.inputs]
        raise ValueError(
            "Expected a model of one image, (batch, height, width, channels). "
            f"Received: {network.name!r}, whose inputs have the shapes {shapes}"
        )
    names = [f"P{level}" for level in _LEVELS]
    given = getattr(network, "pyramid_outputs", None) or network.output
    if isinstance(given, dict) and set(given) & set(names):
        maps = {name: given[name] for name in names if name in given}
    else:
        maps = {f"P{level}": map_ for level, map_ in _find(network).items()}
    return keras.Model(network.inputs[0], maps, name=network.name)


def _find(network: keras.Model) -> dict[int, Any]:
    """Finds the last map of each stride that no connection leads around.

    Returns:
        Symbolic tensors by the binary logarithms of their strides.
    """
    (image,) = network.inputs
    calls = _keras.nodes_of(network)
    tensors = [each for _, outputs in calls for each in outputs]
    size = [pixels or _SIZE for pixels in image.shape[1:3]]
    sizes = _sizes(image, tensors, size)
    levels = {id(image): 0}
    reach = 0  # the last call that reads what is made so far
    readers = {
        id(each): index
        for index, (inputs, _) in enumerate(calls)
        for each in inputs
    }
    found: dict[int, Any] = {}
    for index, (inputs, outputs) in enumerate(calls):
        is_only = reach <= index
        reach = max([reach, *(readers.get(id(each), 0) for each in outputs)])
        first = next((each for each in inputs if id(each) in levels), None)
        (made, *others) = outputs
        if others or first is None or sizes[id(made)] is None:
            continue
        before, after = (max(sizes[id(each)]) for each in (first, made))
        level = levels[id(first)] + round(math.log2(before / max(after, 1)))
        levels[id(made)] = level
        if is_only and level in _LEVELS:
            known = found.get(level)
            # A larger map has a border, for a convolution that follows.
            if known is None or sizes[id(known)] >= sizes[id(made)]:
                found[level] = made
    if not found:
        raise ValueError(
            "Expected a network with maps of a stride of 4, 8, 16 or 32, "
            f"around which nothing leads. Received: {network.name!r}, which "
            "has none"
        )
    return dict(sorted(found.items()))


def _sizes(
    image: Any, tensors: list[Any], size: list[int]
) -> dict[int, tuple[int, int] | None]:
    """Returns heights and widths by the tensors' ids; None of what is no map.

    Args:
        image: The symbolic image.
        tensors: Symbolic tensors that depend on it.
        size: Height and width of the image.
    """
    spec = keras.KerasTensor((1, *size, image.shape[3]), image.dtype)
    known = keras.Function([image], tensors).compute_output_spec([spec])
    return {
        id(tensor): tuple(each.shape[1:3]) if len(each.shape) == 4 else None
        for tensor, each in zip([image, *tensors], [spec, *known])
    }


def _with_size(network: keras.Model, image_size: int | None) -> keras.Model:
    """Makes a model of images of a size, whose maps have all their cells."""
    (image,) = network.inputs
    given = tuple(image.shape[1:3])
    size = given if image_size is None else (image_size, image_size)
    if None not in given and given != size:
        raise ValueError(
            f"Expected `image_size` to be that of model {network.name!r}, "
            f"{given}. Received: {image_size}"
        )
    outputs = network.output
    if given != size:
        image = keras.Input((*size, image.shape[3]), name="image")
        outputs = network(image)
    if None not in size:
        outputs = {
            name: _fit(map_, name, size) for name, map_ in outputs.items()
        }
    return keras.Model(image, outputs, name=network.name)


def _fit(map_: Any, name: str, size: tuple[int, int]) -> Any:
    """Pads a map whose borders are missing, evenly."""
    stride = 2 ** int(name[1:])
    cells = map_.shape[1:3]
    # A stage may have been dilated, and its map be finer than its name says.
    while stride > 1 and any(
        have > math.ceil(pixels / stride) for pixels, have in zip(size, cells)
    ):
        stride //= 2
    missing = [
        math.ceil(pixels / stride) - have for pixels, have in zip(size, cells)
    ]
    if max(missing) <= 0:
        return map_
    sides = [(count // 2, count - count // 2) for count in missing]
    return keras.layers.ZeroPadding2D(sides, name=f"{name}_border")(map_)
