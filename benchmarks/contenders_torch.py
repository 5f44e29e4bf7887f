# SPDX-License-Identifier: Apache-2.0
"""Runs contenders on a GPU: this package's kernels, torchvision, cuDNN.

All contenders run on PyTorch's tensors and its current stream. This package's
kernels are called through the core's C entry points, so that TensorFlow is not
needed. On the device "cpu" they are the emulated kernels of `tests/lib/gpu.py`,
so that the harness can be tried on a machine without a GPU.
"""

import ctypes
import dataclasses
import functools
import math
import os
import statistics
import sys
from typing import Any

import convolution
import machine
import numpy as np
import roi_pooling
from contenders import Contender, Setting, Suite, Unsupported
from timing import HostClock, first_line, take_turns

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "tests", "lib"))

import core  # noqa: E402
import gpu  # noqa: E402

Arrays = dict[str, np.ndarray]

# Maps a name to the element type, and to whether products of float32 may be
# rounded to tf32.
PRECISIONS = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "float16": ("float16", False),
    "bfloat16": ("bfloat16", False),
}
# These operands have the precision's type; all other operands are coordinates.
OF_TYPE = ("inputs", "kernel", "cotangent")
# Edge of the matrices whose product measures a GPU's peak; a CPU only tries it.
PEAK_SIZE = {"cuda": 8192, "cpu": 128}


# The functions below make operands that every precision can hold, so that all
# contenders get the same operands.


def representable(array: np.ndarray) -> np.ndarray:
    """Rounds to numbers that bfloat16 and float16 both hold."""
    import torch

    tensor = torch.from_numpy(array)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        tensor = tensor.to(dtype)
    return tensor.float().numpy()


def representable_fields(operands: Any) -> Any:
    """Rounds all operands but coordinates."""
    names = ("inputs", "kernel", "mask", "cotangent")
    given = {name: getattr(operands, name, None) for name in names}
    fields = {k: representable(a) for k, a in given.items() if a is not None}
    return dataclasses.replace(operands, **fields)


class ConvOperands(convolution.Operands):
    @classmethod
    def random(cls, case: convolution.Case) -> "ConvOperands":
        """Makes operands whose offsets are odd multiples of 1/8.

        torchvision adds up coordinates in float16; these offsets make the sums
        exact there, too (in images of less than 256 pixels).
        """
        operands = representable_fields(super().random(case))
        offset = (np.floor(4 * operands.offset) + 0.5) / 4
        return dataclasses.replace(operands, offset=offset)


class PoolingOperands(roi_pooling.Operands):
    @classmethod
    def random(cls, case: roi_pooling.Case) -> "PoolingOperands":
        return representable_fields(super().random(case))


# The operators have these names in the core.


def _is_conv(case: Any) -> bool:
    return isinstance(case, convolution.Case)


def _op(case: Any) -> tuple[str, dict[str, Any]]:
    """Returns an operator's name and its attributes for `core`."""
    if _is_conv(case):
        return "DeformableConv2D", {
            "strides": case.strides,
            "padding": "same",
            "dilation_rate": case.dilation_rate,
            "offset_groups": case.offset_groups,
        }
    attributes: dict[str, Any] = {
        "pooled_size": case.pooled,
        "spatial_scale": 1 / roi_pooling.STRIDE,
    }
    if case.operator == "align":
        return "DeformableROIAlign", attributes | {
            "sampling_ratio": case.samples,
            "gamma": roi_pooling.REACH,
        }
    return "DeformablePSROIPool", attributes | {
        "output_dim": case.output_dim,
        "group_size": case.group,
        "sample_per_part": case.samples,
        "trans_std": roi_pooling.REACH,
    }


class _OnDevice(Contender):
    """Takes all operands as they are; a contender of the table."""

    @classmethod
    def prepare(cls, case: Any, operands: Any) -> Arrays:
        del case
        arrays = {
            field.name: getattr(operands, field.name)
            for field in dataclasses.fields(operands)
        }
        return {k: array for k, array in arrays.items() if array is not None}


