# SPDX-License-Identifier: Apache-2.0
"""Implements deformable position-sensitive ROI pooling of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _loader
from tf_deform._implementation import choose
from tf_deform._portable import deformable_psroi_pool as portable
from tf_deform._portable.gradients import second_gradients
from tf_deform.ops import _registration
from tf_deform.ops._arguments import (
    boolean,
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
_ATTRIBUTES = (
    "output_dim",
    "spatial_scale",
    "pooled_size",
    "group_size",
    "part_size",
    "sample_per_part",
    "trans_std",
)


def deformable_psroi_pool(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    trans: tf.Tensor | None = None,
    *,
    output_dim: int,
    spatial_scale: float,
    pooled_size: int | Sequence[int],
    group_size: int | Sequence[int] | None = None,
    part_size: int | Sequence[int] | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    return_count: bool = False,
    implementation: str = "native",
) -> Any:
    """Computes means of samples in displaced bins of regions of interest.

    For ROI `r` = `(n, x1, y1, x2, y2)`, bin `(ph, pw)` and output channel `o`,
    along y (x likewise):

        start = round(y1) * spatial_scale - 0.5
        end = (round(y2) + 1) * spatial_scale - 0.5
        size = max(end - start, 0.1)
        dy = trans[r, ph * part_h // pooled_h, pw * part_w // pooled_w, 2 * k]
             * trans_std * size
        y_i = start + dy + (ph + i / sample_per_part) * size / pooled_h
        output[r, ph, pw, o] = mean over i, j that count of inputs_c(y_i, x_j)

    for `i`, `j` in `[0, sample_per_part)`, where `inputs_c(y, x)` is the
    bilinear sample of channel `c = (o * group_h + ph * group_h // pooled_h) *
    group_w + pw * group_w // pooled_w` of image `n`, and `k = o // (output_dim
    // num_classes)` the channel's displacement class (`dx` is `2 * k + 1`). A
    sample counts where `-0.5 <= y <= height - 0.5` and `-0.5 <= x <= width -
    0.5`; its coordinates are then clamped to the map. `round` rounds halves
    away from zero. Where a coordinate is an integer, the derivative is the
    right-hand one; where it is clamped, the derivative is 0. Results on the CPU
    are the same to the bit for any number of threads.

    With `group_size=1` this is deformable ROI pooling; without `trans`,
    position-sensitive ROI pooling with bilinear samples.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 5 and 6; position-sensitive maps: Dai et al. 2016,
    "R-FCN", arXiv:1605.06409, Eq. 1.

    Args:
        inputs: `(batch, height, width, output_dim * group_h * group_w)`, of
            float16, bfloat16, float32 or float64.
        rois: `(num_rois, 5)`: batch_index, x1, y1, x2, y2, in image pixels, the
            last pixels included. Cast to float32, or to float64 if `inputs` are
            float64. A negative batch index marks padding. Such a ROI, and a ROI
            with a corner that is not finite, gives 0 and has no gradient.
        trans: `(num_rois, part_h, part_w, num_classes * 2)`, `(dy, dx)` of
            each class: displacements in fractions of the ROI, times
            `trans_std`. Cast like `rois`. `num_classes` divides `output_dim`.
            None: no displacement.
        output_dim: Number of output channels.
        spatial_scale: Map pixels per image pixel, at least `2**-126`.
        pooled_size: Integer or (height, width): bins of a ROI.
        group_size: Integer or (height, width): cells of the position-sensitive
            maps. None means `pooled_size`.
        part_size: Integer or (height, width): displacements of a ROI. None
            means `pooled_size`.
        sample_per_part: Samples of a bin along each axis.
        trans_std: Factor of the displacements, 0 or more.
        return_count: Whether to return also the number of samples that count.
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.

    Returns:
        `(num_rois, pooled_h, pooled_w, output_dim)`, of the type of `inputs`,
        differentiable with respect to `inputs` and `trans`, any number of
        times. With `return_count` a pair of this tensor and the counts, of the
        same shape and float32.

    Raises:
        TypeError: A tensor has another type, or an argument should be a number.
        ValueError: In a graph, shapes do not fit.
        tf.errors.InvalidArgumentError: Values or shapes do not fit. A batch
            index that is not an integer below `batch` is an error on the CPU
            only; on a GPU and with XLA such a ROI gives 0.
    """
    pooled_size = pair(pooled_size, "pooled_size")
    return_count = boolean(return_count, "return_count")
    attributes = dict(
        output_dim=integer(output_dim, "output_dim"),
        spatial_scale=number(spatial_scale, "spatial_scale"),
        pooled_size=pooled_size,
        group_size=pooled_size
        if group_size is None
        else pair(group_size, "group_size"),
        part_size=pooled_size
        if part_size is None
        else pair(part_size, "part_size"),
        sample_per_part=integer(sample_per_part, "sample_per_part"),
        trans_std=number(trans_std, "trans_std"),
    )
    inputs = to_inputs(inputs)
    coordinates = coordinate_type(inputs.dtype)
    run = choose(
        implementation,
        "tf_deform_deformable_psroi_pool",
        portable.deformable_psroi_pool,
    )
    output, count = run(
        inputs,
        to_rois(rois, coordinates),
        [] if trans is None else [to_coordinates(trans, coordinates, "trans")],
        **attributes,
    )
    return (output, count) if return_count else output


@_registration.gradient("TfDeform>DeformablePSROIPool")
def _deformable_psroi_pool_grad(
    op: tf.Operation, grad_output: tf.Tensor, _: Any
) -> list[tf.Tensor | None]:
    """Computes gradients of inputs and trans, if a tape asks for them."""
    inputs, rois, *trans = op.inputs
    wanted = wanted_gradients(op)
    gradients = _library.tf_deform_deformable_psroi_pool_grad(
        inputs,
        rois,
        trans,
        grad_output,
        wanted=[wanted[0], *wanted[2:]],
        **{name: op.get_attr(name) for name in _ATTRIBUTES},
    )
    flat = [gradients.grad_inputs, None, *gradients.grad_trans]
    return [
        gradient if wanted[index] else None
        for index, gradient in enumerate(flat)
    ]


@_registration.gradient("TfDeform>DeformablePSROIPoolGrad")
def _deformable_psroi_pool_grad_grad(
    op: tf.Operation, *grads: tf.Tensor | None
) -> list[tf.Tensor | None]:
    """Computes gradients of the gradients, in stock TensorFlow ops."""
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    return second_gradients(
        op,
        grads,
        lambda inputs, rois, *trans: portable.deformable_psroi_pool(
            inputs, rois, trans, **attributes
        )[0],
        sources=(0, 2)[: len(grads)],
    )


def _flops(op: tf.Operation, outputs: tf.Tensor, gradients: int = 1) -> int:
    """Counts 8 * outputs * sample_per_part**2, and the same per gradient."""
    samples = _registration.size(outputs) * op.get_attr("sample_per_part") ** 2
    return _registration.SAMPLE * samples * gradients


_registration.flops(
    "TfDeform>DeformablePSROIPool", lambda op: _flops(op, op.outputs[0])
)
_registration.flops(
    "TfDeform>DeformablePSROIPoolGrad",
    lambda op: _flops(op, op.inputs[-1], sum(op.get_attr("wanted"))),
)
