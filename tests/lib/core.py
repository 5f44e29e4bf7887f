# SPDX-License-Identifier: Apache-2.0
"""Calls the core's C entry points through ctypes, without TensorFlow.

`library()` loads the shared object named by the environment variable
TF_DEFORM_CORE, or the core of the installed package.
"""

import ctypes
import functools
import glob
import importlib.util
import os

import numpy as np

INT64 = ctypes.c_int64
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
PADDINGS = {"valid": 0, "same": 1, "explicit": 2}
BOUNDARIES = {"zeros": 0, "clamp": 1}


class Shape(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int), ("dims", INT64 * 8)]

    @classmethod
    def of(cls, shape):
        """Makes a shape of a tuple; None is an unknown rank or dimension."""
        if shape is None:
            return cls(-1)
        dims = [-1 if dim is None else dim for dim in shape]
        return cls(len(dims), (INT64 * 8)(*dims[:8]))


class Params(ctypes.Structure):
    _fields_ = [
        *((name, INT64) for name in ("stride_h", "stride_w")),
        *((name, INT64) for name in ("dilation_h", "dilation_w")),
        *((f"pad_{side}", INT64) for side in ("top", "bottom", "left")),
        ("pad_right", INT64),
        ("offset_groups", INT64),
        ("padding", ctypes.c_int),
        ("boundary", ctypes.c_int),
        *((name, INT64) for name in ("batch", "height", "width", "channels")),
        *((name, INT64) for name in ("kernel_h", "kernel_w", "filters")),
        *((name, INT64) for name in ("groups", "out_h", "out_w")),
    ]


