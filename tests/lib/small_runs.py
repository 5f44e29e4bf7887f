# SPDX-License-Identifier: Apache-2.0
"""Settings of runs that take seconds."""

# Of FasterRCNN: the published heads would take seconds for each step; after so
# few steps, scores are about one in a hundred.
SMALL = {
    "fpn_channels": 8,
    "head_units": 16,
    "proposals": 40,
    "samples": 16,
    "min_score": 1e-3,
}
SETTINGS = {
    "size": 64,
    "batch_size": 2,
    "steps": 5,
    "lr": 0.02,
    "seed": 3,
    "deterministic": True,
    "weights": "none",
}
