# SPDX-License-Identifier: Apache-2.0
"""Draws random operands of the ops, and computes gradients of all operands.

The same seed draws the same numbers. TensorFlow is imported only by functions
that need it: the tests of the core run without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import reference
from reference import Pair, pair

DTYPES = ("float64", "float32", "float16", "bfloat16")
BOUNDARIES = ("zeros", "clamp")
FACTORS = ("sigmoid", "2sigmoid")  # made by the convolution, of its offset


def numpy_type(name: str) -> type:
    """Returns the NumPy type with this name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name).type


def coordinate_type(dtype: str) -> str:
    """Returns the type of coordinates beside values of type `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Draws from the normal distribution; for uint8 draws all 256 numbers."""
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, shape, dtype)
    return rng.normal(size=shape).astype(numpy_type(dtype))


def forward_and_gradients(
    function: Callable,
    operands: dict[str, Any],
    output_grad: Any = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns all outputs of `function`, and the gradients of its operands.

    Operands are passed by name; operands that are None have no gradient. With
    several outputs the gradients are those of the first output.
    """
    import tensorflow as tf

    tensors = {
        name: tf.convert_to_tensor(value)
        for name, value in operands.items()
        if value is not None
    }
    with tf.GradientTape() as tape:
        tape.watch(list(tensors.values()))
        outputs = function(**{**operands, **tensors}, **options)
    first = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
    return outputs, tape.gradient(first, tensors, output_grad)


# Convolution.


@dataclasses.dataclass(frozen=True)
class Conv2DCase:
    """Describes one configuration, and draws random operands that fit it."""

    batch: int = 2
    size: tuple[int, int] = (7, 5)
    channels: int = 6
    filters: int = 4
    kernel_size: tuple[int, int] = (3, 2)
    groups: int = 1
    offset_groups: int = 1
    strides: int | tuple[int, int] = 1
    padding: reference.Padding = "same"
    dilation_rate: int | tuple[int, int] = 1
    boundary: str = "zeros"
    modulation: str = "mask"
    has_mask: bool = True  # counts for `modulation` "mask" alone
    reach: int = 3  # Offsets are between -reach and reach.
    seed: int = 0

    @property
    def options(self) -> dict:
        """Returns the keyword arguments of the op, and of the reference."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "offset_groups": self.offset_groups,
            "boundary": self.boundary,
            "modulation": self.modulation,
        }

    @property
    def output_shape(self) -> tuple[int, ...]:
        out = reference.output_size(
            self.padding,
            self.size,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
        )
        return (self.batch, *out, self.filters)

    def operands(self, dtype: str = "float32") -> list[np.ndarray]:
        """Returns `[inputs, kernel, offset]` and, if there is one, `mask`.

        Offsets keep a tenth of a pixel away from integers, where the derivative
        jumps. With a modulation that makes factors, the mask's numbers stand
        behind them.
        """
        rng = np.random.default_rng(self.seed)
        value_type = numpy_type(dtype)
        xy_type = coordinate_type(dtype)
        taps = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        pixels = self.output_shape[:3]
        inputs = rng.normal(size=(self.batch, *self.size, self.channels))
        kernel = rng.normal(
            size=(
                *self.kernel_size,
                self.channels // self.groups,
                self.filters,
            )
        )
        offset = rng.integers(-self.reach, self.reach, (*pixels, 2 * taps))
        offset = offset + rng.uniform(0.1, 0.9, offset.shape)
        mask = rng.normal(size=(*pixels, taps))
        if self.modulation in FACTORS:
            offset = np.concatenate([offset, mask], -1)
        has_mask = self.has_mask and self.modulation == "mask"
        return [
            inputs.astype(value_type),
            kernel.astype(value_type),
            offset.astype(xy_type),
            mask.astype(xy_type),
        ][: 4 if has_mask else 3]

    def output_grad(self, dtype: str = "float32") -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        grad = rng.normal(size=self.output_shape)
        return grad.astype(numpy_type(dtype))


# Every second case has the operand `mask`, or none.
_MODULATIONS = ("mask", "sigmoid", "mask", "none", "2sigmoid", "mask")


