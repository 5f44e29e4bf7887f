# SPDX-License-Identifier: Apache-2.0
"""Calls the core's C entry points through ctypes, without TensorFlow.

`library()` loads the shared object named by the environment variable
TF_DEFORM_CORE, or the core of the installed package. An op runs on a device,
here the CPU: `gpu.Gpu` runs the CUDA kernels of the same op.
"""

import ctypes
import functools
import glob
import importlib.util
import os
import shutil
import tempfile
from itertools import zip_longest

import numpy as np

INT64, POINTER = ctypes.c_int64, ctypes.c_void_p
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
PADDINGS = {"valid": 0, "same": 1, "explicit": 2}
BOUNDARIES = {"zeros": 0, "clamp": 1}
MODULATIONS = ("mask", "none", "sigmoid", "2sigmoid")
CONV2D = "DeformableConv2D"
PSROI_POOL = "DeformablePSROIPool"
ROI_ALIGN = "DeformableROIAlign"


class CoreError(ValueError):
    """Is raised for an error that the core reported."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Shape(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int), ("dims", INT64 * 8)]

    @classmethod
    def of(cls, shape):
        """Makes a shape of a tuple; None is an unknown rank or dimension."""
        if shape is None:
            return cls(-1)
        dims = [-1 if dim is None else dim for dim in shape]
        return cls(len(dims), (INT64 * 8)(*dims[:8]))


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Params(ctypes.Structure):
    _fields_ = [
        *_fields(INT64, "stride_h stride_w dilation_h dilation_w"),
        *_fields(INT64, "pad_top pad_bottom pad_left pad_right offset_groups"),
        *_fields(ctypes.c_int, "padding boundary"),
        *_fields(INT64, "modulation"),
        *_fields(INT64, "batch height width channels kernel_h kernel_w"),
        *_fields(INT64, "filters groups out_h out_w"),
    ]


class PSROIPoolParams(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_double, "spatial_scale trans_std"),
        *_fields(INT64, "output_dim pooled_h pooled_w group_h group_w"),
        *_fields(INT64, "part_h part_w sample_per_part"),
        *_fields(INT64, "batch height width channels num_rois num_classes"),
    ]


class ROIAlignParams(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_double, "spatial_scale gamma"),
        *_fields(INT64, "pooled_h pooled_w sampling_ratio"),
        *_fields(INT64, "batch height width channels num_rois"),
    ]


class Pointers(ctypes.Structure):
    """Points to the gradients of the convolution's operands."""

    _fields_ = _fields(POINTER, "inputs kernel offset mask")


class Operands(ctypes.Structure):
    """Points to the convolution's operands, and to memory for its kernel."""

    _fields_ = _fields(POINTER, "inputs kernel offset mask packed")


class ROIOperands(ctypes.Structure):
    """Points to the operands of both pooling ops."""

    _fields_ = _fields(POINTER, "inputs rois displacement")
    _fields_.append(("bad_rois_are_padding", ctypes.c_bool))


class ROIGradients(ctypes.Structure):
    _fields_ = _fields(POINTER, "inputs displacement")


@functools.cache
def library() -> ctypes.CDLL:
    path = os.environ.get("TF_DEFORM_CORE")
    if path is None:
        spec = importlib.util.find_spec("tf_deform")
        found = [
            match
            for folder in (spec.submodule_search_locations if spec else [])
            for match in glob.glob(
                os.path.join(folder, "libtf_deform_core-*.so")
            )
        ]
        if not found:
            raise FileNotFoundError(
                "Expected the core's shared object in the installed package "
                "or in the environment variable TF_DEFORM_CORE. Received: "
                "neither. Run `make install` first."
            )
        path = found[0]
    return ctypes.CDLL(path)


def instruction_set(of: ctypes.CDLL | None = None) -> str:
    """Returns the instruction set that the core uses in this environment."""
    function = (of or library()).TfDeformInstructionSet
    function.restype = ctypes.c_char_p
    return function().decode()


class Array:
    """Holds memory of the CPU: an array, or bytes 0xFF (NaN) with a guard.

    Memory without an array is for the core to write, and begins at a multiple
    of `alignment`, but of no larger number.
    """

    def __init__(self, array=None, *, shape=(), dtype=None, alignment=16):
        if array is None:
            num_bytes = int(np.prod(shape, dtype=np.int64))
            num_bytes *= np.dtype(dtype).itemsize
            memory = np.full(num_bytes + 256, 0xFF, np.uint8)
            start = -memory.ctypes.data % 128 + alignment
            self._guard = memory[start + num_bytes :]
            array = memory[start : start + num_bytes].view(dtype)
            array = array.reshape(shape)
        self._array = array
        self.shape, self.pointer = array.shape, array.ctypes.data

    def numpy(self) -> np.ndarray:
        """Returns what was written; fails if more was written."""
        assert (self._guard == 0xFF).all(), "written past the end"
        return self._array


