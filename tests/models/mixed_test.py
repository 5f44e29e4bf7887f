# SPDX-License-Identifier: Apache-2.0
"""Tests deformable networks in 16 bits: outputs, a step, exports.

`docs/surgery.md` has the same for ResNet-50.
"""

import exported
import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo

import tf_deform
from tf_deform import _loader

# Of the largest output: a few roundings to 11 and 8 bits.
ROUNDING = {"mixed_float16": 5e-3, "mixed_bfloat16": 4e-2}


def cover(name, values):
    """Returns a mark: each value and each policy in a case that is not slow."""
    return pytest.mark.parametrize(
        f"{name},policy",
        [
            pytest.param(
                value, policy, marks=[pytest.mark.slow] * ((i + j) % 2)
            )
            for i, value in enumerate(values)
            for j, policy in enumerate(ROUNDING)
        ],
    )


def make(policy, deformable=True):
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy(policy)
    model = zoo.tiny_resnet()
    keras.mixed_precision.set_global_policy("float32")
    if deformable:
        tf_deform.make_deformable(model, "c4", verbose=False)
    return model


def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 64, 64, 3)).astype("float32")


def assert_near(received, expected, tolerance):
    received, expected = (
        np.asarray(x, "float64") for x in (received, expected)
    )
    largest = np.abs(expected).max()
    assert np.abs(received - expected).max() <= tolerance * largest


@cover("jit", [False, True])
def test_outputs_and_a_step(jit, policy):
    if jit and not _loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    plain, model = make(policy, False), make(policy)
    before, after = (
        tf.function(each, jit_compile=jit)(images(), training=False)
        for each in (plain, model)
    )
    assert after.dtype == policy.removeprefix("mixed_")
    assert_near(after, before, ROUNDING[policy])
    head = keras.Sequential(
        [
            model,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.SGD(0.01)
    if policy == "mixed_float16":
        # Keras' first scale, 2 ** 15, lets the first steps be left out.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 64.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    head.compile(optimizer, loss, jit_compile=jit)
    logs = head.fit(images(), np.array([0, 2]), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert all(np.isfinite(weight.numpy()).all() for weight in head.weights)
    for layer in tf_deform.deformable_layers(model):
        assert np.abs(layer.offset_kernel.numpy()).max() > 0


@cover("kind", exported.FORMATS)
def test_exports(kind, policy, tmp_path):
    """Tests files against the same model in float32."""
    model, whole = make(policy), make("float32")
    rng = np.random.default_rng(1)
    for layer in tf_deform.deformable_layers(whole):
        layer.offset_bias.assign(rng.normal(size=layer.offset_bias.shape))
    model.set_weights(whole.get_weights())
    options = {"image_bytes": False} if kind == "native" else {}
    exported.write(kind, model, tmp_path / "file", **options)
    (name,) = [tensor.name for tensor in model.inputs]
    received = exported.run(kind, tmp_path / "file", {name: images()})
    # ONNX and LiteRT files compute in float32.
    is_16 = kind in ("native", "portable")
    expected = whole(images(), training=False)
    tolerance = ROUNDING[policy] if is_16 else 1e-5
    assert_near(received["output_0"], expected, tolerance)
    dtype = policy.removeprefix("mixed_") if is_16 else "float32"
    assert received["output_0"].dtype == dtype