class Core(_OnDevice):
    """Computes expected results: this package on the CPU in float64."""

    def __init__(self, case: Any, arrays: Arrays, setting: Setting):
        del setting
        names = ("inputs", "kernel", "offset", "mask")
        if not _is_conv(case):
            names = ("inputs", "rois", "displacement")
        self._operands = [arrays.get(name) for name in names]
        self._cotangent = arrays["cotangent"]
        op, attributes = _op(case)
        self._options = attributes | {
            "dtype": "float64",
            "threads": os.cpu_count() or 1,
        }
        self._forward, self._backward = core.forward, core.backward
        if not _is_conv(case):
            self._forward = functools.partial(core.forward_roi, op)
            self._backward = functools.partial(core.backward_roi, op)

    def outputs(self) -> np.ndarray:
        return self._forward(*self._operands, **self._options)

    def gradients(self, kind: str = "both") -> Arrays:
        return self._backward(*self._operands, self._cotangent, **self._options)


class TfDeform(_OnDevice):
    """Runs this package's kernels through the core's C entry points."""

    def __init__(self, case: Any, arrays: Arrays, setting: Setting):
        import torch

        set_precision(setting.precision)
        name, self._allow_tf32 = PRECISIONS[setting.precision]
        self._number = core.DTYPES[name]
        dtype = getattr(torch, name)
        tensors = {
            name: torch.from_numpy(array).to(
                setting.device, dtype if name in OF_TYPE else torch.float32
            )
            for name, array in arrays.items()
        }
        self._cotangent = tensors.pop("cotangent")
        self._tensors = tensors
        self._output = torch.empty_like(self._cotangent)
        self._gradients = {
            name: torch.empty_like(tensor)
            for name, tensor in tensors.items()
            if name != "rois"
        }
        op, attributes = _op(case)
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        if _is_conv(case):
            params = core.validate(*shapes, **attributes)
            structs = core.Pointers, core.Pointers
        else:
            params = core.validate_roi(op, *shapes, **attributes)
            structs = core.ROIOperands, core.ROIGradients
        self._op, self._params = f"TfDeform{op}Cuda", ctypes.byref(params)
        self._operands, self._targets = (
            ctypes.byref(struct(**{k: t.data_ptr() for k, t in given.items()}))
            for struct, given in zip(
                structs, (tensors, self._gradients), strict=True
            )
        )
        # PS-ROI pooling has a second output, the counts, which the caller
        # leaves out.
        counts = [None] if op == "DeformablePSROIPool" else []
        self._outputs = [ctypes.c_void_p(self._output.data_ptr()), *counts]
        self._allocate(setting.device)

    def _allocate(self, device: str) -> None:
        import torch

        num_bytes = max(
            gpu.workspace_bytes(
                f"{self._op}WorkspaceBytes", self._params, self._number
            ),
            gpu.workspace_bytes(
                f"{self._op}BackwardWorkspaceBytes",
                self._params,
                self._number,
                self._targets,
                self._stream(),
            ),
        )
        self.workspace_mib = num_bytes / 2**20
        self._memory = torch.empty(
            num_bytes + 256, dtype=torch.uint8, device=device
        )
        address = self._memory.data_ptr()
        self._workspace = ctypes.c_void_p(address + -address % 256)

    def _stream(self) -> Any:
        return ctypes.byref(gpu.stream(allow_tf32=self._allow_tf32))

    def _call(self, entry: str, *arguments: Any) -> None:
        common = [self._params, self._number, self._operands]
        gpu.call(f"{self._op}{entry}", [*common, *arguments, self._stream()])

    def forward(self) -> None:
        self._call("Forward", self._workspace, *self._outputs)

    def both(self) -> None:
        self.forward()
        cotangent = ctypes.c_void_p(self._cotangent.data_ptr())
        self._call("Backward", cotangent, self._workspace, self._targets)

    def _poison(self) -> None:
        """Fills memory to be written with NaN, so that a gap shows."""
        for tensor in (self._output, *self._gradients.values()):
            tensor.fill_(math.nan)
        self._memory.fill_(255)

    def outputs(self) -> np.ndarray:
        self._poison()
        self.forward()
        return self._output.float().cpu().numpy()

    def gradients(self, kind: str = "both") -> Arrays:
        self._poison()
        self.both()
        return {
            name: tensor.float().cpu().numpy()
            for name, tensor in self._gradients.items()
        }