class Pointers(ctypes.Structure):
    """Points to inputs, kernel, offset and mask, or to their gradients."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("inputs", "kernel", "offset", "mask")
    ]


class CoreError(ValueError):
    """Is raised for an error that the core reported."""


@functools.cache
def library() -> ctypes.CDLL:
    path = os.environ.get("TF_DEFORM_CORE")
    if path is None:
        spec = importlib.util.find_spec("tf_deform")
        found = [
            match
            for folder in (spec.submodule_search_locations if spec else [])
            for match in glob.glob(os.path.join(folder, "_core*.so"))
        ]
        if not found:
            raise FileNotFoundError(
                "Expected the core's shared object in the installed package "
                "or in the environment variable TF_DEFORM_CORE. Received: "
                "neither. Run `make install` first."
            )
        path = found[0]
    core = ctypes.CDLL(path)
    core.TfDeformInstructionSet.restype = ctypes.c_char_p
    for name in ("WorkspaceBytes", "BackwardWorkspaceBytes"):
        getattr(core, f"TfDeformDeformableConv2DCpu{name}").restype = INT64
    return core


def _check(code: int, message: ctypes.Array) -> None:
    if code != 0:
        raise CoreError(message.value.decode())


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


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
) -> Params:
    """Judges shapes (tuples, None where unknown) and attributes."""
    params = Params()
    params.stride_h, params.stride_w = _pair(strides)
    params.dilation_h, params.dilation_w = _pair(dilation_rate)
    params.offset_groups = offset_groups
    params.boundary = BOUNDARIES[boundary]
    if padding in ("valid", "same"):
        params.padding = PADDINGS[padding]
    else:
        params.padding = PADDINGS["explicit"]
        (
            (params.pad_top, params.pad_bottom),
            (
                params.pad_left,
                params.pad_right,
            ),
        ) = padding
    message = ctypes.create_string_buffer(512)
    optional = [
        None if shape is None else ctypes.byref(Shape.of(shape))
        for shape in (mask, grad_output)
    ]
    code = library().TfDeformDeformableConv2DValidate(
        ctypes.byref(params),
        *(ctypes.byref(Shape.of(s)) for s in (inputs, kernel, offset)),
        *optional,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    return params


def instruction_set() -> str:
    """Returns the instruction set that the core uses in this environment."""
    return library().TfDeformInstructionSet().decode()


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; returns the bits as uint16."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32)


def _stored(array, dtype):
    if array is None:
        return None
    if dtype == "bfloat16":
        return to_bfloat16(array)
    return np.ascontiguousarray(array, dtype)


def _poisoned(shape, dtype):
    """Returns memory that must be overwritten whole.

    Every byte is 0xFF, a NaN.
    """
    storage = np.uint16 if dtype == "bfloat16" else dtype
    array = np.empty(shape, storage)
    array.view(np.uint8 if array.size else storage).fill(255)
    return array


def _workspace(num_bytes: int):
    """Returns aligned scratch, all NaN, and the same with a guard after it."""
    memory = np.full(num_bytes + 128, 0xFF, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:], memory.ctypes.data + start


def _check_guard(memory, num_bytes):
    if not (memory[num_bytes:] == 0xFF).all():
        raise AssertionError("the core wrote past its workspace")


def _pointers(arrays) -> Pointers:
    return Pointers(*(None if a is None else a.ctypes.data for a in arrays))


def _prepare(inputs, kernel, offset, mask, dtype, grad_output, attributes):
    coordinates = "float64" if dtype == "float64" else "float32"
    operands = [
        _stored(inputs, dtype),
        _stored(kernel, dtype),
        _stored(offset, coordinates),
        _stored(mask, coordinates),
    ]
    shapes = [None if array is None else array.shape for array in operands]
    gradient = None if grad_output is None else grad_output.shape
    return operands, validate(*shapes, gradient, **attributes), coordinates


def forward(
    inputs,
    kernel,
    offset,
    mask=None,
    *,
    dtype="float32",
    threads=1,
    **attributes,
) -> np.ndarray:
    operands, params, _ = _prepare(
        inputs, kernel, offset, mask, dtype, None, attributes
    )
    output = _poisoned(
        (params.batch, params.out_h, params.out_w, params.filters), dtype
    )
    core = library()
    num_bytes = core.TfDeformDeformableConv2DCpuWorkspaceBytes(
        ctypes.byref(params), DTYPES[dtype], threads
    )
    memory, address = _workspace(num_bytes)
    message = ctypes.create_string_buffer(512)
    code = core.TfDeformDeformableConv2DCpuForward(
        ctypes.byref(params),
        DTYPES[dtype],
        ctypes.byref(_pointers(operands)),
        ctypes.c_void_p(address),
        ctypes.c_void_p(output.ctypes.data),
        threads,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    _check_guard(memory, num_bytes)
    return from_bfloat16(output) if dtype == "bfloat16" else output


def backward(
    inputs,
    kernel,
    offset,
    mask,
    grad_output,
    *,
    dtype="float32",
    threads=1,
    wanted=("inputs", "kernel", "offset", "mask"),
    **attributes,
) -> dict[str, np.ndarray]:
    """Returns the wanted gradients by name; a missing mask has no gradient."""
    operands, params, coordinates = _prepare(
        inputs, kernel, offset, mask, dtype, grad_output, attributes
    )
    gradient = _stored(grad_output, dtype)
    dtypes = dict(
        inputs=dtype, kernel=dtype, offset=coordinates, mask=coordinates
    )
    results = {
        name: _poisoned(array.shape, dtypes[name])
        for (name, _), array in zip(Pointers._fields_, operands, strict=True)
        if name in wanted and array is not None
    }
    pointers = _pointers([results.get(name) for name, _ in Pointers._fields_])
    core = library()
    num_bytes = core.TfDeformDeformableConv2DCpuBackwardWorkspaceBytes(
        ctypes.byref(params), DTYPES[dtype], ctypes.byref(pointers), threads
    )
    memory, address = _workspace(num_bytes)
    message = ctypes.create_string_buffer(512)
    code = core.TfDeformDeformableConv2DCpuBackward(
        ctypes.byref(params),
        DTYPES[dtype],
        ctypes.byref(_pointers(operands)),
        ctypes.c_void_p(gradient.ctypes.data),
        ctypes.c_void_p(address),
        ctypes.byref(pointers),
        threads,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    _check_guard(memory, num_bytes)
    return {
        name: from_bfloat16(array) if dtypes[name] == "bfloat16" else array
        for name, array in results.items()
    }


# ROI pooling. `op` is "DeformablePSROIPool" or "DeformableROIAlign"; both take
# inputs, rois and, if there are any, displacements (`trans` or `offset`).


class PSROIPoolParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("spatial_scale", "trans_std")),
        ("output_dim", INT64),
        *((name, INT64) for name in ("pooled_h", "pooled_w")),
        *((name, INT64) for name in ("group_h", "group_w")),
        *((name, INT64) for name in ("part_h", "part_w")),
        ("sample_per_part", INT64),
        *((name, INT64) for name in ("batch", "height", "width", "channels")),
        *((name, INT64) for name in ("num_rois", "num_classes")),
    ]


class ROIAlignParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("spatial_scale", "gamma")),
        *((name, INT64) for name in ("pooled_h", "pooled_w")),
        ("sampling_ratio", INT64),
        *((name, INT64) for name in ("batch", "height", "width", "channels")),
        ("num_rois", INT64),
    ]


class ROIOperands(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("inputs", "rois", "displacement")
        ),
        ("bad_rois_are_padding", ctypes.c_bool),
    ]


class ROIGradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("inputs", "displacement")]


@functools.cache
def _roi_function(op: str, name: str):
    function = getattr(library(), f"TfDeform{op}{name}")
    if name.endswith("WorkspaceBytes"):
        function.restype = INT64
    return function


def rounded(operands, dtype):
    """Returns the operands and the gradient as the core reads them."""
    inputs, rois, displacement, output_grad = operands
    narrow = {
        "bfloat16": lambda a: from_bfloat16(to_bfloat16(a)),
        "float16": np.float16,
        "float32": np.float32,
        "float64": np.float64,
    }[dtype]
    wide = np.float64 if dtype == "float64" else np.float32
    return (
        narrow(inputs),
        wide(rois),
        None if displacement is None else wide(displacement),
        narrow(output_grad),
    )


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
    params = PSROIPoolParams(spatial_scale, trans_std, output_dim)
    params.pooled_h, params.pooled_w = _pair(pooled_size)
    params.group_h, params.group_w = _pair(
        pooled_size if group_size is None else group_size
    )
    params.part_h, params.part_w = _pair(
        pooled_size if part_size is None else part_size
    )
    params.sample_per_part = sample_per_part
    return params


def _roi_align_params(
    *, pooled_size, spatial_scale, sampling_ratio=0, gamma=0.1
):
    params = ROIAlignParams(spatial_scale, gamma)
    params.pooled_h, params.pooled_w = _pair(pooled_size)
    params.sampling_ratio = sampling_ratio
    return params


def validate_roi(
    op, inputs, rois, displacement=None, grad_output=None, **attributes
):
    """Judges shapes (tuples, None where unknown) and attributes."""
    params = {
        "DeformablePSROIPool": _psroi_params,
        "DeformableROIAlign": _roi_align_params,
    }[op](**attributes)
    message = ctypes.create_string_buffer(512)
    optional = [
        None if shape is None else ctypes.byref(Shape.of(shape))
        for shape in (displacement, grad_output)
    ]
    code = _roi_function(op, "Validate")(
        ctypes.byref(params),
        ctypes.byref(Shape.of(inputs)),
        ctypes.byref(Shape.of(rois)),
        *optional,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    return params


def _prepare_roi(
    op, inputs, rois, displacement, dtype, grad_output, attributes
):
    coordinates = "float64" if dtype == "float64" else "float32"
    operands = [
        _stored(inputs, dtype),
        _stored(rois, coordinates),
        _stored(displacement, coordinates),
    ]
    shapes = [None if array is None else array.shape for array in operands]
    gradient = None if grad_output is None else grad_output.shape
    attributes = dict(attributes)
    bad_rois_are_padding = attributes.pop("bad_rois_are_padding", False)
    params = validate_roi(op, *shapes, gradient, **attributes)
    pointers = ROIOperands(
        *(None if a is None else a.ctypes.data for a in operands),
        bad_rois_are_padding,
    )
    return operands, pointers, params, coordinates


def forward_roi(
    op,
    inputs,
    rois,
    displacement=None,
    *,
    dtype="float32",
    threads=1,
    return_count=False,
    **attributes,
):
    """Returns the output, or (output, count)."""
    operands, pointers, params, _ = _prepare_roi(
        op, inputs, rois, displacement, dtype, None, attributes
    )
    psroi = op == "DeformablePSROIPool"
    channels = params.output_dim if psroi else params.channels
    shape = (params.num_rois, params.pooled_h, params.pooled_w, channels)
    output = _poisoned(shape, dtype)
    count = _poisoned(shape, "float32") if return_count else None
    num_bytes = _roi_function(op, "CpuWorkspaceBytes")(
        ctypes.byref(params), DTYPES[dtype], threads
    )
    memory, address = _workspace(num_bytes)
    message = ctypes.create_string_buffer(512)
    results = [ctypes.c_void_p(output.ctypes.data)]
    if psroi:
        results.append(
            ctypes.c_void_p(count.ctypes.data if return_count else None)
        )
    code = _roi_function(op, "CpuForward")(
        ctypes.byref(params),
        DTYPES[dtype],
        ctypes.byref(pointers),
        ctypes.c_void_p(address),
        *results,
        threads,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    _check_guard(memory, num_bytes)
    del operands  # kept alive until here
    output = from_bfloat16(output) if dtype == "bfloat16" else output
    return (output, count) if return_count else output


def backward_roi(
    op,
    inputs,
    rois,
    displacement,
    grad_output,
    *,
    dtype="float32",
    threads=1,
    wanted=("inputs", "displacement"),
    **attributes,
) -> dict[str, np.ndarray]:
    """Returns the wanted gradients by name.

    Missing displacements have no gradient.
    """
    operands, pointers, params, coordinates = _prepare_roi(
        op, inputs, rois, displacement, dtype, grad_output, attributes
    )
    gradient = _stored(grad_output, dtype)
    dtypes = dict(inputs=dtype, displacement=coordinates)
    results = {
        name: _poisoned(array.shape, dtypes[name])
        for name, array in (
            ("inputs", operands[0]),
            ("displacement", operands[2]),
        )
        if name in wanted and array is not None
    }
    gradients = ROIGradients(
        **{name: array.ctypes.data for name, array in results.items()}
    )
    num_bytes = _roi_function(op, "CpuBackwardWorkspaceBytes")(
        ctypes.byref(params), DTYPES[dtype], ctypes.byref(gradients), threads
    )
    memory, address = _workspace(num_bytes)
    message = ctypes.create_string_buffer(512)
    code = _roi_function(op, "CpuBackward")(
        ctypes.byref(params),
        DTYPES[dtype],
        ctypes.byref(pointers),
        ctypes.c_void_p(gradient.ctypes.data),
        ctypes.c_void_p(address),
        ctypes.byref(gradients),
        threads,
        message,
        INT64(len(message)),
    )
    _check(code, message)
    _check_guard(memory, num_bytes)
    del operands  # kept alive until here
    return {
        name: from_bfloat16(array) if dtypes[name] == "bfloat16" else array
        for name, array in results.items()
    }
