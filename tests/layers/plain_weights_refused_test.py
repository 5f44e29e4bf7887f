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


def change(path, edit):
    with h5py.File(path, "a") as file:
        edit(file)


def replace(file, key, value):
    del file[key]
    file[key] = value


BAD = {
    "a shape": (
        lambda file: replace(
            file, "layers/conv2d_1/vars/0", np.zeros((3, 3, 4, 5), "float32")
        ),
        r"for 'kernel' of layer 'b' the shape \(3, 3, 4, 5\) in place of",
    ),
    "a rank": (
        lambda file: replace(file, "layers/conv2d_2/vars/1", np.float32(1)),
        r"for 'bias' of layer 'c' the shape \(\) in place of \(4,\)",
    ),
    "a type": (
        lambda file: replace(
            file, "layers/conv2d_1/vars/1", np.zeros(4, "int8")
        ),
        "for 'bias' of layer 'b' the type int8",
    ),
    "a text": (
        lambda file: replace(
            file, "layers/conv2d_1/vars/1", np.array([b"a"] * 4)
        ),
        "for 'bias' of layer 'b' the type",
    ),
    "no bias": (
        lambda file: file.__delitem__("layers/conv2d_1/vars/1"),
        r"for layer 'b' the arrays \['0'\]",
    ),
    "one array more": (
        lambda file: file.__setitem__("layers/conv2d_1/vars/2", np.ones(3)),
        r"for layer 'b' the arrays \['0', '1', '2'\]",
    ),
    "no layer": (
        lambda file: file.__delitem__("layers/conv2d_4"),
        "no layer 'e' in the file.*nothing at 'layers/conv2d_4' for layer 'e'",
    ),
    "one layer more": (
        lambda file: file.__setitem__("layers/dense/vars/0", np.ones(3)),
        "weights at 'layers/dense', for which the model has no layer",
    ),
    "half of the branch": (
        lambda file: file.__setitem__(
            "layers/conv2d_1/vars/offset_bias", np.zeros(18, "float32")
        ),
        r"of the branch of layer 'b' only \['offset_bias'\]",
    ),
    "the other half": (
        lambda file: file.__setitem__(
            "layers/conv2d_3/vars/offset_kernel",
            np.zeros((3, 3, 4, 18), "float32"),
        ),
        r"of the branch of layer 'd' only \['offset_kernel'\]",
    ),
    "a branch for a plain layer": (
        lambda file: file.__setitem__(
            "layers/conv2d/vars/offset_bias", np.zeros(18, "float32")
        ),
        "for layer 'a' the arrays",
    ),
    "a link to another file": (
        lambda file: replace(
            file,
            "layers/conv2d_1/vars/0",
            h5py.ExternalLink("other.h5", "array"),
        ),
        r"for layer 'b' the arrays \['1'\]",
    ),
    "numbers of another file": (
        lambda file: (
            file.__delitem__("layers/conv2d_1/vars/1"),
            file["layers/conv2d_1/vars"].create_dataset(
                "1", (4,), "float32", external=[("other.bin", 0, 16)]
            ),
        ),
        "'1' of 'layers/conv2d_1' in another file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case, tmp_path):
    """Tests that the error tells the misfit. The model stays unchanged."""
    edit, message = BAD[case]
    path = save(fill(make_chain(layers.Conv2D, named)), tmp_path)
    change(path, edit)
    model = fill(make_chain(DeformableConv2D, named), seed=1)
    before = values(model)
    with pytest.raises(ValueError, match=f"(?s)Received.*{message}.*Nothing"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)


@pytest.mark.parametrize("kind", ["h5", "legacy weights"])
def test_what_does_not_fit_in_legacy_files(kind, tmp_path):
    path = save(fill(make_chain(layers.Conv2D, named)), tmp_path, kind)
    prefix = "model_weights/" if kind == "h5" else ""
    for make, message in (
        (lambda: make_chain(DeformableConv2D, named), "the shape"),
        (lambda: make_sequential(DeformableConv2D, unnamed), "the shape"),
        (
            lambda: make_shared(DeformableConv2D, named),
            "5 layers in place of 2",
        ),
        (
            lambda: make_residual(DeformableConv2D, named),
            "5 layers in place of",
        ),
    ):
        model = fill(make(), seed=1)
        before = values(model)
        change(
            path,
            lambda file: replace(
                file, f"{prefix}c/c/kernel", np.zeros((3, 4), "float32")
            ),
        )
        with pytest.raises(ValueError, match=message):
            tf_deform.load_plain_weights(model, path)
        np.testing.assert_equal(values(model), before)


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind, tmp_path):
    path = save(fill(make_chain(layers.Conv2D, named)), tmp_path, kind)
    model = fill(make_chain(DeformableConv2D, named), seed=1)
    before = values(model)
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"Expected.*cannot be read"):
            tf_deform.load_plain_weights(model, path)
    path.write_bytes(b"x" * 3000)
    with pytest.raises(ValueError, match="Expected `path` to be a .weights.h5"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)