class _Torch(_OnDevice):
    """Runs a function of PyTorch or torchvision, with its own gradients.

    Subclasses name the operands that they take, first the operands that get a
    gradient, and compute `_call` in channels first.
    """

    names: tuple[str, ...]
    constants: tuple[str, ...] = ()  # operands that get no gradient
    channels_last = False  # in memory

    def __init__(self, case: Any, arrays: Arrays, setting: Setting):
        import torch

        set_precision(setting.precision)
        dtype = getattr(torch, PRECISIONS[setting.precision][0])
        layout = torch.contiguous_format
        if self.channels_last:
            layout = torch.channels_last
        tensors = {}
        for name in ("cotangent", *self.names):
            if name in arrays:
                tensor = torch.from_numpy(arrays[name])
                if tensor.dim() == 4:
                    order = (3, 2, 0, 1) if name == "kernel" else (0, 3, 1, 2)
                    tensor = tensor.permute(order)
                    tensor = tensor.contiguous(memory_format=layout)
                tensors[name] = tensor.to(setting.device, dtype)
        self._cotangent = tensors.pop("cotangent")
        self._tensors, self._case = tensors, case
        self._sources = [n for n in tensors if n not in self.constants]
        for name in self._sources:
            tensors[name].requires_grad_()

    def _call(self) -> Any:
        raise NotImplementedError

    def _array(self, name: str, tensor: Any) -> np.ndarray:
        """Returns channels last, as this package has it; filters last."""
        order = (2, 3, 1, 0) if name == "kernel" else (0, 2, 3, 1)
        return tensor.detach().permute(order).float().cpu().numpy()

    def forward(self) -> Any:
        import torch

        with torch.no_grad():
            return self._call()

    def both(self) -> Any:
        import torch

        sources = [self._tensors[name] for name in self._sources]
        return torch.autograd.grad(self._call(), sources, self._cotangent)

    def outputs(self) -> np.ndarray:
        return self._array("output", self.forward())

    def gradients(self, kind: str = "both") -> Arrays:
        named = zip(self._sources, self.both(), strict=True)
        return {name: self._array(name, tensor) for name, tensor in named}


class _Torchvision(_Torch):
    """Runs an operator of torchvision; there is none in bfloat16."""

    def __init__(self, case: Any, arrays: Arrays, setting: Setting):
        if setting.precision == "bfloat16":
            raise Unsupported("bfloat16")
        if reason := no_torchvision():
            raise Unsupported(f"this installation ({reason})")
        if setting.precision == "float16":
            # torchvision computes coordinates and sums in 16 bits.
            self.agreement = "shown"
        super().__init__(case, arrays, setting)


class TorchvisionConv(_Torchvision):
    """Runs `torchvision.ops.deform_conv2d`: the same operator.

    It orders the channels of offsets and masks in the same way.
    """

    names = ("inputs", "kernel", "offset", "mask")

    def _call(self) -> Any:
        import torchvision

        (top, _), (left, _) = self._case.padding
        return torchvision.ops.deform_conv2d(
            self._tensors["inputs"],
            self._tensors["offset"],
            self._tensors["kernel"],
            stride=self._case.strides,
            padding=(top, left),
            dilation=self._case.dilation_rate,
            mask=self._tensors.get("mask"),
        )


class PlainConv(_Torch):
    """Runs cuDNN: `torch.nn.functional.conv2d`, channels last."""

    names = ("inputs", "kernel")
    deformable = False
    channels_last = True

    def _call(self) -> Any:
        import torch

        (top, _), (left, _) = self._case.padding
        return torch.nn.functional.conv2d(
            self._tensors["inputs"],
            self._tensors["kernel"],
            stride=self._case.strides,
            padding=(top, left),
            dilation=self._case.dilation_rate,
            groups=self._case.groups,
        )


