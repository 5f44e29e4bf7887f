# SPDX-License-Identifier: Apache-2.0
"""Tests of `tf_deform.ops.deformable_conv2d`: values and gradients."""

import concurrent.futures
import dataclasses

import numpy as np
import oracles
import pytest
import reference
import tensorflow as tf
from compare import assert_close, assert_equal, assert_finite_differences
from operands import (
    BOUNDARIES,
    Conv2DCase,
    draw_conv2d_case,
    forward_and_gradients,
)
from pairwise import grid
from tolerances import ANOTHER_ORDER, FORWARD, GRADIENT

from tf_deform.ops import deformable_conv2d

DTYPES = list(FORWARD)
NAMES = ("inputs", "kernel", "offset", "mask")


def results(operands, output_grad, **options):
    """Returns the output, and the gradients of the operands in order."""
    given = dict(zip(NAMES, operands, strict=False))
    output, gradients = forward_and_gradients(
        deformable_conv2d, given, output_grad, **options
    )
    return output, [gradients[name] for name in given]


def check_against_reference(operands, output_grad, dtype, case="", **options):
    """Compares the output and every gradient, in value, shape and dtype."""
    output, gradients = results(operands, output_grad, **options)
    mask = operands[3] if len(operands) == 4 else None
    expected, wanted = reference.output_and_gradients(
        *operands[:3], mask, output_grad, **options
    )
    assert_close(
        output, expected, FORWARD[dtype], case=case, name="output", dtype=dtype
    )
    for name, operand, gradient in zip(
        NAMES, operands, gradients, strict=False
    ):
        assert_close(
            gradient,
            getattr(wanted, name),
            GRADIENT[dtype],
            case=case,
            name=f"gradient of {name}",
            dtype=operand.dtype,
        )


def check_case(case: Conv2DCase, dtype: str) -> None:
    check_against_reference(
        case.operands(dtype),
        case.output_grad(dtype),
        dtype,
        case,
        **case.options,
    )


# Tests of the reference itself, on which other tests rely.


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_onnx_runtime_in_float64(seed):
    case = draw_conv2d_case(seed, boundary="zeros")
    operands = case.operands("float64")
    options = case.options
    expected = reference.deformable_conv2d(*operands, **options)
    del options["boundary"]  # ONNX has only "zeros".
    actual = oracles.onnx_runtime(*operands, **options)
    assert_close(actual, expected, 1e-14, case=case)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "case",
    [
        Conv2DCase(
            strides=(1, 2), dilation_rate=(2, 1), padding=((1, 0), (2, 1))
        ),
        Conv2DCase(strides=2, groups=2, offset_groups=3),
        Conv2DCase(padding="valid", offset_groups=2, has_mask=False),
    ],
)
def test_reference_gradients_equal_finite_differences(case, boundary):
    options = {**case.options, "boundary": boundary}
    operands = case.operands("float64")
    output_grad = case.output_grad("float64")
    mask = operands[3] if case.has_mask else None
    gradients = reference.deformable_conv2d_grad(
        *operands[:3], mask, output_grad, **options
    )

    def loss() -> float:
        output = reference.deformable_conv2d(*operands, **options)
        return np.sum(output * output_grad)

    rng = np.random.default_rng(case.seed)
    for name, operand in zip(NAMES, operands, strict=False):
        assert_finite_differences(
            rng,
            loss,
            operand,
            getattr(gradients, name),
            name=name,
            how_many=10,
        )


# The forward pass against implementations by others.


@pytest.mark.parametrize("seed", range(100, 125))
def test_equals_onnx_runtime(seed):
    case = draw_conv2d_case(seed, boundary="zeros")
    operands, options = case.operands(), case.options
    actual = deformable_conv2d(*operands, **options)
    del options["boundary"]  # ONNX has only "zeros".
    expected = oracles.onnx_runtime(*operands, **options)
    assert_close(actual, expected, ANOTHER_ORDER, case=case)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("seed", range(200, 225))
def test_equals_openvino(seed, boundary):
    case = draw_conv2d_case(seed, boundary=boundary)
    operands, options = case.operands(), case.options
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 320))
def test_random_configurations(seed, dtype):
    check_case(draw_conv2d_case(seed), dtype)


