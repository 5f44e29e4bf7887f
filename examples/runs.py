# SPDX-License-Identifier: Apache-2.0
"""Runs and resumes training, and compares arms, for all examples.

An example trains each of its arms (models that differ in one property) with the
same seeds for the same number of steps on the same batches. A run, one arm with
one seed, has a folder of its own. A call that was interrupted resumes when it
is repeated: a run that is done is not trained again, and any other run
continues from its last epoch.
"""

import argparse
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable

# TensorFlow's messages at start-up would bury the table.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import exports
import h5py
import keras
import numpy as np
import scipy.stats
import tensorflow as tf

from tf_deform.demo import _digit_scenes as digit_scenes

BATCH_SIZE = 32
WARMUP_STEPS = 50
# Offsets move every sample of a kernel at once, so they learn at a lower rate.
OFFSET_RATE = 0.2


def make_optimizer(rate: float, steps: int) -> keras.optimizers.Optimizer:
    """Returns Adam, with a lower rate for the variables of offset branches.

    Args:
        rate: highest learning rate, reached after `WARMUP_STEPS`.
        steps: number of training steps; at the last one the rate is 0.
    """

    def adam(rate):
        warmup = min(WARMUP_STEPS, steps // 4)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
        )
        return keras.optimizers.Adam(schedule, beta_2=0.99, global_clipnorm=5.0)

    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            adam(rate), {r".*/offset_(kernel|bias)": adam(OFFSET_RATE * rate)}
        )
    )


def decode_png(path: tf.Tensor) -> tf.Tensor:
    """Returns the `(64, 64, 1)` uint8 pixels of a scene's file."""
    pixels = tf.io.decode_png(tf.io.read_file(path), channels=1)
    size = digit_scenes.IMAGE_SIZE
    return tf.ensure_shape(pixels, (size, size, 1))


def stream(scenes: tf.data.Dataset, seed: int, start: int) -> tf.data.Dataset:
    """Returns endless batches of shuffled scenes.

    The order depends on the seed alone: it is the same for every arm, and a
    resumed run skips the batches that it has seen.

    Args:
        scenes: scenes to learn from.
        seed: seed of their order.
        start: number of batches to skip.
    """
    return (
        scenes.shuffle(int(scenes.cardinality()), seed=seed)
        .repeat()
        .batch(BATCH_SIZE, drop_remainder=True)
        .skip(start)
    )


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file that is complete or does not exist."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


class EpochTimer(keras.callbacks.Callback):
    """Adds the seconds that an epoch took to its logs."""

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self._start


class Validate(keras.callbacks.Callback):
    """Adds the result of `validate(model)` to the logs of each epoch."""

    def __init__(self, validate: Callable[[keras.Model], dict[str, float]]):
        super().__init__()
        self._validate = validate

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._validate(self.model))


class SaveState(keras.callbacks.Callback):
    """Saves, after each epoch, all data that resuming needs in one file.

    `state.weights.h5` holds the variables of the model and of its optimizer and
    the logs of all epochs, and so also the best score.
    `keras.callbacks.BackupAndRestore` keeps the epoch in a second file, so a
    stop between the two files would leave an inconsistent state. `log.csv` is
    for people; `best-<epoch>.weights.h5` holds the state of the epoch with the
    best score in the logs.

    Args:
        folder: folder of the run.
        monitor: the log whose largest value is the best, or None.
    """

    def __init__(self, folder: pathlib.Path, monitor: str | None = None):
        super().__init__()
        self._folder = folder
        self._state = folder / "state.weights.h5"
        self._monitor = monitor
        self.history = []

    def restore(self, model: keras.Model) -> None:
        """Restores the state of the run, if it has been started."""
        if self._state.exists():
            model.load_weights(self._state)
            with h5py.File(self._state) as file:
                self.history = json.loads(file["history"][()])

    def best(self) -> pathlib.Path:
        """Returns the file with the state after the best epoch."""
        logs = max(self.history, key=lambda logs: logs[self._monitor])
        return self._folder / f"best-{logs['epoch']}.weights.h5"

    def on_epoch_end(self, epoch, logs=None):
        self.history.append(
            {"epoch": epoch}
            | {name: float(value) for name, value in logs.items()}
        )
        partial = self._folder / "partial.weights.h5"
        self.model.save_weights(partial)
        # Writes files that the state refers to before the state, and removes
        # files that it no longer refers to after it.
        if self._monitor:
            best = self.best()
            if best.name == f"best-{epoch}.weights.h5":
                partial.replace(best)
                self.model.save_weights(partial)
        rows = [self.history[0], *(logs.values() for logs in self.history)]
        lines = [",".join(map(str, row)) + "\n" for row in rows]
        log = self._folder / "log.csv.partial"
        log.write_text("".join(lines))
        log.replace(self._folder / "log.csv")
        with h5py.File(partial, "a") as file:
            file["history"] = json.dumps(self.history)
        partial.replace(self._state)
        if self._monitor:
            for path in self._folder.glob("best-*.weights.h5"):
                if path != best:
                    path.unlink()

    def remove(self) -> None:
        """Removes the saved state of a run that is done."""
        for path in self._folder.glob("*.weights.h5"):
            path.unlink()


