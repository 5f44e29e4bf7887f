# SPDX-License-Identifier: Apache-2.0
"""A plain model's weights in its deformable twin, from every kind of file."""

import json
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from operands import random

import tf_deform
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

FILES = ("weights.h5", "weights.json", "keras", "h5", "legacy weights")
layers = keras.layers


def save(model, folder, kind="weights.h5"):
    """Saves a model, or its weights, as a user would."""
    path = folder / f"plain.{kind}"
    if kind == "weights.json":
        largest = max(weight.numpy().nbytes for weight in model.weights)
        model.save_weights(path, max_shard_size=1.01 * largest / 2**30)
    elif kind == "weights.h5":
        model.save_weights(path)
    elif kind == "legacy weights":  # What Keras 2's `save_weights` wrote.
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


def fill(model, seed=0):
    """Numbers that are all different, so that none can be taken for another."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 0.5, weight.shape))
    return model


def values(model):
    return [weight.numpy() for weight in model.weights]


def chain(layer, name):
    """Convolutions of one shape, so that only names or order tell them."""
    return [
        layers.Conv2D(4, 3, padding="same", name=name("a")),
        layer(4, 3, padding="same", name=name("b")),
        layers.Conv2D(4, 3, padding="same", name=name("c")),
        layer(4, 3, padding="same", name=name("d")),
        layers.Conv2D(4, 3, padding="same", name=name("e")),
    ]


def make_chain(layer, name):
    image = x = keras.Input((7, 8, 4))
    for each in chain(layer, name):
        x = each(x)
    return keras.Model(image, x)


def make_sequential(layer, name):
    return keras.Sequential([keras.Input((7, 8, 4)), *chain(layer, name)])


def make_residual(layer, name):
    """As a ResNet: blocks, with shortcuts of their own, normalised."""
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
    """Models in models; two of the same names inside."""
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
    """Layers in layers, and of many kinds."""
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
    """Layers as attributes, in lists, in dictionaries; a weight of its own."""

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


MAKERS = [
    make_chain,
    make_sequential,
    make_residual,
    make_nested,
    make_shared,
    make_wrapped,
    make_subclassed,
]


def named(name):
    return name


def unnamed(name):
    return None


def image_for(model):
    shape = getattr(model, "input_shape", None) or (1, 7, 8, 4)
    return random(2, *shape[1:])


def assert_is_twin(model, plain):
    """The same outputs, and nothing in the branches."""
    image = image_for(plain)
    np.testing.assert_allclose(model(image), plain(image), 1e-5, 1e-5)
    for weight in model.weights:
        if "offset" in weight.path:
            assert not weight.numpy().any()


@pytest.mark.parametrize(
    "kind,name,make",
    [
        *((kind, named, make) for kind in FILES[:4] for make in MAKERS),
        *(
            (kind, unnamed, make)
            for kind in ("weights.h5", "h5")
            for make in MAKERS
        ),
        ("weights.json", unnamed, make_residual),
        ("keras", unnamed, make_nested),
        ("legacy weights", named, make_residual),
        ("legacy weights", unnamed, make_nested),
    ],
)
def test_files(kind, name, make, tmp_path):
    if make is make_subclassed and kind in ("keras", "h5", "legacy weights"):
        # `keras` holds it as well; `h5` is for others.
        kind = "weights.h5"
    plain = fill(make(layers.Conv2D, name))
    path = save(plain, tmp_path, kind)
    model = make(DeformableConv2D, name)
    legacy = kind in ("h5", "legacy weights")
    if legacy and make is make_wrapped and name is unnamed:
        # The two cells of the LSTM have one name, and nothing else tells.
        with pytest.raises(ValueError, match="frozen ones are written last"):
            tf_deform.load_plain_weights(model, path)
        return
    report = tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)
    twice = make in (make_nested, make_wrapped) and not legacy
    by_order = name is unnamed or twice
    assert report.matched_by == ("order" if by_order else "name")
    # Every weight is in it, once.
    loaded = sum(len(layer.loaded) for layer in report.layers)
    stayed = sum(len(layer.stayed) for layer in report.layers)
    assert loaded == len(plain.weights)
    assert loaded + stayed == len(model.weights)
    assert all(layer.name in str(report) for layer in report.layers)


def test_the_report(tmp_path):
    plain = fill(make_chain(layers.Conv2D, named))
    path = save(plain, tmp_path)
    report = tf_deform.load_plain_weights(
        make_chain(DeformableConv2D, named), path
    )
    assert report.path == path
    assert [layer.name for layer in report.layers] == list("abcde")
    assert report.layers[1].loaded == ("kernel", "bias")
    assert report.layers[1].stayed == ("offset_kernel", "offset_bias")
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


def without_names(path):
    """As files of Keras 2 are, and of the first ones of Keras 3."""
    with h5py.File(path, "a") as file:
        groups = []
        file.visititems(lambda _, item: groups.append(item))
        for item in groups:
            item.attrs.pop("name", None)
        # Keras 2 saved these as well.
        file["metrics/mean/vars/0"] = np.float32(3)
        file["optimizer/vars/0"] = np.int64(3)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", [named, unnamed])
def test_files_without_names(name, make, tmp_path):
    plain = fill(make(layers.Conv2D, name))
    path = save(plain, tmp_path)
    without_names(path)
    model = make(DeformableConv2D, name)
    report = tf_deform.load_plain_weights(model, path)
    assert report.matched_by == "order"
    assert_is_twin(model, plain)


def test_files_of_keras_2_13(tmp_path):
    plain = fill(make_nested(layers.Conv2D, named))
    path = save(plain, tmp_path)
    without_names(path)
    with h5py.File(path, "a") as file:
        for outer in ("layers/functional", "layers"):
            file.move(
                f"{outer}/layers" if "/" in outer else outer,
                outer.replace("layers", "_layer_checkpoint_dependencies")
                if outer == "layers"
                else f"{outer}/_layer_checkpoint_dependencies",
            )
    model = make_nested(DeformableConv2D, named)
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


def as_keras_2(path):
    """Names end with ":0", and those inside do not begin with the outer's."""
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
    """They are written behind the others, whatever the model's order is."""

    def make(layer):
        inner = [keras.Input((7, 8, 4))]
        for part in chain(layer, name)[:3]:
            inner += [
                part,
                layers.BatchNormalization(name=name(part.name + "n")),
            ]
        inner = keras.Sequential(inner, name="inner")
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
    before = values(model)
    if name is unnamed and frozen == "some":
        # Nothing tells which is which: shapes are all the same.
        with pytest.raises(ValueError, match="frozen ones are written last"):
            tf_deform.load_plain_weights(model, path)
        np.testing.assert_equal(values(model), before)
        return
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


