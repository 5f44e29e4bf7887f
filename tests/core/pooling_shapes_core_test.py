# SPDX-License-Identifier: Apache-2.0
"""Tests how the core judges shapes and attributes of both pooling ops."""

import re

import core
import numpy as np
import pooling
import pytest
from pooling import PSROI_POOL, ROI_ALIGN

# Judging shapes and attributes. A change to None means that the call is good.
BAD_REALS = [-0.5, np.nan, np.inf]
BAD = [
    *[
        (op, change, text)
        for op in pooling.OPS
        for change, text in [
            (dict(inputs=(2, 8, 9)), "`inputs`"),
            (dict(inputs=(1, 2, 8, 9, 36)), "`inputs`"),
            (dict(inputs=(1, 2, 8, 9, 6)), "`inputs`"),
            (dict(rois=(5, 4)), "`rois`"),
            (dict(rois=(None, 6)), "`rois`"),
            (dict(rois=(5,)), "`rois`"),
            (dict(rois=(1, 5, 5)), "`rois`"),
            (dict(grad_output=(5, 3, 4, 5)), "`grad_output`"),
            (dict(grad_output=(5, 4, 3, 6)), "`grad_output`"),
            (dict(grad_output=(4, 3, 4, 6)), "`grad_output`"),
            (dict(grad_output=(5, 3, 24)), "`grad_output`"),
            (dict(pooled_size=(0, 4)), "pooled_size"),
            (dict(pooled_size=(3, -1)), "pooled_size"),
            (dict(spatial_scale=0.0), "spatial_scale"),
            *[(dict(spatial_scale=v), "spatial_scale") for v in BAD_REALS],
            # Products that 64 bits cannot hold.
            (dict(pooled_size=2**24, rois=(2**20, 5), displacement=None), ""),
            (dict(rois=(2**62, 5), displacement=None), ""),
            # Good calls.
            (dict(), None),
            (dict(displacement=None), None),
            (dict(inputs=None, rois=None, displacement=None), None),
            (
                dict(
                    inputs=(None,) * 4,
                    rois=(None, 5),
                    displacement=(None,) * 4,
                ),
                None,
            ),
            (dict(grad_output=(5, 3, 4, 6)), None),
        ]
    ],
    *[
        (PSROI_POOL, change, text)
        for change, text in [
            (dict(inputs=(2, 8, 9, 35)), "36"),
            (dict(inputs=(None, None, None, 37)), "36"),
            (dict(inputs=(2, 8, 9, 0)), "36"),
            (dict(displacement=(5, 5, 2)), "`trans`"),
            (dict(displacement=(4, 5, 2, 6)), "`trans`"),
            (dict(displacement=(5, 2, 5, 6)), "`trans`"),
            (dict(displacement=(5, 5, 3, 6)), "`trans`"),
            (dict(displacement=(None, None, 4, None)), "`trans`"),
            (dict(displacement=(5, 5, 2, 5)), "`trans`"),
            (dict(displacement=(5, 5, 2, 0)), "`trans`"),
            (dict(displacement=(5, 5, 2, 8)), "output_dim"),
            (dict(displacement=(None, None, None, 14)), "output_dim"),
            (dict(output_dim=0), "output_dim"),
            (dict(output_dim=-6), "output_dim"),
            (dict(group_size=(0, 2)), "group_size"),
            (dict(part_size=(5, 0)), "part_size"),
            (dict(part_size=(5, 0), displacement=None), "part_size"),
            (dict(sample_per_part=0), "sample_per_part"),
            (dict(sample_per_part=-1), "sample_per_part"),
            *[(dict(trans_std=v), "trans_std") for v in [-0.1, *BAD_REALS]],
            (dict(output_dim=2**62, inputs=None, displacement=None), ""),
            (
                dict(
                    output_dim=2**40,
                    group_size=2**20,
                    inputs=None,
                    displacement=None,
                ),
                "",
            ),
            (dict(group_size=2**62, inputs=None), ""),
            (dict(pooled_size=2**40, part_size=(5, 2)), ""),
            (dict(pooled_size=2**62, part_size=(5, 2)), ""),
            (dict(sample_per_part=2**40), ""),
            (dict(inputs=(2**62, 8, 9, 36)), "`inputs`"),
            (dict(inputs=(2**30, 2**30, 9, 36)), "`inputs`"),
            # Good calls.
            (dict(displacement=None, part_size=2**31 - 1), None),
            (
                dict(
                    inputs=(0, 0, 0, 36),
                    rois=(0, 5),
                    displacement=(0, 5, 2, 6),
                ),
                None,
            ),
            (dict(trans_std=0.0, sample_per_part=1), None),
            (dict(pooled_size=(7, 2)), None),
        ]
    ],
    *[
        (ROI_ALIGN, change, text)
        for change, text in [
            (dict(inputs=(2, 8, 9, 0)), "`inputs`"),
            (dict(displacement=(5, 3, 8)), "`offset`"),
            (dict(displacement=(4, 3, 4, 2)), "`offset`"),
            (dict(displacement=(5, 4, 3, 2)), "`offset`"),
            (dict(displacement=(5, 3, 1, 2)), "`offset`"),
            (dict(displacement=(None, None, 5, None)), "`offset`"),
            (dict(displacement=(5, 3, 4, 1)), "`offset`"),
            (dict(displacement=(5, 3, 4, 4)), "`offset`"),
            (dict(displacement=(5, 3, 4, 0)), "`offset`"),
            *[(dict(gamma=v), "gamma") for v in [-0.1, *BAD_REALS]],
            (dict(sampling_ratio=2**31), "sampling_ratio"),
            (dict(sampling_ratio=2**62), "sampling_ratio"),
            (dict(pooled_size=2**40, displacement=None), ""),
            (dict(inputs=(2**62, 8, 9, 6)), "`inputs`"),
            (dict(inputs=(2**30, 2**30, 9, 6)), "`inputs`"),
            (dict(inputs=(1, 1, 1, 2**60)), ""),
            # Good calls.
            (
                dict(
                    inputs=(0, 0, 0, 6),
                    rois=(0, 5),
                    displacement=(0, 3, 4, 2),
                ),
                None,
            ),
            (dict(gamma=0.0, sampling_ratio=2**31 - 1), None),
            (dict(sampling_ratio=1 - 2**31), None),
        ]
    ],
]


