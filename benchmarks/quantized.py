# SPDX-License-Identifier: Apache-2.0
"""Measures the effect of LiteRT's quantization on models of digits.

Makes the table of docs/quantization.md.

    python examples/segmentation.py --data runs/scenes
    python examples/detection/train.py --data runs/scenes
    python benchmarks/quantized.py

Each file is calibrated with scenes that the model learned from, and evaluated
on the test scenes. Times are of single images, and all files take turns.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import tensorflow as tf  # noqa: E402
import timing  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import segmentation  # noqa: E402
from detection import train as detection  # noqa: E402

from tf_deform import export  # noqa: E402

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
    metric = keras.metrics.MeanIoU(
        segmentation.digit_scenes.NUM_CLASSES, sparse_y_pred=False
    )
    metric.update_state(masks, outputs["output_0"])
    return float(metric.result())


class Outputs:
    """Holds detections that were made before, for `detection.evaluate`."""

    def __init__(self, outputs: dict[str, np.ndarray]):
        self._outputs = outputs
        self._start = 0

    def detect(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        start, self._start = self._start, self._start + len(images)
        return {
            name: tf.constant(value[start : self._start])
            for name, value in self._outputs.items()
        }


def measure(
    name: str,
    model: Callable[..., object],
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
        model: a Keras model, or a `tf.function`.
        output: the output whose differences are shown.
        judge: computes mIoU or AP from all outputs.
        calibration: images like the images that the model learned from.
        images: images on which the model is evaluated.
        threads: number of LiteRT's threads.
        calls: number of timed calls of each file.
    """

    def keras_run(batch: np.ndarray) -> dict[str, np.ndarray]:
        found = model(tf.constant(batch))
        found = found if isinstance(found, dict) else {"output_0": found}
        return {key: np.asarray(value) for key, value in found.items()}

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


def read(folder: pathlib.Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    scenes = segmentation.read_scenes(folder / part)
    images, masks = scenes.batch(len(scenes)).get_single_element()
    return images.numpy(), masks.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    runs = pathlib.Path("runs")
    parser.add_argument(
        "--segmentation", type=pathlib.Path, default=runs / "segmentation"
    )
    parser.add_argument(
        "--detection", type=pathlib.Path, default=runs / "detection"
    )
    parser.add_argument("--data", type=pathlib.Path, default=runs / "scenes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()

    calibration = read(args.data, "train")[0][:CALIBRATION_IMAGES]
    images, masks = read(args.data, "test")
    scenes, coco = detection.read_scenes(args.data / "test")
    segmenter = keras.saving.load_model(
        args.segmentation / "runs/dcn-v2-seed0/model.keras", compile=False
    )
    detector = keras.saving.load_model(
        args.detection / "runs/both-seed0/model.keras", compile=False
    )

    def average_precision(outputs: dict[str, np.ndarray]) -> float:
        return detection.evaluate(Outputs(outputs), scenes, coco)["ap"]

    rows = measure(
        "segmenter",
        segmenter,
        "output_0",
        lambda outputs: find_mean_iou(outputs, masks),
        calibration,
        images,
        args.threads,
        args.calls,
    )
    rows += measure(
        "detector",
        detector.detect,
        "scores",
        average_precision,
        calibration,
        images,
        args.threads,
        args.calls,
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
