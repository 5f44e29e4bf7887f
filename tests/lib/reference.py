# SPDX-License-Identifier: Apache-2.0
"""Computes deformable convolution in NumPy float64, slowly but legibly.

The tests compare the ops with this file, so nothing here is shared with them:
plain loops over output pixels, taps and offset groups, one line of arithmetic
for each line of the definition.

Everything is computed in float64 except one thing: coordinates are added up
in the type of `offset` (float32 or float64), because where a sample falls is
part of the definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Union

import numpy as np

Pair = tuple[int, int]
Padding = Union[str, int, Pair, tuple[Pair, Pair]]


class Gradients(NamedTuple):
    """Holds gradients of `sum(output * output_grad)`, by operand."""

    inputs: np.ndarray
    kernel: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None


class _Neighbours(NamedTuple):
    """Holds the pixels that a sample reads, each with a weight.

    `weights_dy` and `weights_dx` are the derivatives of the weights.
    """

    rows: np.ndarray
    cols: np.ndarray
    weights: np.ndarray
    weights_dy: np.ndarray
    weights_dx: np.ndarray


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
        for n, k, s, d in zip(size, kernel_size, strides, dilation_rate):
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
    pads = explicit_padding(padding, size, kernel_size, strides, dilation_rate)
    return tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, k, s, d in zip(
            size, pads, kernel_size, strides, dilation_rate
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
) -> _Neighbours | None:
    """Returns the pixels that a sample at `(y, x)` reads; None if outside."""
    height, width = size
    if boundary == "zeros":
        inside = -1 < y < height and -1 < x < width
    elif boundary == "clamp":
        inside = 0 <= y < height and 0 <= x < width
    else:
        raise ValueError(f"Unknown boundary: {boundary!r}.")
    if not inside:  # NaN and infinity end here too.
        return None
    pixels = [
        (row, col, wy * wx, wy_dy * wx, wy * wx_dx)
        for row, wy, wy_dy in _along_axis(y, height, boundary)
        for col, wx, wx_dx in _along_axis(x, width, boundary)
    ]
    return _Neighbours(*map(np.array, zip(*pixels)))


class _Call:
    """Holds the operands of one call in float64, its samples and columns."""

    def __init__(
        self,
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
        modulation: str = "mask",
    ):
        self.inputs = np.asarray(inputs).astype(np.float64)
        kernel = np.asarray(kernel).astype(np.float64)
        offset = np.asarray(offset)
        if offset.dtype not in (np.float32, np.float64):
            offset = offset.astype(np.float32)
        batch, *self.size, channels = self.inputs.shape
        *self.kernel_size, channels_per_group, filters = kernel.shape
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.kernel_by_tap = kernel.reshape(taps, -1, filters)
        self.steps = pair(strides), pair(dilation_rate)
        sizes = padding, self.size, self.kernel_size
        self.pads = explicit_padding(*sizes, *self.steps)
        self.boundary = boundary
        # The mask is [n, i, j, offset group, tap]; the offset has (dy, dx) too.
        out = output_size(*sizes, *self.steps)
        shape = (batch, *out, offset_groups, taps)
        samples = offset_groups * taps
        self.offset = offset[..., : 2 * samples].reshape(*shape, 2)
        self.mask = np.ones(shape)
        if mask is not None:
            self.mask = np.asarray(mask).astype(np.float64).reshape(shape)
        self.masks_in_offset = modulation in ("sigmoid", "2sigmoid")
        if self.masks_in_offset:
            m = offset[..., 2 * samples :].astype(np.float64).reshape(shape)
            largest = 2 if modulation == "2sigmoid" else 1
            sigmoid = 1 / (1 + np.exp(-m))
            self.mask = largest * sigmoid
            self.mask_slope = largest * sigmoid * (1 - sigmoid)  # by m
        # The output pixels for which a branch predicts NaN.
        self.nan = np.zeros((batch, *out, 1), bool)
        if modulation != "mask":
            self.nan = np.isnan(offset).any(-1, keepdims=True)
        # The channels of each offset group; channels and filters of each group.
        self.moved_together = _parts(channels, offset_groups)
        groups = channels // channels_per_group
        self.groups = list(
            zip(_parts(channels, groups), _parts(filters, groups))
        )
        self.samples = list(self._samples())
        # `mask * X(y, x)` as [n, i, j, tap, channel].
        self.columns = np.zeros((*shape[:3], taps, channels))
        for index, at, column, near in self.samples:
            value = near.weights @ self.inputs[at]
            self.columns[column] = self.mask[index] * value

    def _samples(self) -> Iterator[tuple]:
        """Yields every sample that falls inside the image.

        Yields its place in the mask, in the inputs and in the columns, and its
        neighbours.
        """
        strides, dilation_rate = self.steps
        for index in np.ndindex(*self.mask.shape):
            n, i, j, group, tap = index
            taps = divmod(tap, self.kernel_size[1])
            place = []
            for axis, pixel in enumerate((i, j)):
                base = pixel * strides[axis] - self.pads[axis][0]
                base = self.offset.dtype.type(
                    base + taps[axis] * dilation_rate[axis]
                )
                place.append(float(base + self.offset[index][axis]))
            near = _neighbours(*place, self.size, self.boundary)
            if near:
                channels = self.moved_together[group]
                at = (n, near.rows, near.cols, channels)
                yield index, at, (n, i, j, tap, channels), near

    def output(self) -> np.ndarray:
        filters = self.kernel_by_tap.shape[-1]
        output = np.zeros((*self.columns.shape[:3], filters))
        for c, f in self.groups:
            output[..., f] = np.einsum(
                "nijkc,kcf->nijf",
                self.columns[..., c],
                self.kernel_by_tap[..., f],
                optimize=True,
            )
        return np.where(self.nan, np.nan, output)


def _parts(count: int, parts: int) -> list[slice]:
    """Divides `count` channels into equal runs."""
    size = count // parts
    return [slice(i * size, (i + 1) * size) for i in range(parts)]


def _gradients(call: _Call, output_grad: np.ndarray) -> tuple:
    """Returns gradients of inputs, kernel, offset and mask.

    If masks are made of numbers in the offset, its gradient holds theirs.
    """
    output_grad = np.asarray(output_grad).astype(np.float64)

    # Through the convolution: to the kernel and to the columns.
    kernel_grad = np.zeros_like(call.kernel_by_tap)
    columns_grad = np.zeros_like(call.columns)
    for c, f in call.groups:
        kernel_grad[..., f] = np.einsum(
            "nijkc,nijf->kcf",
            call.columns[..., c],
            output_grad[..., f],
            optimize=True,
        )
        columns_grad[..., c] = np.einsum(
            "nijf,kcf->nijkc",
            output_grad[..., f],
            call.kernel_by_tap[..., f],
            optimize=True,
        )

    # Through the sampling: to the image, the offset and the mask.
    inputs_grad = np.zeros_like(call.inputs)
    offset_grad = np.zeros(call.offset.shape)
    mask_grad = np.zeros_like(call.mask)
    for index, at, column, near in call.samples:
        value_grad = call.mask[index] * columns_grad[column]
        # The pixels of a sample differ: none is added twice.
        inputs_grad[at] += np.outer(near.weights, value_grad)
        pixels = call.inputs[at]
        mask_grad[index] = near.weights @ pixels @ columns_grad[column]
        offset_grad[index] = [
            near.weights_dy @ pixels @ value_grad,
            near.weights_dx @ pixels @ value_grad,
        ]
    if call.masks_in_offset:
        # NaN where m is NaN, also outside of the image.
        m_grad = mask_grad * call.mask_slope
        fields = (*call.offset.shape[:3], -1)
        offset_grad = np.concatenate(
            [offset_grad.reshape(fields), m_grad.reshape(fields)], -1
        )
    return inputs_grad, kernel_grad, offset_grad, mask_grad


def deformable_conv2d(*operands: np.ndarray, **options: object) -> np.ndarray:
    """Computes `tf_deform.ops.deformable_conv2d` in float64."""
    return _Call(*operands, **options).output()


def output_and_gradients(
    inputs: np.ndarray,
    kernel: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    output_grad: np.ndarray,
    **options: object,
) -> tuple[np.ndarray, Gradients]:
    """Returns the output, and the gradients of `sum(output * output_grad)`."""
    call = _Call(inputs, kernel, offset, mask, **options)
    gradients = _gradients(call, output_grad)
    operands = (inputs, kernel, offset, mask)
    return call.output(), Gradients(
        *(
            None if operand is None else gradient.reshape(np.shape(operand))
            for operand, gradient in zip(operands, gradients)
        )
    )
