# SPDX-License-Identifier: Apache-2.0
"""Tests that the thin ResNet computes what ONNX Runtime computes."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import tf_deform
from tf_deform.demo import _fetch, _thin_resnet

BLOCKS = (1, 2, 1, 1)
# Filters of the stem, and of the bottlenecks of the stages.
STEM, WIDTHS = 5, (3, 4, 2, 6)
MEAN = np.array([104, 117, 123], "float32")  # BGR


class Writer:
    """Writes a ResNet of few filters with the nodes of open_nsfw.onnx."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.nodes, self.arrays = [], []
        self.biases = {}

    def node(self, kind, *inputs, **attributes):
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [output], output, **attributes)
        )
        return output

    def array(self, value):
        name = f"array_{len(self.arrays)}"
        value = np.asarray(value, "float32")
        self.arrays.append(numpy_helper.from_array(value, name))
        return name

    def bias(self, filters):
        # The file holds equal biases once: other nodes take a copy.
        if filters in self.biases:
            return self.node("Identity", self.biases[filters])
        value = self.rng.normal(size=(1, 1, 1, filters))
        self.biases[filters] = self.array(value)
        return self.biases[filters]

    def conv(self, x, channels, filters, size, strides=1):
        kernel = self.rng.normal(size=(filters, channels, size, size))
        kernel = self.array(kernel / np.sqrt(channels * size**2))
        before = size // 2 if size == 3 else 0
        x = self.node("Transpose", x, perm=(0, 3, 1, 2))
        x = self.node(
            "Conv", x, kernel, strides=(strides,) * 2, pads=(before,) * 4
        )
        x = self.node("Transpose", x, perm=(0, 2, 3, 1))
        x = self.node("Cast", x, to=onnx.TensorProto.FLOAT)
        x = self.node("Add", x, self.bias(filters))
        for kind in ("Sub", "Mul", "Add"):
            values = self.rng.normal(size=(1, 1, 1, filters))
            x = self.node(kind, x, self.array(values))
        return x

    def resnet(self):
        pads = np.array([0, 3, 3, 0, 0, 3, 3, 0], "int64")
        self.arrays.append(numpy_helper.from_array(pads, "pads"))
        x = self.node("Pad", "image", "pads")
        x = self.node("Relu", self.conv(x, 3, STEM, 7, 2))
        x = self.node("Transpose", x, perm=(0, 3, 1, 2))
        x = self.node(
            "MaxPool",
            x,
            kernel_shape=(3, 3),
            strides=(2, 2),
            auto_pad="SAME_UPPER",
        )
        x = self.node("Transpose", x, perm=(0, 2, 3, 1))
        channels, outputs = STEM, []
        for stage, (count, width) in enumerate(zip(BLOCKS, WIDTHS)):
            for number in range(count):
                strides = 2 if stage and not number else 1
                y = self.conv(x, channels, width, 1, strides)
                y = self.conv(self.node("Relu", y), width, width, 3)
                if not number:
                    x = self.conv(x, channels, 4 * width, 1, strides)
                y = self.conv(self.node("Relu", y), width, 4 * width, 1)
                x = self.node("Relu", self.node("Add", x, y))
                channels = 4 * width
            outputs.append(x)
        return outputs

    def save(self, path, outputs):
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "resnet",
            [value("image", onnx.TensorProto.FLOAT, (None, 64, 96, 3))],
            [value(each, onnx.TensorProto.FLOAT, None) for each in outputs],
            self.arrays,
        )
        opset = helper.make_opsetid("", 17)
        onnx.save(helper.make_model(graph, opset_imports=[opset]), path)
        return path


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
