# SPDX-License-Identifier: Apache-2.0
"""Computes convolution and pooling by ONNX Runtime and by OpenVINO.

Both take NCHW and order a convolution's offsets as [group][kh][kw][(dy, dx)] in
the channels. So a transpose of the inputs and of the output is the only
difference from our layout. Functions for ROI pooling state their own
differences.
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
    """Runs standard ONNX `DeformConv`: boundary "zeros", float32 or float64."""
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
    """Runs OpenVINO's `DeformableConvolution`: both boundaries, float32."""
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


def openvino_psroi_pool(
    inputs: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None = None,
    *,
    output_dim: int,
    spatial_scale: float,
    pooled_size: int,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
) -> np.ndarray:
    """Runs OpenVINO's `DeformablePSROIPooling`: float32, square sizes.

    The groups are the bins: `group_size` is `pooled_size`. A class's (dx, dy)
    are two planes, x first. OpenVINO stops at the first negative batch index.
    """
    import openvino as ov
    from openvino import opset1

    operands = [_to_nchw(inputs), rois]
    if trans is not None:
        *parts, channels = trans.shape
        swapped = trans.reshape(*parts, channels // 2, 2)[..., ::-1]
        operands.append(_to_nchw(swapped.reshape(trans.shape)))
    parameters = [opset1.parameter(x.shape, np.float32) for x in operands]
    node = opset1.deformable_psroi_pooling(
        *parameters[:2],
        output_dim=output_dim,
        spatial_scale=spatial_scale,
        group_size=pooled_size,
        mode="bilinear_deformable",
        spatial_bins_x=sample_per_part,
        spatial_bins_y=sample_per_part,
        trans_std=trans_std,
        part_size=part_size or pooled_size,
        offsets=parameters[2] if trans is not None else None,
    )
    compiled = ov.Core().compile_model(
        ov.Model([node], parameters),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    return np.transpose(compiled(operands)[0], (0, 2, 3, 1))


def onnx_runtime_roi_align(
    inputs: np.ndarray,
    rois: np.ndarray,
    *,
    pooled_size: int | Pair,
    spatial_scale: float,
    sampling_ratio: int = 0,
) -> np.ndarray:
    """Runs standard ONNX `RoiAlign`: no displacements, float32 or float64.

    `RoiAlign` has no upper limit to the adaptive number of samples, and no
    padding ROIs.
    """
    import onnx
    import onnxruntime

    pooled_h, pooled_w = pair(pooled_size)
    feeds = {
        "X": _to_nchw(inputs),
        "rois": np.ascontiguousarray(rois[:, 1:]).astype(inputs.dtype),
        "batch_indices": rois[:, 0].astype(np.int64),
    }
    node = onnx.helper.make_node(
        "RoiAlign",
        list(feeds),
        ["Y"],
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=pooled_h,
        output_width=pooled_w,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )

    def value_info(name, dtype, shape):
        dtype = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, shape)

    graph = onnx.helper.make_graph(
        [node],
        "roi_align",
        [value_info(name, x.dtype, x.shape) for name, x in feeds.items()],
        [value_info("Y", inputs.dtype, [None] * 4)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return np.transpose(session.run(None, feeds)[0], (0, 2, 3, 1))
