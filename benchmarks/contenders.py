# SPDX-License-Identifier: Apache-2.0
"""Defines the interface of all contenders of the benchmark.

`convolution.py` and `roi_pooling.py` each hold a suite: the shapes of one kind
of operator (`Case`), operands for them (`Operands`), and the contenders, which
share a small interface. Every contender lays out the operands of a case for
itself (`prepare`), is built for them, and then offers `forward()`, `both()`,
`outputs()` and `gradients()`. Work that a contender may do once and ahead of
time (transposing operands, tracing, building a session) happens in these first
two steps, which are not timed.

A framework is imported when a contender is built, never before: processes
differ in which frameworks are installed, and in the threads that they start.
The contenders on a GPU are in `contenders_torch.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


class Unsupported(Exception):
    """Says that the contender has no implementation of a case."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Holds the settings of a contender besides its case."""

    threads: int  # on the CPU
    precision: str  # of inputs, kernel and output
    device: str = "cpu"  # as PyTorch names it


class Contender:
    """Computes a case in one way. Results are channels last, in NumPy.

    A contender is built from the case, the operands as `prepare` returned them,
    and the setting.
    """

    deformable = True
    # "required": a contender whose results differ is not timed. "shown": the
    # difference is in the table. "none": the contender computes something else.
    agreement = "required"
    both: Callable[[], None] | None = None  # forward + backward, if it trains
    # Backward alone, if the contender can compute it without forward's results.
    backward: Callable[[], None] | None = None

    @classmethod
    def trains(cls) -> bool:
        """Tells whether the contender has a backward pass."""
        return cls.both is not None

    @classmethod
    def prepare(cls, case: Any, operands: Any) -> dict[str, np.ndarray]:
        """Returns the operands that the contender needs, in its own layout.

        Raises:
            Unsupported: if it has no implementation for this case.
        """
        raise NotImplementedError

    def forward(self) -> None:
        """Computes the output; returns when it is complete."""
        raise NotImplementedError

    def outputs(self) -> np.ndarray:
        """Returns the output, as `forward` computes it."""
        raise NotImplementedError

    def gradients(self, kind: str = "both") -> dict[str, np.ndarray]:
        """Returns gradients by operand, of `both` or `backward`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Suite:
    """Describes a kind of operator: its shapes and its contenders."""

    title: str
    case: type
    operands: type
    # Contenders in the order of the table, with the packages that they import.
    contenders: dict[str, tuple[type[Contender], tuple[str, ...]]]
    shapes: tuple[str, ...]
    quick_shapes: tuple[str, ...]
    ratio_to: str  # the contender whose times divide all times
    # Notes below the table give gains over the best contender of each group.
    peers: tuple[tuple[str, ...], ...]
    # Defaults of options.
    repeats: int
    memory_repeats: int
    memory_at_all_threads: bool  # otherwise only at the largest number
    # Computes the expected results, if no contender is the baseline.
    oracle: type[Contender] | None = None


def configure_tensorflow(threads: int, inter_op_threads: int = 1) -> None:
    """Sets the sizes of TensorFlow's pools, before they are started."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(inter_op_threads)


def numpy_dtype(name: str) -> Any:
    """Returns the type of a name, also bfloat16, which NumPy lacks."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def aligned(array: np.ndarray) -> np.ndarray:
    """Returns a copy that starts at a multiple of 64 bytes."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    return copy


