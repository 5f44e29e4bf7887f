# SPDX-License-Identifier: Apache-2.0
"""Calls deformable convolution in the core, and compares by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import core
import numpy as np
import reference
from compare import assert_close, assert_same_bits
from tolerances import CORE_CONV2D

NAMES = ("inputs", "kernel", "offset", "mask")
DTYPES = list(CORE_CONV2D)
Operands = Iterable[np.ndarray | None]


def _ints(array: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, array))


def draw(
    seed: int,
    batch: int,
    size: tuple[int, int],
    channels: int,
    filters: int,
    kernel_size: tuple[int, int] = (1, 1),
    groups: int = 1,
    **attributes: Any,
) -> tuple[tuple, dict]:
    """Draws (inputs, kernel, offset, mask, output_grad), and attributes.

    The padding is "same" if not given. Offsets are exact in all types, mostly
    inside, and no integers: there the slope jumps.
    """
    rng = np.random.default_rng(seed)
    attributes = {"padding": "same", **attributes}
    shapes = [(batch, *size, channels)]
    shapes += [(*kernel_size, channels // groups, filters)]
    params = core.validate(*shapes, None, **attributes)
    field = (batch, params.out_h, params.out_w)
    taps = attributes.get("offset_groups", 1) * kernel_size[0] * kernel_size[1]
    whole = rng.integers(-2, 3, (*field, 2 * taps))
    return (
        rng.normal(size=shapes[0]),
        rng.normal(size=shapes[1]),
        whole + rng.integers(2, 15, whole.shape) / 16,
        rng.normal(size=(*field, taps)),
        rng.normal(size=(*field, filters)),
    ), attributes


def draw_call(seed: int) -> tuple[tuple, dict]:
    """Draws a configuration, and operands as `draw` does.

    Sizes differ from each other; every eighth case has many channels, every
    ninth many filters, so that all blocks of the core are crossed. Offsets
    reach far outside, and a few are huge or not finite.
    """
    rng = np.random.default_rng(seed)
    groups, offset_groups = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 4])
    common = int(np.lcm(groups, offset_groups))
    channels = common * int(rng.integers(1, 1 + 40 // common))
    filters = int(groups * rng.integers(1, 20))
    batch, size = int(rng.integers(0, 4)), _ints(rng.integers(1, (9, 12)))
    if seed % 8 == 0:
        channels, batch, size = common * (272 // common), 1, (4, 3)
    if seed % 9 == 0:
        filters, batch, size = int(groups * (1026 // groups)), 2, (3, 2)
    kernel_size = _ints(rng.integers(1, 4, 2))
    explicit = tuple(map(_ints, rng.integers(0, 4, (2, 2))))
    padding = ["same", "valid", explicit][rng.integers(3)]
    attributes = dict(
        strides=_ints(rng.integers(1, 4, 2)),
        padding=padding,
        dilation_rate=_ints(rng.integers(1, 3, 2)),
        offset_groups=int(offset_groups),
        boundary=str(rng.choice(["zeros", "clamp"])),
    )
    shape = (seed, batch, size, channels, filters, kernel_size, groups)
    try:
        operands, attributes = draw(*shape, **attributes)
    except core.CoreError:  # the kernel does not fit in the image
        operands, attributes = draw(*shape, **attributes | {"padding": "same"})
    inputs, kernel, offset, mask, output_grad = operands
    offset = np.float32(2 * rng.normal(size=offset.shape))
    # Not within 0.01 of an integer: roundings of a coordinate in float32 and
    # float64 may fall on different sides.
    offset += np.float32(0.02) * (np.abs(offset - np.round(offset)) < 0.01)
    if offset.size > 20:
        spots = rng.integers(0, offset.size, 5)
        offset.flat[spots] = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    mask = mask if rng.random() < 0.7 else None
    return (inputs, kernel, offset.astype(float), mask, output_grad), attributes


def with_fields(
    operands: Operands, attributes: dict, modulation: str
) -> tuple[tuple, dict]:
    """Turns operands with a mask into those of a call with `modulation`.

    Behind the offsets stand the mask's numbers, made larger so that sigmoids
    bend, or zeros without a mask. Float32 holds them.
    """
    inputs, kernel, offset, mask, output_grad = operands
    fields = offset
    if modulation != "none":
        if mask is None:
            mask = np.zeros((*offset.shape[:3], offset.shape[3] // 2))
        fields = np.concatenate([offset, np.float32(3 * mask)], axis=-1)
    attributes = attributes | {"modulation": modulation}
    return (inputs, kernel, fields, None, output_grad), attributes


def split_by_hand(
    results_of: Callable[[tuple], Mapping], exact: Operands, modulation: str
) -> dict:
    """Returns the results of a call with `modulation`, from one with a mask.

    `results_of` gives the output and the gradients for operands with a mask.
    """
    inputs, kernel, fields, mask, output_grad = exact
    if modulation == "mask":
        return dict(results_of(exact))
    offset = fields
    if modulation != "none":
        offset, m = np.split(fields, [fields.shape[-1] // 3 * 2], axis=-1)
        sigmoid = 1 / (1 + np.exp(-m.astype(float)))
        largest = 2 if modulation == "2sigmoid" else 1
        mask = largest * sigmoid
    made = dict(results_of((inputs, kernel, offset, mask, output_grad)))
    mask_grad = made.pop("mask", None)
    if modulation != "none":
        m_grad = mask_grad * largest * sigmoid * (1 - sigmoid)
        made["offset"] = np.concatenate([made["offset"], m_grad], axis=-1)
    nan = np.isnan(fields).any(-1, keepdims=True)
    made["output"] = np.where(nan, np.nan, made["output"])
    return made


def rounded(operands: Operands, dtype: str) -> tuple:
    """Returns operands as the core reads them; the reference reads the same.

    Offsets are numbers that float32 holds.
    """
    inputs, kernel, offset, mask, output_grad = operands
    wide = "float64" if dtype == "float64" else "float32"
    return (
        core.narrow(inputs, dtype),
        core.narrow(kernel, dtype),
        offset,
        None if mask is None else core.narrow(mask, wide),
        core.narrow(output_grad, dtype),
    )


def results(exact: Operands, **options: Any) -> dict[str, np.ndarray]:
    """Returns the output and the gradients by name."""
    *given, output_grad = exact
    return {
        "output": core.forward(*given, **options),
        **core.backward(*given, output_grad, **options),
    }


def expected_results(
    exact: Operands, modulation: str = "mask", **attributes: Any
) -> dict:
    """Returns the same from the reference, in float64."""

    def with_mask(exact: Operands) -> dict:
        output, gradients = reference.output_and_gradients(*exact, **attributes)
        return {"output": output, **gradients._asdict()}

    return split_by_hand(with_mask, exact, modulation)


def assert_results_close(
    received: Mapping, expected: Mapping, dtype: str, case: object = ""
) -> None:
    for name, array in received.items():
        assert_close(
            array, expected[name], CORE_CONV2D[dtype], case=case, name=name
        )


def check(operands: Operands, attributes: dict, dtype: str, threads=()) -> None:
    """Compares output and gradients with the reference.

    Does so for every instruction set of the CPU, and compares results of
    several `threads` with those of one by their bits.
    """
    exact = rounded(operands, dtype)
    expected = expected_results(exact, **attributes)
    for on in core.cpus():
        case = f"{on}, {dtype}, {attributes}"
        common = dict(dtype=dtype, on=on, **attributes)
        one = results(exact, **common)
        assert_results_close(one, expected, dtype, case)
        for number in threads:
            other = results(exact, threads=number, **common)
            assert_same_bits(other, one, f"{number} threads, {case}")


def check_alone(exact: Operands, **options: Any) -> None:
    """Compares each gradient alone with the same of all gradients, by bits."""
    for on in core.cpus():
        options["on"] = on
        together = core.backward(*exact, **options)
        for name in together:
            alone = core.backward(*exact, wanted=(name,), **options)
            case = f"{name} alone, {on}"
            assert_same_bits(alone, {name: together[name]}, case)
        assert core.backward(*exact, wanted=(), **options) == {}
