# SPDX-License-Identifier: Apache-2.0
"""Implements deformable convolution as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import tensorflow as tf

from tf_deform import _loader
from tf_deform._implementation import choose
from tf_deform._portable import deformable_conv2d as portable
from tf_deform._portable.fields import FACTORS
from tf_deform._portable.gradients import second_gradients
from tf_deform.ops import _registration
from tf_deform.ops._arguments import (
    Pair,
    coordinate_type,
    infer_shape,
    integer,
    option,
    pair,
    plain,
    received,
    to_coordinates,
    to_inputs,
    to_tensor,
    wanted_gradients,
)

_library = _loader.op_library()

BOUNDARIES = ("zeros", "clamp")
MODULATIONS = ("mask", "none", "sigmoid", "2sigmoid")

# The op and its gradient op have these attributes in common.
_ATTRIBUTES = (
    "strides",
    "padding",
    "explicit_paddings",
    "dilations",
    "offset_groups",
    "boundary",
    "modulation",
)

Padding = Union[str, tuple[Pair, Pair]]


def canonical_padding(padding: Any) -> Padding:
    """Returns "valid", "same", or ((top, bottom), (left, right))."""
    if isinstance(padding, str):
        if padding.lower() in ("valid", "same"):
            return padding.lower()
        sides = ()
    else:
        sides = plain(padding)
    if not isinstance(sides, (list, tuple)):
        return (pair(padding, "padding"),) * 2
    if len(sides) == 2:
        nested = [isinstance(plain(side), (list, tuple)) for side in sides]
        if all(nested) or not any(nested):
            return (pair(sides[0], "padding"), pair(sides[1], "padding"))
    raise ValueError(
        'Expected `padding` to be "valid", "same", an integer, (height, width) '
        f"or ((top, bottom), (left, right)). {received(padding)}"
    )


def check_boundary(boundary: Any) -> str:
    return option(boundary, "boundary", BOUNDARIES)


def _attributes(
    strides: Any,
    padding: Any,
    dilation_rate: Any,
    offset_groups: Any,
    boundary: Any,
    modulation: Any,
) -> dict[str, Any]:
    """Returns the arguments as the op's attributes; C++ checks the values."""
    padding = canonical_padding(padding)
    explicit = [] if isinstance(padding, str) else [*padding[0], *padding[1]]
    return dict(
        strides=pair(strides, "strides"),
        padding="EXPLICIT" if explicit else padding.upper(),
        explicit_paddings=explicit,
        dilations=pair(dilation_rate, "dilation_rate"),
        offset_groups=integer(offset_groups, "offset_groups"),
        boundary=check_boundary(boundary),
        modulation=option(modulation, "modulation", MODULATIONS),
    )


