# SPDX-License-Identifier: Apache-2.0
"""Tests of `tf_deform.ops.deformable_conv2d`: values and gradients."""

import concurrent.futures
import ctypes
import dataclasses
import itertools

import numpy as np
import oracles
import pytest
import reference
import tensorflow as tf

from tf_deform import _loader
from tf_deform.layers import DeformableConv2D
from tf_deform.ops import deformable_conv2d

# Largest error allowed, as a part of the largest value expected, against a
# float64 computation on the same (already rounded) operands. For the 16-bit
# types it is four units of the last place.
TOLERANCE = {  # dtype: (forward, gradients)
    "float64": (1e-12, 1e-9),
    "float32": (1e-5, 3e-4),
    "float16": (4 * 2**-11, 4 * 2**-11),
    "bfloat16": (4 * 2**-8, 4 * 2**-8),
}
DTYPES = list(TOLERANCE)
BOUNDARIES = ["zeros", "clamp"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration, and random operands that fit it."""

    batch: int = 2
    size: tuple[int, int] = (7, 5)
    channels: int = 6
    filters: int = 4
    kernel_size: tuple[int, int] = (3, 2)
    groups: int = 1
    offset_groups: int = 1
    strides: int | tuple[int, int] = 1
    padding: reference.Padding = "same"
    dilation_rate: int | tuple[int, int] = 1
    boundary: str = "zeros"
    has_mask: bool = True
    reach: int = 3  # Offsets are between -reach and reach.
    seed: int = 0

    @property
    def options(self) -> dict:
        """The keyword arguments of the op, and of the reference."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "offset_groups": self.offset_groups,
            "boundary": self.boundary,
        }

    @property
    def output_shape(self) -> tuple[int, ...]:
        out = reference.output_size(
            self.padding,
            self.size,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
        )
        return (self.batch, *out, self.filters)

    def operands(self, dtype: str = "float32") -> list[np.ndarray]:
        """Returns `[inputs, kernel, offset]` and, if there is one, `mask`.

        Offsets keep a tenth of a pixel away from integers, where the
        derivative jumps.
        """
        rng = np.random.default_rng(self.seed)
        value_type = tf.as_dtype(dtype).as_numpy_dtype
        coordinate_type = np.float64 if dtype == "float64" else np.float32
        taps = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        pixels = self.output_shape[:3]
        inputs = rng.normal(size=(self.batch, *self.size, self.channels))
        kernel = rng.normal(
            size=(
                *self.kernel_size,
                self.channels // self.groups,
                self.filters,
            )
        )
        offset = rng.integers(-self.reach, self.reach, (*pixels, 2 * taps))
        offset = offset + rng.uniform(0.1, 0.9, offset.shape)
        mask = rng.normal(size=(*pixels, taps))
        return [
            inputs.astype(value_type),
            kernel.astype(value_type),
            offset.astype(coordinate_type),
            mask.astype(coordinate_type),
        ][: 4 if self.has_mask else 3]

    def output_grad(self, dtype: str = "float32") -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        grad = rng.normal(size=self.output_shape)
        return grad.astype(tf.as_dtype(dtype).as_numpy_dtype)


def assert_close(actual, expected: np.ndarray, tolerance: float) -> None:
    """Compares shapes, and errors with the largest value expected."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    if expected.size:
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=tolerance * scale
        )


def forward_and_gradients(
    operands: list, output_grad: np.ndarray, **options: object
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Returns the op's output and the gradient of every operand."""
    operands = [tf.convert_to_tensor(x) for x in operands]
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output = deformable_conv2d(*operands, **options)
    return output, tape.gradient(output, operands, output_grad)


def check_against_reference(
    operands: list[np.ndarray],
    output_grad: np.ndarray,
    dtype: str,
    **options: object,
) -> None:
    """Compares the output and every gradient, in value, shape and dtype."""
    forward_tolerance, gradient_tolerance = TOLERANCE[dtype]
    output, gradients = forward_and_gradients(operands, output_grad, **options)
    assert output.dtype == dtype
    assert_close(
        output,
        reference.deformable_conv2d(*operands, **options),
        forward_tolerance,
    )
    mask = operands[3] if len(operands) == 4 else None
    expected = reference.deformable_conv2d_grad(
        *operands[:3], mask, output_grad, **options
    )
    for operand, actual, wanted in zip(
        operands, gradients, expected[: len(operands)], strict=True
    ):
        assert actual.dtype == operand.dtype
        assert_close(actual, wanted, gradient_tolerance)


