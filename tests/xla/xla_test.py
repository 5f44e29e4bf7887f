# SPDX-License-Identifier: Apache-2.0
"""Tests the ops inside `jit_compile=True`: results are the same as without.

Both ways lead to the same functions of the core, which give the same bits for
any number of threads. So results are compared bit by bit, except where XLA's
own arithmetic surrounds the ops.
"""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from operands import coordinate_type
from operands import random as draw

from tf_deform import _build_info, _loader
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)
from tf_deform.ops import (
    deformable_conv2d,
    deformable_psroi_pool,
    deformable_roi_align,
)

pytestmark = pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)

TYPES = ("float16", "bfloat16", "float32", "float64")


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> tf.Tensor:
    return tf.cast(draw(*shape, seed=seed, dtype="float64"), dtype)


def regions(count: int, batch: int, dtype: str) -> tf.Tensor:
    """Returns ROIs inside and across edges of 11x9 maps of scale 1/2."""
    rng = np.random.default_rng(count)
    rois = np.zeros((count, 5))
    rois[:, 0] = np.arange(count) % (batch + 1) - 1  # -1 is padding
    rois[:, 1:3] = rng.uniform(-3, 12, (count, 2))
    rois[:, 3:] = rois[:, 1:3] + rng.uniform(1, 12, (count, 2))
    return tf.constant(rois, coordinate_type(dtype))


def convolution(dtype="float32", displaced=True, batch=2):
    """Returns the op as a function of its operands, and operands."""
    xy = coordinate_type(dtype)
    operands = [
        random(batch, 8, 9, 6, dtype=dtype),
        random(3, 2, 3, 10, dtype=dtype, seed=1),
        random(batch, 4, 9, 24, dtype=xy, seed=2),
    ]
    if displaced:
        operands.append(random(batch, 4, 9, 12, dtype=xy, seed=3))
    return (
        lambda *x: deformable_conv2d(
            *x, strides=(2, 1), padding="same", offset_groups=2
        ),
        operands,
    )


def psroi_pool(dtype="float32", displaced=True, batch=2, rois=7):
    operands = [
        random(batch, 11, 9, 24, dtype=dtype),
        regions(rois, batch, dtype),
    ]
    if displaced:
        operands.append(
            random(rois, 2, 5, 4, dtype=coordinate_type(dtype), seed=1)
        )
    return (
        lambda *x: deformable_psroi_pool(
            *x,
            output_dim=4,
            spatial_scale=0.5,
            pooled_size=(3, 4),
            group_size=(3, 2),
            part_size=(2, 5),
            sample_per_part=3,
            trans_std=0.3,
            return_count=True,
        ),
        operands,
    )


def roi_align(dtype="float32", displaced=True, batch=2, rois=7):
    operands = [
        random(batch, 11, 9, 5, dtype=dtype),
        regions(rois, batch, dtype),
    ]
    if displaced:
        operands.append(
            random(rois, 3, 4, 2, dtype=coordinate_type(dtype), seed=1)
        )
    return (
        lambda *x: deformable_roi_align(
            *x, pooled_size=(3, 4), spatial_scale=0.5, gamma=0.3
        ),
        operands,
    )


OPS = {
    "DeformableConv2D": convolution,
    "DeformablePSROIPool": psroi_pool,
    "DeformableROIAlign": roi_align,
}


def with_gradients(op, watched=None):
    """Returns the outputs of `op`, and the gradients of `watched` operands."""

    def run(*operands):
        sources = operands if watched is None else [operands[watched]]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs = tf.nest.flatten(op(*operands))
            # A gradient of whole numbers is exact in any order of sums.
            weights = tf.reshape(tf.range(tf.size(outputs[0])) % 7 - 3, [-1])
            loss = tf.cast(weights, outputs[0].dtype) * tf.reshape(
                outputs[0], [-1]
            )
        return outputs, tape.gradient(loss, sources)

    return run


def hlo(function, *operands) -> str:
    return function.experimental_get_compiler_ir(*operands)(stage="hlo")


