# SPDX-License-Identifier: Apache-2.0
"""Tests both pooling ops' CUDA kernels, on a GPU or emulated: see gpu.py.

The tests of the core that are imported here run once more, on the kernels.
Behaviour of only one of the ops is tested in the op's own file.
"""

import core
import gpu
import numpy as np
import pooling
import pooling_core_test
import pytest
from compare import Tolerance, assert_close, assert_same_bits
from operands import draw_rois
from pairwise import grid
from pooling import DTYPES, PSROI_POOL, ROI_ALIGN, results
from pooling_core_test import (
    CLASS_EDGES,
    RATIOS,
    draw,
    draw_crowd,
    op,
    test_16_bit_types_are_summed_in_float32_and_rounded_once,
    test_a_roi_does_not_depend_on_the_others,
    test_each_bin_and_class_reads_its_own_displacement,
    test_empty,
    test_every_place_at_once,
    test_far_corners_and_large_sizes_keep_their_order_of_operations,
    test_huge_corners_give_what_the_formula_gives,
    test_padding_and_rois_that_are_not_finite_touch_nothing,
    test_value_and_slope_at_a_place,
    test_values_that_are_not_finite_show_where_they_are_read,
)
from tolerances import HALF_UNIT


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    return request.param


@pytest.fixture
def misaligned():
    return False


@pytest.fixture
def runner(op, deterministic, misaligned):
    """Returns the object that runs the op, whose scratch is bounded."""
    on = gpu.Gpu(deterministic=deterministic, misaligned=misaligned)
    yield pooling.Runner(op, on)
    assert max(on.used, default=0) <= 64 << 20


def check_against_cpu(runner, operands, attributes, dtype) -> None:
    """Compares with the CPU's core, which is faster than the reference.

    Two results that were rounded to 16 bits may differ by one unit.
    """
    exact = core.rounded(operands, dtype)
    common = dict(dtype=dtype, **attributes)
    received = results(runner, exact, **common)
    expected = results(pooling.Runner(runner.op), exact, **common)
    assert received.keys() == expected.keys()
    of_largest = 1e-11 if dtype == "float64" else 2e-6
    for name, array in received.items():
        unit = 0 if name == "displacement" else 2 * HALF_UNIT.get(dtype, 0)
        assert_close(
            array,
            expected[name],
            Tolerance(of_largest, at_least=1, of_each=1.01 * unit),
            case=f"{dtype} {attributes}",
            name=name,
        )


@grid(
    {
        "op": pooling.OPS,
        "seed, misaligned": [(seed, seed % 3 == 0) for seed in range(40)],
        "dtype": DTYPES,
        "deterministic": [False, True],
    }
)
def test_agrees_with_reference(runner, seed, dtype):
    operands, attributes = runner.op.draw_call(seed)
    pooling.check(runner, operands, attributes, dtype)


CHANNELS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65]
CHANNELS += [127, 128, 129, 130, 255, 257, 511, 512, 513, 1024, 1025]


# Channels around 16 bytes, in full packs or not, and around the threads of a
# block.
@grid(
    {
        "op, per_class, classes, group_size": [
            (PSROI_POOL, channels, 1, group_size)
            for group_size in (1, (2, 1))
            for channels in sorted({*CHANNELS, 6, 24})
        ]
        + CLASS_EDGES
        + [(ROI_ALIGN, channels, 1, None) for channels in CHANNELS],
        "dtype": DTYPES,
        "misaligned": [False, True],
        "deterministic": [False, True],
    }
)
def test_channels(runner, per_class, classes, group_size, dtype):
    channels = per_class * classes
    sizes = dict(size=(4, 5), channels=channels, classes=classes)
    operands, attributes = draw(
        runner.op, channels, group_size=group_size, **sizes
    )
    check_against_cpu(runner, operands, attributes, dtype)


# Sizes around the bins, tiles of pixels and ROIs of a block.
@grid(
    {
        "op": pooling.OPS,
        "num_rois": [1, 2, 31, 32, 33, 300],
        "dtype": DTYPES,
        "deterministic": [False, True],
    }
)
def test_many_rois(runner, num_rois, dtype):
    crowd, attributes = draw_crowd(runner.op, num_rois, num_rois, dtype)
    check_against_cpu(runner, crowd, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4, 8), (5, 9), (13, 17)])
def test_tiles_of_pixels(runner, size, dtype):
    operands, attributes = draw(runner.op, 0, size=size, channels=6, num_rois=9)
    check_against_cpu(runner, operands, attributes, dtype)


# Samples around the size of a window of taps, from one row of pixels to samples
# that are many pixels apart; for ROIAlign also a number that follows from the
# ROI's size.
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("op", "samples"),
    [(op, n) for op in pooling.OPS for n in [1, 7, 8, 9, 15, 16, 17, 40]]
    + [(ROI_ALIGN, 0)],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 40), (9, 16), (200, 17)])
