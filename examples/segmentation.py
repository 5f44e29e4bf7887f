# SPDX-License-Identifier: Apache-2.0
"""Trains a small segmentation model, plain and deformable, and compares them.

    python examples/segmentation.py --out runs/demo

composes scenes of handwritten digits (see `digit_scenes.py`), trains each arm
for the same number of steps on the same batches, and leaves in the folder:

    metrics.json        every number that was printed
    predictions.png     predictions beside the truth
    sampling.png        where the last two convolutions look
    saved_model/        the deformable model, for serving (see `serve.py`)
    runs/               one folder per arm and seed

An interrupted call, repeated, resumes: an arm that is done is not trained
again, another one goes on from its last complete epoch.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

# TensorFlow's start-up notes would bury the table.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import digit_scenes
import keras
import numpy as np
import pictures
import scipy.stats
import tensorflow as tf

import tf_deform

ARMS = (
    "plain",
    "plain-wide",
    "plain-deep",
    "plain-dilated",
    "dcn-v1",
    "dcn-v2",
)

BATCH_SIZE = 32
LEARNING_RATE = 0.016
# Offsets move every sample of a kernel at once: they learn more slowly.
OFFSET_LEARNING_RATE = 0.2 * LEARNING_RATE
WARMUP_STEPS = 50
# Nine pixels in ten are background: at full weight it would drown the digits.
BACKGROUND_WEIGHT = 0.5
# Steps that one progress bar counts, and at most lost by an interruption.
EPOCH_STEPS = 100


def build_model(arm: str) -> keras.Model:
    """Returns an untrained model of one arm.

    All arms are one network: two convolutions of stride 2, three more at a
    quarter of the size, a 1x1 score, bilinear enlargement. They differ in the
    last two of the convolutions alone, "plain-wide" in the number of filters,
    "plain-deep" in one convolution more.

    Args:
        arm: one of `ARMS`.

    Returns:
        A model from `(batch, 64, 64, 1)` uint8 gray values to
        `(batch, 64, 64, 11)` float32 logits.
    """
    # The wide arm has at least as many parameters as any deformable one.
    narrow, wide = (28, 56) if arm == "plain-wide" else (24, 48)
    convolution = {
        "plain-dilated": functools.partial(
            keras.layers.Conv2D, dilation_rate=2
        ),
        "dcn-v1": tf_deform.layers.DeformableConv2D,
        "dcn-v2": functools.partial(
            tf_deform.layers.DeformableConv2D, modulation="2sigmoid"
        ),
    }.get(arm, keras.layers.Conv2D)

    def block(x, layer, filters, name, strides=1):
        x = layer(
            filters,
            3,
            strides=strides,
            padding="same",
            use_bias=False,
            name=name,
        )(x)
        return keras.layers.ReLU()(keras.layers.BatchNormalization()(x))

    size = digit_scenes.IMAGE_SIZE
    inputs = keras.Input((size, size, 1), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = block(x, keras.layers.Conv2D, narrow, "conv1", strides=2)
    x = block(x, keras.layers.Conv2D, wide, "conv2", strides=2)
    x = block(x, keras.layers.Conv2D, wide, "conv3")
    if arm == "plain-deep":
        x = block(x, keras.layers.Conv2D, wide, "conv3b")
    x = block(x, convolution, wide, "conv4")
    x = block(x, convolution, wide, "conv5")
    x = keras.layers.Conv2D(digit_scenes.NUM_CLASSES, 1, name="score")(x)
    x = keras.layers.UpSampling2D(4, interpolation="bilinear")(x)
    return keras.Model(inputs, x, name=arm.replace("-", "_"))


def make_optimizer(steps: int) -> keras.optimizers.Optimizer:
    """Returns Adam with a slower one for the variables of offset branches."""

    def adam(rate):
        warmup = min(WARMUP_STEPS, steps // 4)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
        )
        return keras.optimizers.Adam(schedule, beta_2=0.99, global_clipnorm=5.0)

    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            adam(LEARNING_RATE),
            {r".*/offset_(kernel|bias)": adam(OFFSET_LEARNING_RATE)},
        )
    )


def read_scenes(folder: pathlib.Path) -> tf.data.Dataset:
    """Returns the scenes of one part, decoded once and then kept in memory.

    Args:
        folder: folder with `images/*.png` and, of the same names,
            `masks/*.png`.

    Returns:
        A dataset of pairs of `(64, 64, 1)` uint8: gray values and classes.
    """
    images = sorted(str(path) for path in (folder / "images").glob("*.png"))
    masks = sorted(str(path) for path in (folder / "masks").glob("*.png"))
    size = digit_scenes.IMAGE_SIZE

    def decode(path):
        pixels = tf.io.decode_png(tf.io.read_file(path), channels=1)
        return tf.ensure_shape(pixels, (size, size, 1))

    return (
        tf.data.Dataset.from_tensor_slices((images, masks))
        .map(
            lambda image, mask: (decode(image), decode(mask)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .cache()
    )


def weigh(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Appends to a scene the weight of each pixel, shaped like `mask`."""
    background = tf.equal(tf.squeeze(mask, -1), 0)
    return image, mask, tf.where(background, BACKGROUND_WEIGHT, 1.0)


