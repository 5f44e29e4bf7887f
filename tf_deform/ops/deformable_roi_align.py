# SPDX-License-Identifier: Apache-2.0
"""Implements deformable ROIAlign as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tf_deform import _loader
from tf_deform._implementation import choose
from tf_deform._portable import deformable_roi_align as portable
from tf_deform._portable.gradients import second_gradients
from tf_deform.ops import _registration
from tf_deform.ops._arguments import (
    coordinate_type,
    integer,
    number,
    pair,
    to_coordinates,
    to_inputs,
    to_rois,
    wanted_gradients,
)

_library = _loader.op_library()

# The op and its gradient op have these attributes in common.
_ATTRIBUTES = ("pooled_size", "spatial_scale", "sampling_ratio", "gamma")


def deformable_roi_align(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    offset: tf.Tensor | None = None,
    *,
    pooled_size: int | Sequence[int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    implementation: str = "native",
) -> tf.Tensor:
    """Computes means of samples in displaced bins of unrounded regions.

    For ROI `r` = `(n, x1, y1, x2, y2)` and bin `(ph, pw)`, along y (x
    likewise):

        start = y1 * spatial_scale - 0.5
        size = (y2 - y1) * spatial_scale
        y_i = start + gamma * size * offset[r, ph, pw, 0]
              + (ph + (i + 0.5) / samples) * size / pooled_h
        output[r, ph, pw, c] = mean over all i, j of inputs_c(y_i, x_j)

    for `i` in `[0, samples)` (`dx` is `offset[r, ph, pw, 1]`), where
    `inputs_c(y, x)` is the bilinear sample of channel `c` of image `n`. It is 0
    outside of `-1 <= y <= height` and `-1 <= x <= width`; inside of this range,
    coordinates outside of the map read its outermost pixels. Without `offset`
    this is ROIAlign. Where a coordinate is an integer, the derivative is the
    right-hand one; where it is clamped, the derivative is 0. Results on the CPU
    are the same to the bit for any number of threads.

    Source: He et al. 2017, "Mask R-CNN", arXiv:1703.06870, section 3;
    displacements: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 6.

    Args:
        inputs: `(batch, height, width, channels)`, of float16, bfloat16,
            float32 or float64.
        rois: `(num_rois, 5)`: batch_index, x1, y1, x2, y2, in image pixels.
            Cast to float32, or to float64 if `inputs` are float64. A negative
            batch index marks padding. Such a ROI, and a ROI with a corner that
            is not finite, gives 0 and has no gradient.
        offset: `(num_rois, pooled_h, pooled_w, 2)`, `(dy, dx)`: displacements
            in fractions of the ROI, times `gamma`. Cast like `rois`. None: no
            displacement.
        pooled_size: Integer or (height, width): bins of a ROI.
        spatial_scale: Map pixels per image pixel, at least `2**-126`.
        sampling_ratio: Samples of a bin along each axis. 0 or less: each ROI
            has its own number, `ceil(size / pooled_h)`, but at most `ceil(2 *
            height / pooled_h)`; along x likewise.
        gamma: Factor of the displacements, 0 or more.
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.

    Returns:
        `(num_rois, pooled_h, pooled_w, channels)`, of the type of `inputs`;
        0 for a bin without samples. Differentiable with respect to `inputs`
        and `offset`, any number of times.

    Raises:
        TypeError: A tensor has another type, or an argument should be a number.
        ValueError: In a graph, shapes do not fit.
        tf.errors.InvalidArgumentError: Values or shapes do not fit. A batch
            index that is not an integer below `batch` is an error on the CPU
            only; on a GPU and with XLA such a ROI gives 0.
    """
    attributes = dict(
        pooled_size=pair(pooled_size, "pooled_size"),
        spatial_scale=number(spatial_scale, "spatial_scale"),
        sampling_ratio=integer(sampling_ratio, "sampling_ratio"),
        gamma=number(gamma, "gamma"),
    )
    inputs = to_inputs(inputs)
    coordinates = coordinate_type(inputs.dtype)
    run = choose(
        implementation,
        "tf_deform_deformable_roi_align",
        portable.deformable_roi_align,
    )
    return run(
        inputs,
        to_rois(rois, coordinates),
        []
        if offset is None
        else [to_coordinates(offset, coordinates, "offset")],
        **attributes,
    )


@_registration.gradient("TfDeform>DeformableROIAlign")
def _deformable_roi_align_grad(
    op: tf.Operation, grad_output: tf.Tensor
) -> list[tf.Tensor | None]:
    """Computes gradients of inputs and offset, if a tape asks for them."""
    inputs, rois, *offset = op.inputs
    wanted = wanted_gradients(op)
    gradients = _library.tf_deform_deformable_roi_align_grad(
        inputs,
        rois,
        offset,
        grad_output,
        wanted=[wanted[0], *wanted[2:]],
        **{name: op.get_attr(name) for name in _ATTRIBUTES},
    )
    flat = [gradients.grad_inputs, None, *gradients.grad_offset]
    return [
        gradient if wanted[index] else None
        for index, gradient in enumerate(flat)
    ]


@_registration.gradient("TfDeform>DeformableROIAlignGrad")
def _deformable_roi_align_grad_grad(
    op: tf.Operation, *grads: tf.Tensor | None
) -> list[tf.Tensor | None]:
    """Computes gradients of the gradients, in stock TensorFlow ops."""
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    return second_gradients(
        op,
        grads,
        lambda inputs, rois, *offset: portable.deformable_roi_align(
            inputs, rois, offset, **attributes
        ),
        sources=(0, 2)[: len(grads)],
    )


def _flops(op: tf.Operation, outputs: tf.Tensor, gradients: int = 1) -> int:
    """Counts 8 * outputs * samples, and the same for each gradient.

    If the number of samples depends on the ROI, it counts 2 x 2 samples, the
    number that detectors set.
    """
    ratio = op.get_attr("sampling_ratio")
    samples = (ratio if ratio > 0 else 2) ** 2
    return (
        _registration.SAMPLE * _registration.size(outputs) * samples * gradients
    )


_registration.flops(
    "TfDeform>DeformableROIAlign", lambda op: _flops(op, op.outputs[0])
)
_registration.flops(
    "TfDeform>DeformableROIAlignGrad",
    lambda op: _flops(op, op.inputs[-1], sum(op.get_attr("wanted"))),
)
