# SPDX-License-Identifier: Apache-2.0
"""Tests `make_deformable` and its companions on every Keras."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
from surgery_models import (
    MAKERS,
    assert_near,
    change,
    displace,
    filled,
    head,
    images,
    make_functional,
    make_nested,
    make_pyramid,
    make_sequential,
    make_shared,
    refuse,
    run,
)

import tf_deform
from tf_deform import _keras, _loader
from tf_deform._keras import KERAS_2, keras
from tf_deform.layers import DeformableConv2D

layers = keras.layers
every_model = pytest.mark.parametrize("make", MAKERS)


@every_model
def test_a_model_stays_what_it_is(make):
    model = filled(make)
    before = run(model)
    kinds = {id(layer): layer for layer in _keras.flatten_layers(model)}
    weights = {id(w): w.name for w in model.weights}
    report = change(model)
    assert len(report.changed) == MAKERS[make]
    assert len(tf_deform.deformable_layers(model)) == MAKERS[make]
    assert_near(run(model), before)
    after = {id(layer): layer for layer in _keras.flatten_layers(model)}
    assert after.keys() == kinds.keys()
    left = {id(w): w.name for w in model.weights if id(w) in weights}
    assert left == weights
    count, total = report.weights
    assert total == model.count_params()
    assert total - count == sum(one.weights for one in report.changed)
    displace(model)
    assert np.abs(run(model) - before).max() > 1e-3 * np.abs(before).max()


@every_model
@pytest.mark.parametrize("modulation", [None, "2sigmoid"])
def test_other_options_are_exact_too(modulation, make):
    model = filled(make)
    before = run(model)
    options = {"boundary": "clamp", "offset_dilation_rate": 2}
    change(model, modulation=modulation, implementation="portable", **options)
    # Samples outside of the image differ: there are none without padding.
    for layer in tf_deform.deformable_layers(model):
        assert layer.modulation == modulation
        assert layer.offset_dilation_rate == (2, 2)
        assert layer.implementation == "portable"
        layer.boundary = "zeros"
    assert_near(run(model), before)


CONVOLUTIONS = {
    "valid": dict(kernel_size=3),
    "strides": dict(kernel_size=(3, 2), strides=2, padding="same"),
    "dilation": dict(kernel_size=3, dilation_rate=2, padding="same"),
    "groups": dict(kernel_size=3, groups=2),
    "activation": dict(kernel_size=(1, 4), activation="tanh", use_bias=False),
    "regularizer": dict(
        kernel_size=3, kernel_regularizer="l2", activity_regularizer="l2"
    ),
    "frozen": dict(kernel_size=3, trainable=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_adopted(name):
    image = keras.Input((9, 10, 4))
    conv = layers.Conv2D(6, name="conv", **CONVOLUTIONS[name])
    model = keras.Model(image, conv(image))
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 4)).astype("float32")
    before, losses = np.array(model(x)), [float(v) for v in model.losses]
    config = conv.get_config()
    found = DeformableConv2D.adopt(conv, modulation="2sigmoid", offset_groups=2)
    assert found is conv and type(conv) is DeformableConv2D
    assert_near(np.array(model(x)), before)
    np.testing.assert_allclose([float(v) for v in model.losses], losses, 1e-5)
    now = conv.get_config()
    assert {key: now[key] for key in config} == config
    trained = len(conv.trainable_weights)
    assert trained == (0 if name == "frozen" else len(conv.weights))
    # The layer is one that could have been made at once.
    twin = DeformableConv2D.from_config(now)
    twin.build(x.shape)
    assert [_keras.name_of(w) for w in conv.weights] == [
        _keras.name_of(w) for w in twin.weights
    ]
    assert [tuple(w.shape) for w in conv.weights] == [
        tuple(w.shape) for w in twin.weights
    ]
    twin.set_weights(conv.get_weights())
    assert_near(np.array(twin(x)), before)


def test_paths_of_new_weights():
    model = filled(make_nested)
    change(model)
    for layer in tf_deform.deformable_layers(model):
        name = "name" if KERAS_2 else "path"
        kernel, offset = (
            getattr(weight, name)
            for weight in (layer.kernel, layer.offset_kernel)
        )
        assert offset == re.sub(r"kernel(:0)?$", r"offset_kernel\1", kernel)


@pytest.mark.parametrize(
    "asked,count",
    [
        (dict(layers="conv[24]"), 2),
        (dict(layers=["conv0", "conv1$"]), 2),
        (dict(layers=lambda layer: layer.name == "conv1"), 1),
        (dict(stages="c4"), 1),
        (dict(stages="c1-c3"), 3),
        (dict(stages="c2-"), 3),
    ],
)
def test_layers_are_chosen(asked, count):
    model = filled(make_functional)
    before = run(model)
    report = change(model, **asked)
    assert len(report.changed) == count
    assert_near(run(model), before)


def test_the_report(capsys):
    model = filled(make_functional)
    report = tf_deform.make_deformable(model)
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    assert [one.stride for one in report.changed] == [8, 16]
    assert [one.kernel_size for one in report.changed] == [(3, 3), (1, 3)]
    assert dict(report.skipped).keys() == {"conv3"}
    for line in (
        r"layer +stride +kernel +weights",
        r"conv2 +8 +3x3 +\+1,485",  # 9 taps * 6 channels * 27 + 27
        r"conv4 +16 +1x3 +\+171",  # 3 taps * 6 channels * 9 + 9
        r"2 layers +1,\d\d\d -> \d,\d\d\d",
        "as they were: conv3: a kernel of one tap",
    ):
        assert re.search(line, text), text


def test_what_stays_is_listed():
    image = keras.Input((16, 16, 4))
    x = layers.DepthwiseConv2D(3, name="depthwise")(image)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.Conv2DTranspose(4, 3, name="transposed")(x)
    x = layers.Conv2D(4, 1, name="one")(x)

    class Other(layers.Conv2D):
        pass

    x = Other(4, 3, name="other")(x)
    x = DeformableConv2D(4, 3, name="mine")(x)
    x = layers.Conv2D(4, 3, groups=4, name="each_channel")(x)
    x = layers.Conv2D(4, 3, name="plain")(x)
    model = keras.Model(image, x)
    report = change(model, layers=".*")
    assert [one.path for one in report.changed] == ["each_channel", "plain"]
    reasons = dict(report.skipped)
    for name, reason in {
        "depthwise": "a DepthwiseConv2D, not a Conv2D",
        "separable": "a SeparableConv2D, not a Conv2D",
        "transposed": "a Conv2DTranspose, not a Conv2D",
        "one": "a kernel of one tap",
        "other": "a Other, a subclass of Conv2D",
        "mine": "deformable already",
    }.items():
        assert reasons.pop(name).startswith(reason)
    assert not reasons


def test_a_filter_for_each_channel_has_to_be_named():
    image = keras.Input((16, 16, 4))
    x = layers.Conv2D(4, 3, groups=4, name="each_channel")(image)
    model = keras.Model(image, layers.Conv2D(4, 3, name="plain")(x))
    report = change(model, stages="c0")
    assert [one.path for one in report.changed] == ["plain"]
    assert "one filter for each channel" in dict(report.skipped)["each_channel"]


@pytest.mark.skipif(KERAS_2, reason="Keras 2 has no LoRA")
def test_lora_comes_after():
    model = filled(make_functional)
    model.get_layer("conv2").enable_lora(2)
    report = change(model)
    assert [one.path for one in report.changed] == ["conv4"]
    assert "LoRA is enabled" in dict(report.skipped)["conv2"]
    before = run(model)
    model.get_layer("conv4").enable_lora(2)
    assert_near(run(model), before)


BAD = {
    "stage": (dict(stages="5"), ValueError, "`stages` like"),
    "stage type": (dict(stages=5), ValueError, "`stages` like"),
    "no such stage": (
        dict(stages="c7"),
        ValueError,
        r"stages='c7'.*can be changed: conv0 \(c1\), conv1 \(c2\), conv2",
    ),
    "nothing matched": (
        dict(layers="convolution"),
        ValueError,
        "layers='convolution', which finds none.*conv0, conv1, conv2, conv4",
    ),
    "all skipped": (
        dict(layers="conv3"),
        ValueError,
        "conv3: a kernel of one tap",
    ),
    "expression": (dict(layers="conv["), ValueError, "regular expressions"),
    "layers": (dict(layers=3), TypeError, "`layers` to be a regular expr"),
    "layers list": (dict(layers=["a", 3]), TypeError, "`layers` to be a reg"),
    "modulation": (dict(modulation="tanh"), ValueError, "`modulation`"),
    "groups": (
        dict(offset_groups=4),
        ValueError,
        "`offset_groups` to divide.*'conv2'.*6 channels",
    ),
    "boundary": (dict(boundary="wrap"), ValueError, "`boundary`"),
    "dilation": (dict(offset_dilation_rate=0), ValueError, "offset_dilation"),
    "implementation": (dict(implementation="c"), ValueError, "implementation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, error, match = BAD[case]
    model = filled(make_functional)
    refuse(model, error, match, lambda model: change(model, **options))


def test_bad_models():
    for model, error, match in (
        (None, TypeError, "`model` to be a model of"),
        (DeformableConv2D(3, 3), TypeError, "`model` to be a model of"),
        (keras.Sequential([layers.Conv2D(3, 3)]), ValueError, "to be built"),
        (
            keras.Sequential([keras.Input((3, 3, 1)), layers.ReLU()]),
            ValueError,
            "which has no weights",
        ),
    ):
        with pytest.raises(error, match=match):
            change(model)
    image = keras.Input((7,))
    dense = keras.Model(image, layers.Dense(3)(image))
    refuse(dense, ValueError, "can be changed: none", change)
    with pytest.raises(TypeError, match="`model` to be a model of"):
        tf_deform.deformable_layers([dense])
    assert tf_deform.deformable_layers(dense) == []


def test_twice():
    model = filled(make_functional)
    change(model, stages="c4")
    assert len(change(model).changed) == 1
    refuse(model, ValueError, "conv2: deformable already", change)


def test_a_compiled_model():
    model = filled(make_functional)
    x, y = images(), np.zeros((2, 3), "float32")
    model.compile(keras.optimizers.Adam(), "mean_squared_error")
    before = [model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)]
    change(model)
    assert_near(model.predict(x, verbose=0), before[0])
    displace(model)
    assert np.abs(model.predict(x, verbose=0) - before[0]).max() > 1e-3
    assert abs(model.evaluate(x, y, verbose=0) - before[1]) > 1e-5
    model.fit(x, y, verbose=0)
    refuse(
        model,
        ValueError,
        "has taken steps. Compile it again",
        lambda model: change(model, stages="c2"),
    )
    model.compile(keras.optimizers.Adam(), "mean_squared_error")
    change(model, stages="c2")
    model.fit(x, y, verbose=0)


@every_model
def test_training_moves_the_branches(make):
    model = filled(make)
    change(model)
    model.compile("sgd", "mean_squared_error")
    outputs = model(images())
    target = tf.nest.map_structure(lambda v: np.ones(v.shape), outputs)
    model.fit(images(), target, epochs=2, verbose=0)
    for layer in tf_deform.deformable_layers(model):
        assert np.abs(layer.offset_kernel.numpy()).max() > 0, layer.name


def test_layers_with_several_strides():
    """Tests that a head on a pyramid counts as none of the stages."""
    model = filled(make_pyramid)
    report = change(model, stages="c0-")
    assert "shared_head" not in {one.path for one in report.changed}
    assert len(report.changed) == 5
    before = run(model)
    report = change(model, layers="shared_head")
    assert [one.stride for one in report.changed] == [0]
    assert_near(run(model), before)


def test_unknown_sizes():
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 7, 4, padding="valid")(image)
    x = layers.ZeroPadding2D(1)(layers.MaxPooling2D(2)(x))
    x = layers.Conv2D(4, 3, name="c3")(x)
    x = layers.Conv2D(4, 3, 2, padding="same", name="c4")(x)
    model = keras.Model(image, head(x))
    report = change(model)
    assert [(one.path, one.stride) for one in report.changed] == [
        ("c3", 8),
        ("c4", 16),
    ]


def test_a_backbone_alone():
    """Tests a model that names its backbone, as KerasHub's tasks do."""
    backbone = filled(make_sequential)
    image = keras.Input((32, 40, 3))
    x = backbone.layers[0](image)
    for layer in backbone.layers[1:-1]:
        x = layer(x)
    x = layers.Conv2D(4, 3, padding="same", name="head_conv")(x)
    model = keras.Model(image, x)
    assert len(change(keras.models.clone_model(model)).changed) == 3
    model.backbone = backbone
    assert len(change(model).changed) == 2


