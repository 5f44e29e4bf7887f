# SPDX-License-Identifier: Apache-2.0
"""Trains a small Deformable R-FCN of handwritten digits, and exports it.

    python examples/detection.py --out runs/detection
    python examples/detection.py --out runs/plain --plain

It composes scenes of digits, trains for 800 steps (some minutes), prints COCO's
average precision on unseen scenes, and leaves

    scenes/       images and boxes
    best.keras    the model of the epoch with the best number on val scenes
    last.keras    what a repeated call goes on from
    served/       a SavedModel: files of images of any size in, boxes in their
                  own pixels out
    model.onnx    arrays of 64 x 64 pixels in, boxes out

For your own photographs, point `data.read` at their annotations, and choose a
larger backbone, see docs/finetune.md.
"""

import argparse
import pathlib

import keras

import tf_deform
from tf_deform import data, demo, models, tasks, training

SIZE, BATCH, EPOCH = 64, 32, 100  # An epoch is 100 steps.


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a detector of digits.")
    parser.add_argument("--plain", action="store_true", help="no deformation")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default="runs/detection")
    args = parser.parse_args()

    scenes = demo.digit_scenes(args.out / "scenes")
    sources = [
        f"coco:{scenes}/{part}/instances.json,{scenes}/{part}/images"
        for part in ("train", "val", "test")
    ]
    train, val = map(data.read, sources[:2])

    keras.utils.set_random_seed(0)
    pooling = "plain" if args.plain else "deform"
    sizes = demo.digit_detector_sizes()
    model = models.RFCN(
        demo.digit_backbone(), 10, pooling, SIZE, train.classes, **sizes
    )
    if not args.plain:  # The model computes the same as before at first.
        tf_deform.make_deformable(model, layers="conv[45]$")
    adam = keras.optimizers.Adam(2e-3)
    model.compile(training.deformable_optimizer(adam))

    coco = training.CocoCallback(
        training.CocoEvaluator(val.to_coco()),
        lambda: models.predictions(model, val.photographs),
    )
    checkpoints = training.BestAndLast(args.out, "val_AP")
    start = checkpoints.restore(model)
    model.fit(
        data.detection_batches(train, SIZE, BATCH, augment=False, start=start),
        initial_epoch=checkpoints.epoch,
        epochs=args.epochs,
        steps_per_epoch=EPOCH,
        shuffle=False,  # The batches are shuffled already.
        callbacks=[coco, checkpoints],
    )

    best = args.out / "best.keras"
    found = tasks.evaluate(best, sources[2])
    print(f"On unseen scenes: AP {found['AP']:.3f}, AP50 {found['AP50']:.3f}")
    tasks.export_model(best, args.out / "served")
    tasks.export_model(best, args.out / "model.onnx")


if __name__ == "__main__":
    main()
