# SPDX-License-Identifier: Apache-2.0
"""Calls both pooling ops, with oracles and a comparison.

Both ops take inputs, ROIs and displacements (`trans` or `offset`). `Op` holds
the names by which each op is asked for the same.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import core
import numpy as np
import operands
import roi_reference
from compare import assert_close, assert_same_bits
from operands import coordinate_type
from reference import pair
from tolerances import POOLING

DTYPES = list(core.DTYPES)


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """Describes one of the two ops, and its names for their common features."""

    name: str  # in C and, behind "TfDeform>", in graphs
    function: str  # of tf_deform.ops and of the reference
    displacement: str  # the operand's name
    draw_call: Callable[[int], tuple]  # a random call from a seed
    make_bins: Callable  # the reference's bins
    counts: bool  # whether there is a second output, `count`
    margin: float  # pixels outside the map that are read
    # A ROI's last corner is its last pixel, rather than its edge.
    inclusive: int
    # A ROI of `roi(0, 0, 1, 1)` with a displacement of y + shift reads at y.
    shift: float
    one_sample: dict  # attributes: a bin has one sample, which moves freely
    samples: str  # the attribute for a bin's samples

    def __str__(self) -> str:
        return self.function.removeprefix("deformable_")

    def attributes(self, output_dim: int, /, **attributes: Any) -> dict:
        """Returns this op's attributes for attributes common to both ops."""
        others = ("group_size", "part_size", "sample_per_part", "trans_std")
        if self.counts:
            others = ("sampling_ratio", "gamma")
            attributes["output_dim"] = output_dim
        return {k: v for k, v in attributes.items() if k not in others}

    def roi(self, x1, y1, x2, y2, image=0) -> list[float]:
        """Returns the ROI between two corners; the last corner is exclusive."""
        end = self.inclusive
        return [image, x1, y1, x2 - end, y2 - end]

    def shapes(
        self, attributes: dict, batch: int, size: Any, num_rois: int, **sizes
    ) -> list[tuple]:
        """Returns the shapes of inputs, ROIs, displacements and output.

        `sizes` are `classes`, for PS-ROI pooling, or `channels`, for ROIAlign.
        """
        bins = pair(attributes["pooled_size"])
        rois = (num_rois, 5)
        if not self.counts:
            channels = sizes["channels"]
            return [
                (batch, *size, channels),
                rois,
                (num_rois, *bins, 2),
                (num_rois, *bins, channels),
            ]
        groups = pair(attributes.get("group_size") or bins)
        parts = pair(attributes.get("part_size") or bins)
        output_dim = attributes["output_dim"]
        return [
            (batch, *size, output_dim * groups[0] * groups[1]),
            rois,
            (num_rois, *parts, 2 * sizes.get("classes", 1)),
            (num_rois, *bins, output_dim),
        ]

    def draw(
        self,
        rng: np.random.Generator,
        attributes: dict,
        *,
        batch: int = 2,
        size: tuple[int, int],
        num_rois: int,
        kinds: tuple[str, ...] = operands.ROI_KINDS,
        uniform: bool = False,
        **sizes: int,
    ) -> tuple[np.ndarray, ...]:
        """Draws inputs, ROIs, displacements and the output's gradient."""
        inputs, _, displacement, output = self.shapes(
            attributes, batch, size, num_rois, **sizes
        )
        scale = attributes["spatial_scale"]
        return (
            rng.normal(size=inputs),
            operands.draw_rois(rng, batch, size, scale, num_rois, kinds),
            rng.uniform(-1, 1, displacement)
            if uniform
            else rng.normal(size=displacement),
            rng.normal(size=output),
        )

    def draw_differentiable(
        self, rng: np.random.Generator, attributes: dict, **draw: Any
    ) -> tuple[np.ndarray, ...]:
        """Draws operands; displacements keep samples off their kinks."""
        drawn = self.draw(rng, attributes, uniform=True, **draw)
        operands.move_off_kinks(
            rng, lambda: self.make_bins(*drawn[:3], **attributes), drawn[2]
        )
        return drawn

    def reference(
        self, inputs, rois, displacement=None, **attributes: Any
    ) -> dict[str, np.ndarray]:
        """Returns the outputs by name, in float64."""
        function = getattr(roi_reference, self.function)
        if not self.counts:
            output = function(inputs, rois, displacement, **attributes)
            return {"output": output}
        attributes["return_count"] = True
        output, count = function(inputs, rois, displacement, **attributes)
        return {"output": output, "count": count}

    def reference_gradients(self, *operands, **attributes: Any) -> dict:
        """Returns the gradients by name, in float64.

        None for an operand without gradient.
        """
        function = getattr(roi_reference, f"{self.function}_grad")
        return function(*operands, **attributes)._asdict()

    def expected(self, exact: Iterable, attributes: dict) -> dict:
        """Returns outputs and gradients by name, in float64."""
        return {
            **self.reference(*exact[:3], **attributes),
            **self.reference_gradients(*exact, **attributes),
        }


