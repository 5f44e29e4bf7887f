# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution's CUDA kernels, on a GPU or emulated: see gpu.py."""

import ctypes

import core
import gpu
import numpy as np
import pytest
import reference
from deformable_conv2d_core_test import (
    NAMES,
    TOLERANCES,
    assert_close,
    random_case,
    rounded,
)

OP = "TfDeformDeformableConv2DCuda"
DTYPES = tuple(TOLERANCES)
# Products of float32 operands that are rounded to 11 bits.
TF32 = 4e-3


def prepare(operands, dtype, attributes, misaligned):
    *arrays, grad_output = operands
    stored, params, coordinates = core._prepare(
        *arrays, dtype, grad_output, attributes
    )
    size = stored[0].dtype.itemsize if misaligned else 0
    tensors = [
        None if array is None else gpu.Tensor(array, offset=size)
        for array in stored
    ]
    pointers = core.Pointers(
        *(None if t is None else t.pointer for t in tensors)
    )
    return tensors, pointers, params, coordinates


def widened(tensor, dtype):
    array = tensor.numpy()
    return core.from_bfloat16(array) if dtype == "bfloat16" else array


def stored_dtype(dtype):
    return np.uint16 if dtype == "bfloat16" else dtype


def forward(operands, dtype, attributes, misaligned=False, **stream):
    tensors, pointers, params, _ = prepare(
        operands, dtype, attributes, misaligned
    )
    output = gpu.Tensor(
        shape=(params.batch, params.out_h, params.out_w, params.filters),
        dtype=stored_dtype(dtype),
        offset=np.dtype(stored_dtype(dtype)).itemsize if misaligned else 0,
    )
    number = core.DTYPES[dtype]
    size = gpu.workspace_bytes(
        f"{OP}WorkspaceBytes", ctypes.byref(params), number
    )
    workspace = gpu.workspace(size)
    gpu.call(
        f"{OP}Forward",
        [
            ctypes.byref(params),
            number,
            ctypes.byref(pointers),
            ctypes.c_void_p(workspace.pointer),
            ctypes.c_void_p(output.pointer),
            ctypes.byref(gpu.stream(**stream)),
        ],
    )
    workspace.numpy()
    return widened(output, dtype)


def backward(
    operands, dtype, attributes, wanted=NAMES, misaligned=False, **stream
):
    tensors, pointers, params, coordinates = prepare(
        operands, dtype, attributes, misaligned
    )
    dtypes = (dtype, dtype, coordinates, coordinates)
    results = {
        name: gpu.Tensor(
            shape=tensor.shape,
            dtype=stored_dtype(kind),
            offset=tensors[0].dtype.itemsize if misaligned else 0,
        )
        for name, tensor, kind in zip(NAMES, tensors, dtypes, strict=True)
        if name in wanted and tensor is not None
    }
    gradients = core.Pointers(
        *(results[n].pointer if n in results else None for n in NAMES)
    )
    gradient = gpu.Tensor(
        core._stored(operands[4], dtype),
        offset=tensors[0].dtype.itemsize if misaligned else 0,
    )
    number = core.DTYPES[dtype]
    options = gpu.stream(**stream)
    size = gpu.workspace_bytes(
        f"{OP}BackwardWorkspaceBytes",
        ctypes.byref(params),
        number,
        ctypes.byref(gradients),
        ctypes.byref(options),
    )
    workspace = gpu.workspace(size)
    gpu.call(
        f"{OP}Backward",
        [
            ctypes.byref(params),
            number,
            ctypes.byref(pointers),
            ctypes.c_void_p(gradient.pointer),
            ctypes.c_void_p(workspace.pointer),
            ctypes.byref(gradients),
            ctypes.byref(options),
        ],
    )
    workspace.numpy()
    kinds = dict(zip(NAMES, dtypes, strict=True))
    return {
        name: widened(tensor, kinds[name]) for name, tensor in results.items()
    }


def check(operands, attributes, dtypes=DTYPES, tolerance=None, **stream):
    for dtype in dtypes:
        exact = rounded(operands, dtype)
        expected = reference.deformable_conv2d(*exact[:4], **attributes)
        gradients = reference.deformable_conv2d_grad(*exact, **attributes)
        output = forward(exact, dtype, attributes, **stream)
        made = backward(exact, dtype, attributes, **stream)
        if tolerance is None:
            assert_close(output, expected, dtype, (dtype, "output"))
        else:
            assert_near(output, expected, tolerance, (dtype, "output"))
        for name, gradient in made.items():
            wanted = getattr(gradients, name)
            if tolerance is None:
                assert_close(gradient, wanted, dtype, (dtype, name))
            else:
                assert_near(gradient, wanted, tolerance, (dtype, name))


def assert_near(received, expected, tolerance, what):
    assert received.shape == expected.shape
    if expected.size:
        error = np.abs(received.astype(float) - expected).max()
        assert error <= tolerance * max(1, np.abs(expected).max()), what


@pytest.mark.parametrize("seed", range(48))
def test_agrees_with_reference(seed):
    operands, attributes = random_case(seed)
    check(operands, attributes, misaligned=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(0, 48, 4))
def test_tf32_agrees_with_reference(seed):
    operands, attributes = random_case(seed)
    check(operands, attributes, ("float32",), TF32, allow_tf32=True)
