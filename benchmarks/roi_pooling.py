# SPDX-License-Identifier: Apache-2.0
"""Defines shapes, operands and contenders of ROI pooling."""

import dataclasses
import re
from typing import Any

import numpy as np
from contenders import (
    Contender,
    OnnxRuntime,
    OpenVino,
    Suite,
    TensorFlow,
    Unsupported,
    aligned,
    numpy_dtype,
)

STRIDE = 16  # image pixels per map pixel
# Sets `trans_std` and `gamma`. It is a power of two: see `Operands.random`.
REACH = 0.125

_NOTATION = re.compile(
    r"(?P<operator>psroi|align):"
    r"(?P<batch>\d+)x(?P<height>\d+)x(?P<width>\d+)x(?P<channels>\d+)"
    r"->(?P<num_rois>\d+)x(?P<pooled>\d+)x(?P=pooled)x(?P<output_dim>\d+)"
    r"(?P<suffixes>(?:[,: ]+[cs]\d+)*)"
)
_SUFFIXES = {"c": "num_classes", "s": "samples"}
_DEFAULT_SAMPLES = {"psroi": 4, "align": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes a shape to run: square grids of `pooled` x `pooled` bins."""

    operator: str  # "psroi" or "align"
    batch: int
    height: int
    width: int
    channels: int
    num_rois: int
    pooled: int
    output_dim: int
    num_classes: int  # classes of displacements; 0: no displacements
    samples: int  # samples of a bin along each axis
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str, dtype: str, with_mask: bool) -> "Case":
        """Reads `psroi:1x38x63x1029->300x7x7x21,c1,s4`: map -> output.

        The suffixes are optional: `c` displacement classes (default: no
        displacements), `s` samples along each axis of a bin (default: 4 for
        psroi, 2 for align). Equal numbers of input and output channels mean one
        group. There is no mask.

        Raises:
            ValueError: if `text` is not in that notation, or if its numbers do
                not fit together.
        """
        del with_mask
        match = _NOTATION.fullmatch(text.strip())
        if not match:
            raise ValueError(
                "Expected a shape such as psroi:1x38x63x1029->300x7x7x21,c1 "
                "or align:1x50x64x256->512x7x7x256 (with as many bins along "
                f"both axes). Received: {text!r}"
            )
        fields = match.groupdict()
        operator = fields.pop("operator")
        sizes = {"num_classes": 0, "samples": _DEFAULT_SAMPLES[operator]}
        sizes |= {
            _SUFFIXES[key]: int(number)
            for key, number in re.findall(
                r"([a-z]+)(\d+)", fields.pop("suffixes")
            )
        }
        sizes |= {key: int(number) for key, number in fields.items()}
        if 0 in [size for key, size in sizes.items() if key != "num_classes"]:
            raise ValueError(f"Expected sizes above 0. Received: {text!r}")
        case = cls(operator, **sizes, dtype=dtype)
        groups = {1} if operator == "align" else {1, case.pooled**2}
        if case.channels not in {case.output_dim * group for group in groups}:
            raise ValueError(
                "Expected as many input as output channels or, for psroi, as "
                f"many for each bin. Received: {text!r}"
            )
        if case.num_classes and (
            case.output_dim % case.num_classes
            or (operator == "align" and case.num_classes > 1)
        ):
            raise ValueError(
                "Expected displacement classes to divide the output channels "
                f"and, for align, to be one. Received: {text!r}"
            )
        if case.samples & (case.samples - 1):
            raise ValueError(
                "Expected a power of two as the number of samples, so that "
                f"all coordinates are exact. Received: {text!r}"
            )
        if case.pooled > STRIDE * min(case.height, case.width):
            raise ValueError(
                "Expected a map that bins of a pixel fit into. "
                f"Received: {text!r}"
            )
        return case

    def __str__(self) -> str:
        suffixes = f",c{self.num_classes}" if self.num_classes else ""
        if self.samples != _DEFAULT_SAMPLES[self.operator]:
            suffixes += f",s{self.samples}"
        return (
            f"{self.operator}:"
            f"{self.batch}x{self.height}x{self.width}x{self.channels}"
            f"->{'x'.join(map(str, self.output_shape))}{suffixes}"
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Returns the output's shape, channels last."""
        return (self.num_rois, self.pooled, self.pooled, self.output_dim)

    @property
    def group(self) -> int:
        """Returns the cells of position-sensitive maps along each axis."""
        return 1 if self.channels == self.output_dim else self.pooled

    def tiny(self) -> "Case":
        """Returns the same pooling of a few boxes on a tiny map."""
        output_dim = 4 * max(self.num_classes, 1)
        return dataclasses.replace(
            self,
            batch=1,
            height=8,
            width=8,
            num_rois=4,
            output_dim=output_dim,
            channels=output_dim * self.group**2,
        )


@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds NumPy operands, channels last, as the functional ops take them."""

    inputs: np.ndarray
    rois: np.ndarray
    displacement: np.ndarray | None  # `trans` or `offset`
    cotangent: np.ndarray  # the gradient that arrives at the output

    @classmethod
    def random(cls, case: Case) -> "Operands":
        """Makes boxes of any size, anywhere in the image (fixed seed).

        Corners are whole image pixels, and the width and height of a bin are
        odd numbers of pixels. Displacements, normally distributed, are odd
        multiples of 1/32. So every coordinate is exact in float32, in whatever
        order a contender computes it. Displaced samples lie between two pixels,
        where the derivative is the same in every convention.
        """
        rng = np.random.default_rng(20)
        coordinate = "float64" if case.dtype == "float64" else "float32"

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        rois = np.empty((case.num_rois, 5))
        rois[:, 0] = rng.integers(case.batch, size=case.num_rois)
        for axis, size in ((1, case.width), (2, case.height)):
            size *= STRIDE
            most = size // case.pooled
            bins = 1 + 2 * rng.integers((most + 1) // 2, size=case.num_rois)
            extent = case.pooled * bins
            rois[:, axis] = rng.integers(size - extent + 1)
            rois[:, axis + 2] = rois[:, axis] + extent
        if case.operator == "psroi":
            rois[:, 3:] -= 1  # the last pixels belong to the box
        displacement = None
        if case.num_classes:
            places = (case.num_rois, case.pooled, case.pooled)
            displacement = normal(*places, 2 * case.num_classes)
            displacement = (np.floor(16 * displacement) + 0.5) / 16
            displacement = displacement.astype(coordinate)
        return cls(
            inputs=normal(
                case.batch, case.height, case.width, case.channels
            ).astype(numpy_dtype(case.dtype)),
            rois=rois.astype(coordinate),
            displacement=displacement,
            cotangent=normal(*case.output_shape).astype(
                numpy_dtype(case.dtype)
            ),
        )


class _TensorFlow(TensorFlow):
    constants = ("rois",)

    @classmethod
    def names(cls, case: Case) -> list[str]:
        names = ["inputs", "rois"]
        return [*names, "displacement"] if case.num_classes else names


class TfDeform(_TensorFlow):
    """Runs this package."""

    def backward(self) -> None:
        self._backward()[-1].numpy()

    def _call(self, inputs, rois, displacement=None):
        import tf_deform

        case = self._case
        if case.operator == "align":
            return tf_deform.ops.deformable_roi_align(
                inputs,
                rois,
                displacement,
                pooled_size=case.pooled,
                spatial_scale=1 / STRIDE,
                sampling_ratio=case.samples,
                gamma=REACH,
            )
        return tf_deform.ops.deformable_psroi_pool(
            inputs,
            rois,
            displacement,
            output_dim=case.output_dim,
            spatial_scale=1 / STRIDE,
            pooled_size=case.pooled,
            group_size=case.group,
            sample_per_part=case.samples,
            trans_std=REACH,
        )


class Gather(_TensorFlow):
    """Runs stock TensorFlow: one gather, one matrix product.

    It is the code that a user writes without a custom op; the gradient is
    TensorFlow's own. The samples of a bin lie on a grid, so rows, columns and
    their weights are computed along one axis at a time.
    """

    def _call(self, inputs, rois, displacement=None):
        import tensorflow as tf

        case = self._case
        bins, classes, group = case.pooled, case.num_classes or 1, case.group
        y, weight_y, count_y = self._along_axis(0, rois, displacement)
        x, weight_x, count_x = self._along_axis(1, rois, displacement)

        # A row of the table below is read at one position: it holds the
        # channels of one cell and one class.
        depth = case.output_dim // classes
        table = tf.reshape(
            inputs,
            (case.batch, case.height, case.width, classes, depth, group, group),
        )
        table = tf.transpose(table, (0, 1, 2, 5, 6, 3, 4))
        table = tf.reshape(table, (-1, depth))
        image = tf.reshape(tf.cast(rois[:, 0], tf.int32), (-1, 1, 1, 1, 1, 1))
        cell = np.arange(bins) * group // bins
        cell = (cell[:, None] * group + cell).reshape(bins, bins, 1, 1, 1)
        index = image * case.height + y[..., None]
        index = index * case.width + x[..., None, :]
        index = index * group**2 + cell.astype(np.int32)
        index = index * classes + np.arange(classes, dtype=np.int32).reshape(
            (classes, 1, 1)
        )

        counted = tf.maximum(count_y * count_x, 1)[..., None, None]
        weight = weight_y[..., None] * weight_x[..., None, :] / counted
        # The shape is (rois, bins, bins, classes, pixels of a bin); some axes
        # may be 1.
        places = (case.num_rois, bins, bins, classes, (2 * case.samples) ** 2)
        read = tf.gather(table, tf.reshape(index, places))
        weight = tf.cast(tf.reshape(weight, places), inputs.dtype)
        output = tf.matmul(weight[..., None, :], read)
        return tf.reshape(output, case.output_shape)

    def _along_axis(self, axis: int, rois, displacement) -> tuple:
        """Computes pixels and weights for the samples along y (0) or x (1).

        Returns:
            pixels: `(rois, bins, bins, classes, 2 * samples)`, two neighbours
                for each sample; an axis along which all are equal may be 1.
            weights: Of the same shape; 0 where a sample is not read.
            count: Number of averaged samples, without the last axis.
        """
        import tensorflow as tf

        case = self._case
        size = (case.height, case.width)[axis]
        first, last = rois[:, 2 - axis], rois[:, 4 - axis]
        if case.operator == "psroi":
            first, last = _half_away(first), _half_away(last) + 1
        start, extent = first / STRIDE - 0.5, (last - first) / STRIDE
        if case.operator == "psroi":
            extent = tf.maximum(extent, 0.1)
        start, extent = (
            tf.reshape(value, (-1, 1, 1, 1, 1)) for value in (start, extent)
        )
        # Computes steps in bins, from the start of the box: `psroi` samples at
        # the start of the parts of a bin, `align` in their middle.
        shift = 0.5 if case.operator == "align" else 0.0
        steps = np.arange(case.pooled)[:, None, None] + (
            (np.arange(case.samples) + shift) / case.samples
        )  # (bins, 1, samples)
        steps = np.expand_dims(steps, 2) if axis == 0 else steps
        position = start
        if displacement is not None:
            moved = tf.reshape(
                displacement, (*case.output_shape[:3], case.num_classes, 2)
            )[..., axis, None]
            position += moved * REACH * extent
        # Avoids `/`: TensorFlow turns the division by a constant into a product
        # with its reciprocal, which is rounded.
        bins = tf.math.divide_no_nan(extent, case.pooled)
        position += bins * tf.constant(steps, position.dtype)

        margin = 0.5 if case.operator == "psroi" else 1.0
        inside = (position >= -margin) & (position <= size - 1 + margin)
        inside = tf.cast(inside, position.dtype)
        position = tf.clip_by_value(position, 0, size - 1)
        low = tf.floor(position)
        fraction = position - low
        weights = tf.stack([1 - fraction, fraction], -1) * inside[..., None]
        low = tf.cast(low, tf.int32)
        pixels = tf.stack([low, tf.minimum(low + 1, size - 1)], -1)
        flat = (*position.shape[:-1], 2 * case.samples)
        if case.operator == "psroi":
            count = tf.reduce_sum(inside, -1)
        else:
            count = tf.constant(case.samples, position.dtype)
        return tf.reshape(pixels, flat), tf.reshape(weights, flat), count


def _half_away(value):
    """Rounds to the nearest integer, halves away from zero."""
    import tensorflow as tf

    return tf.sign(value) * tf.floor(tf.abs(value) + 0.5)


class _ChannelsFirst(Contender):
    """Runs an inference engine: NCHW, float32, forward alone.

    One class serves both operators, because a table has one row for each
    engine.
    """

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """Returns the operands in NCHW, displacements with x first."""
        if case.dtype != "float32":
            raise Unsupported(f"{case.dtype} (compared in float32 only)")
        arrays = {"inputs": operands.inputs.transpose(0, 3, 1, 2)}
        if case.operator == "align":
            if case.num_classes:
                raise Unsupported("ROIAlign with displacements")
            arrays["rois"] = operands.rois[:, 1:]
            arrays["batch_indices"] = operands.rois[:, 0].astype(np.int64)
        else:
            arrays["rois"] = operands.rois
            if case.num_classes:
                moved = operands.displacement
                moved = moved.reshape(*moved.shape[:3], -1, 2)[..., ::-1]
                moved = moved.reshape(operands.displacement.shape)
                arrays["displacement"] = moved.transpose(0, 3, 1, 2)
        return {name: aligned(array) for name, array in arrays.items()}


class RoiAlign(_ChannelsFirst, OnnxRuntime):
    """Runs ONNX Runtime's RoiAlign, opset 16."""

    opset = 16

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """Returns operands of RoiAlign, the only operator that ONNX has."""
        if case.operator != "align":
            raise Unsupported("position-sensitive pooling")
        return super().prepare(case, operands)

    def _node(self, case: Case) -> Any:
        from onnx import helper

        return helper.make_node(
            "RoiAlign",
            ["inputs", "rois", "batch_indices"],
            ["output"],
            mode="avg",
            output_height=case.pooled,
            output_width=case.pooled,
            sampling_ratio=case.samples,
            spatial_scale=1 / STRIDE,
            coordinate_transformation_mode="half_pixel",
        )


class OpenVinoPooling(_ChannelsFirst, OpenVino):
    """Runs OpenVINO's DeformablePSROIPooling (opset 1), ROIAlign (9)."""

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """Returns the operands, if the bins are the cells of the maps."""
        if case.operator == "psroi" and case.group != case.pooled:
            raise Unsupported("other bins than the cells of the maps")
        return super().prepare(case, operands)

    def _node(
        self, case: Case, inputs, rois, batch_indices=None, displacement=None
    ) -> Any:
        from openvino import opset1, opset9

        if case.operator == "align":
            return opset9.roi_align(
                inputs,
                rois,
                batch_indices,
                pooled_h=case.pooled,
                pooled_w=case.pooled,
                sampling_ratio=case.samples,
                spatial_scale=1 / STRIDE,
                mode="avg",
                aligned_mode="half_pixel_for_nn",
            )
        return opset1.deformable_psroi_pooling(
            inputs,
            rois,
            output_dim=case.output_dim,
            spatial_scale=1 / STRIDE,
            group_size=case.pooled,
            mode="bilinear_deformable",
            spatial_bins_x=case.samples,
            spatial_bins_y=case.samples,
            trans_std=REACH,
            part_size=case.pooled,
            offsets=displacement,
        )


SUITE = Suite(
    title="ROI pooling",
    case=Case,
    operands=Operands,
    contenders={
        "tf_deform": (TfDeform, ("tensorflow", "tf_deform")),
        "gather": (Gather, ("tensorflow",)),
        "onnxruntime": (RoiAlign, ("onnx", "onnxruntime")),
        "openvino": (OpenVinoPooling, ("openvino",)),
    },
    shapes=(
        "psroi:1x38x63x1029->300x7x7x21",
        "psroi:1x38x63x1029->300x7x7x21,c1",
        "psroi:1x38x63x1029->300x7x7x21,c21",
        "psroi:1x50x64x256->300x7x7x256,c1",
        "align:1x50x64x256->512x7x7x256",
        "align:1x50x64x256->512x7x7x256,c1",
    ),
    quick_shapes=(
        "psroi:2x11x13x54->9x3x3x6,c2,s2",
        "psroi:1x9x8x5->6x4x4x5",
        "align:2x11x13x6->9x3x3x6",
        "align:1x9x8x5->6x4x4x5,c1,s1",
    ),
    ratio_to="tf_deform",
    peers=(("gather",), ("onnxruntime",), ("openvino",)),
    # Repeats are few, as stock TensorFlow takes seconds here.
    repeats=7,
    memory_repeats=1,
    memory_at_all_threads=False,
)