def check_case(case: Case, dtype: str) -> None:
    check_against_reference(
        case.operands(dtype), case.output_grad(dtype), dtype, **case.options
    )


def random_case(seed: int, **fixed: object) -> Case:
    """Draws a configuration; the same seed gives the same one."""
    rng = np.random.default_rng(seed)

    def draw_pair(low: int, high: int) -> tuple[int, int]:
        return tuple(int(v) for v in rng.integers(low, high, 2))

    groups, offset_groups = (int(v) for v in rng.choice([1, 2, 3, 4], 2))
    paddings = ["valid", "same", 2, (3, 1), ((0, 3), (2, 1))]
    draw = {
        "batch": int(rng.integers(1, 4)),
        "size": draw_pair(5, 14),
        "channels": 12 * int(rng.integers(1, 4)),
        "filters": groups * int(rng.integers(1, 8)),
        "kernel_size": draw_pair(1, 4),
        "groups": groups,
        "offset_groups": offset_groups,
        "strides": draw_pair(1, 4),
        "padding": paddings[rng.integers(len(paddings))],
        "dilation_rate": draw_pair(1, 3),
        "boundary": BOUNDARIES[rng.integers(2)],
        "has_mask": bool(rng.integers(4)),
        "seed": seed,
    }
    return Case(**{**draw, **fixed})


# The reference itself, before anything is compared with it.


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_onnx_runtime_in_float64(seed):
    case = random_case(seed, boundary="zeros")
    operands = case.operands("float64")
    options = case.options
    expected = reference.deformable_conv2d(*operands, **options)
    del options["boundary"]  # ONNX has "zeros" only.
    assert_close(oracles.onnx_runtime(*operands, **options), expected, 1e-14)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "case",
    [
        Case(strides=(1, 2), dilation_rate=(2, 1), padding=((1, 0), (2, 1))),
        Case(strides=2, groups=2, offset_groups=3),
        Case(padding="valid", offset_groups=2, has_mask=False),
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
    step = 1e-5
    for operand, gradient in zip(
        operands, gradients[: len(operands)], strict=True
    ):
        flat = operand.reshape(-1)
        for index in rng.choice(flat.size, min(flat.size, 10), replace=False):
            value = flat[index]
            flat[index] = value + step
            above = loss()
            flat[index] = value - step
            below = loss()
            flat[index] = value
            np.testing.assert_allclose(
                (above - below) / (2 * step),
                gradient.reshape(-1)[index],
                atol=1e-7,
            )


# The forward pass against other people's implementations.


@pytest.mark.parametrize("seed", range(100, 125))
def test_equals_onnx_runtime(seed):
    case = random_case(seed, boundary="zeros")
    operands, options = case.operands(), case.options
    actual = deformable_conv2d(*operands, **options)
    del options["boundary"]  # ONNX has "zeros" only.
    expected = oracles.onnx_runtime(*operands, **options)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("seed", range(200, 225))
def test_equals_openvino(seed, boundary):
    case = random_case(seed, boundary=boundary)
    operands, options = case.operands(), case.options
    actual = deformable_conv2d(*operands, **options)
    assert_close(actual, oracles.openvino(*operands, **options), 1e-5)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    ("padding", "explicit"),
    [
        ("same", "SAME"),
        ("valid", "VALID"),
        (1, [[0, 0], [1, 1], [1, 1], [0, 0]]),
        ((2, 0), [[0, 0], [2, 2], [0, 0], [0, 0]]),
        (((0, 2), (3, 1)), [[0, 0], [0, 2], [3, 1], [0, 0]]),
    ],
)
@pytest.mark.parametrize(
    ("strides", "dilation_rate"),
    [
        *((s, 1) for s in [1, 2, 3, 4, (2, 3), (3, 1)]),
        *((1, d) for d in [2, 3, (1, 2), (3, 2)]),
    ],
)
def test_zero_offsets_equal_tf_conv2d(
    padding, explicit, strides, dilation_rate, boundary
):
    """The odd pixel of "same" is at the end, as TensorFlow has it.

    A plain convolution pads with zeros, and so do both boundaries at integer
    coordinates: outside the image, a sample is 0.
    """
    for size, kernel_size in itertools.product(
        [(9, 12), (10, 11)], [(3, 2), (2, 3), (1, 4)]
    ):
        case = Case(
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
            padding=explicit,
            dilations=dilation_rate,
        )
        actual = deformable_conv2d(
            inputs, kernel, np.zeros_like(offset), **case.options
        )
        assert_close(actual, expected, 1e-5)


