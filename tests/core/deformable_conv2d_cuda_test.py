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


def tensor_of(misaligned, array=None, **kwargs):
    """Aligned to one element only, if wanted."""
    dtype = kwargs.get("dtype") if array is None else array.dtype
    offset = np.dtype(dtype).itemsize if misaligned else 0
    return gpu.Tensor(array, offset=offset, **kwargs)


def prepare(operands, dtype, attributes, misaligned):
    *arrays, grad_output = operands
    stored, params, coordinates = core._prepare(
        *arrays, dtype, grad_output, attributes
    )
    tensors = [
        None if array is None else tensor_of(misaligned, array)
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
    output = tensor_of(
        misaligned,
        shape=(params.batch, params.out_h, params.out_w, params.filters),
        dtype=stored_dtype(dtype),
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
        name: tensor_of(
            misaligned, shape=tensor.shape, dtype=stored_dtype(kind)
        )
        for name, tensor, kind in zip(NAMES, tensors, dtypes, strict=True)
        if name in wanted and tensor is not None
    }
    gradients = core.Pointers(
        *(results[n].pointer if n in results else None for n in NAMES)
    )
    gradient = tensor_of(misaligned, core._stored(operands[4], dtype))
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


def to_tf32(array):
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def check(operands, attributes, dtypes=DTYPES, **stream):
    for dtype in dtypes:
        exact = rounded(operands, dtype)
        tf32 = dtype == "float32" and stream.get("allow_tf32", False)
        if tf32:
            # Numbers that need no rounding: what is multiplied besides
            # columns, so that all but output and kernel stay exact.
            inputs, kernel, offset, mask, grad_output = exact
            exact = inputs, to_tf32(kernel), offset, mask, to_tf32(grad_output)
        expected = reference.deformable_conv2d(*exact[:4], **attributes)
        gradients = reference.deformable_conv2d_grad(*exact, **attributes)
        output = forward(exact, dtype, attributes, **stream)
        made = backward(exact, dtype, attributes, **stream)
        compare = assert_tf32_close if tf32 else assert_close
        compare(output, expected, dtype, (dtype, "output"))
        for name, gradient in made.items():
            compare = assert_close
            if tf32 and name == "kernel":
                compare = assert_tf32_close
            compare(gradient, getattr(gradients, name), dtype, (dtype, name))


def assert_tf32_close(received, expected, dtype, what):
    """Columns are rounded to 11 bits."""
    del dtype
    assert received.shape == expected.shape
    if expected.size:
        error = np.abs(received.astype(float) - expected).max()
        assert error <= 2**-10 * max(1, np.abs(expected).max()), what


@pytest.mark.parametrize("seed", range(48))
def test_agrees_with_reference(seed):
    operands, attributes = random_case(seed)
    check(operands, attributes, misaligned=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(0, 48, 4))
def test_tf32_agrees_with_reference(seed):
    operands, attributes = random_case(seed)
    check(operands, attributes, ("float32",), allow_tf32=True)


def case(
    seed,
    batch,
    size,
    channels,
    filters,
    kernel_size=(1, 1),
    groups=1,
    **attributes,
):
    """Operands whose offsets are exact, no integers, and mostly inside."""
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


# One below, at, and one past the blocks of pixels (128; 32 or 16 of a step of
# the gradient of the kernel), of channels (128; 32 or 16 of a step) and of
# filters (64, 128, 256). In packs of 16 bytes and not.
@pytest.mark.parametrize("pixels", [1, 31, 33, 127, 128, 129, 257])
@pytest.mark.parametrize(
    "channels, filters",
    [(8, 64), (16, 65), (32, 72), (33, 128), (40, 8), (128, 136), (136, 264)],
)
def test_block_edges(pixels, channels, filters):
    operands, attributes = case(pixels, 1, (1, pixels), channels, filters)
    for dtype in ("float32", "float16", "bfloat16"):
        check(operands, attributes, (dtype,))
    check(operands, attributes, ("float32",), allow_tf32=True)


# Groups of channels that come in packs, that do not, and too small for a
# product; offset groups that cut across groups.
@pytest.mark.parametrize(
    "channels, filters, groups, offset_groups",
    [
        (48, 32, 2, 3),
        (48, 48, 3, 2),
        (64, 16, 1, 8),
        (30, 24, 3, 5),
        (12, 12, 12, 2),
        (6, 24, 6, 1),
        (256, 80, 2, 2),
    ],
)
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_groups(channels, filters, groups, offset_groups, boundary):
    operands, attributes = case(
        7, 2, (5, 9), channels, filters, (3, 2), groups,
        offset_groups=offset_groups, strides=(1, 2), boundary=boundary,
    )  # fmt: skip
    check(operands, attributes)
    check(operands, attributes, ("float32",), allow_tf32=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 20])
