# SPDX-License-Identifier: Apache-2.0
"""Tests that the thin ResNet computes what ONNX Runtime computes."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from small_resnet import BLOCKS, WIDTHS, Writer

import tf_deform
from tf_deform.demo import _fetch, _thin_resnet

MEAN = np.array([104, 117, 123], "float32")  # BGR


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    writer = Writer()
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return str(writer.save(path, writer.resnet()))


def photos(height, width):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, (2, height, width, 3)).astype("float32")


def close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


def test_all_stages_equal_onnx_runtime(path):
    images = photos(64, 96)
    session = onnxruntime.InferenceSession(path)
    expected = session.run(None, {"image": images[..., ::-1] - MEAN})
    model = _thin_resnet.thin_resnet50(path, blocks=BLOCKS)
    got = model(images)
    assert list(got) == ["P2", "P3", "P4", "P5"]
    for output, wanted, stride, width in zip(
        got.values(), expected, (4, 8, 16, 32), WIDTHS
    ):
        assert output.shape == (2, 64 // stride, 96 // stride, 4 * width)
        assert np.abs(wanted).max() > 1e-3
        close(output, wanted)


def test_normalisation_is_frozen(path):
    model = _thin_resnet.thin_resnet50(path, image_size=64, blocks=BLOCKS)
    images = photos(64, 64)
    close(model(images, training=True)["P5"], model(images)["P5"])
    names = {each.name for each in model.trainable_variables}
    assert names == {"kernel"}
    assert len(model.trainable_variables) == 1 + 3 * sum(BLOCKS) + 4


def test_model_is_saved_and_made_deformable(path, tmp_path):
    model = _thin_resnet.thin_resnet50(path, image_size=64, blocks=BLOCKS)
    images = photos(64, 64)
    expected = model(images)
    tf_deform.make_deformable(model, stages="c4-c5", verbose=False)
    assert len(tf_deform.deformable_layers(model)) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name, value in loaded(images).items():
        close(value, expected[name])


def test_mixed_precision_keeps_bright_pixels_apart(path):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = _thin_resnet.thin_resnet50(path, blocks=BLOCKS)
    centered = keras.Model(model.input, model.get_layer("center").output)
    # In bfloat16, 250 and 251 would be the same number.
    got = centered(np.full((1, 2, 2, 3), 251, "uint8"))
    np.testing.assert_array_equal(got[0, 0, 0], 251 - MEAN[::-1])


def test_files_of_other_networks_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="hold 53 convolutions.*Received: 20"):
        _thin_resnet.thin_resnet50(path)
    # The same number of convolutions, in another order of widths.
    with pytest.raises(ValueError, match="small.onnx to hold the convolutions"):
        _thin_resnet.thin_resnet50(path, blocks=(2, 1, 1, 1))
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    with pytest.raises(ValueError, match="text.onnx to be an ONNX file"):
        _thin_resnet.thin_resnet50(text)
    writer = Writer()
    x = writer.node("Transpose", "image", perm=(0, 3, 1, 2))
    kernel = writer.array(np.ones((2, 3, 1, 1)))
    x = writer.node("Relu", writer.node("Conv", x, kernel))
    bare = writer.save(tmp_path / "bare.onnx", [x])
    with pytest.raises(ValueError, match="Add behind the node Conv_1 of.*Relu"):
        _thin_resnet.thin_resnet50(bare)


@pytest.mark.skipif(
    not _fetch.is_fetched(_fetch.WEIGHTS), reason="never fetched here"
)
def test_published_weights_equal_onnx_runtime():
    path = _fetch.fetch(_fetch.WEIGHTS) / "open_nsfw.onnx"
    proto = onnx.load(path)
    (mean,) = (n for n in proto.graph.node if n.op_type == "ReduceMean")
    features = helper.make_empty_tensor_value_info(mean.input[0])
    proto.graph.output.append(features)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    images = photos(224, 224)
    _, expected = session.run(None, {"input_0": images[..., ::-1] - MEAN})
    model = _thin_resnet.thin_resnet50(path)
    assert model.count_params() == 5_929_152
    close(model(images)["P5"], expected)
