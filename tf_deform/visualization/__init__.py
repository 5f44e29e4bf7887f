# SPDX-License-Identifier: Apache-2.0
"""Shows where deformable layers look.

`import tf_deform` does not import this package; it is imported when
`tf_deform.visualization` is used. Pictures need Matplotlib, which the extra
`tf-deform[plots]` brings; nothing else does.
"""

from tf_deform.visualization._dilation import effective_dilation
from tf_deform.visualization._explorer import explorer
from tf_deform.visualization._pictures import plot_roi_parts, plot_sampling
from tf_deform.visualization._sampling import (
    sampling_locations,
    sampling_modulation,
)

__all__ = [
    "effective_dilation",
    "explorer",
    "plot_roi_parts",
    "plot_sampling",
    "sampling_locations",
    "sampling_modulation",
]