def deformable_conv2d(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    offset: tf.Tensor,
    mask: tf.Tensor | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "valid",
    dilation_rate: int | Sequence[int] = 1,
    offset_groups: int = 1,
    boundary: str = "zeros",
    modulation: str = "mask",
    implementation: str = "native",
) -> tf.Tensor:
    """Computes a 2-D convolution whose taps are displaced pixel by pixel.

    For output pixel `(i, j)`, filter `f`, tap `(kh, kw)`, and input channel
    `c` in offset group `g`:

        y = i * stride_h - pad_top + kh * dilation_h + dy[g, kh, kw]
        x = j * stride_w - pad_left + kw * dilation_w + dx[g, kh, kw]
        output[i, j, f] = sum over kh, kw, c of
            kernel[kh, kw, c, f] * mask[g, kh, kw] * inputs_c(y, x)

    where `inputs_c(y, x)` is the bilinear sample of channel `c`, and `dy`, `dx`
    and `mask` belong to the output pixel. Where a coordinate is an integer, the
    derivative is the right-hand one. Results on the CPU are the same to the bit
    for any number of threads. Sums are in float32, or float64 if `inputs` are.
    In bfloat16, on processors with AMX, the product of `mask` and sample is
    rounded to bfloat16 before it is multiplied by the kernel, and numbers below
    2^-126 count as 0.

    With any `modulation` but "mask", `offset` is what a branch of a layer
    predicts, as it comes from a convolution: all displacements and, behind
    them, a number `m[g, kh, kw]` for every sample, of which the factor is made:

        "none":      mask[g, kh, kw] = 1, and there is no m
        "sigmoid":   mask[g, kh, kw] = sigmoid(m[g, kh, kw])
        "2sigmoid":  mask[g, kh, kw] = 2 * sigmoid(m[g, kh, kw])

    An output pixel is then NaN, in all filters, where any of its numbers in
    `offset` is NaN, so that a broken branch shows. The op does all this in one
    pass; separate ops around it, and their gradients, would read and write
    every number again. Gradients are those of these equations: that of `offset`
    holds that of `m`, and NaN in the output adds nothing to them.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 2 to 4; the mask: Zhu et al. 2018, "Deformable
    ConvNets v2", arXiv:1811.11168, Eq. 1.

    Args:
        inputs: `(batch, height, width, channels)`, of float16, bfloat16,
            float32 or float64.
        kernel: `(kernel_h, kernel_w, channels // groups, filters)`, of the
            type of `inputs`. The number of groups, which split channels and
            filters as in `tf.nn.conv2d`, follows from its third dimension.
        offset: `(batch, out_h, out_w, offset_groups * kernel_h * kernel_w *
            2)`, ordered `[offset_group][kh][kw][(dy, dx)]`: displacements in
            input pixels, down and to the right. Cast to float32, or to
            float64 if `inputs` are float64. NaN and infinity lie outside of
            the image. With `modulation` "sigmoid" or "2sigmoid", the last
            dimension is `offset_groups * kernel_h * kernel_w * 3`, and ends
            with `m`, ordered `[offset_group][kh][kw]`.
        mask: `(batch, out_h, out_w, offset_groups * kernel_h * kernel_w)`, a
            factor for every sample; any real number, cast like `offset`.
            None means 1. It has to be None unless `modulation` is "mask".
        strides: Integer or (height, width), in input pixels.
        padding: "valid", "same" (as in TensorFlow: the odd pixel at the
            end), an integer, (height, width), or ((top, bottom), (left,
            right)), in input pixels.
        dilation_rate: Integer or (height, width): distance between taps, in
            input pixels.
        offset_groups: Number of contiguous runs of input channels with
            displacements and masks of their own.
        boundary: "zeros": pixels outside of the image are 0, and a sample
            counts where `-1 < y < height` and `-1 < x < width`. "clamp": a
            sample counts where `0 <= y < height` and `0 <= x < width`, and
            the last row and column are held (the original release of Dai et
            al.). A sample that does not count is 0 and has no gradient.
        modulation: Where the factors come from: "mask" (`mask`), or "none",
            "sigmoid" or "2sigmoid" (`offset`, see above).
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.

    Returns:
        `(batch, out_h, out_w, filters)`, of the type of `inputs`.
        Differentiable with respect to `inputs`, `kernel`, `offset` and
        `mask`, any number of times. `out_h` is `ceil(height / stride_h)` for
        "same" and `(height + top + bottom - dilation_h * (kernel_h - 1) - 1)
        // stride_h + 1` otherwise; `out_w` likewise.

    Raises:
        TypeError: A tensor has another type, or an argument should be made of
            integers.
        ValueError: An option is unknown, or, in a graph, shapes do not fit.
        tf.errors.InvalidArgumentError: Values or shapes do not fit.
    """
    attributes = _attributes(
        strides, padding, dilation_rate, offset_groups, boundary, modulation
    )
    inputs = to_inputs(inputs)
    kernel = to_tensor(kernel, "kernel", inputs.dtype)
    if kernel.dtype != inputs.dtype:
        raise TypeError(
            "Expected `kernel` to have the type of `inputs`, "
            f"{inputs.dtype.name}. Received: kernel.dtype={kernel.dtype.name}"
        )
    coordinates = coordinate_type(inputs.dtype)
    masks = [] if mask is None else [to_coordinates(mask, coordinates, "mask")]
    run = choose(
        implementation,
        "tf_deform_deformable_conv2d",
        portable.deformable_conv2d,
    )
    return run(
        inputs,
        kernel,
        to_coordinates(offset, coordinates, "offset"),
        masks,
        **attributes,
    )


