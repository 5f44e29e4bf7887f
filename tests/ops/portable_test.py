# SPDX-License-Identifier: Apache-2.0
"""Tests of the ops in stock TensorFlow, and of derivatives of derivatives."""

import itertools
import pathlib
import shutil

import bad_calls_test
import deformable_conv2d_test
import keras
import numpy as np
import pytest
import reference
import roi_reference
import tensorflow as tf
from deformable_conv2d_test import Case, assert_close, random_case

import tf_deform
from tf_deform import _loader, layers, ops
from tf_deform._portable.roi_pooling import finite

PACKAGE = pathlib.Path(tf_deform.__file__).parent
DTYPES = ["float16", "bfloat16", "float32", "float64"]
BOUNDARIES = ["zeros", "clamp"]
# Largest difference, as a part of the largest value: both sum in another
# order, and round 16-bit results once.
TOLERANCE = {
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 2**-10,
    "bfloat16": 2**-7,
}

# Function, operands drawn from a seed, reference, reference of gradients.
ROI_OPS = {
    "psroi_pool": (
        ops.deformable_psroi_pool,
        roi_reference.draw_psroi_pool_call,
        roi_reference.deformable_psroi_pool,
        roi_reference.deformable_psroi_pool_grad,
    ),
    "roi_align": (
        ops.deformable_roi_align,
        roi_reference.draw_roi_align_call,
        roi_reference.deformable_roi_align,
        roi_reference.deformable_roi_align_grad,
    ),
}


def forward_and_gradients(
    function, operands, output_grad, implementation="portable", **options
):
    """The output, and the gradients of all operands that are not None."""
    tensors = [None if x is None else tf.convert_to_tensor(x) for x in operands]
    given = [x for x in tensors if x is not None]
    with tf.GradientTape() as tape:
        tape.watch(given)
        output = function(*tensors, implementation=implementation, **options)
    return output, *tape.gradient(output, given, output_grad)


def check_equal(received, expected, dtype):
    for actual, wanted in zip(received, expected, strict=True):
        if wanted is None:
            assert actual is None
            continue
        assert actual.dtype == wanted.dtype
        tolerance = TOLERANCE[dtype] * (1 if actual is received[0] else 30)
        assert_close(actual, wanted, tolerance)


def check_against_native(function, operands, output_grad, dtype, **options):
    check_equal(
        *(
            forward_and_gradients(
                function, operands, output_grad, implementation, **options
            )
            for implementation in ("portable", "native")
        ),
        dtype,
    )


# Convolution: the same numbers and gradients as the native op.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(900, 908))
def test_convolution_equals_native(seed, dtype):
    case = random_case(seed)
    check_against_native(
        ops.deformable_conv2d,
        case.operands(dtype),
        case.output_grad(dtype),
        dtype,
        **case.options,
    )


