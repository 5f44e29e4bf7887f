# SPDX-License-Identifier: Apache-2.0
"""Runs an ONNX file with deformable convolutions in OpenVINO.

    python examples/openvino_extension.py model.onnx images.npy outputs.npz

OpenVINO has the operation, but does not look for it in ONNX files:
`deform_conv` tells OpenVINO how to read ONNX's DeformConv. The module needs
nothing but OpenVINO.
"""

import argparse

import numpy as np
import openvino
from openvino import opset8
from openvino.frontend.onnx import ConversionExtension


def _convert(node) -> list[openvino.Output]:
    """Converts ONNX's DeformConv to an operation of OpenVINO."""
    given = [node.get_input(i) for i in range(node.get_input_size())]
    # An optional input may exist and be empty.
    given = [
        None if value.get_node().get_type_name() == "NullNode" else value
        for value in given
    ] + [None, None]
    inputs, kernel, offset, bias, mask = given[:5]
    pads = node.get_attribute("pads", [0, 0, 0, 0])
    outputs = opset8.deformable_convolution(
        inputs,
        offset,
        kernel,
        strides=node.get_attribute("strides", [1, 1]),
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=node.get_attribute("dilations", [1, 1]),
        mask=mask,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        # The standard defines pixels outside of the image as zeros.
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        shape = np.array([1, -1, 1, 1])
        outputs = opset8.add(outputs, opset8.reshape(bias, shape, False))
    return outputs.outputs()


def deform_conv() -> ConversionExtension:
    """Returns the extension for `openvino.Core.add_extension`."""
    return ConversionExtension("DeformConv", _convert)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run an ONNX file with deformable convolutions in OpenVINO."
    )
    parser.add_argument("model", help="ONNX file")
    parser.add_argument("inputs", help=".npy file with the model's one input")
    parser.add_argument("outputs", help=".npz file to write, by name")
    args = parser.parse_args()
    core = openvino.Core()
    core.add_extension(deform_conv())
    # Without this option OpenVINO computes in bfloat16 where the processor can,
    # and rounds positions.
    compiled = core.compile_model(
        args.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled([np.load(args.inputs)])
    np.savez(args.outputs, **{out.any_name: x for out, x in found.items()})


if __name__ == "__main__":
    main()
