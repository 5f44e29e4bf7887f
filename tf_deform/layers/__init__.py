# SPDX-License-Identifier: Apache-2.0
"""Keras layers."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "Expected Keras to run on TensorFlow. Received: the backend "
        f"{keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )

from tf_deform.layers.deformable_conv2d import DeformableConv2D  # noqa: E402
from tf_deform.layers.deformable_psroi_pool import (  # noqa: E402
    DeformablePSROIPooling,
    DeformableROIPooling,
)
from tf_deform.layers.deformable_roi_align import (  # noqa: E402
    DeformableROIAlign,
)

__all__ = [
    "DeformableConv2D",
    "DeformablePSROIPooling",
    "DeformableROIAlign",
    "DeformableROIPooling",
]