class Cpu:
    """Runs the ops on the CPU; `used` lists bytes of scratch, call by call."""

    name = "Cpu"
    alignment = 64  # of scratch
    memory = Array

    def __init__(self, library=library):
        self.library = library
        self.used = []

    def __str__(self) -> str:
        return instruction_set(self.library())

    def lend(self, array: np.ndarray):
        """Returns memory with an array, of which no copy is made."""
        return Array(array)

    def executor(self, threads: int):
        """Returns the last argument of an op's entry points."""
        return threads

    def call(self, name: str, *arguments) -> None:
        """Calls an entry point; raises the error that it reports."""
        message = ctypes.create_string_buffer(512)
        function = getattr(self.library(), name)
        code = function(*arguments, message, INT64(len(message)))
        if code != 0:
            raise CoreError(code, message.value.decode())

    def num_bytes(self, name: str, *arguments) -> int:
        function = getattr(self.library(), f"{name}WorkspaceBytes")
        function.restype = INT64
        return function(*arguments)

    def run(self, name: str, sizes, before, after, executor) -> None:
        """Calls an op's entry point with its scratch between its arguments."""
        num_bytes = self.num_bytes(name.removesuffix("Forward"), *sizes)
        self.used.append(num_bytes)
        scratch = self.memory(
            shape=(num_bytes,), dtype=np.uint8, alignment=self.alignment
        )
        self.call(name, *before, _address(scratch), *after, executor)
        scratch.numpy()


@functools.cache
def cpus() -> list[Cpu]:
    """Returns the CPU once with each of its instruction sets, the best first.

    A library chooses its set once, so every other set has a copy of its own. If
    the environment variable TF_DEFORM_MAX_ISA is set, there is one set only.
    """
    variable = "TF_DEFORM_MAX_ISA"
    found = {instruction_set(): Cpu()}
    if variable not in os.environ:
        for isa in ("avx512_bf16", "avx512", "avx2", "baseline"):
            with tempfile.TemporaryDirectory() as folder:
                copy = ctypes.CDLL(shutil.copy(library()._name, folder))
                os.environ[variable] = isa
                name = instruction_set(copy)
                del os.environ[variable]
            found.setdefault(name, Cpu(lambda copy=copy: copy))
    return list(found.values())


def _address(memory) -> POINTER:
    return POINTER(None if memory is None else memory.pointer)


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def _judge(op, params, required, optional):
    """Judges shapes (tuples, None where unknown), and completes `params`.

    None among the optional shapes says that there is no such operand.
    """
    Cpu().call(
        f"TfDeform{op}Validate",
        ctypes.byref(params),
        *(ctypes.byref(Shape.of(shape)) for shape in required),
        *(
            None if shape is None else ctypes.byref(Shape.of(shape))
            for shape in optional
        ),
    )
    return params


def validate(
    inputs,
    kernel,
    offset,
    mask=None,
    grad_output=None,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    offset_groups=1,
    boundary="zeros",
    modulation="mask",
) -> Params:
    """Judges shapes and attributes of the convolution."""
    sides = padding
    if padding in ("valid", "same"):
        sides = ((0, 0), (0, 0))
    else:
        padding = "explicit"
    params = Params(
        *(*_pair(strides), *_pair(dilation_rate), *sides[0], *sides[1]),
        offset_groups,
        PADDINGS[padding],
        BOUNDARIES[boundary],
        MODULATIONS.index(modulation),
    )
    shapes = (inputs, kernel, offset), (mask, grad_output)
    return _judge(CONV2D, params, *shapes)


def _psroi_params(
    *,
    output_dim,
    spatial_scale,
    pooled_size,
    group_size=None,
    part_size=None,
    sample_per_part=4,
    trans_std=0.1,
):
    return PSROIPoolParams(
        *(spatial_scale, trans_std, output_dim, *_pair(pooled_size)),
        *_pair(pooled_size if group_size is None else group_size),
        *_pair(pooled_size if part_size is None else part_size),
        sample_per_part,
    )


def _roi_align_params(
    *, pooled_size, spatial_scale, sampling_ratio=0, gamma=0.1
):
    sizes = (*_pair(pooled_size), sampling_ratio)
    return ROIAlignParams(spatial_scale, gamma, *sizes)


def validate_roi(
    op, inputs, rois, displacement=None, grad_output=None, **attributes
):
    """Judges shapes and attributes of `op`, PSROI_POOL or ROI_ALIGN."""
    make = {PSROI_POOL: _psroi_params, ROI_ALIGN: _roi_align_params}[op]
    optional = (displacement, grad_output)
    return _judge(op, make(**attributes), (inputs, rois), optional)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; returns the bits as uint16."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(array, dtype: str) -> np.ndarray:
    """Returns values as the core reads them from an operand of this type."""
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(array))
    return np.asarray(array, dtype)


