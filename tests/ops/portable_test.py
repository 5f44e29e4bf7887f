# SPDX-License-Identifier: Apache-2.0
"""Tests of the ops in stock TensorFlow, and of derivatives of derivatives."""

import itertools

import full_calls
import numpy as np
import pytest
import reference
import tensorflow as tf
from bad_calls import BAD_SHAPES, ERRORS, arguments_of
from compare import assert_close
from full_calls import POOLING
from operands import (
    BOUNDARIES,
    Conv2DCase,
    conv2d_places,
    coordinate_type,
    draw_conv2d_case,
    draw_psroi_pool_call,
    forward_and_gradients,
    numpy_type,
    one_sample_per_image,
)
from pooling import OPS, PSROI_POOL, ROI_ALIGN
from tolerances import PORTABLE, PORTABLE_GRADIENT
from traced import kinds_of_ops

from tf_deform import ops
from tf_deform._portable.roi_pooling import finite

DTYPES = ["float16", "bfloat16", "float32", "float64"]
NAMES = ("inputs", "kernel", "offset", "mask")

both_pooling_ops = pytest.mark.parametrize("op", OPS, ids=str)


def results(
    function, operands, output_grad, implementation="portable", **options
):
    """Returns the output, and the gradients of operands by name."""
    return forward_and_gradients(
        function,
        operands,
        output_grad,
        implementation=implementation,
        **options,
    )


def check_equal(received, expected, dtype, case=""):
    """Compares outputs and gradients, by value and type."""
    (output, gradients), (wanted, right) = received, expected
    assert_close(output, wanted, PORTABLE[dtype], case=case, dtype=wanted.dtype)
    assert gradients.keys() == right.keys()
    for name, gradient in gradients.items():
        assert_close(
            gradient,
            right[name],
            PORTABLE_GRADIENT[dtype],
            case=case,
            name=f"gradient of {name}",
            dtype=None if right[name] is None else right[name].dtype,
        )


def check_against_native(function, operands, output_grad, dtype, **options):
    portable, native = (
        results(function, operands, output_grad, implementation, **options)
        for implementation in ("portable", "native")
    )
    check_equal(portable, native, dtype, options)


def conv2d_operands(case, dtype="float32"):
    return dict(zip(NAMES, case.operands(dtype), strict=False))


# Convolution: the same numbers and gradients as the native op.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(900, 908))
def test_convolution_equals_native(seed, dtype):
    case = draw_conv2d_case(seed)
    check_against_native(
        ops.deformable_conv2d,
        conv2d_operands(case, dtype),
        case.output_grad(dtype),
        dtype,
        **case.options,
    )


@pytest.mark.parametrize("seed", range(930, 936))
def test_convolution_equals_the_reference(seed):
    case = draw_conv2d_case(seed, batch=1, size=(6, 7))
    operands = conv2d_operands(case, "float64")
    output_grad = case.output_grad("float64")
    output, gradients = results(
        ops.deformable_conv2d, operands, output_grad, **case.options
    )
    expected, wanted = reference.output_and_gradients(
        **{"mask": None, **operands}, output_grad=output_grad, **case.options
    )
    assert_close(output, expected, 1e-12, case=case)
    for name, gradient in gradients.items():
        wanted_here = getattr(wanted, name)
        assert_close(gradient, wanted_here, 1e-12, case=case, name=name)


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
    operands, options = one_sample_per_image(coordinates, size, 5)
    output_grad = np.random.default_rng(1).normal(size=(len(coordinates), 3))
    check_against_native(
        ops.deformable_conv2d,
        dict(zip(NAMES, operands, strict=True)),
        output_grad.reshape(-1, 1, 1, 3).astype(dtype),
        dtype,
        boundary=boundary,
        **options,
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_what_is_outside_is_zero_whatever_its_mask(boundary):
    """Tests NaN offsets and masks.

    They must not reach the output or a gradient.
    """
    case = Conv2DCase(boundary=boundary)
    operands = conv2d_operands(case)
    offset, mask = operands["offset"], operands["mask"]
    offset.reshape(-1)[::7] = np.nan
    offset.reshape(-1)[3::11] = np.inf
    outside = ~np.isfinite(offset.reshape(*mask.shape, 2)).all(-1)
    mask[outside] = np.nan
    call = (ops.deformable_conv2d, operands, case.output_grad())
    output, gradients = results(*call, **case.options)
    for tensor in (output, *gradients.values()):
        assert np.isfinite(tensor).all()
    assert not gradients["mask"].numpy()[outside].any()
    native = results(*call, "native", **case.options)
    check_equal((output, gradients), native, "float32")


def test_convolution_reads_nothing_else():
    """Tests that a pixel of infinity changes only samples that read it."""
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, 2, 2] = np.inf
    for place, reads in (((0.5, 0.5), False), ((1.5, 1.5), True)):
        output = ops.deformable_conv2d(
            image,
            np.ones((1, 1, 1, 1), np.float32),
            np.reshape(np.float32(place), (1, 1, 1, 2)),
            strides=4,
            implementation="portable",
        )
        assert np.isinf(output.numpy().item()) == reads


