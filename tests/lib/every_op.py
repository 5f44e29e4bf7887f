# SPDX-License-Identifier: Apache-2.0
"""Lists the ops, and how calls of each are drawn; many tests run over `OPS`.

The full call of an op uses every feature.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import operands
import pooling
import pytest
import reference
import tensorflow as tf
from compare import EXACT, Tolerance, assert_close
from operands import Conv2DCase, coordinate_type, numpy_type
from tolerances import FORWARD, GRADIENT
from tolerances import POOLING as _POOLING

from tf_deform import ops

COORDINATES = ("offset", "mask", "rois", "trans")

# Operands by name, the output's gradient, and options.
Call = tuple[dict[str, Any], np.ndarray, dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """Describes an op to the tests of all ops."""

    name: str  # in graphs, behind "TfDeform>"
    function: Callable
    make: Callable[..., Call]  # draws a call in float64 from settings
    make_random: Callable[[int], Call]  # draws one from a seed
    reference: Callable[..., tuple[list, dict]]  # outputs, gradients by name
    tolerance: Callable[[str, str], Tolerance]  # for a result's name and type
    full: dict  # settings of a call that uses every feature
    larger: str  # the setting that makes this call larger
    small: dict  # settings of small operands, with samples off all kinks
    # Changes of `small`, with all kinds of slopes; all operands in the first.
    variants: dict[str, dict]
    large: dict  # settings of a call for several threads
    every_output: dict = dataclasses.field(default_factory=dict)  # options
    form: str = ""  # of several calls of the same op

    def __str__(self) -> str:
        return self.function.__name__.removeprefix("deformable_") + self.form

    @functools.cached_property
    def options(self) -> dict:
        """Returns the options of the full call."""
        return self.make(**self.full)[2]

    @functools.cached_property
    def differentiable(self) -> list[str]:
        """Returns the names of operands that have gradients, in order."""
        return [name for name in self.make(**self.full)[0] if name != "rois"]

    def draw(self, dtype: str = "float32", larger: int = 1) -> tuple:
        """Returns the operands of the full call by name, and a gradient."""
        size = {self.larger: larger * self.full[self.larger]}
        return typed(self.make(**{**self.full, **size}), dtype)[:2]

    def draw_small(self, variant: str) -> Call:
        """Returns a call in float64 that differences can be compared with."""
        return self.make(**{**self.small, **self.variants[variant]})

    def draw_random(self, seed: int, dtype: str) -> Call:
        return typed(self.make_random(seed), dtype)

    def results(
        self,
        given: dict,
        output_grad: Any = None,
        options: dict | None = None,
        **changes: Any,
    ) -> tuple[list, dict]:
        """Returns all outputs, and the gradients that exist, by name."""
        outputs, gradients = operands.forward_and_gradients(
            self.function,
            given,
            output_grad,
            **self.every_output,
            **{**(self.options if options is None else options), **changes},
        )
        assert gradients.pop("rois", None) is None
        return tf.nest.flatten(outputs), gradients

    def check(self, call: Call, dtype: str, case: Any = None) -> None:
        """Compares all results, and their types, with the reference's."""
        given, _, options = call
        (outputs, gradients), (wanted, right) = (
            self.results(*call),
            self.reference(*call),
        )
        names = ("output", "count")[: len(outputs)]
        types = {"output": dtype, "count": "float32"}
        received = {**dict(zip(names, outputs, strict=True)), **gradients}
        expected = {**dict(zip(names, wanted, strict=True)), **right}
        for name, array in received.items():
            is_gradient = name not in names
            assert_close(
                array,
                expected[name],
                self.tolerance(name, dtype),
                case=options if case is None else case,
                name=f"gradient of {name}" if is_gradient else name,
                dtype=given[name].dtype if is_gradient else types[name],
            )


