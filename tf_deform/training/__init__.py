# SPDX-License-Identifier: Apache-2.0
"""What helps to train models with deformable layers."""

from tf_deform.training._monitor import SamplingMonitor
from tf_deform.training._optimizer import deformable_optimizer

__all__ = ["SamplingMonitor", "deformable_optimizer"]