def _as_tensor(array: np.ndarray) -> Any:
    """Makes a tensor on the array's own memory, which must be aligned.

    `tf.constant` would copy by way of a second buffer and leave this buffer in
    the allocator's pool. Calls could then use it, and their memory would not be
    seen.
    """
    import tensorflow as tf

    if array.dtype.name == "bfloat16":  # unknown to NumPy's DLPack
        return tf.bitcast(_as_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class TensorFlow(Contender):
    """Computes a case by `_call`, a `tf.function` of the operands."""

    constants: tuple[str, ...] = ()  # operands that get no gradient

    @classmethod
    def prepare(cls, case: Any, operands: Any) -> dict[str, np.ndarray]:
        """Returns the operands as they are, aligned as tensors are."""
        return {
            name: aligned(getattr(operands, name))
            for name in ("cotangent", *cls.names(case))
        }

    @classmethod
    def names(cls, case: Any) -> list[str]:
        """Returns the names of `_call`'s operands, `inputs` first."""
        raise NotImplementedError

    def __init__(
        self, case: Any, arrays: dict[str, np.ndarray], setting: Setting
    ):
        import tensorflow as tf

        self._case = case
        cotangent, *tensors = map(_as_tensor, arrays.values())
        _, *names = arrays

        # Each function also returns one number of its result. Fetching this
        # number proves that the call has finished, and costs nothing; fetching
        # the result would add a copy that no model makes.
        def forward(*tensors):
            output = self._call(**dict(zip(names, tensors, strict=True)))
            return output, tf.reshape(output, [-1])[0]

        # Returns the output, too: otherwise the forward pass would be pruned
        # from the graph where no gradient needs it.
        def both(cotangent, *tensors):
            operands = dict(zip(names, tensors, strict=True))
            sources = {
                name: tensor
                for name, tensor in operands.items()
                if name not in self.constants
            }
            with tf.GradientTape() as tape:
                tape.watch(sources)
                output = self._call(**operands)
            gradients = tape.gradient(
                output, sources, output_gradients=cotangent
            )
            first = tf.reshape(gradients["inputs"], [-1])[0]
            return output, gradients, first

        # Leaves the output out, so that the forward pass is pruned.
        def backward(cotangent, *tensors):
            return both(cotangent, *tensors)[1:]

        def trace(function, *tensors):
            # Tracing happens here, not in the first call.
            graph = tf.function(function).get_concrete_function(*tensors)
            return lambda: graph(*tensors)

        self._forward = trace(forward, *tensors)
        self._both = trace(both, cotangent, *tensors)
        if self.backward:
            self._backward = trace(backward, cotangent, *tensors)

    def _call(self, **tensors: Any) -> Any:
        raise NotImplementedError

    def forward(self) -> None:
        self._forward()[-1].numpy()

    def both(self) -> None:
        self._both()[-1].numpy()

    def outputs(self) -> np.ndarray:
        return self._forward()[0].numpy()

    def gradients(self, kind: str = "both") -> dict[str, np.ndarray]:
        call = self._both if kind == "both" else self._backward
        *_, gradients, _ = call()
        return {name: value.numpy() for name, value in gradients.items()}


class OnnxRuntime(Contender):
    """Runs ONNX Runtime on a graph of one node."""

    opset = 22

    def __init__(
        self, case: Any, arrays: dict[str, np.ndarray], setting: Setting
    ):
        import onnxruntime
        from onnx import TensorProto, helper

        batch, *places, channels = case.output_shape
        result = (batch, channels, *places)
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in arrays.items()
        ]
        output = helper.make_tensor_value_info(
            "output", TensorProto.FLOAT, result
        )
        node = self._node(case)
        model = helper.make_model(
            helper.make_graph([node], node.op_type, inputs, [output]),
            opset_imports=[helper.make_opsetid("", self.opset)],
            # Opset 22 came with this version of the file format; the onnx
            # package would write its newest version, which a runtime may not
            # know.
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        # Workers may spin while a call runs, but not while other contenders are
        # timed.
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

    def _node(self, case: Any) -> Any:
        """Returns the node; its operands have the names of `prepare`."""
        raise NotImplementedError

    def forward(self) -> None:
        self._run()

    def outputs(self) -> np.ndarray:
        self._run()
        return self._output.numpy().transpose(0, 2, 3, 1)


class OpenVino(Contender):
    """Runs OpenVINO on a graph of one node."""

    def __init__(
        self, case: Any, arrays: dict[str, np.ndarray], setting: Setting
    ):
        import openvino
        from openvino import opset8

        parameters = {
            name: opset8.parameter(array.shape, array.dtype, name=name)
            for name, array in arrays.items()
        }
        compiled = openvino.Core().compile_model(
            openvino.Model(
                [self._node(case, **parameters)], list(parameters.values())
            ),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": setting.threads,
                # Without this option OpenVINO computes in bfloat16 where it
                # can.
                "INFERENCE_PRECISION_HINT": "f32",
                # The process is pinned already, in the same way for all
                # contenders.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        for index, array in enumerate(arrays.values()):
            self._request.set_input_tensor(
                index, openvino.Tensor(array, shared_memory=True)
            )
        self._arrays = arrays  # the request only borrows them

    def _node(self, case: Any, **parameters: Any) -> Any:
        """Returns the node, given its operands by name."""
        raise NotImplementedError

    def forward(self) -> None:
        self._request.infer()

    def outputs(self) -> np.ndarray:
        self._request.infer()
        return self._request.get_output_tensor().data.transpose(0, 2, 3, 1)
