# SPDX-License-Identifier: Apache-2.0
"""A small training that resumes, for tests that interrupt it."""

import hashlib
import io
import json
import os
import pathlib
import random
import signal
import time
import traceback
import zipfile
from unittest import mock

import h5py
import numpy as np
import tensorflow as tf

from tf_deform import layers, training
from tf_deform._keras import keras

EPOCHS = 12
STEPS = 3  # in an epoch
SHAPE = (6, 5, 2)


def make_model(deformable=True) -> keras.Model:
    """Returns a model with all that a state is made of."""
    keras.utils.set_random_seed(1)
    first = layers.DeformableConv2D if deformable else keras.layers.Conv2D
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            first(3, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.Dropout(0.3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    rate = training.WarmUpSteps(0.003, (13, 22), warm_up_steps=7)
    optimizer = training.deformable_optimizer(
        keras.optimizers.SGD(rate, momentum=0.9)
    )
    model.compile(optimizer, loss="mse")
    return model


def batches(start: int) -> tf.data.Dataset:
    """Returns endless batches, each a function of its number."""

    def make(number):
        images = tf.random.stateless_normal((4, *SHAPE), [5, number])
        return images, tf.reduce_sum(images[:, 1:3, :, 0], [1, 2])

    return tf.data.Dataset.counter(start).map(make)


class Validate(keras.callbacks.Callback):
    """Adds the error of the averages to the logs."""

    def __init__(self, ema):
        super().__init__()
        self._ema = ema

    def on_epoch_end(self, epoch, logs=None):
        images, truth = next(iter(batches(10**6)))
        with self._ema.averages():
            found = self.model(images)[:, 0]
        logs["val_error"] = float(tf.reduce_mean(tf.abs(found - truth)))


class Notice(keras.callbacks.Callback):
    """Makes a file longer with each batch."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def on_train_batch_end(self, batch, logs=None):
        with self._path.open("ab") as file:
            file.write(b".")


def train(folder: pathlib.Path, epochs: int = EPOCHS, **options):
    """Trains, or resumes."""
    model = make_model(**options)
    ema = training.EmaEvaluation(0.9)
    checkpoints = training.BestAndLast(folder, "val_error", "min", ema=ema)
    start = checkpoints.restore(model)
    model.fit(
        batches(start),
        initial_epoch=checkpoints.epoch,
        epochs=epochs,
        steps_per_epoch=STEPS,
        shuffle=False,  # Keras would say that it cannot shuffle a dataset.
        callbacks=[Notice(folder / "on"), ema, Validate(ema), checkpoints],
        verbose=0,
    )
    return model, ema, checkpoints


def digest(path: pathlib.Path) -> dict[str, object]:
    """Returns all arrays of a file as hashes, and the rest as it is."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:

            def add(name, item):
                if isinstance(item, h5py.Dataset):
                    value = np.ascontiguousarray(item[()])
                    found[name] = hashlib.sha256(value).hexdigest()

            file.visititems(add)
        for name in archive.namelist():
            if name.startswith("tf_deform/"):
                found[name] = hashlib.sha256(archive.read(name)).hexdigest()
        found["state"] = json.loads(archive.read("tf_deform/state.json"))
    return found


def save_slowly(model, path, save=keras.Model.save):
    """Leaves more time to be killed before a file is whole."""
    save(model, path)
    time.sleep(0.1)


def start(folder: pathlib.Path) -> int:
    """Trains in a new process, whose id it returns.

    The process is a copy of this one, so that TensorFlow is loaded once. This
    one has run none of its ops: a copy of their threads would not run.
    """
    child = os.fork()
    if child == 0:
        try:
            tf.config.experimental.enable_op_determinism()
            tf.config.threading.set_intra_op_parallelism_threads(1)
            with mock.patch.object(keras.Model, "save", save_slowly):
                train(folder, deformable=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def kill_often(folder: pathlib.Path, times: int, seed: int) -> dict[str, int]:
    """Trains in processes that are killed at random moments, then to the end.

    Returns:
        How many were killed, how many were killed with a state to resume, and
        how many came to the end.
    """
    chance = random.Random(seed)
    counts = {"killed": 0, "resumable": 0, "ended": 0}
    for _ in range(times):
        (folder / "on").write_bytes(b"")
        child = start(folder)
        batch = chance.randint(1, 2 * STEPS)
        while (folder / "on").stat().st_size < batch and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        counts["killed"] += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        counts["resumable"] += (folder / "last.keras").exists()
    counts["ended"] += os.waitpid(start(folder), 0)[1] == 0
    return counts
