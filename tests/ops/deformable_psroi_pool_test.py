# SPDX-License-Identifier: Apache-2.0
"""Compares `deformable_psroi_pool` with OpenVINO; tests `count` and defaults.

Most tests of the op are shared by both pooling ops, `pooling_test.py`, or by
every op, `every_op_test.py`.
"""

import numpy as np
import oracles
import pytest
import roi_reference
import tensorflow as tf
from compare import assert_close, assert_equal
from every_op import PSROI_POOL
from operands import ROI_KINDS, draw_rois
from tolerances import POOLING

from tf_deform.ops import deformable_psroi_pool

FLOAT32 = POOLING["float32"]


def as_float32(*arrays):
    return [None if x is None else np.float32(x) for x in arrays]


def draw_square_call(seed: int) -> tuple[tuple, dict]:
    """Draws a call that OpenVINO can run: square sizes, finite, no padding."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 14, 2))
    batch, classes = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    pooled = int(rng.integers(1, 6))
    part = [None, *range(1, 7)][rng.integers(7)]
    attributes = dict(
        output_dim=classes * int(rng.integers(1, 5)),
        spatial_scale=float(rng.choice([1 / 16, 0.3, 1.0])),
        pooled_size=pooled,
        part_size=part,
        sample_per_part=int(rng.integers(1, 6)),
        trans_std=float(rng.choice([0.1, 0.25])),
    )
    channels = attributes["output_dim"] * pooled**2
    kinds = [k for k in ROI_KINDS if k not in ("padding", "not finite")]
    parts = part or pooled
    inputs = rng.normal(size=(batch, *size, channels))
    rois = draw_rois(rng, batch, size, attributes["spatial_scale"], 7, kinds)
    trans = rng.normal(size=(7, parts, parts, 2 * classes))
    if seed % 3 == 0:
        trans = None
    return as_float32(inputs, rois, trans), attributes


@pytest.mark.parametrize("seed", range(100, 140))
def test_op_and_reference_equal_openvino(seed):
    """Tests plain and displaced calls, classes, edges, other part sizes.

    Tests the reference, too, because other tests rely on it.
    """
    operands, attributes = draw_square_call(seed)
    expected = oracles.openvino_psroi_pool(*operands, **attributes)
    for function in (
        deformable_psroi_pool,
        roi_reference.deformable_psroi_pool,
    ):
        assert_close(
            function(*operands, **attributes),
            expected,
            FLOAT32,
            case=f"{function.__module__} {attributes}",
        )


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_other_groups_equal_openvino_on_repeated_channels(group_size):
    """Tests other groups.

    OpenVINO has a group for each bin, so it gets the channels bin by bin.
    """
    rng = np.random.default_rng(group_size)
    output_dim, pooled = 3, 4
    attributes = dict(
        output_dim=output_dim, spatial_scale=0.25, pooled_size=pooled
    )
    channels = output_dim * group_size**2
    inputs, rois, trans = as_float32(
        rng.normal(size=(2, 9, 7, channels)),
        draw_rois(rng, 2, (9, 7), 0.25, 6, ("inside", "across the edge")),
        rng.normal(size=(6, pooled, pooled, 2)),
    )
    cells = np.arange(pooled) * group_size // pooled
    grouped = inputs.reshape(2, 9, 7, output_dim, group_size, group_size)
    repeated = grouped[..., cells[:, np.newaxis], cells]
    assert_close(
        deformable_psroi_pool(
            inputs, rois, trans, group_size=group_size, **attributes
        ),
        oracles.openvino_psroi_pool(
            repeated.reshape(2, 9, 7, -1), rois, trans, **attributes
        ),
        FLOAT32,
    )


def test_equals_openvino_at_the_size_of_a_detector():
    """Tests 300 ROIs, 7x7 bins, 4x4 samples, 21 classes, a map of 38x63."""
    rng = np.random.default_rng(0)
    attributes = dict(
        output_dim=21, spatial_scale=1 / 16, pooled_size=7, trans_std=0.1
    )
    inputs, rois, trans = as_float32(
        rng.normal(size=(1, 38, 63, 21 * 49)),
        draw_rois(rng, 1, (38, 63), 1 / 16, 300, ("inside", "across the edge")),
        rng.normal(size=(300, 7, 7, 2)),
    )
    assert_close(
        deformable_psroi_pool(inputs, rois, trans, **attributes),
        oracles.openvino_psroi_pool(inputs, rois, trans, **attributes),
        FLOAT32,
    )


def test_count_only_on_request():
    """Tests that `count` is a second output, without gradient."""
    operands = {
        name: tf.constant(x) for name, x in PSROI_POOL.draw()[0].items()
    }
    sources = [operands["inputs"], operands["trans"]]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        output, count = deformable_psroi_pool(
            **operands, return_count=True, **PSROI_POOL.options
        )
    for gradient in tape.gradient(count, sources):
        assert gradient is None or not gradient.numpy().any()
    alone = deformable_psroi_pool(**operands, **PSROI_POOL.options)
    assert isinstance(alone, tf.Tensor)
    assert_equal(alone, output)
    assert count.shape == output.shape
    assert set(count.numpy().ravel()) <= {0, 1, 2, 3, 4}
    assert count.numpy().max() == 4


def test_default_sizes():
    """Tests that `group_size` and `part_size` are `pooled_size`.

    The number of samples is 4, the scale of displacements 0.1.
    """
    rng = np.random.default_rng(0)
    operands = (
        rng.normal(size=(1, 6, 7, 12)),
        np.array([[0, 1, 2, 5, 4.0]]),
        rng.normal(size=(1, 2, 3, 2)),
    )
    common = dict(output_dim=2, spatial_scale=0.7)
    assert_equal(
        deformable_psroi_pool(*operands, pooled_size=(2, 3), **common),
        deformable_psroi_pool(
            *operands,
            pooled_size=[np.int64(2), 3],
            group_size=(2, 3),
            part_size=(2, 3),
            sample_per_part=4,
            trans_std=0.1,
            **common,
        ),
    )
