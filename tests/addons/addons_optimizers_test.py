# SPDX-License-Identifier: Apache-2.0
"""Tests the learning rate of offsets with tensorflow_addons' optimizers."""

import math

import numpy as np
import pytest
import tensorflow as tf
from optimizer_test import fit, model_of, moves
from side_by_side import MULTIPLIER, RATE, difference

from tf_deform._keras import keras
from tf_deform.training import deformable_optimizer
from tf_deform.training._optimizer import is_offset

tfa = pytest.importorskip(
    "tensorflow_addons",
    reason="tensorflow_addons runs with TensorFlow 2.15 alone",
    exc_type=ImportError,
)

new, legacy = keras.optimizers, keras.optimizers.legacy


def cosine(rate: float):
    return new.schedules.ExponentialDecay(rate, 1, 0.5)


MAKERS = {
    "AdaBelief": lambda rate: tfa.optimizers.AdaBelief(rate),
    "AdamW": lambda rate: tfa.optimizers.AdamW(0.01, rate),
    "AdamW, scheduled": lambda rate: tfa.optimizers.AdamW(
        cosine(0.1), learning_rate=cosine(rate)
    ),
    "AdamW, excluding": lambda rate: tfa.optimizers.AdamW(
        0.1, rate, exclude_from_weight_decay=["offset_b", "/bias"]
    ),
    "LAMB": lambda rate: tfa.optimizers.LAMB(rate, weight_decay=0.01),
    "LazyAdam": lambda rate: tfa.optimizers.LazyAdam(rate),
    "Lookahead": lambda rate: tfa.optimizers.Lookahead(legacy.Adam(rate), 2),
    "Lookahead of RectifiedAdam": lambda rate: tfa.optimizers.Lookahead(
        tfa.optimizers.RectifiedAdam(rate), 3
    ),
    "MovingAverage": lambda rate: tfa.optimizers.MovingAverage(
        tfa.optimizers.LAMB(rate)
    ),
    "NovoGrad": lambda rate: tfa.optimizers.NovoGrad(rate, weight_decay=0.01),
    "ProximalAdagrad": lambda rate: tfa.optimizers.ProximalAdagrad(rate),
    "RectifiedAdam": lambda rate: tfa.optimizers.RectifiedAdam(
        rate, weight_decay=0.01, total_steps=9, warmup_proportion=0.2
    ),
    "SGDW": lambda rate: tfa.optimizers.SGDW(0.01, rate, momentum=0.9),
    "SWA": lambda rate: tfa.optimizers.SWA(legacy.Adam(rate), 0, 2),
    "Yogi": lambda rate: tfa.optimizers.Yogi(rate),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_those_of_two_optimizers(name, graph):
    assert difference(MAKERS[name], graph=graph) == 0


@pytest.mark.parametrize("name", ["ConditionalGradient", "COCOB"])
def test_optimizers_whose_steps_are_no_multiples_of_a_rate(name):
    arguments = {"ConditionalGradient": (0.9, 0.1), "COCOB": ()}[name]
    optimizer = getattr(tfa.optimizers, name)(*arguments)
    with pytest.raises(ValueError, match="to have a learning rate, of which"):
        deformable_optimizer(optimizer)


def inner(optimizer):
    return getattr(optimizer, "_optimizer", optimizer)


@pytest.mark.parametrize("name", ["AdamW, scheduled", "LAMB", "SWA"])
@pytest.mark.parametrize("file", ["model.keras", "model.h5", "folder"])
def test_a_loaded_model_trains_on(tmp_path, name, file):
    model = model_of(deformable_optimizer(MAKERS[name](0.01), MULTIPLIER))
    fit(model, epochs=2)
    model.save(tmp_path / file)
    loaded = keras.models.load_model(tmp_path / file)
    assert inner(loaded.optimizer).offset_multiplier == MULTIPLIER
    assert (
        inner(loaded.optimizer).get_config()
        == inner(model.optimizer).get_config()
    )
    fit(model)
    fit(loaded)
    if file == "model.h5":  # the one in which Keras keeps their state
        for old, other in zip(model.get_weights(), loaded.get_weights()):
            np.testing.assert_array_equal(other, old)


DECAYING = {
    "AdaBelief": lambda rate, decay: tfa.optimizers.AdaBelief(
        rate, weight_decay=decay
    ),
    "AdamW": lambda rate, decay: tfa.optimizers.AdamW(decay, rate),
    "AdamW, scheduled": lambda rate, decay: tfa.optimizers.AdamW(
        cosine(decay), learning_rate=cosine(rate)
    ),
    "LAMB": lambda rate, decay: tfa.optimizers.LAMB(rate, weight_decay=decay),
    "NovoGrad": lambda rate, decay: tfa.optimizers.NovoGrad(
        rate, weight_decay=decay
    ),
    "RectifiedAdam": lambda rate, decay: tfa.optimizers.RectifiedAdam(
        rate, weight_decay=decay
    ),
    "SGDW": lambda rate, decay: tfa.optimizers.SGDW(decay, rate),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_that_offsets_do_not_have(name, graph):
    def make(rate):
        decay = 0.1 if math.isclose(rate, RATE) else 0.0
        return DECAYING[name](rate, decay)

    assert difference(make, graph=graph, decay_offsets=False) == 0
    assert difference(make, graph=graph) > 0


@pytest.mark.parametrize("name", ["LAMB", "SWA"])
def test_checkpoints_hold_the_state(tmp_path, name):
    def make(rate):
        optimizer = deformable_optimizer(MAKERS[name](rate), MULTIPLIER)
        model = model_of(optimizer)
        fit(model)
        return tf.train.Checkpoint(model=model, optimizer=optimizer)

    saved, other = make(0.01), make(0.02)
    other.read(saved.write(str(tmp_path / "saved"))).assert_consumed()
    fit(saved.model)
    fit(other.model)
    for old, new in zip(saved.model.get_weights(), other.model.get_weights()):
        np.testing.assert_array_equal(new, old)


def test_loading_imports_the_addons(tmp_path, run_python):
    model = model_of(deformable_optimizer(tfa.optimizers.LAMB(0.25), 0.5))
    fit(model)
    model.save(tmp_path / "model.h5")
    script = """
import sys
import tf_deform
from tf_deform._keras import keras
assert "tensorflow_addons" not in sys.modules
optimizer = keras.models.load_model(sys.argv[1]).optimizer
print(optimizer.offset_multiplier, type(optimizer).__mro__[3].__name__)
"""
    output = run_python(script, tmp_path / "model.h5")
    assert output.split()[-2:] == ["0.5", "LAMB"]


class Head(keras.layers.Layer):
    """Builds its layers itself, so that their variables share two names."""

    def __init__(self, calls: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.calls = calls
        self.parts = [keras.layers.Dense(2) for _ in range(4)]

    def build(self, shape):
        for part in () if self.calls else self.parts:
            part.build(shape)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def head_model(calls: bool = False) -> keras.Model:
    return keras.Sequential([keras.Input((2,)), Head(calls, name="head")])


def fit_head(model: keras.Model, optimizer) -> None:
    x = np.ones((4, 2), np.float32)
    model.compile(optimizer, loss="mse")
    model.fit(x, x, verbose=0)


def multi(*groups):
    return deformable_optimizer(
        tfa.optimizers.MultiOptimizer(list(groups)), 0.125
    )


def test_names_that_occur_twice_are_refused():
    model = head_model()
    names = [variable.name for variable in model.trainable_variables]
    assert set(names) == {"head/kernel:0", "head/bias:0"}
    optimizer = multi((legacy.SGD(0.1), model.layers))
    with pytest.raises(ValueError, match="'head/bias:0', 'head/kernel:0' more"):
        fit_head(model, optimizer)
    # What is refused: four steps at a time.
    model.build((None, 2))
    before = model.get_weights()
    plain = tfa.optimizers.MultiOptimizer([(legacy.SGD(1.0), model.layers)])
    plain.apply_gradients(
        [(tf.ones_like(v), v) for v in model.trainable_variables]
    )
    np.testing.assert_allclose(before[0] - model.get_weights()[0], 4, rtol=1e-6)
    # As the text says, layers that are called have names of their own.
    model = head_model(calls=True)
    fit_head(model, multi((legacy.SGD(0.1), model.layers)))


def test_a_layer_in_two_groups_is_refused():
    model = model_of()
    optimizer = multi(
        (legacy.SGD(0.1), model.layers), (legacy.SGD(0.1), model.layers[1])
    )
    model.compile(optimizer, loss="mse")
    with pytest.raises(ValueError, match="Received: 'plain/bias:0', 'plain/k"):
        fit(model)


def test_weights_in_no_group_are_refused():
    model = model_of()
    model.compile(multi((legacy.SGD(0.1), model.layers[0])), loss="mse")
    with pytest.raises(
        ValueError, match="'plain/bias:0', 'plain/kernel:0' in no group"
    ):
        fit(model)


def test_layers_that_were_not_built_are_refused():
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
    optimizer = multi(
        (legacy.SGD(0.1), model.layers[:1]), (legacy.SGD(0.2), model.layers[1:])
    )
    with pytest.raises(
        ValueError, match="in no group. Build all layers before"
    ):
        fit_head(model, optimizer)


def test_groups_step_offsets_at_their_rates():
    def optimizer():
        model = model_of()  # Its names are those of the model below.
        return tfa.optimizers.MultiOptimizer(
            [
                (new.Adam(0.01), model.layers[0]),
                (legacy.Adam(0.02), model.layers[1:]),
            ]
        )

    plain = moves(optimizer())
    slow = moves(deformable_optimizer(optimizer(), 0.125))
    for old, other, variable in zip(plain, slow, model_of().weights):
        expected = old * 0.125 if is_offset(variable) else old
        np.testing.assert_array_equal(other, expected)


def test_a_saved_multi_optimizer_still_checks(tmp_path):
    model = model_of()
    optimizer = multi(
        (legacy.SGD(0.1), model.layers[0]), (legacy.SGD(0.2), model.layers[1:])
    )
    model.compile(optimizer, loss="mse")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    fit(loaded)
    specs = loaded.optimizer.optimizer_specs
    assert [spec["optimizer"].offset_multiplier for spec in specs] == [
        0.125
    ] * 2
    specs[1]["weights"] = []
    loaded.train_function = None
    with pytest.raises(ValueError, match="in no group"):
        fit(loaded)
