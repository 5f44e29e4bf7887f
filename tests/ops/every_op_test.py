# SPDX-License-Identifier: Apache-2.0
"""Tests the promises of every op: types, graphs, wanted gradients, threads."""

import concurrent.futures
import ctypes

import full_calls
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_equal
from full_calls import CONV2D, OPS, POOLING
from operands import Conv2DCase, coordinate_type
from pooling import PSROI_POOL, ROI_ALIGN

from tf_deform import _loader, ops
from tf_deform.layers import DeformableConv2D

DTYPES = ["float16", "bfloat16", "float32", "float64"]

every_op = pytest.mark.parametrize("call", OPS, ids=str)


# Types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
@every_op
def test_coordinates_are_cast_to_their_type(call, given, dtype):
    """Tests float32, and float64 for float64 `inputs`, whatever is given."""
    operands, output_grad = call.draw(dtype)
    others = {
        name: tf.cast(x, given)
        for name, x in operands.items()
        if name in full_calls.COORDINATES
    }
    cast = {k: tf.cast(x, coordinate_type(dtype)) for k, x in others.items()}
    outputs, gradients = call.results({**operands, **others}, output_grad)
    expected, wanted = call.results({**operands, **cast}, output_grad)
    assert_equal(outputs, expected, name="outputs")
    for name, gradient in gradients.items():
        kind = given if name in others else dtype
        assert_equal(
            gradient, tf.cast(wanted[name], kind), name=name, dtype=kind
        )


@pytest.mark.parametrize(
    "convert", [np.asarray, np.ndarray.tolist, tf.Variable]
)
@every_op
def test_operands_may_be_numpy_lists_or_variables(call, convert):
    operands, _ = call.draw()
    operands = {
        k: np.nan_to_num(x, posinf=9, neginf=-9) for k, x in operands.items()
    }
    inputs = operands.pop("inputs")
    expected = call.function(
        inputs,
        **{name: tf.constant(x) for name, x in operands.items()},
        **call.options,
    )
    actual = call.function(
        tf.Variable(inputs),
        **{name: convert(x) for name, x in operands.items()},
        **call.options,
    )
    assert_equal(actual, expected)


# Eager, graphs, static shapes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", full_calls.KNOWN)
@pytest.mark.parametrize(
    ("call", "changes"),
    [*((call, {}) for call in OPS), (CONV2D, {"boundary": "clamp"})],
    ids=str,
)
def test_graph_equals_eager(call, changes, known, dtype):
    operands, output_grad = call.draw(dtype)

    @tf.function(input_signature=full_calls.signature(call, known, dtype))
    def graph(*tensors):
        *given, output_grad = tensors
        given = dict(zip(operands, given, strict=True))
        return call.results(given, output_grad, **changes)

    expected = call.results(operands, output_grad, **changes)
    actual = graph(*operands.values(), output_grad)
    for one, two in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        assert_equal(one, two, dtype=two.dtype)


def graph_with_gradients(call):
    """Returns the graph of a call and of its gradients, all shapes known."""
    names = call.draw()[0]
    signature = full_calls.signature(call, "shapes", "float32")

    @tf.function(input_signature=signature)
    def graph(*tensors):
        *given, output_grad = tensors
        given = dict(zip(names, given, strict=True))
        _, gradients = call.results(given, output_grad)
        for name, gradient in gradients.items():
            assert gradient.shape == given[name].shape, name
        return gradients

    return graph.get_concrete_function().graph


@every_op
def test_graph_ops_have_names_that_last(call):
    """Tests the names, which are part of every SavedModel."""
    nodes = graph_with_gradients(call).as_graph_def().node
    ours = [node.op for node in nodes if node.op.startswith("TfDeform>")]
    assert sorted(ours) == [f"TfDeform>{call.op}", f"TfDeform>{call.op}Grad"]


@every_op
def test_static_shapes_of_gradients_are_those_of_the_operands(call):
    graph_with_gradients(call)


