# SPDX-License-Identifier: Apache-2.0
"""Measures the effect of LiteRT's quantization on models of digits.

Makes the table of docs/quantization.md.

    tf-deform demo digits --out runs/digits
    python benchmarks/quantized.py --digits runs/digits

Each file is calibrated with scenes that the model learned from, and evaluated
on the test scenes. Times are of single images, and all files take turns.
"""

import argparse
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402

from tf_deform import data, export, training  # noqa: E402
from tf_deform.demo import _digit_scenes  # noqa: E402

KINDS = (None, "float16", "dynamic", "int8")
CALIBRATION_IMAGES = 64
BATCH = 100

# Takes images; returns outputs by name.
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def load(path: pathlib.Path, threads: int) -> Run:
    interpreter = Interpreter(str(path), num_threads=threads)
    runner = interpreter.get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    return lambda images: runner(**{name: images})


def run_all(run: Run, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns outputs for any number of images, in batches."""
    batches = np.split(images, range(BATCH, len(images), BATCH))
    outputs = [run(batch) for batch in batches]
    return {
        name: np.concatenate([batch[name] for batch in outputs])
        for name in outputs[0]
    }


def find_mean_iou(outputs: dict[str, np.ndarray], masks: np.ndarray) -> float:
    metric = training.MeanIoU(_digit_scenes.NUM_CLASSES, sparse_y_pred=False)
    metric.update_state(masks, outputs["output_0"])
    return float(metric.result())


def find_average_precision(
    outputs: dict[str, np.ndarray], truth: data.Annotations
) -> float:
    names = ("boxes", "scores", "labels")
    rows = zip(*(outputs[name] for name in names), strict=True)
    found = (dict(zip(names, row, strict=True)) for row in rows)
    judge = training.CocoEvaluator(truth.to_coco())
    return judge.evaluate(enumerate(found, start=1))["AP"]


def measure(
    name: str,
    model: keras.Model,
    output: str,
    judge: Callable[[dict[str, np.ndarray]], float],
    calibration: np.ndarray,
    images: np.ndarray,
    threads: int,
    calls: int,
) -> list[list[str]]:
    """Returns rows of the table.

    Args:
        name: name of the rows.
        model: a segmenter or a detector.
        output: the output whose differences are shown.
        judge: computes mIoU or AP from all outputs.
        calibration: images like the images that the model learned from.
        images: images on which the model is evaluated.
        threads: number of LiteRT's threads.
        calls: number of timed calls of each file.
    """

    def keras_run(batch: np.ndarray) -> dict[str, np.ndarray]:
        found = model.predict_on_batch(batch)
        return found if isinstance(found, dict) else {"output_0": found}

    expected = run_all(keras_run, images)
    sizes, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = pathlib.Path(folder) / f"{kind}.tflite"
            report = export.litert(
                model,
                path,
                kind,
                calibration=np.split(calibration, 4),
                # Allows any difference here: all test scenes are evaluated
                # below.
                tolerance=float("inf"),
                verbose=False,
            )
            sizes.append(report.size)
            runs.append(load(path, threads))
    times = timing.medians(
        {
            kind: functools.partial(run, images[:1])
            for kind, run in zip(KINDS, runs, strict=True)
        },
        calls,
    )
    rows = [[f"{name}, Keras", "", "", "", f"{judge(expected):.3f}", ""]]
    for kind, size, run in zip(KINDS, sizes, runs, strict=True):
        outputs = run_all(run, images)
        delta = np.abs(outputs[output] - expected[output]).astype("float64")
        largest = np.abs(expected[output]).max()
        root = np.sqrt(np.mean(delta**2) / np.mean(expected[output] ** 2.0))
        rows.append(
            [
                f"{name}, {kind or 'float32'}",
                f"{size / 1000:.0f}",
                f"{delta.max() / largest:.1g}",
                f"{root:.1g}",
                f"{judge(outputs):.3f}",
                f"{times[kind]:.1f}",
            ]
        )
    return rows


def read_images(photographs: Sequence[data.Photograph]) -> np.ndarray:
    images = np.stack([data.read_image(photo.path) for photo in photographs])
    return images.astype("float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--digits",
        type=pathlib.Path,
        default=pathlib.Path("runs/digits"),
        help="what `tf-deform demo digits` wrote (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()

    scenes, runs = args.digits / "scenes", args.digits / "runs"
    learned = _digit_scenes.read(scenes / "train", "detect").photographs
    calibration = read_images(learned[:CALIBRATION_IMAGES])
    truth = _digit_scenes.read(scenes / "test", "detect")
    images = read_images(truth.photographs)
    segmented = _digit_scenes.read(scenes / "test", "segment")
    masks = np.stack([data.read_mask(p.mask) for p in segmented.photographs])
    segmenter, detector = (
        keras.saving.load_model(runs / name / "model.keras", compile=False)
        for name in ("segment-dcn-v2-seed0", "detect-both-seed0")
    )
    common = calibration, images, args.threads, args.calls
    rows = measure(
        "segmenter",
        segmenter,
        "output_0",
        functools.partial(find_mean_iou, masks=masks),
        *common,
    )
    rows += measure(
        "detector",
        detector,
        "scores",
        functools.partial(find_average_precision, truth=truth),
        *common,
    )
    header = (
        "model, file",
        "kB",
        "largest difference",
        "rms difference",
        "mIoU or AP",
        "ms per image",
    )
    print(report.markdown(header, rows, words=1))


if __name__ == "__main__":
    main()
