# SPDX-License-Identifier: Apache-2.0
"""Trains a small segmenter of handwritten digits, and exports it.

    python examples/segmentation.py --out runs/segmentation
    python examples/segmentation.py --out runs/plain --plain

It composes scenes of digits, trains for 800 steps (some minutes), prints the
mean intersection over union of the 11 classes on unseen scenes, and leaves

    scenes/       images and masks
    best.keras    the model of the epoch with the best number on val scenes
    last.keras    what a repeated call goes on from
    served/       a SavedModel: files of images of any size in, class ids out
    model.onnx    arrays of 64 x 64 pixels in, class ids out

For your own photographs, point `data.read` at their folders of images and
masks, and choose a larger backbone, see docs/finetune.md.
"""

import argparse
import functools
import pathlib

import keras

import tf_deform
from tf_deform import data, demo, models, tasks, training

SIZE, BATCH, EPOCH = 64, 32, 100  # An epoch is 100 steps.


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a segmenter of digits.")
    parser.add_argument("--plain", action="store_true", help="no deformation")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default="runs/segmentation")
    args = parser.parse_args()

    scenes = demo.digit_scenes(args.out / "scenes")
    sources = [
        f"masks:{scenes}/{part}/images,{scenes}/{part}/masks"
        for part in ("train", "val", "test")
    ]
    train, val = map(data.read, sources[:2])
    batches = functools.partial(
        data.segmentation_batches, size=SIZE, batch_size=BATCH, augment=False
    )

    keras.utils.set_random_seed(0)
    model = models.Segmenter(
        demo.digit_backbone(), 11, 4, image_size=SIZE, filters=48
    )
    if not args.plain:  # The model computes the same as before at first.
        tf_deform.make_deformable(model, layers="conv[45]$")
    adam = keras.optimizers.Adam(2e-3)
    mean_iou = training.MeanIoU(11, sparse_y_pred=False)
    model.compile(training.deformable_optimizer(adam), metrics=[mean_iou])

    checkpoints = training.BestAndLast(args.out, "val_mean_iou")
    start = checkpoints.restore(model)
    model.fit(
        batches(train, start=start),
        initial_epoch=checkpoints.epoch,
        epochs=args.epochs,
        steps_per_epoch=EPOCH,
        shuffle=False,  # The batches are shuffled already.
        validation_data=batches(val, shuffle=False),
        validation_steps=len(val.photographs) // BATCH,
        callbacks=[checkpoints],
    )

    best = args.out / "best.keras"
    found = tasks.evaluate(best, sources[2])
    print(f"mIoU on unseen scenes: {found['mIoU']:.3f}")
    tasks.export_model(best, args.out / "served")
    tasks.export_model(best, args.out / "model.onnx")


if __name__ == "__main__":
    main()
