# SPDX-License-Identifier: Apache-2.0
"""Tests `tf_deform.models.backbone`."""

import re
import sys

import keras
import numpy as np
import pytest

import tf_deform
from tf_deform.models import backbone

apps = keras.applications
layers = keras.layers


def images(size: int, count: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size, 3)).astype("uint8")


def filled(model: keras.Model) -> keras.Model:
    """Sets weights that a new model has not: statistics, scales, biases."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def make_network(size: int | None = 96, last: int = 32) -> keras.Model:
    """Makes a small network of stride 32 with a shortcut in every stage."""
    image = keras.Input((size, size, 3))
    x = layers.Conv2D(5, 3, 2, padding="same", name="c1")(image)
    for level, width in ((2, 6), (3, 7), (4, 8), (5, 9)):
        options = {"padding": "same", "activation": "softplus"}
        x = layers.ZeroPadding2D(1)(x)
        x = layers.Conv2D(width, 3, 2, name=f"c{level}")(x)
        y = layers.Conv2D(width, 3, name=f"c{level}_a", **options)(x)
        x = layers.Add(name=f"c{level}_out")([x, y])
        if 2**level == last:
            break
    return keras.Model(image, x, name="small")


# The maps.


# The layers that give the maps, as papers on these networks choose them; and
# sizes of an image of 96 pixels.
MAPS = {
    "resnet50": [
        *("conv2_block3_out", "conv3_block4_out"),
        *("conv4_block6_out", "conv5_block3_out"),
    ],
    # Its stages end with the layer of stride 2, which belongs to the next map.
    "resnet50v2": [
        *("conv2_block2_out", "conv3_block3_out"),
        *("conv4_block5_out", "post_relu"),
    ],
    "VGG16": ["block3_conv3", "block4_conv3", "block5_conv3", "block5_pool"],
    "DenseNet-121": ["pool2_conv", "pool3_conv", "pool4_conv", "relu"],
    "mobilenet_v2": [
        *("block_3_expand_relu", "block_6_expand_relu"),
        *("block_13_expand_relu", "out_relu"),
    ],
    "efficientnetv2b0": [
        *("block2b_add", "block4a_expand_activation"),
        *("block6a_expand_activation", "top_activation"),
    ],
    "xception": ["P2_border", "add_1", "add_10", "block14_sepconv2_act"],
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_applications(name):
    model = backbone(name, image_size=96)
    assert list(model.output) == ["P2", "P3", "P4", "P5"]
    for map_, layer, stride in zip(
        model.output.values(), MAPS[name], (4, 8, 16, 32), strict=True
    ):
        # Keras numbers layers without a name over a whole process.
        pattern = re.sub(r"_\d+$", r"(_\\d+)?", layer)
        found = map_._keras_history.operation.name
        assert re.fullmatch(pattern, found) or layer == found
        assert map_.shape[1:3] == (96 // stride, 96 // stride)
    assert model.input_shape == (None, 96, 96, 3)


@pytest.mark.parametrize(
    "name", ["vgg16", "mobilenetv2", "densenet121", "mobilenetv3small"]
)
def test_preprocessing_is_that_of_the_network(name):
    """Compares with the network's own function, which users call by hand."""
    model = backbone(name, image_size=64)
    (make,) = (
        value
        for key, value in vars(apps).items()
        if key.lower() == name and callable(value)
    )
    plain = make(include_top=False, weights=None, input_shape=(64, 64, 3))
    plain.set_weights(filled(model).get_weights())
    given = images(64)
    preprocess = sys.modules[make.__module__].preprocess_input
    expected = np.array(plain(preprocess(given.astype("float32"))))
    for dtype in ("uint8", "float32"):
        received = np.array(model(given.astype(dtype))["P5"])
        largest = np.abs(expected).max()
        assert largest > 0
        np.testing.assert_allclose(received, expected, atol=1e-5 * largest)


def test_pixels_keep_their_precision_in_16_bits():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = backbone("vgg16", image_size=32)
    given = images(32).astype("float32") + 0.3
    given = model.get_layer("preprocess")(given)
    assert given.dtype == "float32"
    assert model(images(32))["P5"].dtype == "bfloat16"
    keras.mixed_precision.set_global_policy("float32")
    again = backbone("vgg16", image_size=32)
    again.set_weights(model.get_weights())
    expected = np.array(again(images(32))["P5"])
    received = np.array(model(images(32))["P5"]).astype("float32")
    # Thirteen convolutions in a row, each rounded to the 8 bits of bfloat16.
    np.testing.assert_allclose(received, expected, atol=0.05 * expected.max())