def test_samples(runner, samples, size, dtype):
    sizes = dict(size=size, channels=4, classes=2, num_rois=8)
    sizes |= dict(sample_per_part=samples, sampling_ratio=samples)
    operands, attributes = draw(runner.op, samples, pooled_size=(1, 2), **sizes)
    check_against_cpu(runner, operands, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "channels", "group_size"),
    [(PSROI_POOL, 21, 1), (PSROI_POOL, 21, (3, 4)), (ROI_ALIGN, 40, None)],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True], indirect=True)
def test_each_result_is_the_same_alone_and_again(
    runner, channels, group_size, dtype
):
    sizes = dict(size=(19, 23), channels=channels, classes=3, num_rois=40)
    sizes |= dict(group_size=group_size, part_size=(2, 1))
    operands, attributes = draw(
        runner.op, 1, sample_per_part=9, sampling_ratio=9, **sizes
    )
    exact = core.rounded(operands, dtype)
    common = dict(dtype=dtype, **attributes)
    pooling.check_alone(runner, exact, **common)
    expected = results(runner, exact, **common)
    if gpu.ON_GPU:
        for turn in range(5):
            again = results(runner, exact, **common)
            assert_same_bits(again, expected, f"turn {turn}")
        return
    displacement = "displacement"
    atomic = pooling.Runner(runner.op, gpu.Gpu())
    with gpu.opposite_order():
        again = results(runner, exact, **common)
        atomic = atomic.backward(*exact, wanted=(displacement,), **common)
    assert_same_bits(again, expected, "threads in the opposite order")
    assert_same_bits(atomic, {displacement: expected[displacement]}, "atomic")


# Sums in another order may differ by a rounding of the type.
ONE_ROUNDING = {
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 2**-9,
    "bfloat16": 2**-7,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "more"), [(PSROI_POOL, dict(output_dim=3)), *RATIOS], ids=str
)
def test_bad_batch_indices_are_padding(runner, more, dtype):
    """Tests that such ROIs give zeros and read nothing out of bounds."""
    bad = [2, 3, 1e9, 1e30, np.inf, -np.inf, np.nan, 0.5, 1.5, -0.5, -1]
    rois = np.zeros((len(bad) + 2, 5))
    rois[:, 3:] = 3
    rois[1:-1, 0] = bad
    rois[-1, 0] = 1
    rng = np.random.default_rng(0)
    outputs = (len(rois), 2, 2, more.get("output_dim", 12))
    exact = core.rounded(
        (
            rng.normal(size=(2, 4, 5, 12)),
            rois,
            rng.normal(size=(len(rois), 2, 2, 2)),
            rng.normal(size=outputs),
        ),
        dtype,
    )
    good = [exact[0], *(array[[0, -1]] for array in exact[1:])]
    common = dict(dtype=dtype, spatial_scale=1.0, pooled_size=2, **more)
    received = results(runner, exact, **common)
    expected = results(runner, good, **common)
    inputs, wanted = received.pop("inputs"), expected.pop("inputs")
    for name, array in received.items():
        assert not array[1:-1].any(), name
    ends = {name: array[[0, -1]] for name, array in received.items()}
    assert_same_bits(ends, expected)
    np.testing.assert_allclose(
        np.float64(inputs),
        np.float64(wanted),
        rtol=ONE_ROUNDING[dtype],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "op, num_rois, bins, channels, dtype",
    [
        (PSROI_POOL, 50, (5, 6), 512, "float32"),
        (ROI_ALIGN, 30, (2, 1), 1024, "float16"),
    ],
    ids=str,
)
def test_more_images_than_the_workspace_holds(
    runner, num_rois, bins, channels, dtype, deterministic
):
    """Tests three images of 24 MiB, repacked or summed up two at a time."""
    op, rng, size = runner.op, np.random.default_rng(0), (78, 79)
    attributes = dict(spatial_scale=0.5, pooled_size=bins, group_size=(1, 2))
    attributes |= dict(part_size=1, sample_per_part=1, sampling_ratio=1)
    attributes = op.attributes(channels, **attributes)
    inputs, _, displacement, output = op.shapes(
        attributes, 3, size, num_rois, channels=channels
    )
    operands = (
        rng.random(inputs, np.float32) - 0.5,
        draw_rois(rng, 3, size, 0.5, num_rois),
        rng.normal(size=displacement),
        rng.normal(size=output),
    )
    check_against_cpu(runner, operands, attributes, dtype)
    if op.counts or not deterministic:
        assert runner.on.used[-1] == 2 * 4 * np.prod(inputs[1:])


# No gradient of the inputs is computed, so both settings run the same code.
@pytest.mark.parametrize(
    "deterministic",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    indirect=True,
)
def test_more_elements_than_32_bits_can_count(runner):
    pooling_core_test.test_more_elements_than_32_bits_can_count(runner)
