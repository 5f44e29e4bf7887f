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
    model.onnx    arrays of 64 x 64 pixels in, logits out

For your own photographs, point `data.read` at their folders of images and
masks, and choose a larger backbone, see docs/finetune.md.
"""

import argparse
import functools
import pathlib

import keras

import tf_deform
from tf_deform import data, demo, export, models, training

SIZE, CLASSES, BATCH, EPOCH = 64, 11, 32, 100  # An epoch is 100 steps.


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a segmenter of digits.")
    parser.add_argument("--plain", action="store_true", help="no deformation")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="runs/segmentation")
    args = parser.parse_args()

    scenes = demo.digit_scenes(args.out / "scenes")
    train, val, test = (
        data.read(f"masks:{scenes}/{part}/images,{scenes}/{part}/masks")
        for part in ("train", "val", "test")
    )
    batches = functools.partial(
        data.segmentation_batches, size=SIZE, batch_size=BATCH, augment=False
    )

    keras.utils.set_random_seed(args.seed)
    model = models.Segmenter(
        demo.digit_backbone(),
        CLASSES,
        output_stride=4,
        image_size=SIZE,
        filters=48,
    )
    if not args.plain:  # The model computes the same as before at first.
        tf_deform.make_deformable(model, layers="conv[45]$")
    optimizer = training.deformable_optimizer(keras.optimizers.Adam(2e-3))
    mean_iou = training.MeanIoU(CLASSES, sparse_y_pred=False)
    model.compile(optimizer, metrics=[mean_iou])

    checkpoints = training.BestAndLast(args.out, "val_mean_iou")
    start = checkpoints.restore(model)
    model.fit(
        batches(train, seed=args.seed, start=start),
        initial_epoch=checkpoints.epoch,
        epochs=-(-args.steps // EPOCH),
        steps_per_epoch=min(args.steps, EPOCH),
        shuffle=False,  # The batches are shuffled already.
        validation_data=batches(val, shuffle=False),
        validation_steps=len(val.photographs) // BATCH,
        callbacks=[checkpoints],
    )

    model = keras.saving.load_model(args.out / "best.keras")
    result = model.evaluate(
        batches(test, shuffle=False),
        steps=len(test.photographs) // BATCH,
        return_dict=True,
    )
    print(f"mIoU on unseen scenes: {result['mean_iou']:.3f}")
    file = pathlib.Path(test.photographs[0].path).read_bytes()
    images = data.read_image(test.photographs[0].path)[None]
    export.saved_model(
        models.serving(model), args.out / "served", sample=[[file]]
    )
    export.onnx(model, args.out / "model.onnx", sample=images)


if __name__ == "__main__":
    main()