@pytest.mark.parametrize("size", [None, 96])
@pytest.mark.parametrize("image_size", [None, 96])
def test_a_model_that_is_given(size, image_size):
    network = make_network(size)
    model = backbone(network, image_size=image_size)
    assert model.weights == network.weights
    given = images(96)
    found = model(given)
    assert {name: each.shape for name, each in found.items()} == {
        "P2": (2, 24, 24, 6),
        "P3": (2, 12, 12, 7),
        "P4": (2, 6, 6, 8),
        "P5": (2, 3, 3, 9),
    }
    np.testing.assert_array_equal(found["P5"], network(given))
    known = None if size is image_size is None else 96
    assert model.input_shape == (None, known, known, 3)
    assert model.output["P3"].shape[1] == (known and 12)


def test_maps_that_are_told():
    """Tests outputs of these names, and KerasHub's attribute."""
    network = make_network()
    maps = {
        "P5": network.get_layer("c5_a").output,
        "P3": network.get_layer("c3_a").output,
        "more": network.output,
    }
    image = network.input
    for given in (keras.Model(image, maps), keras.Model(image, network.output)):
        if not isinstance(given.output, dict):
            given.pyramid_outputs = maps
        model = backbone(given)
        assert list(model.output) == ["P3", "P5"]
        assert model.output["P5"] is maps["P5"]
    again = backbone(model)
    assert again.output == model.output


def test_a_sequential_model():
    model = keras.Sequential(
        [keras.Input((64, 64, 3))]
        + [layers.Conv2D(n, 3, 2, padding="same") for n in (2, 3, 4)]
    )
    found = backbone(model).output
    assert {k: v.shape[1:] for k, v in found.items()} == {
        "P2": (16, 16, 3),
        "P3": (8, 8, 4),
    }


def test_shared_and_nested_layers():
    """Tests a layer that is called twice, and a model within the model."""
    image = keras.Input((64, 64, 3))
    twice = layers.Conv2D(3, 3, 2, padding="same")
    x = twice(twice(image))
    inner = make_network(None, last=4)
    x = inner(x)
    model = backbone(keras.Model(image, keras.ops.tanh(x)))
    assert {k: v.shape[1:] for k, v in model.output.items()} == {
        "P2": (16, 16, 3),
        "P4": (4, 4, 6),
    }


def test_missing_borders_are_evenly_filled():
    image = keras.Input((70, 70, 3))
    x = layers.Conv2D(4, 7, 4)(image)  # 16 of 18 cells
    x = layers.Conv2D(4, 5, 2, name="last")(x)  # 6 of 9
    model = backbone(keras.Model(image, x))
    maps = model(images(70))
    assert maps["P2"].shape == (2, 18, 18, 4)
    assert maps["P3"].shape == (2, 9, 9, 4)
    p3 = np.array(maps["P3"])
    inner = np.array(keras.Model(image, x)(images(70)))
    np.testing.assert_array_equal(p3[:, 1:7, 1:7], inner)
    assert not p3[:, [0, 7, 8]].any() and not p3[:, :, [0, 7, 8]].any()


# Weights.


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras", ".h5"])
@pytest.mark.parametrize("include_top", [False, True])
def test_files_of_weights(tmp_path, suffix, include_top):
    """Loads files as Keras writes them, which number layers by class."""
    top = {"classes": 7} if include_top else {}
    plain = filled(
        apps.VGG16(
            include_top=include_top,
            weights=None,
            input_shape=(32, 32, 3),
            **top,
        )
    )
    path = tmp_path / f"plain{suffix}"
    (plain.save_weights if "weights" in suffix else plain.save)(path)
    model = backbone("vgg16", path, 32)
    given = apps.vgg16.preprocess_input(images(32).astype("float32"))
    expected = keras.Model(plain.input, plain.get_layer("block5_pool").output)
    np.testing.assert_array_equal(model(images(32))["P5"], expected(given))


def test_weights_of_a_model_that_is_given(tmp_path):
    filled(make_network()).save_weights(tmp_path / "small.weights.h5")
    model = backbone(make_network(), tmp_path / "small.weights.h5")
    expected = filled(make_network())
    for one, other in zip(model.get_weights(), expected.get_weights()):
        if one.ndim == 1:
            np.testing.assert_array_equal(one, other)


