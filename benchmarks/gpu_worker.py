# SPDX-License-Identifier: Apache-2.0
"""The child process of `gpu_check.py`: compares and times on the GPU.

`gpu_check.py` starts it with a JSON job as its only argument. Every result is
a line of JSON behind `RESULT`, printed as soon as it is known; all else that
it prints is progress. The kernels are called through the core's C entry
points, on PyTorch's tensors and its current stream.

With the device "cpu" the whole of it runs without a GPU, for who changes it:
the kernels are then the emulated ones of `tests/lib/gpu.py`.
"""

import ctypes
import functools
import gc
import importlib.metadata
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "tests", "lib"))

import convolution  # noqa: E402
import core  # noqa: E402
import gpu  # noqa: E402
import numpy as np  # noqa: E402
import roi_pooling  # noqa: E402
from worker import TOLERANCES, summary  # noqa: E402

RESULT = "result: "
# Names of the table: the element type, and whether products of float32 may be
# rounded to tf32.
PRECISIONS = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "float16": ("float16", False),
    "bfloat16": ("bfloat16", False),
}
# Largest difference allowed, in units of the expected root mean square: those
# of the benchmark on the CPU. The mantissas of tf32 and float16 are as long.
ALLOWED = TOLERANCES | {"tf32": TOLERANCES["float16"]}
PASSES = ("forward", "both")

LEAST_REPEATS = 5  # before a row is dropped
SAMPLE_MS = 1.0  # a sample has as many launches as this takes
MOST_LAUNCHES = 200
WARM_UP_S = 0.15  # an idle GPU's clock is low


def affordable_repeats(seconds: float, round_s: float, wanted: int) -> int:
    """How many rounds fit; 0 if that is too few for a median."""
    fitting = wanted if round_s <= 0 else int(seconds / round_s)
    return min(wanted, fitting) if fitting >= LEAST_REPEATS else 0


def parse_case(suite: str, shape: str) -> Any:
    """The case of a shape as `run.py` writes it."""
    module = convolution if suite == "conv" else roi_pooling
    return module.Case.parse(shape, "float32", True)


def flop(suite: str, case: Any, pass_: str) -> int | None:
    """Of the matrix products; None if there are none."""
    if suite != "conv":
        return None
    pixels = math.prod(case.output_shape[:3])
    product = 2 * pixels * case.taps * case.channels // case.groups
    return product * case.filters * (3 if pass_ == "both" else 1)


