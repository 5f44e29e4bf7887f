# SPDX-License-Identifier: Apache-2.0
"""Tests of the ops in stock TensorFlow.

Their errors are tested in `bad_calls_test.py` and `arguments_test.py`.
"""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close
from every_op import (
    CONV2D,
    KNOWN,
    OPS,
    POOLING,
    broken_fields,
    conv2d_call,
    every_op,
    typed,
)
from operands import (
    BOUNDARIES,
    DTYPES,
    FACTORS,
    Conv2DCase,
    conv2d_places,
    draw_conv2d_case,
    one_sample_per_image,
)
from pairwise import grid
from tolerances import PORTABLE, PORTABLE_GRADIENT
from traced import kinds_of_ops

from tf_deform._portable.roi_pooling import finite

both_pooling_ops = pytest.mark.parametrize("pool", POOLING, ids=str)


def portable(op, call):
    return op.results(*call, implementation="portable")


def check_equal(received, expected, dtype, case=""):
    """Compares outputs and gradients, by value and type."""
    for name, one, two, tolerance in zip(
        ("outputs", "gradients"),
        received,
        expected,
        (PORTABLE, PORTABLE_GRADIENT),
        strict=True,
    ):
        assert_close(one, two, tolerance[dtype], case=case, name=name)
    types, wanted = (
        [x.dtype for x in tf.nest.flatten(results)]
        for results in (received, expected)
    )
    assert types == wanted, case


def check_against_native(op, call, dtype, case=""):
    check_equal(portable(op, call), op.results(*call), dtype, case or call[2])


# The same numbers and gradients as the native op.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", ["full call", *range(900, 908)])
@every_op
def test_equals_native(op, seed, dtype):
    call = *op.draw(dtype), op.options
    if seed != "full call":
        call = op.draw_random(seed, dtype)
    check_against_native(op, call, dtype)


@pytest.mark.parametrize("seed", [920, 921, 922, 924, *range(930, 936)])
@every_op
def test_equals_the_reference(op, seed):
    call, tolerance = op.draw_random(seed, "float64"), 1e-9
    if op is CONV2D:
        case = draw_conv2d_case(seed, batch=1, size=(6, 7))
        call, tolerance = conv2d_call(case), 1e-12
    outputs, gradients = portable(op, call)
    expected, wanted = op.reference(*call)
    assert_close(outputs, expected, tolerance, case=call[2])
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], tolerance, case=call[2], name=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_place_of_a_sample(boundary, size, dtype):
    """Tests edges, integers, NaN, infinities: values, and slopes at kinks."""
    places = [conv2d_places(n, dtype) for n in size]
    # TensorFlow's kernels treat subnormal numbers as 0.
    tiny = np.finfo(dtype).tiny
    places = [p[~((np.abs(p) < tiny) & (p != 0))] for p in places]
    coordinates = np.array(list(itertools.product(*places)))
    call = one_sample_per_image(coordinates, size, 5, boundary)
    check_against_native(CONV2D, call, dtype)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_what_is_outside_is_zero_whatever_its_mask(boundary):
    """Tests NaN offsets and masks.

    They must not reach the output or a gradient.
    """
    call = conv2d_call(Conv2DCase(boundary=boundary), "float32")
    offset, mask = call[0]["offset"], call[0]["mask"]
    offset.reshape(-1)[::7] = np.nan
    offset.reshape(-1)[3::11] = np.inf
    outside = ~np.isfinite(offset.reshape(*mask.shape, 2)).all(-1)
    mask[outside] = np.nan
    outputs, gradients = portable(CONV2D, call)
    for tensor in (*outputs, *gradients.values()):
        assert np.isfinite(tensor).all()
    assert not gradients["mask"].numpy()[outside].any()
    check_equal((outputs, gradients), CONV2D.results(*call), "float32")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    ("modulation", "factors"),
    [
        *((modulation, False) for modulation in ("none", *FACTORS)),
        *((modulation, True) for modulation in FACTORS),
    ],
)
def test_nan_and_infinity_of_a_branch(modulation, factors, boundary):
    call = broken_fields(modulation, boundary, "float32", factors)
    assert np.isnan(portable(CONV2D, call)[0]).any()
    check_against_native(CONV2D, call, "float32")


def test_convolution_reads_nothing_else():
    """Tests that a pixel of infinity changes only samples that read it."""
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, 2, 2] = np.inf
    for place, reads in (((0.5, 0.5), False), ((1.5, 1.5), True)):
        output = CONV2D.function(
            image,
            np.ones((1, 1, 1, 1), np.float32),
            np.reshape(np.float32(place), (1, 1, 1, 2)),
            strides=4,
            implementation="portable",
        )
        assert np.isinf(output.numpy().item()) == reads


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch=0),
        dict(size=(0, 5)),
        dict(size=(7, 0)),
        dict(size=(0, 4), padding=((2, 3), (1, 1))),
        dict(batch=0, groups=2, offset_groups=2, has_mask=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_to_convolve(settings, boundary):
    case = Conv2DCase(**settings, boundary=boundary)
    operands, output_grad, options = call = conv2d_call(case, "float32")
    native = CONV2D.results(*call)
    check_equal(portable(CONV2D, call), native, "float32")
    graph = graph_of_any_shapes(tuple(operands), tuple(options.items()))
    check_equal(graph(*operands.values(), output_grad), native, "float32")


@functools.cache
def graph_of_any_shapes(names, options):
    """Returns a graph that serves every convolution with these options."""

    @tf.function(input_signature=[tf.TensorSpec([None] * 4)] * (len(names) + 1))
    def graph(*tensors):
        *given, output_grad = tensors
        given = dict(zip(names, given, strict=True))
        return portable(CONV2D, (given, output_grad, dict(options)))

    return graph


@both_pooling_ops
@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1)])
def test_pooling_at_integers_and_edges(pool, size):
    """Tests samples on pixels, on edges and at clamped coordinates."""
    rng = np.random.default_rng(0)
    marks = [-2, -1, -0.5, 0, 0.5, 1, 2, 3.5, 4, 4.5, 5, 5.5, 6, 7]
    corners = np.array(list(itertools.product(marks, marks)))
    rng.shuffle(corners)
    others = rng.permutation(corners)
    rois = np.concatenate([np.zeros((len(corners), 1)), corners, others], 1)
    options = pool.attributes(
        3,
        pooled_size=(2, 1),
        spatial_scale=1.0,
        group_size=1,
        trans_std=0.5,
        gamma=0.5,
        **{pool.samples: 2},
    )
    operands = {
        "inputs": rng.normal(size=(1, *size, 3)),
        "rois": rois,
        pool.displacement: rng.choice([0.0, 0.5, -1.0], (len(rois), 2, 1, 2)),
    }
    output_grad = rng.normal(size=(len(rois), 2, 1, 3))
    check_against_native(
        POOLING[pool], (operands, output_grad, options), "float64"
    )