@pytest.mark.parametrize("seed", range(930, 936))
def test_convolution_equals_the_reference(seed):
    case = random_case(seed, batch=1, size=(6, 7))
    operands = case.operands("float64")
    mask = operands[3] if case.has_mask else None
    output_grad = case.output_grad("float64")
    output, *gradients = forward_and_gradients(
        ops.deformable_conv2d, operands, output_grad, **case.options
    )
    expected = reference.deformable_conv2d(*operands, **case.options)
    assert_close(output, expected, 1e-12)
    expected = reference.deformable_conv2d_grad(
        *operands[:3], mask, output_grad, **case.options
    )
    for actual, wanted in zip(gradients, expected, strict=False):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_place_of_a_sample(boundary, size, dtype):
    """Edges, integers, NaN, infinities: values, and derivatives at kinks."""
    places = [deformable_conv2d_test._coordinates(n, dtype) for n in size]
    # TensorFlow's kernels take numbers that are not normal for 0.
    tiny = np.finfo(dtype).tiny
    places = [p[~((np.abs(p) < tiny) & (p != 0))] for p in places]
    coordinates = np.array(list(itertools.product(*places)))
    operands, options = deformable_conv2d_test._one_sample_per_image(
        coordinates, size, 5
    )
    output_grad = np.random.default_rng(1).normal(size=(len(coordinates), 3))
    check_against_native(
        ops.deformable_conv2d,
        operands,
        output_grad.reshape(-1, 1, 1, 3).astype(dtype),
        dtype,
        boundary=boundary,
        **options,
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_what_is_outside_is_zero_whatever_its_mask(boundary):
    """NaN offsets and masks of NaN: no trace in the output or a gradient."""
    case = Case(boundary=boundary)
    inputs, kernel, offset, mask = case.operands()
    offset.reshape(-1)[::7] = np.nan
    offset.reshape(-1)[3::11] = np.inf
    offset = offset.reshape(*mask.shape, 2)
    outside = ~np.isfinite(offset).all(-1)
    mask[outside] = np.nan
    operands = (inputs, kernel, offset.reshape(*mask.shape[:3], -1), mask)
    arguments = (ops.deformable_conv2d, operands, case.output_grad())
    results = forward_and_gradients(*arguments, **case.options)
    for tensor in results:
        assert np.isfinite(tensor).all()
    assert not results[-1].numpy()[outside].any()
    check_equal(
        results,
        forward_and_gradients(*arguments, "native", **case.options),
        "float32",
    )


def test_convolution_reads_nothing_else():
    """A pixel of infinity matters only to samples that touch it."""
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
        Case(batch=0),
        Case(size=(0, 5)),
        Case(size=(7, 0), padding="same"),
        Case(size=(0, 4), padding=((2, 3), (1, 1))),
        Case(batch=0, groups=2, offset_groups=2, has_mask=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_to_convolve(case, boundary):
    options = {**case.options, "boundary": boundary}
    arguments = (ops.deformable_conv2d, case.operands(), case.output_grad())
    native = forward_and_gradients(*arguments, "native", **options)
    check_equal(forward_and_gradients(*arguments, **options), native, "float32")

    @tf.function(
        input_signature=[tf.TensorSpec((None,) * 4)] * len(arguments[1])
    )
    def graph(*operands):
        return forward_and_gradients(
            ops.deformable_conv2d, operands, arguments[2], **options
        )

    check_equal(graph(*arguments[1]), native, "float32")


# Pooling: the same.


def roi_operands(operands, dtype):
    types = [tf.as_dtype(dtype).as_numpy_dtype]
    types += [np.float64 if dtype == "float64" else np.float32] * 2
    types += types[:1]
    return [
        None if x is None else np.asarray(x).astype(type_)
        for x, type_ in zip(operands, types, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(900, 908))
@pytest.mark.parametrize("name", ROI_OPS)
def test_pooling_equals_native(name, seed, dtype):
    function, draw, *_ = ROI_OPS[name]
    operands, attributes = draw(seed)
    *operands, output_grad = roi_operands(operands, dtype)
    check_against_native(function, operands, output_grad, dtype, **attributes)


@pytest.mark.parametrize("seed", [920, 921, 922, 924])
@pytest.mark.parametrize("name", ROI_OPS)
def test_pooling_equals_the_reference(name, seed):
    function, draw, forward, backward = ROI_OPS[name]
    (*operands, output_grad), attributes = draw(seed)
    output, *gradients = forward_and_gradients(
        function, operands, output_grad, **attributes
    )
    assert_close(output, forward(*operands, **attributes), 1e-9)
    expected = backward(*operands, output_grad, **attributes)
    for actual, wanted in zip(gradients[::2], expected, strict=False):
        assert_close(actual, wanted, 1e-9)


@pytest.mark.parametrize("seed", [931, 932])
def test_counts_equal_native(seed):
    operands, attributes = roi_reference.draw_psroi_pool_call(seed)
    operands = roi_operands(operands, "float32")[:3]
    for received, expected in zip(
        *(
            ops.deformable_psroi_pool(
                *operands,
                return_count=True,
                implementation=implementation,
                **attributes,
            )
            for implementation in ("portable", "native")
        ),
        strict=True,
    ):
        assert received.dtype == expected.dtype
        assert_close(received, expected, 1e-5)


@pytest.mark.parametrize("name", ROI_OPS)
@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1)])
def test_pooling_at_integers_and_edges(name, size):
    """Samples on pixels, on the edges and where coordinates are clamped."""
    rng = np.random.default_rng(0)
    function = ROI_OPS[name][0]
    marks = [-2, -1, -0.5, 0, 0.5, 1, 2, 3.5, 4, 4.5, 5, 5.5, 6, 7]
    corners = np.array(list(itertools.product(marks, marks)))
    rng.shuffle(corners)
    others = rng.permutation(corners)
    rois = np.concatenate([np.zeros((len(corners), 1)), corners, others], 1)
    attributes = dict(pooled_size=(2, 1), spatial_scale=1.0)
    if name == "psroi_pool":
        attributes.update(
            output_dim=3, group_size=1, sample_per_part=2, trans_std=0.5
        )
    else:
        attributes.update(sampling_ratio=2, gamma=0.5)
    check_against_native(
        function,
        (
            rng.normal(size=(1, *size, 3)),
            rois,
            rng.choice([0.0, 0.5, -1.0], (len(rois), 2, 1, 2)),
        ),
        rng.normal(size=(len(rois), 2, 1, 3)),
        "float64",
        **attributes,
    )


