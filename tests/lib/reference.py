# SPDX-License-Identifier: Apache-2.0
"""Computes deformable convolution in NumPy float64, slowly but legibly.

The tests compare the ops with this file, so nothing here is shared with them:
plain loops over output pixels, taps and offset groups, one line of arithmetic
for each line of the definition.

Everything is computed in float64 except one thing: coordinates are added up
in the type of `offset` (float32 or float64), because where a sample falls is
part of the definition.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

Pair = tuple[int, int]
Padding = str | int | Pair | tuple[Pair, Pair]


class Gradients(NamedTuple):
    """Holds gradients of `sum(output * output_grad)`, by operand."""

    inputs: np.ndarray
    kernel: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None


class _Neighbour(NamedTuple):
    """Holds a pixel that a sample reads.

    Its weight, and the weight's derivatives.
    """

    row: int
    col: int
    weight: float
    weight_dy: float
    weight_dx: float


class _Sample(NamedTuple):
    """Holds a read of the image: pixel, tap, offset group, neighbours."""

    n: int
    i: int
    j: int
    tap: int
    offset_group: int
    neighbours: list[_Neighbour]


def pair(value: int | Pair) -> Pair:
    """Returns a pair: `3` and `(3, 3)` mean the same."""
    return (value, value) if isinstance(value, int) else tuple(value)


def explicit_padding(
    padding: Padding,
    size: Pair,
    kernel_size: Pair,
    strides: Pair,
    dilation_rate: Pair,
) -> tuple[Pair, Pair]:
    """Returns `((top, bottom), (left, right))` for every form of `padding`."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        pads = []
        for n, k, s, d in zip(
            size, kernel_size, strides, dilation_rate, strict=True
        ):
            out = math.ceil(n / s)
            total = max((out - 1) * s + d * (k - 1) + 1 - n, 0)
            pads.append((total // 2, total - total // 2))
        return tuple(pads)
    return tuple(pair(p) for p in pair(padding))


def output_size(
    padding: Padding,
    size: Pair,
    kernel_size: Pair,
    strides: int | Pair = 1,
    dilation_rate: int | Pair = 1,
) -> Pair:
    """Returns `(out_h, out_w)` of a convolution over a map of `size`."""
    strides, dilation_rate = pair(strides), pair(dilation_rate)
    if padding == "same":
        return tuple(
            math.ceil(n / s) for n, s in zip(size, strides, strict=True)
        )
    pads = explicit_padding(padding, size, kernel_size, strides, dilation_rate)
    return tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, k, s, d in zip(
            size, pads, kernel_size, strides, dilation_rate, strict=True
        )
    )


def _along_axis(
    t: float, size: int, boundary: str
) -> list[tuple[int, float, float]]:
    """Interpolates on one axis: yields `(index, weight, d weight / dt)`.

    The two pixels are the ends of the cell `[floor(t), floor(t) + 1]`, so the
    derivative at an integer is the right-hand derivative.
    """
    low = math.floor(t)
    fraction = t - low
    if boundary == "clamp" and low == size - 1:  # the held edge
        return [(low, 1.0, 0.0)]
    both = [(low, 1.0 - fraction, -1.0), (low + 1, fraction, 1.0)]
    return [entry for entry in both if 0 <= entry[0] < size]


def _neighbours(
    y: float, x: float, size: Pair, boundary: str
) -> list[_Neighbour]:
    """Returns the pixels that a sample at `(y, x)` reads, none if outside."""
    height, width = size
    if boundary == "zeros":
        inside = -1 < y < height and -1 < x < width
    elif boundary == "clamp":
        inside = 0 <= y < height and 0 <= x < width
    else:
        raise ValueError(f"Unknown boundary: {boundary!r}.")
    if not inside:  # NaN and infinity end here too.
        return []
    return [
        _Neighbour(row, col, wy * wx, wy_dy * wx, wy * wx_dx)
        for row, wy, wy_dy in _along_axis(y, height, boundary)
        for col, wx, wx_dx in _along_axis(x, width, boundary)
    ]


class _Call:
    """Holds the operands of one call in float64, and yields its samples."""

    def __init__(
        self,
        inputs: np.ndarray,
        kernel: np.ndarray,
        offset: np.ndarray,
        mask: np.ndarray | None,
        *,
        strides: int | Pair = 1,
        padding: Padding = "valid",
        dilation_rate: int | Pair = 1,
        offset_groups: int = 1,
        boundary: str = "zeros",
    ):
        self.inputs = np.asarray(inputs).astype(np.float64)
        self.kernel = np.asarray(kernel).astype(np.float64)
        offset = np.asarray(offset)
        if offset.dtype not in (np.float32, np.float64):
            offset = offset.astype(np.float32)
        batch, *self.size, self.channels = self.inputs.shape
        *kernel_size, channels_per_group, self.filters = self.kernel.shape
        self.kernel_size = tuple(kernel_size)
        self.taps = kernel_size[0] * kernel_size[1]
        self.groups = self.channels // channels_per_group
        self.offset_groups = offset_groups
        self.strides = pair(strides)
        self.dilation_rate = pair(dilation_rate)
        self.boundary = boundary
        (self.pad_top, _), (self.pad_left, _) = explicit_padding(
            padding,
            self.size,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
        )
        out = output_size(
            padding,
            self.size,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
        )
        # The mask is [n, i, j, offset group, tap]; the offset has (dy, dx) too.
        taps_shape = (batch, *out, offset_groups, self.taps)
        self.offset = offset.reshape(*taps_shape, 2)
        self.has_mask = mask is not None
        self.mask = (
            np.asarray(mask).astype(np.float64).reshape(taps_shape)
            if self.has_mask
            else np.ones(taps_shape)
        )

    def channels_of_offset_group(self, group: int) -> slice:
        size = self.channels // self.offset_groups
        return slice(group * size, (group + 1) * size)

    def channels_and_filters_of_group(self, group: int) -> tuple[slice, slice]:
        c, f = self.channels // self.groups, self.filters // self.groups
        return (
            slice(group * c, (group + 1) * c),
            slice(group * f, (group + 1) * f),
        )

    @functools.cached_property
    def samples(self) -> list[_Sample]:
        """Yields every sample that falls inside the image."""
        coordinate = self.offset.dtype.type
        samples = []
        for n, i, j, group, tap in np.ndindex(*self.offset.shape[:-1]):
            kh, kw = divmod(tap, self.kernel_size[1])
            dy, dx = self.offset[n, i, j, group, tap]
            base_y = (
                i * self.strides[0] - self.pad_top + kh * self.dilation_rate[0]
            )
            base_x = (
                j * self.strides[1] - self.pad_left + kw * self.dilation_rate[1]
            )
            y = float(coordinate(base_y) + dy)
            x = float(coordinate(base_x) + dx)
            neighbours = _neighbours(y, x, self.size, self.boundary)
            if neighbours:
                samples.append(_Sample(n, i, j, tap, group, neighbours))
        return samples

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """Returns `mask * X(y, x)` as [n, i, j, tap, channel]."""
        columns = np.zeros(
            (*self.offset.shape[:3], self.taps, self.channels), np.float64
        )
        for n, i, j, tap, group, neighbours in self.samples:
            channels = self.channels_of_offset_group(group)
            value = sum(
                p.weight * self.inputs[n, p.row, p.col, channels]
                for p in neighbours
            )
            columns[n, i, j, tap, channels] = (
                self.mask[n, i, j, group, tap] * value
            )
        return columns

    def kernel_by_tap(self) -> np.ndarray:
        return self.kernel.reshape(self.taps, -1, self.filters)


def _output(call: _Call) -> np.ndarray:
    kernel_by_tap = call.kernel_by_tap()
    output = np.zeros((*call.columns.shape[:3], call.filters))
    for group in range(call.groups):
        c, f = call.channels_and_filters_of_group(group)
        output[..., f] = np.einsum(
            "nijkc,kcf->nijf",
            call.columns[..., c],
            kernel_by_tap[..., f],
            optimize=True,
        )
    return output


def _gradients(call: _Call, output_grad: np.ndarray) -> Gradients:
    output_grad = np.asarray(output_grad).astype(np.float64)

    # Through the convolution: to the kernel and to the columns.
    columns, kernel_by_tap = call.columns, call.kernel_by_tap()
    kernel_grad = np.zeros_like(kernel_by_tap)
    columns_grad = np.zeros_like(columns)
    for group in range(call.groups):
        c, f = call.channels_and_filters_of_group(group)
        kernel_grad[..., f] = np.einsum(
            "nijkc,nijf->kcf",
            columns[..., c],
            output_grad[..., f],
            optimize=True,
        )
        columns_grad[..., c] = np.einsum(
            "nijf,kcf->nijkc",
            output_grad[..., f],
            kernel_by_tap[..., f],
            optimize=True,
        )

    # Through the sampling: to the image, the offset and the mask.
    inputs_grad = np.zeros_like(call.inputs)
    offset_grad = np.zeros(call.offset.shape)
    mask_grad = np.zeros_like(call.mask)
    for n, i, j, tap, group, neighbours in call.samples:
        channels = call.channels_of_offset_group(group)
        column_grad = columns_grad[n, i, j, tap, channels]
        value_grad = call.mask[n, i, j, group, tap] * column_grad
        for p in neighbours:
            pixel = call.inputs[n, p.row, p.col, channels]
            inputs_grad[n, p.row, p.col, channels] += p.weight * value_grad
            mask_grad[n, i, j, group, tap] += p.weight * pixel @ column_grad
            offset_grad[n, i, j, group, tap] += [
                p.weight_dy * pixel @ value_grad,
                p.weight_dx * pixel @ value_grad,
            ]
    pixels = call.offset.shape[:3]
    channels = call.offset_groups * call.taps
    return Gradients(
        inputs_grad,
        kernel_grad.reshape(call.kernel.shape),
        offset_grad.reshape(*pixels, 2 * channels),
        mask_grad.reshape(*pixels, channels) if call.has_mask else None,
    )


def deformable_conv2d(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None = None,
    **options: object,
) -> np.ndarray:
    """Computes `tf_deform.ops.deformable_conv2d` in float64."""
    return _output(_Call(inputs, kernel, offset, mask, **options))


def deformable_conv2d_grad(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    output_grad: np.ndarray,
    **options: object,
) -> Gradients:
    """Returns the gradients of `sum(output * output_grad)`, in float64."""
    call = _Call(inputs, kernel, offset, mask, **options)
    return _gradients(call, output_grad)


def output_and_gradients(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    output_grad: np.ndarray,
    **options: object,
) -> tuple[np.ndarray, Gradients]:
    """Returns both, in little more time than the gradients alone take."""
    call = _Call(inputs, kernel, offset, mask, **options)
    return _output(call), _gradients(call, output_grad)