# Output and every gradient against the float64 reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 320))
def test_random_configurations(seed, dtype):
    check_case(random_case(seed), dtype)


def _one_size_at_a_time() -> list[Case]:
    """Sizes around the block sizes that a fast kernel may have inside."""
    sizes = [1, 15, 16, 17, 31, 33, 255, 256, 257]
    cases = [
        Case(channels=n, filters=3, size=(4, 3), kernel_size=(2, 3), seed=n)
        for n in sizes
    ]
    sizes = [1, 15, 17, 31, 32, 33, 1025]
    cases += [
        Case(filters=n, channels=5, size=(4, 3), kernel_size=(2, 3), seed=n)
        for n in sizes
    ]
    # 1, 13, 14, 15, 63, 64, 65, 127 and 129 output pixels.
    sizes = [(1, 1), (13, 1), (2, 7), (3, 5), (7, 9), (16, 4), (5, 13)]
    sizes += [(1, 127), (43, 3)]
    cases += [
        Case(size=n, batch=batch, channels=5, filters=7, kernel_size=(1, 3))
        for n in sizes
        for batch in [1, 3]
    ]
    cases += [
        Case(batch=n, size=(3, 2), kernel_size=(2, 1), seed=n)
        for n in [0, 1, 33]
    ]
    return cases


