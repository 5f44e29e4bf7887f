# SPDX-License-Identifier: Apache-2.0
"""Tests of `tf_deform.ops.deformable_roi_align`: values and gradients."""

import concurrent.futures
import ctypes
import itertools

import numpy as np
import oracles
import pytest
import roi_reference
import tensorflow as tf
from roi_reference import assert_close, assert_finite_differences

from tf_deform import _loader
from tf_deform.ops import deformable_roi_align

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def cast(operands: tuple, dtype: str) -> list[np.ndarray | None]:
    """`(inputs, rois, offset, output_grad)` in the types that they have."""
    value_type = tf.as_dtype(dtype).as_numpy_dtype
    coordinate_type = np.float64 if dtype == "float64" else np.float32
    types = (value_type, coordinate_type, coordinate_type, value_type)
    return [
        None if operand is None else np.asarray(operand).astype(type_)
        for operand, type_ in zip(operands, types, strict=True)
    ]


def forward_and_gradients(
    operands: list, output_grad: np.ndarray, **attributes: object
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Returns the output, and the gradients of inputs and offset.

    That of offset is missing where offset is None.
    """
    inputs, rois, offset = (
        None if x is None else tf.convert_to_tensor(x) for x in operands
    )
    watched = [inputs] if offset is None else [inputs, offset]
    with tf.GradientTape() as tape:
        tape.watch([*watched, rois])
        output = deformable_roi_align(inputs, rois, offset, **attributes)
    *gradients, of_rois = tape.gradient(output, [*watched, rois], output_grad)
    assert of_rois is None
    return output, gradients


def check_against_reference(operands: tuple, dtype: str, **attributes) -> None:
    """Compares all results with the reference: value, shape and dtype."""
    *operands, output_grad = cast(operands, dtype)
    output, gradients = forward_and_gradients(
        operands, output_grad, **attributes
    )
    expected = roi_reference.deformable_roi_align(*operands, **attributes)
    assert output.dtype == dtype
    assert_close(output.numpy(), expected, dtype, "output")
    expected = roi_reference.deformable_roi_align_grad(
        *operands, output_grad, **attributes
    )
    coordinates = "float64" if dtype == "float64" else "float32"
    for actual, wanted, type_, name in zip(
        gradients,
        expected,
        [dtype, coordinates],
        ["inputs", "offset"],
        strict=False,
    ):
        assert actual.dtype == type_
        assert_close(actual.numpy(), wanted, type_, name)


def draw_plain_call(seed: int, dtype: str) -> tuple[list, dict]:
    """A call that ONNX Runtime can do: no padding, no displacement.

    Adaptive numbers of samples stay below our upper limit.
    """
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 14, 2))
    batch, ratio = int(rng.integers(1, 4)), int(rng.integers(0, 4))
    attributes = dict(
        pooled_size=tuple(int(n) for n in rng.integers(1, 6, 2)),
        # ONNX keeps it in float32.
        spatial_scale=float(np.float32(rng.choice([1 / 16, 0.3, 1.0]))),
        sampling_ratio=ratio,
    )
    unknown = {"padding", "not finite"}
    if ratio == 0:
        unknown.add("many maps wide")
    kinds = [k for k in roi_reference.ROI_KINDS if k not in unknown]
    operands = (
        rng.normal(size=(batch, *size, int(rng.integers(1, 20)))),
        roi_reference.draw_rois(
            rng, batch, size, attributes["spatial_scale"], 7, kinds
        ),
        None,
        None,
    )
    return cast(operands, dtype)[:2], attributes


# The reference itself, before anything is compared with it.


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_onnx_runtime_in_float64(seed):
    operands, attributes = draw_plain_call(seed, "float64")
    assert_close(
        oracles.onnx_runtime_roi_align(*operands, **attributes),
        roi_reference.deformable_roi_align(*operands, **attributes),
        "float64",
        "output",
    )


@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_reference_gradients_equal_finite_differences(sampling_ratio):
    rng = np.random.default_rng(sampling_ratio)
    attributes = dict(
        spatial_scale=0.5,
        pooled_size=(2, 3),
        sampling_ratio=sampling_ratio,
        gamma=0.2,
    )
    inputs = rng.normal(size=(2, 5, 6, 3))
    kinds = ("inside", "across the edge", "padding")
    rois = roi_reference.draw_rois(rng, 2, (5, 6), 0.5, 4, kinds)
    offset = rng.uniform(-1, 1, (4, 2, 3, 2))
    roi_reference.move_off_kinks(
        rng,
        lambda: roi_reference.roi_align_bins(
            inputs, rois, offset, **attributes
        ),
        offset,
    )
    output_grad = rng.normal(size=(4, 2, 3, 3))
    gradients = roi_reference.deformable_roi_align_grad(
        inputs, rois, offset, output_grad, **attributes
    )

    def loss() -> float:
        output = roi_reference.deformable_roi_align(
            inputs, rois, offset, **attributes
        )
        return np.sum(output * output_grad)

    for operand, gradient in zip((inputs, offset), gradients, strict=True):
        assert_finite_differences(rng, loss, operand, gradient, how_many=10)


# The forward pass against another implementation.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(100, 140))
def test_without_displacement_equals_onnx_runtime(seed, dtype):
    operands, attributes = draw_plain_call(seed, dtype)
    assert_close(
        deformable_roi_align(*operands, **attributes).numpy(),
        oracles.onnx_runtime_roi_align(*operands, **attributes),
        dtype,
        "output",
    )


def test_a_displacement_equals_a_moved_roi_of_onnx_runtime():
    """One bin of a ROI: `gamma * size * offset` pixels of the map away."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 12, 13, 5))
    rois = roi_reference.draw_rois(rng, 2, (12, 13), 0.25, 9, ("inside",))
    offset = rng.uniform(-2, 2, (9, 1, 1, 2))
    options = dict(pooled_size=1, spatial_scale=0.25, sampling_ratio=3)
    size = rois[:, 3:] - rois[:, 1:3]
    shift = 0.15 * size * offset[:, 0, 0, ::-1]
    moved = rois + np.concatenate([0 * shift[:, :1], shift, shift], axis=1)
    assert_close(
        deformable_roi_align(
            inputs, rois, offset, gamma=0.15, **options
        ).numpy(),
        oracles.onnx_runtime_roi_align(inputs, moved, **options),
        "float64",
        "output",
    )


def test_equals_onnx_runtime_at_the_size_of_a_detector():
    rng = np.random.default_rng(0)
    options = dict(pooled_size=7, spatial_scale=1 / 16)
    inputs, rois, _, _ = cast(
        (
            rng.normal(size=(1, 38, 63, 64)),
            roi_reference.draw_rois(
                rng, 1, (38, 63), 1 / 16, 200, ("inside", "across the edge")
            ),
            None,
            None,
        ),
        "float32",
    )
    assert_close(
        deformable_roi_align(inputs, rois, **options).numpy(),
        oracles.onnx_runtime_roi_align(inputs, rois, **options),
        "float32",
        "output",
    )


# Output and gradients against the float64 reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 325))
def test_random_configurations(seed, dtype):
    operands, attributes = roi_reference.draw_roi_align_call(seed)
    check_against_reference(operands, dtype, **attributes)


# One call that exercises everything; most tests below vary it.
OPTIONS = dict(
    spatial_scale=0.25, pooled_size=(3, 4), sampling_ratio=0, gamma=0.2
)


def draw_full_call(dtype: str = "float32", num_rois: int = 7) -> list:
    """`[inputs, rois, offset, output_grad]` for OPTIONS."""
    rng = np.random.default_rng(0)
    operands = (
        rng.normal(size=(2, 8, 9, 6)),
        roi_reference.draw_rois(rng, 2, (8, 9), 0.25, num_rois),
        rng.normal(size=(num_rois, 3, 4, 2)),
        rng.normal(size=(num_rois, 3, 4, 6)),
    )
    return cast(operands, dtype)


def test_no_displacement_is_a_displacement_of_zero():
    inputs, rois, offset, _ = draw_full_call("float64")
    still = deformable_roi_align(inputs, rois, **OPTIONS)
    for zero in (
        deformable_roi_align(inputs, rois, np.zeros_like(offset), **OPTIONS),
        deformable_roi_align(inputs, rois, offset, **OPTIONS | {"gamma": 0}),
    ):
        np.testing.assert_allclose(zero, still, rtol=0, atol=1e-14)


def test_defaults():
    """An adaptive number of samples, and a gamma of 0.1."""
    inputs, rois, offset, _ = draw_full_call()
    np.testing.assert_array_equal(
        deformable_roi_align(
            inputs, rois, offset, pooled_size=(3, 4), spatial_scale=0.5
        ),
        deformable_roi_align(
            inputs,
            rois,
            offset,
            pooled_size=[np.int64(3), 4],
            spatial_scale=0.5,
            sampling_ratio=-1,
            gamma=0.1,
        ),
    )
    np.testing.assert_array_equal(
        deformable_roi_align(inputs, rois, pooled_size=3, spatial_scale=1),
        deformable_roi_align(inputs, rois, pooled_size=(3, 3), spatial_scale=1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_offset", [True, False])
def test_no_rois(with_offset, dtype):
    inputs, rois, offset, output_grad = draw_full_call(dtype, num_rois=0)
    if not with_offset:
        offset = None
    output, gradients = forward_and_gradients(
        [inputs, rois, offset], output_grad, **OPTIONS
    )
    assert output.shape == (0, 3, 4, 6)
    assert gradients[0].shape == inputs.shape
    assert not np.asarray(gradients[0]).astype(float).any()
    if with_offset:
        assert gradients[1].shape == (0, 3, 4, 2)


def test_no_images_and_empty_maps():
    _, rois, offset, output_grad = draw_full_call()
    rois = np.where(np.isfinite(rois), rois, 1).astype(np.float32)
    for shape in ((0, 8, 9, 6), (2, 0, 9, 6), (2, 8, 0, 6)):
        rois[:, 0] = 1 if shape[0] else -1
        output, gradients = forward_and_gradients(
            [np.ones(shape, np.float32), rois, offset], output_grad, **OPTIONS
        )
        for tensor in [output, *gradients]:
            assert not tensor.numpy().any()
        assert gradients[0].shape == shape


# Types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_rois_and_offset_are_cast_to_the_coordinate_type(given, dtype):
    """float32, and float64 when `inputs` are float64, whatever is given."""
    inputs, rois, offset, output_grad = draw_full_call(dtype)
    given_type = tf.as_dtype(given).as_numpy_dtype
    rois, offset = rois.astype(given_type), offset.astype(given_type)
    coordinate = np.float64 if dtype == "float64" else np.float32
    output, gradients = forward_and_gradients(
        [inputs, rois, offset], output_grad, **OPTIONS
    )
    expected, expected_gradients = forward_and_gradients(
        [inputs, rois.astype(coordinate), offset.astype(coordinate)],
        output_grad,
        **OPTIONS,
    )
    np.testing.assert_array_equal(output, expected)
    for actual, wanted, type_ in zip(
        gradients, expected_gradients, [dtype, given], strict=True
    ):
        assert actual.dtype == type_
        np.testing.assert_array_equal(actual, tf.cast(wanted, type_))


@pytest.mark.parametrize("integers", [np.int32, np.int64, np.uint8, list])
def test_rois_may_be_integers(integers):
    inputs = draw_full_call()[0]
    rois = [[0, 4, 5, 20, 30], [1, 0, 3, 9, 9]]
    expected = deformable_roi_align(inputs, np.float32(rois), **OPTIONS)
    given = rois if integers is list else integers(rois)
    np.testing.assert_array_equal(
        deformable_roi_align(inputs, given, **OPTIONS), expected
    )


def test_operands_may_be_numpy_lists_or_variables():
    inputs, rois, offset, _ = draw_full_call()
    rois = np.nan_to_num(rois, posinf=9, neginf=-9)
    expected = deformable_roi_align(
        tf.constant(inputs), tf.constant(rois), tf.constant(offset), **OPTIONS
    )
    for convert in (np.asarray, np.ndarray.tolist, tf.Variable):
        actual = deformable_roi_align(
            tf.Variable(inputs), convert(rois), convert(offset), **OPTIONS
        )
        np.testing.assert_array_equal(actual, expected)


def test_options_are_not_rounded_for_float64():
    """The scale 0.1 is not what float32 has for it."""
    ramp = np.arange(200.0).reshape(1, 1, 200, 1)
    for scale, gamma in ((0.1, 0.3), (0.7, 1e-9)):
        output = deformable_roi_align(
            ramp,
            np.array([[0, 150, 0, 153, 1.0]]),
            np.array([[[[0.0, 1.0]]]]),
            spatial_scale=scale,
            pooled_size=1,
            sampling_ratio=1,
            gamma=gamma,
        )
        np.testing.assert_allclose(
            output.numpy().item(),
            151.5 * scale - 0.5 + gamma * 3 * scale,
            rtol=1e-12,
        )


# Eager, graphs, static shapes.


def _signature(known: str, dtype: str) -> list[tf.TensorSpec]:
    """Specs of operands and output gradient, with more or less known."""
    shapes = {
        "shapes": lambda x: x.shape,
        "channels": lambda x: (*[None] * (x.ndim - 1), x.shape[-1]),
        "rank": lambda x: (None,) * x.ndim,
        "nothing": lambda x: None,
    }
    return [
        tf.TensorSpec(shapes[known](x), x.dtype) for x in draw_full_call(dtype)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", ["shapes", "channels", "rank", "nothing"])
def test_graph_equals_eager(known, dtype):
    @tf.function(input_signature=_signature(known, dtype))
    def graph(inputs, rois, offset, output_grad):
        return forward_and_gradients(
            [inputs, rois, offset], output_grad, **OPTIONS
        )

    *operands, output_grad = draw_full_call(dtype)
    expected = forward_and_gradients(operands, output_grad, **OPTIONS)
    actual = graph(*operands, output_grad)
    for a, b in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_one_trace_serves_every_number_of_rois():
    @tf.function(
        input_signature=[
            tf.TensorSpec([None] * 4),
            tf.TensorSpec([None, 5]),
            tf.TensorSpec([None] * 4),
        ]
    )
    def graph(inputs, rois, offset):
        return deformable_roi_align(inputs, rois, offset, **OPTIONS)

    for num_rois in (7, 0, 1, 20):
        *operands, _ = draw_full_call(num_rois=num_rois)
        assert_close(
            graph(*operands).numpy(),
            roi_reference.deformable_roi_align(*operands, **OPTIONS),
            "float32",
            "output",
        )


@pytest.mark.parametrize(
    ("inputs", "rois", "offset", "num_rois", "channels"),
    [
        ((2, 8, 9, 6), (7, 5), (7, 3, 4, 2), 7, 6),
        ((2, 8, 9, 6), (None, 5), (7, 3, 4, 2), 7, 6),
        ((2, 8, 9, 6), (7, 5), (None, None, None, None), 7, 6),
        ((2, 8, 9, 6), (7, None), None, 7, 6),
        ((None, None, None, 6), (None, 5), (None, 3, 4, 2), None, 6),
        ((None, None, None, None), None, (4, None, None, None), 4, None),
        (None, None, None, None, None),
        (None, (3, 5), "absent", 3, None),
        ((2, 8, 9, 6), None, "absent", None, 6),
        ((0, 0, 0, 6), (0, 5), "absent", 0, 6),
    ],
)
def test_static_output_shape(inputs, rois, offset, num_rois, channels):
    specs = [tf.TensorSpec(inputs), tf.TensorSpec(rois)]
    if offset != "absent":
        specs.append(tf.TensorSpec(offset))

    @tf.function(input_signature=specs)
    def graph(*operands):
        return deformable_roi_align(*operands, **OPTIONS)

    shape = graph.get_concrete_function().structured_outputs.shape
    assert tuple(shape) == (num_rois, 3, 4, channels)


def test_graph_ops_have_names_that_last():
    """They are part of every SavedModel."""

    @tf.function(input_signature=_signature("shapes", "float32"))
    def graph(inputs, rois, offset, output_grad):
        return forward_and_gradients(
            [inputs, rois, offset], output_grad, **OPTIONS
        )

    nodes = graph.get_concrete_function().graph.as_graph_def().node
    ours = [node.op for node in nodes if node.op.startswith("TfDeform>")]
    assert sorted(ours) == [
        "TfDeform>DeformableROIAlign",
        "TfDeform>DeformableROIAlignGrad",
    ]


def test_static_shapes_of_gradients_are_those_of_the_operands():
    @tf.function(input_signature=_signature("shapes", "float32"))
    def graph(inputs, rois, offset, output_grad):
        _, gradients = forward_and_gradients(
            [inputs, rois, offset], output_grad, **OPTIONS
        )
        for operand, gradient in zip((inputs, offset), gradients, strict=True):
            assert gradient.shape == operand.shape
        return gradients

    graph.get_concrete_function()


def test_many_calls_at_once():
    """From several Python threads, and side by side in one graph."""
    *operands, output_grad = draw_full_call(num_rois=90)

    def call(_=None):
        return tf.nest.flatten(
            forward_and_gradients(operands, output_grad, **OPTIONS)
        )

    expected = call()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(32)))
    results += tf.function(lambda: [call() for _ in range(8)])()
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("displaced", [True, False])
def test_compute_gradient_agrees(displaced, sampling_ratio):
    rng = np.random.default_rng(sampling_ratio)
    options = dict(
        spatial_scale=0.5,
        pooled_size=(2, 1),
        sampling_ratio=sampling_ratio,
        gamma=0.2,
    )
    inputs = rng.normal(size=(2, 4, 3, 3))
    rois = roi_reference.draw_rois(
        rng, 2, (4, 3), 0.5, 3, ("inside", "across the edge", "padding")
    )
    operands = [inputs]
    if displaced:
        operands.append(rng.uniform(-1, 1, (3, 2, 1, 2)))
        roi_reference.move_off_kinks(
            rng,
            lambda: roi_reference.roi_align_bins(
                inputs, rois, operands[1], **options
            ),
            operands[1],
        )

    def pool(inputs, *offset):
        return deformable_roi_align(inputs, rois, *offset, **options)

    theoretical, numerical = tf.test.compute_gradient(pool, operands)
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-9)


# Only the requested gradients.

WANTED = [(0,), (1,), (0, 1), ()]  # Of inputs and offset.


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("wanted", WANTED)
def test_any_subset_of_the_gradients(wanted, mode):
    """Leaving one gradient out does not change the other."""
    inputs, rois, offset, output_grad = map(tf.constant, draw_full_call())

    def some_gradients():
        sources = [(inputs, offset)[index] for index in wanted]
        with tf.GradientTape() as tape:
            tape.watch([*sources, rois])
            output = deformable_roi_align(inputs, rois, offset, **OPTIONS)
        return tape.gradient(output, sources, output_grad)

    if mode == "graph":
        some_gradients = tf.function(some_gradients)
    _, every = forward_and_gradients(
        [inputs, rois, offset], output_grad, **OPTIONS
    )
    for index, gradient in zip(wanted, some_gradients(), strict=True):
        np.testing.assert_array_equal(gradient, every[index])


def gradients_computed() -> np.ndarray:
    """How many gradients of inputs and offset have been computed so far."""
    counts = (ctypes.c_int64 * 2)()
    library = ctypes.CDLL(_loader.LIBRARY)
    library.TfDeformDeformableROIAlignGradientsComputed(counts)
    return np.array(counts[:])


@pytest.mark.parametrize("wanted", WANTED)
def test_only_watched_gradients_are_computed(wanted):
    inputs, rois, offset, _ = map(tf.constant, draw_full_call())
    sources = [(inputs, offset)[index] for index in wanted]
    with tf.GradientTape() as tape:
        tape.watch([*sources, rois])
        output = deformable_roi_align(inputs, rois, offset, **OPTIONS)
    before = gradients_computed()
    tape.gradient(output, [*sources, rois])
    expected = [int(index in wanted) for index in range(2)]
    np.testing.assert_array_equal(gradients_computed() - before, expected)


@pytest.mark.parametrize("wanted", WANTED)
def test_only_used_gradients_are_computed_in_a_graph(wanted):
    """Even where a tape watches all operands, as it does variables."""
    inputs, rois, offset, _ = map(tf.constant, draw_full_call())

    @tf.function
    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch([inputs, rois, offset])
            output = deformable_roi_align(inputs, rois, offset, **OPTIONS)
        sources = [(inputs, offset)[index] for index in wanted]
        return tape.gradient(output, sources)

    before = gradients_computed()
    some_gradients()
    expected = [int(index in wanted) for index in range(2)]
    np.testing.assert_array_equal(gradients_computed() - before, expected)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_without_displacements_only_inputs_have_a_gradient(mode):
    inputs, rois, _, _ = map(tf.constant, draw_full_call())

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch([inputs, rois])
            output = deformable_roi_align(inputs, rois, **OPTIONS)
        return tape.gradient(output, inputs)

    before = gradients_computed()
    (gradient if mode == "eager" else tf.function(gradient))()
    np.testing.assert_array_equal(gradients_computed() - before, [1, 0])


# The same bits, however many threads.

_HASHES = """
import hashlib
import numpy as np
import tensorflow as tf
from tf_deform.ops import deformable_roi_align

for dtype in ("float32", "bfloat16"):
    for batch in (1, 5):
        rng = np.random.default_rng(0)
        corners = rng.uniform(-20, 300, (200, 2, 2))
        rois = np.concatenate(
            [
                rng.integers(-1, batch, (200, 1)),
                corners.min(1),
                corners.max(1),
            ],
            axis=1,
        )
        operands = [
            tf.cast(rng.normal(size=(batch, 19, 17, 12)), dtype),
            tf.cast(rng.normal(size=(200, 5, 4, 2)), "float32"),
        ]
        output_grad = tf.cast(rng.normal(size=(200, 5, 4, 12)), dtype)
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = deformable_roi_align(
                operands[0],
                rois,
                operands[1],
                spatial_scale=1 / 16,
                pooled_size=(5, 4),
            )
        gradients = tape.gradient(output, operands, output_grad)
        for tensor in [output, *gradients]:
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            print(dtype, batch, tuple(tensor.shape), digest)
"""


@pytest.mark.cpu_only(reason="a GPU has no such threads; see gpu_test.py")
def test_results_are_bitwise_equal_for_any_number_of_threads(run_python):
    one, three = (run_python(_HASHES, TF_NUM_INTRAOP_THREADS=n) for n in (1, 3))
    assert len(set(one.splitlines())) == 2 * 2 * 3
    assert one == three


# Values that are not finite.


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_read_may_be_anything(dtype):
    """Padding, ROIs and displacements that are not finite, ROIs outside."""
    corners = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    rois = [[-1, 0, 0, 4, 4], [-np.inf, 0, 0, 4, 4], [0, 90, 90, 99, 99]]
    for place, corner in itertools.product(range(1, 5), corners[:3]):
        rois.append([0, 0, 0, 4, 4])
        rois[-1][place] = corner
    rois += [[0, c, c, c, c] for c in corners]
    bad = len(rois)
    rois += [[0, 0, 0, 4, 4]] * 3
    offset = np.zeros((len(rois), 3, 4, 2))
    offset[bad:] = np.reshape([np.nan, np.inf, -np.inf], (3, 1, 1, 1))
    operands = (
        np.full((1, 8, 9, 6), np.nan),
        rois,
        offset,
        np.full((len(rois), 3, 4, 6), np.nan),
    )
    *operands, output_grad = cast(operands, dtype)
    output, gradients = forward_and_gradients(operands, output_grad, **OPTIONS)
    for tensor in [output, *gradients]:
        assert (np.asarray(tensor).astype(float) == 0).all()