def test_other_files(tmp_path):
    model = fill(make_chain(DeformableConv2D, named))
    before = values(model)
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    (tmp_path / "list.weights.json").write_text("[1]")
    (tmp_path / "up.weights.json").write_text(
        json.dumps({"weight_map": {"/layers/a/vars": "../plain.weights.h5"}})
    )
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["numbers"] = np.ones(3)
    for name, message in (
        ("other.keras", "cannot be read.*model.weights.h5"),
        ("list.weights.json", "cannot be read"),
        ("up.weights.json", "a shard called '../plain.weights.h5'"),
        ("empty.h5", "no layer 'a' in the file"),
    ):
        with pytest.raises(ValueError, match=message):
            tf_deform.load_plain_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.weights.h5"):
        tf_deform.load_plain_weights(model, tmp_path / "missing.weights.h5")
    with pytest.raises(IsADirectoryError):
        tf_deform.load_plain_weights(model, tmp_path)
    path = save(fill(make_chain(layers.Conv2D, named)), tmp_path, FILES[1])
    shards = sorted(tmp_path.glob("plain_*.weights.h5"))
    shutil.copy(shards[0], tmp_path / "kept.h5")
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        tf_deform.load_plain_weights(model, path)
    shards[1].rename(shards[0])  # Two shards are the same file.
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match="for layer 'a' the arrays"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)


def test_other_models(tmp_path):
    path = save(fill(make_chain(layers.Conv2D, named)), tmp_path)
    with pytest.raises(TypeError, match="`model` to be a keras.Model"):
        tf_deform.load_plain_weights(DeformableConv2D(3, 3), path)
    with pytest.raises(ValueError, match="`model` to be built"):
        tf_deform.load_plain_weights(keras.Sequential([layers.Dense(3)]), path)
    with pytest.raises(TypeError, match="`path` to be a str or an os.PathL"):
        tf_deform.load_plain_weights(make_chain(layers.Conv2D, named), None)
    # A plain model is its own twin.
    plain = make_chain(layers.Conv2D, named)
    tf_deform.load_plain_weights(plain, path)
    assert_is_twin(plain, plain)
    tf_deform.load_plain_weights(plain, str(path))


def test_a_layer_that_refuses_when_others_are_done(tmp_path):
    class Fussy(keras.layers.Dense):
        def load_own_variables(self, store):
            super().load_own_variables(store)
            raise RuntimeError("never")

    def make(layer):
        image = keras.Input((7, 8, 4))
        x = layer(4, 3, name="a")(image)
        return keras.Model(image, Fussy(3, name="z")(x))

    path = save(fill(make(layers.Conv2D)), tmp_path)
    model = fill(make(DeformableConv2D), seed=1)
    before = values(model)
    with pytest.raises(RuntimeError, match="never"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)


def test_low_rank_adapters(tmp_path):
    """Tests that kernel and bias are loaded.

    The adapters are lost, as in Keras.
    """
    plain = fill(make_chain(layers.Conv2D, named))
    path = save(plain, tmp_path)
    model = make_chain(DeformableConv2D, named)
    for layer in model.layers[1:]:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(layer.lora_kernel_b + 1)
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


# Messages of Keras' own `load_weights`.
@pytest.mark.parametrize("make", [make_chain, make_sequential, make_residual])
@pytest.mark.parametrize("kind", ["weights.h5", "weights.json", "keras"])
def test_load_weights_of_a_plain_file_names_the_way(kind, make, tmp_path):
    path = save(fill(make(layers.Conv2D, named)), tmp_path, kind)
    model = make(DeformableConv2D, named)
    with pytest.raises(ValueError, match="`tf_deform.load_plain_weights"):
        model.load_weights(path)


def test_layers_with_given_offsets_name_the_way(tmp_path):
    def make(layer):
        image = keras.Input((7, 8, 4))
        if layer is layers.Conv2D:
            return keras.Model(image, layer(4, 3, name="a")(image))
        offset = keras.Input((5, 6, 18))
        return keras.Model(
            [image, offset], layer(4, 3, name="a")(image, offset)
        )

    plain = fill(make(layers.Conv2D))
    path = save(plain, tmp_path)
    model = make(DeformableConv2D)
    with pytest.raises(ValueError, match="`tf_deform.load_plain_weights"):
        model.load_weights(path)
    tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), values(plain))


@pytest.mark.parametrize("key", ["offset_kernel", "offset_bias"])
@pytest.mark.parametrize("kind", ["missing", "another shape"])
def test_half_a_branch_is_refused(kind, key, tmp_path):
    """Tests that no weight of the layer is loaded."""
    source = fill(make_chain(DeformableConv2D, named))
    path = save(source, tmp_path)
    at = f"layers/deformable_conv2d/vars/{key}"
    change(path, lambda file: file.__delitem__(at))
    if kind == "another shape":
        change(path, lambda file: file.__setitem__(at, np.zeros((18, 2))))
    model = fill(make_chain(DeformableConv2D, named), seed=1)
    before = values(model.get_layer("b"))
    with pytest.raises(ValueError, match="Expected .* branch"):
        model.load_weights(path)
    np.testing.assert_equal(values(model.get_layer("b")), before)


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
    kind = [x for x in h5py.File(path)["layers"] if x.startswith("deform")][0]
    change(path, lambda file: file.__delitem__(f"layers/{kind}/vars/{key}"))
    before = values(model)
    with pytest.raises(ValueError, match="expected 2 variables"):
        model.load_weights(path)
    with pytest.raises(ValueError, match="of the branch of layer 'x' only"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)
