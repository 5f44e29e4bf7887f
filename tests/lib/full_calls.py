# SPDX-License-Identifier: Apache-2.0
"""Lists one call of each op that uses every feature; many tests vary it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import operands
import pooling
import tensorflow as tf
from operands import Conv2DCase, numpy_type

from tf_deform import ops

COORDINATES = ("offset", "mask", "rois", "trans")


@dataclasses.dataclass(frozen=True, eq=False)
class FullCall:
    """Holds a function of `tf_deform.ops`, its options, and random operands."""

    op: str  # its name in graphs, behind "TfDeform>"
    function: Callable
    options: dict
    # Draws operands by name, and the output's gradient, for a type and a size.
    draw_operands: Callable[[str, int], tuple[dict, np.ndarray]]

    def __str__(self) -> str:
        return self.function.__name__.removeprefix("deformable_")

    def draw(self, dtype: str = "float32", larger: int = 1) -> tuple:
        """Returns operands by name, as the op takes them, and a gradient."""
        drawn, output_grad = self.draw_operands(dtype, larger)
        xy = numpy_type(operands.coordinate_type(dtype))
        return {
            name: value.astype(xy if name in COORDINATES else numpy_type(dtype))
            for name, value in drawn.items()
        }, output_grad.astype(numpy_type(dtype))

    @property
    def differentiable(self) -> list[str]:
        """Returns the names of operands that have gradients, in order."""
        return [name for name in self.draw()[0] if name != "rois"]

    def results(
        self, given: dict, output_grad: Any, **changes: Any
    ) -> tuple[Any, dict]:
        """Returns all outputs, and the gradients that exist, by name."""
        options = {**self.options, **changes}
        if self.op == "DeformablePSROIPool":
            options.setdefault("return_count", True)
        outputs, gradients = operands.forward_and_gradients(
            self.function, given, output_grad, **options
        )
        assert gradients.pop("rois", None) is None
        return outputs, gradients

    def subsets(self) -> Iterator[tuple[str, ...]]:
        """Yields all choices of gradients, from none to all."""
        names = self.differentiable
        for count in range(len(names) + 1):
            yield from itertools.combinations(names, count)


CONV2D_CASE = Conv2DCase(
    size=(9, 8),
    channels=12,
    groups=3,
    filters=6,
    offset_groups=2,
    strides=(2, 1),
    dilation_rate=(1, 2),
    padding=((1, 2), (3, 0)),
)


def _draw_conv2d(dtype: str, larger: int) -> tuple[dict, np.ndarray]:
    case = dataclasses.replace(CONV2D_CASE, batch=2 * larger)
    names = ("inputs", "kernel", "offset", "mask")
    return dict(zip(names, case.operands(dtype), strict=True)), (
        case.output_grad(dtype)
    )


def _pooling_call(op: pooling.Op, function: Callable, **more) -> FullCall:
    options = op.attributes(
        6,
        spatial_scale=0.25,
        pooled_size=(3, 4),
        group_size=(3, 2),
        part_size=(5, 2),
        sample_per_part=2,
        trans_std=0.1,
        sampling_ratio=0,
        gamma=0.2,
    )

    def draw(dtype: str, larger: int) -> tuple[dict, np.ndarray]:
        inputs, rois, displacement, output_grad = op.draw(
            np.random.default_rng(0),
            options,
            size=(8, 9),
            num_rois=7 * larger,
            channels=6,
            classes=3,
        )
        given = {"inputs": inputs, "rois": rois, op.displacement: displacement}
        return given, output_grad

    return FullCall(op.name, function, options, draw)


CONV2D = FullCall(
    "DeformableConv2D",
    ops.deformable_conv2d,
    CONV2D_CASE.options,
    _draw_conv2d,
)
PSROI_POOL = _pooling_call(pooling.PSROI_POOL, ops.deformable_psroi_pool)
ROI_ALIGN = _pooling_call(pooling.ROI_ALIGN, ops.deformable_roi_align)
POOLING = {pooling.PSROI_POOL: PSROI_POOL, pooling.ROI_ALIGN: ROI_ALIGN}
OPS = [CONV2D, PSROI_POOL, ROI_ALIGN]

# Functions that return the part of a tensor's shape that a graph knows.
KNOWN = {
    "shapes": lambda x: x.shape,
    "channels": lambda x: (*[None] * (x.ndim - 1), x.shape[-1]),
    "rank": lambda x: (None,) * x.ndim,
    "nothing": lambda x: None,
}


def signature(call: FullCall, known: str, dtype: str) -> list[tf.TensorSpec]:
    """Returns specifications of operands and gradient, in order."""
    given, output_grad = call.draw(dtype)
    return [
        tf.TensorSpec(KNOWN[known](x), x.dtype)
        for x in (*given.values(), output_grad)
    ]
