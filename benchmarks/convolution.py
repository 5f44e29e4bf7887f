# SPDX-License-Identifier: Apache-2.0
"""Defines shapes, operands and contenders of deformable convolution."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from contenders import (
    Contender,
    OnnxRuntime,
    OpenVino,
    Setting,
    Suite,
    TensorFlow,
    Unsupported,
    aligned,
    numpy_dtype,
)

_NOTATION = re.compile(
    r"(?P<batch>\d+)x(?P<height>\d+)x(?P<width>\d+)x(?P<channels>\d+)"
    r"->(?P<filters>\d+)(?P<suffixes>(?:[,: ]+(?:og|k|s|d|g)\d+)*)"
)
_SUFFIXES = {
    "k": "kernel",
    "s": "strides",
    "d": "dilation_rate",
    "g": "groups",
    "og": "offset_groups",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes a shape to run: a "same" convolution with a square kernel."""

    batch: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: int = 3
    strides: int = 1
    dilation_rate: int = 1
    groups: int = 1
    offset_groups: int = 1
    dtype: str = "float32"
    with_mask: bool = True

    @classmethod
    def parse(cls, text: str, dtype: str, with_mask: bool) -> "Case":
        """Reads `1x56x56x256->256,k5,s2,d1,g4,og4`; suffixes are optional.

        Raises:
            ValueError: if `text` is not in that notation, or if the groups do
                not divide the channels.
        """
        match = _NOTATION.fullmatch(text.strip())
        if not match:
            raise ValueError(
                "Expected a shape such as 1x56x56x256->256 or "
                f"1x56x56x256->256,k5,s2,d2,g4,og4. Received: {text!r}"
            )
        fields = match.groupdict()
        sizes = {
            _SUFFIXES[key]: int(number)
            for key, number in re.findall(
                r"([a-z]+)(\d+)", fields.pop("suffixes")
            )
        }
        sizes |= {key: int(number) for key, number in fields.items()}
        if 0 in sizes.values():
            raise ValueError(f"Expected sizes above 0. Received: {text!r}")
        case = cls(**sizes, dtype=dtype, with_mask=with_mask)
        if (
            case.channels % case.groups
            or case.filters % case.groups
            or case.channels % case.offset_groups
        ):
            raise ValueError(
                "Expected groups to divide channels and filters, and "
                f"offset_groups to divide channels. Received: {text!r}"
            )
        return case

    def __str__(self) -> str:
        suffixes = [
            f",{key}{getattr(self, field)}"
            for key, field in _SUFFIXES.items()
            if getattr(self, field) != (3 if key == "k" else 1)
        ]
        return (
            f"{self.batch}x{self.height}x{self.width}x{self.channels}"
            f"->{self.filters}" + "".join(suffixes)
        )

    @property
    def taps(self) -> int:
        """Returns the number of an output pixel's samples per channel."""
        return self.kernel * self.kernel

    @property
    def offset_taps(self) -> int:
        """Returns the samples of all offset groups: channels of the mask."""
        return self.offset_groups * self.taps

    @property
    def depthwise(self) -> bool:
        """Tells whether every input channel is a group of its own."""
        return 1 < self.groups == self.channels

    @property
    def output_size(self) -> tuple[int, int]:
        """Returns height and width of the output."""
        return (
            math.ceil(self.height / self.strides),
            math.ceil(self.width / self.strides),
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Returns the output's shape, channels last."""
        return (self.batch, *self.output_size, self.filters)

    @property
    def product_flop(self) -> int:
        """Returns operations of the forward product; a multiply-add is two.

        The backward pass has two more products of the same size.
        """
        pixels = math.prod(self.output_shape[:3])
        depth = self.channels // self.groups
        return 2 * pixels * self.taps * depth * self.filters

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns ((top, bottom), (left, right)) of "same" padding."""
        reach = (self.kernel - 1) * self.dilation_rate + 1
        totals = [
            max((out - 1) * self.strides + reach - size, 0)
            for out, size in zip(
                self.output_size, (self.height, self.width), strict=True
            )
        ]
        return tuple((total // 2, total - total // 2) for total in totals)

    def tiny(self) -> "Case":
        """Returns the same convolution on a map that costs nothing."""
        channels, filters = self.channels, self.filters
        if not self.depthwise:  # a depthwise convolution keeps its channels
            channels = filters = 8 * self.groups * self.offset_groups
        return dataclasses.replace(
            self, batch=1, height=8, width=8, channels=channels,
            filters=filters,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds NumPy operands, channels last, named as in `deformable_conv2d`."""

    inputs: np.ndarray
    kernel: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None
    cotangent: np.ndarray  # the gradient that arrives at the output

    @classmethod
    def random(cls, case: Case) -> "Operands":
        """Makes offsets of about two pixels and masks in (0, 2).

        The seed is fixed. Offsets are odd multiples of 1/128. So every
        coordinate is exact in float32, in whatever order a contender adds it
        up. It also lies between two pixels, where the derivative is the same in
        every convention.
        """
        rng = np.random.default_rng(20)
        coordinate = "float64" if case.dtype == "float64" else "float32"

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        places = (case.batch, *case.output_size)
        depth = case.channels // case.groups
        mask = None
        if case.with_mask:
            mask = 2 / (1 + np.exp(-normal(*places, case.offset_taps)))
            mask = mask.astype(coordinate)
        offset = 2 * normal(*places, 2 * case.offset_taps)
        return cls(
            inputs=normal(
                case.batch, case.height, case.width, case.channels
            ).astype(numpy_dtype(case.dtype)),
            kernel=(
                normal(case.kernel, case.kernel, depth, case.filters)
                / math.sqrt(case.taps * depth)
            ).astype(numpy_dtype(case.dtype)),
            offset=((np.floor(64 * offset) + 0.5) / 64).astype(coordinate),
            mask=mask,
            cotangent=normal(*places, case.filters).astype(
                numpy_dtype(case.dtype)
            ),
        )

    def undeformed(self) -> "Operands":
        """Returns the operands with zero offsets and a mask of ones."""
        return dataclasses.replace(
            self,
            offset=np.zeros_like(self.offset),
            mask=None if self.mask is None else np.ones_like(self.mask),
        )


class _TensorFlow(TensorFlow):
    @classmethod
    def names(cls, case: Case) -> list[str]:
        names = ["inputs", "kernel"]
        if cls.deformable:
            names += ["offset", "mask"] if case.with_mask else ["offset"]
        return names


class TfDeform(_TensorFlow):
    """Runs this package."""

    def _call(self, inputs, kernel, offset, mask=None):
        import tf_deform

        return tf_deform.ops.deformable_conv2d(
            inputs,
            kernel,
            offset,
            mask,
            strides=self._case.strides,
            padding="same",
            dilation_rate=self._case.dilation_rate,
            offset_groups=self._case.offset_groups,
        )


class Conv2D(_TensorFlow):
    """Runs the plain convolution, to which deforming is compared.

    It is `tf.nn.conv2d` or, if each channel is a group, the faster
    `tf.nn.depthwise_conv2d`, unless that lacks the strides and dilation.
    """

    deformable = False

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """Returns operands; a depthwise kernel has its operator's shape."""
        arrays = super().prepare(case, operands)
        if _has_depthwise_operator(case):
            shape = (case.kernel, case.kernel, case.channels, -1)
            arrays["kernel"] = arrays["kernel"].reshape(shape)
        return arrays

    def _call(self, inputs, kernel):
        import tensorflow as tf

        strides, dilations = self._case.strides, self._case.dilation_rate
        if _has_depthwise_operator(self._case):
            return tf.nn.depthwise_conv2d(
                inputs,
                kernel,
                strides=(1, strides, strides, 1),
                padding="SAME",
                dilations=(dilations, dilations),
            )
        return tf.nn.conv2d(
            inputs, kernel, strides, padding="SAME", dilations=dilations
        )

    def gradients(self, kind: str = "both") -> dict[str, np.ndarray]:
        gradients = super().gradients(kind)
        if _has_depthwise_operator(self._case):
            shape = (self._case.kernel, self._case.kernel, 1, -1)
            gradients["kernel"] = gradients["kernel"].reshape(shape)
        return gradients


def _has_depthwise_operator(case: Case) -> bool:
    return case.depthwise and 1 in (case.strides, case.dilation_rate)


class Gather(_TensorFlow):
    """Runs stock TensorFlow: four gathers, a weighted sum, a matrix product.

    It is the code that a user writes without a custom op; the gradient is
    TensorFlow's own. All taps are gathered at once, which takes less time than
    one after another.
    """

    def _call(self, inputs, kernel, offset, mask=None):
        import tensorflow as tf

        case = self._case
        places = math.prod(case.output_size)
        groups, taps = case.offset_groups, case.taps
        shape = (case.batch, places, groups, taps)
        # Orders offsets as the columns below: positions, taps, offset groups.
        offset = tf.transpose(tf.reshape(offset, (*shape, 2)), (0, 1, 3, 2, 4))
        if mask is not None:
            mask = tf.transpose(tf.reshape(mask, shape), (0, 1, 3, 2))
        positions = offset + _undeformed_positions(case).astype(
            offset.dtype.as_numpy_dtype
        )
        low = tf.floor(positions)
        fraction = positions - low
        low = tf.cast(low, tf.int32)

        # Makes rows of pixels, and within a pixel of its offset groups.
        flat = tf.reshape(inputs, (case.batch, -1, case.channels // groups))
        samples = []
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y, x = low[..., 0] + dy, low[..., 1] + dx
            weight = fraction[..., 0] if dy else 1 - fraction[..., 0]
            weight *= fraction[..., 1] if dx else 1 - fraction[..., 1]
            # A corner outside the image reads the nearest pixel, with weight 0.
            inside = (y >= 0) & (y < case.height) & (x >= 0) & (x < case.width)
            weight = tf.where(inside, weight, tf.zeros_like(weight))
            if mask is not None:
                weight *= mask
            y = tf.clip_by_value(y, 0, case.height - 1)
            x = tf.clip_by_value(x, 0, case.width - 1)
            index = (y * case.width + x) * groups + tf.range(groups)
            samples.append(
                tf.gather(flat, index, axis=1, batch_dims=1)
                * tf.cast(weight, inputs.dtype)[..., None]
            )
        columns = tf.add_n(samples)

        depth = case.channels // case.groups
        columns = tf.reshape(columns, (-1, case.taps, case.groups, depth))
        outputs = [
            tf.matmul(
                tf.reshape(columns[:, :, group], (-1, case.taps * depth)),
                tf.reshape(part, (case.taps * depth, -1)),
            )
            for group, part in enumerate(tf.split(kernel, case.groups, axis=-1))
        ]
        return tf.reshape(
            tf.concat(outputs, axis=-1),
            (case.batch, *case.output_size, case.filters),
        )


def _undeformed_positions(case: Case) -> np.ndarray:
    """Returns (y, x) of every tap at zero offset: (positions, taps, 1, 2)."""
    axes = []
    for size, (before, _) in zip(case.output_size, case.padding, strict=True):
        starts = np.arange(size) * case.strides - before
        steps = np.arange(case.kernel) * case.dilation_rate
        axes.append(starts[:, None] + steps)
    height, width = case.output_size
    shape = (height, width, case.kernel, case.kernel)
    y = np.broadcast_to(axes[0][:, None, :, None], shape)
    x = np.broadcast_to(axes[1][None, :, None, :], shape)
    return np.stack([y, x], axis=-1).reshape(-1, case.taps, 1, 2)


class _ChannelsFirst(Contender):
    """Runs an inference engine: NCHW, float32, forward alone."""

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """Returns the operands in NCHW, the kernel with filters first."""
        if case.dtype != "float32":
            raise Unsupported(f"{case.dtype} (compared in float32 only)")
        arrays = {
            "inputs": operands.inputs.transpose(0, 3, 1, 2),
            "kernel": operands.kernel.transpose(3, 2, 0, 1),
            "offset": operands.offset.transpose(0, 3, 1, 2),
        }
        if operands.mask is not None:
            arrays["mask"] = operands.mask.transpose(0, 3, 1, 2)
        return {name: aligned(array) for name, array in arrays.items()}


class DeformConv(_ChannelsFirst, OnnxRuntime):
    """Runs ONNX Runtime's DeformConv, opset 22.

    The kernel is an operand like all others: as a constant of the model it
    takes the same time, and the session keeps two copies of it.
    """

    def _node(self, case: Case) -> Any:
        from onnx import helper

        (top, bottom), (left, right) = case.padding
        return helper.make_node(
            "DeformConv",
            # The empty name stands for the bias, which no contender has.
            ["inputs", "kernel", "offset"]
            + (["", "mask"] if case.with_mask else []),
            ["output"],
            kernel_shape=[case.kernel] * 2,
            strides=[case.strides] * 2,
            dilations=[case.dilation_rate] * 2,
            pads=[top, left, bottom, right],
            group=case.groups,
            offset_group=case.offset_groups,
        )


class DeformableConvolution(_ChannelsFirst, OpenVino):
    """Runs OpenVINO's DeformableConvolution, opset 8.

    The kernel is a constant of the model, as in serving, so that OpenVINO can
    lay it out ahead of time.
    """

    def __init__(
        self, case: Case, arrays: dict[str, np.ndarray], setting: Setting
    ):
        arrays = dict(arrays)
        self._kernel = arrays.pop("kernel")
        super().__init__(case, arrays, setting)
        del self._kernel

    def _node(self, case: Case, inputs, offset, mask=None) -> Any:
        from openvino import opset8

        (top, bottom), (left, right) = case.padding
        return opset8.deformable_convolution(
            inputs,
            offset,
            opset8.constant(self._kernel),
            strides=[case.strides] * 2,
            pads_begin=[top, left],
            pads_end=[bottom, right],
            dilations=[case.dilation_rate] * 2,
            mask=mask,
            group=case.groups,
            deformable_group=case.offset_groups,
            bilinear_interpolation_pad=True,
        )


SUITE = Suite(
    title="Deformable convolution",
    case=Case,
    operands=Operands,
    contenders={
        "tf_deform": (TfDeform, ("tensorflow", "tf_deform")),
        "tf.nn.conv2d": (Conv2D, ("tensorflow",)),
        "gather": (Gather, ("tensorflow",)),
        "onnxruntime": (DeformConv, ("onnx", "onnxruntime")),
        "openvino": (DeformableConvolution, ("openvino",)),
    },
    shapes=(
        "1x56x56x256->256",
        "1x100x100x128->128",
        "1x28x28x512->512",
        "2x50x64x256->256",
        "8x14x14x512->512",
        "1x160x160x64->64",
        "16x7x7x512->512",
        "1x32x48x384->96,og4",
    ),
    # These shapes are small, and have every suffix that all contenders support.
    quick_shapes=("1x28x28x64->64", "2x17x19x32->48,k5,s2,d2,og4"),
    ratio_to="tf.nn.conv2d",
    peers=(("gather",), ("onnxruntime", "openvino")),
    repeats=21,
    memory_repeats=3,
    memory_at_all_threads=True,
)

# Runs the same contenders on shapes that are less common, or have little
# arithmetic for their number of samples.
KINDS_SUITE = dataclasses.replace(
    SUITE,
    title="Kinds of convolution",
    shapes=(
        "1x56x56x256->18",
        "1x56x56x256->256,g8",
        "1x56x56x256->256,g32",
        "1x56x56x256->256,g256",
        "1x112x112x64->64,g64",
        "1x56x56x256->256,k1",
        "1x28x28x512->128,k1",
        "1x28x28x128->128,k5",
        "1x56x56x256->256,s2",
        "1x50x64x256->256,d2",
        "1x160x160x16->16",
        "1x224x224x3->32,s2",
        "1x80x80x48->48",
        "1x7x7x512->512",
    ),
    quick_shapes=("1x12x13x16->32,g4", "1x12x13x16->32,g16"),
    memory_repeats=1,
    memory_at_all_threads=False,
)
