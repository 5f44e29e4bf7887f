# SPDX-License-Identifier: Apache-2.0
"""Extends tf2onnx by handlers for operations that it does not convert well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _tf2onnx
from tf_deform._portable.fields import FACTORS
from tf_deform.export import _frozen, _source

# The newest opset that tf2onnx writes.
OPSET = 18
# DeformConv has this domain until the model is raised to a newer opset.
DOMAIN = "tf_deform"


class Refused(ValueError):
    """Says in words for the user that ONNX or tf2onnx cannot hold something."""


def convert(concrete: Any) -> Any:
    """Converts a function to a model in `OPSET`, with DeformConv in `DOMAIN`.

    Operations that tf2onnx does not know stay as they are.

    Raises:
        Refused: A handler of `HANDLERS` refuses an operation.
        Exception: A handler or tf2onnx fails.
    """
    from tf2onnx import optimizer

    made = _run(concrete)
    try:
        # Does not copy the graph for each optimizer: the copies would take half
        # of the time of a conversion.
        made = optimizer.optimize_graph(made, catch_errors=False)
    except Exception:
        # An optimizer has left a graph half changed. Those that fail are left
        # out of another conversion.
        made = optimizer.optimize_graph(_run(concrete))
    return made.make_model("from TensorFlow")


def _run(concrete: Any) -> Any:
    """Returns the graph that tf2onnx makes of a function."""
    from onnx import helper
    from tf2onnx import convert as tf2onnx_convert
    from tf2onnx import tf_loader, tfonnx

    captured = {inner.name for _, inner in concrete.graph.captures}
    inputs = [x.name for x in concrete.inputs if x.name not in captured]
    outputs = [x.name for x in concrete.outputs]
    errors: list[Exception] = []
    with tf.device("/CPU:0"):
        frozen = tf_loader.from_function(concrete, inputs, outputs)
        if _frozen.keep_captures(frozen, concrete):
            frozen = tf_loader.tf_optimize(inputs, outputs, frozen)
        _frozen.specialise(frozen)
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(frozen, name="")
            _frozen.keep_shapes(graph, concrete.graph)
            try:
                return tfonnx.process_tf_graph(
                    graph,
                    opset=OPSET,
                    custom_op_handlers={
                        name: (_tell(handler, errors), [])
                        for name, handler in HANDLERS.items()
                    },
                    extra_opset=[helper.make_opsetid(DOMAIN, 1)],
                    input_names=inputs,
                    output_names=outputs,
                    tensors_to_rename=tf2onnx_convert.tensor_names_from_structed(
                        concrete, inputs, outputs
                    ),
                )
            finally:
                if errors:
                    raise errors[0]


def _tell(handler: Callable, errors: list[Exception]) -> Callable:
    """Wraps a handler to keep the errors it raises: tf2onnx only logs them."""

    def run(ctx: Any, node: Any, name: str, arguments: Any) -> None:
        try:
            handler(ctx, node, name, arguments)
        except Exception as error:
            errors.append(error)
            raise

    return run


def _convert_deformable_conv2d(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Replaces the native op by DeformConv, channels first."""
    make = _maker(ctx, name)

    def transpose(tensor: str, *axes: int) -> str:
        return make("Transpose", tensor, perm=axes)

    def integers(attribute: str) -> list[int]:
        return list(node.get_attr(attribute).ints)

    if node.get_attr_str("boundary") != "zeros":
        _refuse_stale(ctx, node, name, _)  # `export.onnx` did not trace it.
    inputs, kernel, offset, *mask = node.input
    kernel_h, kernel_w, group_channels, _ = ctx.get_shape(kernel)
    attributes = {
        "kernel_shape": [kernel_h, kernel_w],
        "strides": integers("strides"),
        "dilations": integers("dilations"),
        "group": ctx.get_shape(inputs)[3] // group_channels,
        "offset_group": node.get_attr("offset_groups").i,
    }
    if node.get_attr_str("padding") == "SAME":
        attributes["auto_pad"] = "SAME_UPPER"  # `_pad_same` replaces it.
    else:
        paddings = integers("explicit_paddings") or (0, 0, 0, 0)
        top, bottom, left, right = paddings
        attributes["pads"] = [top, left, bottom, right]
    fields, modulation = offset, node.get_attr_str("modulation")
    if modulation in FACTORS:
        samples = kernel_h * kernel_w * attributes["offset_group"]
        offset, mask = _split_fields(ctx, name, fields, samples, modulation)
    # There is no bias between offset and mask. Both ops order offsets alike.
    operands = [
        transpose(inputs, 0, 3, 1, 2),
        transpose(kernel, 3, 2, 0, 1),
        transpose(offset, 0, 3, 1, 2),
        *(["", transpose(mask[0], 0, 3, 1, 2)] if mask else []),
    ]
    shapes, dtypes = node.output_shapes, node.output_dtypes
    outputs = node.output
    ctx.remove_node(node.name)
    made = ctx.make_node(
        "DeformConv", operands, attributes, op_name_scope=name, domain=DOMAIN
    ).output[0]
    last = "Transpose", [made], {"perm": (0, 2, 3, 1)}
    if modulation != "mask":
        # As `hand_on_nan` of the portable ops does.
        count = make("Cast", make("IsNaN", fields), to=dtypes[0])
        count = make("ReduceSum", count, np.array([3]), keepdims=1)
        nan = make("Sqrt", make("Neg", count))
        last = "Add", [transpose(made, 0, 2, 3, 1), nan], {}
    ctx.make_node(
        *last, outputs=outputs, shapes=shapes, dtypes=dtypes, op_name_scope=name
    )


