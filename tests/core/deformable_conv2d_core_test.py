# SPDX-License-Identifier: Apache-2.0
"""Tests deformable convolution in the core, through its C interface."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys

import core
import core_conv2d
import numpy as np
import pytest
from compare import assert_close, assert_equal, assert_same_bits
from core_conv2d import DTYPES, NAMES, draw, draw_call, rounded

every_cpu = pytest.mark.parametrize("on", core.cpus(), ids=str)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(48))
def test_agrees_with_reference_for_any_threads(seed, dtype):
    operands, attributes = draw_call(seed)
    core_conv2d.check(operands, attributes, dtype, threads=(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_every_place_of_a_sample(boundary, dtype):
    """Compares samples on edges and pixels, which the random cases avoid."""
    height, width = 3, 2
    rng = np.random.default_rng(0)
    rows = [-1.25, -1, -0.5, 0, 0.75, 1, 2, 2.5, 3, 3.5]
    columns = [-1.5, -1, -0.25, 0, 0.5, 1, 1.75, 2, 2.25]
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    pixels = np.stack(np.indices((height, width)), -1)
    # An image for every six places, and a kernel of one tap.
    places = places.reshape(-1, height, width, 2)
    batch = len(places)
    assert places.size == 2 * len(rows) * len(columns)
    operands = (
        rng.normal(size=(batch, height, width, 5)),
        rng.normal(size=(1, 1, 5, 4)),
        places - pixels,
        rng.normal(size=(batch, height, width, 1)),
        rng.normal(size=(batch, height, width, 4)),
    )
    core_conv2d.check(operands, {"boundary": boundary}, dtype)


# Sizes one below, at, and one past the blocks of pixels (8 located together in
# float64; 112 for gradients of data, 128 for the kernel, about 500 forward), of
# rows (256), of filters (16, 32, 256, 1024).
@pytest.mark.parametrize(
    "pixels", [1, 7, 8, 9, 13, 14, 15, 111, 112, 113, 127, 128, 129, 503, 505]
)
@pytest.mark.parametrize("channels, filters", [(3, 33), (257, 2), (2, 257)])
def test_block_edges(pixels, channels, filters):
    operands, attributes = draw(pixels, 1, (1, pixels), channels, filters)
    core_conv2d.check(operands, attributes, "float64", threads=(2,))


# Strips of the output, which share out the gradient of the inputs: 4 (the
# least), 8 and 32 (the most) strips an image, one strip an image, and more
# images than are worked on together. `reach` is about how many rows samples lie
# from their pixel; in columns it is a tenth. At 40 most samples belong to
# another strip, and the room for deferred samples is filled many times.
@pytest.mark.parametrize(
    "batch, size, channels, filters, groups, reach",
    [
        (1, (14, 19), 40, 9, 1, 3),
        (3, (57, 11), 24, 8, 4, 3),
        (1, (231, 30), 64, 3, 1, 40),
        (1, (225, 6), 33, 33, 33, 40),
        (5, (40, 17), 32, 64, 32, 40),
        (16, (9, 12), 20, 6, 2, 3),
        (67, (6, 7), 16, 5, 1, 3),
        (1, (2, 90), 40, 9, 1, 3),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strips(batch, size, channels, filters, groups, reach, dtype):
    rng = np.random.default_rng(channels)
    offset = reach * rng.normal(size=(batch, *size, 18))
    offset[..., 1::2] /= 10
    offset += 0.02 * (np.abs(offset - np.round(offset)) < 0.01)
    operands, attributes = draw(
        *(channels, batch, size, channels, filters, (3, 3), groups)
    )
    inputs, kernel, _, mask, output_grad = operands
    operands = (inputs, kernel, np.float32(offset), mask, output_grad)
    core_conv2d.check(operands, attributes, dtype, threads=(2, 3, 7))
    exact = rounded(operands, dtype)
    core_conv2d.check_alone(exact, threads=2, dtype=dtype, **attributes)


def test_many_runs_and_little_room():
    """Defers every sample, in the most and the shortest runs possible.

    The call has two bundles of one group each, 81 taps, and 2 channels in 2
    offset groups.
    """
    rng = np.random.default_rng(0)
    # 15 images leave a strip the least room.
    operands, attributes = draw(
        0, 15, (30, 3), 4, 1200, (9, 9), groups=2, offset_groups=4
    )
    inputs, kernel, offset, _, output_grad = operands
    offset = np.float32(rng.uniform(20.1, 20.9, offset.shape))
    operands = (inputs, kernel, offset, None, output_grad)
    operands = rounded(operands, "float32")
    wanted = dict(wanted=("inputs",), **attributes)
    one, two = (core.backward(*operands, threads=t, **wanted) for t in (1, 2))
    expected = core_conv2d.expected_results(operands, **attributes)
    core_conv2d.assert_results_close(one, expected, "float32")
    assert_same_bits(two, one, "2 threads")


# Groups range from 1 channel (depthwise) to more channels than a block of rows
# holds, in bundles of at most 1024 filters.
@pytest.mark.parametrize(
    "channels, filters, groups",
    [
        (37, 37, 37),
        (300, 600, 300),
        (24, 1200, 24),
        (9, 6, 3),
        (544, 4, 2),
        (4, 2060, 2),
        (2100, 6, 3),
        (1100, 1100, 550),
        (34, 51, 17),
        (64, 96, 2),
        (96, 32, 1),
        (384, 64, 1),
        (320, 2080, 5),
        (31, 33, 1),
        (16, 1025, 1),
        (512, 80, 1),
        (12000, 12000, 12000),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_groups(channels, filters, groups, dtype):
    operands, attributes = draw(
        channels,
        *((2, (3, 5)) if channels < 12000 else (1, (1, 2))),
        *(channels, filters, (3, 2), groups),
        offset_groups=2 if channels % 2 == 0 else 1,
    )
    core_conv2d.check(operands, attributes, dtype, threads=(2, 5))


# Columns and filters of several groups lie side by side in registers.
@every_cpu
@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize("size", [4, 32, 33])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_groups_do_not_mix(size, value, dtype, on):
    (inputs, *others, gradient), attributes = draw(
        *(size, 1, (3, 5), 3 * size, 3 * size, (3, 3), 3), offset_groups=3
    )
    inputs[..., -size:] = gradient[..., -size:] = value
    exact = (inputs, *others, gradient)
    received = core_conv2d.results(exact, dtype=dtype, on=on, **attributes)
    offset = received.pop("offset").reshape(-1, 3, 18)
    mask = received.pop("mask").reshape(-1, 3, 9)
    for name, array in received.items():
        assert np.isfinite(array[..., :-size]).all(), name
    for array in (offset, mask):
        assert np.isfinite(array[:, :2]).all()
        assert not np.isfinite(array[:, 2]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# The gradient of a kernel has a pass of its own if the kernel is large.
@pytest.mark.parametrize("filters", [6, 540])
@pytest.mark.parametrize("batch, threads", [(1, 3), (6, 2)])
def test_each_gradient_is_the_same_alone(dtype, filters, batch, threads):
    operands, attributes = draw(
        0, batch, (9, 11), 62, filters, (3, 3), groups=2, offset_groups=2
    )
    common = dict(dtype=dtype, threads=threads, **attributes)
    core_conv2d.check_alone(operands, **common)


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize("size", [(30, 40), (600, 800)])
@pytest.mark.parametrize(
    "channels, filters, groups, offset_groups",
    [
        (256, 256, 1, 1),
        (256, 8, 1, 1),
        (512, 7, 1, 1),
        (1024, 64, 1, 1),
        (2048, 8, 1, 2048),
        (64, 4096, 64, 1),
        (64, 64, 1, 1),
        (3, 7, 1, 3),
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_scratch_is_bounded(
    threads, dtype, size, channels, filters, groups, offset_groups
):
    """Tests that scratch is at most 4 MiB a worker.

    Both passes need a packed kernel besides, and backward a wide image.
    """
    params = core.validate(
        (2, *size, channels),
        (3, 3, channels // groups, filters),
        None,
        padding="same",
        offset_groups=offset_groups,
    )
    width = 8 if dtype == "float64" else 4
    # Packing rounds columns (filters, or kernel rows) up to a vector.
    vector = 64 // width
    rows = -(-9 * channels // groups // vector) * vector
    transposed = rows * filters * width
    packed = 9 * channels * -(-filters // vector) * vector * width
    narrow = dtype in ("float16", "bfloat16")
    image = size[0] * size[1] * channels * 4 if narrow else 0
    kernel_image = 9 * channels // groups * filters * 4 if narrow else 0
    scratch = threads * (4 << 20) + 4096
    op = "TfDeformDeformableConv2DCpu"
    common = ctypes.byref(params), core.DTYPES[dtype]
    forward = core.Cpu().num_bytes(op, *common, threads)
    assert forward <= scratch + (packed if groups == 1 else 0)
    for names in [(name,) for name in NAMES] + [NAMES]:
        wanted = core.Pointers(**dict.fromkeys(names, 1))
        backward = core.Cpu().num_bytes(
            f"{op}Backward", *common, ctypes.byref(wanted), threads
        )
        extra = transposed if names != ("kernel",) else 0
        extra += max(
            image if "inputs" in names else 0,
            kernel_image if "kernel" in names else 0,
        )
        assert backward <= extra + scratch, names


class KeepingCpu(core.Cpu):
    """Gives the packed kernel memory of its own, outside of the workspace."""

    def num_bytes(self, name, *arguments):
        return super().num_bytes(name, *arguments) - self.packed_bytes

    def run(self, name, sizes, before, after, executor):
        function = getattr(
            core.library(), f"{name.removesuffix('Forward')}PackedBytes"
        )
        function.restype = core.INT64
        self.packed_bytes = function(*sizes[:-1])
        packed = core.Array(
            shape=(self.packed_bytes,), dtype=np.uint8, alignment=64
        )
        before[2]._obj.packed = packed.pointer
        super().run(name, sizes, before, after, executor)
        packed.numpy()


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize("seed", range(16))
def test_packed_kernel_in_memory_of_the_caller(seed, dtype):
    """Tests that it gives the same bits, with guards behind both memories."""
    operands, attributes = draw_call(seed)
    keeping = KeepingCpu()
    for wanted in (("inputs",), ("kernel",), NAMES):
        results = [
            core.backward(
                *operands,
                dtype=dtype,
                threads=3,
                on=on,
                wanted=wanted,
                **attributes,
            )
            for on in (None, keeping)
        ]
        assert_same_bits(*results, case=wanted)
        assert (keeping.packed_bytes > 0) == (wanted != ("kernel",))
    expected, received = (
        core.forward(
            *operands[:-1], dtype=dtype, threads=3, on=on, **attributes
        )
        for on in (None, keeping)
    )
    assert_same_bits({"output": received}, {"output": expected})


def test_large_common_value_does_not_drown_the_slope():
    rng = np.random.default_rng(0)
    operands = (
        1e4 + rng.normal(size=(1, 6, 5, 64)),
        rng.normal(size=(3, 3, 64, 4)) / 24,
        np.float32(rng.uniform(-0.4, 0.4, size=(1, 4, 3, 18))),
        None,
        rng.normal(size=(1, 4, 3, 4)),
    )
    exact = rounded(operands, "float32")
    expected = core_conv2d.expected_results(exact)["offset"]
    received = core.backward(*exact)["offset"]
    assert_close(received, expected, 1e-4, name="offset")


def test_more_elements_than_32_bits_can_count():
    """Tests the last pixels of an image of 2**31 + 4633 elements.

    The memory is allocated, but only pages that are read occupy memory.
    """
    size = 46341
    inputs = np.zeros((1, size, size, 1), np.float16)
    inputs[0, -1, -2:, 0] = [3, 5]
    kernel = np.full((1, 1, 1, 1), 2.0)
    field = (1, 2, 2)
    offset = np.zeros((*field, 2))
    offset[0, -1, -1] = [size - 1, size - 1.25]
    offset[0, -1, -1] -= 23171  # the place of output pixel (1, 1)
    common = dict(dtype="float16", strides=23171)
    output = core.forward(inputs, kernel, offset, **common)
    assert_equal(output.ravel(), [0, 0, 0, 9])
    gradients = core.backward(
        inputs,
        kernel,
        offset,
        None,
        np.ones((*field, 1)),
        wanted=("kernel", "offset"),
        **common,
    )
    assert_equal(gradients["kernel"].ravel(), [4.5])
    # Below is the zero row past the edge; to the right 3 becomes 5.
    assert_equal(gradients["offset"][0, 1, 1], [-9, 4])


@every_cpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_conversions_are_exact(dtype, on):
    """Tests all 65536 values of a 16-bit type, through a 1x1 convolution."""
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(np.float16)
    if dtype == "bfloat16":
        values = core.from_bfloat16(bits)
    values = values[np.isfinite(values)]
    in_bfloat16 = str(on) in ("avx512_bf16", "amx")
    if dtype == "bfloat16" and in_bfloat16:
        # These products treat subnormal numbers as 0.
        values = values[np.abs(values) >= 2.0**-126]
    values = values.reshape(1, 1, -1, 1)
    offset = np.zeros((*values.shape[:3], 2))
    one = np.ones((1, 1, 1, 1))
    with np.errstate(over="ignore"):
        output = core.forward(values, one, offset, dtype=dtype, on=on)
    # All values are finite, so that a neighbour at weight 0 adds 0.
    assert_equal(output, values)


@every_cpu
@pytest.mark.parametrize(
    "dtype, unit", [("float16", 2**-10), ("bfloat16", 2**-7)]
)
def test_rounds_to_nearest_even(dtype, unit, on):
    rng = np.random.default_rng(0)
    inputs = np.float32(rng.normal(size=(1, 1, 4000, 3)))
    inputs *= np.exp2(rng.integers(-20, 17, size=(1, 1, 4000, 1)))
    inputs = core.narrow(inputs / 4, dtype)
    kernel = core.narrow(rng.normal(size=(1, 1, 3, 1)), dtype)
    offset = np.zeros((1, 1, 4000, 2))
    exact = inputs.astype(float)[0, 0] @ kernel.astype(float)[0, 0]
    with np.errstate(over="ignore"):
        expected = core.narrow(np.float32(exact), dtype)
    received = core.forward(inputs, kernel, offset, dtype=dtype, on=on)[0, 0]
    assert np.isclose(received, expected, rtol=unit, atol=2**-24).all()
    assert (received == expected).mean() > 0.99  # except float32 sums


def test_needs_no_tensorflow():
    here = pathlib.Path(__file__).parents[1] / "lib"
    script = (
        "import sys, core, numpy as np;"
        "core.forward(*(np.ones(s) for s in"
        " ((1, 2, 3, 4), (1, 1, 4, 5), (1, 2, 3, 2))));"
        "assert not any('tensorflow' in name for name in sys.modules);"
        "assert 'tensorflow' not in open('/proc/self/maps').read()"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(here)},
        check=True,
    )


UNKNOWN = dict(offset=None, mask=None)
BAD = [
    (dict(offset=(2, 8, 8, 9)), "`offset` to have 18 channels"),
    (dict(offset=(2, None, 8, 9)), "`offset` to have 18 channels"),
    (dict(offset=(2, 8, 9, 18)), "`offset` to have width 8"),
    (dict(mask=(1, 8, 8, 9)), "`mask` to have batch size 2"),
    (dict(mask=(2, 8, 8, 18)), "`mask` to have 9 channels"),
    (dict(inputs=(2, 8, 8)), "`inputs` to have rank 4"),
    (dict(inputs=(None, None, None, 7)), "multiple of the input channels"),
    (dict(kernel=(3, 3, 3, 5)), "multiple of groups, 2"),
    (dict(kernel=(3, 0, 6, 5)), "every dimension of `kernel`"),
    (dict(offset_groups=4), "multiple of offset_groups, 4"),
    (dict(strides=(1, 0)), "`strides`"),
    (dict(dilation_rate=2**62), "`dilation_rate`"),
    (dict(padding="valid", kernel=(9, 3, 6, 5)), "padded height"),
    (dict(grad_output=(2, 8, 8, 6)), "`grad_output`"),
    (dict(inputs=(2**40, 8, 8, 6), **UNKNOWN), None),
    (dict(inputs=(2**62, 8, 8, 6), **UNKNOWN), "`inputs` to hold at most"),
]


@pytest.mark.parametrize("change, text", BAD)
def test_judges_shapes(change, text):
    call = dict(
        inputs=(2, 8, 8, 6),
        kernel=(3, 3, 6, 5),
        offset=(2, 8, 8, 18),
        mask=(2, 8, 8, 9),
        grad_output=None,
        padding="same",
    )
    core.validate(**call)
    call.update(change)
    if text is None:
        core.validate(**call)
        return
    with pytest.raises(core.CoreError) as error:
        core.validate(**call)
    assert text in str(error.value)
    assert re.match("Expected .* Received: ", str(error.value))
