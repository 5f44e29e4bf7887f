# SPDX-License-Identifier: Apache-2.0
"""Tests the promises of every op: types, graphs, wanted gradients, threads."""

import concurrent.futures
import ctypes
import functools
import hashlib
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_equal, assert_finite_differences
from every_op import (
    CONV2D,
    CONV2D_FIELDS,
    COORDINATES,
    KNOWN,
    OPS,
    POOLING,
    every_op,
    every_variant,
    typed,
)
from operands import DTYPES, coordinate_type
from pairwise import grid

from tf_deform import _loader
from tf_deform.layers import DeformableConv2D

# Outputs and gradients against the float64 reference, and its own gradients, on
# which other tests rely.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 325))
@every_op
def test_random_configurations(op, seed, dtype):
    op.check(op.draw_random(seed, dtype), dtype)


@every_variant
def test_reference_gradients_equal_finite_differences(op, variant):
    operands, output_grad, options = call = op.draw_small(variant)
    _, gradients = op.reference(*call)

    def loss() -> float:
        outputs, _ = op.reference(operands, output_grad, options)
        return np.sum(outputs[0] * output_grad)

    rng = np.random.default_rng(0)
    for name in op.differentiable:
        if operands.get(name) is not None:
            assert_finite_differences(
                rng,
                loss,
                operands[name],
                gradients[name],
                name=name,
                how_many=10,
            )


# Types.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
@every_op
def test_coordinates_are_cast_to_their_type(op, given, dtype):
    """Tests float32, and float64 for float64 `inputs`, whatever is given."""
    operands, output_grad = op.draw(dtype)
    others = {
        name: tf.cast(x, given)
        for name, x in operands.items()
        if name in COORDINATES
    }
    cast = {k: tf.cast(x, coordinate_type(dtype)) for k, x in others.items()}
    outputs, gradients = op.results({**operands, **others}, output_grad)
    expected, wanted = op.results({**operands, **cast}, output_grad)
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
def test_operands_may_be_numpy_lists_or_variables(op, convert):
    operands = {
        name: np.nan_to_num(x, posinf=9, neginf=-9)
        for name, x in op.draw()[0].items()
    }
    inputs = operands.pop("inputs")
    actual, expected = (
        op.function(
            make_inputs(inputs),
            **{name: make(x) for name, x in operands.items()},
            **op.options,
        )
        for make_inputs, make in (
            (tf.Variable, convert),
            (np.asarray, tf.constant),
        )
    )
    assert_equal(actual, expected)


# Eager, graphs, static shapes.


def graph_of(op, known, dtype, **changes):
    """Returns a function of the full call's operands and its gradient."""
    operands, output_grad = op.draw(dtype)

    @tf.function(
        input_signature=[
            tf.TensorSpec(KNOWN[known](x), x.dtype)
            for x in (*operands.values(), output_grad)
        ]
    )
    def graph(*tensors):
        *given, output_grad = tensors
        given = dict(zip(operands, given, strict=True))
        return op.results(given, output_grad, **changes)

    return graph


@grid(
    {
        "op, changes": [
            *((op, {}) for op in OPS),
            (CONV2D, {"boundary": "clamp"}),
            (CONV2D_FIELDS, {}),
        ],
        "known": list(KNOWN),
        "dtype": list(DTYPES),
    }
)
def test_graph_equals_eager(op, changes, known, dtype):
    operands, output_grad = op.draw(dtype)
    actual = graph_of(op, known, dtype, **changes)(
        *operands.values(), output_grad
    )
    expected = op.results(operands, output_grad, **changes)
    for one, two in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        assert_equal(one, two, dtype=two.dtype)


@every_op
def test_one_trace_serves_every_size(op):
    signature = [tf.TensorSpec([None] * x.ndim) for x in op.draw()[0].values()]
    graph = tf.function(
        lambda *operands: op.function(*operands, **op.options),
        input_signature=signature,
    )
    for changes in (
        {},
        {op.larger: 0},
        {op.larger: 1, "size": (6, 11)},
        {op.larger: 20},
    ):
        operands, _, options = typed(
            op.make(**{**op.full, **changes}), "float32"
        )
        assert_equal(
            graph(*operands.values()),
            op.function(**operands, **options),
            case=changes,
        )


@every_op
def test_names_and_static_shapes_of_graph_ops(op):
    """Tests the names, which are part of every SavedModel, and the shapes."""
    graph = graph_of(op, "shapes", "float32").get_concrete_function()
    kinds = [node.op for node in graph.graph.as_graph_def().node]
    ours = sorted(kind for kind in kinds if kind.startswith("TfDeform>"))
    assert ours == [f"TfDeform>{op.name}", f"TfDeform>{op.name}Grad"]
    _, gradients = graph.structured_outputs
    for name, gradient in gradients.items():
        assert gradient.shape == op.draw()[0][name].shape, name


