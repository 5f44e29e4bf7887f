# SPDX-License-Identifier: Apache-2.0
"""Computes convolution and pooling by ONNX Runtime and by OpenVINO.

Both take NCHW and order a convolution's offsets as [group][kh][kw][(dy, dx)] in
the channels. So a transpose of the inputs and of the output is the only
difference from our layout. Functions for ROI pooling state their own
differences.
"""

from collections.abc import Callable

import numpy as np
from reference import Padding, Pair, explicit_padding, pair


def _transposed(x: np.ndarray, *axes: int) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(x, axes or (0, 3, 1, 2)))


def _run_onnx(
    op: str, feeds: dict[str, np.ndarray], opset: int, **attributes: object
) -> np.ndarray:
    """Runs one node, whose result has the type of the first operand.

    The empty name is an optional operand that is left out.
    """
    import onnx
    import onnxruntime

    def value_info(name, like, shape):
        dtype = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, shape)

    names = list(feeds)
    feeds.pop("", None)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, names, ["Y"], **attributes)],
        op,
        [value_info(name, x, x.shape) for name, x in feeds.items()],
        [value_info("Y", feeds[names[0]], [None] * 4)],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return _transposed(session.run(None, feeds)[0], 0, 2, 3, 1)


def _run_openvino(make_node: Callable, operands: list) -> np.ndarray:
    """Runs the node that `make_node` makes of the operands' parameters."""
    import openvino as ov
    from openvino import opset8

    parameters = [opset8.parameter(x.shape, np.float32) for x in operands]
    compiled = ov.Core().compile_model(
        ov.Model([make_node(*parameters)], parameters),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    return _transposed(compiled(operands)[0], 0, 2, 3, 1)


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
    strides, dilation_rate = pair(strides), pair(dilation_rate)
    (top, bottom), (left, right) = explicit_padding(
        padding, inputs.shape[1:3], kernel.shape[:2], strides, dilation_rate
    )
    feeds = {
        "X": _transposed(inputs),
        "W": _transposed(kernel, 3, 2, 0, 1),
        "offset": _transposed(offset),
    }
    if mask is not None:
        feeds |= {"": None, "mask": _transposed(mask)}
    return _run_onnx(
        "DeformConv",
        feeds,
        opset=22,
        dilations=dilation_rate,
        group=inputs.shape[3] // kernel.shape[2],
        kernel_shape=kernel.shape[:2],
        offset_group=offset_groups,
        pads=[top, left, bottom, right],
        strides=strides,
    )


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
    from openvino import opset8

    strides, dilation_rate = pair(strides), pair(dilation_rate)
    (top, bottom), (left, right) = explicit_padding(
        padding, inputs.shape[1:3], kernel.shape[:2], strides, dilation_rate
    )

    def make_node(inputs_, offset_, kernel_, mask_=None):
        return opset8.deformable_convolution(
            *(inputs_, offset_, kernel_),
            strides=strides,
            pads_begin=[top, left],
            pads_end=[bottom, right],
            dilations=dilation_rate,
            mask=mask_,
            group=inputs.shape[3] // kernel.shape[2],
            deformable_group=offset_groups,
            bilinear_interpolation_pad=boundary == "zeros",
        )

    operands = [_transposed(inputs), _transposed(offset)]
    operands.append(_transposed(kernel, 3, 2, 0, 1))
    if mask is not None:
        operands.append(_transposed(mask))
    return _run_openvino(make_node, operands)


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
    from openvino import opset1

    def make_node(inputs_, rois_, offsets=None):
        return opset1.deformable_psroi_pooling(
            *(inputs_, rois_),
            output_dim=output_dim,
            spatial_scale=spatial_scale,
            group_size=pooled_size,
            mode="bilinear_deformable",
            spatial_bins_x=sample_per_part,
            spatial_bins_y=sample_per_part,
            trans_std=trans_std,
            part_size=part_size or pooled_size,
            offsets=offsets,
        )

    operands = [_transposed(inputs), rois]
    if trans is not None:
        *parts, channels = trans.shape
        swapped = trans.reshape(*parts, channels // 2, 2)[..., ::-1]
        operands.append(_transposed(swapped.reshape(trans.shape)))
    return _run_openvino(make_node, operands)


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
    pooled_h, pooled_w = pair(pooled_size)
    feeds = {
        "X": _transposed(inputs),
        "rois": np.ascontiguousarray(rois[:, 1:]).astype(inputs.dtype),
        "batch_indices": rois[:, 0].astype(np.int64),
    }
    return _run_onnx(
        "RoiAlign",
        feeds,
        opset=16,
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=pooled_h,
        output_width=pooled_w,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )
