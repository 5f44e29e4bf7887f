# SPDX-License-Identifier: Apache-2.0
"""Tests of `tf_deform.ops.deformable_conv2d`: values and gradients."""

import concurrent.futures

import numpy as np
import oracles
import pytest
import reference
import tensorflow as tf
from compare import assert_close, assert_equal
from every_op import CONV2D, conv2d_call
from operands import BOUNDARIES, DTYPES, Conv2DCase, draw_conv2d_case
from pairwise import grid
from tolerances import ANOTHER_ORDER, FORWARD

from tf_deform.ops import deformable_conv2d


def check_case(case: Conv2DCase, dtype: str) -> None:
    CONV2D.check(conv2d_call(case, dtype), dtype, case)


# Implementations by others.


@pytest.mark.parametrize("seed", range(100, 125))
def test_op_and_reference_equal_onnx_runtime(seed):
    """Tests the reference, too, because other tests rely on it."""
    case = draw_conv2d_case(seed, boundary="zeros", modulation="mask")
    options = case.options
    for name in ("boundary", "modulation"):
        del options[name]  # ONNX has no others.
    for function, dtype, tolerance in (
        (deformable_conv2d, "float32", ANOTHER_ORDER),
        (reference.deformable_conv2d, "float64", 1e-14),
    ):
        operands = case.operands(dtype)
        assert_close(
            function(*operands, **options),
            oracles.onnx_runtime(*operands, **options),
            tolerance,
            case=f"{dtype}, {case}",
        )


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("seed", range(200, 225))
def test_equals_openvino(seed, boundary):
    case = draw_conv2d_case(seed, boundary=boundary, modulation="mask")
    operands, options = case.operands(), case.options
    del options["modulation"]
    actual = deformable_conv2d(*operands, **options)
    expected = oracles.openvino(*operands, **options)
    assert_close(actual, expected, ANOTHER_ORDER, case=case)


EXPLICIT = {
    "same": "SAME",
    "valid": "VALID",
    1: [[0, 0], [1, 1], [1, 1], [0, 0]],
    (2, 0): [[0, 0], [2, 2], [0, 0], [0, 0]],
    ((0, 2), (3, 1)): [[0, 0], [0, 2], [3, 1], [0, 0]],
}


@grid(
    {
        "steps": [
            *((s, 1) for s in [1, 2, 3, 4, (2, 3), (3, 1)]),
            *((1, d) for d in [2, 3, (1, 2), (3, 2)]),
        ],
        "padding": list(EXPLICIT),
        "kernel_size": [(3, 2), (2, 3), (1, 4)],
        "size": [(9, 12), (10, 11)],
        "boundary": BOUNDARIES,
    }
)
def test_zero_offsets_equal_tf_conv2d(
    steps, padding, kernel_size, size, boundary
):
    """Compares with `tf.nn.conv2d`; "same" pads the odd pixel at the end.

    A plain convolution pads with zeros, and so do both boundaries at integer
    coordinates: outside the image, a sample is 0.
    """
    strides, dilation_rate = steps
    case = Conv2DCase(
        size=size,
        kernel_size=kernel_size,
        strides=strides,
        dilation_rate=dilation_rate,
        padding=padding,
        boundary=boundary,
        has_mask=False,
    )
    inputs, kernel, offset = case.operands()
    expected = tf.nn.conv2d(
        inputs,
        kernel,
        strides=strides,
        padding=EXPLICIT[padding],
        dilations=dilation_rate,
    )
    actual = deformable_conv2d(
        inputs, kernel, np.zeros_like(offset), **case.options
    )
    assert_close(actual, expected, ANOTHER_ORDER, case=case)


# Output and every gradient against the float64 reference.