@every_op
def test_static_shapes_of_unwanted_gradients(op):
    """Tests that graphs know them to be empty, so that they need no memory."""
    operands, _ = op.draw()
    operands["inputs"] = tf.constant(operands["inputs"])

    @tf.function
    def graph():
        with tf.GradientTape() as tape:
            tape.watch(operands["inputs"])
            output = op.function(**operands, **op.options)
        return tape.gradient(output, operands["inputs"])

    (node,) = (
        node
        for node in graph.get_concrete_function().graph.get_operations()
        if node.type == f"TfDeform>{op.name}Grad"
    )
    wanted, *others = (tensor.shape.as_list() for tensor in node.outputs)
    assert wanted == [*operands["inputs"].shape]
    assert others == [[0]] * (len(op.differentiable) - 1)


@every_op
def test_many_calls_at_once(op):
    """Calls from several Python threads, and side by side in one graph."""
    operands, output_grad = op.draw(larger=12)

    def run(_=None):
        return op.results(operands, output_grad)

    expected = run()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(32)))
    results += tf.function(lambda: [run() for _ in range(16)])()
    for number, result in enumerate(results):
        assert_equal(result, expected, case=f"call {number}")


# Gradients.


@every_variant
def test_compute_gradient_agrees(op, variant):
    operands, _, options = op.draw_small(variant)
    names = [
        name for name in op.differentiable if operands.get(name) is not None
    ]
    theoretical, numerical = tf.test.compute_gradient(
        lambda *some: op.function(
            **{**operands, **dict(zip(names, some, strict=True))}, **options
        ),
        [operands[name] for name in names],
    )
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-9)


# Only the requested gradients.


def computed_by(op, function):
    """Returns the gradients that `function` computes, once, and its result."""

    def counts():
        numbers = (ctypes.c_int64 * 4)()  # the convolution's, with a mask
        library = ctypes.CDLL(_loader.LIBRARY)
        getattr(library, f"TfDeform{op.name}GradientsComputed")(numbers)
        return np.array(numbers)

    before = counts()
    result = function()
    computed = counts() - before
    assert set(computed) <= {0, 1}
    return tuple(itertools.compress(op.differentiable, computed)), result


@functools.cache
def every_gradient(op):
    return op.results(*op.draw())[1]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (op, wanted)
        for op in (*OPS, CONV2D_FIELDS)
        for count in range(len(op.differentiable) + 1)
        for wanted in itertools.combinations(op.differentiable, count)
    ],
    ids=lambda value: (
        "+".join(value) if isinstance(value, tuple) else str(value)
    ),
)
def test_any_subset_of_the_gradients(op, wanted, mode):
    """Tests that only these are computed, with the same bits as among all.

    A graph prunes what is unused even if a tape watches all operands, as it
    watches variables. Outside of graphs a tape says what is wanted.
    """
    operands, output_grad = op.draw()
    operands = {name: tf.constant(x) for name, x in operands.items()}
    watched = [*wanted, *(["rois"] if "rois" in operands else [])]
    if mode == "graph":
        watched = operands

    def some_gradients():
        with tf.GradientTape() as tape:
            tape.watch([operands[name] for name in watched])
            output = op.function(**operands, **op.options)
        sources = {name: operands[name] for name in wanted}
        return tape.gradient(output, sources, output_grad)

    run = tf.function(some_gradients) if mode == "graph" else some_gradients
    computed, gradients = computed_by(op, run)
    assert computed == wanted
    every = every_gradient(op)
    assert_equal(gradients, {name: every[name] for name in wanted})


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("op", POOLING.values(), ids=str)
def test_without_displacements_only_inputs_have_a_gradient(op, mode):
    inputs, rois, _ = map(tf.constant, op.draw()[0].values())

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch([inputs, rois])
            output = op.function(inputs, rois, **op.options)
        return tape.gradient(output, inputs)

    run = gradient if mode == "eager" else tf.function(gradient)
    assert computed_by(op, run)[0] == ("inputs",)


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
    assert computed_by(CONV2D, run)[0] == ("inputs", "offset")


# The same bits for any number of threads.


def hashes() -> list[str]:
    """Returns a line for each result of large calls."""
    lines = []
    for op, dtype, batch in itertools.product(
        (*OPS, CONV2D_FIELDS), ("float32", "bfloat16"), (1, 5)
    ):
        call = typed(op.make(**op.large, batch=batch), dtype)
        outputs, gradients = op.results(*call)
        for name, tensor in {"output": outputs[0], **gradients}.items():
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            lines.append(f"{op} {dtype} {batch} {name} {digest}")
    return lines


# Both numbers in copies of one process, which has imported TensorFlow, and has
# not used it. The import takes seconds.
_HASHES = """
import os, sys
sys.path[:0] = sys.argv[1:]
import every_op_test
for threads in ("1", "3"):
    child = os.fork()
    if not child:
        os.environ["TF_NUM_INTRAOP_THREADS"] = threads
        print(*every_op_test.hashes(), sep="\\n", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.cpu_only(reason="a GPU has no such threads; see gpu_test.py")
def test_results_are_bitwise_equal_for_any_number_of_threads(run_python):
    here = pathlib.Path(__file__).parent
    lines = run_python(_HASHES, here, here.parent / "lib").splitlines()
    half = len(lines) // 2
    one, three = lines[:half], lines[half:]
    digests = {line.split()[-1] for line in one}
    assert len(one) == 2 * 2 * (5 + 3 + 3 + 4) and len(digests) == len(one)
    assert three == one and hashes() == one