class TorchvisionPooling(_Torchvision):
    """Runs torchvision's `ps_roi_align` or `roi_align`: no displacements."""

    names = ("inputs", "rois")
    constants = ("rois",)

    def __init__(self, case: Any, arrays: Arrays, setting: Setting):
        super().__init__(case, arrays, setting)
        if case.operator == "psroi" or case.num_classes:
            self.agreement = "none"

    def _call(self) -> Any:
        from torchvision import ops

        psroi = self._case.operator == "psroi"
        return (ops.ps_roi_align if psroi else ops.roi_align)(
            self._tensors["inputs"],
            self._tensors["rois"],
            self._case.pooled,
            spatial_scale=1 / roi_pooling.STRIDE,
            sampling_ratio=self._case.samples,
            **({} if psroi else {"aligned": True}),
        )


# The functions below are about PyTorch itself.


def set_precision(precision: str) -> None:
    """Tells PyTorch, cuBLAS and cuDNN whether they may use tf32."""
    import torch

    allow_tf32 = PRECISIONS[precision][1]
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cudnn.benchmark = True


@functools.cache
def no_torchvision() -> str | None:
    """Returns the reason why torchvision cannot be used, or None."""
    try:
        from torchvision import extension

        extension._assert_has_ops()
    except Exception as error:
        return first_line(error)
    return None


def describe(device: str) -> dict[str, Any]:
    """Returns the GPU and the versions.

    Raises:
        RuntimeError: if PyTorch sees no GPU.
    """
    import torch

    versions = machine.versions(("torch", "torchvision", "numpy"))
    found: dict[str, Any] = {"gpu": "none (emulated)", "capability": "9.0"}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda_of_torch": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"machine": found, "versions": versions}


def peaks(device: str, clock: HostClock) -> dict[str, float]:
    """Returns TFLOP/s of a large matrix product through PyTorch."""
    import torch

    size = PEAK_SIZE[device]
    result = {}
    for precision, (dtype, _) in PRECISIONS.items():
        set_precision(precision)
        one, two = (
            torch.randn(size, size, device=device).to(getattr(torch, dtype))
            for _ in range(2)
        )
        calls = {precision: functools.partial(torch.matmul, one, two)}
        samples = take_turns(clock.samplers(calls), 10)
        median = statistics.median(samples[precision])
        result[precision] = 2 * size**3 / median / 1e9
    return result


_PACKAGES = ("torch",)
CONV = dataclasses.replace(
    convolution.SUITE,
    operands=ConvOperands,
    contenders={
        "tf_deform": (TfDeform, _PACKAGES),
        "torchvision": (TorchvisionConv, _PACKAGES),
        "cudnn, plain": (PlainConv, _PACKAGES),
    },
    shapes=(
        "64x14x14x512->512",
        "8x28x28x512->512",
        "8x56x56x256->256",
        "2x100x168x256->256",
    ),
    # This shape is small enough for emulated kernels.
    quick_shapes=("2x5x7x8->12,s2,og2",),
    ratio_to="cudnn, plain",
    peers=(("torchvision",),),
    repeats=30,
    memory_repeats=0,
    oracle=Core,
)
# ROI pooling has no matrix product that tf32 could round.
POOLING = dataclasses.replace(
    roi_pooling.SUITE,
    operands=PoolingOperands,
    contenders={
        "tf_deform": (TfDeform, _PACKAGES),
        "torchvision": (TorchvisionPooling, _PACKAGES),
    },
    shapes=(
        "psroi:2x38x63x1029->300x7x7x21",
        "psroi:2x38x63x1029->300x7x7x21,c1",
        "psroi:2x38x63x1029->300x7x7x21,c21",
        "psroi:2x38x63x1029->2000x7x7x21",
        "psroi:2x38x63x1029->2000x7x7x21,c1",
        "psroi:2x38x63x1029->2000x7x7x21,c21",
        "align:2x50x64x256->512x7x7x256",
        "align:2x50x64x256->512x7x7x256,c1",
    ),
    quick_shapes=(
        "psroi:2x11x13x54->9x3x3x6,c2,s2",
        "align:2x11x13x6->9x3x3x6",
    ),
    peers=(("torchvision",),),
    repeats=30,
    memory_repeats=0,
    oracle=Core,
)
SUITES: dict[str, Suite] = {"conv": CONV, "roi": POOLING}
