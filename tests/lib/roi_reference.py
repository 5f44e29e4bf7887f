# SPDX-License-Identifier: Apache-2.0
"""Computes deformable ROI pooling in NumPy float64, slowly but legibly.

The tests compare the ops with this file, so nothing here is shared with them:
plain loops over ROIs, bins, classes and samples on each axis, one line of
arithmetic for each line of the definition.

Everything is computed in float64 except one thing: where a sample falls is
computed in the coordinate type (float64 for float64 inputs, otherwise
float32), in the order in which the definition writes it, because it decides
which pixels are read and whether the sample counts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from reference import Pair, pair


class Gradients(NamedTuple):
    """Holds gradients of `sum(output * output_grad)`, by operand.

    `displacement` is the gradient of `trans` or `offset`; None without
    displacements.
    """

    inputs: np.ndarray
    displacement: np.ndarray | None


class Bin(NamedTuple):
    """Describes a bin of a ROI, for the output channels that move together."""

    roi: int
    row: int
    col: int
    image: int
    channels: np.ndarray  # input channels, one for each of
    outputs: np.ndarray  # these output channels
    ys: list[float]  # samples are at all pairs of these,
    xs: list[float]  # whether they count or not
    place: tuple[int, ...]  # where its (dy, dx) are stored
    reach: tuple[float, float]  # pixels for a displacement of 1


def coordinate_type(inputs: np.ndarray) -> type:
    """Returns the type of ROIs, displacements and places of samples."""
    return np.float64 if inputs.dtype == np.float64 else np.float32


def half_away(value):
    """Rounds to the nearest integer, halves away from zero."""
    whole = np.trunc(value)
    if abs(value - whole) >= 0.5:  # The difference is exact.
        whole += np.copysign(type(value)(1), value)
    return whole


def psroi_bins(
    inputs: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None,
    *,
    output_dim: int,
    spatial_scale: float,
    pooled_size: int | Pair,
    group_size: int | Pair | None = None,
    part_size: int | Pair | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
) -> Iterator[Bin]:
    """Yields the bins of deformable PS-ROI pooling."""
    real = coordinate_type(inputs)
    rois = np.asarray(rois).astype(real)
    pooled_size = pair(pooled_size)
    group_size = pooled_size if group_size is None else pair(group_size)
    part_size = pooled_size if part_size is None else pair(part_size)
    if trans is not None:
        trans = np.asarray(trans).astype(real)
        assert trans.shape[:3] == (len(rois), *part_size)
    classes = 1 if trans is None else trans.shape[3] // 2
    scale, samples = real(spatial_scale), real(sample_per_part)
    half, smallest, one = real(0.5), real(0.1), real(1)

    for roi, row, col, kind in np.ndindex(len(rois), *pooled_size, classes):
        index, x1, y1, x2, y2 = rois[roi]
        if index < 0 or not np.isfinite([x1, y1, x2, y2]).all():
            continue
        place = (roi, *_scaled((row, col), part_size, pooled_size), kind)
        gh, gw = _scaled((row, col), group_size, pooled_size)
        outputs = np.arange(output_dim)
        outputs = outputs[outputs // (output_dim // classes) == kind]
        places, reach = [], []
        # Axis 0 is y, axis 1 is x; a displacement is (dy, dx).
        for axis, (first, last) in enumerate([(y1, y2), (x1, x2)]):
            roi_start = half_away(first) * scale - half
            roi_end = (half_away(last) + one) * scale - half
            size = np.maximum(roi_end - roi_start, smallest)
            bin_size = size / real(pooled_size[axis])
            step = bin_size / samples
            start = real((row, col)[axis]) * bin_size + roi_start
            if trans is not None:
                d = trans[place[:3]][2 * kind + axis]
                start = start + d * real(trans_std) * size
            places.append(
                [float(start + real(i) * step) for i in range(sample_per_part)]
            )
            reach.append(float(real(trans_std)) * float(size))
        yield Bin(
            roi,
            row,
            col,
            int(index),
            (outputs * group_size[0] + gh) * group_size[1] + gw,
            outputs,
            *places,
            place,
            tuple(reach),
        )


def _scaled(index: Pair, to: Pair, of: Pair) -> Pair:
    """Converts a cell of a grid of size `of` to a grid of size `to`."""
    return tuple(i * t // o for i, t, o in zip(index, to, of))


def roi_align_bins(
    inputs: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    *,
    pooled_size: int | Pair,
    spatial_scale: float,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Iterator[Bin]:
    """Yields the bins of deformable ROIAlign."""
    real = coordinate_type(inputs)
    rois = np.asarray(rois).astype(real)
    pooled_size = pair(pooled_size)
    if offset is not None:
        offset = np.asarray(offset).astype(real)
        assert offset.shape == (len(rois), *pooled_size, 2)
    scale, half = real(spatial_scale), real(0.5)

    for roi, row, col in np.ndindex(len(rois), *pooled_size):
        index, x1, y1, x2, y2 = rois[roi]
        if index < 0 or not np.isfinite([x1, y1, x2, y2]).all():
            continue
        places, reach = [], []
        for axis, (first, last) in enumerate([(y1, y2), (x1, x2)]):
            pooled = pooled_size[axis]
            roi_start = first * scale - half
            size = (last - first) * scale
            bin_size = size / real(pooled)
            samples = sampling_ratio
            if sampling_ratio <= 0:
                most = math.ceil(2 * inputs.shape[1 + axis] / pooled)
                # A size that is not a number: no sample would be read anyway.
                wanted = np.nan_to_num(np.ceil(bin_size), nan=0.0)
                samples = int(min(max(wanted, 0), most))
            start = real((row, col)[axis]) * bin_size + roi_start
            if offset is not None:
                d = offset[roi, row, col, axis]
                start = start + real(gamma) * size * d
            step = bin_size / real(max(samples, 1))
            places.append(
                [float(start + real(i + 0.5) * step) for i in range(samples)]
            )
            reach.append(float(real(gamma)) * float(size))
        channels = np.arange(inputs.shape[3])
        yield Bin(
            roi,
            row,
            col,
            int(index),
            channels,
            channels,
            *places,
            (roi, row, col, 0),
            tuple(reach),
        )


class _Rule(NamedTuple):
    """Describes an op: its bins, and which of their samples are read.

    A sample is read if -margin <= y <= height - 1 + margin. The others are 0,
    and count in the mean only if `all_count`.
    """

    make_bins: Callable[..., Iterator[Bin]]
    margin: float
    all_count: bool


_PSROI_POOL = _Rule(psroi_bins, margin=0.5, all_count=False)
_ROI_ALIGN = _Rule(roi_align_bins, margin=1.0, all_count=True)


def _along_axis(
    t: float, size: int, margin: float
) -> list[tuple[int, float, float]]:
    """Interpolates on one axis: returns `(index, weight, d weight / dt)`.

    Returns nothing if the sample is not read. The two pixels are the ends of
    the cell `[floor(t), floor(t) + 1]`, so the derivative at an integer is the
    right-hand derivative.
    """
    if not -margin <= t <= size - 1 + margin or size == 0:
        return []  # NaN and infinity end here too.
    if t < 0:
        return [(0, 1.0, 0.0)]
    if t >= size - 1:
        return [(size - 1, 1.0, 0.0)]
    low = math.floor(t)
    fraction = t - low
    return [(low, 1.0 - fraction, -1.0), (low + 1, fraction, 1.0)]


class _Axis(NamedTuple):
    """Describes the samples of a bin along one axis, added up by pixel."""

    read: int  # samples
    pixels: list[int]
    weights: np.ndarray
    slopes: np.ndarray  # derivatives of the weights


def _add_up(places: list[float], size: int, margin: float) -> _Axis:
    samples = [_along_axis(t, size, margin) for t in places]
    sums: dict[int, np.ndarray] = {}
    for pixel, *numbers in itertools.chain(*samples):
        sums[pixel] = sums.get(pixel, 0) + np.array(numbers)
    columns = np.reshape([*sums.values()], (-1, 2)).T
    return _Axis(sum(map(bool, samples)), [*sums], *columns)


def _read_bins(
    rule: _Rule, inputs: np.ndarray, bins: Iterator[Bin]
) -> Iterator[tuple[Bin, int, _Axis, _Axis]]:
    """Yields each bin, the number of its samples, and those that are read.

    A bin's samples are all pairs of its samples on the two axes, and a sample's
    weights are products, so the mean is a product of sums.
    """
    height, width = inputs.shape[1:3]
    for b in bins:
        y = _add_up(b.ys, height, rule.margin)
        x = _add_up(b.xs, width, rule.margin)
        every = len(b.ys) * len(b.xs)
        yield b, every if rule.all_count else y.read * x.read, y, x


@np.errstate(all="ignore")
def _pool(
    rule: _Rule, channels: int, inputs, rois, displacement, attributes: dict
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over the samples of each bin, and their counts."""
    shape = (len(rois), *pair(attributes["pooled_size"]), channels)
    bins = rule.make_bins(inputs, rois, displacement, **attributes)
    inputs = np.asarray(inputs).astype(np.float64)
    output, counts = np.zeros(shape), np.zeros(shape)
    for b, count, y, x in _read_bins(rule, inputs, bins):
        counts[b.roi, b.row, b.col, b.outputs] = count
        if y.read and x.read:
            pixels = inputs[np.ix_([b.image], y.pixels, x.pixels, b.channels)]
            total = np.einsum("nyxc,y,x->c", pixels, y.weights, x.weights)
            output[b.roi, b.row, b.col, b.outputs] = total / count
    return output, counts