class Gpu:
    """Where everything runs. Times are those of the GPU, by its events."""

    name = "cuda"
    matmul_size = 8192

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def elapsed_ms(self, call: Callable[[], None], launches: int) -> float:
        """Of all launches, one after the other, until the last is done."""
        import torch

        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def graph(self, call: Callable[[], None]) -> Callable[[], None]:
        """The same work as one CUDA graph: no launch waits for the host."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def describe(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"error": "PyTorch sees no GPU"}
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda_of_torch": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def free(self) -> None:
        import torch

        gc.collect()
        torch.cuda.empty_cache()


class Cpu:
    """In place of a GPU, to try the script: its times mean nothing."""

    name = "cpu"
    matmul_size = 128

    def synchronize(self) -> None:
        pass

    def elapsed_ms(self, call: Callable[[], None], launches: int) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            call()
        return 1e3 * (time.perf_counter() - start)

    def graph(self, call: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no graphs on the CPU")

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none (emulated)", "capability": "9.0"}

    def free(self) -> None:
        gc.collect()


DEVICES = {device.name: device for device in (Gpu(), Cpu())}


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


# Who takes part. A contender is built from operands on the device in float32,
# channels last, which all types of the table can hold; it converts them to its
# own type and layout before anything is timed. `forward` and `both` launch
# their work and return at once; `results` has the output and the gradients,
# channels last again.


class TfDeform:
    """This package's kernels, by the core's C entry points."""

    name = "tf_deform"

    def __init__(
        self, op: str, params: Any, operands: dict, device: Any, precision: str
    ):
        import torch

        dtype, self._allow_tf32 = PRECISIONS[precision]
        self._op, self._params = f"TfDeform{op}Cuda", ctypes.byref(params)
        self._number = core.DTYPES[dtype]
        dtype = getattr(torch, dtype)
        of_type = ("inputs", "kernel", "cotangent")  # the rest are coordinates
        tensors = {
            name: tensor.to(dtype).contiguous() if name in of_type else tensor
            for name, tensor in operands.items()
        }
        self._cotangent = tensors.pop("cotangent")
        self._tensors = tensors
        self._output = torch.empty_like(self._cotangent)
        self._gradients = {
            name: torch.empty_like(tensor)
            for name, tensor in tensors.items()
            if name != "rois"
        }
        pointers = {name: t.data_ptr() for name, t in tensors.items()}
        targets = {name: t.data_ptr() for name, t in self._gradients.items()}
        if op == "DeformableConv2D":
            operand_struct = gradient_struct = core.Pointers
        else:
            operand_struct = core.ROIOperands
            gradient_struct = core.ROIGradients
        self._operands = ctypes.byref(operand_struct(**pointers))
        self._targets = ctypes.byref(gradient_struct(**targets))
        # PS-ROI pooling has a second output, which is not asked for.
        counts = [None] if op == "DeformablePSROIPool" else []
        self._outputs = [ctypes.c_void_p(self._output.data_ptr()), *counts]

        options = gpu.stream(allow_tf32=self._allow_tf32)
        num_bytes = max(
            gpu.workspace_bytes(
                f"{self._op}WorkspaceBytes", self._params, self._number
            ),
            gpu.workspace_bytes(
                f"{self._op}BackwardWorkspaceBytes",
                self._params,
                self._number,
                self._targets,
                ctypes.byref(options),
            ),
        )
        self.workspace_mib = num_bytes / 2**20
        self._memory = torch.empty(
            num_bytes + 256, dtype=torch.uint8, device=device.name
        )
        address = self._memory.data_ptr()
        self._workspace = ctypes.c_void_p(address + -address % 256)

    def forward(self) -> None:
        options = gpu.stream(allow_tf32=self._allow_tf32)
        gpu.call(
            f"{self._op}Forward",
            [
                self._params,
                self._number,
                self._operands,
                self._workspace,
                *self._outputs,
                ctypes.byref(options),
            ],
        )

    def both(self) -> None:
        self.forward()
        options = gpu.stream(allow_tf32=self._allow_tf32)
        gpu.call(
            f"{self._op}Backward",
            [
                self._params,
                self._number,
                self._operands,
                ctypes.c_void_p(self._cotangent.data_ptr()),
                self._workspace,
                self._targets,
                ctypes.byref(options),
            ],
        )

    def results(self) -> dict[str, Any]:
        for tensor in (self._output, *self._gradients.values()):
            tensor.fill_(math.nan)  # what is not written must show
        self._memory.fill_(255)
        self.both()
        return {"output": self._output, **self._gradients}


class Torch:
    """A function of PyTorch or torchvision, with its own gradients.

    Subclasses set `_tensors`, `_cotangent` and `_wanted`, the names of those
    that get a gradient.
    """

    _tensors: dict[str, Any]
    _cotangent: Any
    _wanted: tuple[str, ...] = ("inputs",)

    def _finish(self) -> None:
        for name in self._wanted:
            self._tensors[name].requires_grad_()

    def _call(self) -> Any:
        raise NotImplementedError

    def _last(self, name: str, tensor: Any) -> Any:
        """Channels last, as this package has it; a kernel: filters last."""
        order = (2, 3, 1, 0) if name == "kernel" else (0, 2, 3, 1)
        return tensor.detach().permute(order)

    def forward(self) -> None:
        import torch

        with torch.no_grad():
            self._call()

    def _both(self) -> tuple[Any, tuple]:
        import torch

        output = self._call()
        operands = [self._tensors[name] for name in self._wanted]
        return output, torch.autograd.grad(output, operands, self._cotangent)

    def both(self) -> None:
        self._both()

    def results(self) -> dict[str, Any]:
        output, gradients = self._both()
        named = zip(self._wanted, gradients, strict=True)
        return {"output": self._last("output", output)} | {
            name: self._last(name, gradient) for name, gradient in named
        }


def channels_first(operands: dict, dtype: Any) -> dict[str, Any]:
    """Operands of a convolution as torchvision takes them.

    Offsets and masks have the same order of channels there.
    """
    return {
        name: tensor.permute((3, 2, 0, 1) if name == "kernel" else (0, 3, 1, 2))
        .to(dtype)
        .contiguous()
        for name, tensor in operands.items()
    }


class TorchvisionConv(Torch):
    """`torchvision.ops.deform_conv2d`: the same operator."""

    name = "torchvision"
    _wanted = ("inputs", "kernel", "offset", "mask")

    def __init__(self, case: Any, operands: dict, dtype: Any):
        self._tensors = channels_first(operands, dtype)
        self._cotangent = self._tensors.pop("cotangent")
        self._case = case
        self._finish()

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
            mask=self._tensors["mask"],
        )


class PlainConv(Torch):
    """`torch.nn.functional.conv2d`, channels last: cuDNN's convolution."""

    name = "cudnn, plain"
    _wanted = ("inputs", "kernel")

    def __init__(self, case: Any, operands: dict, dtype: Any):
        import torch

        names = ("inputs", "kernel", "cotangent")
        tensors = channels_first({n: operands[n] for n in names}, dtype)
        self._tensors = {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in tensors.items()
        }
        self._cotangent = self._tensors.pop("cotangent")
        self._case = case
        self._finish()

    def _call(self) -> Any:
        import torch

        (top, _), (left, _) = self._case.padding
        return torch.nn.functional.conv2d(
            self._tensors["inputs"],
            self._tensors["kernel"],
            stride=self._case.strides,
            padding=(top, left),
            dilation=self._case.dilation_rate,
        )


