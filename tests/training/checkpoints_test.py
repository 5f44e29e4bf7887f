# SPDX-License-Identifier: Apache-2.0
"""Tests the files of a training, and that it resumes to the bit."""

import json
import logging
import math
import pathlib
import warnings
import zipfile

import numpy as np
import pytest

from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)

import resuming  # noqa: E402

from tf_deform import training  # noqa: E402
from tf_deform.training import BestAndLast, EmaEvaluation  # noqa: E402

HERE = pathlib.Path(__file__).parent
FILES = ("best.keras", "last.keras")


def same(folder, other):
    for name in FILES:
        assert resuming.digest(folder / name) == resuming.digest(other / name)


KILL = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import resuming
whole, broken = map(pathlib.Path, sys.argv[2:4])
child = resuming.start(whole)
resuming.os.waitpid(child, 0)
print(json.dumps(resuming.kill_often(broken, int(sys.argv[4]), seed=3)))
"""


@pytest.mark.cpu_only(reason="TensorFlow is copied with its process")
def test_kills_at_random_moments(run_python_as_it_is, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    printed = run_python_as_it_is(KILL, HERE, whole, broken, 10)
    counts = json.loads(printed.splitlines()[-1])
    assert counts["killed"] >= 8
    assert counts["resumable"] >= 6
    assert counts["ended"] == 1
    state = resuming.digest(broken / "last.keras")["state"]
    assert state["step"] == resuming.EPOCHS * resuming.STEPS
    same(whole, broken)
    # No process has left anything else.
    assert sorted(path.name for path in broken.iterdir()) == [*FILES, "on"]


def test_a_stop_after_an_epoch(tmp_path):
    """Tests weights, optimizer, averages and seeds of a deformable model."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, ends in ((whole, [4]), (broken, [1, 3, 4])):
        folder.mkdir()
        for end in ends:
            model, ema, checkpoints = resuming.train(folder, end)
        assert checkpoints.epoch == 4
        assert checkpoints.step == 4 * resuming.STEPS
        assert int(model.optimizer.iterations) == checkpoints.step
    same(whole, broken)
    state = resuming.digest(whole / "last.keras")
    # The offsets of the deformable layer are in it, with their momentum, and
    # the averages and the state of the dropout's seed.
    assert any("offset_kernel" in name for name in state)
    assert any("optimizer" in name for name in state)
    assert "tf_deform/arrays.npz" in state
    assert [logs["epoch"] for logs in state["state"]["history"]] == [1, 2, 3, 4]


def test_seeds_of_random_layers_are_restored(tmp_path):
    """Tests what Keras leaves out of its own files."""
    model, _, _ = resuming.train(tmp_path, 1)
    (seed,) = (v for v in model.variables if "seed" in v.path)
    keras_own = tmp_path / "own.keras"
    model.save(keras_own)
    other = resuming.make_model()
    other.optimizer.build(other.trainable_variables)
    (found,) = (v for v in other.variables if "seed" in v.path)
    other.load_weights(keras_own)
    assert (found.numpy() != seed.numpy()).any()
    BestAndLast(tmp_path, "val_error", "min", EmaEvaluation()).restore(other)
    np.testing.assert_array_equal(found, seed)


def test_files_are_models(tmp_path):
    model, ema, checkpoints = resuming.train(tmp_path, 3)
    images = next(iter(resuming.batches(7)))[0]
    last = keras.saving.load_model(tmp_path / "last.keras")
    np.testing.assert_array_equal(last(images), model(images))
    assert int(last.optimizer.iterations) == 9
    np.testing.assert_allclose(
        last.optimizer.learning_rate, model.optimizer.learning_rate
    )
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert (
        checkpoints.best
        == resuming.digest(tmp_path / "best.keras")["state"]["best"]
    )
    # It is the model whose error was measured: that of averages.
    images, truth = next(iter(resuming.batches(10**6)))
    error = np.abs(best(images)[:, 0] - truth).mean()
    assert error == pytest.approx(checkpoints.best["val_error"], rel=1e-5)
    assert best.optimizer.offset_multiplier == 0.1


class Answer(keras.callbacks.Callback):
    """Adds given numbers to the logs."""

    def __init__(self, *answers):
        super().__init__()
        self._answers = answers

    def on_epoch_end(self, epoch, logs=None):
        if self._answers[epoch] is not None:
            logs["val_AP"] = self._answers[epoch]


def small_model(optimizer="sgd", inputs=1):
    model = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    return model


def fit(checkpoints, *answers, model=None):
    ones = np.ones((4, 1))
    (model or small_model()).fit(
        ones,
        ones,
        batch_size=2,
        epochs=len(answers),
        initial_epoch=checkpoints.epoch,
        callbacks=[Answer(*answers), checkpoints],
        verbose=0,
    )


@pytest.mark.parametrize(
    "mode, answers, epoch",
    [
        ("max", [0.1, 0.4, 0.4, 0.3], 3),
        ("min", [0.3, 0.1, 0.1, 0.4], 3),
        ("max", [-math.inf, -3, -2], 3),
        ("max", [math.nan, 0.0, math.nan], 2),
        ("max", [math.nan, math.nan], 2),
        ("min", [math.nan, 5.0, 6.0], 2),
        ("max", [None, 0.2, None, 0.1], 2),
        ("max", [np.float32(0.25), np.float64(0.5)], 2),
    ],
)
def test_the_best(mode, answers, epoch, tmp_path):
    checkpoints = BestAndLast(tmp_path, "val_AP", mode)
    fit(checkpoints, *answers)
    assert checkpoints.best["epoch"] == epoch
    assert checkpoints.best["step"] == 2 * epoch
    last = keras.saving.load_model(tmp_path / "last.keras")
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert int(best.optimizer.iterations) == 2 * epoch
    assert int(last.optimizer.iterations) == 2 * len(answers)