PSROI_POOL = Op(
    name="DeformablePSROIPool",
    function="deformable_psroi_pool",
    displacement="trans",
    draw_call=operands.draw_psroi_pool_call,
    make_bins=roi_reference.psroi_bins,
    counts=True,
    margin=0.5,
    inclusive=1,
    shift=0.5,
    one_sample=dict(
        spatial_scale=1.0, pooled_size=1, sample_per_part=1, trans_std=1.0
    ),
    samples="sample_per_part",
)
ROI_ALIGN = Op(
    name="DeformableROIAlign",
    function="deformable_roi_align",
    displacement="offset",
    draw_call=operands.draw_roi_align_call,
    make_bins=roi_reference.roi_align_bins,
    counts=False,
    margin=1.0,
    inclusive=0,
    shift=0.0,
    one_sample=dict(
        spatial_scale=1.0, pooled_size=1, sampling_ratio=1, gamma=1.0
    ),
    samples="sampling_ratio",
)
OPS = [PSROI_POOL, ROI_ALIGN]


class Runner:
    """Calls an op's functions in the core, on a device."""

    def __init__(self, op: Op, on: core.Cpu | None = None):
        self.op, self.on = op, on or core.Cpu()

    def forward(self, *operands, **options):
        return core.run_forward(self.op.name, *operands, on=self.on, **options)

    def backward(self, *operands, **options) -> dict[str, np.ndarray]:
        return core.run_backward(self.op.name, *operands, on=self.on, **options)

    def every(self) -> Iterator["Runner"]:
        """Yields a runner for every instruction set, if this runs on a CPU."""
        cpus = core.cpus() if self.on.name == "Cpu" else [self.on]
        return (Runner(self.op, on) for on in cpus)


def results(runner: Runner, exact: Iterable, **options: Any) -> dict:
    """Returns outputs and gradients by name, for operands and a gradient."""
    *given, output_grad = exact
    if runner.op.counts:
        output, count = runner.forward(*given, return_count=True, **options)
        outputs = {"output": output, "count": count}
    else:
        outputs = {"output": runner.forward(*given, **options)}
    return {**outputs, **runner.backward(*given, output_grad, **options)}


def assert_results_close(
    received: dict, expected: dict, dtype: str, case: object = ""
) -> None:
    """Compares results in `dtype` with the reference, each by its tolerance.

    Gradients of displacements are in the type of coordinates, and counts are
    exact.
    """
    for name, array in received.items():
        kind = coordinate_type(dtype) if name == "displacement" else dtype
        assert_close(
            array,
            expected[name],
            0 if name == "count" else POOLING[kind],
            case=case,
            name=name,
        )


def assert_zero(received: dict) -> None:
    for name, array in received.items():
        assert (array == 0).all(), name


def check(
    runner: Runner,
    operands: Iterable,
    attributes: dict,
    dtype: str,
    threads: tuple[int, ...] = (),
) -> None:
    """Compares outputs and gradients with the reference.

    Compares results of several `threads` with those of one by their bits.
    """
    exact = core.rounded(operands, dtype)
    expected = runner.op.expected(exact, attributes)
    for one in runner.every():
        case = f"{one.on}, {dtype}, {attributes}"
        received = results(one, exact, dtype=dtype, **attributes)
        assert_results_close(received, expected, dtype, case)
        for number in threads:
            check_threads(one, exact, received, number, dtype, attributes)


def check_threads(runner, exact, expected, threads, dtype, attributes) -> None:
    """Compares results of several threads with those expected, by bits."""
    received = results(
        runner, exact, dtype=dtype, threads=threads, **attributes
    )
    case = f"{runner.on}, {threads} threads, {dtype}, {attributes}"
    assert_same_bits(received, expected, case)


def check_alone(runner: Runner, exact: Iterable, **options: Any) -> None:
    """Compares each gradient alone with the same of all results, by bits."""
    for one in runner.every():
        together = results(one, exact, **options)
        for name in ("inputs", "displacement"):
            alone = one.backward(*exact, wanted=(name,), **options)
            case = f"{name} alone, {one.on}"
            assert_same_bits(alone, {name: together[name]}, case)
        assert one.backward(*exact, wanted=(), **options) == {}
