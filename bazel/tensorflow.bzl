# SPDX-License-Identifier: Apache-2.0
"""Provides the installed TensorFlow as a repository."""

_QUERY = """
import os
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
import tensorflow as tf
print(tf.__version__)
print(tf.sysconfig.get_include())
print(tf.sysconfig.get_lib())
print('|'.join(
    flag for flag in tf.sysconfig.get_compile_flags() if flag[:2] == '-D'))
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "tensorflow",
    srcs = {libraries},
    hdrs = glob(["include/**"]),
    defines = {defines},
    includes = [
        "include",
        "include/external/farmhash_archive/src",  # for XLA's headers
        "include/external/highwayhash",
    ],
)

exports_files(["python"])
"""

def _installed_tensorflow_impl(repository_ctx):
    workspace = repository_ctx.path(Label("//:WORKSPACE")).dirname
    python = repository_ctx.os.environ.get("PYTHON", "")
    if not python:
        environment = workspace.get_child(".venv").get_child("bin").get_child("python")
        python = str(environment) if environment.exists else "python3"
    result = repository_ctx.execute([python, "-c", _QUERY])
    if result.return_code != 0:
        fail("Expected a Python with TensorFlow in the environment variable " +
             "PYTHON, in .venv (see `make install`), or as python3. " +
             "Received: %s\n%s" % (python, result.stderr))
    lines = result.stdout.strip().split("\n")[-4:]
    version = lines.pop(0)
    repository_ctx.symlink(lines[0], "include")
    libraries = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]
    for library in libraries:
        repository_ctx.symlink(lines[1] + "/" + library, library)
    repository_ctx.file("python", "#!/bin/sh\nexec '%s' \"$@\"\n" % python)
    defines = [flag[2:] for flag in lines[2].split("|")]
    defines.append('TF_DEFORM_TENSORFLOW=\\"%s\\"' % version)
    repository_ctx.file("BUILD", _BUILD.format(
        defines = repr(defines),
        libraries = repr(libraries),
    ))

installed_tensorflow = repository_rule(
    implementation = _installed_tensorflow_impl,
    environ = ["PYTHON"],
    local = True,
)