# Sizes around the block sizes that a fast kernel may use.
_SIZES = [
    *[
        dict(channels=n, filters=3, size=(4, 3), kernel_size=(2, 3), seed=n)
        for n in [1, 15, 16, 17, 31, 33, 255, 256, 257]
    ],
    *[
        dict(filters=n, channels=5, size=(4, 3), kernel_size=(2, 3), seed=n)
        for n in [1, 15, 17, 31, 32, 33, 1025]
    ],
    *[
        dict(size=n, batch=batch, channels=5, filters=7, kernel_size=(1, 3))
        # 1, 13, 14, 15, 63, 64, 65, 127 and 129 output pixels.
        for n in [(1, 1), (13, 1), (2, 7), (3, 5), (7, 9), (16, 4), (5, 13)]
        + [(1, 127), (43, 3)]
        for batch in [1, 3]
    ],
    *[
        dict(batch=n, size=(3, 2), kernel_size=(2, 1), seed=n)
        for n in [0, 1, 33]
    ],
]
_GROUPS = [
    dict(channels=channels, filters=filters, groups=g, offset_groups=o)
    for channels, filters, g, o in [
        (12, 6, 3, 4),
        (12, 8, 4, 3),
        (12, 6, 1, 12),
        (12, 24, 12, 1),
        (12, 12, 12, 12),
        (34, 34, 2, 17),
        (99, 6, 3, 3),
    ]
]
_SMALL_MAPS = [
    dict(size=(1, 1), kernel_size=(3, 3)),
    dict(size=(1, 6), kernel_size=(3, 3)),
    dict(size=(6, 1), kernel_size=(3, 3)),
    dict(size=(1, 1), kernel_size=(1, 1), padding="valid"),
    dict(size=(2, 3), kernel_size=(5, 4), padding=((4, 3), (2, 6))),
    dict(size=(5, 4), strides=(7, 9)),
    dict(size=(5, 4), dilation_rate=(6, 11)),
    dict(size=(5, 4), kernel_size=(1, 1), padding=(3, 2)),
]


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *[
            (dtype, settings)
            for dtype in ("float32", "float64", "bfloat16")
            for settings in _SIZES
        ],
        *[
            (dtype, settings)
            for dtype in ("float32", "float64")
            for settings in _GROUPS
        ],
        *[
            ("float32", {**settings, "boundary": boundary})
            for boundary in BOUNDARIES
            for settings in _SMALL_MAPS
        ],
    ],
    ids=str,
)
def test_sizes_and_groups(settings, dtype):
    """Tests blocks, small maps, large steps, all kinds of groups."""
    check_case(Conv2DCase(**settings), dtype)


@grid({"dtype": list(DTYPES), "boundary": BOUNDARIES, "reach": [1, 40]})
def test_many_blocks(reach, boundary, dtype):
    """Tests a map of many blocks in every direction, read near and far."""
    case = Conv2DCase(
        batch=1,
        size=(23, 29),
        channels=38,
        filters=67,
        offset_groups=2,
        kernel_size=(3, 3),
        reach=reach,
        boundary=boundary,
    )
    check_case(case, dtype)


# Types.


