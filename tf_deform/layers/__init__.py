# SPDX-License-Identifier: Apache-2.0
"""Keras layers."""

import os
import warnings

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "Expected Keras to run on TensorFlow. Received: the backend "
        f"{keras.backend.backend()!r}. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )

if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True"):
    warnings.warn(
        "Expected Keras 3 for tf_deform's layers. Received: "
        f"TF_USE_LEGACY_KERAS={os.environ['TF_USE_LEGACY_KERAS']}, with which "
        "`tf.keras` is Keras 2, whose models take no layer of Keras 3. Make "
        "models with `import keras`, or unset the variable. The functions in "
        "tf_deform.ops work in either case.",
        RuntimeWarning,
        stacklevel=2,
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