def typed(call: Call, dtype: str) -> Call:
    """Returns the operands and the gradient in the types of a call."""
    given, output_grad, options = call
    xy, value = numpy_type(coordinate_type(dtype)), numpy_type(dtype)
    cast = {
        name: None
        if x is None
        else np.asarray(x).astype(xy if name in COORDINATES else value)
        for name, x in given.items()
    }
    return cast, np.asarray(output_grad).astype(value), options


# Convolution.


def conv2d_call(case: Conv2DCase, dtype: str = "float64") -> Call:
    names = ("inputs", "kernel", "offset", "mask")
    given = dict(zip(names, case.operands(dtype), strict=False))
    return given, case.output_grad(dtype), case.options


def broken_fields(
    modulation: str, boundary: str, dtype: str, factors: bool
) -> Call:
    """Draws a call on fields; some have a NaN or an infinity in one number.

    Each displacement, or each number of a factor, is NaN in one pixel, and
    infinite in two others.
    """
    case = Conv2DCase(
        size=(7, 6),
        kernel_size=(2, 1),
        groups=2,
        offset_groups=2,
        boundary=boundary,
        modulation=modulation,
    )
    call = given, *_ = conv2d_call(case, dtype)
    fields = given["offset"].reshape(np.prod(case.output_shape[:3]), -1)
    columns = range(8, 12) if factors else range(8)
    for index, column in enumerate(columns):
        fields[5 * index, column] = np.nan
        fields[5 * index + 1, column] = np.inf
        fields[5 * index + 3, column] = -np.inf
    return call


def _conv2d_reference(
    given: dict, output_grad: np.ndarray, options: dict
) -> tuple[list, dict]:
    output, gradients = reference.output_and_gradients(
        **{"mask": None, **given}, output_grad=output_grad, **options
    )
    return [output], gradients._asdict()


CONV2D = Op(
    name="DeformableConv2D",
    function=ops.deformable_conv2d,
    make=lambda **settings: conv2d_call(Conv2DCase(**settings)),
    make_random=lambda seed: conv2d_call(operands.draw_conv2d_case(seed)),
    reference=_conv2d_reference,
    tolerance=lambda name, dtype: (FORWARD if name == "output" else GRADIENT)[
        dtype
    ],
    full=dict(
        batch=2,
        size=(9, 8),
        channels=12,
        groups=3,
        filters=6,
        offset_groups=2,
        strides=(2, 1),
        dilation_rate=(1, 2),
        padding=((1, 2), (3, 0)),
    ),
    larger="batch",
    small=dict(
        size=(4, 3),
        channels=4,
        filters=2,
        kernel_size=(2, 1),
        groups=2,
        offset_groups=2,
    ),
    variants={
        "zeros": {},
        "clamp": dict(boundary="clamp"),
        "no mask": dict(has_mask=False),
        "clamp, no mask": dict(has_mask=False, boundary="clamp", reach=1),
        "strides": dict(padding=((1, 0), (2, 1)), strides=(2, 1), groups=1),
        "dilation": dict(channels=6, offset_groups=3, dilation_rate=(1, 2)),
        "no factors": dict(modulation="none"),
        "sigmoid": dict(modulation="sigmoid", boundary="clamp", reach=1),
        "2sigmoid": dict(modulation="2sigmoid", offset_groups=4),
    },
    large=dict(
        size=(31, 29),
        channels=24,
        groups=2,
        filters=40,
        kernel_size=(3, 3),
        offset_groups=3,
    ),
)
# The same op on what a layer's branch predicts.
CONV2D_FIELDS = dataclasses.replace(
    CONV2D,
    form=", fields",
    full={**CONV2D.full, "modulation": "2sigmoid"},
    large={**CONV2D.large, "modulation": "2sigmoid"},
)


# Pooling.

_DRAW = ("batch", "size", "num_rois", "kinds", "channels", "classes")


