# SPDX-License-Identifier: Apache-2.0
"""Compares `deformable_roi_align` with ONNX Runtime; tests defaults.

Most tests of the op are shared by both pooling ops, `pooling_test.py`, or by
every op, `every_op_test.py`.
"""

import full_calls
import numpy as np
import oracles
import pytest
import roi_reference
from compare import assert_close, assert_equal
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


# Tests of the reference itself, on which other tests rely.


@pytest.mark.parametrize("seed", range(20))
def test_reference_equals_onnx_runtime_in_float64(seed):
    operands, attributes = draw_plain_call(seed, "float64")
    assert_close(
        oracles.onnx_runtime_roi_align(*operands, **attributes),
        roi_reference.deformable_roi_align(*operands, **attributes),
        POOLING["float64"],
        case=attributes,
    )


# The forward pass against another implementation.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(100, 140))
def test_without_displacement_equals_onnx_runtime(seed, dtype):
    operands, attributes = draw_plain_call(seed, dtype)
    assert_close(
        deformable_roi_align(*operands, **attributes),
        oracles.onnx_runtime_roi_align(*operands, **attributes),
        POOLING[dtype],
        case=attributes,
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
    inputs, rois, offset = full_calls.ROI_ALIGN.draw()[0].values()
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
    assert_equal(
        deformable_roi_align(inputs, rois, pooled_size=3, spatial_scale=1),
        deformable_roi_align(inputs, rois, pooled_size=(3, 3), spatial_scale=1),
    )


@pytest.mark.parametrize("scale, gamma", [(0.1, 0.3), (0.7, 1e-9)])
def test_options_are_not_rounded_for_float64(scale, gamma):
    """Tests the scale 0.1, which float32 cannot hold exactly."""
    output = deformable_roi_align(
        np.arange(200.0).reshape(1, 1, 200, 1),
        np.array([[0, 150, 0, 153, 1.0]]),
        np.array([[[[0.0, 1.0]]]]),
        spatial_scale=scale,
        pooled_size=1,
        sampling_ratio=1,
        gamma=gamma,
    )
    expected = 151.5 * scale - 0.5 + gamma * 3 * scale
    assert_close(output, np.full((1, 1, 1, 1), expected), 1e-12)
