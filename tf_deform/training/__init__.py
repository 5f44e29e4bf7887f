# SPDX-License-Identifier: Apache-2.0
"""What helps to train models with deformable layers."""

from tf_deform.training._optimizer import deformable_optimizer

__all__ = ["deformable_optimizer"]
