# SPDX-License-Identifier: Apache-2.0
"""Tests averages of weights, and that training does not notice them."""

import numpy as np
import pytest

from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)

import resuming  # noqa: E402

from tf_deform.training import EmaEvaluation  # noqa: E402


class Record(keras.callbacks.Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self.model.get_weights())


def fit(model, *callbacks, steps=7, **options):
    model.fit(
        resuming.batches(0),
        epochs=1,
        steps_per_epoch=steps,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
        **options,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999])
def test_the_equation(momentum):
    model, ema, record = (
        resuming.make_model(),
        EmaEvaluation(momentum),
        Record(),
    )
    average = [np.float64(w) for w in model.get_weights()]
    fit(model, ema, record)
    for n, weights in enumerate(record.steps, start=1):
        m = min(momentum, (1 + n) / (10 + n))
        average = [a + (1 - m) * (w - a) for a, w in zip(average, weights)]
    with ema.averages():
        found = model.get_weights()
    assert len(found) == len(average)
    for one, other in zip(found, average):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # Those of batch normalization, its moving mean and variance, are among
    # them.
    assert len(ema.variables) == len(model.weights)


def test_training_goes_on_to_the_bit():
    plain, averaged, ema = resuming.make_model(), resuming.make_model(), None
    ema = EmaEvaluation(0.9)

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with ema.averages(), ema.averages():
                pass

    fit(plain)
    fit(
        averaged,
        ema,
        Evaluate(),
        validation_data=resuming.batches(50),
        validation_steps=2,
    )
    for one, other in zip(plain.variables, averaged.variables):
        if "seed" not in one.path:  # Evaluation draws numbers as well.
            np.testing.assert_array_equal(one, other)


def test_fit_evaluates_averages():
    model, ema = resuming.make_model(), EmaEvaluation(0.9)
    history = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            history.append(logs["val_loss"])

    validation = resuming.batches(50)
    fit(model, ema, Keep(), validation_data=validation, validation_steps=2)
    live = model.evaluate(validation, steps=2, verbose=0)
    with ema.averages():
        average = model.evaluate(validation, steps=2, verbose=0)
    assert history == [pytest.approx(average, rel=1e-6)]
    assert abs(live - average) > 1e-3 * average


def test_weights_come_back_after_an_error():
    model, ema = resuming.make_model(), EmaEvaluation(0.9)
    fit(model, ema)
    before = model.get_weights()
    with pytest.raises(KeyboardInterrupt), ema.averages():
        raise KeyboardInterrupt
    for one, other in zip(before, model.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_change_stays_as_it_is():
    model, ema = resuming.make_model(), EmaEvaluation(0.9)
    model.layers[0].trainable = False
    model.layers[1].trainable = False
    model.compile("sgd", loss="mse")
    frozen = model.layers[0].get_weights()
    fit(model, ema)
    assert len(ema.variables) == 2
    for one, other in zip(frozen, model.layers[0].get_weights()):
        np.testing.assert_array_equal(one, other)


def test_several_steps_at_once():
    """Tests that an average reaches back as many steps."""
    found = []
    for count in (1, 4):
        model, ema = resuming.make_model(), EmaEvaluation(0.5)
        model.compile("sgd", loss="mse", steps_per_execution=count)
        model.optimizer.learning_rate = 0.0
        model.optimizer.build(model.trainable_variables)
        model.optimizer.iterations.assign(100)  # past the first steps
        ema.build(model)
        ema.variables[0].assign_add(np.ones(ema.variables[0].shape))
        fit(model, ema, steps=8)
        found.append(ema.variables[0].numpy())
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize(
    "momentum, error",
    [
        (1.0, ValueError),
        (-0.1, ValueError),
        ("a", TypeError),
        (True, TypeError),
    ],
)
def test_wrong_momentum(momentum, error):
    with pytest.raises(error, match="momentum"):
        EmaEvaluation(momentum)
