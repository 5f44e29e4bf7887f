# SPDX-License-Identifier: Apache-2.0
"""Shows what offsets alone give back to a model that meets deformed images.

A small classifier learns upright digits, the 1797 scans that scikit-learn
contains. On digits that are turned, sheared and stretched it loses accuracy.
Then it is trained on such digits, for equally many steps on the same batches:

    offsets            made deformable; only its offsets, the rest is frozen
    all, plain         as it is; all weights
    all, deformable    made deformable; all weights

    python examples/surgery.py

It prints, as means over the seeds, the accuracy on digits of other writers, and
which share of the lost accuracy came back. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import scipy.ndimage
import sklearn.datasets

import tf_deform

SIZE = 24
TRAIN = 1300  # The scans are stored by writer: the others are by new ones.
BATCH = 64
ARMS = ("offsets", "all, plain", "all, deformable")


def draw(rng: Any, scan: np.ndarray, deformed: bool) -> np.ndarray:
    """Returns a scan, (8, 8) in 0 to 1, enlarged, on `(SIZE, SIZE)` pixels."""
    linear = np.eye(2)
    if deformed:
        turn = np.deg2rad(rng.uniform(-60, 60))
        stretch = np.exp(rng.uniform(-0.4, 0.4))
        linear = (
            np.diag([stretch, 1 / stretch])
            @ [[1, rng.uniform(-0.4, 0.4)], [0, 1]]
            @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        )
    linear /= 2.2  # pixels of the scan for one of the picture
    middle = (SIZE - 1) / 2 + rng.uniform(-1.5, 1.5, 2)
    return scipy.ndimage.affine_transform(
        scan, linear, 3.5 - linear @ middle, (SIZE, SIZE), order=1
    )


def digits(
    seed: int, part: slice, copies: int, deformed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pictures, `(n, SIZE, SIZE, 1)`, and the digits on them."""
    data = sklearn.datasets.load_digits()
    rng = np.random.default_rng([seed, part.start, deformed])
    scans = np.repeat(data.images[part] / 16, copies, 0)
    pictures = [draw(rng, scan, deformed) for scan in scans]
    labels = np.repeat(data.target[part], copies)
    return np.float32(pictures)[..., None], labels


def make_classifier() -> keras.Model:
    conv = functools.partial(
        keras.layers.Conv2D, padding="same", use_bias=False
    )
    model = keras.Sequential([keras.Input((SIZE, SIZE, 1))])
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        model.add(conv(filters, 3, strides))
        # Short runs need averages that move fast.
        model.add(keras.layers.BatchNormalization(momentum=0.9))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10))
    return model


def train(
    model: keras.Model, data: tuple, steps: int, of_offsets: float = 1.0
) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    optimizer = tf_deform.training.deformable_optimizer(
        keras.optimizers.Adam(schedule, global_clipnorm=1.0), of_offsets
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    order = np.random.default_rng(0).integers(len(data[1]), size=steps * BATCH)
    model.fit(data[0][order], data[1][order], BATCH, shuffle=False, verbose=0)


def accuracy(model: keras.Model, data: tuple) -> float:
    logits = model.predict(data[0], batch_size=256, verbose=0)
    return float(np.mean(np.argmax(logits, -1) == data[1]))


def run(seed: int, first: int, steps: int) -> dict[str, tuple]:
    """Returns accuracies on upright and deformed digits, and weights trained.

    It takes `first` steps on upright digits, then `steps` on deformed ones.
    """
    keras.utils.set_random_seed(seed)
    old, new = slice(0, TRAIN), slice(TRAIN, None)
    upright, deformed = digits(seed, old, 8, False), digits(seed, old, 16, True)
    tests = digits(9, new, 2, False), digits(9, new, 4, True)
    model = make_classifier()
    train(model, upright, first)
    results = {"nothing": (*(accuracy(model, test) for test in tests), 0)}
    for arm in ARMS:
        twin = make_classifier()
        twin.set_weights(model.get_weights())
        if arm != "all, plain":
            tf_deform.make_deformable(twin, "c1-c2", verbose=False)
        if arm == "offsets":
            tf_deform.train_only(twin, "offsets")
        weights = sum(int(np.prod(w.shape)) for w in twin.trainable_weights)
        # Offsets that are trained alone need no rate of their own.
        train(twin, deformed, steps, 1.0 if arm == "offsets" else 0.3)
        results[arm] = (*(accuracy(twin, test) for test in tests), weights)
    return results


def table(runs: list[dict[str, tuple]]) -> str:
    """Returns the means as a table, with the lowest and highest share."""
    lines = [
        "| trained | weights | upright | deformed | of the loss, back |",
        "|---|---:|---:|---:|---:|",
    ]
    before = np.array([one["nothing"] for one in runs])
    for arm in ("nothing", *ARMS):
        rows = np.array([one[arm] for one in runs])
        back = (rows[:, 1] - before[:, 1]) / (before[:, 0] - before[:, 1])
        upright, deformed, weights = rows.mean(0)
        lines.append(
            f"| {arm} | {weights:,.0f} | {upright:.1%} | {deformed:.1%} | "
            f"{back.mean():.0%} ({back.min():.0%} to {back.max():.0%}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", type=int, default=800, help="upright steps")
    parser.add_argument("--steps", type=int, default=600, help="deformed steps")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        runs.append(run(seed, args.first, args.steps))
        print(f"seed {seed} is done", flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
