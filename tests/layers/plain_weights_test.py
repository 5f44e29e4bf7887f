# SPDX-License-Identifier: Apache-2.0
"""Tests loading a plain model's weights into its deformable twin.

Every kind of file is tested.
"""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from plain_models import (
    FILES,
    MAKERS,
    WITHOUT_NAMES,
    assert_is_twin,
    chain,
    fill,
    layers,
    make_chain,
    make_nested,
    make_residual,
    make_subclassed,
    make_wrapped,
    named,
    plain_and_twin,
    refused,
    save,
    unnamed,
    values,
)

import tf_deform
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

CASES = [
    *((kind, named, make) for kind in FILES[:4] for make in MAKERS),
    *((kind, unnamed, make) for kind in FILES[::3] for make in MAKERS),
    *(("no names", name, make) for name in (named, unnamed) for make in MAKERS),
    ("2.13", named, make_nested),
    ("weights.json", unnamed, make_residual),
    ("keras", unnamed, make_nested),
    ("legacy weights", named, make_residual),
    ("legacy weights", unnamed, make_nested),
]


# `keras` is held like `weights.h5`; `h5` is for models that are no subclasses.
@pytest.mark.parametrize(
    "kind,name,make",
    [
        (kind, name, make)
        for kind, name, make in CASES
        if make is not make_subclassed or kind not in ("keras", "h5")
    ],
)
def test_files(kind, name, make, tmp_path):
    plain, path, model = plain_and_twin(tmp_path, make, name, kind)
    legacy = kind in ("h5", "legacy weights")
    if legacy and make is make_wrapped and name is unnamed:
        # Both cells of the LSTM have one name; only the order tells them apart.
        with pytest.raises(ValueError, match="frozen ones are written last"):
            tf_deform.load_plain_weights(model, path)
        return
    report = tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)
    twice = make in (make_nested, make_wrapped) and not legacy
    by_order = name is unnamed or twice or kind in WITHOUT_NAMES
    assert report.matched_by == ("order" if by_order else "name")
    # Every weight is in the file, once.
    loaded = sum(len(layer.loaded) for layer in report.layers)
    stayed = sum(len(layer.stayed) for layer in report.layers)
    assert loaded == len(plain.weights)
    assert loaded + stayed == len(model.weights)
    assert all(layer.name in str(report) for layer in report.layers)


def test_the_report(tmp_path):
    _, path, model = plain_and_twin(tmp_path)
    report = tf_deform.load_plain_weights(model, path)
    assert report.path == path
    assert [layer.name for layer in report.layers] == list("abcde")
    assert report.layers[1].loaded == ("kernel", "bias")
    assert str(report).splitlines() == [
        f"{path}: 5 of 5 layers, by name",
        "  a: kernel, bias from layers/conv2d",
        "  b: kernel, bias from layers/conv2d_1; as they were: "
        "offset_kernel, offset_bias",
        "  c: kernel, bias from layers/conv2d_2",
        "  d: kernel, bias from layers/conv2d_3; as they were: "
        "offset_kernel, offset_bias",
        "  e: kernel, bias from layers/conv2d_4",
    ]


def as_keras_2(path):
    """Renames: names end with ":0", inner names lack the outer name."""
    with h5py.File(path, "a") as file:
        root = file["model_weights"]
        for name, group in root.items():
            weights = []
            for old in group.attrs["weight_names"]:
                new = old.removeprefix(f"{name}/") + ":0"
                if new.count("/") == 0:
                    new = f"{name}/{new}"
                group.move(old, f"new/{new}")
                weights.append(new)
            for new in weights:
                group.move(f"new/{new}", new)
            group.attrs["weight_names"] = np.array(weights, "S")


@pytest.mark.parametrize("frozen", ["nothing", "all", "some"])
@pytest.mark.parametrize("name", [named, unnamed])
@pytest.mark.parametrize("version", [2, 3])
def test_frozen_layers_in_legacy_files(version, name, frozen, tmp_path):
    """Tests that frozen layers, which the file has last, are found."""

    def make(layer):
        inner = keras.Sequential([keras.Input((7, 8, 4))], name="inner")
        for part in chain(layer, name)[:3]:
            inner.add(part)
            inner.add(layers.BatchNormalization(name=name(part.name + "n")))
        image = keras.Input((7, 8, 4))
        return keras.Model(image, layer(4, 3, name=name("d"))(inner(image)))

    plain = fill(make(layers.Conv2D))
    inner = plain.get_layer("inner")
    if frozen == "all":
        inner.trainable = False
    elif frozen == "some":
        for part in inner.layers[:3]:
            part.trainable = False
    path = save(plain, tmp_path, "h5")
    if version == 2:
        as_keras_2(path)
    model = make(DeformableConv2D)
    if name is unnamed and frozen == "some":
        # All shapes are the same, so that only names or order can tell.
        with refused(model, ValueError, "frozen ones are written last"):
            tf_deform.load_plain_weights(model, path)
        return
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


