# SPDX-License-Identifier: Apache-2.0
"""Tests the learning rate of offsets, with the optimizers of either Keras.

`tests/addons` tests it with those of tensorflow_addons.
"""

import json
import math

import numpy as np
import pytest
import tensorflow as tf
from side_by_side import (
    MULTIPLIER,
    OFFSETS,
    RATE,
    difference,
    run,
    scaled,
    weights,
)

import tf_deform
from tf_deform._keras import KERAS_2, keras
from tf_deform.training import deformable_optimizer
from tf_deform.training._optimizer import is_offset

optimizers = keras.optimizers
legacy = getattr(optimizers, "legacy", None)
LEGACY = pytest.mark.skipif(
    not KERAS_2, reason="Keras 3 has no legacy optimizers"
)
KINDS = [
    name
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl",
        "Lamb", "Lion", "Muon", "Nadam", "RMSprop", "SGD",
    )
    if hasattr(optimizers, name)
]  # fmt: skip
LEGACY_KINDS = (
    "Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "RMSprop", "SGD",
)  # fmt: skip


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_two_optimizers(kind, graph):
    bound = 0
    if KERAS_2 and graph and kind == "Nadam":
        pytest.skip(
            "Keras 2's Nadam counts variables while it is traced, so two of "
            "them differ from one"
        )
    if KERAS_2 and graph and kind == "RMSprop":
        bound = 1e-7  # TensorFlow multiplies in another order.
    if kind == "Muon" and _muon_fails():
        pytest.skip("this Keras' own Muon fails on TensorFlow")
    result = difference(
        lambda rate: getattr(optimizers, kind)(rate, weight_decay=0.01),
        graph=graph,
    )
    assert result <= bound


def _muon_fails() -> bool:
    weight = keras.Variable(tf.ones((2, 3)))
    try:
        optimizers.Muon().apply([tf.ones((2, 3))], [weight])
    except AttributeError:
        return True
    return False


@LEGACY
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", LEGACY_KINDS)
def test_steps_are_those_of_two_legacy_optimizers(kind, graph):
    make = getattr(legacy, kind) if KERAS_2 else None
    assert difference(make, graph=graph) == 0


@LEGACY
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_sparse_gradients(graph):
    """Tests the legacy optimizers' other method, for both kinds of weights."""

    def sparse(gradients):
        return [tf.IndexedSlices(g[:2], [0, 2], [3, 4]) for g in gradients]

    class Sparse(legacy.Adam if KERAS_2 else object):
        def apply_gradients(self, grads_and_vars, **kwargs):
            gradients, variables = zip(*grads_and_vars)
            return super().apply_gradients(
                zip(sparse(gradients), variables), **kwargs
            )

    assert difference(Sparse, graph=graph) == 0


def settings() -> dict:
    """Returns makers of optimizers with settings, by name."""
    ema = {"use_ema": True, "ema_overwrite_frequency": 2}
    made = {
        "no rate for offsets": lambda rate: optimizers.Adam(rate),
        "ema": lambda rate: optimizers.Adam(rate, **ema),
        "clipnorm": lambda rate: optimizers.SGD(rate, clipnorm=0.5),
        "clipvalue": lambda rate: optimizers.Adam(rate, clipvalue=0.5),
        "amsgrad": lambda rate: optimizers.Adam(rate, amsgrad=True),
        "momentum": lambda rate: optimizers.SGD(rate, 0.9, nesterov=True),
    }
    if not KERAS_2:
        made["accumulation"] = lambda rate: optimizers.AdamW(
            rate, gradient_accumulation_steps=2
        )
    return made


@pytest.mark.parametrize("name", settings())
def test_settings_stay(name):
    assert difference(settings()[name], graph=True) == 0


def test_global_clipping_sees_all_variables():
    def clipped(gradients):
        return np.array(tf.clip_by_global_norm(list(gradients), 0.5)[0])

    def make(rate):
        # The two optimizers get gradients that have been clipped together.
        norm = 0.5 if math.isclose(rate, RATE) and not made else None
        made.append(rate)
        return optimizers.SGD(rate, global_clipnorm=norm)

    made = []
    assert difference(make, graph=True, change=clipped) == 0


def test_weight_decay_leaves_out_what_it_is_told_to():
    def make(rate):
        optimizer = optimizers.AdamW(rate, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["offset_b", "/bias"])
        return optimizer

    assert difference(make, graph=True) == 0


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Lion", "SGD"])
def test_weight_decay_that_offsets_do_not_have(kind, graph):
    def make(rate):
        decay = 0.1 if math.isclose(rate, RATE) else 0.0
        return getattr(optimizers, kind)(rate, weight_decay=decay)

    assert difference(make, graph=graph, decay_offsets=False) == 0
    assert difference(make, graph=graph) > 0