class TorchvisionPooling(Torch):
    """`torchvision.ops.ps_roi_align` or `roi_align`: no displacements."""

    name = "torchvision"

    def __init__(self, case: Any, operands: dict, dtype: Any):
        names = ("inputs", "cotangent")
        self._tensors = {
            name: operands[name].permute(0, 3, 1, 2).to(dtype).contiguous()
            for name in names
        }
        self._cotangent = self._tensors.pop("cotangent")
        self._tensors["rois"] = operands["rois"].to(dtype)
        self._case = case
        self._finish()

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


# The operands of a case, and what all must reproduce.


@functools.cache
def no_torchvision() -> str | None:
    """Why torchvision's operators cannot be used."""
    try:
        from torchvision import extension

        extension._assert_has_ops()
    except Exception as error:
        return first_line(error)
    return None


def cpu_options() -> dict[str, Any]:
    """How this package computes on the CPU what is expected."""
    return {"dtype": "float64", "threads": os.cpu_count() or 1}


def on_device(device: Any, **arrays: np.ndarray) -> dict[str, Any]:
    import torch

    return {
        name: torch.from_numpy(array).to(device.name)
        for name, array in arrays.items()
    }


class Conv:
    """Operands, expected results and contenders of a convolution."""

    def __init__(self, case: Any, device: Any):
        import torch

        arrays = convolution.Operands.random(case)
        # Odd multiples of 1/8: in float16, in which torchvision adds them up,
        # coordinates are then exact too (in images of less than 256 pixels).
        offset = (np.floor(4 * arrays.offset) + 0.5) / 4
        self.case, self._device = case, device
        self._operands = {
            name: torch.from_numpy(np.float32(array)).to(device.name)
            for name, array in (
                ("inputs", arrays.inputs),
                ("kernel", arrays.kernel),
                ("offset", offset),
                ("mask", arrays.mask),
                ("cotangent", arrays.cotangent),
            )
        }
        for name, tensor in self._operands.items():
            if name != "offset":
                self._operands[name] = representable(tensor)
        self._expected: dict[str, dict[str, Any]] = {}

    def contenders(self, precision: str) -> dict[str, Callable[[], Any]]:
        import torch

        dtype = getattr(torch, PRECISIONS[precision][0])
        names = ("inputs", "kernel", "offset", "mask")
        params = core.validate(
            *(tuple(self._operands[name].shape) for name in names),
            strides=self.case.strides,
            padding="same",
            dilation_rate=self.case.dilation_rate,
            offset_groups=self.case.offset_groups,
        )
        makers = {
            TfDeform.name: lambda: TfDeform(
                "DeformableConv2D",
                params,
                self._operands,
                self._device,
                precision,
            ),
            TorchvisionConv.name: lambda: TorchvisionConv(
                self.case, self._operands, dtype
            ),
            PlainConv.name: lambda: PlainConv(self.case, self._operands, dtype),
        }
        if precision == "bfloat16" or no_torchvision():
            del makers[TorchvisionConv.name]
        return makers

    def expected(self, contender: str) -> dict[str, Any] | None:
        """By torchvision in float64; of the plain convolution by PyTorch."""
        import torch

        made_by: Any = TorchvisionConv
        if contender == PlainConv.name:
            made_by = PlainConv
        elif no_torchvision():
            return self._by_the_cpu
        if made_by.name not in self._expected:
            self._expected[made_by.name] = made_by(
                self.case, self._operands, torch.float64
            ).results()
        return self._expected[made_by.name]

    @functools.cached_property
    def _by_the_cpu(self) -> dict[str, Any]:
        *operands, cotangent = (
            tensor.cpu().numpy() for tensor in self._operands.values()
        )
        options = cpu_options() | {
            "strides": self.case.strides,
            "padding": "same",
            "dilation_rate": self.case.dilation_rate,
            "offset_groups": self.case.offset_groups,
        }
        output = core.forward(*operands, **options)
        gradients = core.backward(*operands, cotangent, **options)
        return on_device(self._device, output=output, **gradients)