@_registration.gradient("TfDeform>DeformableConv2D")
def _deformable_conv2d_grad(
    op: tf.Operation, grad_output: tf.Tensor
) -> list[tf.Tensor | None]:
    """Computes gradients of the operands that a tape asks for."""
    operands = list(op.inputs)
    wanted = wanted_gradients(op)
    gradients = _library.tf_deform_deformable_conv2d_grad(
        *operands[:3],
        operands[3:],
        grad_output,
        wanted=wanted,
        **{name: op.get_attr(name) for name in _ATTRIBUTES},
    )
    flat = [*gradients[:3], *gradients.grad_mask]
    return [
        gradient if wanted[index] else None
        for index, gradient in enumerate(flat)
    ]


@_registration.gradient("TfDeform>DeformableConv2DGrad")
def _deformable_conv2d_grad_grad(
    op: tf.Operation, *grads: tf.Tensor | None
) -> list[tf.Tensor | None]:
    """Computes gradients of the gradients, in stock TensorFlow ops."""
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    return second_gradients(
        op,
        grads,
        lambda inputs, kernel, offset, *mask: portable.deformable_conv2d(
            inputs, kernel, offset, mask, **attributes
        ),
        sources=range(len(op.inputs) - 1),
    )


def _work(op: tf.Operation) -> tuple[int, int]:
    """Counts operations of the product of matrices, and of sampling.

        product = 2 * pixels * taps * channels // groups * filters
        sampling = 8 * pixels * taps * channels

    `pixels` counts the pixels of all outputs, `taps` the taps of the kernel.
    """
    inputs, kernel, offset = op.inputs[:3]
    numbers = 3 if tf.compat.as_str(op.get_attr("modulation")) in FACTORS else 2
    numbers *= op.get_attr("offset_groups")
    sampled = _registration.size(offset) // numbers * inputs.shape[3]
    product = sampled // (inputs.shape[3] // kernel.shape[2]) * kernel.shape[3]
    return 2 * product, _registration.SAMPLE * sampled


def _backward_flops(op: tf.Operation) -> int:
    """Counts forward once for the kernel, product and samplings for others."""
    inputs, kernel, *fields = op.get_attr("wanted")
    product, sampling = _work(op)
    samplings = inputs + kernel + any(fields)
    return (kernel + (inputs or any(fields))) * product + samplings * sampling


_registration.flops("TfDeform>DeformableConv2D", lambda op: sum(_work(op)))
_registration.flops("TfDeform>DeformableConv2DGrad", _backward_flops)


def infer_output_shape(
    inputs: Sequence[int | None],
    kernel: Sequence[int | None],
    offset: Sequence[int | None] | None = None,
    mask: Sequence[int | None] | None = None,
    **arguments: Any,
) -> tuple[int | None, ...]:
    """Returns the output's shape according to the op's shape function.

    Args:
        inputs: Shape of `inputs`; None for an unknown dimension.
        kernel: Shape of `kernel`.
        offset: Shape of `offset`; None if unknown.
        mask: Shape of `mask`; None if unknown or if there is none.
        **arguments: The other arguments of `deformable_conv2d`.

    Raises:
        ValueError: The shapes do not fit.
    """
    if offset is None:
        offset = (None,) * 4
    return infer_shape(
        deformable_conv2d, inputs, kernel, offset, mask, **arguments
    )