def draw_conv2d_case(seed: int, **fixed: object) -> Conv2DCase:
    """Draws a configuration; the same seed gives the same one."""
    rng = np.random.default_rng(seed)

    def draw_pair(low: int, high: int) -> tuple[int, int]:
        return tuple(int(v) for v in rng.integers(low, high, 2))

    groups, offset_groups = (int(v) for v in rng.choice([1, 2, 3, 4], 2))
    paddings = ["valid", "same", 2, (3, 1), ((0, 3), (2, 1))]
    draw = {
        "batch": int(rng.integers(1, 4)),
        "size": draw_pair(5, 14),
        "channels": 12 * int(rng.integers(1, 4)),
        "filters": groups * int(rng.integers(1, 8)),
        "kernel_size": draw_pair(1, 4),
        "groups": groups,
        "offset_groups": offset_groups,
        "strides": draw_pair(1, 4),
        "padding": paddings[rng.integers(len(paddings))],
        "dilation_rate": draw_pair(1, 3),
        "boundary": BOUNDARIES[rng.integers(2)],
        "has_mask": bool(rng.integers(4)),
        "modulation": _MODULATIONS[seed % len(_MODULATIONS)],
        "seed": seed,
    }
    return Conv2DCase(**{**draw, **fixed})


def conv2d_places(size: int, dtype: str) -> np.ndarray:
    """Returns every kind of place on an axis of `size` pixels."""
    dtype = np.dtype(dtype).type
    marks = [dtype(v) for v in (-1, 0, 1, size - 1, size)]
    marks += [np.nextafter(v, dtype(-np.inf)) for v in marks]
    marks += [np.nextafter(v, dtype(np.inf)) for v in marks[:5]]
    marks += [dtype(v) for v in (-2.5, -0.25, 0.5, size - 0.75, size + 7.5)]
    marks += [dtype(v) for v in (np.nan, np.inf, -np.inf, 1e30, -1e30, 2**31)]
    return np.array([*marks, np.finfo(dtype).max], dtype)


def one_sample_per_image(
    coordinates: np.ndarray, size: tuple[int, int], channels: int, boundary: str
) -> tuple[dict, np.ndarray, dict]:
    """Draws operands of one tap and one output pixel: `offset` is `(y, x)`."""
    rng = np.random.default_rng(0)
    batch, dtype = len(coordinates), coordinates.dtype
    image = rng.normal(size=(1, *size, channels))
    given = {
        "inputs": np.repeat(image, batch, axis=0).astype(dtype),
        "kernel": rng.normal(size=(1, 1, channels, 3)).astype(dtype),
        "offset": coordinates.reshape(batch, 1, 1, 2),
        "mask": rng.normal(size=(batch, 1, 1, 1)).astype(dtype),
    }
    output_grad = rng.normal(size=(batch, 1, 1, 3)).astype(dtype)
    return given, output_grad, {"strides": size, "boundary": boundary}


# ROI pooling.

ROI_KINDS = (
    "inside",
    "across the edge",
    "outside",
    "reversed",
    "many maps wide",
    "halves",
    "padding",
    "not finite",
)


def draw_rois(
    rng: np.random.Generator,
    batch: int,
    size: Pair,
    spatial_scale: float,
    count: int,
    kinds: tuple[str, ...] = ROI_KINDS,
) -> np.ndarray:
    """Draws `count` ROIs of all kinds in turn, as (count, 5) in float64.

    Corners are exact in float32, so that they mean the same in every type.
    """
    rois = np.zeros((count, 5))
    shift = rng.integers(len(kinds))
    for index, roi in enumerate(rois):
        kind = kinds[(index + shift) % len(kinds)]
        low, high = np.sort(rng.uniform(size=(2, 2)), axis=0)
        if kind == "across the edge":
            low, high = low - 0.4, high + 0.3
            if rng.integers(2):
                low, high = low + 0.6, high + 0.6
        elif kind == "outside":
            side = rng.choice([-1.5, 1.5], 2) * rng.permutation([1, 0])
            low, high = low + side, high + side
        elif kind == "reversed":
            low, high = high, low
        elif kind == "many maps wide":
            low, high = low - 3, high + 4
        elif kind == "halves" and rng.integers(2):
            low, high = low - 0.7, high - 0.7
        roi[1:3], roi[3:] = (
            corner * size[::-1] / spatial_scale for corner in (low, high)
        )
        if kind == "halves":
            roi[1:] = np.round(2 * roi[1:]) / 2
        roi[0] = rng.integers(batch) if batch else -1
        if kind == "padding":
            roi[0] = rng.choice([-1, -7, -np.inf])
        if kind == "not finite":
            bad = rng.choice([np.nan, np.inf, -np.inf])
            roi[rng.integers(1, 5)] = bad
    return rois.astype(np.float32).astype(np.float64)


def _draw_pair(rng: np.random.Generator, low: int, high: int) -> Pair:
    return tuple(int(n) for n in rng.integers(low, high, 2))


