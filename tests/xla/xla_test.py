# SPDX-License-Identifier: Apache-2.0
"""Tests the ops inside `jit_compile=True`: results are the same as without.

Both ways lead to the same functions of the core, which give the same bits for
any number of threads. So results are compared bit by bit, except where XLA's
own arithmetic surrounds the ops. As compiling takes most of the time, a test
compiles one function with several calls.
"""

import concurrent.futures
import dataclasses
import hashlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from every_op import CONV2D, CONV2D_FIELDS, OPS, PSROI_POOL, ROI_ALIGN
from operands import random

from tf_deform import _build_info, _loader, layers
from tf_deform.ops import deformable_conv2d

pytestmark = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)

TYPES = ("float16", "bfloat16", "float32", "float64")

every_op = pytest.mark.parametrize("call", OPS, ids=str)


def draw(call, dtype="float32", displaced=True, larger=1):
    """Returns operands by name, and the output's gradient, as tensors.

    The last operand, a mask or a pooling op's displacements, may be left out.
    """
    given, output_grad = call.draw(dtype, larger)
    if not displaced:
        given.popitem()
    return tf.nest.map_structure(tf.constant, (given, output_grad))


def hlo(function, *operands) -> str:
    return function.experimental_get_compiler_ir(*operands)(stage="hlo")


def targets(text: str) -> list[str]:
    return re.findall('custom_call_target="TfDeform>(.*?)"', text)


def assert_same(actual, expected):
    __tracebackhide__ = True
    tf.nest.assert_same_structure(actual, expected, check_types=False)
    pairs = zip(*map(tf.nest.flatten, (actual, expected)), strict=True)
    for number, (first, second) in enumerate(pairs):
        name = f"value {number}"
        assert_equal(first, second, name=name, dtype=second.dtype)


@pytest.mark.parametrize(
    ("call", "changes", "displaced"),
    [
        *(
            (call, changes, displaced)
            for call, changes in (
                *((call, {}) for call in OPS),
                (CONV2D, {"boundary": "clamp"}),
                # Attributes cross as text, and must lose no bit of a float64.
                (ROI_ALIGN, {"spatial_scale": 1 / 3 + 1e-12, "gamma": 0.1}),
            )
            for displaced in (False, True)
        ),
        (CONV2D, {"modulation": "none"}, False),
        (CONV2D_FIELDS, {"modulation": "sigmoid"}, True),
        (CONV2D_FIELDS, {}, True),
    ],
    ids=str,
)
def test_forward_and_gradients(call, changes, displaced):
    given = {dtype: draw(call, dtype, displaced) for dtype in TYPES}

    def run(given):
        return {
            dtype: call.results(*operands, **changes)
            for dtype, operands in given.items()
        }

    compiled = tf.function(run, jit_compile=True)
    results = compiled(given)
    assert_same(results, run(given))
    for _, gradients in results.values():
        assert np.any(tf.cast(gradients["inputs"], "float64"))
    found = targets(hlo(compiled, given))
    assert sorted(found) == [call.name] * 4 + [f"{call.name}Grad"] * 4


@every_op
def test_one_wanted_gradient(call):
    """Tests that unwanted gradients come out empty: they have no memory."""

    def run(given, output_grad):
        gradients = {}
        for name in call.differentiable:
            with tf.GradientTape() as tape:
                tape.watch(given[name])
                output = call.function(**given, **call.options)
            gradients[name] = tape.gradient(output, given[name], output_grad)
        return gradients

    compiled = tf.function(run, jit_compile=True)
    given = draw(call)
    assert_same(compiled(*given), run(*given))
    wanted = []
    for line in hlo(compiled, *given).splitlines():
        if targets(line) == [f"{call.name}Grad"]:
            results = re.search(" = (.*?) custom-call", line)[1]
            sizes = re.findall(r"f32\[(.*?)\]", results)
            assert len(sizes) == len(call.differentiable)
            wanted.append([i for i, size in enumerate(sizes) if size != "0"])
    assert sorted(wanted) == [[i] for i in range(len(call.differentiable))]


@every_op
def test_a_tape_around_compiled_functions(call):
    """Tests a tape outside.

    TensorFlow compiles the backward pass on its own.
    """
    compiled = tf.function(call.function, jit_compile=True)
    given = draw(call)
    results = dataclasses.replace(call, function=compiled).results(*given)
    assert_same(results, call.results(*given))