def rounded(operands, dtype):
    """Returns a pooling op's operands and gradient as the core reads them."""
    types = (dtype, _kind("rois", dtype), _kind("displacement", dtype), dtype)
    return tuple(
        None if array is None else narrow(array, kind)
        for array, kind in zip(operands, types, strict=True)
    )


def _kind(name: str, dtype: str) -> str:
    """Returns the type of an operand, beside values of type `dtype`."""
    if name in ("inputs", "kernel"):
        return dtype
    return "float64" if dtype == "float64" else "float32"


def _stored(array, dtype: str, on):
    """Returns memory with an operand; memory stays as it is."""
    if array is None or hasattr(array, "pointer"):
        return array
    if dtype == "bfloat16":
        return on.memory(to_bfloat16(array))
    return on.memory(np.ascontiguousarray(array, dtype))


def _written(shape: tuple, dtype: str, on):
    """Returns memory that an op has to write whole."""
    return on.memory(
        shape=shape, dtype=np.uint16 if dtype == "bfloat16" else dtype
    )


def _values(memory, dtype: str) -> np.ndarray:
    array = memory.numpy()
    return from_bfloat16(array) if dtype == "bfloat16" else array


def _pointers(kind: type, memory: dict, **flags):
    return kind(**{k: v.pointer for k, v in memory.items() if v}, **flags)


def _prepare(op, operands, grad_output, dtype, on, attributes):
    """Returns memory of the operands by name, their pointers, parameters."""
    kind = Operands if op == CONV2D else ROIOperands
    names = [name for name, type_ in kind._fields_ if type_ is POINTER]
    names = [name for name in names if name != "packed"]
    memory = {
        name: _stored(array, _kind(name, dtype), on)
        for name, array in zip_longest(names, operands)
    }
    shapes = [x and x.shape for x in memory.values()]
    shapes.append(None if grad_output is None else grad_output.shape)
    flag = "bad_rois_are_padding"
    flags = {flag: attributes.pop(flag)} if flag in attributes else {}
    if op == CONV2D:
        params = validate(*shapes, **attributes)
    else:
        params = validate_roi(op, *shapes, **attributes)
    return memory, _pointers(kind, memory, **flags), params


def run_forward(
    op: str,
    *operands: np.ndarray | Array | None,
    dtype: str = "float32",
    threads: int = 1,
    on: Cpu | None = None,
    return_count: bool = False,
    **attributes,
):
    """Returns the output or, with `return_count`, a pair.

    Optional operands may be left out. `threads` are those of a CPU.
    """
    on = on or Cpu()
    memory, given, params = _prepare(op, operands, None, dtype, on, attributes)
    if op == CONV2D:
        shape = (params.batch, params.out_h, params.out_w, params.filters)
    else:
        channels = params.output_dim if op == PSROI_POOL else params.channels
        shape = (params.num_rois, params.pooled_h, params.pooled_w, channels)
    outputs = [_written(shape, dtype, on)]
    if op == PSROI_POOL:
        count = _written(shape, "float32", on) if return_count else None
        outputs.append(count)
    common = ctypes.byref(params), DTYPES[dtype]
    executor = on.executor(threads)
    on.run(
        f"TfDeform{op}{on.name}Forward",
        (*common, executor) if on.name == "Cpu" else common,
        (*common, ctypes.byref(given)),
        map(_address, outputs),
        executor,
    )
    del memory  # is alive until here
    output = _values(outputs[0], dtype)
    return (output, count.numpy()) if return_count else output


def run_backward(
    op: str,
    *operands: np.ndarray | Array | None,
    dtype: str = "float32",
    threads: int = 1,
    on: Cpu | None = None,
    wanted: tuple[str, ...] = (
        "inputs",
        "kernel",
        "offset",
        "mask",
        "displacement",
    ),
    **attributes,
) -> dict[str, np.ndarray]:
    """Returns the wanted gradients by name, for operands that exist.

    The last of `operands` is the output's gradient.
    """
    *operands, grad_output = operands
    on = on or Cpu()
    memory, given, params = _prepare(
        op, operands, grad_output, dtype, on, attributes
    )
    grad_output = _stored(grad_output, dtype, on)
    kind = Pointers if op == CONV2D else ROIGradients
    made = {
        name: _written(memory[name].shape, _kind(name, dtype), on)
        for name, _ in kind._fields_
        if name in wanted and memory[name] is not None
    }
    gradients = ctypes.byref(_pointers(kind, made))
    common = ctypes.byref(params), DTYPES[dtype]
    executor = on.executor(threads)
    on.run(
        f"TfDeform{op}{on.name}Backward",
        (*common, gradients, executor),
        (*common, ctypes.byref(given), _address(grad_output)),
        (gradients,),
        executor,
    )
    del memory  # is alive until here
    return {k: _values(v, _kind(k, dtype)) for k, v in made.items()}


# The same of the convolution: inputs, kernel, offset, mask, output's gradient.
forward = functools.partial(run_forward, CONV2D)
backward = functools.partial(run_backward, CONV2D)
