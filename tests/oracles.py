# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution by ONNX Runtime and by OpenVINO.

Both take NCHW and write offsets as [group][kh][kw][(dy, dx)] in the channels,
so a transpose in and a transpose out is all that differs from our layout.
"""

import numpy as np
from reference import Padding, Pair, explicit_padding, pair


def _to_nchw(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2)))


def _to_oihw(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1)))


def onnx_runtime(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    strides: int | Pair = 1,
    padding: Padding = "valid",
    dilation_rate: int | Pair = 1,
    offset_groups: int = 1,
) -> np.ndarray:
    """Standard ONNX `DeformConv`: boundary "zeros", float32 or float64."""
    import onnx
    import onnxruntime

    strides, dilation_rate = pair(strides), pair(dilation_rate)
    (top, bottom), (left, right) = explicit_padding(
        padding, inputs.shape[1:3], kernel.shape[:2], strides, dilation_rate
    )
    feeds = {
        "X": _to_nchw(inputs),
        "W": _to_oihw(kernel),
        "offset": _to_nchw(offset),
    }
    names = list(feeds)
    if mask is not None:
        feeds["mask"] = _to_nchw(mask)
        names += ["", "mask"]  # The empty name is the bias.
    node = onnx.helper.make_node(
        "DeformConv",
        names,
        ["Y"],
        dilations=dilation_rate,
        group=inputs.shape[3] // kernel.shape[2],
        kernel_shape=kernel.shape[:2],
        offset_group=offset_groups,
        pads=[top, left, bottom, right],
        strides=strides,
    )
    dtype = onnx.helper.np_dtype_to_tensor_dtype(inputs.dtype)

    def value_info(name, shape):
        return onnx.helper.make_tensor_value_info(name, dtype, shape)

    graph = onnx.helper.make_graph(
        [node],
        "deformable_conv2d",
        [value_info(name, x.shape) for name, x in feeds.items()],
        [value_info("Y", [None] * 4)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return np.transpose(session.run(None, feeds)[0], (0, 2, 3, 1))


def openvino(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    strides: int | Pair = 1,
    padding: Padding = "valid",
    dilation_rate: int | Pair = 1,
    offset_groups: int = 1,
    boundary: str = "zeros",
) -> np.ndarray:
    """OpenVINO's `DeformableConvolution`: both boundaries, float32."""
    import openvino as ov
    from openvino import opset8

    strides, dilation_rate = pair(strides), pair(dilation_rate)
    (top, bottom), (left, right) = explicit_padding(
        padding, inputs.shape[1:3], kernel.shape[:2], strides, dilation_rate
    )
    operands = [_to_nchw(inputs), _to_nchw(offset), _to_oihw(kernel)]
    if mask is not None:
        operands.append(_to_nchw(mask))
    parameters = [opset8.parameter(x.shape, np.float32) for x in operands]
    node = opset8.deformable_convolution(
        *parameters[:3],
        strides=strides,
        pads_begin=[top, left],
        pads_end=[bottom, right],
        dilations=dilation_rate,
        mask=parameters[3] if mask is not None else None,
        group=inputs.shape[3] // kernel.shape[2],
        deformable_group=offset_groups,
        bilinear_interpolation_pad=boundary == "zeros",
    )
    compiled = ov.Core().compile_model(
        ov.Model([node], parameters),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    return np.transpose(compiled(operands)[0], (0, 2, 3, 1))
