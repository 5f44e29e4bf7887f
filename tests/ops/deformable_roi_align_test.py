# SPDX-License-Identifier: Apache-2.0
"""Compares `deformable_roi_align` with ONNX Runtime; tests defaults.

Most tests of the op are shared by both pooling ops, `pooling_test.py`, or by
every op, `every_op_test.py`.
"""

import numpy as np
import oracles
import pytest
import roi_reference
from compare import assert_close, assert_equal
from every_op import ROI_ALIGN
from operands import ROI_KINDS, draw_rois
from tolerances import POOLING

from tf_deform.ops import deformable_roi_align


def draw_plain_call(seed: int, dtype: str) -> tuple[list, dict]:
    """Draws a call that ONNX Runtime can run: no padding, no displacement.

    Adaptive numbers of samples stay below our upper limit.
    """
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 14, 2))
    batch, ratio = int(rng.integers(1, 4)), int(rng.integers(0, 4))
    attributes = dict(
        pooled_size=tuple(int(n) for n in rng.integers(1, 6, 2)),
        # ONNX keeps the scale in float32.
        spatial_scale=float(np.float32(rng.choice([1 / 16, 0.3, 1.0]))),
        sampling_ratio=ratio,
    )
    unknown = {"padding", "not finite"}
    if ratio == 0:
        unknown.add("many maps wide")
    kinds = [k for k in ROI_KINDS if k not in unknown]
    operands = (
        rng.normal(size=(batch, *size, int(rng.integers(1, 20)))),
        draw_rois(rng, batch, size, attributes["spatial_scale"], 7, kinds),
    )
    return [x.astype(dtype) for x in operands], attributes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(100, 140))
def test_op_and_reference_equal_onnx_runtime(seed, dtype):
    """Tests the reference, too, because other tests rely on it."""
    operands, attributes = draw_plain_call(seed, dtype)
    expected = oracles.onnx_runtime_roi_align(*operands, **attributes)
    for function in (deformable_roi_align, roi_reference.deformable_roi_align):
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


def test_equals_onnx_runtime_at_the_size_of_a_detector():
    rng = np.random.default_rng(0)
    options = dict(pooled_size=7, spatial_scale=1 / 16)
    kinds = ("inside", "across the edge")
    inputs = np.float32(rng.normal(size=(1, 38, 63, 64)))
    rois = np.float32(draw_rois(rng, 1, (38, 63), 1 / 16, 200, kinds))
    assert_close(
        deformable_roi_align(inputs, rois, **options),
        oracles.onnx_runtime_roi_align(inputs, rois, **options),
        POOLING["float32"],
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
