# SPDX-License-Identifier: Apache-2.0
"""Tests what a training writes of its numbers, and what Keras 2 is told."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf

from tf_deform import training
from tf_deform._keras import KERAS_2, keras

needs_keras_3 = pytest.mark.skipif(KERAS_2, reason="of Keras 3")


@needs_keras_3
def test_a_file_of_numbers(tmp_path):
    path = tmp_path / "metrics.json"
    for text in ("first", "second ä"):
        training.write_metrics(
            path,
            {
                "AP": np.float32(0.5),
                "AP/x": math.nan,
                "most": np.int64(100),
                "history": [{"a": np.array([1.5, np.inf])}, (True, None)],
                "text": text,
                3: np.bool_(False),
            },
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert found == {
        "AP": 0.5,
        "AP/x": None,
        "most": 100,
        "history": [{"a": [1.5, None]}, [True, None]],
        "text": "second ä",
        "3": False,
    }


@needs_keras_3
def test_what_is_not_json_leaves_the_file(tmp_path):
    path = tmp_path / "metrics.json"
    training.write_metrics(path, {"AP": 1})
    with pytest.raises(TypeError, match="object"):
        training.write_metrics(path, {"AP": object()})
    assert json.loads(path.read_text()) == {"AP": 1}


@needs_keras_3
@pytest.mark.parametrize("kind", ["rate", "schedule", "none"])
def test_logs_for_tensorboard(kind, tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    rate = {
        "rate": 0.5,
        "schedule": training.WarmUpSteps(0.5, warm_up_steps=0),
        "none": 0.25,
    }[kind]
    optimizer = training.deformable_optimizer(keras.optimizers.SGD(rate))
    if kind == "none":
        if not hasattr(keras.optimizers, "MultiOptimizer"):
            pytest.skip("This Keras has none")
        optimizer = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(optimizer, {})
        )
    model.compile(optimizer, loss="mse")
    callback = training.TensorBoardLogs(tmp_path)
    callback.set_model(model)
    for epoch in range(2):
        logs = {"loss": epoch + 0.5, "val_AP/ä b": epoch / 4, "val_n": math.nan}
        callback.on_epoch_end(epoch, logs)
    callback.on_train_end()
    found = {}
    for file in tmp_path.glob("*/*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                key = (file.parent.name, value.tag, event.step)
                found[key] = float(tf.make_ndarray(value.tensor))
                assert value.metadata.plugin_data.plugin_name == "scalars"
    assert math.isnan(found.pop(("validation", "epoch_n", 0)))
    assert math.isnan(found.pop(("validation", "epoch_n", 1)))
    rates = {} if kind == "none" else {0: 0.5, 1: 0.5}
    assert found == {
        ("train", "epoch_loss", 0): 0.5,
        ("train", "epoch_loss", 1): 1.5,
        ("validation", "epoch_AP/ä b", 0): 0.0,
        ("validation", "epoch_AP/ä b", 1): 0.25,
        **{
            ("train", "epoch_learning_rate", step): rate
            for step, rate in rates.items()
        },
    }


def test_what_is_public():
    both = {"SamplingMonitor", "deformable_optimizer"}
    assert both <= set(training.__all__)
    assert (set(training.__all__) == both) == KERAS_2
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = training.Nothing


@needs_keras_3
def test_keras_2(run_python_as_it_is):
    """Tests what is said where those parts are not imported."""
    printed = run_python_as_it_is(
        "import tf_deform._keras, sys\n"
        "tf_deform._keras.KERAS_2 = True\n"
        "for name in [n for n in sys.modules if 'deform.training' in n]:\n"
        "    del sys.modules[name]\n"
        "import tf_deform.training as training\n"
        "print(sorted(training.__all__), hasattr(training, 'Nothing'))\n"
        "try:\n    from tf_deform.training import BestAndLast\n"
        "except ImportError as error:\n    print(error)\n"
    )
    public, text = printed.splitlines()[-2:]
    assert public == "['SamplingMonitor', 'deformable_optimizer'] False"
    assert text.startswith("Expected Keras 3 for tf_deform.training.BestAndL")


def test_an_import_loads_nothing_more(run_python_as_it_is):
    printed = run_python_as_it_is(
        "import sys, tf_deform.training\n"
        "print('faster_coco_eval' in sys.modules)"
    )
    assert printed.splitlines()[-1] == "False"