class Pooling:
    """Operands, expected results and contenders of ROI pooling."""

    def __init__(self, case: Any, device: Any):
        import torch

        arrays = roi_pooling.Operands.random(case)
        self.case, self._device = case, device
        self._operands = {
            name: torch.from_numpy(array).to(device.name)
            for name in ("inputs", "rois", "displacement", "cotangent")
            if (array := getattr(arrays, name)) is not None
        }
        for name in ("inputs", "cotangent"):
            self._operands[name] = representable(self._operands[name])
        self._attributes: dict[str, Any] = {
            "pooled_size": case.pooled,
            "spatial_scale": 1 / roi_pooling.STRIDE,
        }
        if case.operator == "psroi":
            self._op = "DeformablePSROIPool"
            self._attributes |= {
                "output_dim": case.output_dim,
                "group_size": case.group,
                "sample_per_part": case.samples,
                "trans_std": roi_pooling.REACH,
            }
        else:
            self._op = "DeformableROIAlign"
            self._attributes |= {
                "sampling_ratio": case.samples,
                "gamma": roi_pooling.REACH,
            }

    def contenders(self, precision: str) -> dict[str, Callable[[], Any]]:
        import torch

        dtype = getattr(torch, PRECISIONS[precision][0])
        names = ("inputs", "rois", "displacement")
        shapes = [
            tuple(self._operands[name].shape)
            for name in names
            if name in self._operands
        ]
        params = core.validate_roi(self._op, *shapes, **self._attributes)
        makers = {
            TfDeform.name: lambda: TfDeform(
                self._op, params, self._operands, self._device, precision
            ),
            TorchvisionPooling.name: lambda: TorchvisionPooling(
                self.case, self._operands, dtype
            ),
        }
        if precision == "bfloat16" or no_torchvision():
            del makers[TorchvisionPooling.name]
        return makers

    def expected(self, contender: str) -> dict[str, Any] | None:
        """By this package on the CPU, in float64.

        That is what torchvision's roi_align computes too, but not what its
        other operator does, and displacements it does not have.
        """
        psroi = self.case.operator == "psroi"
        if contender != TfDeform.name and (psroi or self.case.num_classes):
            return None
        return self._by_the_cpu

    @functools.cached_property
    def _by_the_cpu(self) -> dict[str, Any]:
        inputs, rois, displacement, cotangent = (
            None if tensor is None else tensor.cpu().numpy()
            for tensor in map(
                self._operands.get,
                ("inputs", "rois", "displacement", "cotangent"),
            )
        )
        options = cpu_options() | self._attributes
        output = core.forward_roi(
            self._op, inputs, rois, displacement, **options
        )
        gradients = core.backward_roi(
            self._op, inputs, rois, displacement, cotangent, **options
        )
        return on_device(self._device, output=output, **gradients)