def _split_fields(
    ctx: Any, name: str, fields: str, samples: int, modulation: str
) -> tuple[str, list[str]]:
    """Writes the offset and the mask of what a branch predicts."""
    from tf2onnx import utils

    make = _maker(ctx, name)

    def part(start: int, stop: int) -> str:
        ends = np.array([start]), np.array([stop])
        return make("Slice", fields, *ends, np.array([3]))

    mask = make("Sigmoid", part(2 * samples, 3 * samples))
    if modulation == "2sigmoid":
        real = utils.map_onnx_to_numpy_type(ctx.get_dtype(fields))
        mask = make("Mul", mask, np.array(2, real))
    return part(0, 2 * samples), [mask]


def _convert_erfc(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Writes 1 - Erf, as gelu uses it."""
    dtype, shape = ctx.get_dtype(node.output[0]), ctx.get_shape(node.output[0])
    outputs, inputs = node.output, list(node.input)
    ctx.remove_node(node.name)
    erf = ctx.make_node("Erf", inputs, op_name_scope=name)
    one = ctx.make_const(f"{name}_one", np.ones((), "float32"))
    one = ctx.make_node("Cast", [one.output[0]], {"to": dtype})
    ctx.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=outputs,
        shapes=[shape],
        dtypes=[dtype],
        op_name_scope=name,
    )


def _convert_where(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Writes a choice, where tf2onnx would add products with 0 and 1.

    The values that are not chosen may be NaN or infinite, and their product
    with zero is NaN.
    """
    from tf2onnx.onnx_opset import controlflow

    node.set_attr("handles_nan", 1)
    controlflow.Select.version_9(ctx, node)
    del node.attr["handles_nan"]


def _refuse_area(ctx: Any, node: Any, name: str, _: Any) -> None:
    raise Refused(
        "Expected a resizing that ONNX has. Received: the method 'area' in "
        f"{name!r}, of which tf2onnx makes 'nearest'"
    )


def _convert_resize_bilinear(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Writes the size that is asked for.

    If tf2onnx knows the image's size, it would write the ratio of the two sizes
    instead, in float32. The product of this ratio with the old size may be a
    pixel short.
    """
    from onnx import TensorProto
    from tf2onnx.onnx_opset import nn

    shape = ctx.get_shape(node.input[0])
    images = _maker(ctx, name)("Cast", node.input[0], to=TensorProto.FLOAT)
    ctx.set_shape(images, None if shape is None else [-1] * len(shape))
    ctx.replace_input(node, node.input[0], images, 0)
    nn.Resize.version_11(ctx, node)
    ctx.set_shape(images, shape)


def _maker(ctx: Any, name: str) -> Callable[..., str]:
    """Returns a function that makes a node and returns the node's output."""
    from tf2onnx import utils

    def make(kind: str, *inputs: Any, **attributes: Any) -> str:
        operands = [
            operand
            if isinstance(operand, str)
            else ctx.make_const(utils.make_name(name), operand).output[0]
            for operand in inputs
        ]
        made = ctx.make_node(kind, operands, attributes, op_name_scope=name)
        return made.output[0]

    return make


def _convert_resize_bicubic(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Resizes all channels of all images as channels of one image.

    Without this, the operator would stand between two transpositions.
    onnxruntime would move the first one behind the operator, and then cannot
    make images smaller.
    """
    from onnx import TensorProto

    make = _maker(ctx, name)
    images, size = node.input
    outputs = node.output
    shapes, dtypes = node.output_shapes, node.output_dtypes
    half = node.get_attr_value("half_pixel_centers", False)
    corners = node.get_attr_value("align_corners", False)
    ctx.remove_node(node.name)
    planes = make("Cast", images, to=TensorProto.FLOAT)
    planes = make("Transpose", planes, perm=(0, 3, 1, 2))
    size = make("Cast", size, to=TensorProto.INT64)
    shape = make("Shape", planes)
    number = make("Gather", shape, np.array([0, 1]))
    old = make("Gather", shape, np.array([2, 3]))
    one = np.array([1, -1])
    planes = make("Reshape", planes, make("Concat", one, old, axis=0))
    channels = make("Gather", make("Shape", planes), np.array([0, 1]))
    sizes = make("Concat", channels, size, axis=0)
    planes = make(
        "Resize",
        planes,
        "",
        "",
        sizes,
        mode="cubic",
        coordinate_transformation_mode="half_pixel"
        if half
        else "align_corners"
        if corners
        else "asymmetric",
        # TensorFlow without half pixels uses another, older curve.
        cubic_coeff_a=-0.5 if half else -0.75,
        exclude_outside=int(half),
    )
    shape = make("Concat", number, size, axis=0)
    ctx.make_node(
        "Transpose",
        [make("Reshape", planes, shape)],
        {"perm": (0, 2, 3, 1)},
        outputs=outputs,
        shapes=shapes,
        dtypes=dtypes,
        op_name_scope=name,
    )


def _convert_resize_nearest(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Takes the rows, then the columns, that TensorFlow takes.

    It uses the ratio of the sizes in float32, as TensorFlow does. The operator
    `Resize` of other runtimes takes another pixel for 3 % of all pairs of sizes
    up to 64.
    """
    from onnx import TensorProto

    make = _maker(ctx, name)

    def cast(operand: str, to: int) -> str:
        return make("Cast", operand, to=to)

    align_corners = node.get_attr_value("align_corners", False)
    half = np.float32(node.get_attr_value("half_pixel_centers", False) / 2)
    images, size = node.input
    sizes = cast(size, TensorProto.INT64)
    outputs = node.output
    shapes, dtypes = node.output_shapes, node.output_dtypes
    ctx.remove_node(node.name)
    for axis in (1, 2):
        old = make("Gather", make("Shape", images), np.int64(axis))
        new = make("Gather", sizes, np.int64(axis - 1))
        last = make("Sub", old, np.int64(1))
        steps = (old, new)
        if align_corners:  # A single output pixel takes the first pixel.
            rest = make("Sub", new, np.int64(1))
            steps = (last, make("Max", rest, np.int64(1)))
        ratio = make("Div", *(cast(x, TensorProto.FLOAT) for x in steps))
        place = make("Range", np.int64(0), new, np.int64(1))
        place = make("Add", cast(place, TensorProto.FLOAT), half)
        place = make("Mul", place, ratio)
        if align_corners:  # TensorFlow rounds halves up.
            place = cast(place, TensorProto.DOUBLE)
            place = make("Add", place, np.float64(0.5))
        place = cast(make("Floor", place), TensorProto.INT64)
        place = make("Min", place, last)
        if axis == 1:
            images = make("Gather", images, place, axis=axis)
    ctx.make_node(
        "Gather",
        [images, place],
        {"axis": 2},
        outputs=outputs,
        shapes=shapes,
        dtypes=dtypes,
        op_name_scope=name,
    )


def _convert_crop(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Refuses the nearest pixel: of two pixels, ONNX takes the other one."""
    from tf2onnx.onnx_opset import nn

    if node.get_attr_str("method") != "bilinear":
        raise Refused(
            "Expected crop_and_resize with the method 'bilinear', as ONNX has "
            f"no other. Received: {node.get_attr_str('method')!r} in {name!r}"
        )
    nn.CropAndResize.version_13(ctx, node)


def _convert_suppression(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Refuses all suppression but hard suppression, which is all that ONNX has.

    tf2onnx would round a sigma below 1 to 0.
    """
    from tf2onnx.onnx_opset import tensor

    sigma = node.inputs[5]
    if not sigma.is_const() or sigma.get_tensor_value() != 0:
        raise Refused(
            "Expected non-maximum suppression with a soft_nms_sigma of 0, as "
            f"ONNX has no other. Received: {name!r} with "
            + (str(sigma.get_tensor_value()) if sigma.is_const() else "another")
        )
    tensor.NonMaxSuppression.version_13(ctx, node)


def _refuse_stale(ctx: Any, node: Any, name: str, _: Any) -> None:
    raise Refused(_source.explain_stale(node.type, name))


HANDLERS: dict[str, Callable[[Any, Any, str, Any], None]] = {
    **dict.fromkeys(_tf2onnx.OPS, _refuse_stale),
    _source.NAMESPACE + "DeformableConv2D": _convert_deformable_conv2d,
    "Select": _convert_where,
    "SelectV2": _convert_where,
    "Erfc": _convert_erfc,
    "CropAndResize": _convert_crop,
    "ResizeArea": _refuse_area,
    "ResizeBicubic": _convert_resize_bicubic,
    "ResizeBilinear": _convert_resize_bilinear,
    "ResizeNearestNeighbor": _convert_resize_nearest,
    "NonMaxSuppressionV5": _convert_suppression,
}
