# SPDX-License-Identifier: Apache-2.0
"""Implements deformable convolution in stock TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import tensorflow as tf

from tf_deform._portable.fields import FACTORS, hand_on_nan, split_fields
from tf_deform._portable.sampling import unrounded, weighted_sum
from tf_deform._portable.shapes import (
    MAX_EXTENT,
    Shape,
    Size,
    at_least,
    check_attribute,
    check_channels,
    check_dimension,
    check_inputs,
    check_rank,
    either,
    fail,
    sizes,
    to_index,
    with_shape,
)


def _out_size(
    size: Size,
    kernel: Size,
    stride: int,
    dilation: int,
    padding: str,
    pads: Sequence[int],
) -> tuple[Size, Size]:
    """Returns the output's size along one axis, and the padding before it."""
    span = dilation * (kernel - 1) + 1
    if padding == "SAME":
        out = (size + stride - 1) // stride
        return out, at_least((out - 1) * stride + span - size, 0) // 2
    return at_least((size + sum(pads) - span) // stride + 1, 0), pads[0]


def _check(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    offset: tf.Tensor,
    mask: Sequence[tf.Tensor],
    strides: Sequence[int],
    padding: str,
    pads: Sequence[Sequence[int]],
    dilations: Sequence[int],
    offset_groups: int,
    modulation: str,
) -> tuple[Shape, Shape, Shape]:
    """Checks the operands; returns the shapes of inputs, kernel and offset."""
    check_attribute(strides, 1, "strides")
    check_attribute(dilations, 1, "dilation_rate")
    check_attribute([*pads[0], *pads[1]], 0, "padding")
    check_attribute([offset_groups], 1, "offset_groups")

    inputs_shape = check_inputs(inputs, "batch, height, width, channels")
    kernel_shape = check_rank(
        kernel, "kernel", "kernel_h, kernel_w, channels // groups, filters"
    )
    mask_axes = "batch, out_h, out_w, offset_groups * kernel_h * kernel_w"
    numbers = 3 if modulation in FACTORS else 2
    offset_shape = check_rank(offset, "offset", f"{mask_axes} * {numbers}")
    fields = [(offset_shape, "offset", numbers)]
    for tensor in mask:
        if modulation != "mask":
            fail(
                "Expected no `mask` where `offset` holds what a branch "
                "predicts (`modulation` is not mask). Received: mask.shape="
                f"{tuple(tensor.shape.as_list())}"
            )
        fields.append((check_rank(tensor, "mask", mask_axes), "mask", 1))

    batch, *size, channels = inputs_shape
    *kernel_size, group_channels, filters = kernel_shape
    check_channels(inputs_shape)
    if 0 in kernel_shape:
        fail(
            "Expected every dimension of `kernel` to be at least 1 and its "
            f"height and width at most {MAX_EXTENT}. Received: "
            f"kernel.shape={kernel_shape}"
        )
    shapes = f"inputs.shape={inputs_shape}, kernel.shape={kernel_shape}"
    if channels and group_channels:
        if channels % group_channels:
            fail(
                "Expected the channels of `inputs` to be a multiple of the "
                "input channels of `kernel` (its third dimension, channels // "
                f"groups). Received: {shapes}"
            )
        groups = channels // group_channels
        if filters and filters % groups:
            fail(
                "Expected the filters of `kernel` (its last dimension) to be a "
                f"multiple of groups, {groups} (channels of `inputs` // input "
                f"channels of `kernel`). Received: {shapes}"
            )
    if channels and channels % offset_groups:
        fail(
            "Expected the channels of `inputs` to be a multiple of "
            f"offset_groups, {offset_groups}. Received: "
            f"inputs.shape={inputs_shape}"
        )

    out = [None, None]
    for axis, name in enumerate(("height", "width")):
        if size[axis] is None or kernel_size[axis] is None:
            continue
        extent = dilations[axis] * (kernel_size[axis] - 1) + 1
        if padding != "SAME" and 0 < size[axis] < extent - sum(pads[axis]):
            fail(
                f"Expected the padded {name} to be at least the extent of the "
                f"dilated kernel, {extent}. Received: {name} {size[axis]} with "
                f"padding {tuple(pads[axis])}, kernel size {kernel_size[axis]},"
                f" dilation_rate {dilations[axis]}"
            )
        out[axis], _ = _out_size(
            size[axis],
            kernel_size[axis],
            strides[axis],
            dilations[axis],
            padding,
            pads[axis],
        )
    for field in fields:
        _check_field(*field, (batch, *out), kernel_size, offset_groups)
    return inputs_shape, kernel_shape, offset_shape


def _check_field(
    shape: Shape,
    name: str,
    numbers: int,
    pixels: Sequence[int | None],
    kernel_size: Sequence[int | None],
    offset_groups: int,
) -> None:
    """Checks an offset or a mask, with `numbers` for each sample."""
    for axis, quantity, meaning in (
        (0, "batch size", "as `inputs`"),
        (1, "height", "the output's"),
        (2, "width", "the output's"),
    ):
        check_dimension(shape, axis, pixels[axis], name, quantity, meaning)
    if None in kernel_size:
        return
    expected = numbers * offset_groups * math.prod(kernel_size)
    if shape[3] not in (None, expected):
        factor = f"{numbers} * " if numbers > 1 else ""
        fail(
            f"Expected `{name}` to have {expected} channels "
            f"({factor}offset_groups * {kernel_size[0]} * {kernel_size[1]}). "
            f"Received: {name}.shape={shape}"
        )


def _positions(
    size: Sequence[Size],
    kernel_size: Sequence[Size],
    given: Sequence[Size],
    strides: Sequence[int],
    padding: str,
    pads: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    offset_groups: int,
    real: tf.DType,
) -> list[tuple[tf.Tensor, Size]]:
    """Places samples without offset, along both axes.

    Returns:
        For each axis the positions and the output's size. Positions broadcast
        to (out_h, out_w, offset groups * taps), group major. They are reshaped
        to the size of `offset` (`given`), which fails where the inputs and the
        kernel give another size.
    """
    positions = []
    taps = kernel_size[0] * kernel_size[1]
    for axis in (0, 1):
        out, before = _out_size(
            size[axis],
            kernel_size[axis],
            strides[axis],
            dilations[axis],
            padding,
            pads[axis],
        )
        line = tf.cast(tf.range(out) * strides[axis] - before, real)
        line = tf.reshape(
            line, (given[1], 1, 1) if axis == 0 else (1, given[2], 1)
        )
        tap = tf.range(taps)
        tap = tap // kernel_size[1] if axis == 0 else tap % kernel_size[1]
        tap = tf.cast(tap, real) * dilations[axis]
        positions.append((line + tf.tile(tap, (offset_groups,)), out))
    return positions


def _bilinear(
    y: tf.Tensor,
    x: tf.Tensor,
    mask: Sequence[tf.Tensor],
    height: Size,
    width: Size,
    boundary: str,
) -> tuple[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...]]:
    """Returns row and column of top left corners, and all corners' weights."""
    real = y.dtype
    last_y, last_x = tf.cast(height - 1, real), tf.cast(width - 1, real)
    if boundary == "zeros":
        inside = (y > -1) & (y < last_y + 1) & (x > -1) & (x < last_x + 1)
        # No sample lies inside an image without pixels.
        if not (isinstance(height, int) and isinstance(width, int)):
            inside &= (height > 0) & (width > 0)
        elif height * width == 0:
            inside = tf.zeros_like(inside)
    else:
        inside = (y >= 0) & (y < last_y + 1) & (x >= 0) & (x < last_x + 1)

    # Samples outside read (-2, -2), where `rows` has zeros.
    outside = tf.constant(-2, real)
    y, x = tf.where(inside, y, outside), tf.where(inside, x, outside)
    row, col = tf.floor(y), tf.floor(x)
    y, x = y - row, x - col
    if boundary == "clamp":
        # Samples in the last row or column give no weight to the pixels behind
        # it.
        y = tf.where(row >= last_y, tf.zeros_like(y), y)
        x = tf.where(col >= last_x, tf.zeros_like(x), x)
    upper, lower = 1 - y, y
    for factor in mask:
        # TensorFlow 1's `where` takes no mask of another shape.
        factor = tf.compat.v1.where(inside, factor, tf.zeros_like(factor))
        upper, lower = upper * factor, lower * factor
    weights = (upper * (1 - x), upper * x, lower * (1 - x), lower * x)
    return row, col, weights