SUITES = {"conv": Conv, "roi": Pooling}


def representable(tensor: Any) -> Any:
    """Rounded to what bfloat16 and float16 can both hold."""
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        tensor = tensor.to(dtype)
    return tensor.float()


def difference(result: Any, expected: Any) -> float:
    """Largest difference, in units of the expected root mean square."""
    if result.shape != expected.shape:
        raise ValueError(
            f"Expected a result of shape {tuple(expected.shape)}. Received: "
            f"{tuple(result.shape)}"
        )
    expected = expected.double()
    largest = (result.double() - expected).abs().max().item()
    scale = expected.square().mean().sqrt().item()
    # NaN is larger than any bound, and JSON has none.
    return math.inf if math.isnan(largest) else largest / (scale or 1.0)


def compare(contender: Any, expected: dict[str, Any]) -> dict[str, float]:
    """Differences by result: the output, and the operands' gradients."""
    results = contender.results()
    return {
        name: difference(result, expected[name])
        for name, result in results.items()
    }


def wrong(differences: dict[str, float], precision: str) -> str | None:
    """Which results differ by more than allowed."""
    found = [
        f"{name} by {value:.2g}"
        for name, value in differences.items()
        if not value <= ALLOWED[precision]
    ]
    if not found:
        return None
    return f"wrong: differs in {', '.join(found)} of the root mean square"


# Timing.


def take_turns(
    device: Any,
    calls: dict[Any, Callable[[], None]],
    repeats: int,
    seconds: float,
) -> tuple[dict[Any, list[float]], dict[Any, int]]:
    """Milliseconds of a launch, sample by sample, and launches of a sample.

    All take turns in random order. No sample if there is no time.
    """
    started = time.monotonic()
    launches = {}
    while True:  # at least once
        for key, call in calls.items():
            once = device.elapsed_ms(call, 1)
            launches[key] = min(
                MOST_LAUNCHES, max(1, math.ceil(SAMPLE_MS / max(once, 1e-6)))
            )
        if time.monotonic() - started >= WARM_UP_S:
            break
    round_s = 1e-3 * sum(
        device.elapsed_ms(call, launches[key]) for key, call in calls.items()
    )
    left = seconds - (time.monotonic() - started)
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    order = list(calls)
    orders = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(affordable_repeats(left, round_s, repeats)):
            orders.shuffle(order)
            for key in order:
                count = launches[key]
                samples[key].append(
                    device.elapsed_ms(calls[key], count) / count
                )
    finally:
        gc.enable()
    return samples, launches


def graphs(
    device: Any, calls: dict[Any, Callable[[], None]]
) -> tuple[dict[Any, Callable[[], None]], str]:
    """All as CUDA graphs or, if one cannot be, all as they are."""
    try:
        return {key: device.graph(call) for key, call in calls.items()}, "graph"
    except Exception as error:
        print(f"  no CUDA graphs: {first_line(error)}", flush=True)
        device.synchronize()
        return calls, "launches"


def set_precision(precision: str) -> None:
    """What PyTorch, cuBLAS and cuDNN may do."""
    import torch

    allow_tf32 = PRECISIONS[precision][1]
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cudnn.benchmark = True