def _id(case: Case) -> str:
    """Names a case by what differs from the default."""
    return "-".join(
        f"{field.name}={getattr(case, field.name)}"
        for field in dataclasses.fields(case)
        if field.name != "seed" and getattr(case, field.name) != field.default
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", _one_size_at_a_time(), ids=_id)
def test_sizes(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("reach", [1, 40])
def test_many_blocks(reach, boundary, dtype):
    """A map of many blocks in every direction, read near by and far away."""
    case = Case(
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
        Case(channels=12, filters=6, groups=3, offset_groups=4),
        Case(channels=12, filters=8, groups=4, offset_groups=3),
        Case(channels=12, filters=6, groups=1, offset_groups=12),
        Case(channels=12, filters=24, groups=12, offset_groups=1),
        Case(channels=12, filters=12, groups=12, offset_groups=12),
        Case(channels=34, filters=34, groups=2, offset_groups=17),
        Case(channels=99, filters=6, groups=3, offset_groups=3),
    ],
    ids=_id,
)
def test_groups_and_offset_groups_are_independent(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "case",
    [
        Case(size=(1, 1), kernel_size=(3, 3)),
        Case(size=(1, 6), kernel_size=(3, 3)),
        Case(size=(6, 1), kernel_size=(3, 3)),
        Case(size=(1, 1), kernel_size=(1, 1), padding="valid"),
        Case(size=(2, 3), kernel_size=(5, 4), padding=((4, 3), (2, 6))),
        Case(size=(5, 4), strides=(7, 9)),
        Case(size=(5, 4), dilation_rate=(6, 11)),
        Case(size=(5, 4), kernel_size=(1, 1), padding=(3, 2)),
    ],
    ids=_id,
)
def test_small_maps_and_large_steps(case, boundary):
    check_case(dataclasses.replace(case, boundary=boundary), "float32")


# Where a sample falls.


def _coordinates(size: int, dtype: str) -> np.ndarray:
    """Every kind of place on an axis of `size` pixels."""
    dtype = np.dtype(dtype).type
    marks = [dtype(v) for v in (-1, 0, 1, size - 1, size)]
    marks += [np.nextafter(v, dtype(-np.inf)) for v in marks]
    marks += [np.nextafter(v, dtype(np.inf)) for v in marks[:5]]
    marks += [dtype(v) for v in (-2.5, -0.25, 0.5, size - 0.75, size + 7.5)]
    marks += [dtype(v) for v in (np.nan, np.inf, -np.inf, 1e30, -1e30, 2**31)]
    return np.array([*marks, np.finfo(dtype).max], dtype)


def _one_sample_per_image(
    coordinates: np.ndarray, size: tuple[int, int], channels: int
) -> tuple[list[np.ndarray], dict]:
    """Operands with one tap and one output pixel: `offset` is `(y, x)`."""
    rng = np.random.default_rng(0)
    batch, dtype = len(coordinates), coordinates.dtype
    image = rng.normal(size=(1, *size, channels))
    operands = [
        np.repeat(image, batch, axis=0).astype(dtype),
        rng.normal(size=(1, 1, channels, 3)).astype(dtype),
        coordinates.reshape(batch, 1, 1, 2),
        rng.normal(size=(batch, 1, 1, 1)).astype(dtype),
    ]
    return operands, {"strides": size}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [1, 5, 32])
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_place_of_a_sample(boundary, size, channels, dtype):
    """All pairs of edges, integers, NaN, infinities and huge coordinates."""
    coordinates = np.array(
        list(itertools.product(*(_coordinates(n, dtype) for n in size)))
    )
    operands, options = _one_sample_per_image(coordinates, size, channels)
    output_grad = np.random.default_rng(1).normal(
        size=(len(coordinates), 1, 1, 3)
    )
    check_against_reference(
        operands,
        output_grad.astype(dtype),
        dtype,
        boundary=boundary,
        **options,
    )


@pytest.mark.parametrize(
    ("boundary", "y", "value"),
    [
        ("zeros", -1.0, 0.0),
        ("zeros", -0.25, 0.75 * 1.0),
        ("zeros", 0.0, 1.0),
        ("zeros", 2.0, 7.0),
        ("zeros", 2.25, 0.75 * 7.0),
        ("zeros", 3.0, 0.0),
        ("clamp", -0.25, 0.0),
        ("clamp", 0.0, 1.0),
        ("clamp", 0.25, 0.75 * 1.0 + 0.25 * 3.0),
        ("clamp", 2.0, 7.0),
        ("clamp", 2.75, 7.0),
        ("clamp", 3.0, 0.0),
    ],
)
def test_value_at_a_coordinate(boundary, y, value):
    """A column of three pixels, 1, 3 and 7, read at one place."""
    output = deformable_conv2d(
        np.reshape([1.0, 3.0, 7.0], (1, 3, 1, 1)),
        np.ones((1, 1, 1, 1)),
        np.reshape([y, 0.0], (1, 1, 1, 2)),
        strides=3,
        boundary=boundary,
    )
    assert output.numpy().item() == value