def assert_same(actual, expected):
    tf.nest.assert_same_structure(actual, expected)
    for first, second in zip(
        tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True
    ):
        if second is None:
            assert first is None
            continue
        assert_equal(first, second, dtype=second.dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_forward_and_gradients(name, displaced, dtype):
    op, operands = OPS[name](dtype, displaced)
    run = with_gradients(op)
    compiled = tf.function(run, jit_compile=True)
    results = compiled(*operands)
    assert_same(results, tf.function(run)(*operands))
    assert np.any(tf.cast(results[1][0], "float64"))
    text = hlo(compiled, *operands)
    assert f'custom_call_target="TfDeform>{name}"' in text
    assert f'custom_call_target="TfDeform>{name}Grad"' in text


def test_every_attribute_of_a_convolution():
    def op(inputs, kernel, offset):
        return deformable_conv2d(
            inputs,
            kernel,
            offset,
            strides=(1, 2),
            padding=((1, 0), (2, 3)),
            dilation_rate=(2, 1),
            boundary="clamp",
        )

    operands = [
        random(1, 9, 8, 4),
        random(3, 3, 4, 5, seed=1),
        random(1, 6, 6, 18, seed=2),
    ]
    run = with_gradients(op)
    assert_same(
        tf.function(run, jit_compile=True)(*operands),
        tf.function(run)(*operands),
    )


def test_numbers_that_no_float32_holds():
    """Tests that attributes, which cross as text, lose no bit."""
    inputs, rois = random(1, 11, 9, 3, dtype="float64"), [[0, 1, 2, 9, 8]]

    def op(inputs, rois, offset):
        return deformable_roi_align(
            inputs,
            rois,
            offset,
            pooled_size=2,
            spatial_scale=1 / 3 + 1e-12,
            gamma=0.1,
        )

    operands = [
        inputs,
        tf.constant(rois, "float64"),
        random(1, 2, 2, 2, dtype="float64"),
    ]
    assert_same(tf.function(op, jit_compile=True)(*operands), op(*operands))


@pytest.mark.parametrize(
    ("name", "watched"),
    [
        *(("DeformableConv2D", index) for index in range(4)),
        *(("DeformablePSROIPool", index) for index in (0, 2)),
        *(("DeformableROIAlign", index) for index in (0, 2)),
    ],
)
def test_one_wanted_gradient(name, watched):
    """Tests that unwanted gradients come out empty: they have no memory."""
    op, operands = OPS[name]()
    run = with_gradients(op, watched)
    compiled = tf.function(run, jit_compile=True)
    assert_same(compiled(*operands), tf.function(run)(*operands))
    (call,) = (
        line
        for line in hlo(compiled, *operands).splitlines()
        if f'custom_call_target="TfDeform>{name}Grad"' in line
    )
    results = call.partition("custom-call")[0]
    differentiable = len(operands) - (name != "DeformableConv2D")
    assert results.count("f32[0]{0}") == differentiable - 1
    assert results.count("f32[") == differentiable


@pytest.mark.parametrize("name", OPS)
def test_a_tape_around_compiled_functions(name):
    """Tests a tape outside.

    TensorFlow compiles the backward pass on its own.
    """
    op, operands = OPS[name]()
    results = []
    for jit_compile in (False, True):
        function = tf.function(
            lambda *x: tf.nest.flatten(op(*x))[0], jit_compile=jit_compile
        )
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = function(*operands)
        results.append((output, tape.gradient(output, operands)))
    assert_same(*results)


@pytest.mark.parametrize("name", OPS)
def test_nothing(name):
    """Tests empty batches and no ROIs.

    Results have the same shapes as without.
    """
    for sizes in (
        [{"batch": 0}]
        if name == "DeformableConv2D"
        else [{"batch": 0, "rois": 0}, {"batch": 0}, {"rois": 0}]
    ):
        op, operands = OPS[name](**sizes)
        if sizes == {"batch": 0} and name != "DeformableConv2D":
            # Without images every ROI is padding.
            operands[1] = operands[1] * [0, 1, 1, 1, 1] - [1, 0, 0, 0, 0]
        run = with_gradients(op)
        assert_same(
            tf.function(run, jit_compile=True)(*operands),
            tf.function(run)(*operands),
        )


@pytest.mark.parametrize("name", OPS)
def test_a_function_compiles_anew_for_every_shape(name):
    op, operands = OPS[name]()
    signature = [
        tf.TensorSpec([None] * x.shape.rank, x.dtype) for x in operands
    ]
    compiled = tf.function(op, input_signature=signature, jit_compile=True)
    for batch in (2, 3):
        _, operands = OPS[name](batch=batch)
        assert_same(compiled(*operands), op(*operands))


BAD = (0.5, 2.0, 1e30, np.nan, np.inf, -0.5, -np.inf)


@pytest.mark.parametrize("name", ["DeformablePSROIPool", "DeformableROIAlign"])
@pytest.mark.parametrize("dtype", TYPES)
def test_bad_batch_indices_are_padding(name, dtype):
    """Tests zeros and no read outside; without XLA the CPU raises an error."""
    op, operands = OPS[name](dtype, batch=2, rois=3 + len(BAD))
    inputs, rois, displacements = operands
    rois = rois.numpy()
    rois[:3, 0] = [0, 1, 1]
    rois[3:, 0] = BAD
    run = with_gradients(op)
    results = tf.function(run, jit_compile=True)(
        inputs, tf.constant(rois), displacements
    )
    for result in results[0]:
        assert np.any(tf.cast(result[:3], "float64"))
        assert not np.any(tf.cast(result[3:], "float64"))
    rois[3:, 0] = -1
    assert_same(
        results, tf.function(run)(inputs, tf.constant(rois), displacements)
    )


def test_a_shape_that_depends_on_values():
    def op(inputs, kernel, offset, keep):
        return deformable_conv2d(
            tf.boolean_mask(inputs, keep),
            kernel,
            tf.boolean_mask(offset, keep),
            strides=(2, 1),
            padding="same",
            offset_groups=2,
        )

    _, (inputs, kernel, offset) = convolution(displaced=False)
    keep = tf.constant([True, False])
    assert op(inputs, kernel, offset, keep).shape[0] == 1
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"Expected `inputs` to have a shape that is known when XLA "
        r"compiles .* pad it to a fixed size. Received: "
        r"inputs.shape=\(None, 8, 9, 6\)",
    ):
        tf.function(op, jit_compile=True)(inputs, kernel, offset, keep)


