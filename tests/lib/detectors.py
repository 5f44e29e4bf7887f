# SPDX-License-Identifier: Apache-2.0
"""Makes small detectors, scenes of rectangles, and measures what is found."""

import keras
import numpy as np
import tensorflow as tf

from tf_deform.models import RFCN, FasterRCNN

SIZE = 64
COLOURS = np.float32([(230, 60, 60), (60, 60, 230)])
COMMON = {"image_size": SIZE, "proposals": 32, "max_detections": 10}


def make_backbone(first=2, last=4, width=8):
    """Makes a network whose map `P<level>` has a stride of 2 ** level."""
    image = keras.Input((None, None, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(image)
    maps = {}
    for level in range(1, last + 1):
        for name, strides in ((f"conv{level}", 2), (f"conv{level}b", 1)):
            if strides == 2 or level > 1:
                x = keras.layers.Conv2D(
                    width * level,
                    3,
                    strides=strides,
                    padding="same",
                    activation="relu",
                    kernel_initializer="he_normal",
                    name=name,
                )(x)
        if level >= first:
            maps[f"P{level}"] = x
    return keras.Model(image, maps, name="small")


def make_faster_rcnn(pooling="align", backbone=None, **arguments):
    arguments = {
        **COMMON,
        "fpn_channels": 16,
        "head_units": 32,
        "anchor_scales": (4,),
        "samples": 32,
        **arguments,
    }
    backbone = make_backbone() if backbone is None else backbone
    return FasterRCNN(backbone, 2, pooling, **arguments)


def make_rfcn(pooling="deform", backbone=None, **arguments):
    arguments = {
        **COMMON,
        "channels": 32,
        "bins": 3,
        "anchor_scales": (2, 3),
        "hard_examples": 16,
        **arguments,
    }
    backbone = make_backbone(3, 3) if backbone is None else backbone
    return RFCN(backbone, 2, pooling, **arguments)


def liven(model, scale=1.0):
    """Displaces samples and varies scores and boxes, as training would."""
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        path = weight.path
        if "offset" in path:
            spread = 0.1
        elif any(name in path for name in ("deltas", "head_boxes", "box_maps")):
            spread = 0.03
        elif any(name in path for name in ("objectness", "classes", "score_m")):
            spread = scale
        else:
            continue
        weight.assign(rng.normal(size=weight.shape, scale=spread))
    return model


def paint(height, width, boxes, labels, seed=0):
    """Paints rectangles on noise; returns uint8 RGB."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 130, (height, width, 3))
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[y1:y2, x1:x2] = COLOURS[label]
    return image.astype("uint8")


def make_scenes(count, seed=0, most=4):
    """Returns images, and boxes and labels of rectangles apart, padded."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE, 3), "float32")
    boxes = np.full((count, most, 4), -1, "float32")
    labels = np.full((count, most), -1, "int32")
    for row in range(count):
        found = []
        for _ in range(8 * rng.integers(1, most)):
            corner, side = rng.integers(0, 54, 2), rng.integers(10, 28, 2)
            box = np.concatenate([corner, corner + side])
            apart = [
                (box[2:] < other[:2]).any() or (other[2:] < box[:2]).any()
                for other in found
            ]
            if box.max() <= SIZE and all(apart) and len(found) < most - 1:
                found.append(box)
        ids = rng.integers(0, 2, len(found))
        images[row] = paint(SIZE, SIZE, found, ids, seed=row)
        boxes[row, : len(found)] = np.reshape(found, (-1, 4))
        labels[row, : len(found)] = ids
    return images, {"boxes": boxes, "labels": labels}


def train(model, steps, rate=2e-3, **options):
    """Trains a model on scenes, its offsets at a hundredth of the rate."""
    from tf_deform.training import deformable_optimizer

    images, objects = make_scenes(256)
    batches = tf.data.Dataset.from_tensor_slices((images, objects))
    batches = batches.shuffle(256, seed=1).batch(8, drop_remainder=True)
    optimizer = deformable_optimizer(keras.optimizers.Adam(rate), 0.01)
    model.compile(optimizer=optimizer, **options)
    model.fit(batches.repeat(), steps_per_epoch=steps, verbose=0)
    return model


def count_found(found, boxes, labels, min_score=0.5):
    """Returns how many objects are found, and how many detections are wrong."""
    likely = found["scores"] > min_score
    pairs = measure_overlaps(boxes, found["boxes"][likely]) > 0.5
    pairs &= np.asarray(labels)[:, None] == found["labels"][likely]
    right = pairs.any(1).sum()
    return int(right), int(likely.sum() - right)


def measure(model, count=32):
    """Returns shares of unseen objects: of found ones, of wrong detections."""
    images, objects = make_scenes(count, seed=9)
    found = model.detect(images)
    total = right = wrong = 0
    for row in range(count):
        real = objects["labels"][row] >= 0
        one = count_found(
            {name: value[row] for name, value in found.items()},
            objects["boxes"][row][real],
            objects["labels"][row][real],
        )
        total, right, wrong = total + real.sum(), right + one[0], wrong + one[1]
    return right / total, wrong / total


def measure_overlaps(boxes, others):
    """Returns intersection over union in float64; 0 for empty boxes."""
    boxes, others = (np.asarray(x, "float64") for x in (boxes, others))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    own, other = (
        np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (boxes, others)
    )
    union = own[:, None] + other - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
