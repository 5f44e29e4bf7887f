# SPDX-License-Identifier: Apache-2.0
"""Makes models of every kind that `make_deformable` is to change.

    python tests/lib/surgery_models.py FOLDER

writes the files that `tests/build/golden/surgery_keras_2.tar.xz` and
`surgery_keras_3.tar.xz` hold, with Keras 2.15.0 (TensorFlow 2.15.1) and Keras
3.5.0 (TensorFlow 2.18.1), the oldest that are supported.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest

import tf_deform
from tf_deform import _keras
from tf_deform._keras import KERAS_2, keras

layers = keras.layers
SIZE = (32, 40, 3)


def chain(x, prefix=""):
    """Adds convolutions of the strides 2, 4, 8, 8 (1x1) and 16."""
    for index, (filters, kernel, strides) in enumerate(
        [(4, 3, 2), (6, 5, 2), (8, 3, 2), (6, 1, 1), (5, (1, 3), 2)]
    ):
        x = layers.Conv2D(
            filters,
            kernel,
            strides,
            padding="same",
            use_bias=index != 1,
            name=f"{prefix}conv{index}",
        )(x)
        x = layers.BatchNormalization(name=f"{prefix}bn{index}")(x)
        x = layers.Activation("softplus")(x)
    return x


def head(x):
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


def make_functional():
    image = keras.Input(SIZE)
    return keras.Model(image, head(chain(image)))


def make_sequential():
    model = keras.Sequential([keras.Input(SIZE)])
    for strides in (2, 2, 2, 2):
        model.add(layers.Conv2D(4, 3, strides, padding="same"))
    model.add(layers.GlobalAveragePooling2D())
    return model


def make_nested():
    """Makes a model in a model in a model."""
    image = keras.Input(SIZE)
    inner = keras.Model(image, chain(image), name="inner")
    outer = keras.Sequential([keras.Input(SIZE), inner], name="outer")
    image = keras.Input(SIZE)
    return keras.Model(image, head(outer(image)))


def make_shared():
    """Makes a layer that is called twice at one stride."""
    image = keras.Input(SIZE)
    x = layers.Conv2D(4, 3, 8, padding="same")(image)
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    return keras.Model(image, head(shared(layers.ReLU()(shared(x)))))


def make_pyramid():
    """Makes a shared head on maps of several strides, as detectors have."""
    image = keras.Input(SIZE)
    maps, x = [], image
    for level in range(1, 6):
        x = layers.Conv2D(4, 3, 2, padding="same", name=f"c{level}")(x)
        maps.append(x)
    top = layers.Conv2D(4, 1, name="lateral")(maps[4])
    fine = layers.Conv2D(4, 1, name="lateral_of_c4")(maps[3])
    finer = layers.Add()(
        [layers.Cropping2D(((0, 0), (0, 1)))(layers.UpSampling2D(2)(top)), fine]
    )
    shared = layers.Conv2D(4, 3, padding="same", name="shared_head")
    return keras.Model(image, [shared(finer), shared(top)])


def _register(kind):
    return keras.saving.register_keras_serializable("surgery_models")(kind)


@_register
class Block(layers.Layer):
    """Holds convolutions as attributes, in a list and in a dictionary."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.first = layers.Conv2D(filters, 3, padding="same", name="same_name")
        self.more = [layers.Conv2D(filters, 3, padding="same", name="in_list")]
        self.last = {"one": layers.Conv2D(filters, 3, padding="same")}

    def build(self, shape):
        for each in (self.first, *self.more, self.last["one"]):
            each.build(shape)
            shape = (*shape[:-1], self.filters)
        self.built = True

    def call(self, x):
        return self.last["one"](self.more[0](self.first(x)))

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.filters)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def make_composite():
    """Makes a functional model of layers that hold layers."""
    image = keras.Input(SIZE)
    x = layers.Conv2D(4, 3, 8, padding="same", name="stem")(image)
    for _ in range(2):
        x = Block(4)(x)
    return keras.Model(image, head(x))


@_register
class Subclassed(keras.Model):
    """Makes its own layers, a functional model among them."""

    def __init__(self, filters=4, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.stem = layers.Conv2D(filters, 3, 8, padding="same")
        self.block = Block(filters)
        image = keras.Input((4, 5, filters))
        x = layers.Conv2D(filters, 3, padding="same", name="same_name")(image)
        self.inner = keras.Model(image, x)
        self.top = keras.Sequential([layers.Conv2D(3, 3, padding="same")])

    def call(self, x):
        return self.top(self.inner(self.block(self.stem(x))))

    def get_config(self):
        return {"name": self.name, "filters": self.filters}


def make_subclassed():
    model = Subclassed()
    model(np.zeros((1, *SIZE), "float32"))
    return model


# How many layers of each are c3 to c5.
MAKERS = {
    make_functional: 2,
    make_sequential: 2,
    make_nested: 2,
    make_shared: 2,
    make_pyramid: 3,
    make_composite: 7,
    make_subclassed: 6,
}


def filled(make):
    """Returns a model whose weights all differ from zero and one another."""
    model = make()
    rng = np.random.default_rng(0)
    for weight in model.weights:
        low = 0.5 if "variance" in weight.name else -0.3
        values = rng.uniform(low, low + 0.6, weight.shape)
        weight.assign(values.astype("float32"))
    return model


def images(count=2):
    return (
        np.random.default_rng(1).normal(size=(count, *SIZE)).astype("float32")
    )


def run(model):
    """Returns a model's outputs, as one array."""
    outputs = model(images())
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return np.concatenate([np.reshape(each, -1) for each in outputs])


def displace(model, scale=1.0):
    """Sets branches that displace, and differ."""
    rng = np.random.default_rng(2)
    for weight in model.weights:
        path = weight.name if KERAS_2 else weight.path
        if "offset" in path.split("/")[-1]:
            weight.assign(rng.normal(scale=scale, size=weight.shape))


def change(model, **options):
    return tf_deform.make_deformable(model, verbose=False, **options)


def assert_near(received, expected, tolerance=1e-5):
    largest = np.abs(expected).max()
    assert largest > 0.01
    assert np.abs(received - expected).max() <= tolerance * largest


def snapshot(model):
    """Returns what an error must leave as it is."""
    found = [model, *_keras.flatten_layers(model)]
    return [
        (id(x), type(x), x.trainable, len(x.weights)) for x in found
    ], model.get_weights()


def refuse(model, error, match, call):
    """Expects an error that leaves a model as it is."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model)
    after = snapshot(model)
    assert after[0] == before[0]
    np.testing.assert_equal(after[1], before[1])


def trained(model):
    """Returns the names of weights that are trained."""
    return {_keras.name_of(weight) for weight in model.trainable_weights}


# Models whose files every later version reads.
GOLDEN = (make_functional, make_composite, make_subclassed)


def write(folder):
    for make in GOLDEN:
        model = filled(make)
        change(model, stages="c3-c4")
        displace(model)
        tf_deform.train_only(model)
        model.save(folder / f"{make.__name__}.keras")
        np.save(folder / f"{make.__name__}.npy", run(model))


if __name__ == "__main__":
    # The files name this module, not `__main__`.
    import surgery_models

    surgery_models.write(pathlib.Path(sys.argv[1]))
