# SPDX-License-Identifier: Apache-2.0
"""Tests of `tf_deform.ops.deformable_psroi_pool`: values and gradients."""

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
from tf_deform.ops import deformable_psroi_pool

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def cast(operands: tuple, dtype: str) -> list[np.ndarray | None]:
    """`(inputs, rois, trans, output_grad)` in the types that they have."""
    value_type = tf.as_dtype(dtype).as_numpy_dtype
    coordinate_type = np.float64 if dtype == "float64" else np.float32
    types = (value_type, coordinate_type, coordinate_type, value_type)
    return [
        None if operand is None else np.asarray(operand).astype(type_)
        for operand, type_ in zip(operands, types, strict=True)
    ]


def forward_and_gradients(
    operands: list, output_grad: np.ndarray, **attributes: object
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Returns `[output, count]`, and the gradients of inputs and trans.

    Those of trans are missing where trans is None.
    """
    inputs, rois, trans = (
        None if x is None else tf.convert_to_tensor(x) for x in operands
    )
    watched = [inputs] if trans is None else [inputs, trans]
    with tf.GradientTape() as tape:
        tape.watch([*watched, rois])
        output, count = deformable_psroi_pool(
            inputs, rois, trans, return_count=True, **attributes
        )
    *gradients, of_rois = tape.gradient(output, [*watched, rois], output_grad)
    assert of_rois is None
    return [output, count], gradients


def check_against_reference(operands: tuple, dtype: str, **attributes) -> None:
    """Compares all results with the reference: value, shape and dtype."""
    *operands, output_grad = cast(operands, dtype)
    (output, count), gradients = forward_and_gradients(
        operands, output_grad, **attributes
    )
    expected, expected_count = roi_reference.deformable_psroi_pool(
        *operands, return_count=True, **attributes
    )
    assert output.dtype == dtype
    assert_close(output.numpy(), expected, dtype, "output")
    assert count.dtype == tf.float32
    np.testing.assert_array_equal(count, expected_count)
    expected = roi_reference.deformable_psroi_pool_grad(
        *operands, output_grad, **attributes
    )
    coordinates = "float64" if dtype == "float64" else "float32"
    for actual, wanted, type_, name in zip(
        gradients,
        expected,
        [dtype, coordinates],
        ["inputs", "trans"],
        strict=False,
    ):
        assert actual.dtype == type_
        assert_close(actual.numpy(), wanted, type_, name)


def draw_square_call(seed: int) -> tuple[tuple, dict]:
    """A call that OpenVINO can do: square sizes, no padding, all finite."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 14, 2))
    batch, classes = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    pooled = int(rng.integers(1, 6))
    part = [None, *range(1, 7)][rng.integers(7)]
    attributes = dict(
        output_dim=classes * int(rng.integers(1, 5)),
        spatial_scale=float(rng.choice([1 / 16, 0.3, 1.0])),
        pooled_size=pooled,
        part_size=part,
        sample_per_part=int(rng.integers(1, 6)),
        trans_std=float(rng.choice([0.1, 0.25])),
    )
    channels = attributes["output_dim"] * pooled**2
    kinds = [k for k in roi_reference.ROI_KINDS if k not in UNKNOWN_TO_OTHERS]
    parts = part or pooled
    inputs = rng.normal(size=(batch, *size, channels))
    rois = roi_reference.draw_rois(
        rng, batch, size, attributes["spatial_scale"], 7, kinds
    )
    trans = rng.normal(size=(7, parts, parts, 2 * classes))
    if seed % 3 == 0:
        trans = None
    return cast((inputs, rois, trans, None), "float32")[:3], attributes


UNKNOWN_TO_OTHERS = ("padding", "not finite")


# The reference itself, before anything is compared with it.


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_openvino(seed):
    operands, attributes = draw_square_call(seed)
    assert_close(
        oracles.openvino_psroi_pool(*operands, **attributes),
        roi_reference.deformable_psroi_pool(*operands, **attributes),
        "float32",
        "output",
    )


@pytest.mark.parametrize("group_size", [None, 1, (2, 1)])
@pytest.mark.parametrize("classes", [1, 3])
def test_reference_gradients_equal_finite_differences(group_size, classes):
    rng = np.random.default_rng(classes)
    attributes = dict(
        output_dim=2 * classes,
        spatial_scale=0.5,
        pooled_size=(2, 3),
        group_size=group_size,
        part_size=(3, 2),
        sample_per_part=2,
        trans_std=0.2,
    )
    groups = roi_reference.pair(group_size or (2, 3))
    channels = 2 * classes * groups[0] * groups[1]
    inputs = rng.normal(size=(2, 5, 6, channels))
    kinds = ("inside", "across the edge", "reversed", "padding")
    rois = roi_reference.draw_rois(rng, 2, (5, 6), 0.5, 4, kinds)
    trans = rng.uniform(-1, 1, (4, 3, 2, 2 * classes))
    roi_reference.move_off_kinks(
        rng,
        lambda: roi_reference.psroi_bins(inputs, rois, trans, **attributes),
        trans,
    )
    output_grad = rng.normal(size=(4, 2, 3, 2 * classes))
    gradients = roi_reference.deformable_psroi_pool_grad(
        inputs, rois, trans, output_grad, **attributes
    )

    def loss() -> float:
        output = roi_reference.deformable_psroi_pool(
            inputs, rois, trans, **attributes
        )
        return np.sum(output * output_grad)

    for operand, gradient in zip((inputs, trans), gradients, strict=True):
        assert_finite_differences(rng, loss, operand, gradient, how_many=10)


# The forward pass against another implementation.


@pytest.mark.parametrize("seed", range(100, 140))
def test_equals_openvino(seed):
    """Displaced or not, 1 to 3 classes, edges, fractions, other part sizes."""
    operands, attributes = draw_square_call(seed)
    assert_close(
        deformable_psroi_pool(*operands, **attributes).numpy(),
        oracles.openvino_psroi_pool(*operands, **attributes),
        "float32",
        "output",
    )


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_other_groups_equal_openvino_on_repeated_channels(group_size):
    """OpenVINO has a group for each bin: give it the channels bin by bin."""
    rng = np.random.default_rng(group_size)
    output_dim, pooled = 3, 4
    attributes = dict(
        output_dim=output_dim, spatial_scale=0.25, pooled_size=pooled
    )
    channels = output_dim * group_size**2
    inputs, rois, trans, _ = cast(
        (
            rng.normal(size=(2, 9, 7, channels)),
            roi_reference.draw_rois(
                rng, 2, (9, 7), 0.25, 6, ("inside", "across the edge")
            ),
            rng.normal(size=(6, pooled, pooled, 2)),
            None,
        ),
        "float32",
    )
    cells = np.arange(pooled) * group_size // pooled
    grouped = inputs.reshape(2, 9, 7, output_dim, group_size, group_size)
    repeated = grouped[..., cells[:, np.newaxis], cells]
    assert_close(
        deformable_psroi_pool(
            inputs, rois, trans, group_size=group_size, **attributes
        ).numpy(),
        oracles.openvino_psroi_pool(
            repeated.reshape(2, 9, 7, -1), rois, trans, **attributes
        ),
        "float32",
        "output",
    )


def test_equals_openvino_at_the_size_of_a_detector():
    """300 ROIs, 7x7 bins, 4x4 samples, 21 classes, a map of 38x63."""
    rng = np.random.default_rng(0)
    attributes = dict(
        output_dim=21, spatial_scale=1 / 16, pooled_size=7, trans_std=0.1
    )
    inputs, rois, trans, _ = cast(
        (
            rng.normal(size=(1, 38, 63, 21 * 49)),
            roi_reference.draw_rois(
                rng, 1, (38, 63), 1 / 16, 300, ("inside", "across the edge")
            ),
            rng.normal(size=(300, 7, 7, 2)),
            None,
        ),
        "float32",
    )
    assert_close(
        deformable_psroi_pool(inputs, rois, trans, **attributes).numpy(),
        oracles.openvino_psroi_pool(inputs, rois, trans, **attributes),
        "float32",
        "output",
    )


# Output, count and gradients against the float64 reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 325))
def test_random_configurations(seed, dtype):
    operands, attributes = roi_reference.draw_psroi_pool_call(seed)
    check_against_reference(operands, dtype, **attributes)


# One call that exercises everything; most tests below vary it.
OPTIONS = dict(
    output_dim=6,
    spatial_scale=0.25,
    pooled_size=(3, 4),
    group_size=(3, 2),
    part_size=(5, 2),
    sample_per_part=2,
    trans_std=0.1,
)


def draw_full_call(dtype: str = "float32", num_rois: int = 7) -> list:
    """`[inputs, rois, trans, output_grad]` for OPTIONS, with 3 classes."""
    rng = np.random.default_rng(0)
    operands = (
        rng.normal(size=(2, 8, 9, 36)),
        roi_reference.draw_rois(rng, 2, (8, 9), 0.25, num_rois),
        rng.normal(size=(num_rois, 5, 2, 6)),
        rng.normal(size=(num_rois, 3, 4, 6)),
    )
    return cast(operands, dtype)


def test_count_only_on_request():
    *operands, _ = draw_full_call()
    output, count = deformable_psroi_pool(
        *operands, return_count=True, **OPTIONS
    )
    alone = deformable_psroi_pool(*operands, **OPTIONS)
    assert isinstance(alone, tf.Tensor)
    np.testing.assert_array_equal(alone, output)
    assert count.shape == output.shape
    assert 0 < count.numpy().min(initial=5, where=count.numpy() > 0) <= 4
    assert count.numpy().max() == 4


def test_count_has_no_gradient():
    inputs, rois, trans, _ = map(tf.constant, draw_full_call())
    with tf.GradientTape() as tape:
        tape.watch([inputs, trans])
        _, count = deformable_psroi_pool(
            inputs, rois, trans, return_count=True, **OPTIONS
        )
        loss = tf.reduce_sum(count)
    for gradient in tape.gradient(loss, [inputs, trans]):
        assert gradient is None or not gradient.numpy().any()


def test_no_displacement_is_a_displacement_of_zero():
    inputs, rois, trans, _ = draw_full_call("float64")
    still = deformable_psroi_pool(inputs, rois, **OPTIONS)
    for zero in (
        deformable_psroi_pool(inputs, rois, np.zeros_like(trans), **OPTIONS),
        deformable_psroi_pool(
            inputs, rois, trans, **OPTIONS | {"trans_std": 0}
        ),
    ):
        np.testing.assert_allclose(zero, still, rtol=0, atol=1e-14)


def test_default_sizes():
    """`group_size` and `part_size` are `pooled_size`; 4 samples; 0.1."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, 6, 7, 12))
    rois = np.array([[0, 1, 2, 5, 4.0]])
    trans = rng.normal(size=(1, 2, 3, 2))
    common = dict(output_dim=2, spatial_scale=0.7)
    np.testing.assert_array_equal(
        deformable_psroi_pool(
            inputs, rois, trans, pooled_size=(2, 3), **common
        ),
        deformable_psroi_pool(
            inputs,
            rois,
            trans,
            pooled_size=[np.int64(2), 3],
            group_size=(2, 3),
            part_size=(2, 3),
            sample_per_part=4,
            trans_std=0.1,
            **common,
        ),
    )
    np.testing.assert_array_equal(
        deformable_psroi_pool(
            inputs[..., :8], rois, pooled_size=3, group_size=2, **common
        ),
        deformable_psroi_pool(
            inputs[..., :8], rois, pooled_size=(3, 3), group_size=2, **common
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_trans", [True, False])
def test_no_rois(with_trans, dtype):
    inputs, rois, trans, output_grad = draw_full_call(dtype, num_rois=0)
    if not with_trans:
        trans = None
    (output, count), gradients = forward_and_gradients(
        [inputs, rois, trans], output_grad, **OPTIONS
    )
    assert output.shape == count.shape == (0, 3, 4, 6)
    assert gradients[0].shape == inputs.shape
    assert not np.asarray(gradients[0]).astype(float).any()
    if with_trans:
        assert gradients[1].shape == (0, 5, 2, 6)


def test_no_images_and_empty_maps():
    _, rois, trans, output_grad = draw_full_call()
    rois = np.where(np.isfinite(rois), rois, 1).astype(np.float32)
    for shape in ((0, 8, 9, 36), (2, 0, 9, 36), (2, 8, 0, 36)):
        rois[:, 0] = 1 if shape[0] else -1
        results, gradients = forward_and_gradients(
            [np.ones(shape, np.float32), rois, trans], output_grad, **OPTIONS
        )
        for tensor in [*results, *gradients]:
            assert not tensor.numpy().any()
        assert gradients[0].shape == shape


# Types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_rois_and_trans_are_cast_to_the_coordinate_type(given, dtype):
    """float32, and float64 when `inputs` are float64, whatever is given."""
    inputs, rois, trans, output_grad = draw_full_call(dtype)
    given_type = tf.as_dtype(given).as_numpy_dtype
    rois, trans = rois.astype(given_type), trans.astype(given_type)
    coordinate = np.float64 if dtype == "float64" else np.float32
    results, gradients = forward_and_gradients(
        [inputs, rois, trans], output_grad, **OPTIONS
    )
    expected, expected_gradients = forward_and_gradients(
        [inputs, rois.astype(coordinate), trans.astype(coordinate)],
        output_grad,
        **OPTIONS,
    )
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    for actual, wanted, type_ in zip(
        gradients, expected_gradients, [dtype, given], strict=True
    ):
        assert actual.dtype == type_
        np.testing.assert_array_equal(actual, tf.cast(wanted, type_))


@pytest.mark.parametrize("integers", [np.int32, np.int64, np.uint8, list])
def test_rois_may_be_integers(integers):
    inputs = draw_full_call()[0]
    rois = [[0, 4, 5, 20, 30], [1, 0, 3, 9, 9]]
    expected = deformable_psroi_pool(inputs, np.float32(rois), **OPTIONS)
    given = rois if integers is list else integers(rois)
    np.testing.assert_array_equal(
        deformable_psroi_pool(inputs, given, **OPTIONS), expected
    )


def test_operands_may_be_numpy_lists_or_variables():
    inputs, rois, trans, _ = draw_full_call()
    rois = np.nan_to_num(rois, posinf=9, neginf=-9)
    expected = deformable_psroi_pool(
        tf.constant(inputs), tf.constant(rois), tf.constant(trans), **OPTIONS
    )
    for convert in (np.asarray, np.ndarray.tolist, tf.Variable):
        actual = deformable_psroi_pool(
            tf.Variable(inputs), convert(rois), convert(trans), **OPTIONS
        )
        np.testing.assert_array_equal(actual, expected)


def test_options_are_not_rounded_for_float64():
    """The scale 0.1 is not what float32 has for it."""
    ramp = np.arange(200.0).reshape(1, 1, 200, 1)
    for scale, trans_std in ((0.1, 0.3), (0.7, 1e-9)):
        output = deformable_psroi_pool(
            ramp,
            np.array([[0, 150, 0, 150, 0.0]]),
            np.array([[[[0.0, 1.0]]]]),
            output_dim=1,
            spatial_scale=scale,
            pooled_size=1,
            sample_per_part=1,
            trans_std=trans_std,
        )
        size = max(scale, 0.1)
        np.testing.assert_allclose(
            output.numpy().item(),
            150 * scale - 0.5 + trans_std * size,
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
    def graph(inputs, rois, trans, output_grad):
        return forward_and_gradients(
            [inputs, rois, trans], output_grad, **OPTIONS
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
    def graph(inputs, rois, trans):
        return deformable_psroi_pool(inputs, rois, trans, **OPTIONS)

    for num_rois in (7, 0, 1, 20):
        *operands, _ = draw_full_call(num_rois=num_rois)
        assert_close(
            graph(*operands).numpy(),
            roi_reference.deformable_psroi_pool(*operands, **OPTIONS),
            "float32",
            "output",
        )


@pytest.mark.parametrize(
    ("inputs", "rois", "trans", "num_rois"),
    [
        ((2, 8, 9, 36), (7, 5), (7, 5, 2, 6), 7),
        ((2, 8, 9, 36), (None, 5), (7, 5, 2, 6), 7),
        ((2, 8, 9, 36), (7, 5), (None, None, None, None), 7),
        ((2, 8, 9, 36), (7, None), None, 7),
        ((None, None, None, 36), (None, 5), (None, 5, 2, 6), None),
        ((None, None, None, None), None, (4, None, None, None), 4),
        (None, None, None, None),
        (None, (3, 5), "absent", 3),
        ((2, 8, 9, 36), None, "absent", None),
        ((0, 0, 0, 36), (0, 5), "absent", 0),
    ],
)
def test_static_output_shape(inputs, rois, trans, num_rois):
    specs = [tf.TensorSpec(inputs), tf.TensorSpec(rois)]
    if trans != "absent":
        specs.append(tf.TensorSpec(trans))

    @tf.function(input_signature=specs)
    def graph(*operands):
        return deformable_psroi_pool(*operands, return_count=True, **OPTIONS)

    for tensor in graph.get_concrete_function().structured_outputs:
        assert tuple(tensor.shape) == (num_rois, 3, 4, 6)


def test_graph_ops_have_names_that_last():
    """They are part of every SavedModel."""

    @tf.function(input_signature=_signature("shapes", "float32"))
    def graph(inputs, rois, trans, output_grad):
        return forward_and_gradients(
            [inputs, rois, trans], output_grad, **OPTIONS
        )

    nodes = graph.get_concrete_function().graph.as_graph_def().node
    ours = [node.op for node in nodes if node.op.startswith("TfDeform>")]
    assert sorted(ours) == [
        "TfDeform>DeformablePSROIPool",
        "TfDeform>DeformablePSROIPoolGrad",
    ]


def test_static_shapes_of_gradients_are_those_of_the_operands():
    @tf.function(input_signature=_signature("shapes", "float32"))
    def graph(inputs, rois, trans, output_grad):
        _, gradients = forward_and_gradients(
            [inputs, rois, trans], output_grad, **OPTIONS
        )
        for operand, gradient in zip((inputs, trans), gradients, strict=True):
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


@pytest.mark.parametrize("classes", [0, 1, 2, 3])
def test_compute_gradient_agrees(classes):
    """No classes: no displacement."""
    rng = np.random.default_rng(classes)
    options = dict(
        output_dim=6,
        spatial_scale=0.5,
        pooled_size=(2, 1),
        group_size=(1, 2),
        part_size=(2, 2),
        sample_per_part=2,
        trans_std=0.2,
    )
    inputs = rng.normal(size=(2, 4, 3, 12))
    rois = roi_reference.draw_rois(
        rng, 2, (4, 3), 0.5, 3, ("inside", "across the edge", "padding")
    )
    operands = [inputs]
    if classes:
        operands.append(rng.uniform(-1, 1, (3, 2, 2, 2 * classes)))
        roi_reference.move_off_kinks(
            rng,
            lambda: roi_reference.psroi_bins(
                inputs, rois, operands[1], **options
            ),
            operands[1],
        )

    def pool(inputs, *trans):
        return deformable_psroi_pool(inputs, rois, *trans, **options)

    theoretical, numerical = tf.test.compute_gradient(pool, operands)
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-9)


# Only the requested gradients.

WANTED = [(0,), (1,), (0, 1), ()]  # Of inputs and trans.


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("wanted", WANTED)
def test_any_subset_of_the_gradients(wanted, mode):
    """Leaving one gradient out does not change the other."""
    inputs, rois, trans, output_grad = map(tf.constant, draw_full_call())

    def some_gradients():
        sources = [(inputs, trans)[index] for index in wanted]
        with tf.GradientTape() as tape:
            tape.watch([*sources, rois])
            output = deformable_psroi_pool(inputs, rois, trans, **OPTIONS)
        return tape.gradient(output, sources, output_grad)

    if mode == "graph":
        some_gradients = tf.function(some_gradients)
    _, every = forward_and_gradients(
        [inputs, rois, trans], output_grad, **OPTIONS
    )
    for index, gradient in zip(wanted, some_gradients(), strict=True):
        np.testing.assert_array_equal(gradient, every[index])


def gradients_computed() -> np.ndarray:
    """How many gradients of inputs and trans have been computed so far."""
    counts = (ctypes.c_int64 * 2)()
    library = ctypes.CDLL(_loader.LIBRARY)
    library.TfDeformDeformablePSROIPoolGradientsComputed(counts)
    return np.array(counts[:])


@pytest.mark.parametrize("wanted", WANTED)
def test_only_watched_gradients_are_computed(wanted):
    inputs, rois, trans, _ = map(tf.constant, draw_full_call())
    sources = [(inputs, trans)[index] for index in wanted]
    with tf.GradientTape() as tape:
        tape.watch([*sources, rois])
        output = deformable_psroi_pool(inputs, rois, trans, **OPTIONS)
    before = gradients_computed()
    tape.gradient(output, [*sources, rois])
    expected = [int(index in wanted) for index in range(2)]
    np.testing.assert_array_equal(gradients_computed() - before, expected)


@pytest.mark.parametrize("wanted", WANTED)
def test_only_used_gradients_are_computed_in_a_graph(wanted):
    """Even where a tape watches all operands, as it does variables."""
    inputs, rois, trans, _ = map(tf.constant, draw_full_call())

    @tf.function
    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch([inputs, rois, trans])
            output = deformable_psroi_pool(inputs, rois, trans, **OPTIONS)
        sources = [(inputs, trans)[index] for index in wanted]
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
            output = deformable_psroi_pool(inputs, rois, **OPTIONS)
        return tape.gradient(output, inputs)

    before = gradients_computed()
    (gradient if mode == "eager" else tf.function(gradient))()
    np.testing.assert_array_equal(gradients_computed() - before, [1, 0])


# The same bits, however many threads.

_HASHES = """
import hashlib
import numpy as np
import tensorflow as tf
from tf_deform.ops import deformable_psroi_pool

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
            tf.cast(rng.normal(size=(batch, 19, 17, 9 * 12)), dtype),
            tf.cast(rng.normal(size=(200, 5, 4, 6)), "float32"),
        ]
        output_grad = tf.cast(rng.normal(size=(200, 5, 4, 12)), dtype)
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = deformable_psroi_pool(
                operands[0],
                rois,
                operands[1],
                output_dim=12,
                spatial_scale=1 / 16,
                pooled_size=(5, 4),
                group_size=3,
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
    trans = np.zeros((len(rois), 5, 2, 6))
    trans[bad:] = np.reshape([np.nan, np.inf, -np.inf], (3, 1, 1, 1))
    operands = (
        np.full((1, 8, 9, 36), np.nan),
        rois,
        trans,
        np.full((len(rois), 3, 4, 6), np.nan),
    )
    *operands, output_grad = cast(operands, dtype)
    results, gradients = forward_and_gradients(operands, output_grad, **OPTIONS)
    for tensor in [*results, *gradients]:
        assert (np.asarray(tensor).astype(float) == 0).all()