def mean_iou(model: keras.Model, scenes: tf.data.Dataset) -> float:
    """Returns the intersection over union, mean over the 11 classes."""
    metric = keras.metrics.MeanIoU(
        digit_scenes.NUM_CLASSES, sparse_y_pred=False
    )
    for images, masks in scenes.batch(100):
        metric.update_state(masks, model(images, training=False))
    return float(metric.result())


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file that is either complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


class EpochTimer(keras.callbacks.Callback):
    """Adds the seconds that an epoch took to its logs."""

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self._start


class SaveState(keras.callbacks.Callback):
    """Saves the model's and the optimizer's variables after each epoch.

    In the one file is all that resuming needs: `optimizer.iterations` says how
    far it went. `keras.callbacks.BackupAndRestore` keeps the epoch in a second
    file, and a stop between the two would leave a state that never was.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch, logs=None):
        partial = self._path.with_name("partial.weights.h5")
        self.model.save_weights(partial)
        partial.replace(self._path)


def claim(folder: pathlib.Path, settings: dict) -> None:
    """Takes a folder for a run, so that no other run's state is resumed.

    Args:
        folder: folder of the run, made where missing.
        settings: everything that the result depends on, as JSON holds it.

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
    training: tf.data.Dataset,
    held_out: tf.data.Dataset,
    folder: pathlib.Path,
) -> dict:
    """Trains one arm, or goes on with it, or finds that it is done.

    Args:
        arm: one of `ARMS`.
        seed: seed of the initial weights and of the order of the scenes.
        steps: number of training steps.
        training: scenes to learn from, as `read_scenes` returns them.
        held_out: scenes to evaluate.
        folder: folder of this run, see `claim`; afterwards it holds
            `model.keras` and `result.json`.

    Returns:
        The content of `result.json`.
    """
    result = folder / "result.json"
    state, log = folder / "state.weights.h5", folder / "log.csv"
    print(f"\n{arm}, seed {seed}: ", end="")
    if result.exists():
        print("done before", flush=True)
        return json.loads(result.read_text())

    keras.utils.set_random_seed(seed)
    model = build_model(arm)
    optimizer = make_optimizer(steps)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    optimizer.build(model.trainable_variables)
    if state.exists():
        model.load_weights(state)
    start = int(optimizer.iterations)
    print(f"from step {start} to {steps}", flush=True)
    # One stream of batches for the whole run, the same for every arm; a resumed
    # run skips those that it has seen.
    count = int(training.cardinality())
    batches = (
        training.shuffle(count, seed=seed)
        .repeat()
        .batch(BATCH_SIZE, drop_remainder=True)
        .skip(start)
        .map(weigh, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
    epoch_steps = min(EPOCH_STEPS, steps)
    model.fit(
        batches,
        initial_epoch=start // epoch_steps,
        epochs=steps // epoch_steps,
        steps_per_epoch=epoch_steps,
        shuffle=False,  # The batches are.
        callbacks=[
            EpochTimer(),
            keras.callbacks.CSVLogger(log, append=start > 0),
            SaveState(state),
        ],
        # A bar redraws itself on a terminal; a file gets one line per epoch.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    seconds = np.genfromtxt(log, delimiter=",", names=True)["seconds"]
    measured = {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "parameters": sum(
            int(np.prod(variable.shape))
            for variable in model.trainable_variables
        ),
        "miou": mean_iou(model, held_out),
        # The median leaves out the first epoch, in which graphs are traced.
        "ms_per_step": 1000 * float(np.median(seconds)) / epoch_steps,
    }
    model.save(folder / "model.keras")
    write_json(result, measured)
    state.unlink(missing_ok=True)
    return measured


def is_deformable(arm: str) -> bool:
    return arm.startswith("dcn")


def differences(results: list[dict]) -> list[dict]:
    """Compares every deformable arm with every other one, seed by seed.

    Args:
        results: what `train` returned.

    Returns:
        For each pair the differences in mIoU per seed, their mean and, from
        two seeds on, the two ends of their 95 % confidence interval (Student's
        t).
    """
    scores = {}
    for result in results:
        scores.setdefault(result["arm"], []).append(result["miou"])
    pairs = []
    for arm, base in itertools.product(scores, scores):
        if not is_deformable(arm) or is_deformable(base):
            continue
        delta = np.subtract(scores[arm], scores[base])
        pair = {
            "arm": arm,
            "base": base,
            "per_seed": delta.tolist(),
            "mean": float(delta.mean()),
        }
        if len(delta) > 1:
            interval = scipy.stats.ttest_1samp(delta, 0).confidence_interval()
            pair["interval"] = [float(interval.low), float(interval.high)]
        pairs.append(pair)
    return pairs


def report(results: list[dict], pairs: list[dict], part: str) -> str:
    """Returns the table of results and a line for each comparison."""
    lines = [
        f"| model | parameters | mIoU, {part} | ms per step |",
        "|---|---:|---:|---:|",
    ]
    for arm, group in itertools.groupby(results, lambda r: r["arm"]):
        group = list(group)
        scores = [result["miou"] for result in group]
        score = f"{np.mean(scores):.3f}"
        if len(scores) > 1:
            score += f" ± {np.std(scores, ddof=1):.3f}"
        step = np.median([result["ms_per_step"] for result in group])
        lines.append(
            f"| {arm} | {group[0]['parameters']:,} | {score} | {step:.0f} |"
        )
    lines.append("")
    for pair in pairs:
        line = (
            f"{pair['arm']} against {pair['base']}: "
            f"{100 * pair['mean']:+.1f} points"
        )
        if "interval" in pair:
            low, high = (100 * end for end in pair["interval"])
            line += f", 95 % interval {low:+.1f} to {high:+.1f}"
        lines.append(line)
    return "\n".join(lines)


def export(
    model: keras.Model, images: np.ndarray, folder: pathlib.Path
) -> dict:
    """Exports a model, runs it in a fresh process and compares.

    Args:
        model: model to export.
        images: `(batch, 64, 64, 1)` uint8, what both run on.
        folder: receives `saved_model/`.

    Returns:
        The largest absolute difference of a logit, the largest absolute logit
        for comparison, and the share of pixels given the same class.
    """
    model.export(folder / "saved_model", format="tf_saved_model", verbose=False)
    serve = pathlib.Path(__file__).with_name("serve.py")
    with tempfile.TemporaryDirectory() as scratch:
        given = pathlib.Path(scratch) / "images.npy"
        answer = pathlib.Path(scratch) / "logits.npy"
        np.save(given, images)
        subprocess.run(
            [sys.executable, serve, folder / "saved_model", given, answer],
            check=True,
        )
        there = np.load(answer)
    here = model(images, training=False).numpy()
    return {
        "images": len(images),
        "max_abs_difference": float(np.abs(here - there).max()),
        "max_abs_logit": float(np.abs(here).max()),
        "same_class": float(np.mean(here.argmax(-1) == there.argmax(-1))),
    }


def draw(
    models: dict[str, keras.Model],
    images: np.ndarray,
    masks: np.ndarray,
    annotations: list[dict],
    folder: pathlib.Path,
) -> None:
    """Draws what models predict and where they look.

    Args:
        models: models by name.
        images: `(batch, 64, 64, 1)` uint8, all scenes of a part.
        masks: `(batch, 64, 64, 1)` uint8, their classes.
        annotations: the part's COCO annotations.
        folder: receives `predictions.png` and `sampling.png`.
    """
    pictures.draw_predictions(
        folder / "predictions.png",
        images[:6],
        masks[:6],
        {
            name: model(images[:6], training=False).numpy().argmax(-1)
            for name, model in models.items()
        },
    )
    # Six digits from small to large.
    by_size = sorted(annotations, key=lambda item: max(item["bbox"][2:]))
    ranks = np.linspace(0.1, 1, 6) * (len(by_size) - 1)
    chosen = [by_size[int(rank)] for rank in ranks]
    pictures.draw_sampling(
        folder / "sampling.png",
        images[[item["image_id"] for item in chosen]],
        [item["bbox"] for item in chosen],
        models,
        ("conv4", "conv5"),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare a plain segmentation model with its deformable "
        "twin.",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all arms and three seeds, unless --arms or --seeds say otherwise",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/demo"),
        help="folder for results (default: runs/demo)",
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
        "--steps", type=int, default=800, help="training steps (default: 800)"
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    for part, count in digit_scenes.DEFAULT_COUNTS.items():
        parser.add_argument(
            f"--{part}",
            type=int,
            default=count,
            metavar="N",
            help=f"number of {part} scenes (default: {count})",
        )
    args = parser.parse_args()
    args.arms = args.arms or (ARMS if args.full else ("plain", "dcn-v2"))
    args.arms = list(dict.fromkeys(args.arms))  # Each once, in this order.
    args.seeds = sorted(set(args.seeds or ((0, 1, 2) if args.full else (0,))))
    args.data = args.data or args.out / "scenes"
    if args.steps < 1 or args.steps % min(EPOCH_STEPS, args.steps):
        parser.error(
            f"Expected --steps to be below {EPOCH_STEPS} or a multiple of it. "
            f"Received: {args.steps}"
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
            "part": args.part,
            "scenes": json.loads((args.data / "scenes.json").read_text()),
        }
        claim(folders[arm, seed], settings)
    return folders


def run(
    args: argparse.Namespace, folders: dict[tuple[str, int], pathlib.Path]
) -> None:
    """Trains, compares, draws and exports."""
    training = read_scenes(args.data / "train")
    held_out = read_scenes(args.data / args.part)
    results = [
        train(arm, seed, args.steps, training, held_out, folder)
        for (arm, seed), folder in folders.items()
    ]
    pairs = differences(results)
    print("\n" + report(results, pairs, args.part), flush=True)

    # One plain model, or whatever came first, beside the most deformable one.
    models = {
        arm: keras.saving.load_model(
            folders[arm, args.seeds[0]] / "model.keras", compile=False
        )
        for arm in dict.fromkeys((args.arms[0], args.arms[-1]))
    }
    images, masks = (
        array.numpy()
        for array in held_out.batch(len(held_out)).get_single_element()
    )
    coco = json.loads((args.data / args.part / "instances.json").read_text())
    draw(models, images, masks, coco["annotations"], args.out)
    exported = export(models[args.arms[-1]], images[:100], args.out)
    print(
        f"\n{args.arms[-1]} as a SavedModel in a fresh process: logits differ "
        f"by at most {exported['max_abs_difference']:.2g} (the largest is "
        f"{exported['max_abs_logit']:.3g}), "
        f"{100 * exported['same_class']:.2f} % of the pixels get the same "
        "class"
    )
    write_json(
        args.out / "metrics.json",
        {
            "scenes": json.loads((args.data / "scenes.json").read_text()),
            "part": args.part,
            "results": results,
            "differences": pairs,
            "saved_model": exported,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "cpus": len(os.sched_getaffinity(0)),
        },
    )
    print(
        f"\nWritten to {args.out}: metrics.json, predictions.png, "
        "sampling.png, saved_model"
    )


def main() -> None:
    args = parse_arguments()
    try:
        try:
            folders = prepare(args)
        except ValueError as error:
            sys.exit(f"error: {error}")
        run(args, folders)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command resumes.")


if __name__ == "__main__":
    main()