@every_op
def test_nothing(call):
    """Tests empty batches and no ROIs.

    Results have the same shapes as without.
    """
    given, output_grad = draw(call)

    def empty(*names):
        return {k: x[:0] if k in names else x for k, x in given.items()}

    if call is CONV2D:
        images = empty("inputs", "offset", "mask")
        cases = {"no images": (images, output_grad[:0])}
    else:
        regions = [name for name in given if name != "inputs"]
        cases = {
            "neither": (empty(*given), output_grad[:0]),
            "no regions": (empty(*regions), output_grad[:0]),
        }
        # Without images every ROI is padding.
        rois = given["rois"].numpy()
        rois[:, 0] = -1
        images = empty("inputs") | {"rois": tf.constant(rois)}
        cases["no images"] = images, output_grad

    def run(cases):
        return {name: call.results(*x) for name, x in cases.items()}

    assert_same(tf.function(run, jit_compile=True)(cases), run(cases))


@every_op
def test_a_function_compiles_anew_for_every_shape(call):
    drawn = call.draw()[0]
    signature = [
        tf.TensorSpec([None] * x.ndim, x.dtype) for x in drawn.values()
    ]

    def run(*operands):
        given = dict(zip(drawn, operands, strict=True))
        return call.function(**given, **call.options)

    compiled = tf.function(run, signature, jit_compile=True)
    for larger in (1, 2):
        given = draw(call, larger=larger)[0].values()
        assert_same(compiled(*given), run(*given))


@pytest.mark.parametrize("call", [PSROI_POOL, ROI_ALIGN], ids=str)
def test_bad_batch_indices_are_padding(call):
    """Tests zeros and no read outside; without XLA the CPU raises an error."""
    bad = (0.5, 2.0, 1e30, np.nan, np.inf, -0.5, -np.inf)
    given, padded = {}, {}
    for dtype in TYPES:
        operands, output_grad = draw(call, dtype, larger=2)
        rois = operands["rois"].numpy()
        for cases, indices in ((given, bad), (padded, -1)):
            rois[: len(bad), 0] = indices
            changed = operands | {"rois": tf.constant(rois)}
            cases[dtype] = changed, output_grad

    def run(cases):
        return {dtype: call.results(*x) for dtype, x in cases.items()}

    results = tf.function(run, jit_compile=True)(given)
    for outputs, _ in results.values():
        for output in tf.nest.flatten(outputs):
            assert not np.any(tf.cast(output[: len(bad)], "float64"))
            assert np.any(tf.cast(output[len(bad) :], "float64"))
    assert_same(results, run(padded))


def test_a_shape_that_depends_on_values():
    def op(inputs, kernel, offset, keep):
        inputs, offset = (tf.boolean_mask(x, keep) for x in (inputs, offset))
        return deformable_conv2d(inputs, kernel, offset, **CONV2D.options)

    operands = [*draw(CONV2D, displaced=False)[0].values()]
    operands.append(tf.constant([True, False]))
    assert op(*operands).shape[0] == 1
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"Expected `inputs` to have a shape that is known when XLA "
        r"compiles .* pad it to a fixed size. Received: "
        r"inputs.shape=\(None, 9, 8, 12\)",
    ):
        tf.function(op, jit_compile=True)(*operands)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_shapes_that_do_not_fit(jit_compile):
    """Tests that the text is the same if only the compiler knows shapes."""
    given, _ = draw(CONV2D)
    given["offset"] = given["offset"][..., 1:]
    function = tf.function(
        lambda *x: deformable_conv2d(*x, **CONV2D.options),
        [tf.TensorSpec([None] * 4)] * 4,
        jit_compile=jit_compile,
    )
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        function(*given.values())
    assert (
        "Expected `offset` to have 24 channels (2 * offset_groups * 3 * 2). "
        f"Received: offset.shape={(*given['offset'].shape[:3], 23)}"
    ) in error.value.message


def test_coordinates_of_another_type():
    op = _loader.op_library().tf_deform_deformable_roi_align
    rois = tf.zeros((3, 5), "float64")

    @tf.function(jit_compile=True)
    def function(inputs):
        options = {"spatial_scale": [1.0], "pooled_size": [2, 2]}
        return op(inputs, rois, [], gamma=[0.1], **options)

    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Expected coordinates to be"
    ):
        function(random(1, 4, 5, 2))


@every_op
def test_calls_in_threads(call):
    """Tests loops that share a pool, each with workers of its own."""
    given = draw(call, larger=4)
    compiled = tf.function(call.results, jit_compile=True)
    compiled(*given)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: compiled(*given), range(80)))
    expected = call.results(*given)
    for result in results:
        assert_same(result, expected)