@pytest.mark.parametrize(
    ("boundary", "y", "slope"),
    [
        ("zeros", -1.5, 0.0),
        ("zeros", -1.0, 0.0),  # Outside, so no gradient.
        ("zeros", -0.5, 1.0),
        ("zeros", 0.0, 2.0),  # The cell [0, 1], not [-1, 0].
        ("zeros", 1.0, 4.0),
        ("zeros", 2.0, -7.0),  # The cell [2, 3]: down to zero.
        ("zeros", 3.0, 0.0),
        ("clamp", -0.5, 0.0),
        ("clamp", 0.0, 2.0),
        ("clamp", 1.0, 4.0),
        ("clamp", 1.5, 4.0),
        ("clamp", 2.0, 0.0),  # The edge is held from here on.
        ("clamp", 2.5, 0.0),
        ("clamp", 3.0, 0.0),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_derivative_is_the_right_hand_one(boundary, y, slope, axis):
    """A line of three pixels, 1, 3 and 7, along either axis."""
    shape = (1, 3, 1, 1) if axis == 0 else (1, 1, 3, 1)
    displacement = [y, 0.0] if axis == 0 else [0.0, y]
    operands = [
        np.reshape([1.0, 3.0, 7.0], shape),
        np.ones((1, 1, 1, 1)),
        np.reshape(displacement, (1, 1, 1, 2)),
    ]
    _, gradients = forward_and_gradients(
        operands, np.ones((1, 1, 1, 1)), strides=3, boundary=boundary
    )
    assert gradients[2].numpy().reshape(2)[axis] == slope


OUTSIDE = [
    *[("zeros", y) for y in (-1.0, 4.0, -7.5, 1e30)],
    *[("clamp", y) for y in (-0.25, 4.0, 1e30)],
    *[(b, y) for b in BOUNDARIES for y in (np.nan, np.inf, -np.inf)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("boundary", "outside"), OUTSIDE)
def test_a_sample_outside_gives_zero_whatever_else_is_nan(
    boundary, outside, dtype
):
    """A NaN image, a NaN mask: a sample outside reads neither."""
    size, channels = (4, 4), 19
    coordinates = np.array([[outside, 1.5], [1.5, outside], [outside] * 2])
    coordinates = coordinates.astype(
        np.float64 if dtype == "float64" else np.float32
    )
    operands, options = _one_sample_per_image(coordinates, size, channels)
    operands[0][:] = np.nan
    operands[3][:] = np.nan
    operands = [tf.cast(x, dtype) for x in operands[:2]] + operands[2:]
    output, gradients = forward_and_gradients(
        operands,
        np.ones((3, 1, 1, 3), tf.as_dtype(dtype).as_numpy_dtype),
        boundary=boundary,
        **options,
    )
    for tensor in [output, *gradients]:
        np.testing.assert_array_equal(np.asarray(tensor, np.float64), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["inputs", "mask"])
def test_inside_ordinary_arithmetic_holds(operand, bad):
    """A value that is not finite shows up exactly where it is read."""
    case = Case(batch=1, size=(6, 5), kernel_size=(1, 1), channels=3)
    inputs, kernel, offset, mask = case.operands("float64")
    offset = np.full_like(offset, 0.5)
    if operand == "inputs":
        inputs[0, 3, 2, 1] = bad
        readers = [(2, 1), (2, 2), (3, 1), (3, 2)]
    else:
        mask[0, 3, 2, 0] = bad
        readers = [(3, 2)]
    output = deformable_conv2d(inputs, kernel, offset, mask)
    not_finite = ~np.isfinite(output.numpy()).all(axis=-1)
    assert [tuple(index) for index in np.argwhere(not_finite[0])] == readers


def test_zero_mask_times_infinity_is_nan():
    inputs = np.full((1, 1, 1, 1), np.inf, np.float32)
    one, zero = np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))
    output = deformable_conv2d(
        inputs, one.astype(np.float32), np.zeros((1, 1, 1, 2)), zero
    )
    assert np.isnan(output.numpy().item())


def test_mask_may_be_any_real_number():
    """The op does not squash: the output is linear in the mask."""
    inputs, kernel, offset, mask = Case().operands("float64")
    output = deformable_conv2d(inputs, kernel, offset, mask, padding="same")
    scaled = deformable_conv2d(
        inputs, kernel, offset, -100.0 * mask, padding="same"
    )
    assert_close(scaled, -100.0 * output.numpy(), 1e-12)


def test_no_mask_is_a_mask_of_ones():
    inputs, kernel, offset, mask = Case().operands("float64")
    np.testing.assert_array_equal(
        deformable_conv2d(inputs, kernel, offset, padding="same"),
        deformable_conv2d(
            inputs, kernel, offset, np.ones_like(mask), padding="same"
        ),
    )


# Empty tensors.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=0),
        Case(batch=0, padding="valid"),
        Case(batch=0, padding=((1, 0), (2, 3)), strides=2),
        Case(size=(0, 5)),
        Case(size=(7, 0), strides=(2, 3)),
        Case(size=(0, 0), dilation_rate=3),
        Case(batch=0, size=(0, 5)),
    ],
    ids=_id,
)
@pytest.mark.parametrize("has_mask", [True, False])
def test_empty(case, has_mask, dtype):
    """An empty output of the right shape, and gradients that are zero."""
    case = dataclasses.replace(case, has_mask=has_mask)
    operands = case.operands(dtype)
    output, gradients = forward_and_gradients(
        operands, case.output_grad(dtype), **case.options
    )
    assert tuple(output.shape) == case.output_shape
    assert 0 in output.shape
    for operand, gradient in zip(operands, gradients, strict=True):
        assert gradient.dtype == operand.dtype
        assert tuple(gradient.shape) == operand.shape
        np.testing.assert_array_equal(
            np.asarray(gradient, np.float64), np.zeros(operand.shape)
        )