@pytest.mark.skipif(KERAS_2, reason="Keras 2 compiles its optimizers itself")
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_compiled_graphs(kind):
    """Tests steps that XLA compiles, as it does in `fit`."""
    make = getattr(optimizers, kind)
    decay = {"weight_decay": 0.1}
    result = difference(lambda rate: make(rate, **decay), graph=True, jit=True)
    assert result == 0


@LEGACY
def test_xla():
    def make(rate):
        optimizer = optimizers.AdamW(rate)
        optimizer.jit_compile = True  # Keras sets it where there is a GPU.
        return optimizer

    assert difference(make, graph=True) == 0


class Halved(optimizers.schedules.LearningRateSchedule):
    """Halves a rate after each step, so that rounding stays the same."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * 0.5 ** tf.cast(step, tf.float32)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("where", ["new", pytest.param("legacy", marks=LEGACY)])
def test_schedules(where, graph):
    kind = legacy.Adam if where == "legacy" else optimizers.Adam
    assert difference(lambda rate: kind(Halved(rate)), graph=graph) == 0


@LEGACY
def test_rates_that_decay_or_are_called():
    make = legacy.SGD if KERAS_2 else None
    for graph in (False, True):
        assert difference(lambda rate: make(rate, decay=0.5), graph=graph) == 0
        assert difference(lambda rate: make(lambda: rate), graph=graph) == 0


@pytest.mark.parametrize("where", ["new", pytest.param("legacy", marks=LEGACY)])
def test_a_rate_that_is_set(where):
    """Tests what callbacks do: they read and set `learning_rate`."""
    kind = legacy.Adam if where == "legacy" else optimizers.Adam

    def between(optimizer, step, of_offsets):
        rate = 0.02 * (step + 1)
        optimizer.learning_rate = scaled(rate) if of_offsets else rate
        got = float(optimizer.learning_rate.numpy())
        assert got == np.float32(scaled(rate) if of_offsets else rate)

    assert difference(kind, graph=True, between=between) == 0


def model_of(
    optimizer=None, *, seed: int = 0, modulation="2sigmoid", **options
) -> keras.Model:
    """Makes a model with a convolution and a pooling that have branches."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            tf_deform.layers.DeformableConv2D(
                3, 3, modulation=modulation, name="deformed"
            ),
            keras.layers.Conv2D(2, 1, name="plain"),
        ]
    )
    if optimizer is not None:
        model.compile(
            optimizer, loss=keras.losses.MeanSquaredError(), **options
        )
    return model


def data(batches: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4 * batches, 6, 6, 2)).astype(np.float32)
    y = rng.normal(size=(4 * batches, 4, 4, 2)).astype(np.float32)
    return x, y


def fit(model: keras.Model, epochs: int = 1, **options) -> None:
    model.fit(
        *data(), batch_size=4, epochs=epochs, shuffle=False, verbose=0,
        **options,
    )  # fmt: skip


def moves(optimizer, **options) -> list[np.ndarray]:
    """Returns how far one step moves every weight."""
    model = model_of(optimizer, **options)
    before = model.get_weights()
    fit(model)
    return [new - old for new, old in zip(model.get_weights(), before)]


def test_the_layers_variables():
    model = model_of()
    roi = tf_deform.layers.DeformableROIAlign(2, 1.0, units=(4,))
    trans = tf_deform.layers.DeformableROIPooling(2, 1.0, units=(4,))
    features, rois = np.zeros((1, 8, 8, 2), np.float32), [[0, 0, 0, 4, 4]]
    for layer in (roi, trans):
        layer(features, np.float32(rois))
    for layer in (*model.layers, roi, trans):
        for weight in layer.weights:
            path = getattr(weight, "path", weight.name)
            assert is_offset(weight) == ("offset_" in path), path
    assert sum(map(is_offset, model.weights)) == 2
    assert sum(map(is_offset, roi.weights)) == 4
    assert sum(map(is_offset, trans.weights)) == len(trans.weights) > 0


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("jit", [False, True], ids=["", "xla"])
def test_models_are_trained(policy, jit):
    """Tests `fit`: offsets start at 0, and move by a power of two less."""
    if jit and not tf_deform._loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    options = {"jit_compile": jit}
    kind = optimizers.Adam
    keras.mixed_precision.set_global_policy(policy)
    plain = moves(kind(0.01), **options)
    slow = moves(deformable_optimizer(kind(0.01), 0.125), **options)
    of_offsets = [is_offset(v) for v in model_of().weights]
    assert sum(of_offsets) == 2
    for old, new, scale in zip(plain, slow, of_offsets):
        assert np.any(old)
        np.testing.assert_array_equal(new, old * 0.125 if scale else old)