@both_pooling_ops
def test_a_batch_index_that_is_none_gives_zeros(pool):
    """Tests padding, as on a GPU: an exported model cannot raise an error."""
    index = [0, 1, 2, 0.5, -0.5, -1, np.nan, np.inf, -np.inf, 1e30]
    rois = np.float32([[i, 1, 1, 5, 5] for i in index])
    output = POOLING[pool].function(
        np.ones((2, 6, 6, 3), np.float32),
        rois,
        implementation="portable",
        **pool.attributes(3, pooled_size=2, spatial_scale=1, group_size=1),
    )
    np.testing.assert_allclose(output[:2], 1, rtol=1e-6)
    assert not output[2:].numpy().any()


@pytest.mark.parametrize(
    "shape, num_rois, index",
    [
        ((2, 5, 4, 3), 0, 0),
        ((0, 5, 4, 3), 4, -1),
        ((2, 0, 4, 3), 4, 1),
        ((2, 5, 0, 3), 4, 1),
    ],
)
@both_pooling_ops
def test_nothing_to_pool(pool, shape, num_rois, index):
    options = pool.attributes(
        3, pooled_size=(2, 1), spatial_scale=1.0, group_size=1
    )
    operands = {
        "inputs": np.ones(shape),
        "rois": np.tile([[index, 0, 0, 3, 3]], (num_rois, 1)),
        pool.displacement: np.ones((num_rois, 2, 1, 2)),
    }
    call = operands, np.ones((num_rois, 2, 1, 3)), options
    check_against_native(POOLING[pool], typed(call, "float32"), "float32")


def test_finite():
    numbers = tf.constant([0.0, -3e38, np.nan, np.inf, -np.inf])
    assert finite(numbers).numpy().tolist() == [True] * 2 + [False] * 3


# Graphs: only the kernel's size must be known.

CALLS = {
    f"{op}-{seed}": (op, op.draw_random(seed, "float32"))
    for op in OPS
    for seed in (941, 943)
}
every_call = pytest.mark.parametrize("name", CALLS)


def graph_of(name, known, run):
    """Returns a function of the operands that are not None, and these.

    `known` returns the part of a shape that the graph knows, from an array and
    an operand's name; `run` takes an op and a call.
    """
    op, (operands, *rest) = CALLS[name]
    present = {k: x for k, x in operands.items() if x is not None}

    @tf.function(
        input_signature=[tf.TensorSpec(known(x, k)) for k, x in present.items()]
    )
    def graph(*tensors):
        given = {**operands, **dict(zip(present, tensors, strict=True))}
        return run(op, (given, *rest))

    return graph, present.values()


def forward(op, call, implementation="portable"):
    operands, _, options = call
    return op.function(**operands, **options, implementation=implementation)


@grid(
    {
        "op": OPS,
        "seed": [941, 943],
        "known": ["channels", "rank", "nothing"],
    }
)
def test_dynamic_shapes(op, seed, known):
    def shape(x, name):
        if known == "channels" and name == "kernel":
            return x.shape
        return KNOWN[known](x)

    name = f"{op}-{seed}"
    graph, operands = graph_of(name, shape, portable)
    check_equal(graph(*operands), portable(*CALLS[name]), "float32")


@every_call
def test_static_shapes_are_those_of_the_native_op(name):
    for known in (
        lambda x, _: x.shape,
        lambda x, _: (None, *x.shape[1:]),
        lambda x, _: (*[None] * (x.ndim - 1), x.shape[-1]),
    ):
        received, expected = (
            graph_of(
                name,
                known,
                functools.partial(forward, implementation=implementation),
            )[0]
            .get_concrete_function()
            .output_shapes.as_list()
            for implementation in ("portable", "native")
        )
        assert received == expected


@every_call
def test_only_ops_that_exist_elsewhere(name):
    """Tests that there is no loop, no condition, and no op of this package."""
    graph, _ = graph_of(name, lambda x, _: [None] * x.ndim, forward)
    kinds = kinds_of_ops(graph.get_concrete_function())
    assert not any("Deform" in kind for kind in kinds)
    assert not kinds & {"While", "StatelessWhile", "If", "StatelessIf"}
    assert not kinds & {"Assert", "Einsum", "IsFinite", "IdentityN"}
