# SPDX-License-Identifier: Apache-2.0
"""Compares `deformable_psroi_pool` with OpenVINO; tests `count` and defaults.

Most tests of the op are shared by both pooling ops, `pooling_test.py`, or by
every op, `every_op_test.py`.
"""

import numpy as np
import oracles
import pooling
import pytest
import roi_reference
import tensorflow as tf
from compare import assert_close, assert_equal
from every_op import PSROI_POOL
from operands import ROI_KINDS
from tolerances import POOLING

from tf_deform.ops import deformable_psroi_pool

FLOAT32 = POOLING["float32"]


INSIDE = ("inside", "across the edge")


def draw(rng, attributes, **sizes):
    """Returns inputs, ROIs and displacements in float32."""
    drawn = pooling.PSROI_POOL.draw(rng, attributes, **sizes)
    return [np.float32(x) for x in drawn[:3]]


def draw_square_call(seed: int) -> tuple[list, dict]:
    """Draws a call that OpenVINO can run: square sizes, finite, no padding."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 4))
    attributes = dict(
        output_dim=classes * int(rng.integers(1, 5)),
        spatial_scale=float(rng.choice([1 / 16, 0.3, 1.0])),
        pooled_size=int(rng.integers(1, 6)),
        part_size=[None, *range(1, 7)][rng.integers(7)],
        sample_per_part=int(rng.integers(1, 6)),
        trans_std=float(rng.choice([0.1, 0.25])),
    )
    inputs, rois, trans = draw(
        rng,
        attributes,
        batch=int(rng.integers(1, 4)),
        size=tuple(int(n) for n in rng.integers(1, 14, 2)),
        num_rois=7,
        kinds=[k for k in ROI_KINDS if k not in ("padding", "not finite")],
        classes=classes,
    )
    return [inputs, rois, trans if seed % 3 else None], attributes


def draw_detector(_) -> tuple[list, dict]:
    """Draws 300 ROIs, 7x7 bins, 4x4 samples, 21 classes, a map of 38x63."""
    attributes = dict(
        output_dim=21, spatial_scale=1 / 16, pooled_size=7, trans_std=0.1
    )
    sizes = dict(batch=1, size=(38, 63), num_rois=300, kinds=INSIDE)
    return draw(np.random.default_rng(0), attributes, **sizes), attributes


@pytest.mark.parametrize(
    ("draw_call", "seed"),
    [(draw_detector, 0), *((draw_square_call, n) for n in range(100, 140))],
)
def test_equals_openvino(draw_call, seed):
    """Tests plain and displaced calls, classes, edges, other part sizes.

    Tests the reference, too, because other tests rely on it.
    """
    operands, attributes = draw_call(seed)
    expected = oracles.openvino_psroi_pool(*operands, **attributes)
    functions = [deformable_psroi_pool, roi_reference.deformable_psroi_pool]
    if draw_call is draw_detector:  # The reference is slow.
        functions.pop()
    for function in functions:
        assert_close(
            function(*operands, **attributes),
            expected,
            POOLING["float32"],
            case=f"{function.__module__} {attributes}",
        )


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_other_groups_equal_openvino_on_repeated_channels(group_size):
    """Tests other groups.

    OpenVINO has a group for each bin, so it gets the channels bin by bin.
    """
    bins = dict(output_dim=3, spatial_scale=0.25, pooled_size=4)
    group = dict(group_size=group_size)
    inputs, rois, trans = draw(
        np.random.default_rng(group_size),
        {**bins, **group},
        size=(9, 7),
        num_rois=6,
        kinds=INSIDE,
    )
    cells = np.arange(4) * group_size // 4
    grouped = inputs.reshape(2, 9, 7, 3, group_size, group_size)
    repeated = grouped[..., cells[:, np.newaxis], cells].reshape(2, 9, 7, -1)
    assert_close(
        deformable_psroi_pool(inputs, rois, trans, **group, **bins),
        oracles.openvino_psroi_pool(repeated, rois, trans, **bins),
        POOLING["float32"],
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
