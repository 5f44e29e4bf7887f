# SPDX-License-Identifier: Apache-2.0
"""Tests training a loaded `export.saved_model`: its lists of variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from operands import random

from tf_deform import export
from tf_deform.layers import DeformableConv2D

LISTS = ("variables", "trainable_variables", "non_trainable_variables")


class Scaled(keras.layers.Layer):
    """Holds variables in a function, which Keras does not track."""

    def __init__(self):
        super().__init__()
        factor = tf.Variable(2.0, name="factor")
        shift = tf.Variable(1.0, trainable=False, name="shift")
        self.function = tf.function(lambda x: x * factor * factor + shift)

    def call(self, inputs):
        return self.function(inputs)


def build(kind):
    image = keras.Input((8, 9, 2), name="image")
    x = DeformableConv2D(4, 3, modulation="2sigmoid", name="deformable")(image)
    if kind == "normalised":
        for _ in range(2):
            x = keras.layers.Conv2D(4, 1)(x)
            x = keras.layers.BatchNormalization()(x)
    elif kind == "frozen":
        x = keras.layers.Conv2D(4, 1, trainable=False, name="frozen")(x)
        inner = keras.Sequential([keras.Input((6, 7, 4))], name="inner")
        inner.add(DeformableConv2D(4, 3, name="first"))
        inner.add(keras.layers.BatchNormalization())
        inner.trainable = False
        x = keras.layers.Conv2D(4, 1, name="last")(inner(x))
    elif kind == "all frozen":
        model = keras.Model(image, x)
        model.trainable = False
        return model
    elif kind == "shared":
        shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
        x = shared(shared(x)) + x
    elif kind == "seeds":
        x = keras.layers.Dropout(0.5)(keras.layers.GaussianNoise(1.0)(x))
    elif kind == "adapted":
        layer = DeformableConv2D(4, 3, padding="same", name="adapted")
        x = layer(x)
        layer.enable_lora(2)
    elif kind == "compiled":
        model = keras.Model(image, x)
        model.compile("adam", "mse", metrics=["mae"])
        model.fit(random(2, 8, 9, 2), random(2, 6, 7, 4), verbose=0)
        return model
    return keras.Model(image, x)


def names(variables):
    """Returns names; checks that no variable is listed twice."""
    assert len(set(map(id, variables))) == len(variables)
    return [variable.name for variable in variables]


def save_and_load(model, folder, implementation, **arguments):
    folder.mkdir(exist_ok=True)
    path = folder / implementation
    arguments = {"verbose": False, **arguments}
    export.saved_model(model, path, implementation, **arguments)
    return tf.saved_model.load(path)


both_implementations = pytest.mark.parametrize(
    "implementation", ["native", "portable"]
)


@pytest.mark.parametrize(
    "kind,implementation",
    [
        ("normalised", "native"),
        ("frozen", "native"),
        ("frozen", "portable"),
        ("all frozen", "native"),
        ("shared", "portable"),
        ("seeds", "native"),
        ("adapted", "portable"),
        ("compiled", "native"),
    ],
)
def test_lists_are_those_of_keras_export(kind, implementation, tmp_path):
    model = build(kind)
    model.export(tmp_path / "keras", verbose=False)
    expected = tf.saved_model.load(tmp_path / "keras")
    loaded = save_and_load(model, tmp_path, implementation)
    for name in LISTS:
        received = getattr(loaded, name)
        assert names(received) == names(getattr(expected, name))
        for one, other in zip(received, getattr(model, name), strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert [f"{w.path}:0" for w in model.weights] == names(loaded.weights)
    # The variables are the same in every list.
    every = {id(variable) for variable in loaded.variables}
    signature = loaded.signatures["serving_default"]
    for holder, name in [
        *[(loaded, name) for name in ("weights", *LISTS)],
        (signature, "variables"),
    ]:
        assert every.issuperset(map(id, getattr(holder, name)))


@pytest.mark.parametrize(
    "name,implementation",
    [("trainable_variables", "portable"), ("weights", "native")],
)
def test_a_second_training_counts_gradients_once(
    name, implementation, tmp_path
):
    model = build("shared")
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) * 0.3)
    loaded = save_and_load(model, tmp_path, implementation)
    x = random(2, 8, 9, 2)

    def step(run, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(run(x)))
        gradients = tape.gradient(loss, variables)
        keras.optimizers.SGD(0.5).apply_gradients(
            zip(gradients, variables, strict=True)
        )

    before = [weight.numpy() for weight in model.weights]
    step(model, model.trainable_variables)
    step(loaded.serve, getattr(loaded, name))
    for one, other, old in zip(
        loaded.weights, model.weights, before, strict=True
    ):
        assert np.abs(other.numpy() - old).max() > 1e-3
        np.testing.assert_allclose(one.numpy(), other.numpy(), 1e-4, 1e-5)


@both_implementations
def test_variables_inside_of_functions(implementation, tmp_path):
    image = keras.Input((8, 9, 2))
    x = DeformableConv2D(3, 3, name="deformable")(image)
    x = keras.layers.BatchNormalization(name="norm")(Scaled()(x))
    model = keras.Model(image, x)
    loaded = save_and_load(model, tmp_path, implementation)
    own = [f"{weight.path}:0" for weight in model.variables]
    assert names(loaded.variables) == [*own, "factor:0", "shift:0"]
    assert names(loaded.weights) == [*own, "factor:0", "shift:0"]
    assert names(loaded.trainable_variables)[-2:] == ["norm/beta:0", "factor:0"]
    assert names(loaded.non_trainable_variables) == [
        "norm/moving_mean:0",
        "norm/moving_variance:0",
        "shift:0",
    ]


@both_implementations
def test_functions_and_subclassed_models(implementation, tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.second = keras.layers.BatchNormalization(name="second")
            self.first = DeformableConv2D(3, 3, use_bias=False, name="first")

        def call(self, inputs):
            return self.second(self.first(inputs))

    model = Model()
    model(random(1, 8, 9, 2))
    spec = tf.TensorSpec((None, 8, 9, 2))
    arguments = {"input_signature": [spec]}
    loaded = save_and_load(model, tmp_path, implementation, **arguments)
    for name in LISTS:
        assert [w.name.split("/")[-1] for w in getattr(loaded, name)] == [
            f"{w.name}:0" for w in getattr(model, name)
        ]

    bias = tf.Variable(tf.zeros(3), name="own")
    function = tf.function(lambda x: model(x) + bias + bias)
    folder = tmp_path / "function"
    loaded = save_and_load(function, folder, implementation, **arguments)
    assert len(loaded.variables) == len(model.weights) + 1
    assert names(loaded.variables) == names(loaded.weights)
    assert len(loaded.non_trainable_variables) == 2
    assert len(loaded.trainable_variables) == 6

    constant = tf.function(lambda x: x + 1, [spec])
    loaded = save_and_load(constant, tmp_path / "constant", implementation)
    assert len(loaded.variables) == 0