def test_shapes_that_do_not_fit():
    """Tests that the text is the same if only the compiler knows shapes."""
    op, (inputs, kernel, offset, mask) = convolution()
    operands = [inputs, kernel, offset[..., 1:], mask]
    texts = []
    for jit_compile in (False, True):
        function = tf.function(
            op,
            input_signature=[
                tf.TensorSpec([None] * 4, tf.float32) for _ in operands
            ],
            jit_compile=jit_compile,
        )
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            function(*operands)
        texts.append(error.value.message)
    text = (
        "Expected `offset` to have 24 channels (2 * offset_groups * 3 * 2). "
        "Received: offset.shape=(2, 4, 9, 23)"
    )
    for received in texts:
        assert text in received


def test_coordinates_of_another_type():
    op = _loader.op_library().tf_deform_deformable_roi_align
    inputs, rois = random(1, 4, 5, 2), regions(3, 1, "float64")

    @tf.function(jit_compile=True)
    def function():
        return op(
            inputs,
            rois,
            [],
            spatial_scale=[1.0],
            pooled_size=[2, 2],
            gamma=[0.1],
        )

    with pytest.raises(
        tf.errors.InvalidArgumentError, match="Expected coordinates to be"
    ):
        function()


@pytest.mark.parametrize("name", OPS)
def test_calls_in_threads(name):
    """Tests loops that share a pool, each with workers of its own."""
    op, operands = OPS[name](batch=8)
    run = with_gradients(op)
    expected = tf.function(run)(*operands)
    compiled = tf.function(run, jit_compile=True)
    compiled(*operands)
    results = [[] for _ in range(4)]

    def call(index):
        for _ in range(20):
            results[index].append(compiled(*operands))

    threads = [
        threading.Thread(target=call, args=(index,)) for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in sum(results, []):
        assert_same(result, expected)
    assert sum(map(len, results)) == 80


THREADS = """
import sys
import numpy as np
import tensorflow as tf

threads = int(sys.argv[1])
tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)
import tf_deform

rng = np.random.default_rng(0)
x, k, o, m = (
    tf.constant(rng.normal(size=size), tf.float32)
    for size in ((3, 30, 29, 20), (3, 3, 20, 24), (3, 30, 29, 18),
                 (3, 30, 29, 9))
)

@tf.function(jit_compile=True)
def step(x, k, o, m):
    with tf.GradientTape() as tape:
        tape.watch((x, k, o, m))
        y = tf_deform.ops.deformable_conv2d(x, k, o, m, padding="same")
        # Two calls that do not wait for each other.
        z = tf_deform.ops.deformable_conv2d(x, k, -o, m, padding="same")
    return y, z, tape.gradient((y, z), (x, k, o, m))

for _ in range(3):
    results = tf.nest.flatten(step(x, k, o, m))
print(hash(b"".join(r.numpy().tobytes() for r in results)))
"""


@pytest.mark.cpu_only(reason="a GPU has no such threads")
def test_any_number_of_threads(run_python):
    """Tests any number of threads, also one, where only the caller works."""
    printed = {
        run_python(THREADS, threads, PYTHONHASHSEED=0) for threads in (1, 2, 5)
    }
    assert len(printed) == 1


# Layers and models.


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeformableConv2D(2, 3),
        lambda: DeformablePSROIPooling(2, 3, 1.0),
        lambda: DeformableROIPooling(3, 1.0),
        lambda: DeformableROIAlign(3, 1.0),
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
    monkeypatch.setattr(_build_info, "XLA", False)
    assert make().supports_jit is False


ROIS = np.array(
    [[0, 1, 2, 9, 12], [0, 4, 0, 14, 7], [1, 3, 3, 12, 13], [2, 0, 5, 8, 15]],
    "float32",
)


def detector() -> keras.Model:
    """Makes plain and deformable convolutions, and pools four regions."""
    keras.utils.set_random_seed(3)
    image = keras.Input((16, 16, 3), batch_size=3)
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    x = DeformableConv2D(
        12, 3, padding="same", activation="relu", modulation="2sigmoid"
    )(x)
    rois = keras.Input((5,), batch_size=4)
    x = DeformableROIAlign(3, 1.0, sampling_ratio=2)(x, rois)
    x = keras.layers.Flatten()(x)
    model = keras.Model([image, rois], keras.layers.Dense(4)(x))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if "offset" in variable.path:  # Zeros would be no test.
            variable.assign(rng.normal(0, 0.05, variable.shape))
    return model


def batch(step: int):
    rng = np.random.default_rng(step)
    image = rng.normal(size=(3, 16, 16, 3)).astype("float32")
    return [image, ROIS], rng.normal(size=(4, 4)).astype("float32")


def test_a_model_trains_as_without():
    losses, weights = [], []
    for jit_compile in (False, True):
        model = detector()
        model.compile("adam", "mse", jit_compile=jit_compile)
        assert model.jit_compile is jit_compile
        losses.append(
            [float(model.train_on_batch(*batch(step))) for step in range(20)]
        )
        weights.append(model.get_weights())
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[1][-1] != losses[1][0]
    assert_close(weights[1], weights[0], 1e-3, name="weights")


def test_first_gradients_of_a_model():
    model = detector()
    inputs, target = batch(0)

    def step(image, rois, target):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model([image, rois]) - target) ** 2)
        return loss, tape.gradient(loss, model.trainable_variables)

    operands = [tf.constant(x) for x in (*inputs, target)]
    compiled = tf.function(step, jit_compile=True)
    for first, second in zip(
        tf.nest.flatten(compiled(*operands)),
        tf.nest.flatten(tf.function(step)(*operands)),
        strict=True,
    ):
        assert np.any(second)
        assert_close(first, second, 1e-5)
    text = hlo(compiled, *operands)
    for name in ("DeformableConv2D", "DeformableROIAlign"):
        assert f'custom_call_target="TfDeform>{name}"' in text
        assert f'custom_call_target="TfDeform>{name}Grad"' in text


def test_keras_compiles_its_train_step():
    """Tests that `fit` runs the custom calls, without a silent fallback."""
    model = detector()
    model.compile("sgd", "mse", jit_compile=True)
    inputs, target = batch(0)
    model.train_on_batch(inputs, target)
    assert model.jit_compile is True
    text = hlo(
        tf.function(model.train_step, jit_compile=True),
        ([tf.constant(x) for x in inputs], tf.constant(target)),
    )
    assert 'custom_call_target="TfDeform>DeformableConv2DGrad"' in text
    assert 'custom_call_target="TfDeform>DeformableROIAlignGrad"' in text


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """Tests that losses are close but not equal: XLA rounds at other places."""
    keras.config.set_dtype_policy(policy)
    losses = []
    for jit_compile in (False, True):
        model = detector()
        model.compile("sgd", "mse", jit_compile=jit_compile)
        losses.append(float(model.train_on_batch(*batch(0))))
        assert model.jit_compile is jit_compile
    np.testing.assert_allclose(*losses, rtol=2e-2)