@np.errstate(all="ignore")
def _pool_grad(
    rule: _Rule, inputs, rois, displacement, output_grad, **attributes: object
) -> Gradients:
    """Returns the gradients of `sum(output * output_grad)`, in float64."""
    bins = rule.make_bins(inputs, rois, displacement, **attributes)
    inputs = np.asarray(inputs).astype(np.float64)
    output_grad = np.asarray(output_grad).astype(np.float64)
    inputs_grad = np.zeros_like(inputs)
    slopes = None
    if displacement is not None:
        *cells, channels = np.shape(displacement)
        slopes = np.zeros((*cells, channels // 2, 2))
    for b, count, y, x in _read_bins(rule, inputs, bins):
        if not (y.read and x.read):
            continue
        grad = output_grad[b.roi, b.row, b.col, b.outputs] / count
        at = np.ix_([b.image], y.pixels, x.pixels, b.channels)
        inputs_grad[at] += np.einsum("y,x,c->yxc", y.weights, x.weights, grad)
        if slopes is not None:
            common = inputs[at][0] @ grad
            dy = y.slopes @ common @ x.weights
            dx = y.weights @ common @ x.slopes
            slopes[b.place] += np.array([dy, dx]) * b.reach
    if slopes is not None:
        slopes = slopes.reshape(np.shape(displacement))
    return Gradients(inputs_grad, slopes)


def deformable_psroi_pool(
    inputs, rois, trans=None, *, return_count: bool = False, **attributes
):
    """Computes `tf_deform.ops.deformable_psroi_pool` in float64."""
    channels = attributes["output_dim"]
    results = _pool(_PSROI_POOL, channels, inputs, rois, trans, attributes)
    return results if return_count else results[0]


def deformable_roi_align(inputs, rois, offset=None, **attributes) -> np.ndarray:
    """Computes `tf_deform.ops.deformable_roi_align` in float64."""
    channels = inputs.shape[3]
    return _pool(_ROI_ALIGN, channels, inputs, rois, offset, attributes)[0]


deformable_psroi_pool_grad = functools.partial(_pool_grad, _PSROI_POOL)
deformable_roi_align_grad = functools.partial(_pool_grad, _ROI_ALIGN)


def reach_of_displacements(
    bins: Iterator[Bin], shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the pixels for each displacement of 1; 1 for none or infinity.

    The gradients of displacements are slopes times this number.
    """
    *cells, channels = shape
    reach = np.ones((*cells, channels // 2, 2))
    for b in bins:
        reach[b.place] = np.where(np.isfinite(b.reach), b.reach, 1)
    return np.where(reach == 0, 1, np.abs(reach)).reshape(shape)