@every_op
def test_many_calls_at_once(call):
    """Calls from several Python threads, and side by side in one graph."""
    operands, output_grad = call.draw(larger=12)

    def run(_=None):
        return call.results(operands, output_grad)

    expected = run()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(32)))
    results += tf.function(lambda: [run() for _ in range(16)])()
    for number, result in enumerate(results):
        assert_equal(result, expected, case=f"call {number}")


# Gradients.


def draw_for_differences(name, options):
    """Returns a function of operands, and operands away from kinks."""
    rng = np.random.default_rng(options.get("seed", 0))
    if name == "conv2d":
        case = Conv2DCase(
            size=(4, 3),
            channels=4,
            filters=2,
            kernel_size=(2, 1),
            groups=2,
            offset_groups=2,
            **options,
        )
        return (
            lambda *x: ops.deformable_conv2d(*x, **case.options)
        ), case.operands("float64")
    op = PSROI_POOL if name == "psroi_pool" else ROI_ALIGN
    classes = options.get("classes", 1)
    attributes = op.attributes(
        6,
        spatial_scale=0.5,
        pooled_size=(2, 1),
        group_size=(1, 2),
        part_size=(2, 2),
        sample_per_part=2,
        trans_std=0.2,
        sampling_ratio=options.get("sampling_ratio"),
        gamma=0.2,
    )
    inputs, rois, displacement, _ = op.draw_differentiable(
        rng,
        attributes,
        size=(4, 3),
        num_rois=3,
        kinds=("inside", "across the edge", "padding"),
        channels=3,
        classes=max(classes, 1),
    )
    function = POOLING[op].function
    operands = [inputs, displacement] if classes else [inputs]
    return (
        lambda inputs, *rest: function(inputs, rois, *rest, **attributes)
    ), operands


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[
            ("conv2d", dict(has_mask=has_mask, boundary=boundary))
            for has_mask in (True, False)
            for boundary in ("zeros", "clamp")
        ],
        # No classes: no displacement.
        *[("psroi_pool", dict(classes=n, seed=n)) for n in range(4)],
        *[
            ("roi_align", dict(classes=displaced, seed=n, sampling_ratio=n))
            for displaced in (0, 1)
            for n in range(3)
        ],
    ],
    ids=str,
)
def test_compute_gradient_agrees(name, options):
    function, operands = draw_for_differences(name, options)
    theoretical, numerical = tf.test.compute_gradient(function, operands)
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-9)


# Only the requested gradients.

subsets = pytest.mark.parametrize(
    ("call", "wanted"),
    [(call, wanted) for call in OPS for wanted in call.subsets()],
    ids=lambda value: (
        "+".join(value) if isinstance(value, tuple) else str(value)
    ),
)


def gradients_computed(call):
    """Returns how many gradients of each operand have been computed so far."""
    counts = (ctypes.c_int64 * len(call.differentiable))()
    library = ctypes.CDLL(_loader.LIBRARY)
    getattr(library, f"TfDeform{call.op}GradientsComputed")(counts)
    return dict(zip(call.differentiable, counts, strict=True))


def computed_by(call, function) -> tuple[str, ...]:
    """Returns the names of the gradients that `function` computes, once."""
    before = gradients_computed(call)
    function()
    after = gradients_computed(call)
    assert all(after[name] - before[name] in (0, 1) for name in after)
    return tuple(name for name in after if after[name] > before[name])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@subsets
def test_any_subset_of_the_gradients(call, wanted, mode):
    """Tests that leaving some gradients out does not change the others."""
    operands, output_grad = call.draw()
    operands = {name: tf.constant(x) for name, x in operands.items()}

    def some_gradients():
        sources = {name: operands[name] for name in wanted}
        with tf.GradientTape() as tape:
            tape.watch([sources, operands.get("rois", [])])
            output = call.function(**operands, **call.options)
        return tape.gradient(output, sources, output_grad)

    if mode == "graph":
        some_gradients = tf.function(some_gradients)
    _, every = call.results(operands, output_grad)
    assert_equal(some_gradients(), {name: every[name] for name in wanted})


