# SPDX-License-Identifier: Apache-2.0
"""Shows what deformable convolution is worth: on trees, and on digits.

What the demos need and is not here is fetched from the package index into a
folder for caches, see `tf-deform doctor`. The extra `tf-deform[examples]`
brings the packages that the demos use.
"""