def test_callbacks_set_the_rate():
    optimizer = deformable_optimizer(optimizers.SGD(0.1), MULTIPLIER)
    model = model_of(optimizer)
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.25)
    fit(model, callbacks=[scheduler])
    assert float(optimizer.learning_rate.numpy()) == 0.25
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.5, patience=1, min_delta=1e9
    )
    fit(model, epochs=3, callbacks=[plateau])
    assert float(optimizer.learning_rate.numpy()) <= 0.125


def test_an_optimizer_around():
    """Tests loss scaling: the optimizer within is changed."""
    inner = optimizers.SGD(0.01)
    outer = keras.mixed_precision.LossScaleOptimizer(inner)
    assert deformable_optimizer(outer, 0.125) is outer
    assert inner.offset_multiplier == 0.125
    plain = moves(optimizers.SGD(0.01))
    for old, new, scale in zip(
        plain,
        moves(outer),
        [is_offset(v) for v in model_of().weights],
    ):
        np.testing.assert_allclose(
            new, old * 0.125 if scale else old, rtol=1e-4
        )


FORMATS = ["model.keras", "model.h5"] + ["folder"] * KERAS_2
# The files in which Keras keeps the state of an optimizer, whichever it is.
KEEPS_STATE = {
    ("adam", "model.keras"),
    ("schedule", "model.keras"),
    ("scaled loss", "model.keras"),
}
MAKERS = {
    "adam": lambda: optimizers.Adam(0.01),
    "schedule": lambda: optimizers.AdamW(
        optimizers.schedules.ExponentialDecay(0.01, 1, 0.5)
    ),
    "scaled loss": lambda: keras.mixed_precision.LossScaleOptimizer(
        optimizers.Adam(0.01)
    ),
}
if KERAS_2:
    KEEPS_STATE |= {
        ("adam", "model.h5"),
        ("schedule", "model.h5"),
        ("legacy", "model.h5"),
        ("legacy scaled loss", "model.h5"),
    }
    MAKERS["legacy"] = lambda: legacy.Adam(0.01)
    MAKERS["legacy scaled loss"] = lambda: (
        keras.mixed_precision.LossScaleOptimizer(legacy.SGD(0.01, 0.9))
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_loaded_model_trains_on(tmp_path, kind, name):
    """Tests that a file holds kind, rate, multiplier and state."""
    model = model_of(deformable_optimizer(MAKERS[kind](), MULTIPLIER))
    fit(model, epochs=2)
    model.save(tmp_path / name)
    loaded = keras.models.load_model(tmp_path / name)
    assert isinstance(loaded.optimizer, type(model.optimizer).__mro__[1])
    inner = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
    assert inner.offset_multiplier == MULTIPLIER
    assert (
        inner.get_config()
        == getattr(
            model.optimizer, "inner_optimizer", model.optimizer
        ).get_config()
    )
    # By their names exclusions and groups find variables.
    assert [v.name for v in loaded.weights] == [v.name for v in model.weights]
    if (kind, name) not in KEEPS_STATE:
        return
    fit(model, epochs=2)
    fit(loaded, epochs=2)
    for expected, got in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(got, expected)


def test_a_new_process_loads_the_model(tmp_path, run_python):
    """Tests that `import tf_deform` alone makes the file readable."""
    model = model_of(deformable_optimizer(optimizers.Adam(0.01), 0.5))
    fit(model)
    model.save(tmp_path / "model.keras")
    script = """
import sys
import tf_deform
from tf_deform._keras import keras
optimizer = keras.models.load_model(sys.argv[1]).optimizer
print(isinstance(optimizer, keras.optimizers.Adam), optimizer.offset_multiplier)
"""
    output = run_python(script, tmp_path / "model.keras")
    assert output.split() == ["True", "0.5"]


def test_checkpoints_are_those_of_the_plain_optimizer(tmp_path):
    """Tests that a training can go on with or without the multiplier."""
    plain, slow = optimizers.Adam(0.01), optimizers.Adam(0.01)
    deformable_optimizer(slow)
    variables = [weights(), weights()]
    for optimizer, own in zip((plain, slow), variables):
        run(optimizer, own, OFFSETS | True, graph=False, steps=2)
    path = tf.train.Checkpoint(optimizer=plain).write(str(tmp_path / "saved"))
    read = tf.train.Checkpoint(optimizer=slow).read(path)
    read.assert_consumed()
    for old, new in zip(plain.variables, slow.variables):
        np.testing.assert_array_equal(new.numpy(), old.numpy())


def test_config():
    optimizer = deformable_optimizer(optimizers.Adam(0.25, 0.5), 0.75)
    config = json.loads(
        json.dumps(optimizers.serialize(optimizer), default=float)
    )
    for copy in (
        optimizers.deserialize(config),
        type(optimizer).from_config(optimizer.get_config()),
    ):
        assert isinstance(copy, optimizers.Adam)
        assert copy.offset_multiplier == 0.75
        assert float(copy.learning_rate.numpy()) == 0.25
        assert copy.beta_1 == 0.5


def test_the_multiplier_can_be_given_again():
    optimizer = optimizers.Adam()
    assert deformable_optimizer(optimizer) is optimizer
    kind = type(optimizer)
    assert optimizer.offset_multiplier == 0.1
    deformable_optimizer(optimizer, 2)
    assert type(optimizer) is kind
    assert optimizer.offset_multiplier == 2.0
    assert type(optimizers.Adam()) is optimizers.Adam


def test_zero_freezes_offsets():
    moved = moves(deformable_optimizer(optimizers.Adam(), 0))
    of_offsets = [is_offset(v) for v in model_of().weights]
    assert [not np.any(move) for move in moved] == of_offsets


MIRRORED = """
import sys
import numpy as np
import tensorflow as tf
from tf_deform._keras import keras
from tf_deform.training import deformable_optimizer
from side_by_side import Weights

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
def train(strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        layer = Weights()
        layer(np.zeros((2, 2), np.float32))
        optimizer = deformable_optimizer(
            keras.optimizers.AdamW(0.01, weight_decay=0.1), 0.125
        )
        optimizer.build(layer.weights)
    replicas = strategy.num_replicas_in_sync
    @tf.function
    def step():
        def replica():
            optimizer.apply_gradients(
                [(tf.ones((3, 4)) / replicas, v) for v in layer.weights]
            )
        strategy.run(replica)
    for _ in range(3):
        step()
    return np.array([v.numpy() for v in layer.weights])
one = train(tf.distribute.get_strategy())
two = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
print(np.abs(one - two).max(), "difference")
"""


def test_several_devices(run_python):
    lib = str(pytest.importorskip("side_by_side").__file__).rpartition("/")[0]
    output = run_python(f"import sys; sys.path.append({lib!r})\n" + MIRRORED)
    assert float(output.split()[-2]) == 0


@pytest.mark.parametrize(
    "multiplier, error, text",
    [
        ("0.1", TypeError, "to be a number. Received: '0.1'"),
        (None, TypeError, "to be a number. Received: None"),
        (True, TypeError, "to be a number. Received: True"),
        (-1, ValueError, "at least 0. Received: -1"),
        (float("nan"), ValueError, "at least 0. Received: nan"),
        (float("inf"), ValueError, "at least 0. Received: inf"),
    ],
)
def test_bad_multipliers(multiplier, error, text):
    optimizer = optimizers.SGD()
    with pytest.raises(error, match=text):
        deformable_optimizer(optimizer, multiplier)
    assert type(optimizer) is optimizers.SGD


def test_decay_of_offsets_is_kept_in_files(tmp_path):
    make = lambda: optimizers.AdamW(0.01, weight_decay=0.1)  # noqa: E731
    model = model_of(deformable_optimizer(make(), MULTIPLIER, False))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.decay_offsets is False
    fit(model)
    fit(loaded)
    for expected, got in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(got, expected)
    config = deformable_optimizer(make()).get_config()
    assert "decay_offsets" not in config  # as in files of older releases
    assert deformable_optimizer(make()).from_config(config).decay_offsets


def test_bad_decay_of_offsets():
    with pytest.raises(
        TypeError, match="Expected `decay_offsets` to be .*None"
    ):
        deformable_optimizer(optimizers.Adam(), decay_offsets=None)


@pytest.mark.parametrize("given", ["adam", None, optimizers.Adam])
def test_bad_optimizers(given):
    with pytest.raises(TypeError, match="Expected `optimizer` to be an opt"):
        deformable_optimizer(given)


def test_an_optimizer_that_has_state():
    optimizer = optimizers.Adam()
    run(optimizer, weights(), OFFSETS | True, graph=False, steps=1)
    with pytest.raises(ValueError, match="before its first step. Received: "):
        deformable_optimizer(optimizer)


@pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="this Keras has none"
)
def test_keras_own_multi_optimizer():
    groups = optimizers.OptimizerMap(optimizers.Adam())
    with pytest.raises(ValueError, match="to have a learning rate, of which"):
        deformable_optimizer(optimizers.MultiOptimizer(groups))
