# SPDX-License-Identifier: Apache-2.0
"""Trains a small Deformable R-FCN, plain and deformable, and compares them.

    python examples/detection/train.py --out runs/detection

It composes scenes of handwritten digits (see
`tf_deform/demo/_digit_scenes.py`), trains each
arm (see `detector.py`) for the same number of steps on the same batches, and
leaves in the folder:

    metrics.json      every number that was printed
    detections.png    detections beside the truth
    parts.png         how deformable pooling moves the bins of regions
    saved_model/      the most deformable model, for serving (see `serve.py`)
    saved_model_portable/, model.onnx, model.tflite
                      the same from arrays of pixels (see `../serve.py`)
    runs/             one folder per arm and seed

A call that was interrupted resumes when it is repeated, with the same numbers
to the bit.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# TensorFlow's messages at start-up would bury the table.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The modules that this example shares with other examples lie one folder above.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import exports
import faster_coco_eval
import keras
import numpy as np
import runs
import tensorflow as tf
from detection import detector, export, pictures

LEARNING_RATE = 0.016
METRICS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
# A difference between detectors with a lower AP says nothing.
LEAST_AP50 = 0.5


def read_scenes(folder: pathlib.Path) -> tuple[tf.data.Dataset, dict]:
    """Returns the scenes of one part, decoded once and then kept in memory.

    Args:
        folder: folder with `images/` and `instances.json`, COCO's format.

    Returns:
        A dataset, in the order of the COCO file, of pairs: `(64, 64, 1)` uint8
        gray values; and, padded with -1, float32 "boxes" `(m, 4)` (x1, y1, x2,
        y2 in pixels) and int32 "labels" `(m,)` (categories counted from 1, in
        the order of their ids). The second value is the COCO file's content.
    """
    coco = json.loads((folder / "instances.json").read_text())
    files = [
        str(folder / "images" / image["file_name"]) for image in coco["images"]
    ]
    ids = sorted(category["id"] for category in coco["categories"])
    objects = {image["id"]: [] for image in coco["images"]}
    for item in coco["annotations"]:
        x, y, width, height = item["bbox"]
        objects[item["image_id"]].append(
            (x, y, x + width, y + height, 1 + ids.index(item["category_id"]))
        )
    most = max(1, max(map(len, objects.values())))
    padded = np.full((len(files), most, 5), -1, "float32")
    for row, found in zip(padded, objects.values(), strict=True):
        row[: len(found)] = np.reshape(found, (-1, 5))
    truth = {
        "boxes": padded[..., :4],
        "labels": padded[..., 4].astype("int32"),
    }
    scenes = tf.data.Dataset.from_tensor_slices((files, truth))
    scenes = scenes.map(
        lambda file, truth: (runs.decode_png(file), truth),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return scenes.cache(), coco


def renumber(coco: dict) -> dict:
    """Returns a COCO file's content with ids that count from 1.

    The evaluation takes an annotation with id 0 for a missing one, confuses
    annotations with the same id, and accepts no texts as ids. Categories are
    numbered in the order of their ids, as labels are.
    """
    numbers = {
        "images": [image["id"] for image in coco["images"]],
        "categories": sorted(category["id"] for category in coco["categories"]),
    }
    numbers = {
        kind: {old: new for new, old in enumerate(ids, start=1)}
        for kind, ids in numbers.items()
    }
    renumbered = {
        kind: [{**item, "id": new[item["id"]]} for item in coco[kind]]
        for kind, new in numbers.items()
    }
    renumbered["annotations"] = [
        {
            **item,
            "id": count,
            "image_id": numbers["images"][item["image_id"]],
            "category_id": numbers["categories"][item["category_id"]],
        }
        for count, item in enumerate(coco["annotations"], start=1)
    ]
    return {**coco, **renumbered}


def evaluate(
    model: detector.Detector, scenes: tf.data.Dataset, coco: dict
) -> dict[str, float]:
    """Returns COCO's average precision: mean, at 0.5 and at 0.75 overlap.

    Args:
        model: model to evaluate.
        scenes: dataset that `read_scenes` returned.
        coco: COCO file's content that `read_scenes` returned.
    """
    coco = renumber(coco)
    images = iter(coco["images"])
    detections = []
    for pixels, _ in scenes.batch(100):
        found = model.detect(pixels)
        found = {name: value.numpy() for name, value in found.items()}
        found["boxes"][..., 2:] -= found["boxes"][..., :2]
        for row, count in enumerate(found["valid"]):
            image = next(images)["id"]
            detections += [
                {
                    "image_id": image,
                    "category_id": int(found["labels"][row, i]),
                    "bbox": found["boxes"][row, i].tolist(),
                    "score": float(found["scores"][row, i]),
                }
                for i in range(count)
            ]
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = faster_coco_eval.COCO(coco)
        judge = faster_coco_eval.COCOeval_faster(
            truth, truth.loadRes(detections), "bbox"
        )
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRICS, map(float, judge.stats[:3]), strict=True))


def try_export(
    model: detector.Detector, folder: pathlib.Path, coco: dict, images: list
) -> dict:
    """Runs an exported model in a fresh process and compares.

    Args:
        model: the model that was exported.
        folder: its SavedModel.
        coco: content of the COCO file.
        images: image files on which both run.

    Returns:
        The number of images and of detections, and the largest absolute
        difference of a coordinate, in pixels, and of a score.
    """
    serve = pathlib.Path(__file__).with_name("serve.py")
    with tempfile.TemporaryDirectory() as scratch:
        answer = pathlib.Path(scratch) / "answer.json"
        subprocess.run(
            [sys.executable, serve, folder, *images, "--out", answer],
            check=True,
        )
        there = json.loads(answer.read_text())
    server = export.make_server(model, coco["categories"])
    count, boxes, scores = 0, [0.0], [0.0]
    for path in images:
        found = server(tf.constant([path.read_bytes()]))
        found = {name: value.numpy()[0] for name, value in found.items()}
        valid, items = found["valid"], there[str(path)]
        if [item["class_id"] for item in items] != found["class_ids"][
            :valid
        ].tolist():
            raise RuntimeError(
                f"Expected the classes {found['class_ids'][:valid]} for "
                f"{path}. Received: {items}"
            )
        count += len(items)
        for i, item in enumerate(items):
            boxes.append(np.abs(found["boxes"][i] - item["box"]).max())
            scores.append(abs(found["scores"][i] - item["score"]))
    return {
        "images": len(images),
        "detections": count,
        "max_box_difference": float(max(boxes)),
        "max_score_difference": float(max(scores)),
    }


def run(
    args: argparse.Namespace, folders: dict[tuple[str, int], pathlib.Path]
) -> None:
    """Trains, compares, draws and exports."""
    # Without determinism, sums may depend on which thread came first.
    tf.config.experimental.enable_op_determinism()
    training, _ = read_scenes(args.data / "train")
    validation = read_scenes(args.data / "val")
    held_out, coco = read_scenes(args.data / args.part)
    results = [
        runs.train(
            arm,
            seed,
            args.steps,
            args.epoch_steps,
            folder,
            detector.Detector,
            LEARNING_RATE,
            lambda start, seed=seed: runs.stream(training, seed, start),
            lambda model: evaluate(model, held_out, coco),
            validate=lambda model: {
                "val_ap": evaluate(model, *validation)["ap"]
            },
            monitor="val_ap",
        )
        for (arm, seed), folder in folders.items()
    ]
    compared = runs.differences(
        results,
        "ap",
        [(arm, base) for base, arm in itertools.combinations(args.arms, 2)],
    )
    print("\n" + runs.report(results, METRICS, compared, args.part), flush=True)
    poor = [
        f"{result['arm']} with seed {result['seed']}"
        for result in results
        if result["ap50"] < LEAST_AP50
    ]
    if poor:
        print(
            f"\nToo poor to be compared (AP50 below {LEAST_AP50}): "
            + ", ".join(poor)
        )

    # Draws one plain model, or else the first one, beside the most deformable
    # one.
    models = {
        arm: keras.saving.load_model(
            folders[arm, args.seeds[0]] / "model.keras", compile=False
        )
        for arm in dict.fromkeys((args.arms[0], args.arms[-1]))
    }
    images, truth = tf.nest.map_structure(
        lambda tensor: tensor.numpy(),
        held_out.batch(6).take(1).get_single_element(),
    )
    pictures.draw_detections(args.out / "detections.png", images, truth, models)
    written = ["metrics.json", "detections.png"]
    model = models[args.arms[-1]]
    if model.get_layer("head").deformable:
        pictures.draw_parts(args.out / "parts.png", images, truth, model)
        written.append("parts.png")
    export.export(model, coco["categories"], args.out / "saved_model")
    files = [
        args.data / args.part / "images" / image["file_name"]
        for image in coco["images"][:20]
    ]
    exported = try_export(model, args.out / "saved_model", coco, files)
    print(
        f"\n{args.arms[-1]} as a SavedModel in a fresh process: "
        f"{exported['detections']} boxes, which differ by at most "
        f"{exported['max_box_difference']:.2g} pixels, scores by at most "
        f"{exported['max_score_difference']:.2g}"
    )
    pixels = held_out.batch(100).take(1).get_single_element()[0].numpy()
    others = exports.export_all(
        model.detect,
        pixels,
        args.out,
        [kind for kind in args.formats if kind != "native"],
    )
    print(
        "and in other formats; differences relative to the largest, of labels "
        f"and valid the share that differs:\n\n{exports.report(others)}"
    )
    runs.write_metrics(
        args,
        results,
        compared,
        comparable=not poor,
        saved_model=exported,
        exports=others,
    )
    written += ["saved_model", *others]
    print(f"\nWritten to {args.out}: {', '.join(written)}")


def main() -> None:
    args = runs.parse_arguments(
        "Compare a plain detector with its deformable twins.",
        detector.ARMS,
        ("plain", "both"),
        steps=800,
        out="runs/detection",
    )
    runs.main(args, run)


if __name__ == "__main__":
    main()