@pytest.mark.parametrize("name", ROI_OPS)
def test_a_batch_index_that_is_none_gives_zeros(name):
    """As on a GPU: in an exported model nobody could raise an error."""
    index = [0, 1, 2, 0.5, -0.5, -1, np.nan, np.inf, -np.inf, 1e30]
    rois = np.float32([[i, 1, 1, 5, 5] for i in index])
    options = dict(pooled_size=2, spatial_scale=1)
    if name == "psroi_pool":
        options.update(output_dim=3, group_size=1)
    output = ROI_OPS[name][0](
        np.ones((2, 6, 6, 3), np.float32),
        rois,
        implementation="portable",
        **options,
    ).numpy()
    np.testing.assert_allclose(output[:2], 1, rtol=1e-6)
    assert not output[2:].any()


@pytest.mark.parametrize("name", ROI_OPS)
def test_nothing_to_pool(name):
    options = dict(pooled_size=(2, 1), spatial_scale=1.0)
    if name == "psroi_pool":
        options.update(output_dim=3, group_size=1)
    function = ROI_OPS[name][0]
    for shape, num_rois, index in (
        ((2, 5, 4, 3), 0, 0),
        ((0, 5, 4, 3), 4, -1),
        ((2, 0, 4, 3), 4, 1),
        ((2, 5, 0, 3), 4, 1),
    ):
        rois = np.tile(np.float32([[index, 0, 0, 3, 3]]), (num_rois, 1))
        operands = [
            np.ones(shape, np.float32),
            rois,
            np.ones((num_rois, 2, 1, 2), np.float32),
        ]
        output_grad = np.ones((num_rois, 2, 1, 3), np.float32)
        check_against_native(
            function, operands, output_grad, "float32", **options
        )


def test_finite():
    numbers = [0.0, -3e38, np.nan, np.inf, -np.inf]
    assert (
        finite(tf.constant(numbers)).numpy().tolist()
        == [True] * 2 + [False] * 3
    )


# Graphs: nothing but the kernel's size need be known.


def calls():
    """A call of every op: function, operands, options."""
    yield (
        ops.deformable_conv2d,
        Case(groups=2, offset_groups=3).operands(),
        Case(groups=2, offset_groups=3).options,
    )
    for function, draw, *_ in ROI_OPS.values():
        for seed in (941, 943):
            operands, attributes = draw(seed)
            operands = roi_operands(operands, "float32")[:3]
            yield function, [x for x in operands if x is not None], attributes


@pytest.mark.parametrize("known", ["channels", "rank", "nothing"])
@pytest.mark.parametrize(
    "call", list(calls()), ids=lambda call: call[0].__name__
)
def test_dynamic_shapes(call, known):
    function, operands, options = call

    def results(*operands):
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = function(*operands, **options, implementation="portable")
        return [output, *tape.gradient(output, operands)]

    graph = tf.function(
        results,
        input_signature=[
            tf.TensorSpec(
                {
                    "channels": x.shape
                    if x.shape[:2] == (3, 2)
                    else (*[None] * (x.ndim - 1), x.shape[-1]),
                    "rank": [None] * x.ndim,
                    "nothing": None,
                }[known]
            )
            for x in operands
        ],
    )
    check_equal(
        graph(*operands), results(*map(tf.constant, operands)), "float32"
    )


@pytest.mark.parametrize(
    "call", list(calls()), ids=lambda call: call[0].__name__
)
def test_static_shapes_are_those_of_the_native_op(call):
    function, operands, options = call

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