@subsets
def test_only_watched_gradients_are_computed(call, wanted):
    operands, _ = call.draw()
    operands = {name: tf.constant(x) for name, x in operands.items()}
    sources = [operands[name] for name in wanted]
    sources += [operands["rois"]] if "rois" in operands else []
    with tf.GradientTape() as tape:
        tape.watch(sources)
        output = call.function(**operands, **call.options)
    assert computed_by(call, lambda: tape.gradient(output, sources)) == wanted


@subsets
def test_only_used_gradients_are_computed_in_a_graph(call, wanted):
    """Tests graphs, also if a tape watches all operands, as variables."""
    operands, _ = call.draw()
    operands = {name: tf.constant(x) for name, x in operands.items()}

    @tf.function
    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = call.function(**operands, **call.options)
        return tape.gradient(output, [operands[name] for name in wanted])

    assert computed_by(call, some_gradients) == wanted


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("call", POOLING.values(), ids=str)
def test_without_displacements_only_inputs_have_a_gradient(call, mode):
    operands, _ = call.draw()
    inputs, rois = map(tf.constant, (operands["inputs"], operands["rois"]))

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch([inputs, rois])
            output = call.function(inputs, rois, **call.options)
        return tape.gradient(output, inputs)

    run = gradient if mode == "eager" else tf.function(gradient)
    assert computed_by(call, run) == ("inputs",)


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

    run = gradient if mode == "eager" else tf.function(gradient)
    assert computed_by(CONV2D, run) == ("inputs", "offset")


# The same bits for any number of threads.

_HASHES = """
import hashlib
import numpy as np
import tensorflow as tf
from tf_deform import ops


def draw_rois(rng, batch):
    corners = rng.uniform(-20, 300, (200, 2, 2))
    indices = rng.integers(-1, batch, (200, 1))
    return np.concatenate([indices, corners.min(1), corners.max(1)], axis=1)


def convolution(rng, batch):
    def call(inputs, kernel, offset, mask):
        return ops.deformable_conv2d(
            inputs, kernel, offset, mask, padding="same", offset_groups=3)
    return call, [
        rng.normal(size=(batch, 31, 29, 24)),
        rng.normal(size=(3, 3, 12, 40)),
        rng.normal(0, 3, (batch, 31, 29, 54)),
        rng.normal(size=(batch, 31, 29, 27)),
    ], 2


def psroi_pool(rng, batch):
    rois = draw_rois(rng, batch)
    def call(inputs, trans):
        return ops.deformable_psroi_pool(
            inputs, rois, trans, output_dim=12, spatial_scale=1 / 16,
            pooled_size=(5, 4), group_size=3)
    return call, [
        rng.normal(size=(batch, 19, 17, 9 * 12)),
        rng.normal(size=(200, 5, 4, 6)),
    ], 1


def roi_align(rng, batch):
    rois = draw_rois(rng, batch)
    def call(inputs, offset):
        return ops.deformable_roi_align(
            inputs, rois, offset, spatial_scale=1 / 16, pooled_size=(5, 4))
    return call, [
        rng.normal(size=(batch, 19, 17, 12)),
        rng.normal(size=(200, 5, 4, 2)),
    ], 1


for make in (convolution, psroi_pool, roi_align):
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 5):
            rng = np.random.default_rng(0)
            call, arrays, values = make(rng, batch)
            operands = [
                tf.cast(array, dtype if index < values else "float32")
                for index, array in enumerate(arrays)
            ]
            with tf.GradientTape() as tape:
                tape.watch(operands)
                output = call(*operands)
            output_grad = tf.cast(rng.normal(size=output.shape), dtype)
            gradients = tape.gradient(output, operands, output_grad)
            for tensor in [output, *gradients]:
                digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                print(make.__name__, dtype, batch, tuple(tensor.shape), digest)
"""


@pytest.mark.cpu_only(reason="a GPU has no such threads; see gpu_test.py")
def test_results_are_bitwise_equal_for_any_number_of_threads(run_python):
    one, *others = (
        run_python(_HASHES, TF_NUM_INTRAOP_THREADS=n).splitlines()
        for n in (1, 2, 3)
    )
    assert len(one) == 2 * 2 * (5 + 3 + 3) and len(set(one)) == len(one)
    assert others == [one, one]