def _one_size_at_a_time() -> list[Conv2DCase]:
    """Yields sizes around the block sizes that a fast kernel may use."""
    sizes = [1, 15, 16, 17, 31, 33, 255, 256, 257]
    cases = [
        Conv2DCase(
            channels=n, filters=3, size=(4, 3), kernel_size=(2, 3), seed=n
        )
        for n in sizes
    ]
    sizes = [1, 15, 17, 31, 32, 33, 1025]
    cases += [
        Conv2DCase(
            filters=n, channels=5, size=(4, 3), kernel_size=(2, 3), seed=n
        )
        for n in sizes
    ]
    # 1, 13, 14, 15, 63, 64, 65, 127 and 129 output pixels.
    sizes = [(1, 1), (13, 1), (2, 7), (3, 5), (7, 9), (16, 4), (5, 13)]
    sizes += [(1, 127), (43, 3)]
    cases += [
        Conv2DCase(
            size=n, batch=batch, channels=5, filters=7, kernel_size=(1, 3)
        )
        for n in sizes
        for batch in [1, 3]
    ]
    cases += [
        Conv2DCase(batch=n, size=(3, 2), kernel_size=(2, 1), seed=n)
        for n in [0, 1, 33]
    ]
    return cases


def case_id(case: Conv2DCase) -> str:
    """Names a case by what differs from the default."""
    return "-".join(
        f"{field.name}={getattr(case, field.name)}"
        for field in dataclasses.fields(case)
        if field.name != "seed" and getattr(case, field.name) != field.default
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", _one_size_at_a_time(), ids=case_id)
def test_sizes(case, dtype):
    check_case(case, dtype)


@grid({"dtype": DTYPES, "boundary": BOUNDARIES, "reach": [1, 40]})
def test_many_blocks(reach, boundary, dtype):
    """Tests a map of many blocks in every direction, read near and far."""
    case = Conv2DCase(
        size=(23, 29),
        channels=38,
        filters=67,
        offset_groups=2,
        kernel_size=(3, 3),
        reach=reach,
        boundary=boundary,
    )
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "case",
    [
        Conv2DCase(channels=12, filters=6, groups=3, offset_groups=4),
        Conv2DCase(channels=12, filters=8, groups=4, offset_groups=3),
        Conv2DCase(channels=12, filters=6, groups=1, offset_groups=12),
        Conv2DCase(channels=12, filters=24, groups=12, offset_groups=1),
        Conv2DCase(channels=12, filters=12, groups=12, offset_groups=12),
        Conv2DCase(channels=34, filters=34, groups=2, offset_groups=17),
        Conv2DCase(channels=99, filters=6, groups=3, offset_groups=3),
    ],
    ids=case_id,
)
def test_groups_and_offset_groups_are_independent(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "case",
    [
        Conv2DCase(size=(1, 1), kernel_size=(3, 3)),
        Conv2DCase(size=(1, 6), kernel_size=(3, 3)),
        Conv2DCase(size=(6, 1), kernel_size=(3, 3)),
        Conv2DCase(size=(1, 1), kernel_size=(1, 1), padding="valid"),
        Conv2DCase(size=(2, 3), kernel_size=(5, 4), padding=((4, 3), (2, 6))),
        Conv2DCase(size=(5, 4), strides=(7, 9)),
        Conv2DCase(size=(5, 4), dilation_rate=(6, 11)),
        Conv2DCase(size=(5, 4), kernel_size=(1, 1), padding=(3, 2)),
    ],
    ids=case_id,
)
def test_small_maps_and_large_steps(case, boundary):
    check_case(dataclasses.replace(case, boundary=boundary), "float32")


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
    _, gradients = results(
        [inputs, kernel, offset], tf.ones((1, 64, 64, 1), dtype)
    )
    assert gradients[0].numpy()[0, 0, 0, 0] == 4096
    assert gradients[1].numpy().item() == 4096