@pytest.mark.parametrize("kind", ["weights.h5", "h5"])
def test_renamed_layers(kind, tmp_path):
    """Found by order, unless that contradicts the names that are there."""
    plain = fill(make_chain(layers.Conv2D, named))
    path = save(plain, tmp_path, kind)
    model = make_chain(DeformableConv2D, lambda x: "new" if x == "b" else x)
    assert tf_deform.load_plain_weights(model, path).matched_by == "order"
    assert_is_twin(model, plain)
    # "a" and "c" have changed places, and "b" has another name.
    names = {"a": "c", "b": "new", "c": "a"}
    model = make_chain(DeformableConv2D, lambda x: names.get(x, x))
    before = values(model)
    with pytest.raises(ValueError, match="weights of 'a' for layer 'c'"):
        tf_deform.load_plain_weights(model, path)
    np.testing.assert_equal(values(model), before)
    # The same names in another order are found by name.
    names = {"a": "c", "c": "a"}
    model = make_chain(DeformableConv2D, lambda x: names.get(x, x))
    assert tf_deform.load_plain_weights(model, path).matched_by == "name"
    np.testing.assert_array_equal(
        model.get_layer("c").kernel, plain.get_layer("c").kernel
    )


def test_names_that_keras_counts(tmp_path):
    """The twin's "conv2d_1" is the file's "conv2d_2": names mislead here."""
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
        ("h5", "float16"),  # Keras cannot write bfloat16 there.
        ("h5", "float64"),
    ],
)
def test_numbers_of_other_types(kind, dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    plain = fill(make_chain(layers.Conv2D, named))
    path = save(plain, tmp_path, kind)
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
    """The optimizer's state is in the file, and is left there."""
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
    """Are taken too, with their branches, but not by plain models."""
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
    """A plain model has no weights for them: all of theirs stay."""

    def make(layer, deformable):
        image, rois = keras.Input((7, 8, 4)), keras.Input((5,))
        x = layer(4, 3, padding="same", name=name("a"))(image)
        if deformable:
            x = [
                DeformableROIAlign(2, 1.0, units=(3,))(x, rois),
                DeformableROIPooling(2, 1.0)(x, rois),
                DeformablePSROIPooling(1, 2, 1.0)(x, rois, trans_inputs=x),
            ]
            x = layers.Concatenate()(x)
        else:
            x = layers.Concatenate()([x, x, x[..., :1]])
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
    for index in (-2, -1):
        np.testing.assert_array_equal(
            model.weights[index], plain.weights[index]
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
    """Raises, says what, and leaves the model as it was."""
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
    shards[1].rename(shards[0])  # Two shards are one and the same.
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
    """Kernel and bias are taken, and what was adapted is gone, as in Keras."""
    plain = fill(make_chain(layers.Conv2D, named))
    path = save(plain, tmp_path)
    model = make_chain(DeformableConv2D, named)
    for layer in model.layers[1:]:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(layer.lora_kernel_b + 1)
    tf_deform.load_plain_weights(model, path)
    assert_is_twin(model, plain)


# What Keras' own `load_weights` says.


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
    """And nothing of the layer is loaded."""
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
