# SPDX-License-Identifier: Apache-2.0
"""Tests deformable convolution's CUDA kernels, on a GPU or emulated.

See gpu.py.
"""

import ctypes

import core
import core_conv2d
import gpu
import numpy as np
import pytest
import reference
from compare import Tolerance, assert_close, assert_equal, assert_same_bits
from core_conv2d import (
    DTYPES,
    NAMES,
    draw,
    draw_call,
    rounded,
    split_by_hand,
    with_fields,
)
from pairwise import grid
from tolerances import CORE_CONV2D

# TF32 rounds columns to 11 bits.
TF32 = Tolerance(2**-10, at_least=1)

BRANCH = core.MODULATIONS[1:]  # of operands that a branch predicts


def to_tf32(array):
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def results(exact, dtype, attributes, **options):
    """Returns the output and all gradients; options are those of the GPU."""
    on = gpu.Gpu(**options)
    return core_conv2d.results(exact, dtype=dtype, on=on, **attributes)


def backward(exact, dtype, attributes, wanted=NAMES, **options):
    on = gpu.Gpu(**options)
    common = dict(dtype=dtype, on=on, wanted=wanted, **attributes)
    return core.backward(*exact, **common)


def check(operands, attributes, dtype, allow_tf32=False, **options):
    exact = rounded(operands, dtype)
    if tf32 := dtype == "float32" and allow_tf32:
        # Operands besides columns need no rounding, so that all results but the
        # output and the kernel's gradient stay exact.
        inputs, kernel, offset, mask, output_grad = exact
        exact = inputs, to_tf32(kernel), offset, mask, to_tf32(output_grad)
    expected = core_conv2d.expected_results(exact, **attributes)
    options["allow_tf32"] = allow_tf32
    received = results(exact, dtype, attributes, **options)
    for name, array in received.items():
        loose = tf32 and name in ("output", "kernel")
        assert_close(
            array,
            expected[name],
            TF32 if loose else CORE_CONV2D[dtype],
            case=f"{dtype} {options} {attributes}",
            name=name,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(48))
def test_agrees_with_reference(seed, dtype):
    operands, attributes = draw_call(seed)
    check(operands, attributes, dtype, misaligned=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(0, 48, 4))
def test_tf32_agrees_with_reference(seed):
    operands, attributes = draw_call(seed)
    check(operands, attributes, "float32", allow_tf32=True)


# Pairs a type of operands with whether a GPU may compute with TF32.
TYPES_AND_TF32 = [(dtype, False) for dtype in DTYPES] + [("float32", True)]


# Sizes one below, at, and one past the blocks of pixels (128; 32 or 16 in a
# step of the gradient of the kernel), of channels (128; 32 or 16 in a step) and
# of filters (64, 128, 256), with and without packs of 16 bytes.
@grid(
    {
        "pixels": [1, 31, 33, 127, 128, 129, 257],
        "channels, filters": [
            *((8, 64), (16, 65), (32, 72), (33, 128), (40, 8)),
            *((128, 136), (136, 264)),
        ],
        "dtype, allow_tf32": TYPES_AND_TF32[1:],
    }
)
def test_block_edges(pixels, channels, filters, dtype, allow_tf32):
    operands, attributes = draw(pixels, 1, (1, pixels), channels, filters)
    check(operands, attributes, dtype, allow_tf32=allow_tf32)


# Groups whose channels fill packs, groups whose channels do not, groups too
# small for a product, and offset groups that cut across groups.
@grid(
    {
        "channels, filters, groups, offset_groups": [
            (48, 32, 2, 3),
            (48, 48, 3, 2),
            (64, 16, 1, 8),
            (30, 24, 3, 5),
            (12, 12, 12, 2),
            (6, 24, 6, 1),
            (256, 80, 2, 2),
        ],
        "dtype, allow_tf32": TYPES_AND_TF32,
        "boundary": ["zeros", "clamp"],
    }
)
def test_groups(
    channels, filters, groups, offset_groups, boundary, dtype, allow_tf32
):
    operands, attributes = draw(
        7, 2, (5, 9), channels, filters, (3, 2), groups,
        offset_groups=offset_groups, strides=(1, 2), boundary=boundary,
    )  # fmt: skip
    check(operands, attributes, dtype, allow_tf32=allow_tf32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 20])
