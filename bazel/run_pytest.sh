#!/bin/sh
# Runs the core's tests on the shared object that Bazel built.
# Arguments: the Python to use, the shared object, the tests.
set -eu
TF_DEFORM_CORE="$PWD/$2"
export TF_DEFORM_CORE
exec "$PWD/$1" -m pytest -q -p no:cacheprovider "$3"