@pytest.mark.parametrize(
    "case",
    [
        Conv2DCase(batch=0),
        Conv2DCase(size=(0, 5)),
        Conv2DCase(size=(7, 0), padding="same"),
        Conv2DCase(size=(0, 4), padding=((2, 3), (1, 1))),
        Conv2DCase(batch=0, groups=2, offset_groups=2, has_mask=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_to_convolve(case, boundary):
    options = {**case.options, "boundary": boundary}
    operands, output_grad = conv2d_operands(case), case.output_grad()
    call = (ops.deformable_conv2d, operands, output_grad)
    native = results(*call, "native", **options)
    check_equal(results(*call, **options), native, "float32")

    @tf.function(input_signature=[tf.TensorSpec((None,) * 4)] * len(operands))
    def graph(*tensors):
        given = dict(zip(operands, tensors, strict=True))
        return results(call[0], given, output_grad, **options)

    check_equal(graph(*operands.values()), native, "float32")


# Pooling: the same.


def pooling_operands(op, drawn, dtype):
    """Returns operands by name and a gradient, in the types of a call."""
    value, xy = numpy_type(dtype), numpy_type(coordinate_type(dtype))
    *given, output_grad = (
        None if x is None else np.asarray(x).astype(type_)
        for x, type_ in zip(drawn, (value, xy, xy, value), strict=True)
    )
    names = ("inputs", "rois", op.displacement)
    return dict(zip(names, given, strict=True)), output_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(900, 908))
@both_pooling_ops
def test_pooling_equals_native(op, seed, dtype):
    drawn, attributes = op.draw_call(seed)
    operands, output_grad = pooling_operands(op, drawn, dtype)
    function = POOLING[op].function
    check_against_native(function, operands, output_grad, dtype, **attributes)


@pytest.mark.parametrize("seed", [920, 921, 922, 924])
@both_pooling_ops
def test_pooling_equals_the_reference(op, seed):
    drawn, attributes = op.draw_call(seed)
    operands, output_grad = pooling_operands(op, drawn, "float64")
    output, gradients = results(
        POOLING[op].function, operands, output_grad, **attributes
    )
    expected = op.reference(*drawn[:3], **attributes)["output"]
    assert_close(output, expected, 1e-9, case=attributes)
    wanted = op.reference_gradients(*drawn, **attributes)
    for name, right in zip(
        ("inputs", op.displacement), wanted.values(), strict=True
    ):
        if name in gradients:
            assert_close(
                gradients[name], right, 1e-9, case=attributes, name=name
            )


@pytest.mark.parametrize("seed", [931, 932])
def test_counts_equal_native(seed):
    drawn, attributes = draw_psroi_pool_call(seed)
    operands, _ = pooling_operands(PSROI_POOL, drawn, "float32")
    received, expected = (
        ops.deformable_psroi_pool(
            **operands,
            return_count=True,
            implementation=implementation,
            **attributes,
        )
        for implementation in ("portable", "native")
    )
    assert_close(received, expected, 1e-5, dtype="float32")


@both_pooling_ops
@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1)])
def test_pooling_at_integers_and_edges(op, size):
    """Tests samples on pixels, on edges and at clamped coordinates."""
    rng = np.random.default_rng(0)
    marks = [-2, -1, -0.5, 0, 0.5, 1, 2, 3.5, 4, 4.5, 5, 5.5, 6, 7]
    corners = np.array(list(itertools.product(marks, marks)))
    rng.shuffle(corners)
    others = rng.permutation(corners)
    rois = np.concatenate([np.zeros((len(corners), 1)), corners, others], 1)
    attributes = op.attributes(
        3,
        pooled_size=(2, 1),
        spatial_scale=1.0,
        group_size=1,
        trans_std=0.5,
        gamma=0.5,
        **{op.samples: 2},
    )
    operands = {
        "inputs": rng.normal(size=(1, *size, 3)),
        "rois": rois,
        op.displacement: rng.choice([0.0, 0.5, -1.0], (len(rois), 2, 1, 2)),
    }
    output_grad = rng.normal(size=(len(rois), 2, 1, 3))
    check_against_native(
        POOLING[op].function, operands, output_grad, "float64", **attributes
    )