def _corners(
    row: tf.Tensor,
    col: tf.Tensor,
    image_size: Sequence[Size],
    images: Size,
    offset_groups: int,
    taps: Size,
) -> list[tf.Tensor]:
    """Returns rows of the padded images' pixels, for each of four corners."""
    batch, height, width = image_size
    stride = to_index(width) + 3
    image = tf.range(to_index(batch), dtype=tf.int64)
    image *= (to_index(height) + 3) * stride
    image = tf.reshape(image, (images, 1, 1, 1))
    index = image + (tf.cast(row, tf.int64) + 2) * stride
    index += tf.cast(col, tf.int64) + 2
    if offset_groups > 1:
        group = tf.range(offset_groups, dtype=tf.int64)
        group = tf.reshape(
            tf.tile(tf.expand_dims(group, 1), (1, taps)),
            (offset_groups * taps,),
        )
        index = index * offset_groups + group
    return [index + step * offset_groups for step in (0, 1, stride, stride + 1)]


def _taps(
    index: tf.Tensor, weights: tf.Tensor, kernel: tf.Tensor, taps: Size
) -> Iterable[tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """Splits by tap; returns all taps in one if their number is not known."""
    if isinstance(taps, int):
        return zip(
            # LiteRT does not unstack 64-bit integers.
            [index[:, :, tap] for tap in range(taps)],
            tf.unstack(weights, axis=2),
            tf.unstack(kernel),
        )
    order = (0, 2, 1, 3)
    return [(tf.transpose(index, order), tf.transpose(weights, order), kernel)]


def deformable_conv2d(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    offset: tf.Tensor,
    mask: Sequence[tf.Tensor],
    *,
    strides: Sequence[int],
    padding: str,
    explicit_paddings: Sequence[int],
    dilations: Sequence[int],
    offset_groups: int,
    boundary: str,
    modulation: str = "mask",
) -> tf.Tensor:
    """Computes `tf_deform.ops.deformable_conv2d`, called as the op is."""
    inputs = with_shape(inputs, None, None, None, None)
    kernel = with_shape(kernel, None, None, None, None)
    offset = with_shape(offset, None, None, None, None)
    mask = [with_shape(tensor, None, None, None, None) for tensor in mask]
    offset, mask = unrounded(offset), [unrounded(tensor) for tensor in mask]
    padding, boundary, modulation = (
        tf.compat.as_str(x) for x in (padding, boundary, modulation)
    )
    top, bottom, left, right = explicit_paddings or (0, 0, 0, 0)
    pads = ((top, bottom), (left, right))
    shapes = _check(
        inputs,
        kernel,
        offset,
        mask,
        strides,
        padding,
        pads,
        dilations,
        offset_groups,
        modulation,
    )
    batch, height, width, channels = sizes(inputs, shapes[0])
    kernel_h, kernel_w, group_channels, filters = sizes(kernel, shapes[1])
    given, fields = sizes(offset, shapes[2]), offset
    taps = kernel_h * kernel_w
    groups = channels // group_channels
    real = offset.dtype
    if modulation != "mask":
        displacements = 2 * offset_groups * taps
        offset, mask = split_fields(fields, displacements, modulation)

    # The positions have (batch, out_h, out_w, offset groups * taps), group
    # major.
    (y, out_h), (x, out_w) = _positions(
        (height, width),
        (kernel_h, kernel_w),
        given,
        strides,
        padding,
        pads,
        dilations,
        offset_groups,
        real,
    )
    out_h, out_w = either(out_h, given[1]), either(out_w, given[2])
    batch = either(batch, given[0])
    pairs = tf.reshape(offset, (*given[:3], offset_groups * taps, 2))
    y, x = y + pairs[..., 0], x + pairs[..., 1]
    row, col, weights = _bilinear(y, x, mask, height, width, boundary)

    # Pads the image with two rows and columns of zeros before it and one
    # behind, and cuts each pixel into the channels of the offset groups. The
    # cast is needed because 16 bits are too few for sums, both here and in the
    # gradient.
    rows = tf.pad(tf.cast(inputs, real), ((0, 0), (2, 1), (2, 1), (0, 0)))
    rows = tf.reshape(rows, (-1, channels // offset_groups))
    corners = _corners(
        row, col, (batch, height, width), given[0], offset_groups, taps
    )

    pixels = batch * out_h * out_w
    kernel = tf.reshape(tf.cast(kernel, real), (taps, group_channels, filters))
    split = (pixels, offset_groups, taps, 4)
    index = tf.reshape(tf.stack(corners, -1), split)
    weights = tf.reshape(tf.stack(weights, -1), split)
    output = _convolve(
        rows,
        index,
        weights,
        kernel,
        (pixels, taps, groups, group_channels, filters),
    )
    output = tf.reshape(output, (batch, out_h, out_w, filters))
    output = tf.cast(output, inputs.dtype)
    return output if modulation == "mask" else hand_on_nan(output, fields)


def _convolve(
    rows: tf.Tensor,
    index: tf.Tensor,
    weights: tf.Tensor,
    kernel: tf.Tensor,
    split: tuple[Size, ...],
) -> tf.Tensor:
    """Sums up all taps: pixels and filters, cut into groups if there are any.

    It reads tap by tap, so that the columns of all taps never exist at once.
    `split` holds the pixels, taps, groups, channels of a group, and filters.
    """
    pixels, taps, groups, group_channels, filters = split
    output = None
    for place, weight, piece in _taps(index, weights, kernel, taps):
        columns = weighted_sum(
            rows, tf.reshape(place, (-1, 4)), tf.reshape(weight, (-1, 4))
        )
        product = _product(
            columns,
            piece,
            pixels,
            1 if isinstance(taps, int) else taps,
            groups,
            group_channels,
            filters,
        )
        output = product if output is None else output + product
    return output if _is_one(groups) else tf.transpose(output, (1, 0, 2))


def _is_one(groups: Size) -> bool:
    return isinstance(groups, int) and groups == 1


def _product(
    columns: tf.Tensor,
    kernel: tf.Tensor,
    pixels: Size,
    taps: Size,
    groups: Size,
    group_channels: Size,
    filters: Size,
) -> tf.Tensor:
    """Multiplies columns by kernel: (pixels, filters), the groups before it."""
    depth = taps * group_channels
    if _is_one(groups):
        return tf.matmul(
            tf.reshape(columns, (pixels, depth)),
            tf.reshape(kernel, (depth, filters)),
        )
    columns = tf.reshape(columns, (pixels, taps, groups, group_channels))
    columns = tf.transpose(columns, (2, 0, 1, 3))
    kernel = tf.reshape(
        kernel, (taps, group_channels, groups, filters // groups)
    )
    kernel = tf.transpose(kernel, (2, 0, 1, 3))
    return tf.matmul(
        tf.reshape(columns, (groups, pixels, depth)),
        tf.reshape(kernel, (groups, depth, filters // groups)),
    )
