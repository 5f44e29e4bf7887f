# SPDX-License-Identifier: Apache-2.0
"""Tests second derivatives: one tensor in two places, forward mode, loops.

Results are compared with differences of values or of first derivatives, in
float64, in a direction that changes every operand that can change.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close
from every_op import (
    CONV2D,
    COORDINATES,
    PSROI_POOL,
    ROI_ALIGN,
    conv2d_call,
    every_op,
    every_variant,
)
from operands import DTYPES, Conv2DCase
from pairwise import grid
from traced import implementations

import tf_deform
from tf_deform import layers

STEP = 1e-5
TOLERANCE = 1e-6

in_graphs = pytest.mark.parametrize(
    "in_graph", [False, True], ids=["eager", "graph"]
)


def draw(shape, seed):
    """Draws numbers away from kinks, for any operand."""
    rng = np.random.default_rng(seed)
    return tf.constant(rng.uniform(0.2, 0.4, shape))


def moved(tensors, directions, step):
    return [x + step * d for x, d in zip(tensors, directions, strict=True)]


def directional(function, tensors, directions):
    """Returns the change of `function` in these directions."""
    above, below = (
        function(*moved(tensors, directions, step)) for step in (STEP, -STEP)
    )
    return (above - below) / (2 * STEP)


def dot(tensors, others):
    """Returns the sum of all products; None stands for zeros."""
    return tf.add_n(
        [
            tf.reduce_sum(x * y)
            for x, y in zip(tensors, others, strict=True)
            if x is not None
        ]
    )


def gradients_of(function, tensors, output_grad=None):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = function(*tensors)
    return tape.gradient(output, tensors, output_grad)


# One tensor in several places: op, shapes of its operands, and which of the
# operands and the incoming gradient (of the result's shape) are one tensor.

INPUTS, KERNEL, OFFSET, MASK = range(4)
DISPLACEMENT, GRAD = 1, -1
SQUARE = [(1, 1, 2, 2)] * 3
SAME = [
    (CONV2D, [(1, 4, 3, 2), (1, 1, 2, 3), (1, 4, 3, 2)], [INPUTS, OFFSET]),
    (
        CONV2D,
        [(1, 4, 3, 1), (1, 1, 1, 2), (1, 4, 3, 2), (1, 4, 3, 1)],
        [INPUTS, MASK],
    ),
    (CONV2D, [(2, 3, 1, 3), (2, 3, 1, 3), (2, 3, 1, 12)], [INPUTS, KERNEL]),
    (CONV2D, SQUARE, [KERNEL, OFFSET]),
    (
        CONV2D,
        [(1, 1, 2, 2), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 1)],
        [KERNEL, MASK],
    ),
    (CONV2D, [(1, 4, 3, 2), (1, 1, 2, 2), (1, 4, 3, 2)], [INPUTS, GRAD]),
    (CONV2D, SQUARE, [KERNEL, GRAD]),
    (CONV2D, [(1, 4, 3, 3), (1, 1, 3, 2), (1, 4, 3, 2)], [OFFSET, GRAD]),
    (
        CONV2D,
        [(1, 4, 3, 3), (1, 1, 3, 1), (1, 4, 3, 2), (1, 4, 3, 1)],
        [MASK, GRAD],
    ),
    (CONV2D, SQUARE, [INPUTS, KERNEL, OFFSET]),
    (CONV2D, SQUARE, [INPUTS, KERNEL, OFFSET, GRAD]),
    *(
        (op, [(2, 2, 3, 2)] * 2, same)
        for op in (PSROI_POOL, ROI_ALIGN)
        for same in (
            [INPUTS, DISPLACEMENT],
            [INPUTS, GRAD],
            [DISPLACEMENT, GRAD],
            [INPUTS, DISPLACEMENT, GRAD],
        )
    ),
]
ROIS = np.array([[0, 0.3, 0.2, 1.9, 1.4], [1, -0.4, 0.1, 2.2, 0.9]])
_POOLED = dict(rois=ROIS, spatial_scale=0.7, pooled_size=(2, 3))
OPTIONS = {
    CONV2D: dict(padding="same"),
    PSROI_POOL: dict(
        **_POOLED, output_dim=2, group_size=1, sample_per_part=2, trans_std=0.5
    ),
    ROI_ALIGN: dict(**_POOLED, sampling_ratio=2, gamma=0.5),
}


@pytest.mark.parametrize("mode", ["eager", "graph", "portable"])
@pytest.mark.parametrize(("op", "shapes", "same"), SAME, ids=str)
def test_one_tensor_in_several_places(op, shapes, same, mode):
    options = {
        **OPTIONS[op],
        "implementation": "portable" if mode == "portable" else "native",
    }

    def function(*operands):
        names = op.differentiable[: len(operands)]
        return op.function(**dict(zip(names, operands, strict=True)), **options)

    output = function(*(draw(shape, 0) for shape in shapes))
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
        *operands, output_grad = (tensors[number] for number in tensor_at)
        numbers = sorted(set(tensor_at[:-1]))
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = function(*operands)
        gradients = tape.gradient(
            output, [tensors[number] for number in numbers], output_grad
        )
        return dot(gradients, [weights[number] for number in numbers])

    def slope(*tensors):
        return dot(gradients_of(first_derivative, tensors), directions)

    if mode == "graph":
        received = tf.function(slope, autograph=False)(*starts)
    else:
        received = slope(*starts)
    expected = directional(first_derivative, starts, directions)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE)


# Calls whose operands all depend on one tensor, alone and in constructs.


@functools.cache
def small(op):
    return op.draw_small(next(iter(op.variants)))


def call(op, x, implementation="native"):
    """Moves all operands with `x`, displacements only between two kinks."""
    given, _, options = small(op)
    given = dict(given)
    for seed, name in enumerate(op.differentiable):
        size = (given[name].size, x.shape[0])
        factors = np.random.default_rng(seed).normal(size=size)
        # XLA has to compute displacements while it compiles: no sine.
        moves = tf.reduce_sum(factors * x, -1)
        moves = 0.5 * moves + 0.1 * moves**3
        scale = 0.01 if name in COORDINATES else 1
        given[name] += scale * tf.reshape(moves, given[name].shape)
    return op.function(**given, **options, implementation=implementation)


def plain(op, x, **options):
    return call(op, x, **options)


def nested(op, x, **options):
    inner = tf.function(lambda x: call(op, x, **options))
    return tf.function(lambda x: inner(x * 1.1) * 2)(x)


def mapped(op, x, **options):
    return tf.map_fn(
        lambda part: call(op, part, **options), tf.stack([x, x * 0.9])
    )


def repeated(op, x, **options):
    def step(i, x):
        output = tf.reshape(call(op, x, **options), (x.shape[0], -1))
        return i + 1, 0.2 + 0.3 * tf.tanh(0.1 * tf.reduce_sum(output, 1))

    return tf.while_loop(
        lambda i, _: i < 2, step, (0, x), maximum_iterations=2
    )[1]


def chosen(op, x, **options):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: call(op, x, **options),
        lambda: call(op, x * 2, **options),
    )


X, DIRECTION = draw((6,), 5), draw((6,), 6)


def gradient_of(function):
    def gradient(x):
        def loss(x):
            return tf.reduce_sum(tf.square(function(x)))

        return gradients_of(loss, [x])[0]

    return gradient


def forward(function, x):
    with tf.autodiff.ForwardAccumulator(x, DIRECTION) as accumulator:
        y = function(x)
    return accumulator.jvp(y)


def back_over_back(function, x):
    return gradients_of(
        lambda x: dot([gradient_of(function)(x)], [DIRECTION]), [x]
    )[0]


def forward_over_back(function, x):
    return forward(gradient_of(function), x)


def inside(mode):
    """Runs the accumulator or the tapes in one function with the op."""

    def run(function, x):
        function = function.python_function
        return tf.function(lambda x: mode(function, x), autograph=False)(x)

    return run


forward_inside = inside(forward)

# Where calls stand, and the modes of their values and of their gradients.
# TensorFlow itself has no forward mode over the backward pass of loops and
# conditions: it raises TypeError also for stock ops.
MODES = {
    "plain": (plain, "native", forward, forward_over_back),
    "nested": (nested, "native", forward, back_over_back),
    "mapped": (mapped, "native", forward, back_over_back),
    "repeated": (repeated, "native", forward, back_over_back),
    "chosen": (chosen, "native", forward_inside, back_over_back),
    "portable": (plain, "portable", forward, forward_over_back),
}


def check_modes(op, place, implementation, modes, **options):
    def by_itself(x):
        return place(op, x, implementation=implementation)

    function = tf.function(by_itself, autograph=False, **options)
    for mode in modes:
        of_values = mode in (forward, forward_inside)
        expected = directional(
            function if of_values else gradient_of(function), [X], [DIRECTION]
        )
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(
            mode(function, X),
            expected,
            rtol=TOLERANCE,
            atol=1e-8,
            err_msg=mode.__name__,
        )


@grid(
    {
        "name": list(MODES),
        "op": [PSROI_POOL, CONV2D, ROI_ALIGN],
        "of": ["values", "gradients"],
    }
)
def test_forward_mode_and_hessians(op, name, of):
    """Runs accumulators and tapes outside of the function, and inside of it."""
    place, implementation, of_values, of_gradients = MODES[name]
    mode = of_values if of == "values" else of_gradients
    check_modes(op, place, implementation, [mode])


@pytest.mark.parametrize("op", [CONV2D, ROI_ALIGN], ids=str)
def test_forward_mode_and_hessians_compiled_by_xla(op):
    modes = [forward, back_over_back]
    check_modes(op, plain, "native", modes, jit_compile=True)


def test_forward_over_backward_inside_one_function():
    check_modes(CONV2D, plain, "native", [inside(forward_over_back)])


@in_graphs
@every_op
def test_third_derivatives(op, in_graph):
    def second(x):
        return back_over_back(lambda x: call(op, x), x)

    def third(x):
        return gradients_of(lambda x: dot([second(x)], [DIRECTION]), [x])[0]

    received = (tf.function(third) if in_graph else third)(X)
    expected = directional(second, [X], [DIRECTION])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE, atol=1e-7)


@every_op
def test_hessians_are_symmetric(op):
    @tf.function
    def hessian(x):
        return tf.hessians(tf.reduce_sum(call(op, x) ** 2), x)[0]

    received = hessian(X)
    assert np.abs(received).max() > 0
    assert_close(received, tf.transpose(received), 1e-9)


# Gradients of some gradients.


def some_gradients(op, given, options, wanted, output_grad):
    """Returns the gradients of the operands that are named in `wanted`."""
    with tf.GradientTape() as tape:
        tape.watch([given[name] for name in wanted])
        output = op.function(**given, **options)
    return tape.gradient(output, [given[name] for name in wanted], output_grad)


@in_graphs
@every_variant
def test_second_derivatives_equal_finite_differences(op, variant, in_graph):
    """Tests first derivatives by each operand, and by the incoming gradient."""
    given, output_grad, options = op.draw_small(variant)
    names = [name for name in op.differentiable if given.get(name) is not None]
    rng = np.random.default_rng(5)
    starts = [tf.constant(given[name]) for name in names]
    starts.append(tf.constant(output_grad))
    # Each first derivative is differentiated along a direction.
    along, directions = (
        [rng.normal(size=x.shape) for x in starts] for _ in range(2)
    )

    def slopes(*tensors):
        """Returns a slope for each operand, each of a gradient on its own."""
        *operands, output_grad = tensors
        now = {**given, **dict(zip(names, operands, strict=True))}
        return [
            dot(some_gradients(op, now, options, [name], output_grad), [d])
            for name, d in zip(names, along, strict=False)
        ]

    def second(*tensors):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(tensors)
            results = slopes(*tensors)
        return [tape.gradient(slope, tensors) for slope in results]

    if in_graph:
        received = tf.function(second, autograph=False)(*starts)
    else:
        received = second(*starts)
    for index, direction in enumerate(directions):
        zeros = [0.0] * len(starts)
        zeros[index] = direction
        above, below = (
            slopes(*moved(starts, zeros, step)) for step in (1e-6, -1e-6)
        )
        for name, gradients, one, two in zip(
            names, received, above, below, strict=True
        ):
            expected = (one - two) / 2e-6
            gradient = gradients[index]
            actual = 0.0 if gradient is None else dot([gradient], [direction])
            assert abs(actual - expected) < 1e-6 * max(1, abs(expected)), (
                name,
                [*names, "output_grad"][index],
            )


@in_graphs
@pytest.mark.parametrize(
    "wanted",
    [
        ("inputs", "offset"),
        ("kernel", "mask"),
        ("inputs", "kernel", "offset"),
        ("inputs", "kernel", "offset", "mask"),
    ],
    ids="+".join,
)
def test_second_derivatives_of_some_gradients(wanted, in_graph):
    """Tests a penalty on gradients' norms against TensorFlow's ops."""
    given, output_grad, options = CONV2D.draw_small("dilation")
    given = {name: tf.constant(x) for name, x in given.items()}

    def penalty_gradients(implementation):
        with tf_deform.implementation(implementation):
            with tf.GradientTape() as tape:
                tape.watch(given)
                gradients = some_gradients(
                    CONV2D, given, options, wanted, output_grad
                )
                penalty = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
            return tape.gradient(
                penalty,
                given,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )

    native = tf.function(penalty_gradients) if in_graph else penalty_gradients
    assert_close(native("native"), penalty_gradients("portable"), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_second_derivatives(dtype):
    given, _, options = conv2d_call(Conv2DCase(size=(4, 5)), dtype)
    given = {name: tf.constant(x) for name, x in given.items()}
    with tf.GradientTape() as tape:
        tape.watch(given)
        gradients = some_gradients(CONV2D, given, options, given, None)
        loss = tf.add_n(
            [tf.reduce_sum(tf.cast(g, "float64") ** 2) for g in gradients]
        )
    for name, gradient in tape.gradient(loss, given).items():
        assert gradient.dtype == given[name].dtype
        assert gradient.shape == given[name].shape
        assert np.isfinite(tf.cast(gradient, "float64")).all()


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
            (gradient,) = gradients_of(model, [images])
            norms = tf.sqrt(tf.reduce_sum(gradient**2, (1, 2, 3)))
            loss = tf.reduce_mean((norms - 1) ** 2)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            if gradient is not None:  # none of the last bias
                variable.assign_sub(0.5 * gradient)
        return loss

    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]


@every_op
def test_first_derivatives_stay_native(op):
    """Tests that the portable ops run only for second derivatives."""
    assert implementations(lambda: op.results(*op.draw())) == {"native"}