@both_pooling_ops
def test_a_batch_index_that_is_none_gives_zeros(op):
    """Tests padding, as on a GPU: an exported model cannot raise an error."""
    index = [0, 1, 2, 0.5, -0.5, -1, np.nan, np.inf, -np.inf, 1e30]
    rois = np.float32([[i, 1, 1, 5, 5] for i in index])
    options = op.attributes(3, pooled_size=2, spatial_scale=1, group_size=1)
    output = (
        POOLING[op]
        .function(
            np.ones((2, 6, 6, 3), np.float32),
            rois,
            implementation="portable",
            **options,
        )
        .numpy()
    )
    np.testing.assert_allclose(output[:2], 1, rtol=1e-6)
    assert not output[2:].any()


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
def test_nothing_to_pool(op, shape, num_rois, index):
    options = op.attributes(
        3, pooled_size=(2, 1), spatial_scale=1.0, group_size=1
    )
    operands = {
        "inputs": np.ones(shape, np.float32),
        "rois": np.tile(np.float32([[index, 0, 0, 3, 3]]), (num_rois, 1)),
        op.displacement: np.ones((num_rois, 2, 1, 2), np.float32),
    }
    output_grad = np.ones((num_rois, 2, 1, 3), np.float32)
    check_against_native(
        POOLING[op].function, operands, output_grad, "float32", **options
    )


def test_finite():
    numbers = tf.constant([0.0, -3e38, np.nan, np.inf, -np.inf])
    assert finite(numbers).numpy().tolist() == [True] * 2 + [False] * 3


# Graphs: only the kernel's size must be known.


def draw_calls():
    """Yields calls of every op: name, function, operands, options."""
    case = Conv2DCase(groups=2, offset_groups=3)
    yield "conv2d", ops.deformable_conv2d, case.operands(), case.options
    for op in OPS:
        for seed in (941, 943):
            drawn, attributes = op.draw_call(seed)
            operands, _ = pooling_operands(op, drawn, "float32")
            present = [x for x in operands.values() if x is not None]
            yield f"{op}-{seed}", POOLING[op].function, present, attributes


CALLS = {name: call for name, *call in draw_calls()}


@pytest.mark.parametrize("known", ["channels", "rank", "nothing"])
@pytest.mark.parametrize("name", CALLS)
def test_dynamic_shapes(name, known):
    function, operands, options = CALLS[name]

    def run(*operands):
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = function(*operands, **options, implementation="portable")
        gradients = tape.gradient(output, operands)
        return output, {str(i): x for i, x in enumerate(gradients)}

    def shape(x):
        if known == "channels" and x.shape[:2] == (3, 2):
            return x.shape  # A kernel's size.
        return full_calls.KNOWN[known](x)

    graph = tf.function(
        run, input_signature=[tf.TensorSpec(shape(x)) for x in operands]
    )
    check_equal(graph(*operands), run(*map(tf.constant, operands)), "float32")


@pytest.mark.parametrize("name", CALLS)
def test_static_shapes_are_those_of_the_native_op(name):
    function, operands, options = CALLS[name]

    def shape(implementation, signature):
        graph = tf.function(
            lambda *x: function(*x, **options, implementation=implementation),
            input_signature=[tf.TensorSpec(s) for s in signature],
        )
        return graph.get_concrete_function().output_shapes.as_list()

    for signature in (
        [x.shape for x in operands],
        [(None, *x.shape[1:]) for x in operands],
        [(*[None] * (x.ndim - 1), x.shape[-1]) for x in operands],
    ):
        assert shape("portable", signature) == shape("native", signature)


@pytest.mark.parametrize("name", CALLS)
def test_only_ops_that_exist_elsewhere(name):
    """Tests that there is no loop, no condition, and no op of this package."""
    function, operands, options = CALLS[name]
    graph = tf.function(
        lambda *x: function(*x, **options, implementation="portable"),
        input_signature=[tf.TensorSpec([None] * x.ndim) for x in operands],
    )
    kinds = kinds_of_ops(graph.get_concrete_function())
    assert not any("Deform" in kind for kind in kinds)
    assert not kinds & {"While", "StatelessWhile", "If", "StatelessIf"}
    assert not kinds & {"Assert", "Einsum", "IsFinite", "IdentityN"}


