# SPDX-License-Identifier: Apache-2.0
"""Calls deformable convolution in the core, and compares by name."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import core
import numpy as np
import reference
from compare import assert_close, assert_same_bits
from tolerances import CORE_CONV2D

NAMES = ("inputs", "kernel", "offset", "mask")
DTYPES = list(CORE_CONV2D)
Operands = Iterable[np.ndarray | None]


def draw_call(seed: int) -> tuple[tuple, dict]:
    """Draws (inputs, kernel, offset, mask, output_grad) and attributes.

    Sizes differ from each other; every eighth case has many channels, every
    ninth many filters, so that all blocks of the core are crossed.
    """
    rng = np.random.default_rng(seed)
    groups, offset_groups = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 4])
    common = int(np.lcm(groups, offset_groups))
    channels = common * int(rng.integers(1, 1 + 40 // common))
    filters = int(groups * rng.integers(1, 20))
    batch = int(rng.integers(0, 4))
    size = tuple(int(n) for n in rng.integers(1, (9, 12)))
    if seed % 8 == 0:
        channels, batch, size = common * (272 // common), 1, (4, 3)
    if seed % 9 == 0:
        filters, batch, size = int(groups * (1026 // groups)), 2, (3, 2)
    kernel_size = tuple(int(n) for n in rng.integers(1, 4, 2))
    padding = [
        "same",
        "valid",
        tuple(
            tuple(int(n) for n in side) for side in rng.integers(0, 4, (2, 2))
        ),
    ][rng.integers(3)]
    attributes = dict(
        strides=tuple(int(n) for n in rng.integers(1, 4, 2)),
        padding=padding,
        dilation_rate=tuple(int(n) for n in rng.integers(1, 3, 2)),
        offset_groups=int(offset_groups),
        boundary=str(rng.choice(["zeros", "clamp"])),
    )
    shapes = [(batch, *size, channels)]
    shapes += [(*kernel_size, channels // groups, filters)]
    try:
        params = core.validate(*shapes, None, **attributes)
    except core.CoreError:  # the kernel does not fit in the image
        attributes["padding"] = "same"
        params = core.validate(*shapes, None, **attributes)
    field = (batch, params.out_h, params.out_w)
    taps = int(offset_groups) * kernel_size[0] * kernel_size[1]
    inputs, kernel = (rng.normal(size=shape) for shape in shapes)
    offset = np.float32(2 * rng.normal(size=(*field, 2 * taps)))
    # Not within 0.01 of an integer, where the slope jumps: roundings of a
    # coordinate in float32 and float64 may fall on different sides.
    offset += np.float32(0.02) * (np.abs(offset - np.round(offset)) < 0.01)
    if offset.size > 20:
        spots = rng.integers(0, offset.size, 5)
        offset.flat[spots] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    mask = rng.normal(size=(*field, taps)) if rng.random() < 0.7 else None
    output_grad = rng.normal(size=(*field, filters))
    return (inputs, kernel, offset.astype(float), mask, output_grad), attributes


def rounded(operands: Operands, dtype: str) -> tuple:
    """Returns operands as the core reads them; the reference reads the same."""
    inputs, kernel, offset, mask, output_grad = operands
    narrow = {
        "float64": lambda a: a,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": lambda a: core.from_bfloat16(core.to_bfloat16(a)),
    }[dtype]
    wide = narrow if dtype == "float64" else np.float32
    return (
        narrow(inputs),
        narrow(kernel),
        offset,
        None if mask is None else wide(mask),
        narrow(output_grad),
    )


def results(exact: Operands, **options: Any) -> dict[str, np.ndarray]:
    """Returns the output and the gradients by name, from the CPU."""
    *given, output_grad = exact
    return {
        "output": core.forward(*given, **options),
        **core.backward(*given, output_grad, **options),
    }


def expected_results(exact: Operands, **attributes: Any) -> dict:
    """Returns the same from the reference, in float64.

    The reference takes longest. Several runs share its results in the folder
    that the environment variable TF_DEFORM_TEST_EXPECTED names, if it is set.
    """
    folder = os.environ.get("TF_DEFORM_TEST_EXPECTED")
    if folder:
        key = hashlib.sha256(repr(sorted(attributes.items())).encode())
        for array in exact:
            if array is not None:
                key.update(repr((array.shape, array.dtype)).encode())
                key.update(np.ascontiguousarray(array))
        path = pathlib.Path(folder, f"{key.hexdigest()}.npz")
        if path.exists():
            with np.load(path) as file:
                return dict(file)
    output, gradients = reference.output_and_gradients(*exact, **attributes)
    expected = {"output": output, **gradients._asdict()}
    if folder:
        made = {k: v for k, v in expected.items() if v is not None}
        np.savez(path, **made)
    return expected


def assert_results_close(
    received: Mapping, expected: Mapping, dtype: str, case: object = ""
) -> None:
    for name, array in received.items():
        assert_close(
            array, expected[name], CORE_CONV2D[dtype], case=case, name=name
        )


def check(operands: Operands, attributes: dict, dtype: str, **options) -> None:
    """Compares output and gradients with the reference."""
    exact = rounded(operands, dtype)
    assert_results_close(
        results(exact, dtype=dtype, **options, **attributes),
        expected_results(exact, **attributes),
        dtype,
        f"{dtype} {attributes}",
    )


def check_threads(
    exact: Operands, threads: tuple[int, ...], **options: Any
) -> None:
    """Compares results of several threads with those of one, by bits."""
    one = results(exact, threads=1, **options)
    for number in threads:
        other = results(exact, threads=number, **options)
        assert_same_bits(other, one, f"{number} threads, {options}")


def check_alone(exact: Operands, **options: Any) -> None:
    """Compares each gradient alone with the same of all gradients, by bits."""
    together = core.backward(*exact, **options)
    for name in together:
        alone = core.backward(*exact, wanted=(name,), **options)
        assert_same_bits(alone, {name: together[name]}, f"{name} alone")
    assert core.backward(*exact, wanted=(), **options) == {}
