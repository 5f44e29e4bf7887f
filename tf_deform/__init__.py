# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for TensorFlow and Keras."""

from tf_deform import layers, ops
from tf_deform._build_info import VERSION as __version__

__all__ = ["__version__", "layers", "ops"]
