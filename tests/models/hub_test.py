# SPDX-License-Identifier: Apache-2.0
"""Tests presets of KerasHub's models that were made deformable."""

import keras
import keras_hub
import numpy as np
import pytest
import zoo

import tf_deform

LOAD = """
import sys
import keras_hub
import numpy as np
import tf_deform.hub
folder, kind = sys.argv[1:]
kind = getattr(keras_hub.models, kind)
model = kind.from_preset(f"{folder}/preset")
images = np.load(f"{folder}/images.npy")
np.save(f"{folder}/outputs.npy", getattr(model, "backbone", model)(images))
print(type(model).__name__, len(tf_deform.deformable_layers(model)))
"""


def images():
    return (
        np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype("float32")
    )


def displace(model):
    rng = np.random.default_rng(1)
    for layer in tf_deform.deformable_layers(model):
        layer.offset_bias.assign(rng.normal(size=layer.offset_bias.shape))


def classifier():
    return keras_hub.models.ResNetImageClassifier(
        zoo.tiny_resnet(), num_classes=3
    )


@pytest.mark.parametrize(
    "make,kind",
    [
        (zoo.tiny_resnet, "Backbone"),
        (zoo.tiny_resnet, "ResNetBackbone"),
        (classifier, "ImageClassifier"),
        (classifier, "ResNetImageClassifier"),
    ],
)
def test_a_preset(make, kind, tmp_path, run_python_as_it_is):
    model = make()
    tf_deform.make_deformable(model, verbose=False)
    displace(model)
    model.save_to_preset(str(tmp_path / "preset"))
    np.save(tmp_path / "images.npy", images())
    said = run_python_as_it_is(LOAD, tmp_path, kind)
    name = f"ResNet{kind.removeprefix('ResNet')}"
    assert said.split()[-2:] == [name, "6"]
    np.testing.assert_array_equal(
        np.load(tmp_path / "outputs.npy"),
        getattr(model, "backbone", model)(images()),
    )


def test_a_plain_preset_is_as_before(tmp_path):
    import tf_deform.hub  # noqa: F401

    model = zoo.tiny_resnet()
    model.save_to_preset(str(tmp_path / "preset"))
    other = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(other) is keras_hub.models.ResNetBackbone
    np.testing.assert_array_equal(other(images()), model(images()))


def test_other_arguments_of_a_preset(tmp_path):
    import tf_deform.hub  # noqa: F401

    model = zoo.tiny_resnet()
    tf_deform.make_deformable(model, verbose=False)
    model.save_to_preset(str(tmp_path / "preset"))
    other = keras_hub.models.Backbone.from_preset(
        str(tmp_path / "preset"), dtype="bfloat16"
    )
    assert len(tf_deform.deformable_layers(other)) == 6
    assert {layer.dtype for layer in tf_deform.deformable_layers(other)} == {
        "bfloat16"
    }


@pytest.mark.parametrize("stride", [16, 8])
def test_output_stride(stride, tmp_path):
    """Tests a residual network that KerasHub makes by its own arguments."""
    model = zoo.resnet()
    finer = tf_deform.set_output_stride(model, stride)
    size = (1, zoo.SIZE, zoo.SIZE, 3)
    x = np.random.default_rng(0).normal(size=size).astype("float32")
    coarse, fine = np.array(model(x)), np.array(finer(x))
    factor = 32 // stride
    assert fine.shape[1] == factor * coarse.shape[1]
    assert type(finer).__name__ == "ResNetBackbone"
    tf_deform.make_deformable(
        finer, "c4" if stride == 16 else "c3", verbose=False
    )
    finer.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(other(x), finer(x))


def test_output_stride_comes_first():
    model = zoo.tiny_resnet()
    finer = tf_deform.set_output_stride(model, 8)
    tf_deform.make_deformable(model, verbose=False)
    for refused in (model, finer):
        before = refused.get_weights()
        with pytest.raises(ValueError, match="once, and then `make_deformable"):
            tf_deform.set_output_stride(refused, 8)
        np.testing.assert_equal(refused.get_weights(), before)