def _make_pooling(
    op: pooling.Op,
    *,
    output_dim: int,
    seed: int = 0,
    off_kinks: bool = False,
    displaced: bool = True,
    **settings: Any,
) -> Call:
    sizes = {name: settings.pop(name) for name in _DRAW if name in settings}
    options = op.attributes(output_dim, **settings)
    draw = op.draw_differentiable if off_kinks else op.draw
    rng = np.random.default_rng(seed)
    inputs, rois, displacement, output_grad = draw(rng, options, **sizes)
    given = {"inputs": inputs, "rois": rois}
    given[op.displacement] = displacement if displaced else None
    return given, output_grad, options


def _pooling(
    op: pooling.Op, function: Callable, kinds: tuple[str, ...], **more: Any
) -> Op:
    names = ("inputs", "rois", op.displacement)

    def make_random(seed: int) -> Call:
        (*given, output_grad), options = op.draw_call(seed)
        return dict(zip(names, given, strict=True)), output_grad, options

    def reference(given: dict, output_grad: Any, options: dict) -> tuple:
        operands = given.values()
        gradients = op.reference_gradients(*operands, output_grad, **options)
        gradients[op.displacement] = gradients.pop("displacement")
        return [*op.reference(*operands, **options).values()], gradients

    def tolerance(name: str, dtype: str) -> Tolerance:
        if name == "count":
            return EXACT
        return _POOLING[
            coordinate_type(dtype) if name in COORDINATES else dtype
        ]

    return Op(
        name=op.name,
        function=function,
        make=functools.partial(_make_pooling, op),
        make_random=make_random,
        reference=reference,
        tolerance=tolerance,
        full=dict(
            size=(8, 9),
            num_rois=7,
            channels=6,
            classes=3,
            output_dim=6,
            spatial_scale=0.25,
            pooled_size=(3, 4),
            group_size=(3, 2),
            part_size=(5, 2),
            sample_per_part=2,
            trans_std=0.1,
            sampling_ratio=0,
            gamma=0.2,
        ),
        larger="num_rois",
        small=dict(
            off_kinks=True,
            size=(4, 3),
            num_rois=len(kinds),
            kinds=kinds,
            channels=3,
            classes=1,
            output_dim=6,
            spatial_scale=0.5,
            pooled_size=(2, 1),
            group_size=(1, 2),
            part_size=(2, 2),
            sample_per_part=2,
            trans_std=0.2,
            gamma=0.2,
        ),
        large=dict(
            size=(19, 17),
            num_rois=200,
            channels=12,
            classes=3,
            output_dim=12,
            spatial_scale=1 / 16,
            pooled_size=(5, 4),
            group_size=3,
        ),
        **more,
    )


PSROI_POOL = _pooling(
    pooling.PSROI_POOL,
    ops.deformable_psroi_pool,
    variants={
        "2 classes": dict(classes=2, seed=2),
        "a group for each bin": dict(group_size=None),
        "3 classes, one group": dict(classes=3, seed=3, group_size=1),
        "not displaced": dict(displaced=False),
    },
    kinds=("inside", "across the edge", "padding", "reversed"),
    every_output={"return_count": True},
)
ROI_ALIGN = _pooling(
    pooling.ROI_ALIGN,
    ops.deformable_roi_align,
    variants={
        f"{n} samples, displaced: {displaced}": dict(
            sampling_ratio=n, displaced=displaced, seed=n
        )
        for displaced in (True, False)
        for n in (2, 0, 1, 3)
    },
    kinds=("inside", "across the edge", "padding"),
)
POOLING = {pooling.PSROI_POOL: PSROI_POOL, pooling.ROI_ALIGN: ROI_ALIGN}
OPS = [CONV2D, PSROI_POOL, ROI_ALIGN]
every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_variant = pytest.mark.parametrize(
    ("op", "variant"),
    [(op, variant) for op in OPS for variant in op.variants],
    ids=str,
)

# Functions that return the part of a tensor's shape that a graph knows.
KNOWN = {
    "shapes": lambda x: x.shape,
    "channels": lambda x: (*[None] * (x.ndim - 1), x.shape[-1]),
    "rank": lambda x: (None,) * x.ndim,
    "nothing": lambda x: None,
}
