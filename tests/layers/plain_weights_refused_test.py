# SPDX-License-Identifier: Apache-2.0
"""Tests that weight files that do not fit are refused, with reasons."""

import json
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
from plain_models import (
    FILES,
    assert_is_twin,
    fill,
    layers,
    make_chain,
    make_residual,
    make_sequential,
    make_shared,
    named,
    plain_and_twin,
    refused,
    save,
    unnamed,
    values,
)

from tf_deform import load_plain_weights
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)


def change(path, key, value):
    """Replaces an item of an HDF5 file, or deletes it if `value` is None."""
    with h5py.File(path, "a") as file:
        if key in file:
            del file[key]
        if value is not None:
            file[key] = value


def floats(*shape):
    return np.zeros(shape, "float32")


BAD = {
    "a shape": (
        "conv2d_1/vars/0",
        floats(3, 3, 4, 5),
        r"for 'kernel' of layer 'b' the shape \(3, 3, 4, 5\) in place of",
    ),
    "a rank": (
        "conv2d_2/vars/1",
        np.float32(1),
        r"for 'bias' of layer 'c' the shape \(\) in place of \(4,\)",
    ),
    "a type": (
        "conv2d_1/vars/1",
        np.zeros(4, "int8"),
        "for 'bias' of layer 'b' the type int8",
    ),
    "a text": (
        "conv2d_1/vars/1",
        np.array([b"a"] * 4),
        "for 'bias' of layer 'b' the type",
    ),
    "no bias": ("conv2d_1/vars/1", None, r"for layer 'b' the arrays \['0'\]"),
    "one array more": (
        "conv2d_1/vars/2",
        np.ones(3),
        r"for layer 'b' the arrays \['0', '1', '2'\]",
    ),
    "no layer": (
        "conv2d_4",
        None,
        "no layer 'e' in the file.*nothing at 'layers/conv2d_4' for layer 'e'",
    ),
    "one layer more": (
        "dense/vars/0",
        np.ones(3),
        "weights at 'layers/dense', for which the model has no layer",
    ),
    "half of the branch": (
        "conv2d_1/vars/offset_bias",
        floats(18),
        r"of the branch of layer 'b' only \['offset_bias'\]",
    ),
    "the other half": (
        "conv2d_3/vars/offset_kernel",
        floats(3, 3, 4, 18),
        r"of the branch of layer 'd' only \['offset_kernel'\]",
    ),
    "a branch for a plain layer": (
        "conv2d/vars/offset_bias",
        floats(18),
        "for layer 'a' the arrays",
    ),
    "a link to another file": (
        "conv2d_1/vars/0",
        h5py.ExternalLink("other.h5", "array"),
        r"for layer 'b' the arrays \['1'\]",
    ),
    "numbers of another file": (
        "conv2d_1/vars/1",
        None,
        "'1' of 'layers/conv2d_1' in another file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case, tmp_path):
    """Tests that the error tells the misfit."""
    key, value, message = BAD[case]
    _, path, model = plain_and_twin(tmp_path)
    change(path, f"layers/{key}", value)
    if case == "numbers of another file":
        with h5py.File(path, "a") as file:
            file.create_dataset(
                f"layers/{key}", (4,), "float32", external=[("x.bin", 0, 16)]
            )
    with refused(model, ValueError, f"(?s)Received.*{message}.*Nothing"):
        load_plain_weights(model, path)


@pytest.mark.parametrize("kind", ["h5", "legacy weights"])
@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (make_chain, named, "the shape"),
        (make_sequential, unnamed, "the shape"),
        (make_shared, named, "5 layers in place of 2"),
        (make_residual, named, "5 layers in place of"),
    ],
)
def test_what_does_not_fit_in_legacy_files(make, name, message, kind, tmp_path):
    _, path, _ = plain_and_twin(tmp_path, kind=kind)
    prefix = "model_weights/" if kind == "h5" else ""
    change(path, f"{prefix}c/c/kernel", floats(3, 4))
    model = fill(make(DeformableConv2D, name), seed=1)
    with refused(model, ValueError, message):
        load_plain_weights(model, path)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind, tmp_path):
    _, path, model = plain_and_twin(tmp_path, kind=kind)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with refused(model, ValueError, r"Expected.*cannot be read"):
            load_plain_weights(model, path)
    path.write_bytes(b"x" * 3000)
    text = "Expected `path` to be a .weights.h5"
    with refused(model, ValueError, text):
        load_plain_weights(model, path)


