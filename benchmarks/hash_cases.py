# SPDX-License-Identifier: Apache-2.0
"""Lists the cases of `hash_results.py`: shapes, attributes, operands.

`CHOSEN` has every size at which a kernel changes its method: blocks, vectors of
all instruction sets, strips, windows, repacked images. A new block or switch
needs a case there. All other cases are random with fixed seeds.
"""

import functools
import math
import zlib
from typing import Any

import numpy as np

RANDOM_CASES = 60
OPS = ("conv2d", "psroi_pool", "roi_align")
# These operands have gradients, in the order of the functions' arguments.
DIFFERENTIABLE = {
    "conv2d": ("inputs", "kernel", "offset", "mask"),
    "psroi_pool": ("inputs", "trans"),
    "roi_align": ("inputs", "offset"),
}


def pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def conv_output(case: dict) -> tuple[int, int]:
    """Returns the height and width of the output of a convolution."""
    padding = case["attributes"].get("padding", "valid")
    result = []
    for axis in range(2):
        size, taps = case["inputs"][1 + axis], case["kernel"][axis]
        stride = pair(case["attributes"].get("strides", 1))[axis]
        rate = pair(case["attributes"].get("dilation_rate", 1))[axis]
        if padding == "same":
            result.append(-(-size // stride))
            continue
        pixels = 0 if padding == "valid" else pair(padding)[axis]
        size += sum(pair(pixels)) - rate * (taps - 1) - 1
        result.append(size // stride + 1)
    return tuple(result)


def conv(
    inputs: tuple,
    kernel: tuple,
    groups: int = 1,
    *,
    mask: bool = True,
    spread: float = 1.5,
    **attributes: Any,
) -> dict:
    """Describes a convolution; offsets are `spread` times normal numbers.

    `inputs` is (batch, height, width, channels), `kernel` is (kernel_h,
    kernel_w, filters).
    """
    *size, filters = kernel
    return dict(
        op="conv2d",
        inputs=inputs,
        kernel=(*size, inputs[3] // groups, filters),
        mask=mask,
        spread=spread,
        attributes=attributes,
    )


def psroi(
    inputs: tuple,
    rois: int,
    classes: int,
    class_channels: int,
    *,
    spread: float = 1,
    **attributes: Any,
) -> dict:
    """Describes PS-ROI pooling of maps (batch, height, width).

    Without classes (0) there is no `trans`.
    """
    output_dim = max(classes, 1) * class_channels
    attributes = {"output_dim": output_dim, "spatial_scale": 0.5} | attributes
    cells = attributes.get("group_size", attributes["pooled_size"])
    return dict(
        op="psroi_pool",
        inputs=(*inputs, output_dim * math.prod(pair(cells))),
        rois=rois,
        fields=(
            *pair(attributes.get("part_size", attributes["pooled_size"])),
            2 * classes,
        ),
        channels=output_dim,
        spread=spread,
        attributes=attributes,
    )


def align(
    inputs: tuple,
    rois: int,
    *,
    displaced: bool = True,
    spread: float = 1,
    **attributes: Any,
) -> dict:
    """Describes ROIAlign of maps (batch, height, width, channels)."""
    attributes = {"spatial_scale": 0.5} | attributes
    return dict(
        op="roi_align",
        inputs=inputs,
        rois=rois,
        fields=(*pair(attributes["pooled_size"]), 2 * displaced),
        channels=inputs[3],
        spread=spread,
        attributes=attributes,
    )


# Lists sizes around every block, vector and switch of the kernels.
CHOSEN = [
    # Rows of the columns: blocks of 256, the rows that a pixel may defer,
    # pieces.
    *(conv((1, 3, 5, n), (1, 1, 7)) for n in (255, 256, 257)),
    *(conv((2, 4, 3, n), (3, 2, 5), mask=False) for n in (31, 43, 86)),
    # Filters: vectors and panels of all types and instruction sets, 1024.
    *(
        conv((1, 3, 4, 2), (2, 1, n))
        for n in (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
    ),
    *(conv((1, 2, 3, 3), (1, 2, n)) for n in (129, 257, 1023, 1025)),
    # Pixels: micro rows, tiles of 108, 112, 128, 256, 480 and 504.
    *(
        conv((1, 1, n, 3), (1, 1, 4))
        for n in (5, 6, 7, 13, 14, 15, 107, 108, 109, 112, 113, 127, 128, 129)
    ),
    *(
        conv((1, 1, n, 3), (1, 1, 4))
        for n in (255, 256, 257, 479, 481, 503, 505, 511, 513, 1025)
    ),
    # Few pixels and many filters: workers share the filters.
    conv((1, 3, 3, 64), (3, 3, 160), padding="same"),
    # Strips, with samples far away, which are deferred until no room is left.
    conv((1, 40, 36, 33), (3, 3, 8), spread=20, padding="same"),
    conv((1, 90, 70, 32), (3, 3, 4), spread=40, padding="same"),
    conv((2, 57, 8, 20), (3, 3, 17), spread=3, padding="same"),
    conv((5, 9, 8, 16), (3, 3, 12), padding="same", boundary="clamp"),
    conv((65, 4, 3, 9), (2, 2, 11), strides=(1, 2)),
    # The kernel's gradient in the same pass as others, and in a pass of its
    # own.
    conv((4, 8, 9, 24), (3, 3, 256), padding="same", mask=False),
    conv((4, 8, 9, 24), (3, 3, 257), padding="same", mask=False),
    conv((2, 12, 11, 96), (3, 3, 80), padding="same"),
    # Groups: depthwise, with two filters each, pieces, bundles, bfloat16's
    # bundles.
    conv((2, 9, 7, 24), (3, 3, 24), 24, padding="same", offset_groups=3),
    conv((1, 30, 29, 8), (3, 3, 16), 8, padding="same", spread=6),
    conv((2, 7, 8, 12), (3, 2, 18), 3, offset_groups=2),
    conv((1, 5, 4, 16), (2, 2, 1600), 8, offset_groups=4),
    conv((1, 9, 8, 64), (3, 3, 64), 2, padding="same", boundary="clamp"),
    conv((1, 5, 4, 600), (1, 1, 8), 2, offset_groups=3),
    conv((1, 3, 300, 48), (3, 3, 48), 48, padding="same"),
    # Pooling. Windows of 16 taps and more, wide steps, one sample.
    *(
        psroi((1, 40, 37), 9, 1, 5, pooled_size=n, sample_per_part=m)
        for n, m in ((1, 4), (1, 40), (2, 8), (2, 9), (3, 1))
    ),
    *(
        align((1, 40, 37, 5), 9, pooled_size=n, sampling_ratio=m)
        for n, m in ((1, 0), (1, 40), (2, 16), ((2, 3), 1), (4, 0))
    ),
    # Narrow classes, one or a few in a lane; pooling without displacements.
    *(
        psroi((2, 9, 8), 7, classes, each, pooled_size=3, group_size=2)
        for classes, each in ((21, 1), (9, 3), (5, 8), (3, 17), (1, 33), (0, 9))
    ),
    # Repacked in several runs; channels around a block; many ROIs and bins.
    psroi((5, 24, 40), 20, 1, 7, pooled_size=7, part_size=3),
    psroi((2, 6, 5), 40, 3, 4, pooled_size=(3, 5), group_size=1, part_size=2),
    *(
        align((2, 7, 9, n), 5, pooled_size=(2, 3))
        for n in (1, 2, 15, 16, 17, 127, 128, 129, 260)
    ),
    align((3, 12, 10, 64), 66, pooled_size=7, sampling_ratio=2),
    align((1, 20, 24, 24), 33, displaced=False, pooled_size=4),
    # Empty batches, no regions.
    conv((0, 5, 4, 3), (3, 2, 5)),
    psroi((1, 5, 4), 0, 2, 3, pooled_size=2),
    align((1, 5, 4, 3), 0, pooled_size=2),
]


def random_conv(rng: np.random.Generator) -> dict:
    while True:
        groups = int(rng.choice([1, 1, 1, 2, 3, 6]))
        offset_groups = int(rng.choice([1, 1, 2, 3]))
        channels = int(rng.integers(1, 4)) * math.lcm(groups, offset_groups)
        pads = rng.integers(0, 4, 4).tolist()
        padding = [
            "valid",
            "same",
            pads[0],
            tuple(pads[:2]),
            ((pads[0], pads[1]), (pads[2], pads[3])),
        ][rng.integers(5)]
        case = conv(
            (*rng.integers([1, 1, 1], [4, 14, 14]).tolist(), channels),
            (
                *rng.integers(1, 5, 2).tolist(),
                groups * int(rng.integers(1, 14)),
            ),
            groups,
            mask=bool(rng.integers(2)),
            spread=float(rng.choice([0, 0.3, 2, 8])),
            strides=tuple(rng.integers(1, 4, 2).tolist()),
            padding=padding,
            dilation_rate=tuple(rng.integers(1, 4, 2).tolist()),
            offset_groups=offset_groups,
            boundary=["zeros", "clamp"][rng.integers(2)],
        )
        if min(conv_output(case)) > 0:
            return case


def random_psroi(rng: np.random.Generator) -> dict:
    pooled = tuple(rng.integers(1, 6, 2).tolist())
    return psroi(
        tuple(rng.integers([1, 1, 1], [4, 14, 14]).tolist()),
        int(rng.integers(1, 12)),
        int(rng.choice([0, 1, 2, 5])),
        int(rng.integers(1, 10)),
        spread=float(rng.choice([0.3, 2, 8])),
        pooled_size=pooled,
        group_size=tuple(int(rng.integers(1, n + 1)) for n in pooled),
        part_size=tuple(int(rng.integers(1, n + 1)) for n in pooled),
        sample_per_part=int(rng.integers(1, 7)),
        trans_std=float(rng.choice([0.1, 0.3])),
        spatial_scale=float(rng.choice([0.25, 0.6, 1])),
    )


def random_align(rng: np.random.Generator) -> dict:
    return align(
        tuple(rng.integers([1, 1, 1, 1], [4, 14, 14, 40]).tolist()),
        int(rng.integers(1, 12)),
        displaced=bool(rng.integers(4)),
        spread=float(rng.choice([0.3, 2, 8])),
        pooled_size=tuple(rng.integers(1, 6, 2).tolist()),
        sampling_ratio=int(rng.integers(-1, 6)),
        gamma=float(rng.choice([0.1, 0.5])),
        spatial_scale=float(rng.choice([0.25, 0.6, 1])),
    )


@functools.cache
def cases() -> dict[str, dict]:
    """Returns all cases by name: the op, its shapes and attributes."""
    made = list(CHOSEN)
    for number, make in enumerate((random_conv, random_psroi, random_align)):
        rng = np.random.default_rng(number)
        made += [make(rng) for _ in range(RANDOM_CASES)]
    named = {}
    for case in sorted(made, key=lambda case: OPS.index(case["op"])):
        words = "x".join(map(str, case["inputs"]))
        for name, value in case.items():
            if name not in ("op", "inputs", "attributes", "channels"):
                words += f",{name}={value}"
        for name, value in case["attributes"].items():
            words += f",{name}={value}"
        # Names have no numbers, so that a new case changes no name, and no
        # operand.
        named[f"{case['op']}/{words.replace(' ', '')}"] = case
    assert len(named) == len(made)
    return named


def is_chosen(name: str) -> bool:
    """Returns whether the case is in the eighth that represents all cases."""
    return zlib.crc32(name.encode()) % 8 == 0


def work_of(case: dict) -> int:
    """Returns about the number of multiplications of the case."""
    if case["op"] != "conv2d":
        samples = case["attributes"].get("sample_per_part", 4)
        bins = math.prod(pair(case["attributes"]["pooled_size"]))
        return case["rois"] * bins * case["channels"] * samples**2
    output = math.prod(conv_output(case))
    return case["inputs"][0] * output * math.prod(case["kernel"])


@functools.lru_cache(maxsize=1)
def operands(name: str) -> dict[str, np.ndarray]:
    """Makes the operands and the output's gradient, in float64."""
    case = cases()[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    batch, height, width, _ = case["inputs"]
    made = {"inputs": rng.normal(size=case["inputs"])}
    if case["op"] == "conv2d":
        made["kernel"] = rng.normal(size=case["kernel"])
        shape = (batch, *conv_output(case))
        taps = math.prod(case["kernel"][:2])
        taps *= case["attributes"].get("offset_groups", 1)
        offset = case["spread"] * rng.normal(size=(*shape, 2 * taps))
        some = rng.random(offset.shape)
        offset[some < 0.1] = np.round(offset[some < 0.1])
        offset[some > 0.99] = np.inf
        offset[some > 0.995] = np.nan
        made["offset"] = offset
        if case["mask"]:
            mask = rng.normal(size=(*shape, taps))
            # A sample outside is 0 under any mask, so the mask may be NaN
            # there.
            mask[np.isnan(offset[..., ::2])] = np.nan
            made["mask"] = mask
        shape = (*shape, case["kernel"][3])
    else:
        made["rois"] = random_rois(rng, case)
        *parts, pairs = case["fields"]
        if pairs:
            moved = rng.normal(size=(case["rois"], *parts, pairs))
            some = rng.random(moved.shape)
            moved = np.where(some < 0.1, 0, case["spread"] * moved)
            moved[some > 0.98] = np.nan
            made[DIFFERENTIABLE[case["op"]][1]] = moved
        shape = (case["rois"], *pair(case["attributes"]["pooled_size"]))
        shape = (*shape, case["channels"])
    made["grad_output"] = rng.normal(size=shape)
    return made


def random_rois(rng: np.random.Generator, case: dict) -> np.ndarray:
    """Makes regions inside and outside of images, infinite, and padding."""
    count, (batch, height, width, _) = case["rois"], case["inputs"]
    scale = case["attributes"]["spatial_scale"]
    size = np.array([width, height, width, height]) / scale
    corners = rng.uniform(-0.3, 1.3, (count, 4)) * size
    if case["op"] == "psroi_pool" or rng.integers(2):
        corners = np.concatenate(
            [
                np.minimum(corners[:, :2], corners[:, 2:]),
                np.maximum(corners[:, :2], corners[:, 2:]),
            ],
            axis=1,
        )
    some = rng.random(count)
    corners[some < 0.3] = np.round(corners[some < 0.3] * 2) / 2
    corners[some > 0.93, 2] = np.inf
    image = rng.integers(0, batch, (count, 1)).astype(float)
    image[some > 0.97] = -1
    return np.concatenate([image, corners], axis=1)


# Lists the class, its arguments, and the shapes of the call's operands; ROIs
# have the shape (count,).
LAYERS: list[tuple[str, dict, dict]] = [
    (
        "DeformableConv2D",
        dict(filters=6, kernel_size=3, padding="same"),
        dict(inputs=(2, 9, 8, 4)),
    ),
    (
        "DeformableConv2D",
        dict(
            filters=8,
            kernel_size=(3, 2),
            strides=2,
            padding="same",
            groups=2,
            offset_groups=2,
            modulation="sigmoid",
            activation="relu",
            offset_dilation_rate=2,
        ),
        dict(inputs=(1, 11, 12, 4)),
    ),
    (
        "DeformableConv2D",
        dict(
            filters=5,
            kernel_size=3,
            padding=((1, 2), (0, 3)),
            dilation_rate=(2, 1),
            modulation="2sigmoid",
            boundary="clamp",
            use_bias=False,
            data_format="channels_first",
            offset_dilation_rate=3,
        ),
        dict(inputs=(2, 3, 12, 9)),
    ),
    (
        "DeformableConv2D",
        dict(filters=4, kernel_size=2, offset_groups=3),
        dict(
            inputs=(2, 5, 6, 3), offset=(2, 4, 5, 24), modulator=(2, 4, 5, 12)
        ),
    ),
    (
        "DeformablePSROIPooling",
        dict(
            output_dim=6,
            pooled_size=(3, 2),
            spatial_scale=0.5,
            part_size=2,
            num_classes=3,
        ),
        dict(inputs=(2, 9, 8, 36), rois=(9,), trans_inputs=(2, 9, 8, 5)),
    ),
    (
        "DeformablePSROIPooling",
        dict(
            output_dim=2,
            pooled_size=3,
            spatial_scale=1.0,
            group_size=1,
            sample_per_part=2,
            data_format="channels_first",
        ),
        dict(inputs=(2, 2, 9, 8), rois=(5,), trans=(5, 2, 3, 3)),
    ),
    (
        "DeformableROIPooling",
        dict(pooled_size=3, spatial_scale=0.5, units=(7,), trans_std=0.3),
        dict(inputs=(2, 9, 8, 5), rois=(9,)),
    ),
    (
        "DeformableROIAlign",
        dict(pooled_size=(2, 3), spatial_scale=0.5, gamma=0.4),
        dict(inputs=(2, 9, 8, 5), rois=(9,)),
    ),
    (
        "DeformableROIAlign",
        dict(
            pooled_size=2,
            spatial_scale=1.0,
            sampling_ratio=3,
            units=(6, 5),
            data_format="channels_first",
        ),
        dict(inputs=(2, 5, 9, 8), rois=(9,)),
    ),
]