def good_call(op):
    """Returns shapes and attributes of a good call."""
    attributes = op.attributes(
        6,
        spatial_scale=0.25,
        pooled_size=(3, 4),
        group_size=(3, 2),
        part_size=(5, 2),
    )
    inputs, rois, displacement, _ = op.shapes(
        attributes, 2, (8, 9), 5, channels=6, classes=3
    )
    return dict(
        inputs=inputs, rois=rois, displacement=displacement, **attributes
    )


@pytest.mark.parametrize("op, change, text", BAD, ids=str)
def test_judges_shapes(op, change, text):
    call = {**good_call(op), **change}
    if text is None:
        core.validate_roi(op.name, **call)
        return
    with pytest.raises(core.CoreError) as error:
        core.validate_roi(op.name, **call)
    assert text in str(error.value)
    assert re.match("Expected .* Received: ", str(error.value))


@pytest.mark.parametrize("op", pooling.OPS, ids=str)
def test_says_what_it_found(op):
    params = core.validate_roi(op.name, **good_call(op))
    names = ["batch", "height", "width", "channels", "num_rois"]
    found = {name: getattr(params, name) for name in names}
    expected = dict(batch=2, height=8, width=9, channels=6, num_rois=5)
    if op.counts:
        found["num_classes"] = params.num_classes
        expected |= dict(channels=36, num_classes=3)
    assert found == expected