def claim(folder: pathlib.Path, settings: dict) -> None:
    """Takes a folder for a run, so that no other run's state is resumed.

    Args:
        folder: folder of the run, made where missing.
        settings: all settings that the result depends on, as JSON holds them.

    Raises:
        ValueError: if the folder belongs to a run with other settings.
    """
    record = folder / "settings.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    found = json.loads(record.read_text())
    if found != settings:
        raise ValueError(
            f"Expected {folder} to hold a run with {settings}. Received: "
            f"{found}. Remove the folder or choose another --out."
        )


def train(
    arm: str,
    seed: int,
    steps: int,
    epoch_steps: int,
    folder: pathlib.Path,
    build_model: Callable[[str], keras.Model],
    rate: float,
    batches: Callable[[int], tf.data.Dataset],
    measure: Callable[[keras.Model], dict[str, float]],
    *,
    loss: keras.losses.Loss | None = None,
    validate: Callable[[keras.Model], dict[str, float]] | None = None,
    monitor: str | None = None,
) -> dict:
    """Trains one arm, resumes its training, or finds that it is done.

    Args:
        arm: name of the arm.
        seed: seed of the initial weights.
        steps: number of training steps.
        epoch_steps: number of steps after which the state is saved.
        folder: folder of this run, see `claim`; afterwards it holds
            `model.keras` and `result.json`.
        build_model: makes the untrained model of an arm.
        rate: highest learning rate.
        batches: makes an endless dataset, without the batches before a step.
        measure: evaluates the trained model.
        loss: loss to compile the model with.
        validate: evaluates the model after each epoch.
        monitor: the log that tells how good an epoch is: the best epoch's model
            is kept. None: the last epoch's model is kept.

    Returns:
        The content of `result.json`.
    """
    result = folder / "result.json"
    print(f"\n{arm}, seed {seed}: ", end="")
    if result.exists():
        print("done before", flush=True)
        return json.loads(result.read_text())

    keras.utils.set_random_seed(seed)
    model = build_model(arm)
    optimizer = make_optimizer(rate, steps)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    optimizer.build(model.trainable_variables)
    saver = SaveState(folder, monitor)
    saver.restore(model)
    start = int(optimizer.iterations)
    print(f"from step {start} to {steps}", flush=True)
    model.fit(
        batches(start).prefetch(tf.data.AUTOTUNE),
        initial_epoch=start // epoch_steps,
        epochs=steps // epoch_steps,
        steps_per_epoch=epoch_steps,
        shuffle=False,  # The batches are shuffled already.
        callbacks=[
            EpochTimer(),
            *([Validate(validate)] if validate else []),
            saver,
        ],
        # Prints a bar on a terminal, where it redraws itself, and lines to a
        # file.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    if monitor:
        model.load_weights(saver.best())
    seconds = [logs["seconds"] for logs in saver.history]
    measured = {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "parameters": sum(
            int(np.prod(variable.shape))
            for variable in model.trainable_variables
        ),
        **measure(model),
        # The median leaves out the first epoch, in which graphs are traced.
        "ms_per_step": 1000 * float(np.median(seconds)) / epoch_steps,
    }
    partial = folder / "partial.keras"
    model.save(partial)
    partial.replace(folder / "model.keras")
    write_json(result, measured)
    saver.remove()
    return measured


def differences(
    results: list[dict], metric: str, pairs: Iterable[tuple[str, str]]
) -> list[dict]:
    """Compares arms seed by seed.

    Args:
        results: results of `train`.
        metric: the measure to compare.
        pairs: pairs of arms to compare.

    Returns:
        For each pair the differences per seed, their mean and, for two or more
        seeds, their standard deviation and the two ends of their 95 %
        confidence interval (Student's t).
    """
    scores = {}
    for result in results:
        scores.setdefault(result["arm"], []).append(result[metric])
    compared = []
    for arm, base in pairs:
        delta = np.subtract(scores[arm], scores[base])
        pair = {
            "arm": arm,
            "base": base,
            "metric": metric,
            "per_seed": delta.tolist(),
            "mean": float(delta.mean()),
        }
        if len(delta) > 1:
            interval = scipy.stats.ttest_1samp(delta, 0).confidence_interval()
            pair["deviation"] = float(delta.std(ddof=1))
            pair["interval"] = [float(interval.low), float(interval.high)]
        compared.append(pair)
    return compared


def report(
    results: list[dict],
    metrics: dict[str, str],
    compared: list[dict],
    part: str,
) -> str:
    """Returns the table of results and a line for each comparison.

    Args:
        results: results of `train`.
        metrics: the title of each measure to show.
        compared: results of `differences`.
        part: name of the evaluated part.
    """
    titles = " | ".join(f"{title}, {part}" for title in metrics.values())
    lines = [
        f"| model | parameters | {titles} | ms per step |",
        f"|---|---:{'|---:' * len(metrics)}|---:|",
    ]
    for arm, group in itertools.groupby(results, lambda r: r["arm"]):
        group = list(group)
        cells = [arm, f"{group[0]['parameters']:,}"]
        for metric in metrics:
            scores = [result[metric] for result in group]
            cells.append(f"{np.mean(scores):.3f}")
            if len(scores) > 1:
                cells[-1] += f" ± {np.std(scores, ddof=1):.3f}"
        step = np.median([result["ms_per_step"] for result in group])
        lines.append(f"| {' | '.join(cells)} | {step:.0f} |")
    lines.append("")
    for pair in compared:
        line = (
            f"{pair['arm']} against {pair['base']}: "
            f"{100 * pair['mean']:+.1f} points of {metrics[pair['metric']]}"
        )
        if "interval" in pair:
            low, high = (100 * end for end in pair["interval"])
            line += f", 95 % interval {low:+.1f} to {high:+.1f}"
        lines.append(line)
    return "\n".join(lines)


def parse_arguments(
    description: str,
    arms: tuple[str, ...],
    few: tuple[str, ...],
    steps: int,
    out: str,
) -> argparse.Namespace:
    """Returns the command line of an example.

    Args:
        description: text that tells what the example does.
        arms: all arms.
        few: the arms that are trained by default.
        steps: number of training steps by default.
        out: folder for results by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--full",
        action="store_true",
        help="all arms and three seeds, unless --arms or --seeds say otherwise",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(out),
        help="folder for results (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        help="folder of the scenes, composed where missing (default: scenes "
        "inside --out)",
    )
    parser.add_argument(
        "--part",
        choices=("val", "test"),
        default="test",
        help="scenes to evaluate; choose settings on val (default: test)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--epoch-steps",
        type=int,
        default=100,
        help="steps that one progress bar counts, and at most lost by an "
        "interruption (default: %(default)s)",
    )
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=tuple(exports.FORMATS),
        default=tuple(exports.FORMATS),
        help="what the most deformable model is exported to (default: all)",
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", choices=arms)
    for part, count in digit_scenes.DEFAULT_COUNTS.items():
        parser.add_argument(
            f"--{part}",
            type=int,
            default=count,
            metavar="N",
            help=f"number of {part} scenes (default: {count})",
        )
    args = parser.parse_args()
    args.arms = args.arms or (arms if args.full else few)
    args.arms = list(dict.fromkeys(args.arms))  # It removes repeated arms.
    args.seeds = sorted(set(args.seeds or ((0, 1, 2) if args.full else (0,))))
    args.data = args.data or args.out / "scenes"
    args.epoch_steps = min(args.epoch_steps, args.steps)
    if args.epoch_steps < 1 or args.steps % args.epoch_steps:
        parser.error(
            f"Expected --steps to be below {args.epoch_steps} or a multiple "
            f"of it. Received: {args.steps}"
        )
    return args


def prepare(args: argparse.Namespace) -> dict[tuple[str, int], pathlib.Path]:
    """Composes the scenes and claims a folder for each arm and seed."""
    digit_scenes.write(
        args.data, train=args.train, val=args.val, test=args.test
    )
    folders = {}
    for arm, seed in itertools.product(args.arms, args.seeds):
        folders[arm, seed] = args.out / "runs" / f"{arm}-seed{seed}"
        settings = {
            "arm": arm,
            "seed": seed,
            "steps": args.steps,
            "epoch_steps": args.epoch_steps,
            "part": args.part,
            "scenes": read_settings(args),
        }
        claim(folders[arm, seed], settings)
    return folders


def read_settings(args: argparse.Namespace) -> dict:
    """Returns the arguments with which the scenes were composed."""
    return json.loads((args.data / "scenes.json").read_text())


def write_metrics(
    args: argparse.Namespace,
    results: list[dict],
    compared: list[dict],
    **others: object,
) -> None:
    """Writes `metrics.json`."""
    write_json(
        args.out / "metrics.json",
        {
            "scenes": read_settings(args),
            "part": args.part,
            "results": results,
            "differences": compared,
            **others,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "cpus": len(os.sched_getaffinity(0)),
        },
    )


def main(
    args: argparse.Namespace,
    run: Callable[
        [argparse.Namespace, dict[tuple[str, int], pathlib.Path]], None
    ],
) -> None:
    """Prepares the folders and calls `run`; errors leave no traceback."""
    try:
        try:
            folders = prepare(args)
        except ValueError as error:
            sys.exit(f"error: {error}")
        run(args, folders)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command resumes.")