def test_float64_coordinates_resolve_what_float32_cannot():
    """Tests a millionth of a pixel, a hundred pixels from the origin."""
    inputs = np.zeros((1, 1, 200, 1))
    inputs[0, 0, 101] = 1e6
    offset = np.zeros((1, 1, 1, 2))
    offset[..., 1] = 100 + 1e-6
    output = deformable_conv2d(
        inputs, np.ones((1, 1, 1, 1)), offset, strides=200
    )
    np.testing.assert_allclose(output.numpy().item(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_inputs_keep_float32_coordinates(dtype):
    """Tests 0.3 pixels, a thousand pixels from the origin."""
    inputs = np.zeros((1, 1, 1100, 1))
    inputs[0, 0, 1001] = 1.0
    offset = np.zeros((1, 1, 1, 2), np.float32)
    offset[..., 1] = 1000.3
    output = deformable_conv2d(
        tf.cast(inputs, dtype),
        tf.ones((1, 1, 1, 1), dtype),
        offset,
        strides=1100,
    )
    expected = np.full((1, 1, 1, 1), 0.3)
    assert_close(output, expected, FORWARD[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_accumulate_in_float32(dtype):
    """Sums 4096 ones; a sum in the 16-bit type would stop growing early."""
    ones = np.ones((1, 1, 1, 4096))
    output = deformable_conv2d(
        tf.cast(ones, dtype),
        tf.cast(np.ones((1, 1, 4096, 1)), dtype),
        np.zeros((1, 1, 1, 2), np.float32),
    )
    assert output.numpy().item() == 4096

    inputs = tf.ones((1, 64, 64, 1), dtype)
    kernel = tf.ones((1, 1, 1, 1), dtype)
    # Every output pixel reads the pixel in the corner.
    rows, cols = np.mgrid[:64, :64].astype(np.float32)
    offset = -np.stack([rows, cols], axis=-1)[np.newaxis]
    given = {"inputs": inputs, "kernel": kernel, "offset": offset}
    _, gradients = CONV2D.results(given, options={})
    assert gradients["inputs"].numpy()[0, 0, 0, 0] == 4096
    assert gradients["kernel"].numpy().item() == 4096


def test_lists_of_integers_may_be_offsets():
    inputs, kernel, offset = Conv2DCase(has_mask=False).operands()
    offset = np.round(offset)
    expected = deformable_conv2d(inputs, kernel, offset, padding="same")
    actual = deformable_conv2d(
        inputs, kernel, offset.astype(int).tolist(), padding="same"
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("form", "padding"),
    [
        (0, "valid"),
        (1, ((1, 1), (1, 1))),
        ((2, 1), ((2, 2), (1, 1))),
        ([[2, 0], [1, 3]], ((2, 0), (1, 3))),
    ],
)
def test_forms_of_padding(form, padding):
    """Other options' forms are tested in `arguments_test.py`."""
    operands = Conv2DCase(padding=padding, has_mask=False).operands()
    assert_equal(
        deformable_conv2d(*operands, padding=form),
        deformable_conv2d(*operands, padding=padding),
    )


@pytest.mark.parametrize(
    ("inputs", "kernel", "offset", "expected"),
    [
        ((2, 9, 8, 12), (3, 2, 12, 5), (2, 7, 7, 12), (2, 7, 7, 5)),
        ((None, 9, 8, 12), (3, 2, 12, 5), (None,) * 4, (None, 7, 7, 5)),
        ((None, 9, 8, 12), (3, 2, 12, 5), (4, 7, 7, 12), (4, 7, 7, 5)),
        ((2, None, 8, 12), (3, 2, 12, 5), (None,) * 4, (2, None, 7, 5)),
        ((2, None, 8, 12), (3, 2, 12, 5), (2, None, 7, 12), (2, None, 7, 5)),
        ((2, 9, 8, 12), (3, 2, 12, None), None, (2, 7, 7, None)),
        ((2, None, None, 12), (3, 2, 12, 5), (2, 3, 6, 12), (2, 3, 6, 5)),
        ((2, 9, 8, None), (3, 2, None, 5), None, (2, 7, 7, 5)),
        ((2, 9, 8, 12), (None,) * 4, None, (2, None, None, None)),
        ((2, 9, 8, 12), None, None, (2, None, None, None)),
        (None, (3, 2, 12, 5), None, (None, None, None, 5)),
        (None, None, None, (None, None, None, None)),
    ],
)
def test_static_output_shape(inputs, kernel, offset, expected):
    with tf.Graph().as_default():
        operands = (
            tf.compat.v1.placeholder(tf.float32, shape)
            for shape in (inputs, kernel, offset)
        )
        assert deformable_conv2d(*operands).shape.as_list() == [*expected]


@pytest.mark.cpu_only(reason="a GPU's kernels do not wait for the pool")
def test_calls_that_wait_for_the_pool():
    """Tests calls that wait while other calls keep the pool's threads busy."""
    rng = np.random.default_rng(0)
    operands = [
        tf.constant(np.float32(rng.normal(size=shape)))
        for shape in ((1, 120, 120, 64), (3, 3, 64, 128), (1, 120, 120, 18))
    ]

    def call(_=None):
        return deformable_conv2d(*operands, padding="same").numpy()

    expected = call()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(call, range(8)):
            assert_equal(result, expected)


def test_calls_of_other_kernels_at_the_same_moment():
    """Tests that no two calls have the memory that one TensorFlow kernel keeps.

    In eager mode calls with equal attributes share a TensorFlow kernel, so its
    memory passes from one size to another, and back.
    """
    rng = np.random.default_rng(0)
    calls = []
    for filters in (64, 64, 64, 200, 200, 8):
        shapes = (2, 30, 20, 16), (3, 3, 16, filters), (2, 30, 20, 18)
        calls.append([np.float32(rng.normal(size=shape)) for shape in shapes])

    def call(index):
        operands = [tf.constant(operand) for operand in calls[index]]
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = deformable_conv2d(*operands, padding="same")
        return [output, *tape.gradient(output, operands)]

    expected = [call(index) for index in range(len(calls))]
    order = rng.integers(len(calls), size=64)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, results in zip(order, pool.map(call, order), strict=True):
            for result, wanted in zip(results, expected[index], strict=True):
                assert_equal(result, wanted, case=f"kernel {index}")
