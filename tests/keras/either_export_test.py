# SPDX-License-Identifier: Apache-2.0
"""Tests exports and `load_plain_weights` on Keras 2 and on Keras 3."""

from __future__ import annotations

import pathlib

import keras_files
import numpy as np
import plain_models
import pytest
import tensorflow as tf

import tf_deform
from tf_deform._keras import KERAS_2, keras


def filled(kind):
    model = keras_files.make(kind)
    keras_files.fill(model)
    return model


@pytest.mark.parametrize(
    "kind,implementation,policy",
    [
        *((kind, "native", "float32") for kind in keras_files.KINDS),
        ("regions", "portable", "float32"),
        ("convolution", "native", "mixed_bfloat16"),
    ],
)
def test_saved_model(kind, implementation, policy, tmp_path):
    if implementation == "native" and tf_deform._loader.op_library() is None:
        pytest.skip("without native ops")
    keras.mixed_precision.set_global_policy(policy)
    model = filled(kind)
    sample = keras_files.inputs_of(kind)
    tf_deform.export.saved_model(
        model,
        tmp_path / "model",
        implementation,
        image_bytes=False,
        sample=sample,
        verbose=False,
    )
    served = keras_files.run(keras_files.serving(tmp_path / "model"), kind)
    tolerance = 1e-5 if policy == "float32" else 3e-2
    wanted = keras_files.run(model, kind)
    np.testing.assert_allclose(served, wanted, tolerance, tolerance)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert len(loaded.variables) == len(model.weights)
    assert len(loaded.trainable_variables) == len(model.trainable_weights)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", keras_files.KINDS)
@pytest.mark.parametrize("form", ["onnx", "litert"])
def test_other_runtimes(form, kind, policy, tmp_path):
    """Tests a file, also of a model that computes in 16 bits."""
    if form == "onnx":
        pytest.importorskip("tf2onnx")
        pytest.importorskip("onnxruntime")
        if tf_deform._loader.op_library() is None:
            pytest.skip("without native ops")
    else:
        pytest.importorskip("ai_edge_litert.interpreter")
    keras.mixed_precision.set_global_policy(policy)
    model = filled(kind)
    before = [layer.compute_dtype for layer in model.layers]
    report = getattr(tf_deform.export, form)(
        model,
        tmp_path / "file",
        sample=keras_files.inputs_of(kind),
        verbose=False,
    )
    # The model is compared in float32.
    assert max(report.differences.values()) < 1e-3
    assert [layer.compute_dtype for layer in model.layers] == before
    assert policy.split("_")[-1] in before


def test_names_of_outputs(tmp_path):
    """Tests nested inputs and outputs."""
    inputs = {"b": keras.Input((4, 5, 3)), "a": keras.Input((2,), name="two")}
    x = tf_deform.layers.DeformableConv2D(2, 3)(inputs["b"])
    others = [keras.layers.ReLU()(inputs["a"]), x]
    outputs = {"maps": x, "others": others}
    model = keras.Model(inputs, outputs)
    report = tf_deform.export.saved_model(
        model,
        tmp_path / "model",
        "portable",
        image_bytes=False,
        verbose=False,
    )
    assert sorted(report.differences) == ["maps", "others_0", "others_1"]


@pytest.mark.parametrize("name", [plain_models.named, plain_models.unnamed])
@pytest.mark.parametrize(
    "make,kind",
    [
        *((make, "weights.h5") for make in plain_models.MAKERS),
        (plain_models.make_nested, "h5"),
        (plain_models.make_residual, "keras"),
    ],
)
def test_plain_weights(make, kind, name, tmp_path):
    plain, path, model = plain_models.plain_and_twin(tmp_path, make, name, kind)
    report = tf_deform.load_plain_weights(model, path)
    plain_models.assert_is_twin(model, plain)
    loaded = sum(len(layer.loaded) for layer in report.layers)
    assert loaded == len(plain.weights)
    if kind != "h5" and KERAS_2:
        assert report.matched_by == "order"  # Keras 2 writes no names.


@pytest.mark.parametrize("make", plain_models.MAKERS)
def test_plain_weights_of_a_checkpoint(make, tmp_path):
    """Tests a trained model's, with an optimizer of any name beside it."""
    plain = plain_models.fill(make(keras.layers.Conv2D, plain_models.named))
    plain.compile(keras.optimizers.Adam(), "mean_squared_error")
    model = make(tf_deform.layers.DeformableConv2D, plain_models.named)
    shape = getattr(plain, "input_shape", None) or (1, 7, 8, 4)
    image = np.ones((1, *shape[1:]), "float32")
    plain.fit(image, plain(image) + 1, verbose=0)
    checkpoint = tf.train.Checkpoint(solver=plain.optimizer, net=plain)
    paths = [checkpoint.save(str(tmp_path / "some"))]
    if KERAS_2:
        plain.save_weights(str(tmp_path / "weights"))
        paths.append(tmp_path / "weights")
    reason = {
        # Layers of one name differ only in the model around them.
        plain_models.make_nested: "two weights called",
        # A model's own weights have the model's name, which may differ.
        plain_models.make_subclassed: "no layer '' in the file",
        # Keras 2 gives weights the name of the layer around their own.
        plain_models.make_wrapped: "no layer 'inner' in" if KERAS_2 else None,
    }.get(make)
    if reason is not None:
        with plain_models.refused(model, ValueError, reason):
            tf_deform.load_plain_weights(model, paths[0])
        return
    for path in paths:
        report = tf_deform.load_plain_weights(model, path)
        assert report.matched_by == "name"
        plain_models.assert_is_twin(model, plain)
        loaded = sum(len(layer.loaded) for layer in report.layers)
        assert loaded == len(plain.weights)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    make = plain_models.make_chain
    plain = make(keras.layers.Conv2D, plain_models.named)
    whole = tf.train.Checkpoint(net=plain).write(str(tmp_path / "whole"))
    model = make(tf_deform.layers.DeformableConv2D, lambda name: name * 2)
    with plain_models.refused(model, ValueError, "by name: no layer 'aa'"):
        tf_deform.load_plain_weights(model, whole)
    model = make(tf_deform.layers.DeformableConv2D, plain_models.named)
    part = tf.train.Checkpoint(layers=plain.layers[:3])
    path = part.write(str(tmp_path / "part"))
    with plain_models.refused(model, ValueError, "no layer 'c' in the file"):
        tf_deform.load_plain_weights(model, path)
    if not KERAS_2:  # Its checkpoints lack layers in lists without a word.
        others = plain_models.make_subclassed
        plain = others(keras.layers.Conv2D, plain_models.named)
        path = tf.train.Checkpoint(net=plain).write(str(tmp_path / "lists"))
        model = others(tf_deform.layers.DeformableConv2D, plain_models.named)
        with plain_models.refused(model, ValueError, "no layer 'a' in the fil"):
            tf_deform.load_plain_weights(model, path)
        model = make(tf_deform.layers.DeformableConv2D, plain_models.named)
    for suffix, text in (
        (".index", "cannot be read"),
        (".data-00000-of-00001", "cannot be read"),
    ):
        file = pathlib.Path(whole + suffix)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with plain_models.refused(model, ValueError, text):
            tf_deform.load_plain_weights(model, whole)
        file.write_bytes(content)