def run_unit(
    setup: Any, suite: str, precision: str, job: dict[str, Any], seconds: float
) -> list[dict[str, Any]]:
    """Checks and times all contenders of a case; one row for each."""
    device = DEVICES[job["device"]]
    started = time.monotonic()
    set_precision(precision)
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, make in setup.contenders(precision).items():
        differences: dict[str, float] = {}
        error = None
        row = {
            "suite": suite,
            "shape": str(setup.case),
            "precision": precision,
            "contender": name,
            "flop": {pass_: flop(suite, setup.case, pass_) for pass_ in PASSES},
        }
        try:
            contender = make()
            if name == TfDeform.name:
                row["workspace_mib"] = contender.workspace_mib
            expected = setup.expected(name)
            if expected is not None:
                differences = compare(contender, expected)
                # torchvision computes coordinates and sums in 16 bits: how
                # far it is off is shown, and no reason not to time it.
                if name != "torchvision" or precision in ("float32", "tf32"):
                    error = wrong(differences, precision)
            if error is None:
                calls |= {
                    (name, pass_): getattr(contender, pass_) for pass_ in PASSES
                }
        # One contender's failure is its row's, not the run's.
        except Exception as failure:
            error = first_line(failure)
            device.synchronize()  # a dead device ends the process here
        row["difference"] = {
            key: None if math.isinf(value) else value
            for key, value in differences.items()
        }
        row["error"] = error
        rows[name] = row
    if not calls:
        return list(rows.values())
    mode = "launches"
    if not job["eager"]:
        calls, mode = graphs(device, calls)
    left = seconds - (time.monotonic() - started)
    samples, launches = take_turns(device, calls, job["repeats"], left)
    for (name, pass_), times in samples.items():
        rows[name]["mode"] = mode
        if times:
            rows[name][pass_] = summary([1e-3 * ms for ms in times], None)
            rows[name][pass_]["launches"] = launches[name, pass_]
    return list(rows.values())


def peaks(job: dict[str, Any]) -> dict[str, float]:
    """TFLOP/s of a large matrix product through PyTorch, by precision."""
    import torch

    device = DEVICES[job["device"]]
    size = device.matmul_size
    result = {}
    for precision, (dtype, _) in PRECISIONS.items():
        set_precision(precision)
        one, two = (
            torch.randn(size, size, device=device.name).to(
                getattr(torch, dtype)
            )
            for _ in range(2)
        )
        call = functools.partial(torch.matmul, one, two)
        samples, _ = take_turns(device, {precision: call}, 10, 10)
        median = float(np.median(samples[precision]))
        result[precision] = 2 * size**3 / median / 1e9
    return result


def emit(**result: Any) -> None:
    print(RESULT + json.dumps(result), flush=True)


def describe(job: dict[str, Any]) -> None:
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    emit(
        machine=DEVICES[job["device"]].describe(),
        versions=versions,
        no_torchvision=no_torchvision(),
    )


def run_units(job: dict[str, Any]) -> None:
    """Every unit with its share of the time that is left."""
    deadline = time.monotonic() + job["seconds"]
    device = DEVICES[job["device"]]
    setup, of_setup = None, None
    units = [tuple(unit) for unit in job["units"]]
    for index, (suite, shape, precision) in enumerate(units):
        left = deadline - time.monotonic()
        # A unit may take more than its share: others take less.
        seconds = min(left, 3 * left / (len(units) - index))
        if of_setup != (suite, shape):
            setup = None
            device.free()
            setup = SUITES[suite](parse_case(suite, shape), device)
            of_setup = suite, shape
        rows = run_unit(setup, suite, precision, job, seconds)
        device.free()
        emit(unit=[suite, shape, precision], rows=rows)


def run_once(job: dict[str, Any]) -> None:
    """Our kernels alone, after a warm-up: what a profiler looks at."""
    device = DEVICES[job["device"]]
    for suite, shape, precision in job["units"]:
        setup = SUITES[suite](parse_case(suite, shape), device)
        ours = setup.contenders(precision)[TfDeform.name]()
        ours.both()
        device.synchronize()


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["mode"] == "describe":
        describe(job)
    elif job["mode"] == "once":
        run_once(job)
    else:
        if job["peaks"]:
            emit(peaks=peaks(job))
        run_units(job)


if __name__ == "__main__":
    main()
