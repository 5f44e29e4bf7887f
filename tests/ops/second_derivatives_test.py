# SPDX-License-Identifier: Apache-2.0
"""Tests second derivatives: one tensor in two places, forward mode, loops.

Results are compared with differences of values or of first derivatives, in
float64, in a direction that changes every operand that can change.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close
from operands import Conv2DCase
from pooling import PSROI_POOL, ROI_ALIGN
from traced import implementations

import tf_deform
from tf_deform import layers, ops

DTYPES = ["float16", "bfloat16", "float32", "float64"]
STEP = 1e-5
TOLERANCE = 1e-6

ROIS = np.array([[0, 0.3, 0.2, 1.9, 1.4], [1, -0.4, 0.1, 2.2, 0.9]])


def convolve(inputs, kernel, offset, mask=None, *, implementation):
    return ops.deformable_conv2d(
        inputs,
        kernel,
        offset,
        mask,
        padding="same",
        implementation=implementation,
    )


def psroi_pool(inputs, trans, *, implementation):
    return ops.deformable_psroi_pool(
        inputs,
        ROIS,
        trans,
        output_dim=inputs.shape[3],
        spatial_scale=0.7,
        pooled_size=(2, 3),
        group_size=1,
        sample_per_part=2,
        trans_std=0.5,
        implementation=implementation,
    )


def roi_align(inputs, offset, *, implementation):
    return ops.deformable_roi_align(
        inputs,
        ROIS,
        offset,
        pooled_size=(2, 3),
        spatial_scale=0.7,
        sampling_ratio=2,
        gamma=0.5,
        implementation=implementation,
    )


def draw(shape, seed):
    """Draws numbers away from kinks, for any operand."""
    rng = np.random.default_rng(seed)
    return tf.constant(rng.uniform(0.2, 0.4, shape))


# Function, shapes of its operands, and which of the operands and the incoming
# gradient (of the shape of the result) are one tensor.
INPUTS, KERNEL, OFFSET, MASK = range(4)
DISPLACEMENT, GRAD = 1, -1
SQUARE = [(1, 1, 2, 2)] * 3
SAME = [
    (convolve, [(2, 3, 2, 3), (2, 3, 1, 3), (2, 3, 2, 12)], []),
    (convolve, [(1, 4, 3, 2), (1, 1, 2, 3), (1, 4, 3, 2)], [INPUTS, OFFSET]),
    (
        convolve,
        [(1, 4, 3, 1), (1, 1, 1, 2), (1, 4, 3, 2), (1, 4, 3, 1)],
        [INPUTS, MASK],
    ),
    (convolve, [(2, 3, 1, 3), (2, 3, 1, 3), (2, 3, 1, 12)], [INPUTS, KERNEL]),
    (convolve, SQUARE, [KERNEL, OFFSET]),
    (
        convolve,
        [(1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 1)],
        [KERNEL, MASK],
    ),
    (convolve, [(1, 4, 3, 2), (1, 1, 2, 2), (1, 4, 3, 2)], [INPUTS, GRAD]),
    (convolve, SQUARE, [KERNEL, GRAD]),
    (convolve, [(1, 4, 3, 3), (1, 1, 3, 2), (1, 4, 3, 2)], [OFFSET, GRAD]),
    (
        convolve,
        [(1, 4, 3, 3), (1, 1, 3, 1), (1, 4, 3, 2), (1, 4, 3, 1)],
        [MASK, GRAD],
    ),
    (convolve, SQUARE, [INPUTS, KERNEL, OFFSET]),
    (convolve, SQUARE, [INPUTS, KERNEL, OFFSET, GRAD]),
    *(
        (function, [(2, 2, 3, 2)] * 2, same)
        for function in (psroi_pool, roi_align)
        for same in (
            [],
            [INPUTS, DISPLACEMENT],
            [INPUTS, GRAD],
            [DISPLACEMENT, GRAD],
            [INPUTS, DISPLACEMENT, GRAD],
        )
    ),
]


@pytest.mark.parametrize(
    ("implementation", "in_graph"),
    [("native", False), ("native", True), ("portable", False)],
    ids=["eager", "graph", "portable"],
)
@pytest.mark.parametrize(
    ("function", "shapes", "same"),
    SAME,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_tensor_in_several_places(
    function, shapes, same, implementation, in_graph
):
    output = function(
        *(draw(shape, 0) for shape in shapes), implementation=implementation
    )
    shapes = [*shapes, output.shape]
    same = [place % len(shapes) for place in same]
    # The number of the tensor in each place.
    tensor_at = [
        min(same) if place in same else place for place in range(len(shapes))
    ]
    starts = [draw(shape, seed) for seed, shape in enumerate(shapes)]
    weights = [draw(shape, 10) for shape in shapes]
    directions = [draw(shape, 20 + i) for i, shape in enumerate(shapes)]

    def first_derivative(*tensors):
        """Returns a number made of the first derivatives by all operands."""
        *operands, grad_output = (tensors[number] for number in tensor_at)
        numbers = sorted(set(tensor_at[:-1]))
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = function(*operands, implementation=implementation)
        gradients = tape.gradient(
            output, [tensors[number] for number in numbers], grad_output
        )
        return tf.add_n(
            [
                tf.reduce_sum(gradient * weights[number])
                for number, gradient in zip(numbers, gradients, strict=True)
            ]
        )

    def slope(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = first_derivative(*tensors)
        gradients = tape.gradient(value, tensors)
        return tf.add_n(
            [
                tf.reduce_sum(gradient * direction)
                for gradient, direction in zip(
                    gradients, directions, strict=True
                )
                if gradient is not None  # a tensor without a place
            ]
        )

    received = (tf.function(slope) if in_graph else slope)(*starts)
    above, below = (
        first_derivative(
            *(s + step * d for s, d in zip(starts, directions, strict=True))
        )
        for step in (STEP, -STEP)
    )
    expected = (above - below) / (2 * STEP)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE)


# Calls whose operands all depend on one tensor, alone and in constructs.
OPS = {
    "convolve": (convolve, (2, 4, 3, 2)),
    "psroi_pool": (psroi_pool, (2, 2, 3, 2)),
    "roi_align": (roi_align, (2, 2, 3, 2)),
}


def call(name, x, implementation="native"):
    """Moves inputs and displacements (and the kernel) with `x`."""
    function, shape = OPS[name]
    operands = [x]
    if name == "convolve":
        kernel = draw((3, 1, 2, 2), 1) * tf.reduce_sum(x)
        offset = tf.concat([x * 0.5, x * x, 0.3 - x * 0.2], -1)
        operands += [kernel, offset, tf.concat([x, x[..., :1]], -1)]
    else:
        operands += [x * 0.5 + 0.1]
    return function(*operands, implementation=implementation)


def plain(name, x, **options):
    return call(name, x, **options)


def nested(name, x, **options):
    inner = tf.function(lambda x: call(name, x, **options))
    return tf.function(lambda x: inner(x * 1.1) * 2)(x)


def mapped(name, x, **options):
    return tf.map_fn(
        lambda part: call(name, part, **options), tf.stack([x, x * 0.9])
    )


def repeated(name, x, **options):
    return tf.while_loop(
        lambda i, _: i < 2,
        lambda i, x: (i + 1, 0.2 + 0.1 * tf.tanh(call(name, x, **options))),
        (0, x),
        maximum_iterations=2,
    )[1]


def chosen(name, x, **options):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: call(name, x, **options),
        lambda: call(name, x * 2, **options),
    )


PLACES = [plain, nested, mapped, repeated, chosen]


def directional(function, x, direction):
    """Returns the change of `function` in this direction."""
    above, below = (function(x + step * direction) for step in (STEP, -STEP))
    return (above - below) / (2 * STEP)


def gradient_of(function):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(function(x) ** 2)
        return tape.gradient(y, x)

    return gradient


def forward(function, x, direction):
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        y = function(x)
    return accumulator.jvp(y)


def back_over_back(function, x, direction):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(gradient_of(function)(x) * direction)
    return tape.gradient(value, x)


def forward_over_back(function, x, direction):
    return forward(gradient_of(function), x, direction)


def inside(mode):
    """Runs the accumulator or the tapes in one function with the op."""

    def run(function, x, direction):
        function = function.python_function
        return tf.function(lambda x: mode(function, x, direction))(x)

    return run


forward_inside = inside(forward)

# TensorFlow itself has no forward mode over the backward pass of loops and
# conditions: it raises TypeError also for stock ops.
MODES = {
    (plain, "native"): [forward, forward_over_back],
    (nested, "native"): [forward, back_over_back],
    (mapped, "native"): [forward, back_over_back],
    (repeated, "native"): [forward, back_over_back],
    (chosen, "native"): [forward_inside, back_over_back],
    (plain, "portable"): [forward, forward_over_back],
}


def check_modes(name, place, implementation, modes, **options):
    shape = OPS[name][1]
    x, direction = draw(shape, 5), draw(shape, 6)

    def by_itself(x):
        return place(name, x, implementation=implementation)

    function = tf.function(by_itself, autograph=False, **options)
    slope = directional(by_itself, x, direction)
    curve = directional(gradient_of(by_itself), x, direction)
    for mode in modes:
        received = mode(function, x, direction)
        expected = slope if mode in (forward, forward_inside) else curve
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(
            received, expected, rtol=TOLERANCE, atol=1e-8
        )


@pytest.mark.parametrize(
    ("place", "implementation"),
    MODES,
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("name", OPS)
def test_forward_mode_and_hessians(name, place, implementation):
    """Runs accumulators and tapes outside of the function, and inside of it."""
    modes = MODES[place, implementation]
    check_modes(name, place, implementation, modes)


@pytest.mark.parametrize("name", ["convolve", "roi_align"])
def test_forward_mode_and_hessians_compiled_by_xla(name):
    modes = [forward, back_over_back]
    check_modes(name, plain, "native", modes, jit_compile=True)


def test_forward_over_backward_inside_one_function():
    mode = inside(forward_over_back)
    check_modes("convolve", plain, "native", [mode])


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", OPS)
def test_third_derivatives(name, in_graph):
    shape = OPS[name][1]
    x, direction = draw(shape, 5), draw(shape, 6)

    def second(x):
        return back_over_back(lambda x: call(name, x), x, direction)

    def third(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(second(x) * direction)
        return tape.gradient(value, x)

    received = (tf.function(third) if in_graph else third)(x)
    expected = directional(second, x, direction)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE, atol=1e-7)


# Calls of all kinds away from kinks, and gradients of some gradients.


CONVOLUTIONS = {
    "conv": dict(padding=((1, 0), (2, 1)), strides=(2, 1)),
    "conv grouped": dict(groups=2, offset_groups=3, dilation_rate=(1, 2)),
    "conv clamp": dict(boundary="clamp", reach=1),
    "conv without mask": dict(has_mask=False),
}
POOLINGS = {
    "psroi": (PSROI_POOL, True, {}),
    "psroi without trans": (PSROI_POOL, False, {"trans_std": 0.1}),
    "align": (ROI_ALIGN, True, {"sampling_ratio": 2}),
    "align adaptive": (ROI_ALIGN, True, {"sampling_ratio": 0}),
    "align without offset": (ROI_ALIGN, False, {"sampling_ratio": 0}),
}


def draw_differentiable(name):
    """Returns function, operands, options, differentiable operands."""
    if name in CONVOLUTIONS:
        case = Conv2DCase(size=(4, 5), **CONVOLUTIONS[name])
        operands = case.operands("float64")
        sources = range(len(operands))
        return ops.deformable_conv2d, operands, case.options, sources
    op, displaced, changes = POOLINGS[name]
    common = dict(
        spatial_scale=0.5,
        pooled_size=(2, 3),
        group_size=(2, 1),
        part_size=(1, 2),
        sample_per_part=2,
        trans_std=0.2,
        gamma=0.2,
    )
    attributes = op.attributes(4, **{**common, **changes})
    *operands, _ = op.draw_differentiable(
        np.random.default_rng(3),
        attributes,
        size=(5, 6),
        num_rois=4,
        kinds=("inside", "across the edge", "padding"),
        channels=8,
        classes=2,
    )
    count = 1 + displaced
    function = getattr(ops, op.function)
    return function, operands[: 1 + count], attributes, (0, 2)[:count]


def first_gradients(function, operands, options, wanted, output_grad):
    with tf.GradientTape() as tape:
        tape.watch([operands[i] for i in wanted])
        output = function(*operands, **options)
    return tape.gradient(output, [operands[i] for i in wanted], output_grad)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *POOLINGS])
def test_second_derivatives_equal_finite_differences(name, mode):
    """Tests first derivatives by each operand, and by the incoming gradient."""
    function, arrays, options, sources = draw_differentiable(name)
    rng = np.random.default_rng(5)
    operands = [tf.constant(x) for x in arrays]
    output = function(*operands, **options)
    output_grad = tf.constant(rng.normal(size=output.shape))
    # Each first derivative is differentiated along a direction.
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
    """Tests a penalty on gradients' norms against TensorFlow's ops."""
    function, arrays, options, _ = draw_differentiable("conv grouped")
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
        if expected is None:  # the kernel's gradient does not depend on it
            assert received is None or not received.numpy().any()
        else:
            assert_close(received, expected, 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_second_derivatives(dtype):
    case = Conv2DCase(size=(4, 5))
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
    function, arrays, options, _ = draw_differentiable("psroi")
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
    """Trains a critic while its gradient by its input is held near 1."""
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
    """Tests that the portable ops run only for second derivatives."""
    case = Conv2DCase()
    operands = [tf.constant(x) for x in case.operands()]

    def gradients():
        return first_gradients(
            ops.deformable_conv2d, operands, case.options, range(4), None
        )

    assert implementations(gradients) == {"native"}