def _draw_map_size(rng: np.random.Generator, seed: int) -> Pair:
    """Draws a size; a sixth of maps are rows or columns, a 23rd empty."""
    size = _draw_pair(rng, 1, 12)
    if seed % 6 == 0:
        size = tuple(rng.permutation([1, size[0]]).tolist())
    return (0, 4) if seed % 23 == 0 else size


def _draw_displacements(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Draws displacements, sometimes None; some are not finite.

    All are exact in float32.
    """
    if rng.random() < 0.2:
        return None
    displacements = np.float32(rng.normal(size=shape))
    if displacements.size > 20:
        spots = rng.integers(0, displacements.size, 5)
        displacements.flat[spots] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    return displacements.astype(np.float64)


def draw_psroi_pool_call(seed: int) -> tuple[tuple, dict]:
    """Returns `(inputs, rois, trans, output_grad)` and the attributes."""
    rng = np.random.default_rng(seed)
    size = _draw_map_size(rng, seed)
    batch, classes = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    pooled, samples = _draw_pair(rng, 1, 6), int(rng.integers(1, 6))
    num_rois = int(rng.choice([0, 1, 4, 9]))
    if seed % 11 == 0:
        pooled, samples, num_rois = (2, 1), 16, 3
    elif pooled[0] * pooled[1] * samples**2 > 100:
        num_rois = min(num_rois, 4)  # The reference is slow.
    group = [None, 1, _draw_pair(rng, 1, 5)][rng.integers(3)]
    part = [None, 1, _draw_pair(rng, 1, 8)][rng.integers(3)]
    attributes = dict(
        output_dim=classes * int(rng.integers(1, 8)),
        spatial_scale=float(rng.choice([1 / 16, 0.3, 1.0, 2.5])),
        pooled_size=pooled,
        group_size=group,
        part_size=part,
        sample_per_part=samples,
        trans_std=float(rng.choice([0.0, 0.1, 0.3])),
    )
    groups, parts = pair(group or pooled), pair(part or pooled)
    channels = attributes["output_dim"] * groups[0] * groups[1]
    operands = (
        rng.normal(size=(batch, *size, channels)),
        draw_rois(rng, batch, size, attributes["spatial_scale"], num_rois),
        _draw_displacements(rng, (num_rois, *parts, 2 * classes)),
        rng.normal(size=(num_rois, *pooled, attributes["output_dim"])),
    )
    return operands, attributes


def draw_roi_align_call(seed: int) -> tuple[tuple, dict]:
    """Returns `(inputs, rois, offset, output_grad)` and the attributes."""
    rng = np.random.default_rng(1000 + seed)
    size = _draw_map_size(rng, seed)
    batch, channels = int(rng.integers(1, 4)), int(rng.integers(1, 24))
    pooled = _draw_pair(rng, 1, 6)
    ratio = int(rng.choice([0, -3, 0, 1, 2, 3, 5]))
    num_rois = int(rng.choice([0, 1, 4, 8]))
    if seed % 11 == 0:
        pooled, ratio, num_rois = (2, 1), 16, 3
    attributes = dict(
        pooled_size=pooled,
        spatial_scale=float(rng.choice([1 / 16, 0.3, 1.0, 2.5])),
        sampling_ratio=ratio,
        gamma=float(rng.choice([0.0, 0.1, 0.3])),
    )
    operands = (
        rng.normal(size=(batch, *size, channels)),
        draw_rois(rng, batch, size, attributes["spatial_scale"], num_rois),
        _draw_displacements(rng, (num_rois, *pooled, 2)),
        rng.normal(size=(num_rois, *pooled, channels)),
    )
    return operands, attributes


def move_off_kinks(
    rng: np.random.Generator,
    make_bins: Callable[[], Iterator],
    displacement: np.ndarray,
    margin: float = 0.02,
) -> None:
    """Draws displacements anew where a sample is near a jump of the slope.

    The slope jumps at integers, and half a pixel outside of the map.
    `displacement` is changed in place until `make_bins` yields no such sample.
    """
    *cells, channels = displacement.shape
    pairs = displacement.reshape(*cells, channels // 2, 2)
    for _ in range(1000):
        bad = set()
        for b in make_bins():
            for axis, places in enumerate((b.ys, b.xs)):
                twice = 2 * np.array(places)
                if (np.abs(twice - np.round(twice)) < 2 * margin).any():
                    bad.add((*b.place, axis))
        if not bad:
            return
        for place in sorted(bad):
            pairs[place] = rng.uniform(-2.5, 2.5)
    raise AssertionError("these ROIs stay at the places of a jump")
