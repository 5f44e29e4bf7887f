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
from tf_deform import data, demo, export, models, training

SIZE, BATCH, EPOCH = 64, 32, 100  # An epoch is 100 steps.


def detect(model: keras.Model, annotations: data.Annotations):
    """Yields the id of each image, and what is found in it."""
    for number, photograph in enumerate(annotations.photographs, start=1):
        image = data.read_image(photograph.path)
        yield number, model.predict_image(image)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a detector of digits.")
    parser.add_argument("--plain", action="store_true", help="no deformation")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="runs/detection")
    args = parser.parse_args()

    scenes = demo.digit_scenes(args.out / "scenes")
    train, val, test = (
        data.read(f"coco:{scenes}/{part}/instances.json,{scenes}/{part}/images")
        for part in ("train", "val", "test")
    )

    keras.utils.set_random_seed(args.seed)
    model = models.RFCN(
        demo.digit_backbone(),
        len(train.classes),
        "plain" if args.plain else "deform",
        SIZE,
        train.classes,
        seed=args.seed,
        **demo.digit_detector_sizes(),
    )
    if not args.plain:  # The model computes the same as before at first.
        tf_deform.make_deformable(model, layers="conv[45]$")
    optimizer = training.deformable_optimizer(keras.optimizers.Adam(2e-3))
    model.compile(optimizer)

    evaluator = training.CocoEvaluator(val.to_coco())
    checkpoints = training.BestAndLast(args.out, "val_AP")
    start = checkpoints.restore(model)
    model.fit(
        data.detection_batches(
            train, SIZE, BATCH, augment=False, seed=args.seed, start=start
        ),
        initial_epoch=checkpoints.epoch,
        epochs=-(-args.steps // EPOCH),
        steps_per_epoch=min(args.steps, EPOCH),
        shuffle=False,  # The batches are shuffled already.
        callbacks=[
            training.CocoCallback(evaluator, lambda: detect(model, val)),
            checkpoints,
        ],
    )

    model = keras.saving.load_model(args.out / "best.keras")
    result = training.CocoEvaluator(test.to_coco()).evaluate(
        detect(model, test)
    )
    print(f"On unseen scenes: AP {result['AP']:.3f}, AP50 {result['AP50']:.3f}")
    file = pathlib.Path(test.photographs[0].path).read_bytes()
    images = data.read_image(test.photographs[0].path)[None]
    export.saved_model(
        models.serving(model), args.out / "served", sample=[[file]]
    )
    export.onnx(model, args.out / "model.onnx", sample=images)


if __name__ == "__main__":
    main()