# Errors: those of the native op, with the same texts.


@pytest.mark.parametrize(
    "bad_call", BAD_SHAPES[ops.deformable_conv2d], ids=lambda bad: bad.name
)
def test_bad_shapes_of_a_convolution(bad_call):
    operands, options = arguments_of(ops.deformable_conv2d, bad_call.changes)

    def error(implementation):
        with pytest.raises(ERRORS) as info:
            ops.deformable_conv2d(
                **operands, **options, implementation=implementation
            )
        bad_call.check(info.value)
        text = str(info.value).split("} ")[-1].split(" [Op:")[0]
        return type(info.value), text

    assert error("portable") == error("native")


BAD_POOLING = {
    PSROI_POOL: [
        {"inputs": (8, 9, 12)},
        {"inputs": (2, 8, 9, 11)},
        {"rois": (7, 4)},
        {"rois": (1, 7, 5)},
        {"displacement": (6, 2, 2, 2)},
        {"displacement": (7, 2, 3, 2)},
        {"displacement": (7, 2, 2, 3)},
        {"displacement": (7, 2, 2, 8)},
        {"spatial_scale": 0},
        {"trans_std": float("inf")},
        {"sample_per_part": 0},
        {"group_size": 0},
    ],
    ROI_ALIGN: [
        {"inputs": (2, 8, 9)},
        {"inputs": (2, 8, 9, 0)},
        {"rois": (7, 6)},
        {"displacement": (7, 2, 2, 4)},
        {"displacement": (7, 1, 2, 2)},
        {"spatial_scale": -1},
        {"gamma": float("nan")},
        {"pooled_size": (2, 0)},
    ],
}


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    ("op", "changes"),
    [(op, changes) for op in OPS for changes in BAD_POOLING[op]],
    ids=str,
)
def test_bad_calls_of_pooling(op, changes, in_graph):
    arguments = {
        "inputs": (2, 8, 9, 12),
        "rois": (7, 5),
        "displacement": (7, 2, 2, 2),
        **op.attributes(3, pooled_size=2, spatial_scale=1.0),
        **changes,
    }
    operands = [
        tf.zeros(arguments.pop(x)) for x in ("inputs", "rois", "displacement")
    ]

    def text(implementation):
        def run(*operands):
            return POOLING[op].function(
                *operands, implementation=implementation, **arguments
            )

        with pytest.raises((ValueError, tf.errors.OpError)) as info:
            (tf.function(run) if in_graph else run)(*operands)
        text = str(info.value)[str(info.value).index("Expected") :]
        return text.split(" [Op:")[0].split(" for '")[0].split("\n")[0]

    assert text("portable") == text("native")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("conv2d", [(2, 5, 6, 4), (3, 3, 4, 2), (2, 4, 3, 18)]),
        ("conv2d", [(2, 5, 6, 4), (3, 3, 4, 2), (2, 1, 1, 18)]),
        ("conv2d", [(2, 5, 6, 4), (3, 3, 4, 2), (1, 3, 4, 18)]),
        ("conv2d", [(2, 5, 6, 4), (3, 3, 4, 2), (2, 3, 4, 18), (2, 3, 4, 1)]),
        ("conv2d", [(2, 5, 6, 4), (3, 3, 4, 2), (2, 3, 4, 18), (2, 4, 3, 9)]),
        ("psroi_pool", [(2, 5, 6, 18), (4, 6)]),
        ("psroi_pool", [(2, 5, 6, 18), (4, 5), (4, 2, 3, 2)]),
        ("psroi_pool", [(2, 5, 6, 18), (4, 5), (1, 3, 2, 2)]),
        ("roi_align", [(2, 5, 6, 4), (4, 5), (4, 2, 3, 2)]),
        ("roi_align", [(2, 5, 6, 4), (4, 5), (4, 3, 2, 1)]),
    ],
    ids=str,
)
def test_what_the_graph_does_not_know_is_refused_when_it_runs(name, shapes):
    """Tests an error instead of broadcasting or reshaping to a wrong result."""
    function = getattr(ops, f"deformable_{name}")
    options = {}
    if name != "conv2d":
        options = dict(pooled_size=(3, 2), spatial_scale=1.0)
    if name == "psroi_pool":
        options["output_dim"] = 3
    graph = tf.function(
        lambda *x: function(*x, implementation="portable", **options),
        input_signature=[tf.TensorSpec(None)] * len(shapes),
    )
    with pytest.raises((ValueError, tf.errors.OpError)):
        graph(*(tf.zeros(shape) for shape in shapes))