def test_wrapped_layers(tmp_path):
    frames = keras.Input((2, 9, 10, 3))
    conv = layers.Conv2D(4, 3, name="inner")
    model = keras.Model(frames, layers.TimeDistributed(conv)(frames))
    x = np.random.default_rng(0).normal(size=(2, 2, 9, 10, 3))
    x = x.astype("float32")
    before = np.array(model(x))
    report = change(model, layers="inner")
    assert len(report.changed) == 1
    assert_near(np.array(model(x)), before)
    displace(model)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.array(other(x)), np.array(model(x)))
    assert len(tf_deform.deformable_layers(other)) == 1


def test_shared_layers_stay_shared():
    model = filled(make_shared)
    change(model)
    shared = model.get_layer("shared")
    assert len([x for x in model.weights if x is shared.offset_kernel]) == 1


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, jit):
    """Tests outputs up to the type's rounding, and training."""
    if jit and not _loader.supports_jit():
        pytest.skip("no XLA for ops")
    keras.mixed_precision.set_global_policy(policy)
    model = filled(make_functional)
    before = run(model).astype("float32")
    change(model)
    tolerance = 2e-2 if policy == "mixed_float16" else 1e-1
    assert_near(run(model).astype("float32"), before, tolerance)
    model.compile("sgd", "mean_squared_error", jit_compile=jit)
    model.fit(images(), np.ones((2, 3)), epochs=2, verbose=0)
    for layer in tf_deform.deformable_layers(model):
        assert layer.compute_dtype == policy.split("_")[1]
        assert np.abs(layer.offset_kernel.numpy()).max() > 0


@pytest.mark.skipif(not _loader.supports_jit(), reason="no XLA for ops")
@every_model
def test_compiled_by_xla(make):
    model = filled(make)
    change(model)
    displace(model)
    compiled = tf.function(model, jit_compile=True)
    outputs = tf.nest.flatten(compiled(images()))
    received = np.concatenate([np.reshape(each, -1) for each in outputs])
    assert_near(received, run(model))
