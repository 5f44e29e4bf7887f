# SPDX-License-Identifier: Apache-2.0
"""Tests the learning rate of each step."""

import numpy as np
import pytest
import tensorflow as tf

from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)

from tf_deform.training import WarmUpSteps, deformable_optimizer  # noqa: E402

STEPS = 700  # in an epoch


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.02 * 0.001),
        (1, 0.02 * (0.001 + 0.999 / 500)),
        (250, 0.02 * 0.5005),
        (499, 0.02 * (0.001 + 0.999 * 499 / 500)),
        (500, 0.02),
        (8 * STEPS - 1, 0.02),
        (8 * STEPS, 0.002),
        (11 * STEPS - 1, 0.002),
        (11 * STEPS, 0.0002),
        (2**31, 0.0002),
    ],
)
def test_the_recipe_of_mmdetection(step, rate):
    schedule = WarmUpSteps(0.02, (8 * STEPS, 11 * STEPS))
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)
    inside = tf.function(schedule)(tf.constant(step, tf.int64))
    assert float(inside) == pytest.approx(rate, rel=1e-6)


def test_a_drop_within_the_warm_up():
    schedule = WarmUpSteps(1.0, [5], 0.5, warm_up_steps=10, warm_up_factor=0)
    found = [float(schedule(step)) for step in (0, 4, 5, 10)]
    np.testing.assert_allclose(found, [0, 0.4, 0.25, 0.5], rtol=1e-6)


def test_neither_drops_nor_warm_up():
    schedule = WarmUpSteps(0.3, warm_up_steps=0)
    assert [float(schedule(step)) for step in (0, 9)] == pytest.approx(
        [0.3] * 2
    )


def test_steps_beyond_float32():
    schedule = WarmUpSteps(1.0, [2**24 + 1], warm_up_steps=0)
    assert float(schedule(2**24)) == 1
    assert float(schedule(2**24 + 1)) == pytest.approx(0.1)


def test_it_is_saved_with_a_model(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    rate = WarmUpSteps(0.5, (3, 7), 0.3, 2, 0.2)
    model.compile(
        deformable_optimizer(keras.optimizers.SGD(rate, momentum=0.9)),
        loss="mse",
    )
    model.fit(np.ones((4, 2)), np.ones(4), verbose=0)
    model.save(tmp_path / "m.keras")
    found = keras.saving.load_model(tmp_path / "m.keras").optimizer
    assert found._learning_rate.get_config() == rate.get_config()
    assert float(found.learning_rate) == float(rate(1))


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"learning_rate": -1}, ValueError, "learning_rate"),
        ({"learning_rate": "a"}, TypeError, "learning_rate"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
        ({"drops": (5, 5)}, ValueError, "`drops` to rise"),
        ({"drops": (5, 2)}, ValueError, "`drops` to rise"),
        ({"drops": (0.5,)}, TypeError, "whole steps"),
        ({"warm_up_steps": -1}, ValueError, "warm_up_steps"),
        ({"factor": True}, TypeError, "factor"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        WarmUpSteps(**{"learning_rate": 0.1, **arguments})