def test_other_files(tmp_path):
    _, path, model = plain_and_twin(tmp_path, kind=FILES[1])
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    (tmp_path / "list.weights.json").write_text("[1]")
    (tmp_path / "up.weights.json").write_text(
        json.dumps({"weight_map": {"/layers/a/vars": "../plain.weights.h5"}})
    )
    change(tmp_path / "empty.h5", "numbers", np.ones(3))
    for name, error, message in (
        ("other.keras", ValueError, "cannot be read.*model.weights.h5"),
        ("list.weights.json", ValueError, "cannot be read"),
        ("up.weights.json", ValueError, "a shard called '../plain.weights.h5'"),
        ("empty.h5", ValueError, "no layer 'a' in the file"),
        ("missing.weights.h5", FileNotFoundError, "missing.weights.h5"),
        ("", IsADirectoryError, ""),
    ):
        with refused(model, error, message):
            load_plain_weights(model, tmp_path / name)
    shards = sorted(tmp_path.glob("plain_*.weights.h5"))
    shards[0].unlink()
    with refused(model, FileNotFoundError, shards[0].name):
        load_plain_weights(model, path)
    shutil.copy(shards[1], shards[0])  # Two shards are the same file.
    with refused(model, ValueError, "for layer 'a' the arrays"):
        load_plain_weights(model, path)


def test_other_models(tmp_path):
    filled, path, _ = plain_and_twin(tmp_path)
    plain = make_chain(layers.Conv2D, named)
    for model, file, error, message in (
        (DeformableConv2D(3, 3), path, TypeError, "`model` to be a keras.Mod"),
        (keras.Sequential([layers.Dense(3)]), path, ValueError, "to be built"),
        (plain, None, TypeError, "`path` to be a str or an os.PathL"),
    ):
        with pytest.raises(error, match=message):
            load_plain_weights(model, file)
    # A plain model is its own twin.
    load_plain_weights(plain, str(path))
    assert_is_twin(plain, filled)


def test_a_layer_that_refuses_when_others_are_done(tmp_path):
    class Fussy(keras.layers.Dense):
        def load_own_variables(self, store):
            super().load_own_variables(store)
            raise RuntimeError("never")

    def make(layer, name):
        parts = [layer(4, 3, name="a"), Fussy(3, name="z")]
        return keras.Sequential([keras.Input((7, 8, 4)), *parts])

    _, path, model = plain_and_twin(tmp_path, make)
    with refused(model, RuntimeError, "never"):
        load_plain_weights(model, path)


def test_low_rank_adapters(tmp_path):
    """Tests kernel and bias; the adapters are lost, as in Keras."""
    plain, path, model = plain_and_twin(tmp_path)
    for layer in model.layers[1:]:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(layer.lora_kernel_b + 1)
    load_plain_weights(model, path)
    assert_is_twin(model, plain)


# Messages of Keras' own `load_weights`.
@pytest.mark.parametrize("make", [make_chain, make_sequential, make_residual])
@pytest.mark.parametrize("kind", ["weights.h5", "weights.json", "keras"])
def test_load_weights_of_a_plain_file_names_the_way(kind, make, tmp_path):
    _, path, model = plain_and_twin(tmp_path, make, kind=kind)
    with pytest.raises(ValueError, match="`tf_deform.load_plain_weights"):
        model.load_weights(path)


def test_layers_with_given_offsets_name_the_way(tmp_path):
    image, offset = keras.Input((7, 8, 4)), keras.Input((5, 6, 18))
    x = layers.Conv2D(4, 3, name="a")(image)
    plain = fill(keras.Model(image, x))
    path = save(plain, tmp_path)
    x = DeformableConv2D(4, 3, name="a")(image, offset)
    model = keras.Model([image, offset], x)
    with pytest.raises(ValueError, match="`tf_deform.load_plain_weights"):
        model.load_weights(path)
    load_plain_weights(model, path)
    np.testing.assert_equal(values(model), values(plain))


@pytest.mark.parametrize("key", ["offset_kernel", "offset_bias"])
@pytest.mark.parametrize("value", [None, np.zeros((18, 2))], ids=["no", "bad"])
def test_half_a_branch_is_refused(value, key, tmp_path):
    """Tests that no weight of the layer is loaded."""
    path = save(fill(make_chain(DeformableConv2D, named)), tmp_path)
    change(path, f"layers/deformable_conv2d/vars/{key}", value)
    model = fill(make_chain(DeformableConv2D, named), seed=1)
    with refused(model.get_layer("b"), ValueError, "Expected .* branch"):
        model.load_weights(path)


@pytest.mark.parametrize("key", ["0", "1"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda x, r: DeformableROIAlign(2, 1.0, name="x")(x, r),
        lambda x, r: DeformableROIPooling(2, 1.0, name="x")(x, r),
        lambda x, r: DeformablePSROIPooling(1, 2, 1.0, name="x")(
            x, r, trans_inputs=x
        ),
    ],
)
def test_half_a_branch_of_regions_is_refused(layer, key, tmp_path):
    image, rois = keras.Input((7, 8, 4)), keras.Input((5,))
    model = fill(keras.Model([image, rois], layer(image, rois)))
    path = save(model, tmp_path)
    with h5py.File(path) as file:
        (kind,) = [x for x in file["layers"] if x.startswith("deform")]
    change(path, f"layers/{kind}/vars/{key}", None)
    with refused(model, ValueError, "expected 2 variables"):
        model.load_weights(path)
    with refused(model, ValueError, "of the branch of layer 'x' only"):
        load_plain_weights(model, path)
