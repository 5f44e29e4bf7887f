# SPDX-License-Identifier: Apache-2.0
"""Computes deformable ROI pooling in NumPy float64, slowly but legibly.

The tests compare the ops with this file, so nothing here is shared with them:
plain loops over ROIs, bins, classes and samples, one line of arithmetic for
each line of the definition.

Everything is computed in float64 except one thing: where a sample falls is
computed in the coordinate type (float64 for float64 inputs, otherwise
float32), in the order in which the definition writes it, because it decides
which pixels are read and whether the sample counts.
"""

import math
from collections.abc import Iterator
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


class _Limits(NamedTuple):
    """Says which samples are read, as far outside of the map as `margin`.

    The others are 0, and count in the mean only if `all_count`.
    """

    margin: float
    all_count: bool


# A sample is read if -margin <= y <= height - 1 + margin.
_PSROI_POOL = _Limits(margin=0.5, all_count=False)
_ROI_ALIGN = _Limits(margin=1.0, all_count=True)


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
    return tuple(i * t // o for i, t, o in zip(index, to, of, strict=True))


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


def _along_axis(
    t: float, size: int, limits: _Limits
) -> list[tuple[int, float, float]]:
    """Interpolates on one axis: yields `(index, weight, d weight / dt)`.

    Yields nothing if the sample is not read. The two pixels are the ends of the
    cell `[floor(t), floor(t) + 1]`, so the derivative at an integer is the
    right-hand derivative.
    """
    if not -limits.margin <= t <= size - 1 + limits.margin or size == 0:
        return []  # NaN and infinity end here too.
    if t < 0:
        return [(0, 1.0, 0.0)]
    if t >= size - 1:
        return [(size - 1, 1.0, 0.0)]
    low = math.floor(t)
    fraction = t - low
    return [(low, 1.0 - fraction, -1.0), (low + 1, fraction, 1.0)]


def _samples_read(b: Bin, inputs: np.ndarray, limits: _Limits) -> list:
    """Yields a bin's samples that are read: the pixels of each on both axes."""
    height, width = inputs.shape[1:3]
    both = [
        (_along_axis(y, height, limits), _along_axis(x, width, limits))
        for y in b.ys
        for x in b.xs
    ]
    return [(rows, cols) for rows, cols in both if rows and cols]


def _pool(
    inputs: np.ndarray,
    bins: Iterator[Bin],
    shape: tuple[int, ...],
    limits: _Limits,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over the samples of each bin, and their counts."""
    inputs = np.asarray(inputs).astype(np.float64)
    output, counts = np.zeros(shape), np.zeros(shape)
    for b in bins:
        samples = _samples_read(b, inputs, limits)
        count = len(b.ys) * len(b.xs) if limits.all_count else len(samples)
        total = np.zeros(len(b.channels))
        for rows, cols in samples:
            for row, wy, _ in rows:
                for col, wx, _ in cols:
                    total += wy * wx * inputs[b.image, row, col, b.channels]
        counts[b.roi, b.row, b.col, b.outputs] = count
        if count > 0:
            output[b.roi, b.row, b.col, b.outputs] = total / count
    return output, counts


def _pool_grad(
    inputs: np.ndarray,
    bins: Iterator[Bin],
    displacement_shape: tuple[int, ...] | None,
    output_grad: np.ndarray,
    limits: _Limits,
) -> Gradients:
    """Returns the gradients of `sum(output * output_grad)`.

    `displacement_shape` ends in (classes, 2).
    """
    inputs = np.asarray(inputs).astype(np.float64)
    output_grad = np.asarray(output_grad).astype(np.float64)
    inputs_grad = np.zeros_like(inputs)
    displacement_grad = (
        None if displacement_shape is None else np.zeros(displacement_shape)
    )
    for b in bins:
        samples = _samples_read(b, inputs, limits)
        count = len(b.ys) * len(b.xs) if limits.all_count else len(samples)
        grad = output_grad[b.roi, b.row, b.col, b.outputs]
        slope = np.zeros(2)
        for rows, cols in samples:
            for row, wy, wy_dy in rows:
                for col, wx, wx_dx in cols:
                    at = b.image, row, col, b.channels
                    inputs_grad[at] += wy * wx * grad / count
                    common = inputs[at] @ grad / count
                    slope += [wy_dy * wx * common, wy * wx_dx * common]
        if displacement_grad is not None and samples:
            displacement_grad[b.place] += slope * b.reach
    return Gradients(inputs_grad, displacement_grad)


def deformable_psroi_pool(
    inputs: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None = None,
    *,
    return_count: bool = False,
    **attributes: object,
):
    """Computes `tf_deform.ops.deformable_psroi_pool` in float64."""
    with np.errstate(all="ignore"):
        shape = (
            len(rois),
            *pair(attributes["pooled_size"]),
            attributes["output_dim"],
        )
        bins = psroi_bins(inputs, rois, trans, **attributes)
        output, counts = _pool(inputs, bins, shape, _PSROI_POOL)
    return (output, counts) if return_count else output


def deformable_psroi_pool_grad(
    inputs: np.ndarray,
    rois: np.ndarray,
    trans: np.ndarray | None,
    output_grad: np.ndarray,
    **attributes: object,
) -> Gradients:
    """Returns the gradients of `sum(output * output_grad)`, in float64."""
    shape = None if trans is None else np.shape(trans)
    with np.errstate(all="ignore"):
        gradients = _pool_grad(
            inputs,
            psroi_bins(inputs, rois, trans, **attributes),
            None if shape is None else (*shape[:3], shape[3] // 2, 2),
            output_grad,
            _PSROI_POOL,
        )
    if shape is None:
        return gradients
    return gradients._replace(
        displacement=gradients.displacement.reshape(shape)
    )


def deformable_roi_align(
    inputs: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None = None,
    **attributes: object,
) -> np.ndarray:
    """Computes `tf_deform.ops.deformable_roi_align` in float64."""
    with np.errstate(all="ignore"):
        shape = (
            len(rois),
            *pair(attributes["pooled_size"]),
            inputs.shape[3],
        )
        bins = roi_align_bins(inputs, rois, offset, **attributes)
        return _pool(inputs, bins, shape, _ROI_ALIGN)[0]


def deformable_roi_align_grad(
    inputs: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    output_grad: np.ndarray,
    **attributes: object,
) -> Gradients:
    """Returns the gradients of `sum(output * output_grad)`, in float64."""
    shape = None if offset is None else np.shape(offset)
    with np.errstate(all="ignore"):
        gradients = _pool_grad(
            inputs,
            roi_align_bins(inputs, rois, offset, **attributes),
            None if shape is None else (*shape[:3], 1, 2),
            output_grad,
            _ROI_ALIGN,
        )
    if shape is None:
        return gradients
    return gradients._replace(
        displacement=gradients.displacement.reshape(shape)
    )


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
