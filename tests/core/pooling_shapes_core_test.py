# SPDX-License-Identifier: Apache-2.0
"""Tests how the core judges shapes and attributes of both pooling ops."""

import re

import core
import numpy as np
import pooling
import pytest
from pooling import PSROI_POOL, ROI_ALIGN

BAD_REALS = [-0.5, np.nan, np.inf]
BOTH = pooling.OPS
# Pairs ops and an argument with a part of the error's text, and bad values.
BAD_VALUES = [
    (
        BOTH,
        "inputs",
        "`inputs`",
        [(2, 8, 9), (1, 2, 8, 9, 36), (1, 2, 8, 9, 6)],
    ),
    (BOTH, "rois", "`rois`", [(5, 4), (None, 6), (5,), (1, 5, 5)]),
    (BOTH, "grad_output", "`grad_output`", [(5, 3, 4, 5), (5, 4, 3, 6)]),
    (BOTH, "grad_output", "`grad_output`", [(4, 3, 4, 6), (5, 3, 24)]),
    (BOTH, "pooled_size", "pooled_size", [(0, 4), (3, -1)]),
    (BOTH, "spatial_scale", "spatial_scale", [0.0, *BAD_REALS]),
    ([PSROI_POOL], "inputs", "36", [(2, 8, 9, 35), (2, 8, 9, 0)]),
    ([PSROI_POOL], "inputs", "36", [(None, None, None, 37)]),
    ([PSROI_POOL], "displacement", "`trans`", [(5, 5, 2), (4, 5, 2, 6)]),
    ([PSROI_POOL], "displacement", "`trans`", [(5, 2, 5, 6), (5, 5, 3, 6)]),
    ([PSROI_POOL], "displacement", "`trans`", [(None, None, 4, None)]),
    ([PSROI_POOL], "displacement", "`trans`", [(5, 5, 2, 5), (5, 5, 2, 0)]),
    ([PSROI_POOL], "displacement", "output_dim", [(5, 5, 2, 8)]),
    ([PSROI_POOL], "displacement", "output_dim", [(None, None, None, 14)]),
    ([PSROI_POOL], "output_dim", "output_dim", [0, -6]),
    ([PSROI_POOL], "group_size", "group_size", [(0, 2)]),
    ([PSROI_POOL], "part_size", "part_size", [(5, 0)]),
    ([PSROI_POOL], "sample_per_part", "sample_per_part", [0, -1]),
    ([PSROI_POOL], "trans_std", "trans_std", [-0.1, *BAD_REALS]),
    # Products that 64 bits cannot hold.
    ([PSROI_POOL], "sample_per_part", "", [2**40]),
    ([PSROI_POOL], "inputs", "`inputs`", [(2**62, 8, 9, 36)]),
    ([PSROI_POOL], "inputs", "`inputs`", [(2**30, 2**30, 9, 36)]),
    ([ROI_ALIGN], "inputs", "`inputs`", [(2, 8, 9, 0), (2**62, 8, 9, 6)]),
    ([ROI_ALIGN], "inputs", "`inputs`", [(2**30, 2**30, 9, 6)]),
    ([ROI_ALIGN], "inputs", "", [(1, 1, 1, 2**60)]),
    ([ROI_ALIGN], "displacement", "`offset`", [(5, 3, 8), (4, 3, 4, 2)]),
    ([ROI_ALIGN], "displacement", "`offset`", [(5, 4, 3, 2), (5, 3, 1, 2)]),
    ([ROI_ALIGN], "displacement", "`offset`", [(None, None, 5, None)]),
    ([ROI_ALIGN], "displacement", "`offset`", [(5, 3, 4, 1), (5, 3, 4, 4)]),
    ([ROI_ALIGN], "displacement", "`offset`", [(5, 3, 4, 0)]),
    ([ROI_ALIGN], "gamma", "gamma", [-0.1, *BAD_REALS]),
    ([ROI_ALIGN], "sampling_ratio", "sampling_ratio", [2**31, 2**62]),
]
ALL = dict(inputs=None, rois=None, displacement=None)
# Pairs ops with changes of several arguments, of which the sizes are too large.
TOO_LARGE = [
    (BOTH, dict(pooled_size=2**24, rois=(2**20, 5), displacement=None)),
    (BOTH, dict(rois=(2**62, 5), displacement=None)),
    ([PSROI_POOL], ALL | dict(rois=(5, 5), output_dim=2**62)),
    ([PSROI_POOL], ALL | dict(rois=(5, 5), output_dim=2**40, group_size=2**20)),
    ([PSROI_POOL], dict(group_size=2**62, inputs=None)),
    ([PSROI_POOL], dict(pooled_size=2**40, part_size=(5, 2))),
    ([PSROI_POOL], dict(pooled_size=2**62, part_size=(5, 2))),
    ([ROI_ALIGN], dict(pooled_size=2**40, displacement=None)),
]
UNKNOWN = dict(inputs=(None,) * 4, rois=(None, 5), displacement=(None,) * 4)
GOOD = [
    (BOTH, dict()),
    (BOTH, dict(displacement=None)),
    (BOTH, ALL),
    (BOTH, UNKNOWN),
    (BOTH, dict(grad_output=(5, 3, 4, 6))),
    ([PSROI_POOL], dict(displacement=None, part_size=2**31 - 1)),
    ([PSROI_POOL], dict(trans_std=0.0, sample_per_part=1)),
    ([PSROI_POOL], dict(pooled_size=(7, 2))),
    ([ROI_ALIGN], dict(gamma=0.0, sampling_ratio=2**31 - 1)),
    ([ROI_ALIGN], dict(sampling_ratio=1 - 2**31)),
    *(
        (
            [op],
            dict(inputs=(0, 0, 0, channels), rois=(0, 5), displacement=moved),
        )
        for op, channels, moved in [
            (PSROI_POOL, 36, (0, 5, 2, 6)),
            (ROI_ALIGN, 6, (0, 3, 4, 2)),
        ]
    ),
]


def good_call(op):
    """Returns shapes and attributes of a good call."""
    sizes = dict(pooled_size=(3, 4), group_size=(3, 2), part_size=(5, 2))
    attributes = op.attributes(6, spatial_scale=0.25, **sizes)
    inputs, rois, displacement, _ = op.shapes(
        attributes, 2, (8, 9), 5, channels=6, classes=3
    )
    return dict(
        inputs=inputs, rois=rois, displacement=displacement, **attributes
    )


@pytest.mark.parametrize(
    "op, change, text",
    [
        (op, {argument: value}, text)
        for ops, argument, text, values in BAD_VALUES
        for op in ops
        for value in values
    ]
    + [
        (PSROI_POOL, dict(part_size=(5, 0), displacement=None), "part_size"),
        *((op, change, "") for ops, change in TOO_LARGE for op in ops),
    ],
    ids=str,
)
def test_refuses(op, change, text):
    with pytest.raises(core.CoreError) as error:
        core.validate_roi(op.name, **{**good_call(op), **change})
    assert text in str(error.value)
    assert re.match("Expected .* Received: ", str(error.value))


@pytest.mark.parametrize(
    "op, change", [(op, c) for ops, c in GOOD for op in ops], ids=str
)
def test_accepts(op, change):
    core.validate_roi(op.name, **{**good_call(op), **change})


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