@pytest.mark.parametrize("kind", ["weights.h5", "h5"])
def test_renamed_layers(kind, tmp_path):
    """Tests that order finds layers, unless it contradicts names that match."""
    plain, path, _ = plain_and_twin(tmp_path, kind=kind)
    model = make_chain(DeformableConv2D, lambda x: "new" if x == "b" else x)
    assert tf_deform.load_plain_weights(model, path).matched_by == "order"
    assert_is_twin(model, plain)
    # "a" and "c" have changed places, and "b" has another name.
    names = {"a": "c", "b": "new", "c": "a"}
    model = make_chain(DeformableConv2D, lambda x: names.get(x, x))
    with refused(model, ValueError, "weights of 'a' for layer 'c'"):
        tf_deform.load_plain_weights(model, path)
    # The same names in another order are found by name.
    names = {"a": "c", "c": "a"}
    model = make_chain(DeformableConv2D, lambda x: names.get(x, x))
    assert tf_deform.load_plain_weights(model, path).matched_by == "name"
    np.testing.assert_array_equal(
        model.get_layer("c").kernel, plain.get_layer("c").kernel
    )


def test_names_that_keras_counts(tmp_path):
    """Tests that the twin's "conv2d_1" is the file's "conv2d_2"."""
    plain = fill(make_chain(layers.Conv2D, unnamed))
    path = save(plain, tmp_path)
    keras.utils.clear_session(free_memory=False)
    model = make_chain(DeformableConv2D, unnamed)
    assert {x.name for x in model.layers} & {x.name for x in plain.layers}
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


@pytest.mark.parametrize(
    "kind,dtype",
    [
        ("weights.h5", "float16"),
        ("weights.h5", "bfloat16"),
        ("weights.h5", "float64"),
        ("weights.h5", "mixed_float16"),
        ("weights.json", "bfloat16"),
        ("keras", "float64"),
        ("h5", "float16"),  # Keras cannot write bfloat16 to this kind.
        ("h5", "float64"),
    ],
)
def test_numbers_of_other_types(kind, dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    plain, path, _ = plain_and_twin(tmp_path, kind=kind)
    for wanted in ("float32", "mixed_bfloat16", "float16"):
        keras.config.set_dtype_policy(wanted)
        model = make_chain(DeformableConv2D, named)
        tf_deform.load_plain_weights(model, path)
        for layer in plain.layers[1:]:
            for one, other in zip(
                layer.weights, model.get_layer(layer.name).weights, strict=False
            ):
                expected = tf.cast(one.value, other.dtype)
                np.testing.assert_array_equal(other.numpy(), expected.numpy())


@pytest.mark.parametrize("kind", FILES[:4])
def test_a_trained_model(kind, tmp_path):
    """Tests that the file's optimizer state is ignored."""
    plain = make_residual(layers.Conv2D, named)
    plain.compile("adam", "mse", metrics=["mae"])
    plain.optimizer.build(plain.trainable_variables)
    plain.optimizer.iterations.assign(7)
    path = save(plain, tmp_path, kind)
    model = make_residual(DeformableConv2D, named)
    model.compile("adam", "mse")
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)
    assert model.optimizer.iterations == 0


@pytest.mark.parametrize("kind", FILES)
def test_files_of_deformable_models(kind, tmp_path):
    """Tests that deformable models load them, and plain ones refuse."""
    source = fill(make_residual(DeformableConv2D, named))
    path = save(source, tmp_path, kind)
    model = make_residual(DeformableConv2D, named)
    report = tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), values(source))
    assert not any(layer.stayed for layer in report.layers)
    plain = make_residual(layers.Conv2D, named)
    with pytest.raises(ValueError, match="Nothing was loaded"):
        tf_deform.load_plain_weights(plain, path)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [named, unnamed])
def test_layers_that_pool_regions(name, kind, tmp_path):
    """Tests that weights that no plain model has stay as they are."""

    def make(layer, deformable):
        image, rois = keras.Input((7, 8, 4)), keras.Input((5,))
        x = layer(4, 3, padding="same", name=name("a"))(image)
        parts = [x, x, x[..., :1]]
        if deformable:
            parts = [
                DeformableROIAlign(2, 1.0, units=(3,))(x, rois),
                DeformableROIPooling(2, 1.0)(x, rois),
                DeformablePSROIPooling(1, 2, 1.0)(x, rois, trans_inputs=x),
            ]
        x = layers.Concatenate()(parts)
        return keras.Model([image, rois], layers.Dense(2, name=name("z"))(x))

    plain = fill(make(layers.Conv2D, False))
    path = save(plain, tmp_path, kind)
    model = fill(make(DeformableConv2D, True), seed=1)
    before = {w.path: w.numpy() for w in model.weights}
    report = tf_deform.load_plain_weights(model, path)
    stayed = [layer for layer in report.layers if not layer.loaded]
    assert [len(layer.stayed) for layer in stayed] == [4, 2, 2]
    for weight in model.weights:
        if "offset" in weight.path:
            np.testing.assert_array_equal(weight, before[weight.path])
    np.testing.assert_equal(values(model)[-2:], values(plain)[-2:])
