# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives: one tensor in two places, forward mode, loops.

Everything is compared with differences of values or of first derivatives, in
float64, in a direction in which all that can move moves.
"""

import numpy as np
import pytest
import tensorflow as tf

from tf_deform import ops

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
    """Numbers that are no kink, whatever operand they are."""
    rng = np.random.default_rng(seed)
    return tf.constant(rng.uniform(0.2, 0.4, shape))


# Function, shapes of its operands, and which of these and of the gradient that
# comes in (of the shape of the result) are one tensor.
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
    # For each place, the number of the tensor that stands there.
    tensor_at = [
        min(same) if place in same else place for place in range(len(shapes))
    ]
    starts = [draw(shape, seed) for seed, shape in enumerate(shapes)]
    weights = [draw(shape, 10) for shape in shapes]
    directions = [draw(shape, 20 + i) for i, shape in enumerate(shapes)]

    def first_derivative(*tensors):
        """A number made of the first derivatives by all operands."""
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
                if gradient is not None  # A tensor without a place.
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


# One tensor that all else is made of: a call, and where a program may hold it.
OPS = {
    "convolve": (convolve, (2, 4, 3, 2)),
    "psroi_pool": (psroi_pool, (2, 2, 3, 2)),
    "roi_align": (roi_align, (2, 2, 3, 2)),
}


def call(name, x, implementation="native"):
    """Inputs and displacements (and the kernel) move with `x`."""
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
    """What `function` changes by in this direction."""
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
    """The accumulator or the tapes in one function with the op."""

    def run(function, x, direction):
        function = function.python_function
        return tf.function(lambda x: mode(function, x, direction))(x)

    return run


forward_inside = inside(forward)

# TensorFlow itself has no forward mode over the backward pass of loops and
# conditions: it raises TypeError for stock ops, too.
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
    """Accumulators and tapes outside of the function, and inside of it."""
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