def test_deterministic_gradients(dtype, groups):
    operands, attributes = case(
        3, 3, (6, 23), 40, 40, (3, 3), groups, offset_groups=2
    )
    exact = rounded(operands, dtype)
    expected = reference.deformable_conv2d_grad(*exact, **attributes)
    made = backward(exact, dtype, attributes, deterministic=True)
    for name, gradient in made.items():
        assert_close(gradient, getattr(expected, name), dtype, name)
    again = backward(exact, dtype, attributes, deterministic=True)
    for name, gradient in made.items():
        assert gradient.tobytes() == again[name].tobytes(), name


def test_one_channel_wide_image():
    """Left corners in column -1 look like the end of the row before."""
    operands, attributes = case(5, 2, (7, 1), 3, 2, (2, 2))
    for deterministic in (False, True):
        check(operands, attributes, deterministic=deterministic)


@pytest.mark.skipif(gpu.ON_GPU, reason="a GPU's threads run as they like")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, filters, groups", [(72, 136, 1), (5, 3, 1), (12, 12, 12)]
)
def test_no_barrier_is_missing(dtype, channels, filters, groups):
    """Threads that run in the opposite order change no bit."""
    operands, attributes = case(
        1, 2, (9, 15), channels, filters, (2, 3), groups
    )
    exact = rounded(operands, dtype)
    results = []
    for backwards in (0, 1):
        gpu.library().TfDeformEmulatedOrder(backwards)
        try:
            made = backward(exact, dtype, attributes, deterministic=True)
            made["output"] = forward(exact, dtype, attributes)
        finally:
            gpu.library().TfDeformEmulatedOrder(0)
        results.append(made)
    for name, gradient in results[0].items():
        assert gradient.tobytes() == results[1][name].tobytes(), name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_wanted_gradients(dtype, deterministic):
    operands, attributes = case(2, 2, (4, 7), 24, 16, (3, 3))
    exact = rounded(operands, dtype)
    together = backward(exact, dtype, attributes, deterministic=deterministic)
    for wanted in ((), ("inputs",), ("kernel",), ("offset",), ("mask",)):
        alone = backward(
            exact, dtype, attributes, wanted, deterministic=deterministic
        )
        assert tuple(alone) == wanted
        for name, gradient in alone.items():
            if name == "inputs" and not deterministic:  # in any order
                assert_close(gradient, together[name], dtype, name)
            else:
                assert gradient.tobytes() == together[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "batch, size, filters", [(0, (5, 4), 3), (2, (0, 4), 3), (2, (5, 0), 16)]
)
def test_nothing_to_compute(dtype, deterministic, batch, size, filters):
    operands, attributes = case(2, batch, size, 8, filters, (3, 3))
    check(operands, attributes, (dtype,), deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
@pytest.mark.parametrize("groups", [1, 8])
def test_not_finite_numbers_are_those_of_the_cpu(dtype, boundary, groups):
    """NaN and infinity in each operand; samples on and outside of edges."""
    rng = np.random.default_rng(9)
    operands, attributes = case(
        9, 2, (4, 6), 8, 8, (2, 2), groups, boundary=boundary
    )
    inputs, kernel, offset, mask, grad_output = operands
    offset.flat[::3] = rng.choice(
        [-1, 0, 1, 0.5, -3, 4, 5, np.nan, np.inf, -np.inf],
        offset.flat[::3].size,
    )
    mask.flat[::7] = np.nan
    mask.flat[3::11] = 0
    for name, array in (("inputs", inputs), ("grad_output", grad_output)):
        changed = array.copy()
        changed.flat[5] = np.inf
        changed.flat[77] = np.nan
        made = [inputs, kernel, offset, mask, grad_output]
        made[0 if name == "inputs" else 4] = changed
        exact = rounded(made, dtype)
        outputs = (
            forward(exact, dtype, attributes),
            core.forward(*exact[:4], dtype=dtype, **attributes),
        )
        np.testing.assert_array_equal(*map(np.isnan, outputs), name)
        ours = backward(exact, dtype, attributes)
        theirs = core.backward(*exact, dtype=dtype, **attributes)
        for gradient in NAMES:
            finite = np.isfinite(theirs[gradient])
            np.testing.assert_array_equal(
                np.isfinite(ours[gradient]), finite, f"{name}: {gradient}"
            )
            assert_close(
                np.where(finite, ours[gradient], 0),
                np.where(finite, theirs[gradient], 0),
                dtype,
                f"{name}: {gradient}",
            )


def test_wide_blocks():
    """Enough pixels for 256 filters a block."""
    operands, attributes = case(4, 3, (17, 332), 8, 136)
    for dtype in ("float16", "bfloat16"):
        exact = rounded(operands, dtype)
        expected = reference.deformable_conv2d(*exact[:4], **attributes)
        output = forward(exact, dtype, attributes)
        assert_close(output, expected, dtype, dtype)


def test_images_that_do_not_fit_in_the_workspace():
    """Float sums of 16-bit gradients, and columns, in several rounds."""
    operands, attributes = case(
        6, 2, (2900, 2903), 1, 2, (1, 1), padding="valid", strides=331
    )
    exact = rounded(operands, "float16")
    expected = reference.deformable_conv2d_grad(*exact, **attributes)
    for deterministic in (False, True):
        made = backward(
            exact, "float16", attributes, deterministic=deterministic
        )
        for name, gradient in made.items():
            wanted = getattr(expected, name)
            assert_close(gradient, wanted, "float16", name)


def test_columns_that_do_not_fit_in_the_workspace():
    operands, attributes = case(8, 1, (39, 53), 2048, 8, (2, 2))
    made = [
        backward(operands, "float32", attributes, ("inputs",), **options)
        for options in ({}, {"deterministic": True})
    ]
    assert_close(made[1]["inputs"], made[0]["inputs"], "float32", "inputs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, filters, groups",
    [
        ((2, 100, 168, 256), 256, 1),
        ((64, 14, 14, 512), 512, 1),
        ((1, 7, 7, 2048), 2048, 1),  # a kernel larger than the workspace
        ((8, 56, 56, 512), 512, 512),
        ((16, 400, 672, 256), 8, 1),  # gradients of images, too
    ],
)
def test_workspace_is_bounded(dtype, shape, filters, groups):
    kernel = (3, 3, shape[3] // groups, filters)
    offset = (*shape[:3], 18)
    params = core.validate(shape, kernel, offset, padding="same")
    one = 0
    if dtype in ("float16", "bfloat16"):
        one = 4 * int(np.prod(shape[1:]))  # the float image of one gradient
    everything = core.Pointers(1, 1, 1, None)
    for deterministic in (False, True):
        options = gpu.stream(deterministic=deterministic)
        size = gpu.workspace_bytes(
            f"{OP}BackwardWorkspaceBytes",
            ctypes.byref(params),
            core.DTYPES[dtype],
            ctypes.byref(everything),
            ctypes.byref(options),
        )
        image = one if one > 2**26 else min(2**26, shape[0] * one)
        assert size <= 2**26 + image
    size = gpu.workspace_bytes(
        f"{OP}WorkspaceBytes", ctypes.byref(params), core.DTYPES[dtype]
    )
    assert size == 0


@pytest.mark.skipif(gpu.ON_GPU, reason="counts on memory that is never touched")
@pytest.mark.parametrize("groups", [1, 8])
def test_more_elements_than_32_bits_can_count(groups):
    """The corners lie beyond 2^31 elements; the image is not all there."""
    shape = (1, 3, 89478500, 8)
    pixel = shape[2] - 40
    image = np.zeros(shape, np.float16)  # 4 GB, of which some KB get real
    assert image.size > 2**31
    rng = np.random.default_rng(0)
    image[0, 1:, pixel:] = rng.normal(size=(2, 40, 8))
    kernel = np.float16(rng.normal(size=(2, 2, 8 // groups, 8)))
    attributes = dict(padding="valid", strides=(1, pixel + 2))
    params = core.validate(shape, kernel.shape, None, **attributes)
    field = (1, params.out_h, params.out_w)
    offset = np.float32(rng.integers(2, 15, (*field, 8)) / 16)
    output = gpu.Tensor(shape=(*field, 8), dtype=np.float16)
    tensors = [gpu.Tensor(kernel), gpu.Tensor(offset)]
    pointers = core.Pointers(
        image.ctypes.data, *(tensor.pointer for tensor in tensors), None
    )
    params_and_type = [ctypes.byref(params), core.DTYPES["float16"]]
    stream = ctypes.byref(gpu.stream())
    gpu.call(
        f"{OP}Forward",
        [
            *(*params_and_type, ctypes.byref(pointers), None),
            *(ctypes.c_void_p(output.pointer), stream),
        ],
    )
    options = dict(dtype="float16", **attributes)
    expected = core.forward(image, kernel, offset, **options)
    assert np.abs(expected[:, :, -1]).max() > 0.1
    assert_close(output.numpy(), np.float64(expected), "float16", "output")

    # Not that of the inputs: all of it would be written.
    grad_output = np.float16(rng.normal(size=(*field, 8)))
    expected = core.backward(
        *(image, kernel, offset, None, grad_output),
        wanted=("kernel", "offset"),
        **options,
    )
    made = {
        name: gpu.Tensor(shape=array.shape, dtype=array.dtype)
        for name, array in expected.items()
    }
    gradients = core.Pointers(
        None, made["kernel"].pointer, made["offset"].pointer, None
    )
    size = gpu.workspace_bytes(
        f"{OP}BackwardWorkspaceBytes",
        *(*params_and_type, ctypes.byref(gradients), stream),
    )
    workspace, gradient = gpu.workspace(size), gpu.Tensor(grad_output)
    gpu.call(
        f"{OP}Backward",
        [
            *(*params_and_type, ctypes.byref(pointers)),
            ctypes.c_void_p(gradient.pointer),
            ctypes.c_void_p(workspace.pointer),
            *(ctypes.byref(gradients), stream),
        ],
    )
    for name, dtype in (("kernel", "float16"), ("offset", "float32")):
        wanted = np.float64(expected[name])
        assert np.abs(wanted).max() > 0.1
        assert_close(made[name].numpy(), wanted, dtype, name)
