# SPDX-License-Identifier: Apache-2.0
"""Writes a small ResNet as an ONNX file, with the nodes of open_nsfw.onnx."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

BLOCKS = (1, 2, 1, 1)
# Filters of the stem, and of the bottlenecks of the stages.
STEM, WIDTHS = 5, (3, 4, 2, 6)


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
