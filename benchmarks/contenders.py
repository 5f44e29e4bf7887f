# SPDX-License-Identifier: Apache-2.0
"""The contenders of the benchmark, each behind the same small interface.

Every contender lays out the `Operands` of a `Case` for itself (`prepare`), is
built for them, and then offers `forward()`, `both()`, `outputs()` and
`gradients()`. What it may do once and ahead of time (transposing operands,
tracing, building a session) happens in these first two steps, outside
everything timed.

Frameworks are imported when a contender is built, never before: which of them
is installed, and how many threads it starts, differs from process to process.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

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
    """One shape to run: a "same" convolution with a square kernel."""

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
        """Samples that one output pixel takes from each channel."""
        return self.kernel * self.kernel

    @property
    def offset_taps(self) -> int:
        """Samples of all offset groups: channels of the mask."""
        return self.offset_groups * self.taps

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return (
            math.ceil(self.height / self.strides),
            math.ceil(self.width / self.strides),
        )

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) of TensorFlow's "same" padding."""
        reach = (self.kernel - 1) * self.dilation_rate + 1
        totals = [
            max((out - 1) * self.strides + reach - size, 0)
            for out, size in zip(
                self.output_size, (self.height, self.width), strict=True
            )
        ]
        return tuple((total // 2, total - total // 2) for total in totals)

    def tiny(self) -> "Case":
        """The same convolution on a map that costs nothing."""
        channels = 8 * self.groups * self.offset_groups
        return dataclasses.replace(
            self, batch=1, height=8, width=8, channels=channels,
            filters=channels,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operands:
    """NumPy operands, channels last, named as in `deformable_conv2d`."""

    inputs: np.ndarray
    kernel: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None
    cotangent: np.ndarray  # the gradient that arrives at the output

    @classmethod
    def random(cls, case: Case) -> "Operands":
        """Offsets of about two pixels and masks in (0, 2), from a fixed seed.

        Offsets are odd multiples of 1/128. So every coordinate is exact in
        float32, in whatever order a contender adds it up, and lies between
        two pixels, where the derivative is the same in every convention.
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
            ).astype(_numpy_dtype(case.dtype)),
            kernel=(
                normal(case.kernel, case.kernel, depth, case.filters)
                / math.sqrt(case.taps * depth)
            ).astype(_numpy_dtype(case.dtype)),
            offset=((np.floor(64 * offset) + 0.5) / 64).astype(coordinate),
            mask=mask,
            cotangent=normal(*places, case.filters).astype(
                _numpy_dtype(case.dtype)
            ),
        )

    def undeformed(self) -> "Operands":
        """The same operands with zero offsets and a mask of ones."""
        return dataclasses.replace(
            self,
            offset=np.zeros_like(self.offset),
            mask=None if self.mask is None else np.ones_like(self.mask),
        )


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


class Unsupported(Exception):
    """The contender has no implementation for this case."""


class Contender:
    """One way to compute a case. Results are channels last, in NumPy.

    Built from the case, the operands as `prepare` returned them, and the
    number of threads.
    """

    deformable = True
    both: Callable[[], None] | None = None  # forward + backward, if it has one

    @classmethod
    def trains(cls) -> bool:
        """Whether it has a backward pass."""
        return cls.both is not None

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """The operands that it needs, in its own layout.

        Raises:
            Unsupported: if it has no implementation for this case.
        """
        raise NotImplementedError

    def forward(self) -> None:
        """Computes the output; returns when it is complete."""
        raise NotImplementedError

    def outputs(self) -> np.ndarray:
        """The output, as `forward` computes it."""
        raise NotImplementedError

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients by operand, as `both` computes them."""
        raise NotImplementedError


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


def _as_tensor(array: np.ndarray) -> Any:
    """A tensor on the array's own memory, which must be aligned.

    `tf.constant` would copy by way of a second buffer and leave that in the
    allocator's pool, where calls could use it without being seen to.
    """
    import tensorflow as tf

    if array.dtype.name == "bfloat16":  # unknown to NumPy's DLPack
        return tf.bitcast(_as_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class _TensorFlow(Contender):
    """A contender that is a `tf.function` of the operands."""

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """The operands as they are, aligned as tensors are."""
        names = ["cotangent", "inputs", "kernel"]
        if cls.deformable:
            names += ["offset", "mask"] if case.with_mask else ["offset"]
        return {name: _aligned(getattr(operands, name)) for name in names}

    def __init__(self, case: Case, arrays: dict[str, np.ndarray], threads: int):
        import tensorflow as tf

        self._case = case
        cotangent, *tensors = map(_as_tensor, arrays.values())
        _, *names = arrays

        # Each function also returns one number of its result. Fetching it is
        # what proves that the call has finished, and costs nothing; fetching
        # the result would add a copy that no model makes.
        @tf.function
        def forward(*tensors):
            output = self._call(**dict(zip(names, tensors, strict=True)))
            return output, tf.reshape(output, [-1])[0]

        # The output is returned too: no gradient of a convolution needs it,
        # and without it the forward pass would be pruned from the graph.
        @tf.function
        def both(cotangent, *tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = self._call(**dict(zip(names, tensors, strict=True)))
            gradients = tape.gradient(
                output, tensors, output_gradients=cotangent
            )
            return output, gradients, tf.reshape(gradients[0], [-1])[0]

        self._names = names
        # Concrete functions: tracing happens here, not in the first call.
        forward = forward.get_concrete_function(*tensors)
        both = both.get_concrete_function(cotangent, *tensors)
        self._forward = lambda: forward(*tensors)
        self._both = lambda: both(cotangent, *tensors)

    def _call(self, **tensors: Any) -> Any:
        raise NotImplementedError

    def forward(self) -> None:
        self._forward()[-1].numpy()

    def both(self) -> None:
        self._both()[-1].numpy()

    def outputs(self) -> np.ndarray:
        return self._forward()[0].numpy()

    def gradients(self) -> dict[str, np.ndarray]:
        _, gradients, _ = self._both()
        return {
            name: gradient.numpy()
            for name, gradient in zip(self._names, gradients, strict=True)
        }


class TfDeform(_TensorFlow):
    """This package."""

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
    """The plain convolution: what deforming is measured against."""

    deformable = False

    def _call(self, inputs, kernel):
        import tensorflow as tf

        return tf.nn.conv2d(
            inputs,
            kernel,
            strides=self._case.strides,
            padding="SAME",
            dilations=self._case.dilation_rate,
        )


class Gather(_TensorFlow):
    """Stock TensorFlow: four gathers, a weighted sum, one matrix product.

    What one writes without a custom op; the gradient is TensorFlow's own. All
    taps are gathered at once, which takes less time than one after another.
    """

    def _call(self, inputs, kernel, offset, mask=None):
        import tensorflow as tf

        case = self._case
        places = math.prod(case.output_size)
        groups, taps = case.offset_groups, case.taps
        shape = (case.batch, places, groups, taps)
        # The order of the columns below: places, taps, offset groups.
        offset = tf.transpose(tf.reshape(offset, (*shape, 2)), (0, 1, 3, 2, 4))
        if mask is not None:
            mask = tf.transpose(tf.reshape(mask, shape), (0, 1, 3, 2))
        positions = offset + _undeformed_positions(case).astype(
            offset.dtype.as_numpy_dtype
        )
        low = tf.floor(positions)
        fraction = positions - low
        low = tf.cast(low, tf.int32)

        # Rows are pixels, and within a pixel its offset groups.
        flat = tf.reshape(inputs, (case.batch, -1, case.channels // groups))
        samples = []
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y, x = low[..., 0] + dy, low[..., 1] + dx
            weight = fraction[..., 0] if dy else 1 - fraction[..., 0]
            weight *= fraction[..., 1] if dx else 1 - fraction[..., 1]
            # A corner outside the image reads the nearest pixel instead, and
            # weighs nothing.
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
    """(y, x) of every tap at zero offset: (places, taps, 1, 2)."""
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
    """An inference engine: NCHW, float32, forward alone."""

    @classmethod
    def prepare(cls, case: Case, operands: Operands) -> dict[str, np.ndarray]:
        """The operands in NCHW, the kernel with its filters first."""
        if case.dtype != "float32":
            raise Unsupported(f"compared in float32 only, not {case.dtype}")
        arrays = {
            "inputs": operands.inputs.transpose(0, 3, 1, 2),
            "kernel": operands.kernel.transpose(3, 2, 0, 1),
            "offset": operands.offset.transpose(0, 3, 1, 2),
        }
        if operands.mask is not None:
            arrays["mask"] = operands.mask.transpose(0, 3, 1, 2)
        return {name: _aligned(array) for name, array in arrays.items()}


class OnnxRuntime(_ChannelsFirst):
    """ONNX Runtime's DeformConv, opset 22.

    The kernel is an operand like the others: as a constant of the model it
    takes the same time, and the session holds on to two copies of it.
    """

    def __init__(self, case: Case, arrays: dict[str, np.ndarray], threads: int):
        import onnxruntime
        from onnx import TensorProto, helper

        result = (case.batch, case.filters, *case.output_size)
        (top, bottom), (left, right) = case.padding
        node = helper.make_node(
            "DeformConv",
            # The empty name is the bias, which nobody here has.
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
        values = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in [
                *((name, array.shape) for name, array in arrays.items()),
                ("output", result),
            ]
        }
        output = values.pop("output")
        model = helper.make_model(
            helper.make_graph(
                [node],
                "deform_conv",
                list(values.values()),
                [output],
            ),
            opset_imports=[helper.make_opsetid("", 22)],
            # Opset 22 came with this version of the file format; the onnx
            # package would write its newest, which a runtime may not know.
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Workers may spin while a call runs, not while others are timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(array)
            )
        self._output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            result, np.float32
        )
        binding.bind_ortvalue_output("output", self._output)
        self._run = lambda: session.run_with_iobinding(binding)

    def forward(self) -> None:
        self._run()

    def outputs(self) -> np.ndarray:
        self._run()
        return self._output.numpy().transpose(0, 2, 3, 1)


class OpenVino(_ChannelsFirst):
    """OpenVINO's DeformableConvolution, opset 8.

    The kernel is a constant of the model, which is how it is served and what
    lets it be laid out ahead of time.
    """

    def __init__(self, case: Case, arrays: dict[str, np.ndarray], threads: int):
        import openvino
        from openvino import opset8

        arrays = dict(arrays)
        kernel = arrays.pop("kernel")
        parameters = {
            name: opset8.parameter(array.shape, np.float32, name=name)
            for name, array in arrays.items()
        }
        (top, bottom), (left, right) = case.padding
        output = opset8.deformable_convolution(
            parameters["inputs"],
            parameters["offset"],
            opset8.constant(kernel),
            strides=[case.strides] * 2,
            pads_begin=[top, left],
            pads_end=[bottom, right],
            dilations=[case.dilation_rate] * 2,
            mask=parameters.get("mask"),
            group=case.groups,
            deformable_group=case.offset_groups,
            bilinear_interpolation_pad=True,
        )
        compiled = openvino.Core().compile_model(
            openvino.Model([output], list(parameters.values())),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                # Without this it computes in bfloat16 where there is AMX.
                "INFERENCE_PRECISION_HINT": "f32",
                # The process is pinned already, the same for everybody.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        for index, array in enumerate(arrays.values()):
            self._request.set_input_tensor(
                index, openvino.Tensor(array, shared_memory=True)
            )
        self._arrays = arrays  # the request only borrows them

    def forward(self) -> None:
        self._request.infer()

    def outputs(self) -> np.ndarray:
        self._request.infer()
        return self._request.get_output_tensor().data.transpose(0, 2, 3, 1)


# In the order of the table. The packages are what a contender imports.
CONTENDERS: dict[str, tuple[type[Contender], tuple[str, ...]]] = {
    "tf_deform": (TfDeform, ("tensorflow", "tf_deform")),
    "tf.nn.conv2d": (Conv2D, ("tensorflow",)),
    "gather": (Gather, ("tensorflow",)),
    "onnxruntime": (OnnxRuntime, ("onnx", "onnxruntime")),
    "openvino": (OpenVino, ("openvino",)),
}
