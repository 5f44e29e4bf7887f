#!/bin/sh
# XLA does not know the ops of a library that is loaded after TensorFlow's first op.
#
# Surprise: a library of custom ops can be loaded at any time: its ops and their CPU
# kernels work at once. One would guess the same of what it registers with
# REGISTER_XLA_OP, as XLA compiles much later, when a function with jit_compile=True is
# called. But XLA copies its registrations into TensorFlow's kernels once, when the
# devices are made, which any first op does, if only `tf.constant(1.0) + 1.0`. What is
# registered later is never looked up: "Detected unsupported operations", in words that
# speak of the op and not of the order. So whether an import works depends on whether a
# line before it made a tensor. Here the same library is loaded before and after.
#
# Versions: see pip below, with any C++17 compiler. Source: this program;
# XlaOpRegistry::RegisterCompilationKernels in the headers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
"$folder/venv/bin/pip" install -q tensorflow-cpu==2.21.0
cat > "$folder/twice.cc" <<'CC'
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"

REGISTER_OP("Twice").Input("x: float").Output("y: float").SetShapeFn(
    tensorflow::shape_inference::UnchangedShape);

class TwiceXla : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(tensorflow::XlaOpKernelContext* context) override {
    context->SetOutput(0, xla::Add(context->Input(0), context->Input(0)));
  }
};
REGISTER_XLA_OP(Name("Twice"), TwiceXla);
CC
flags=$("$python" -c 'import tensorflow as tf
for name in ("highwayhash", "farmhash_archive/src"):
    print(f"-I{tf.sysconfig.get_include()}/external/{name}")
print(*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags())' 2>/dev/null)
# shellcheck disable=SC2086
c++ -std=c++17 -O0 -w -fPIC -shared "$folder/twice.cc" -o "$folder/twice.so" $flags
cat > "$folder/run.py" <<'PYTHON'
import sys

import tensorflow as tf

if sys.argv[2] == "after":
    tf.constant(1.0) + 1.0
library = tf.load_op_library(sys.argv[1])
try:
    twice = tf.function(library.twice, jit_compile=True)
    print(twice([3.0]).numpy())
except tf.errors.InvalidArgumentError as error:
    print("error:", error.message.partition("graph")[0] + "...")
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3
before=$("$python" "$folder/run.py" "$folder/twice.so" before 2>/dev/null)
after=$("$python" "$folder/run.py" "$folder/twice.so" after 2>/dev/null)
echo "loaded before the first op: $before"
echo "loaded after the first op:  $after"
test "$before" = "[6.]"
case $after in error:*"unsupported operations"*) ;; *) exit 1 ;; esac
