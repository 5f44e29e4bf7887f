# SPDX-License-Identifier: Apache-2.0
"""Makes plain models with deformable twins, and files of their weights."""

import contextlib

import h5py
import numpy as np
import pytest
from operands import random

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D

FILES = ("weights.h5", "weights.json", "keras", "h5", "legacy weights")
# Files of Keras 2 and the first Keras 3, and of Keras 2.13.
WITHOUT_NAMES = ("no names", "2.13")
layers = keras.layers


def save(model, folder, kind="weights.h5"):
    """Saves a model, or its weights, as a user would."""
    path = folder / f"plain.{kind}"
    if kind in WITHOUT_NAMES:
        path = save(model, folder)
        with h5py.File(path, "a") as file:
            without_names(file)
            for outer in ("layers/functional/", "") if kind == "2.13" else ():
                old, new = "layers", "_layer_checkpoint_dependencies"
                file.move(outer + old, outer + new)
    elif kind == "weights.json":
        largest = max(weight.numpy().nbytes for weight in model.weights)
        model.save_weights(path, max_shard_size=1.01 * largest / 2**30)
    elif kind == "weights.h5":
        model.save_weights(path)
    elif kind == "legacy weights":  # Keras 2's `save_weights` wrote this kind.
        whole = folder / "whole.h5"
        model.save(whole)
        path = folder / "plain.h5"
        with h5py.File(whole) as old, h5py.File(path, "w") as new:
            for name in old["model_weights"]:
                old.copy(f"model_weights/{name}", new)
            new.attrs.update(old["model_weights"].attrs)
    else:
        model.save(path)
    return path


def without_names(file):
    groups = []
    file.visititems(lambda _, item: groups.append(item))
    for item in groups:
        item.attrs.pop("name", None)
    # Keras 2 saved these names as well.
    file["metrics/mean/vars/0"] = np.float32(3)
    file["optimizer/vars/0"] = np.int64(3)


def fill(model, seed=0):
    """Sets numbers that all differ, so that none can be taken for another."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 0.5, weight.shape))
    return model


def values(model):
    return [weight.numpy() for weight in model.weights]


def chain(layer, name):
    """Makes convolutions of one shape, which only names or order tell apart."""
    kinds = [layers.Conv2D, layer] * 2 + [layers.Conv2D]
    return [
        kind(4, 3, padding="same", name=name(letter))
        for kind, letter in zip(kinds, "abcde")
    ]


def make_chain(layer, name):
    image = x = keras.Input((7, 8, 4))
    for each in chain(layer, name):
        x = each(x)
    return keras.Model(image, x)


def make_sequential(layer, name):
    return keras.Sequential([keras.Input((7, 8, 4)), *chain(layer, name)])


def make_residual(layer, name):
    """Makes blocks like ResNet's: shortcuts with layers, normalised."""
    image = x = keras.Input((7, 8, 4))
    for block in range(3):
        short = x
        if block != 1:
            short = layers.Conv2D(4, 1, name=name(f"{block}_0"))(x)
            short = layers.BatchNormalization(name=name(f"{block}_0_bn"))(short)
        kind = layer if block else layers.Conv2D
        y = kind(4, 3, padding="same", use_bias=False, name=name(f"{block}_1"))
        y = layers.BatchNormalization(name=name(f"{block}_1_bn"))(y(x))
        y = layers.Conv2D(4, 1, name=name(f"{block}_2"))(layers.ReLU()(y))
        x = layers.ReLU()(layers.Add()([short, y]))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Dense(3, name=name("head"))(x))


def make_nested(layer, name):
    """Makes models in models, with two of the same names inside."""
    inner = []
    for each in ("first", "second"):
        image = x = keras.Input((7, 8, 4))
        for part in chain(layer, name)[:3]:
            x = layers.BatchNormalization(name=name(f"{part.name}_bn"))(part(x))
        inner.append(keras.Model(image, x, name=each))
    outer = keras.Sequential([keras.Input((7, 8, 4)), inner[1]], name="outer")
    image = keras.Input((7, 8, 4))
    x = layer(4, 1, name=name("a"))(inner[0](image))
    return keras.Model(image, outer(x))


def make_shared(layer, name):
    image = keras.Input((7, 8, 4))
    one, two = chain(layer, name)[1:3]
    return keras.Model(image, one(two(one(image))) + two(image))


def make_wrapped(layer, name):
    """Makes layers in layers, of many kinds."""
    image = keras.Input((2, 7, 8, 4))
    inner = layer(4, 3, padding="same", name=name("inner"))
    x = layers.TimeDistributed(inner, name=name("each"))(image)
    depthwise = layers.DepthwiseConv2D(3, name=name("depthwise"))
    x = layers.TimeDistributed(depthwise, name=name("second"))(x)
    separable = layers.SeparableConv2D(4, 3, name=name("separable"))
    x = layers.TimeDistributed(separable, name=name("third"))(x)
    x = layers.Reshape((2, -1))(x)
    lstm = layers.LSTM(3, return_sequences=True, name=name("lstm"))
    x = layers.Bidirectional(lstm, name=name("both"))(x)
    x = layers.MultiHeadAttention(2, 3, name=name("attention"))(x, x)
    return keras.Model(image, layers.LayerNormalization(name=name("norm"))(x))


class Subclassed(keras.Model):
    """Holds layers as attributes, in lists and dictionaries; has a weight."""

    def __init__(self, layer, name):
        super().__init__()
        parts = chain(layer, name)
        self.stem = parts[1]
        self.blocks = [parts[0], parts[3]]
        self.more = {"one": parts[2], "two": [parts[4]]}
        self.deformable = layer(4, 1, name=name("f"))

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(4,))
        super().build(shape)

    def call(self, x):
        x = self.blocks[1](self.blocks[0](self.stem(x))) * self.factor
        return self.deformable(self.more["two"][0](self.more["one"](x)))


def make_subclassed(layer, name):
    model = Subclassed(layer, name)
    model(np.zeros((1, 7, 8, 4), "float32"))
    return model


MAKERS = [make_chain, make_sequential, make_residual, make_nested]
MAKERS += [make_shared, make_wrapped, make_subclassed]


def named(name):
    return name


def unnamed(name):
    return None


def plain_and_twin(folder, make=make_chain, name=named, kind="weights.h5"):
    """Returns a plain model, its file, and a deformable twin of new weights."""
    plain = fill(make(layers.Conv2D, name))
    return plain, save(plain, folder, kind), make(DeformableConv2D, name)


def assert_is_twin(model, plain):
    """Checks that outputs are the same, and that branches are zero."""
    shape = getattr(plain, "input_shape", None) or (1, 7, 8, 4)
    image = random(2, *shape[1:])
    expected = plain(image).numpy()
    # Sums of numbers up to 1e4 leave rounding in small ones.
    least = max(1e-5, 1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(model(image), expected, 1e-5, least)
    for weight in model.weights:
        if "offset" in _keras.name_of(weight):
            assert not weight.numpy().any()


@contextlib.contextmanager
def refused(model, error, match):
    """Expects an error that leaves all weights of the model as they were."""
    before = values(model)
    with pytest.raises(error, match=match):
        yield
    np.testing.assert_equal(values(model), before)