def test_the_best_is_remembered(tmp_path):
    fit(BestAndLast(tmp_path, "val_AP"), 0.1, 0.7)
    before = (tmp_path / "best.keras").read_bytes()
    checkpoints, model = BestAndLast(tmp_path, "val_AP"), small_model()
    assert checkpoints.restore(model) == 4
    assert checkpoints.best["val_AP"] == 0.7
    fit(checkpoints, 0, 0, 0.6, model=model)
    assert (tmp_path / "best.keras").read_bytes() == before
    assert [logs["val_AP"] for logs in checkpoints.history] == [0.1, 0.7, 0.6]


def test_no_monitor(tmp_path):
    checkpoints = BestAndLast(tmp_path, None)
    fit(checkpoints, 0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.keras"]
    assert BestAndLast(tmp_path, None).restore(small_model()) == 2


def test_a_monitor_that_never_comes(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "tf_deform"):
        fit(BestAndLast(tmp_path / "new" / "run", "val_mAP"), 0.1)
    assert "'val_mAP'" in caplog.text and "val_AP" in caplog.text
    assert [path.name for path in (tmp_path / "new/run").iterdir()] == [
        "last.keras"
    ]


def test_a_first_start(tmp_path):
    checkpoints = BestAndLast(tmp_path / "run", "val_AP")
    assert checkpoints.restore(small_model()) == 0
    assert (checkpoints.epoch, checkpoints.best) == (0, None)


def test_weights_that_are_not_finite(tmp_path):
    checkpoints = BestAndLast(tmp_path, "val_AP")
    model = small_model()
    fit(checkpoints, 0.1, model=model)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    model.layers[0].kernel.assign([[np.nan]])
    with pytest.raises(FloatingPointError, match="step 4.* in 2, such as .*k"):
        fit(checkpoints, 0.1, 0.2, model=model)
    assert before == {name: (tmp_path / name).read_bytes() for name in FILES}


def test_a_write_that_fails_leaves_the_files(tmp_path, monkeypatch):
    checkpoints, model = BestAndLast(tmp_path, "val_AP"), small_model()
    fit(checkpoints, 0.1, model=model)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def save(path):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save", save)
    with pytest.raises(OSError, match="No space"):
        fit(checkpoints, 0.1, 0.2, model=model)
    assert before == {name: (tmp_path / name).read_bytes() for name in FILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES]


@pytest.mark.parametrize(
    "model, text",
    [
        (lambda: small_model("adam"), "Skipping variable loading"),
        (lambda: small_model(inputs=2), "could not be loaded"),
        (lambda: resuming.make_model(False), "Received: "),
    ],
)
def test_another_model(model, text, tmp_path):
    fit(BestAndLast(tmp_path, "val_AP"), 0.1)
    with pytest.raises(ValueError, match="last.keras to hold the state") as e:
        BestAndLast(tmp_path, "val_AP").restore(model())
    assert text in str(e.value)


def test_averages_that_are_missing(tmp_path):
    fit(BestAndLast(tmp_path, "val_AP"), 0.1)
    checkpoints = BestAndLast(tmp_path, "val_AP", ema=EmaEvaluation())
    with pytest.raises(ValueError, match="0 averages .* has 2"):
        checkpoints.restore(small_model())


def test_a_model_that_is_not_ready(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    for _ in range(2):
        with pytest.raises(ValueError, match="built and compiled"):
            BestAndLast(tmp_path, None).restore(model)
        model.compile("sgd", loss="mse")


def test_files_of_others(tmp_path):
    model = small_model()
    model.save(tmp_path / "last.keras")
    with pytest.raises(ValueError, match="last.keras to be a file of BestAnd"):
        BestAndLast(tmp_path, None).restore(model)
    (tmp_path / "last.keras").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="last.keras to be a file of BestAnd"):
        BestAndLast(tmp_path, None).restore(model)


def test_the_best_by_another_log(tmp_path):
    fit(BestAndLast(tmp_path, "val_AP"), 0.1)
    with pytest.raises(ValueError, match="best.keras to be the best by 'val_l"):
        BestAndLast(tmp_path, "val_loss").restore(small_model())


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (("run", "x", "up"), ValueError, '"max" or "min". Received: .up'),
        (("run", 3), TypeError, "`monitor`"),
        ((5, "x"), TypeError, "`path`"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        BestAndLast(*arguments)


def test_extra_entries_hurt_no_reader(tmp_path):
    """Tests that Keras reads the files without a word."""
    resuming.train(tmp_path, 1)
    with zipfile.ZipFile(tmp_path / "last.keras") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert len(names) == len(set(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        keras.saving.load_model(tmp_path / "last.keras")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, tmp_path):
    """Tests the state of loss scaling."""
    keras.mixed_precision.set_global_policy(policy)
    weights = {}
    for name, ends in (("whole", [2]), ("broken", [1, 2])):
        for end in ends:
            keras.utils.set_random_seed(3)
            model = small_model(
                training.deformable_optimizer(keras.optimizers.Adam(0.01))
            )
            checkpoints = BestAndLast(tmp_path / name, None)
            checkpoints.restore(model)
            fit(checkpoints, *[None] * end, model=model)
        weights[name] = [v.numpy() for v in model.optimizer.variables]
        weights[name] += model.get_weights()
    for one, other in zip(weights["whole"], weights["broken"]):
        np.testing.assert_array_equal(one, other)