def test_names_of_weights_that_keras_1_gave(tmp_path):
    """Loads a file as VGG16's: its weights are called "conv1_W:0"."""
    import h5py

    plain = filled(make_network())
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        with_weights = [layer for layer in plain.layers if layer.weights]
        file.attrs["layer_names"] = [x.name for x in with_weights]
        for layer in with_weights:
            group = file.create_group(layer.name)
            names = [f"{layer.name}_{letter}_1:0" for letter in "Wb"]
            group.attrs["weight_names"] = names
            for name, array in zip(names, layer.get_weights()):
                group[name] = array
    model = backbone(make_network(), path)
    np.testing.assert_array_equal(model(images(96))["P5"], plain(images(96)))


def test_a_deeper_network_is_refused(tmp_path):
    """Its layers beyond those of the network are no top."""
    apps.VGG19(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    ).save_weights(tmp_path / "deeper.weights.h5")
    with pytest.raises(ValueError, match=r"deeper\.weights\.h5.*block3_conv4"):
        backbone("vgg16", tmp_path / "deeper.weights.h5", 32)


def test_no_network_names_file_folder_and_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path)
    )

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", refuse)
    with pytest.raises(OSError) as caught:
        backbone("vgg16", "imagenet", 64)
    text = str(caught.value)
    name = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert str(tmp_path / "models" / name) in text
    assert "no network" in text
    for way in ("--weights FILE", "--backbone FILE", "--weights none"):
        assert way in text
    assert re.search(r"sum is [0-9a-f]{32,}\)", text)


# With the other functions.


@pytest.mark.parametrize("size", [None, 96])
def test_deformable_and_finer(tmp_path, size):
    network = make_network(size)
    model = backbone(network, image_size=96)
    given = images(96)
    before = {k: np.array(v) for k, v in model(given).items()}
    report = tf_deform.make_deformable(model, "c4-c5", verbose=False)
    assert {one.path.split("/")[-1] for one in report.changed} == {
        *("c4", "c4_a", "c5", "c5_a")
    }
    for name, map_ in model(given).items():
        np.testing.assert_allclose(map_, before[name], rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name, map_ in model(given).items():
        np.testing.assert_array_equal(loaded(given)[name], map_)

    finer = tf_deform.set_output_stride(
        backbone(make_network(size), image_size=96), 16
    )
    assert finer.output["P5"].shape[1:] == (6, 6, 9)
    assert finer.output["P4"].shape[1:] == (6, 6, 8)
    report = tf_deform.make_deformable(finer, "c4", verbose=False)
    assert len(report.changed) == 4
    earlier = tf_deform.set_output_stride(make_network(96), 16)
    tf_deform.make_deformable(earlier, "c4", verbose=False)
    # By its stride the last map is now P4.
    found = backbone(earlier).output
    assert {k: v.shape[1:] for k, v in found.items()} == {
        "P2": (24, 24, 6),
        "P3": (12, 12, 7),
        "P4": (6, 6, 9),
    }


def test_a_frozen_stem():
    model = backbone("resnet50", image_size=32)
    tf_deform.train_only(model, "c3-")
    trained = {layer.name for layer in model.layers if layer.trainable_weights}
    assert all(re.match("conv[345]_.*_conv", name) for name in trained)
    assert len(trained) == 4 * 3 + 1 + 6 * 3 + 1 + 3 * 3 + 1


# What is refused.


def make_subclassed() -> keras.Model:
    class Own(keras.Model):
        pass

    return Own()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: backbone("resnet"), ValueError, "resnet101.*Received: 'resne"),
        (lambda: backbone(3), TypeError, "Received: 3 of type int"),
        (lambda: backbone(make_subclassed()), ValueError, "functional"),
        (
            lambda: backbone(make_network(), "imagenet"),
            ValueError,
            "with the name of a network",
        ),
        (
            lambda: backbone(make_network(), image_size=64),
            ValueError,
            r"\(96, 96\). Received: 64",
        ),
        (lambda: backbone("vgg16", None, 0), ValueError, "`image_size`"),
        (lambda: backbone("vgg16", None, 6.5), ValueError, "`image_size`"),
        (lambda: backbone("vgg16", "gone.h5"), FileNotFoundError, "gone.h5"),
        (
            lambda: backbone(
                keras.Sequential(
                    [keras.Input((64, 64, 3)), layers.Conv2D(2, 3, 2)]
                ),
            ),
            ValueError,
            "stride of 4, 8, 16 or 32",
        ),
    ],
)
def test_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
