# SPDX-License-Identifier: Apache-2.0
"""Compares `deformable_roi_align` with ONNX Runtime; tests defaults.

Most tests of the op are shared by both pooling ops, `pooling_test.py`, or by
every op, `every_op_test.py`.
"""

import numpy as np
import oracles
import pooling
import pytest
import roi_reference
from compare import assert_close, assert_equal
from every_op import ROI_ALIGN
from operands import ROI_KINDS, draw_rois
from tolerances import POOLING

from tf_deform.ops import deformable_roi_align


def draw_plain_call(seed: int) -> tuple[tuple, dict]:
    """Draws a call that ONNX Runtime can run: no padding, no displacement.

    Adaptive numbers of samples stay below our upper limit.
    """
    rng = np.random.default_rng(seed)
    ratio = int(rng.integers(0, 4))
    attributes = dict(
        pooled_size=tuple(int(n) for n in rng.integers(1, 6, 2)),
        # ONNX keeps the scale in float32.
        spatial_scale=float(np.float32(rng.choice([1 / 16, 0.3, 1.0]))),
        sampling_ratio=ratio,
    )
    unknown = {"padding", "not finite"}
    if ratio == 0:
        unknown.add("many maps wide")
    inputs, rois, *_ = pooling.ROI_ALIGN.draw(
        rng,
        attributes,
        batch=int(rng.integers(1, 4)),
        size=tuple(int(n) for n in rng.integers(1, 14, 2)),
        channels=int(rng.integers(1, 20)),
        num_rois=7,
        kinds=[k for k in ROI_KINDS if k not in unknown],
    )
    return (inputs, rois), attributes


def draw_detector(_) -> tuple[tuple, dict]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, 38, 63, 64))
    rois = draw_rois(
        rng, 1, (38, 63), 1 / 16, 200, ("inside", "across the edge")
    )
    return (inputs, rois), dict(pooled_size=7, spatial_scale=1 / 16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("draw_call", "seed"),
    [(draw_detector, 0), *((draw_plain_call, n) for n in range(100, 140))],
)
def test_equals_onnx_runtime(draw_call, seed, dtype):
    """Tests the reference, too, because other tests rely on it."""
    operands, attributes = draw_call(seed)
    operands = [x.astype(dtype) for x in operands]
    expected = oracles.onnx_runtime_roi_align(*operands, **attributes)
    functions = [deformable_roi_align, roi_reference.deformable_roi_align]
    if draw_call is draw_detector:  # The reference is slow.
        functions.pop()
    for function in functions:
        assert_close(
            function(*operands, **attributes),
            expected,
            POOLING[dtype],
            case=f"{function.__module__} {attributes}",
        )


def test_a_displacement_equals_a_moved_roi_of_onnx_runtime():
    """Tests a ROI of one bin, moved by `gamma * size * offset` map pixels."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 12, 13, 5))
    rois = draw_rois(rng, 2, (12, 13), 0.25, 9, ("inside",))
    offset = rng.uniform(-2, 2, (9, 1, 1, 2))
    options = dict(pooled_size=1, spatial_scale=0.25, sampling_ratio=3)
    size = rois[:, 3:] - rois[:, 1:3]
    shift = 0.15 * size * offset[:, 0, 0, ::-1]
    moved = rois + np.concatenate([0 * shift[:, :1], shift, shift], axis=1)
    assert_close(
        deformable_roi_align(inputs, rois, offset, gamma=0.15, **options),
        oracles.onnx_runtime_roi_align(inputs, moved, **options),
        POOLING["float64"],
    )


def test_defaults():
    """Tests an adaptive number of samples, and a gamma of 0.1."""
    inputs, rois, offset = ROI_ALIGN.draw()[0].values()
    assert_equal(
        deformable_roi_align(
            inputs, rois, offset, pooled_size=(3, 4), spatial_scale=0.5
        ),
        deformable_roi_align(
            inputs,
            rois,
            offset,
            pooled_size=[np.int64(3), 4],
            spatial_scale=0.5,
            sampling_ratio=-1,
            gamma=0.1,
        ),
    )