def test_lists_of_integers_may_be_offsets():
    inputs, kernel, offset = Conv2DCase(has_mask=False).operands()
    offset = np.round(offset)
    expected = deformable_conv2d(inputs, kernel, offset, padding="same")
    actual = deformable_conv2d(
        inputs, kernel, offset.astype(int).tolist(), padding="same"
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_arrays_have_the_type_that_they_have(convert):
    """Tests that NumPy arrays are judged like tensors, not cast silently."""
    inputs, kernel, offset, mask = Conv2DCase().operands()
    with pytest.raises(TypeError, match="Expected `kernel`.*float64"):
        deformable_conv2d(inputs, convert(kernel.astype(np.float64)), offset)
    with pytest.raises(TypeError, match="Expected `offset`.*int64"):
        deformable_conv2d(inputs, kernel, convert(offset.astype(np.int64)))
    with pytest.raises(TypeError, match="Expected `mask`.*int32"):
        deformable_conv2d(
            inputs, kernel, offset, convert(mask.astype(np.int32))
        )


@pytest.mark.parametrize(
    ("form", "same_as"),
    [
        ({"strides": 2}, {"strides": (2, 2)}),
        ({"strides": [2, 3]}, {"strides": (2, 3)}),
        ({"dilation_rate": 2}, {"dilation_rate": (2, 2)}),
        ({"padding": 1}, {"padding": ((1, 1), (1, 1))}),
        ({"padding": (2, 1)}, {"padding": ((2, 2), (1, 1))}),
        ({"padding": [[2, 0], [1, 3]]}, {"padding": ((2, 0), (1, 3))}),
        ({"padding": 0}, {"padding": "valid"}),
        ({"strides": np.int64(2)}, {"strides": 2}),
    ],
)
def test_short_forms_of_the_options(form, same_as):
    case = Conv2DCase(**{"padding": 2, **same_as}, has_mask=False)
    operands = case.operands()
    assert_equal(
        deformable_conv2d(*operands, **{**case.options, **form}),
        deformable_conv2d(*operands, **case.options),
    )


# Eager, graphs, static shapes.


def test_one_trace_serves_every_size():
    @tf.function(input_signature=[tf.TensorSpec([None] * 4)] * 4)
    def graph(inputs, kernel, offset, mask):
        return deformable_conv2d(inputs, kernel, offset, mask, padding="same")

    for case in (
        Conv2DCase(),
        Conv2DCase(batch=3, size=(4, 9)),
        Conv2DCase(batch=0),
    ):
        operands = case.operands()
        assert_close(
            graph(*operands),
            reference.deformable_conv2d(*operands, padding="same"),
            FORWARD["float32"],
            case=case,
        )


@pytest.mark.parametrize(
    ("inputs", "kernel", "offset", "expected"),
    [
        ((2, 9, 8, 12), (3, 2, 12, 5), (2, 7, 7, 12), (2, 7, 7, 5)),
        ((None, 9, 8, 12), (3, 2, 12, 5), (None,) * 4, (None, 7, 7, 5)),
        ((None, 9, 8, 12), (3, 2, 12, 5), (4, 7, 7, 12), (4, 7, 7, 5)),
        ((2, None, 8, 12), (3, 2, 12, 5), (None,) * 4, (2, None, 7, 5)),
        ((2, None, None, 12), (3, 2, 12, 5), (2, 3, 6, 12), (2, 3, 6, 5)),
        ((2, 9, 8, None), (3, 2, None, 5), None, (2, 7, 7, 5)),
        ((2, 9, 8, 12), (None,) * 4, None, (2, None, None, None)),
        ((2, 9, 8, 12), None, None, (2, None, None, None)),
        (None, (3, 2, 12, 5), None, (None, None, None, 5)),
        (None, None, None, (None, None, None, None)),
    ],
)
def test_static_output_shape(inputs, kernel, offset, expected):
    @tf.function(
        input_signature=[tf.TensorSpec(s) for s in (inputs, kernel, offset)]
    )
    def graph(inputs, kernel, offset):
        return deformable_conv2d(inputs, kernel, offset)

    shape = graph.get_concrete_function().structured_outputs.shape
    assert tuple(shape) == expected


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
        for result in pool.map(call, range(16)):
            assert_equal(result, expected)