def digest() -> str:
    """Returns a hash of what a compiled step of two convolutions computes."""
    shapes = (3, 30, 29, 20), (3, 3, 20, 24), (3, 30, 29, 18), (3, 30, 29, 9)
    operands = [tf.constant(random(*x, seed=i)) for i, x in enumerate(shapes)]

    @tf.function(jit_compile=True)
    def step(x, k, o, m):
        with tf.GradientTape() as tape:
            tape.watch((x, k, o, m))
            y = deformable_conv2d(x, k, o, m, padding="same")
            # Two calls that do not wait for each other.
            z = deformable_conv2d(x, k, -o, m, padding="same")
        return y, z, tape.gradient((y, z), (x, k, o, m))

    for _ in range(3):
        results = tf.nest.flatten(step(*operands))
    found = b"".join(result.numpy().tobytes() for result in results)
    return hashlib.sha256(found).hexdigest()


@pytest.mark.cpu_only(reason="a GPU has no such threads")
def test_any_number_of_threads(run_python):
    """Tests this process' number, several, and one: only the caller works."""
    script = """
import sys
import tensorflow as tf

threads = int(sys.argv[1])
tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)
sys.path[:0] = sys.argv[2:]
import xla_test

print(xla_test.digest(), end="")
"""
    printed = {run_python(script, n, *sys.path) for n in (1, 5)}
    assert printed == {digest()}


# Layers and models.


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.DeformableConv2D(2, 3),
        lambda: layers.DeformablePSROIPooling(2, 3, 1.0),
        lambda: layers.DeformableROIPooling(3, 1.0),
        lambda: layers.DeformableROIAlign(3, 1.0),
    ],
)
def test_layers_say_whether_they_compile(make, monkeypatch):
    assert make().supports_jit is True
    # A GPU without kernels has nothing to compile.
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind=None: ["a GPU"]
    )
    monkeypatch.setattr(_build_info, "CUDA_VERSION", None)
    assert make().supports_jit is False
    monkeypatch.setattr(_build_info, "CUDA_VERSION", "13.0")
    assert make().supports_jit is True
    monkeypatch.setattr(_loader, "has_xla", lambda: False)
    assert make().supports_jit is False


def detector() -> keras.Model:
    """Makes plain and deformable convolutions, and pools four regions."""
    keras.utils.set_random_seed(3)
    image = keras.Input((16, 16, 3), batch_size=3)
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    x = layers.DeformableConv2D(
        12, 3, padding="same", activation="relu", modulation="2sigmoid"
    )(x)
    rois = keras.Input((5,), batch_size=4)
    x = layers.DeformableROIAlign(3, 1.0, sampling_ratio=2)(x, rois)
    x = keras.layers.Flatten()(x)
    model = keras.Model([image, rois], keras.layers.Dense(4)(x))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if "offset" in variable.path:  # Zeros would be no test.
            variable.assign(rng.normal(0, 0.05, variable.shape))
    return model


def batch(step: int):
    rois = np.float32(
        [
            [0, 1, 2, 9, 12],
            [0, 4, 0, 14, 7],
            [1, 3, 3, 12, 13],
            [2, 0, 5, 8, 15],
        ]
    )
    rng = np.random.default_rng(step)
    image = rng.normal(size=(3, 16, 16, 3)).astype("float32")
    return [image, rois], rng.normal(size=(4, 4)).astype("float32")


def train(optimizer: str, steps: int, jit_compile: bool):
    """Returns the trained model, and the losses."""
    model = detector()
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    losses = [float(model.train_on_batch(*batch(i))) for i in range(steps)]
    assert model.jit_compile is jit_compile
    return model, losses


def test_a_model_trains_as_without():
    """Tests also that Keras does run the custom calls."""
    model, expected = train("adam", 20, False)
    compiled, losses = train("adam", 20, True)
    assert_close(losses[0], expected[0], 1e-5, name="first loss")
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert losses[-1] != losses[0]
    weights = compiled.get_weights(), model.get_weights()
    assert_close(*weights, 1e-3, name="weights")
    step = tf.function(compiled.train_step, jit_compile=True)
    arguments = tf.nest.map_structure(tf.constant, batch(0))
    found = targets(hlo(step, arguments))
    assert {"DeformableConv2DGrad", "DeformableROIAlignGrad"} <= set(found)


def test_first_gradients_of_a_model():
    model = detector()
    inputs, target = batch(0)

    def step(image, rois, target):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model([image, rois]) - target) ** 2)
        return loss, tape.gradient(loss, model.trainable_variables)

    loss, gradients = step(*inputs, target)
    assert all(np.any(gradient) for gradient in gradients)
    compiled = tf.function(step, jit_compile=True)
    assert_close(compiled(*inputs, target), (loss, gradients), 1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """Tests that losses are close but not equal: XLA rounds at other places."""
    keras.config.set_dtype_policy(policy)
    losses = [train("sgd", 1, jit_compile)[1] for jit_compile in (False, True)]
    np.testing.assert_allclose(*losses, rtol=2e-2)