def test_deterministic_gradients(dtype, groups):
    operands, attributes = draw(
        3, 3, (6, 23), 40, 40, (3, 3), groups, offset_groups=2
    )
    exact = rounded(operands, dtype)
    made = backward(exact, dtype, attributes, deterministic=True)
    expected = core_conv2d.expected_results(exact, **attributes)
    core_conv2d.assert_results_close(made, expected, dtype)
    if gpu.ON_GPU:  # emulated threads always run in the same order
        again = backward(exact, dtype, attributes, deterministic=True)
        assert_same_bits(again, made, "again")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_channel_wide_image(deterministic, dtype):
    """Tests column -1, which looks like the end of the row before."""
    operands, attributes = draw(5, 2, (7, 1), 3, 2, (2, 2))
    check(operands, attributes, dtype, deterministic=deterministic)


@pytest.mark.skipif(gpu.ON_GPU, reason="a GPU's threads run as they like")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, filters, groups", [(72, 136, 1), (5, 3, 1), (12, 12, 12)]
)
def test_no_barrier_is_missing(dtype, channels, filters, groups):
    """Tests that running the threads in the opposite order changes no bit."""
    operands, attributes = draw(
        1, 2, (9, 15), channels, filters, (2, 3), groups
    )
    call = rounded(operands, dtype), dtype, attributes
    expected = results(*call, deterministic=True)
    with gpu.opposite_order():
        received = results(*call, deterministic=True)
    assert_same_bits(received, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulation", ["mask", "sigmoid"])
def test_only_wanted_gradients(modulation, dtype, deterministic):
    call = draw(2, 2, (4, 7), 24, 16, (3, 3))
    if modulation != "mask":
        call = with_fields(*call, modulation)
    operands, attributes = call
    exact = rounded(operands, dtype)
    together = backward(exact, dtype, attributes, deterministic=deterministic)
    for wanted in ((), *((name,) for name in together)):
        alone = backward(
            exact, dtype, attributes, wanted, deterministic=deterministic
        )
        assert tuple(alone) == wanted
        for name, gradient in alone.items():
            if name == "inputs" and not deterministic:  # summed in any order
                core_conv2d.assert_results_close(alone, together, dtype)
            else:
                assert_same_bits({name: gradient}, {name: together[name]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "batch, size, filters", [(0, (5, 4), 3), (2, (0, 4), 3), (2, (5, 0), 16)]
)
def test_nothing_to_compute(dtype, deterministic, batch, size, filters):
    call = draw(2, batch, size, 8, filters, (3, 3))
    for operands, attributes in (call, with_fields(*call, "sigmoid")):
        check(operands, attributes, dtype, deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", ["inputs", "output_grad"])
def test_not_finite_numbers_are_those_of_the_cpu(name, dtype, boundary, groups):
    """Tests NaN and infinity in each operand, on and beyond edges."""
    rng = np.random.default_rng(9)
    operands, attributes = draw(
        9, 2, (4, 6), 8, 8, (2, 2), groups, boundary=boundary
    )
    offset, mask = operands[2:4]
    offset.flat[::3] = rng.choice(
        [-1, 0, 1, 0.5, -3, 4, 5, np.nan, np.inf, -np.inf],
        offset.flat[::3].size,
    )
    mask.flat[::7] = np.nan
    mask.flat[3::11] = 0
    changed = operands[0 if name == "inputs" else 4]
    changed.flat[[5, 77]] = np.inf, np.nan
    exact = rounded(operands, dtype)
    ours = results(exact, dtype, attributes)
    theirs = core_conv2d.results(exact, dtype=dtype, **attributes)
    assert_equal(np.isnan(ours["output"]), np.isnan(theirs["output"]))
    for gradient in NAMES:
        finite = np.isfinite(theirs[gradient])
        assert_equal(np.isfinite(ours[gradient]), finite, name=gradient)
        assert_close(
            np.where(finite, ours[gradient], 0),
            np.where(finite, theirs[gradient], 0),
            CORE_CONV2D[dtype],
            name=gradient,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulation", BRANCH)
@pytest.mark.parametrize("seed", range(0, 48, 6))
def test_predictions_agree_with_reference(seed, modulation, dtype):
    """Tests displacements that are NaN, infinite, or far outside, too."""
    operands, attributes = with_fields(*draw_call(seed), modulation)
    options = dict(misaligned=seed % 4 == 0, deterministic=seed % 24 < 12)
    check(operands, attributes, dtype, **options)


@pytest.mark.parametrize("modulation", BRANCH)
def test_predictions_with_tf32_agree_with_reference(modulation):
    call = draw(4, 2, (5, 9), 48, 32, (3, 2), 2, offset_groups=3)
    operands, attributes = with_fields(*call, modulation)
    check(operands, attributes, "float32", allow_tf32=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("modulation", BRANCH)
@pytest.mark.parametrize("deterministic", [False, True])
def test_predictions_that_are_not_finite(
    deterministic, modulation, groups, dtype
):
    """Tests NaN and infinity in every operand, against a call with a mask."""
    rng = np.random.default_rng(7)
    operands, attributes = draw(
        9, 2, (4, 6), 8, 8, (2, 2), groups, offset_groups=2
    )
    operands, options = with_fields(operands, attributes, modulation)
    fields = operands[2]
    spots = rng.random(fields.shape) < 0.08
    fields[spots] = rng.choice([np.nan, np.inf, -np.inf, 0], spots.sum())
    operands[0].flat[[5, 77]] = np.inf, np.nan
    operands[4].flat[[3, 90]] = np.nan, -np.inf
    exact = rounded(operands, dtype)
    on = dict(deterministic=deterministic)
    received = results(exact, dtype, options, **on)
    nan = np.isnan(received["output"]).all(-1)
    assert nan.any() and not nan.all()
    expected = split_by_hand(
        lambda exact: results(exact, dtype, attributes, **on), exact, modulation
    )
    core_conv2d.assert_results_close(received, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("filters", [10, 70])
def test_one_prediction_that_is_nan(filters, groups, dtype):
    """Tests the ends of what warps and blocks search."""
    call = draw(1, 2, (11, 13), 10, filters, (3, 3), groups)
    (*operands, _, _), attributes = with_fields(*call, "sigmoid")
    fields = operands[2]
    for spot in (0, 31, 32, 255, 256, 1000, 2047, 2048, fields.size - 1):
        changed = fields.copy()
        changed.flat[spot] = np.nan
        exact = rounded((*operands[:2], changed, None, fields), dtype)[:4]
        output = core.forward(*exact, dtype=dtype, on=gpu.Gpu(), **attributes)
        expected = np.zeros(output.shape, bool)
        expected.reshape(-1, filters)[spot // fields.shape[-1]] = True
        assert_equal(np.isnan(output), expected, case=spot)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 12])
def test_factors_that_are_one_change_no_bit(groups, dtype):
    (*operands, _, output_grad), attributes = draw(
        5, 2, (5, 9), 24, 24, (3, 2), groups, offset_groups=2
    )
    operands = *operands, None, output_grad
    exact = rounded(operands, dtype)
    expected = results(exact, dtype, attributes, deterministic=True)
    for modulation in ("none", "2sigmoid"):
        given, options = with_fields(operands, attributes, modulation)
        exact = rounded(given, dtype)
        received = results(exact, dtype, options, deterministic=True)
        pairs = expected["offset"].shape[-1]
        received["offset"] = received["offset"][..., :pairs]
        assert_same_bits(received, expected, modulation)


@pytest.mark.parametrize(
    "dtype, error", [("float32", 5e-7), ("float64", 1e-15)]
)
@pytest.mark.parametrize("modulation", ["sigmoid", "2sigmoid"])
def test_factors_are_exact(modulation, dtype, error):
    """Tests small factors as well, as a share of each."""
    m = np.float32(np.linspace(-80, 80, 801))
    m = np.stack([0 * m, 0 * m, m], axis=-1).reshape(1, 1, 801, 3)
    one = np.ones((1, 1, 1, 1))
    output = core.forward(
        np.ones((1, 1, 801, 1)), one, m, dtype=dtype, on=gpu.Gpu(),
        modulation=modulation,
    )  # fmt: skip
    factor = (1 + (modulation == "2sigmoid")) / (1 + np.exp(-np.float64(m)))
    assert_close(output[..., 0], factor[..., 2], Tolerance(of_each=error))


@pytest.mark.parametrize(
    "modulation, channels, mask, text",
    [
        ("none", 18, 9, "no `mask`"),
        ("sigmoid", 27, 9, "no `mask`"),
        ("none", 27, None, "18 channels"),
        ("sigmoid", 18, None, "27 channels"),
        ("2sigmoid", 18, None, "27 channels"),
        ("mask", 27, 9, "18 channels"),
        ("of a later release", 27, None, "`modulation` to be 0"),
    ],
)
def test_refuses_other_operands(monkeypatch, modulation, channels, mask, text):
    operands, attributes = draw(0, 1, (4, 5), 2, 3, (3, 3))
    inputs, kernel = operands[:2]
    field = 1, 4, 5
    offset = np.zeros((*field, channels))
    mask = None if mask is None else np.zeros((*field, mask))
    names = *core.MODULATIONS, "of a later release"
    monkeypatch.setattr(core, "MODULATIONS", names)
    with pytest.raises(core.CoreError, match=text):
        core.forward(
            *(inputs, kernel, offset, mask),
            on=gpu.Gpu(),
            modulation=modulation,
            **attributes,
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_wide_blocks(dtype):
    """Tests enough pixels for blocks of 256 filters."""
    operands, attributes = draw(4, 3, (17, 332), 8, 136)
    exact = rounded(operands, dtype)[:4]
    output = core.forward(*exact, dtype=dtype, on=gpu.Gpu(), **attributes)
    expected = reference.deformable_conv2d(*exact, **attributes)
    assert_close(output, expected, CORE_CONV2D[dtype])


def test_images_that_do_not_fit_in_the_workspace():
    """Tests float sums of 16-bit gradients, and columns, in several rounds."""
    operands, attributes = draw(
        6, 2, (2900, 2903), 1, 2, (1, 1), padding="valid", strides=331
    )
    call = rounded(operands, "float16"), "float16", attributes
    made, again = (backward(*call, deterministic=d) for d in (False, True))
    expected = core_conv2d.expected_results(call[0], **attributes)
    core_conv2d.assert_results_close(made, expected, "float16")
    # A pixel gets one sum at most, so that their order has no effect.
    inputs = {"inputs": made["inputs"]}
    assert_same_bits({"inputs": again.pop("inputs")}, inputs, "deterministic")
    core_conv2d.assert_results_close(again, expected, "float16")


def test_columns_that_do_not_fit_in_the_workspace():
    operands, attributes = draw(8, 1, (39, 53), 2048, 8, (2, 2))
    made = [
        backward(operands, "float32", attributes, ("inputs",), **options)
        for options in ({}, {"deterministic": True})
    ]
    core_conv2d.assert_results_close(made[1], made[0], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, filters, groups",
    [
        ((2, 100, 168, 256), 256, 1),
        ((64, 14, 14, 512), 512, 1),
        ((1, 7, 7, 2048), 2048, 1),  # a kernel larger than the workspace
        ((8, 56, 56, 512), 512, 512),
        ((16, 400, 672, 256), 8, 1),  # also gradients of images
    ],
)
def test_workspace_is_bounded(dtype, shape, filters, groups):
    kernel = (3, 3, shape[3] // groups, filters)
    offset = (*shape[:3], 18)
    params = core.validate(shape, kernel, offset, padding="same")
    one = 0
    if dtype in ("float16", "bfloat16"):
        one = 4 * int(np.prod(shape[1:]))  # the float image of one gradient
    on, op = gpu.Gpu(), "TfDeformDeformableConv2DCuda"
    common = ctypes.byref(params), core.DTYPES[dtype]
    wanted = ctypes.byref(core.Pointers(1, 1, 1, None))
    for deterministic in (False, True):
        stream = gpu.Gpu(deterministic=deterministic).executor()
        size = on.num_bytes(f"{op}Backward", *common, wanted, stream)
        image = one if one > 2**26 else min(2**26, shape[0] * one)
        assert size <= 2**26 + image
    assert on.num_bytes(op, *common) == 0


@pytest.mark.skipif(gpu.ON_GPU, reason="counts on memory that is never touched")
@pytest.mark.parametrize("groups", [1, 8])
def test_more_elements_than_32_bits_can_count(groups):
    """Tests corners beyond 2^31 elements.

    Most of the image occupies no memory.
    """
    shape = (1, 3, 89478500, 8)
    pixel = shape[2] - 40
    image = np.zeros(shape, np.float16)  # 4 GB, of which some KB occupy memory
    assert image.size > 2**31
    rng = np.random.default_rng(0)
    image[0, 1:, pixel:] = rng.normal(size=(2, 40, 8))
    kernel = np.float16(rng.normal(size=(2, 2, 8 // groups, 8)))
    attributes = dict(padding="valid", strides=(1, pixel + 2))
    params = core.validate(shape, kernel.shape, None, **attributes)
    field = (1, params.out_h, params.out_w)
    offset = np.float32(rng.integers(2, 15, (*field, 8)) / 16)
    output_grad = np.float16(rng.normal(size=(*field, 8)))
    # The gradient of the inputs is left out: all of it would be written.
    options = dict(dtype="float16", **attributes)
    wanted = dict(wanted=("kernel", "offset"), **options)
    operands = gpu.Gpu().lend(image), kernel, offset, None
    expected, received = (
        {
            "output": core.forward(*operands, on=on, **options),
            **core.backward(*operands, output_grad, on=on, **wanted),
        }
        for on in (core.Cpu(), gpu.Gpu())
    )
    assert np.abs(expected["output"][:, :, -1]).max() > 0.1
    assert np.abs(expected["kernel"]).max() > 0.1
    assert np.abs(expected["offset"]).max() > 0.1
    for name, array in received.items():
        dtype = "float32" if name == "offset" else "float16"
        assert_close(array, expected[name], CORE_CONV2D[dtype], name=name)