def test_only_ops_that_exist_elsewhere():
    """No loop, no condition, nothing of this package."""
    for function, operands, options in calls():
        graph = tf.function(
            lambda *x, f=function, o=options: f(
                *x, **o, implementation="portable"
            ),
            input_signature=[tf.TensorSpec([None] * x.ndim) for x in operands],
        )
        kinds = {
            op.type
            for op in graph.get_concrete_function().graph.get_operations()
        }
        assert not any("Deform" in kind for kind in kinds)
        assert not kinds & {"While", "StatelessWhile", "If", "StatelessIf"}
        assert not kinds & {"Assert", "Einsum", "IsFinite", "IdentityN"}


# Errors: those of the native op, with the same texts.


def _error(bad_call, implementation):
    operands, options = bad_calls_test._arguments(bad_call)
    with pytest.raises(bad_calls_test.ERRORS) as info:
        ops.deformable_conv2d(
            **operands, **options, implementation=implementation
        )
    bad_call.check(info.value)
    return type(info.value), str(info.value).split("} ")[-1].split(" [Op:")[0]


@pytest.mark.parametrize(
    "bad_call", **bad_calls_test._names(bad_calls_test.BAD_SHAPES)
)
def test_bad_shapes_of_a_convolution(bad_call):
    received, expected = (
        _error(bad_call, name) for name in ("portable", "native")
    )
    assert received == expected


