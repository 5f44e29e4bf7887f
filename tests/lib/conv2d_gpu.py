# SPDX-License-Identifier: Apache-2.0
"""Calls deformable convolution's CUDA kernels: see gpu.py."""

from collections.abc import Iterable
from typing import Any

import core
import gpu
import numpy as np
from core_conv2d import NAMES

OP = "DeformableConv2D"


def _prepare(operands, dtype, attributes, misaligned):
    *arrays, output_grad = operands
    stored, params, _ = core._prepare(*arrays, dtype, output_grad, attributes)
    tensors = gpu.Tensors(misaligned)
    return tensors, [tensors.of(array) for array in stored], params


def forward(
    operands: Iterable,
    dtype: str,
    attributes: dict,
    misaligned: bool = False,
    **stream: Any,
) -> np.ndarray:
    """Returns the output. The operands are those of both passes."""
    tensors, given, params = _prepare(operands, dtype, attributes, misaligned)
    output = tensors.made(
        (params.batch, params.out_h, params.out_w, params.filters), dtype
    )
    pointers = gpu.pointers(core.Pointers, given)
    gpu.forward(OP, params, dtype, pointers, [output], **stream)
    return gpu.values(output, dtype)


def backward(
    operands: Iterable,
    dtype: str,
    attributes: dict,
    wanted: tuple[str, ...] = NAMES,
    misaligned: bool = False,
    **stream: Any,
) -> dict[str, np.ndarray]:
    """Returns the wanted gradients by name; a missing mask has no gradient."""
    tensors, given, params = _prepare(operands, dtype, attributes, misaligned)
    coordinates = "float64" if dtype == "float64" else "float32"
    kinds = dict(
        zip(NAMES, (dtype, dtype, coordinates, coordinates), strict=True)
    )
    made = {
        name: tensors.made(tensor.shape, kinds[name])
        for name, tensor in zip(NAMES, given, strict=True)
        if name in wanted and tensor is not None
    }
    gpu.backward(
        OP,
        params,
        dtype,
        gpu.pointers(core.Pointers, given),
        tensors.of(core._stored(operands[4], dtype)),
        gpu.pointers(core.Pointers, map(made.get, NAMES)),
        **stream,
    )
    return {
        name: gpu.values(tensor, kinds[name]) for name, tensor in made.items()
    }


def results(
    operands: Iterable, dtype: str, attributes: dict, **options: Any
) -> dict[str, np.ndarray]:
    """Returns the output and all gradients by name."""
    return {
        "output": forward(operands, dtype, attributes, **options),
        **backward(operands, dtype, attributes, **options),
    }