# Types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["float16", "bfloat16", "float32", "float64"])
def test_offset_and_mask_are_cast_to_the_coordinate_type(given, dtype):
    """float32, and float64 when `inputs` are float64, whatever is given."""
    case = Case(offset_groups=2)
    *values, offset, mask = case.operands(dtype)
    given_type = tf.as_dtype(given).as_numpy_dtype
    offset, mask = offset.astype(given_type), mask.astype(given_type)
    coordinate = np.float64 if dtype == "float64" else np.float32
    output_grad = case.output_grad(dtype)

    output, gradients = forward_and_gradients(
        [*values, offset, mask], output_grad, **case.options
    )
    expected, expected_gradients = forward_and_gradients(
        [*values, offset.astype(coordinate), mask.astype(coordinate)],
        output_grad,
        **case.options,
    )
    np.testing.assert_array_equal(output, expected)
    types = [dtype, dtype, given, given]
    for actual, wanted, type_ in zip(
        gradients, expected_gradients, types, strict=True
    ):
        assert actual.dtype == type_
        np.testing.assert_array_equal(actual, tf.cast(wanted, type_))


def test_float64_coordinates_resolve_what_float32_cannot():
    """A millionth of a pixel, a hundred pixels from the origin."""
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
    """0.3 pixels, a thousand pixels from the origin."""
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
    np.testing.assert_allclose(
        np.float64(output.numpy().item()), 0.3, rtol=TOLERANCE[dtype][0]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_accumulate_in_float32(dtype):
    """Sums of 4096 ones; in the type itself they would stop growing early."""
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
    _, gradients = forward_and_gradients(
        [inputs, kernel, offset], tf.ones((1, 64, 64, 1), dtype)
    )
    assert gradients[0].numpy()[0, 0, 0, 0] == 4096
    assert gradients[1].numpy().item() == 4096


def test_lists_of_integers_may_be_offsets():
    inputs, kernel, offset = Case(has_mask=False).operands()
    offset = np.round(offset)
    expected = deformable_conv2d(inputs, kernel, offset, padding="same")
    actual = deformable_conv2d(
        inputs, kernel, offset.astype(int).tolist(), padding="same"
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_arrays_have_the_type_that_they_have(convert):
    """NumPy's arrays are judged like tensors, not quietly cast."""
    inputs, kernel, offset, mask = Case().operands()
    with pytest.raises(TypeError, match="Expected `kernel`.*float64"):
        deformable_conv2d(inputs, convert(kernel.astype(np.float64)), offset)
    with pytest.raises(TypeError, match="Expected `offset`.*int64"):
        deformable_conv2d(inputs, kernel, convert(offset.astype(np.int64)))
    with pytest.raises(TypeError, match="Expected `mask`.*int32"):
        deformable_conv2d(
            inputs, kernel, offset, convert(mask.astype(np.int32))
        )


def test_operands_may_be_numpy_lists_or_variables():
    inputs, kernel, offset, mask = Case().operands()
    expected = deformable_conv2d(
        *map(tf.constant, (inputs, kernel, offset, mask)), padding="same"
    )
    for convert in (np.asarray, np.ndarray.tolist, tf.Variable):
        actual = deformable_conv2d(
            inputs,
            convert(kernel),
            convert(offset),
            convert(mask),
            padding="same",
        )
        np.testing.assert_array_equal(actual, expected)


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
    case = Case(**{"padding": 2, **same_as}, has_mask=False)
    operands = case.operands()
    np.testing.assert_array_equal(
        deformable_conv2d(*operands, **{**case.options, **form}),
        deformable_conv2d(*operands, **case.options),
    )


# Eager, graphs, static shapes.

FULL = Case(
    size=(9, 8),
    channels=12,
    groups=3,
    filters=6,
    offset_groups=2,
    strides=(2, 1),
    dilation_rate=(1, 2),
    padding=((1, 2), (3, 0)),
)


def _signature(known: str, dtype: str) -> list[tf.TensorSpec] | None:
    """Specs of operands and output gradient, with more or less known."""
    arrays = [*FULL.operands(dtype), FULL.output_grad(dtype)]
    shapes = {
        "shapes": lambda x: x.shape,
        "channels": lambda x: (None, None, None, x.shape[-1]),
        "rank": lambda x: (None,) * x.ndim,
        "nothing": lambda x: None,
    }
    return [tf.TensorSpec(shapes[known](x), x.dtype) for x in arrays]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", ["shapes", "channels", "rank", "nothing"])
def test_graph_equals_eager(known, dtype, boundary):
    options = {**FULL.options, "boundary": boundary}

    @tf.function(input_signature=_signature(known, dtype))
    def graph(inputs, kernel, offset, mask, output_grad):
        operands = [inputs, kernel, offset, mask]
        return forward_and_gradients(operands, output_grad, **options)

    operands, output_grad = FULL.operands(dtype), FULL.output_grad(dtype)
    expected = forward_and_gradients(operands, output_grad, **options)
    actual = graph(*operands, output_grad)
    for a, b in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_one_trace_serves_every_size():
    @tf.function(input_signature=[tf.TensorSpec([None] * 4)] * 4)
    def graph(inputs, kernel, offset, mask):
        return deformable_conv2d(inputs, kernel, offset, mask, padding="same")

    for case in (Case(), Case(batch=3, size=(4, 9)), Case(batch=0)):
        operands = case.operands()
        assert_close(
            graph(*operands),
            reference.deformable_conv2d(*operands, padding="same"),
            1e-5,
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


def test_static_shapes_of_gradients_are_those_of_the_operands():
    @tf.function(input_signature=_signature("shapes", "float32"))
    def graph(inputs, kernel, offset, mask, output_grad):
        operands = [inputs, kernel, offset, mask]
        _, gradients = forward_and_gradients(
            operands, output_grad, **FULL.options
        )
        for operand, gradient in zip(operands, gradients, strict=True):
            assert gradient.shape == operand.shape
        return gradients

    graph.get_concrete_function()


def test_many_calls_at_once():
    """From several Python threads, and side by side in one graph."""
    operands = [tf.constant(x) for x in Case(size=(24, 17)).operands()]
    output_grad = Case(size=(24, 17)).output_grad()

    def call(_=None):
        return tf.nest.flatten(
            forward_and_gradients(operands, output_grad, padding="same")
        )

    expected = call()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(32)))
    results += tf.function(lambda: [call() for _ in range(16)])()
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.cpu_only(reason="a GPU's kernels do not wait for the pool")
def test_calls_that_wait_for_the_pool():
    """Longer than a caller sleeps while others keep the pool's threads busy."""
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
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("has_mask", [True, False])
def test_compute_gradient_agrees(has_mask, boundary):
    case = Case(
        batch=2,
        size=(4, 3),
        channels=4,
        filters=2,
        kernel_size=(2, 1),
        groups=2,
        offset_groups=2,
        has_mask=has_mask,
        boundary=boundary,
    )
    theoretical, numerical = tf.test.compute_gradient(
        lambda *operands: deformable_conv2d(*operands, **case.options),
        case.operands("float64"),
    )
    for a, b in zip(theoretical, numerical, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


# Only the requested gradients.

WANTED = [
    names
    for count in (1, 2, 3)
    for names in itertools.combinations(range(4), count)
]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("wanted", WANTED)
def test_any_subset_of_the_gradients(wanted, mode):
    """Leaving some gradients out does not change the others."""
    operands = [tf.constant(x) for x in FULL.operands()]
    output_grad = FULL.output_grad()

    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch([operands[index] for index in wanted])
            output = deformable_conv2d(*operands, **FULL.options)
        return tape.gradient(output, [operands[i] for i in wanted], output_grad)

    if mode == "graph":
        some_gradients = tf.function(some_gradients)
    _, every = forward_and_gradients(operands, output_grad, **FULL.options)
    for index, gradient in zip(wanted, some_gradients(), strict=True):
        np.testing.assert_array_equal(gradient, every[index])


def gradients_computed() -> np.ndarray:
    """How many gradients of each operand kernels have computed so far."""
    counts = (ctypes.c_int64 * 4)()
    library = ctypes.CDLL(_loader.LIBRARY)
    library.TfDeformDeformableConv2DGradientsComputed(counts)
    return np.array(counts[:])


@pytest.mark.parametrize("wanted", WANTED)
def test_only_watched_gradients_are_computed(wanted):
    operands = [tf.constant(x) for x in FULL.operands()]
    with tf.GradientTape() as tape:
        tape.watch([operands[index] for index in wanted])
        output = deformable_conv2d(*operands, **FULL.options)
    before = gradients_computed()
    tape.gradient(output, [operands[index] for index in wanted])
    expected = [int(index in wanted) for index in range(4)]
    np.testing.assert_array_equal(gradients_computed() - before, expected)


@pytest.mark.parametrize("wanted", WANTED)
def test_only_used_gradients_are_computed_in_a_graph(wanted):
    """Even where a tape watches all operands, as it does variables."""
    operands = [tf.constant(x) for x in FULL.operands()]

    @tf.function
    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = deformable_conv2d(*operands, **FULL.options)
        return tape.gradient(output, [operands[index] for index in wanted])

    before = gradients_computed()
    some_gradients()
    expected = [int(index in wanted) for index in range(4)]
    np.testing.assert_array_equal(gradients_computed() - before, expected)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_frozen_layer_computes_no_kernel_gradient(mode):
    layer = DeformableConv2D(5, 3)
    layer.build((None, None, None, 6))
    layer.trainable = False
    inputs = tf.random.normal((2, 9, 8, 6))

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = layer(inputs)
        return tape.gradient(output, inputs)

    before = gradients_computed()
    (gradient if mode == "eager" else tf.function(gradient))()
    np.testing.assert_array_equal(gradients_computed() - before, [1, 0, 1, 0])


# The same bits, however many threads.

_HASHES = """
import hashlib
import numpy as np
import tensorflow as tf
from tf_deform.ops import deformable_conv2d

for dtype in ("float32", "bfloat16"):
    for batch in (1, 5):
        rng = np.random.default_rng(0)
        operands = [
            tf.cast(rng.normal(size=(batch, 31, 29, 24)), dtype),
            tf.cast(rng.normal(size=(3, 3, 12, 40)), dtype),
            tf.cast(rng.normal(0, 3, (batch, 31, 29, 54)), "float32"),
            tf.cast(rng.normal(size=(batch, 31, 29, 27)), "float32"),
        ]
        output_grad = tf.cast(rng.normal(size=(batch, 31, 29, 40)), dtype)
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = deformable_conv2d(
                *operands, padding="same", offset_groups=3
            )
        gradients = tape.gradient(output, operands, output_grad)
        for tensor in [output, *gradients]:
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            print(dtype, batch, tuple(tensor.shape), digest)
"""


@pytest.mark.cpu_only(reason="a GPU has no such threads; see gpu_test.py")
def test_results_are_bitwise_equal_for_any_number_of_threads(run_python):
    one, two, three = (
        run_python(_HASHES, TF_NUM_INTRAOP_THREADS=n) for n in (1, 2, 3)
    )
    assert len(one.splitlines()) == 2 * 2 * 5
    assert one == two
    assert one == three