BAD_POOLING = {
    "psroi_pool": [
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
    "roi_align": [
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
    ("name", "changes"),
    [(name, changes) for name in BAD_POOLING for changes in BAD_POOLING[name]],
    ids=str,
)
def test_bad_calls_of_pooling(name, changes, in_graph):
    arguments = {
        "inputs": (2, 8, 9, 12),
        "rois": (7, 5),
        "displacement": (7, 2, 2, 2),
        "pooled_size": 2,
        "spatial_scale": 1.0,
    }
    if name == "psroi_pool":
        arguments["output_dim"] = 3
    arguments |= changes
    operands = [
        tf.zeros(arguments.pop(x)) for x in ("inputs", "rois", "displacement")
    ]

    def text(implementation):
        def run(*operands):
            return ROI_OPS[name][0](
                *operands, implementation=implementation, **arguments
            )

        with pytest.raises((ValueError, tf.errors.OpError)) as info:
            (tf.function(run) if in_graph else run)(*operands)
        text = str(info.value)[str(info.value).index("Expected") :]
        return text.split(" [Op:")[0].split(" for '")[0].split("\n")[0]

    received = text("portable")
    assert received == text("native")


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
    """Never spread or laid out anew: no silent wrong answer."""
    function = ops.deformable_conv2d if name == "conv2d" else ROI_OPS[name][0]
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


# Which implementation runs.


def runs(function) -> set:
    """The implementations that a function uses when it is traced."""
    graph = tf.function(function).get_concrete_function().graph
    native = any(
        op.type.startswith("TfDeform>") for op in graph.get_operations()
    )
    portable = any(op.type == "GatherNd" for op in graph.get_operations())
    found = {"native": native, "portable": portable}
    return {name for name, is_found in found.items() if is_found}


OPERANDS = [
    np.ones((1, 5, 5, 2), np.float32),
    np.ones((3, 3, 2, 4), np.float32),
    np.zeros((1, 3, 3, 18), np.float32),
]


def test_the_context_wins_over_the_argument():
    def run(**options):
        return runs(lambda: ops.deformable_conv2d(*OPERANDS, **options))

    assert run() == {"native"}
    assert run(implementation="portable") == {"portable"}
    with tf_deform.implementation("portable"):
        assert run() == {"portable"}
        assert run(implementation="native") == {"portable"}
        with tf_deform.implementation("native"):
            assert run(implementation="portable") == {"native"}
        assert run() == {"portable"}
    assert run() == {"native"}
    with pytest.raises(KeyError), tf_deform.implementation("portable"):
        raise KeyError
    assert run() == {"native"}


def test_what_was_traced_stays_as_it_is():
    function = tf.function(lambda: ops.deformable_conv2d(*OPERANDS))
    expected = function()
    with tf_deform.implementation("portable"):
        np.testing.assert_array_equal(function(), expected)
        assert len(function._list_all_concrete_functions()) == 1


@pytest.mark.parametrize("value", ["Native", "", None, 1, "xla"])
def test_another_implementation(value):
    def check(function):
        with pytest.raises(ValueError) as info:
            function()
        assert 'Expected `implementation` to be "native" or "portable"' in str(
            info.value
        )
        assert f"Received: {value!r}" in str(info.value)

    check(lambda: tf_deform.implementation(value).__enter__())
    check(lambda: ops.deformable_conv2d(*OPERANDS, implementation=value))
    for make in LAYERS.values():
        check(lambda make=make: make(implementation=value))


LAYERS = {
    "conv2d": lambda **kwargs: layers.DeformableConv2D(
        3, 3, modulation="sigmoid", **kwargs
    ),
    "psroi_pooling": lambda **kwargs: layers.DeformablePSROIPooling(
        3, 2, 0.5, **kwargs
    ),
    "roi_pooling": lambda **kwargs: layers.DeformableROIPooling(
        2, 0.5, units=(4,), **kwargs
    ),
    "roi_align": lambda **kwargs: layers.DeformableROIAlign(2, 0.5, **kwargs),
}


def call_layer(layer):
    rng = np.random.default_rng(0)
    inputs = np.float32(rng.normal(size=(2, 7, 8, 12)))
    if isinstance(layer, layers.DeformableConv2D):
        return layer(inputs)
    rois = np.float32([[0, 1, 2, 11, 12], [1, -3, 0, 9, 7], [-1, 0, 0, 0, 0]])
    if isinstance(layer, layers.DeformablePSROIPooling):
        return layer(inputs, rois, trans_inputs=inputs)
    return layer(inputs, rois)


def randomise(layer):
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(rng.normal(0, 0.2, weight.shape))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_their_implementation(name):
    assert LAYERS[name]().get_config()["implementation"] == "native"
    layer = LAYERS[name](implementation="portable")
    expected = call_layer(layer)
    randomise(layer)
    expected = call_layer(layer)
    config = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.implementation == "portable"
    call_layer(copy)
    copy.set_weights(layer.get_weights())
    assert runs(lambda: call_layer(copy)) == {"portable"}
    np.testing.assert_array_equal(call_layer(copy), expected)
    native = LAYERS[name]()
    call_layer(native)
    native.set_weights(layer.get_weights())
    assert runs(lambda: call_layer(native)) == {"native"}
    assert_close(call_layer(native), expected, 1e-5)
    with tf_deform.implementation("portable"):
        assert runs(lambda: call_layer(native)) == {"portable"}


# Where there is no library, or where the environment asks for something.


@pytest.fixture
def package_without_library(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "tf_deform", ignore=shutil.ignore_patterns("*.so")
    )
    return tmp_path


OTHER_PACKAGE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
# An editable installation would find in the source tree what the copy lacks.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        import tf_deform
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
        sys.exit()
    layer = tf_deform.layers.DeformableConv2D(2, 3)
    layer(np.ones((1, 4, 4, 2), "float32"))
    tf_deform.layers.DeformableROIAlign(2, 1)(
        np.ones((1, 4, 4, 2), "float32"), np.ones((1, 5), "float32"))
assert tf_deform.__file__.startswith(sys.argv[1])
for warning in caught:
    if "tf_deform" in str(warning.message):
        print(warning.category.__name__, warning.message)
print("CUDA", tf_deform.is_built_with_cuda())
rng = np.random.default_rng(0)
output = tf_deform.ops.deformable_conv2d(
    rng.normal(size=(1, 5, 5, 2)), rng.normal(size=(3, 3, 2, 4)),
    rng.normal(size=(1, 3, 3, 18)))
print(f"sum {np.abs(output).sum():.6f}")
try:
    with tf_deform.implementation("native"):
        print("native")
except RuntimeError as error:
    print("RuntimeError", error)
"""


def expected_sum() -> str:
    rng = np.random.default_rng(0)
    output = ops.deformable_conv2d(
        rng.normal(size=(1, 5, 5, 2)),
        rng.normal(size=(3, 3, 2, 4)),
        rng.normal(size=(1, 3, 3, 18)),
    )
    return f"sum {np.abs(output).sum():.6f}"


def test_without_a_library_one_warning(run_python, package_without_library):
    printed = run_python(OTHER_PACKAGE, package_without_library)
    assert printed.count("RuntimeWarning") == 1
    assert "Expected the native ops of tf_deform at" in printed
    assert "pip install" in printed
    assert "CUDA False" in printed
    assert expected_sum() in printed
    assert "RuntimeError Expected native ops" in printed


def test_portable_next_to_another_tensorflow(
    run_python, package_without_library
):
    """If asked for: the library, which would not fit, is not loaded."""
    folder = package_without_library / "tf_deform"
    info = (folder / "_build_info.py").read_text().splitlines()
    info = [
        'TENSORFLOW_VERSION = "2.4.1"' if "TENSORFLOW" in line else line
        for line in info
    ]
    (folder / "_build_info.py").write_text("\n".join(info))
    (folder / "_ops.so").write_bytes(b"not a library")
    printed = run_python(
        OTHER_PACKAGE,
        package_without_library,
        TF_DEFORM_IMPLEMENTATION="portable",
    )
    assert "Warning" not in printed
    assert expected_sum() in printed


def test_native_is_asked_for_and_missing(monkeypatch):
    monkeypatch.setattr(_loader, "LIBRARY", "/nowhere/_ops.so")
    monkeypatch.setattr(_loader, "forced", lambda: "native")
    with pytest.raises(ImportError) as info:
        _loader.op_library.__wrapped__()
    assert "Expected the native ops" in str(info.value)
    assert "unset TF_DEFORM_IMPLEMENTATION" in str(info.value)


def test_values_of_the_environment(monkeypatch):
    forced = _loader.forced.__wrapped__
    for value, expected in (
        (None, None),
        ("", None),
        ("native", "native"),
        ("portable", "portable"),
    ):
        monkeypatch.delenv(_loader.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(_loader.VARIABLE, value)
        assert forced() == expected
    monkeypatch.setenv(_loader.VARIABLE, "fast")
    with pytest.raises(ValueError) as info:
        forced()
    assert "Expected the environment variable TF_DEFORM_IMPLEMENTATION" in str(
        info.value
    )
    assert "Received: 'fast'" in str(info.value)


def test_the_environment_wins_over_the_argument(monkeypatch):
    """But not over the context, which is nearer."""
    monkeypatch.setattr(_loader, "forced", lambda: "native")

    def run():
        return ops.deformable_conv2d(*OPERANDS, implementation="portable")

    assert runs(run) == {"native"}
    with tf_deform.implementation("portable"):
        assert runs(run) == {"portable"}


# A model that runs without this package.

WITHOUT_TF_DEFORM = """
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
with np.load(sys.argv[2]) as file:
    for size in ("a", "b"):
        outputs = model.serve(file["images_" + size], file["rois"])
        for name, output in zip(("conv", "psroi", "roi", "align"), outputs):
            np.testing.assert_allclose(
                output, file[name + "_" + size], rtol=1e-4, atol=1e-4)
assert "tf_deform" not in sys.modules
print("same")
"""


def test_a_portable_saved_model_runs_without_the_package(tmp_path, run_python):
    images = keras.Input((None, None, 12))
    rois = keras.Input((5,))
    conv = LAYERS["conv2d"]()(images)
    outputs = [
        conv,
        LAYERS["psroi_pooling"]()(images, rois, trans_inputs=conv),
        LAYERS["roi_pooling"]()(images, rois),
        LAYERS["roi_align"]()(images, rois),
    ]
    model = keras.Model([images, rois], outputs)
    randomise(model)
    rng = np.random.default_rng(0)
    arrays = {
        "images_a": np.float32(rng.normal(size=(2, 9, 8, 12))),
        "images_b": np.float32(rng.normal(size=(1, 5, 13, 12))),
        "rois": np.float32([[0, 1, 2, 11, 12], [0, -3, 0, 9, 7], [-1] * 5]),
    }
    for size in ("a", "b"):
        results = model([arrays[f"images_{size}"], arrays["rois"]])
        for name, result in zip(
            ("conv", "psroi", "roi", "align"), results, strict=True
        ):
            arrays[f"{name}_{size}"] = result.numpy()
    np.savez(tmp_path / "expected.npz", **arrays)
    with tf_deform.implementation("portable"):
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint(
            "serve",
            lambda images, rois: model([images, rois]),
            input_signature=[
                tf.TensorSpec((None, None, None, 12)),
                tf.TensorSpec((None, 5)),
            ],
        )
        archive.write_out(tmp_path / "model", verbose=False)
    printed = run_python(
        WITHOUT_TF_DEFORM, tmp_path / "model", tmp_path / "expected.npz"
    )
    assert "same" in printed


# Derivatives of derivatives, of the native ops.


def draw_differentiable_calls():
    """Calls away from kinks: name, function, operands, options, float ones.

    The last says which operands have gradients.
    """
    for name, options in {
        "conv": dict(padding=((1, 0), (2, 1)), strides=(2, 1)),
        "conv grouped": dict(groups=2, offset_groups=3, dilation_rate=(1, 2)),
        "conv clamp": dict(boundary="clamp", reach=1),
        "conv without mask": dict(has_mask=False),
    }.items():
        case = Case(size=(4, 5), filters=4, batch=2, **options)
        operands = case.operands("float64")
        function = ops.deformable_conv2d
        yield name, function, operands, case.options, range(len(operands))
    for name, options, displacement in (
        ("psroi", dict(output_dim=4, trans_std=0.2, sample_per_part=2), 1),
        ("psroi without trans", dict(output_dim=4, sample_per_part=2), 0),
        ("align", dict(gamma=0.2, sampling_ratio=2), 1),
        ("align adaptive", dict(gamma=0.2), 1),
        ("align without offset", {}, 0),
    ):
        rng = np.random.default_rng(3)
        options |= dict(pooled_size=(2, 3), spatial_scale=0.5)
        pool = "output_dim" in options
        if pool:
            options |= dict(group_size=(2, 1), part_size=(1, 2))
        inputs = rng.normal(size=(2, 5, 6, 8))
        kinds = ("inside", "across the edge", "padding")
        rois = roi_reference.draw_rois(rng, 2, (5, 6), 0.5, 4, kinds)
        operands = [inputs, rois]
        if displacement:
            shape = (4, 1, 2, 4) if pool else (4, 2, 3, 2)
            operands.append(rng.uniform(-1, 1, shape))
            bins = (
                roi_reference.psroi_bins
                if pool
                else roi_reference.roi_align_bins
            )
            roi_reference.move_off_kinks(
                rng,
                lambda bins=bins, operands=operands, options=options: bins(
                    *operands, **options
                ),
                operands[2],
            )
        function = (
            ops.deformable_psroi_pool if pool else ops.deformable_roi_align
        )
        yield name, function, operands, options, (0, 2)[: 1 + displacement]


DIFFERENTIABLE = {call[0]: call[1:] for call in draw_differentiable_calls()}


def first_gradients(function, operands, options, wanted, output_grad):
    with tf.GradientTape() as tape:
        tape.watch([operands[i] for i in wanted])
        output = function(*operands, **options)
    return tape.gradient(output, [operands[i] for i in wanted], output_grad)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_equal_finite_differences(name, mode):
    """Of each first derivative by each operand, and by its own gradient."""
    function, arrays, options, sources = DIFFERENTIABLE[name]
    rng = np.random.default_rng(5)
    operands = [tf.constant(x) for x in arrays]
    output = function(*operands, **options)
    output_grad = tf.constant(rng.normal(size=output.shape))
    # What is differentiated: each first derivative along some direction.
    along = {s: rng.normal(size=arrays[s].shape) for s in sources}

    def slope(source, *tensors):
        *operands, output_grad = tensors
        (gradient,) = first_gradients(
            function, operands, options, [source], output_grad
        )
        return tf.reduce_sum(gradient * along[source])

    def second(source, *tensors):
        targets = [tensors[i] for i in (*sources, -1)]
        with tf.GradientTape() as tape:
            tape.watch(targets)
            result = slope(source, *tensors)
        return tape.gradient(result, targets)

    if mode == "graph":
        second = tf.function(second)
    tensors = [*operands, output_grad]
    for source in sources:
        gradients = second(source, *tensors)
        for index, gradient in zip((*sources, -1), gradients, strict=True):
            direction = rng.normal(size=tensors[index].shape)
            step = 1e-6
            moved = []
            for sign in (1, -1):
                changed = list(tensors)
                changed[index] = tensors[index] + sign * step * direction
                moved.append(float(slope(source, *changed)))
            numerical = (moved[0] - moved[1]) / (2 * step)
            analytical = (
                0.0
                if gradient is None
                else float(tf.reduce_sum(gradient * direction))
            )
            scale = max(1, abs(numerical))
            assert abs(analytical - numerical) < 1e-6 * scale, (source, index)


@pytest.mark.parametrize(
    "wanted", [(0,), (2,), (0, 2), (1, 3), (0, 1, 2), (0, 1, 2, 3)]
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_second_derivatives_of_some_gradients(wanted, mode):
    """A penalty on the norm of some gradients, as TensorFlow itself has it."""
    function, arrays, options, _ = DIFFERENTIABLE["conv grouped"]
    operands = [tf.constant(x) for x in arrays]
    output_grad = np.random.default_rng(0).normal(
        size=function(*operands, **options).shape
    )

    def penalty_gradients(implementation):
        with tf_deform.implementation(implementation):
            with tf.GradientTape() as tape:
                tape.watch(operands)
                gradients = first_gradients(
                    function, operands, options, wanted, output_grad
                )
                penalty = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
            return tape.gradient(penalty, operands)

    native = penalty_gradients
    if mode == "graph":
        native = tf.function(penalty_gradients)
    for received, expected in zip(
        native("native"), penalty_gradients("portable"), strict=True
    ):
        if expected is None:  # A kernel's gradient does not depend on it.
            assert received is None or not received.numpy().any()
        else:
            assert_close(received, expected, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_second_derivatives(dtype):
    case = Case(size=(4, 5))
    operands = [tf.constant(x) for x in case.operands(dtype)]
    with tf.GradientTape() as tape:
        tape.watch(operands)
        gradients = first_gradients(
            ops.deformable_conv2d, operands, case.options, range(4), None
        )
        loss = tf.add_n(
            [tf.reduce_sum(tf.cast(g, "float64") ** 2) for g in gradients]
        )
    for operand, gradient in zip(
        operands, tape.gradient(loss, operands), strict=True
    ):
        assert gradient.dtype == operand.dtype
        assert gradient.shape == operand.shape
        assert np.isfinite(tf.cast(gradient, "float64")).all()


def test_hessians_and_third_derivatives():
    function, arrays, options, _ = DIFFERENTIABLE["psroi"]
    inputs, rois, trans = (tf.constant(x) for x in arrays)

    @tf.function
    def hessian(trans):
        output = function(inputs, rois, trans, **options)
        return tf.hessians(tf.reduce_sum(output**2), trans)[0]

    received = tf.reshape(hessian(trans), (trans.shape.num_elements(),) * 2)
    assert np.abs(received).max() > 0
    assert_close(received, tf.transpose(received), 1e-9)

    def loss(trans, implementation):
        output = function(
            inputs, rois, trans, implementation=implementation, **options
        )
        return tf.reduce_sum(output**3)

    thirds = []
    for implementation in ("native", "portable"):
        with tf.GradientTape() as third:
            third.watch(trans)
            with tf.GradientTape() as second:
                second.watch(trans)
                with tf.GradientTape() as first:
                    first.watch(trans)
                    value = loss(trans, implementation)
                gradient = tf.reduce_sum(first.gradient(value, trans) ** 2)
            gradient = tf.reduce_sum(second.gradient(gradient, trans) ** 2)
        thirds.append(third.gradient(gradient, trans))
    assert_close(*thirds, 1e-9)


def test_a_gradient_penalty_trains_a_model():
    """Two steps of a critic whose gradient by its input is held near 1."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.DeformableConv2D(4, 3, modulation="sigmoid"),
            keras.layers.Activation("gelu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    images = tf.random.stateless_normal((3, 8, 8, 2), (0, 0))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(images)
                score = model(images)
            gradient = inner.gradient(score, images)
            norms = tf.sqrt(tf.reduce_sum(gradient**2, (1, 2, 3)))
            loss = tf.reduce_mean((norms - 1) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        for variable, gradient in zip(
            model.trainable_variables, gradients, strict=True
        ):
            if gradient is not None:
                variable.assign_sub(0.5 * gradient)
        return loss

    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_first_derivatives_stay_native():
    """Nothing of the portable implementation unless asked for twice."""
    case = Case()
    operands = [tf.constant(x) for x in case.operands()]

    def gradients():
        return first_gradients(
            ops.deformable_conv2d, operands, case.options, range(4), None
        )

    assert runs(gradients) == {"native"}
    assert _loader.op_library() is not None
