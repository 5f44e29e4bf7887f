# SPDX-License-Identifier: Apache-2.0
"""Tests the command `tf-deform`: answers without TensorFlow, and the doctor."""

import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info, _loader

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(tf_deform.__file__).parent
COMMAND = [sys.executable, "-c", "import tf_deform_cli as c; exit(c.main())"]
MODULE = [sys.executable, "-m", "tf_deform"]
STEPS = ["TensorFlow", "Keras", "tf_deform", "ops", "XLA"]


def run(command, *arguments, paths=(PACKAGE.parent,), **environment):
    """Runs a command with the folders `paths` before all other packages."""
    return subprocess.run(
        [*command, *arguments],
        # Python puts the folder in which a module runs before PYTHONPATH.
        cwd=paths[-1],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def diagnose(*paths, run=run, **environment) -> tuple[int, dict[str, str]]:
    """Returns the doctor's exit status, and its findings by name."""
    paths = paths or (PACKAGE.parent,)
    result = run(COMMAND, "doctor", paths=paths, **environment)
    found = re.findall(r"^(\S.*?): *(.*(?:\n .*)*)", result.stdout, re.M)
    findings = {name: re.sub(r"\n +", "\n", text) for name, text in found}
    assert result.stderr == ""
    return result.returncode, findings


# For every line of standard input, runs a Python command in a copy of this
# process, which has imported TensorFlow and Keras and has not used them: the
# import takes seconds. Processes that the command starts are copies as well.
FORKS = """
import json, os, runpy, signal, subprocess, sys, traceback
import keras, tensorflow

def run(command, output, errors, begin=lambda: None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(300)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        option, what, *arguments = command
        sys.argv = [option, *arguments]
        begin()
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__", "exit": sys.exit})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def run_again(command, *, capture_output, timeout):
    assert command[0] == sys.executable and capture_output
    names = "inner.out", "inner.err"
    with open(names[0], "wb") as output, open(names[1], "wb") as errors:
        status = run(command[1:], output, errors)
    said = [open(name, "rb").read() for name in names]
    return subprocess.CompletedProcess(command, status, *said)

for line in sys.stdin:
    command, folder, environment, home = json.loads(line)

    def begin():
        paths = environment["PYTHONPATH"].split(os.pathsep)
        sys.path[:1] = [folder, *paths]
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(home)
        subprocess.run = run_again
        for path in paths:  # as Python does when it starts
            name = os.path.join(path, "sitecustomize.py")
            if os.path.exists(name):
                exec(open(name).read(), {})

    names = [os.path.join(home, name) for name in ("out", "err")]
    with open(names[0], "wb") as output, open(names[1], "wb") as errors:
        status = run(command, output, errors, begin)
    print(status, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """Returns `run` for commands that import TensorFlow: it runs copies."""
    home = tmp_path_factory.mktemp("forks")
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PYTHONPATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run_fork(command, *arguments, paths=(PACKAGE.parent,), **environment):
        assert command[0] == sys.executable
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        job = [
            [*command[1:], *arguments],
            str(paths[-1]),
            {**os.environ, **environment},
            str(home),
        ]
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        said = ((home / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, status, *said)

    with server:
        yield run_fork
        server.stdin.close()


@pytest.fixture
def stubs(tmp_path):
    """Returns a function that makes a folder with a module of a given text."""

    def stub(text: str, name: str = "tensorflow") -> pathlib.Path:
        folder = tmp_path / "stubs"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        return folder

    return stub


@pytest.fixture
def install(tmp_path):
    """Returns a function that makes a folder with a TensorFlow."""

    def install(text: str, *distributions: str) -> pathlib.Path:
        folder = tmp_path / "installed"
        (folder / "tensorflow").mkdir(parents=True, exist_ok=True)
        (folder / "tensorflow/__init__.py").write_text(text)
        for distribution in distributions:
            name, version = distribution.split("==")
            path = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            path.mkdir()
            (path / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            (path / "RECORD").write_text("x.py,,\ntensorflow/__init__.py,,\n")
        return folder

    return install


@pytest.fixture
def no_tensorflow(install) -> pathlib.Path:
    """Makes a folder with packages that are there and cannot be imported."""
    text = "raise ModuleNotFoundError('No module named %s')"
    folder = install(text % "tensorflow", f"tensorflow=={tf.__version__}")
    for name in ("keras", "numpy"):
        (folder / f"{name}.py").write_text(text % name)
    return folder


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """Copies the package with its command, as pip would install them."""
    folder = tmp_path / "site"
    shutil.copytree(
        PACKAGE,
        folder / "tf_deform",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(PACKAGE.parent / "tf_deform_cli.py", folder)
    return folder


# Answers without TensorFlow.


@pytest.mark.parametrize(
    "arguments, status, expected",
    [
        (["--help"], 0, "doctor"),
        (["library", "--help"], 0, "TF_LoadLibrary(path, status)"),
        (["doctor", "--help"], 0, "exit status"),
        (["--version"], 0, f"tf-deform {tf_deform.__version__}\n"),
        (["library"], 0, f"{_loader.LIBRARY}\n"),
        (["library", "--core"], 0, f"{PACKAGE / _build_info.CORE}\n"),
        ([], 2, "doctor"),
        (["libary"], 2, "invalid choice: 'libary'"),
        (["library", "--all"], 2, "--all"),
    ],
)
def test_answers_that_need_no_tensorflow(
    arguments, status, expected, no_tensorflow
):
    """Tests that standard output is the path alone.

    Commands use it: `serve $(tf-deform library)`.
    """
    result = run(COMMAND, *arguments, paths=[no_tensorflow, PACKAGE.parent])
    assert result.returncode == status, result.stderr
    said, other = result.stdout, result.stderr
    if status:
        said, other = other, said
    assert expected in (said if "\n" in expected else " ".join(said.split()))
    assert other == ""


@pytest.mark.parametrize("arguments, status", [([], 2), (["library"], 0)])
def test_the_module_is_the_command(arguments, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tf_deform", *arguments])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("tf_deform", run_name="__main__")
    command = run(COMMAND, *arguments)
    assert error.value.code == command.returncode == status
    assert capsys.readouterr() == (command.stdout, command.stderr)


def test_the_module_without_native_ops(forked):
    module = forked(MODULE, "library", TF_DEFORM_IMPLEMENTATION="portable")
    assert module.returncode == 0
    assert module.stdout == f"{_loader.LIBRARY}\n"


def test_pip_installs_the_command(metadata):
    text = (next(metadata.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "[console_scripts]\ntf-deform = tf_deform_cli:main" in text
    names = [
        (folder / "top_level.txt").read_text().split()
        for folder in metadata.glob("*.dist-info")
    ]
    assert names == [["tf_deform", "tf_deform_cli"]]


def test_version_of_an_installed_package_and_of_a_source_tree(copy):
    info = copy / "tf_deform/_build_info.py"

    def version() -> str:
        return run(COMMAND, "--version", paths=[copy]).stdout

    info.write_text('VERSION = "7.8.9"')
    assert version() == "tf-deform 7.8.9\n"
    info.unlink()
    assert version() == "tf-deform unknown (a package without built ops)\n"
    shutil.copy(ROOT / "setup.py", copy)
    assert version() == (
        f"tf-deform {tf_deform.__version__} (a source tree without built ops)\n"
    )


# Which library.


@pytest.fixture
def release(copy) -> pathlib.Path:
    """Copies the package, as if it had libraries for several versions."""
    with open(copy / "tf_deform/_build_info.py", "a") as file:
        file.write(
            "LIBRARIES = dict.fromkeys(['2.15', '2.17', '2.20', '2.21'])"
        )
    for minor in ("2.15", "2.17", "2.21"):
        (copy / f"tf_deform/_ops_{minor}.so").write_text("not a library")
    return copy


BROKEN_TENSORFLOW = "raise ImportError('broken')"
# Prints before and after a line without its end.
OTHER_VERSION = "print('Loading')\n__version__ = '2.17.1'\nprint(1, end='')"


@pytest.mark.parametrize(
    "text, distributions, minor",
    [
        (BROKEN_TENSORFLOW, ["tensorflow==2.15.1"], "2.15"),
        (BROKEN_TENSORFLOW, ["tensorflow-cpu==2.17.0rc1"], "2.17"),
        (BROKEN_TENSORFLOW, ["tensorflow-gpu==2.15.0.post1"], "2.15"),
        (BROKEN_TENSORFLOW, ["tensorflow-rocm==2.21.0"], "2.21"),
        (BROKEN_TENSORFLOW, ["tf-nightly==2.21.0.dev20250101"], "2.21"),
        (BROKEN_TENSORFLOW, ["a==2.21.0", "tensorflow-cpu==2.21.0"], "2.21"),
        # Metadata does not know it: the module itself is asked.
        (OTHER_VERSION, [], "2.17"),
        (OTHER_VERSION, ["tensorflow==2.21.0", "tf-nightly==2.15.0"], "2.17"),
    ],
)
def test_the_library_for_the_installed_tensorflow(
    text, distributions, minor, release, install
):
    folder = install(text, *distributions)
    result = run(COMMAND, "library", paths=[folder, release])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{release}/tf_deform/_ops_{minor}.so\n"


@pytest.mark.parametrize(
    "text, distributions, received",
    [
        (BROKEN_TENSORFLOW, ["tensorflow==2.14.1"], "TensorFlow 2.14.1."),
        # This one is in the list, and its file is not there.
        (BROKEN_TENSORFLOW, ["tensorflow==2.20.0"], "TensorFlow 2.20.0."),
        (BROKEN_TENSORFLOW, ["tensorflow==3.21.0"], "TensorFlow 3.21.0."),
        (BROKEN_TENSORFLOW, [], "the process ended with exit status 1\n"),
    ],
)
def test_there_is_no_library_for_it(
    text, distributions, received, release, install
):
    folder = install(text, *distributions)
    result = run(COMMAND, "library", paths=[folder, release])
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "Expected TensorFlow 2.15, 2.17, 2.21, for which there are op "
        f"libraries in {release}/tf_deform. Received: {received}"
    )
    if not distributions:
        assert "ImportError: broken" in result.stderr


@pytest.mark.parametrize("command", [COMMAND, MODULE])
def test_without_libraries_there_is_no_path(command, copy):
    for library in copy.glob("tf_deform/*.so"):
        library.unlink()
    for option, text in (
        ([], f"Expected op libraries of tf_deform in {copy}/tf_deform. "),
        (["--core"], f"Expected the core library of tf_deform at {copy}/"),
    ):
        result = run(command, "library", *option, paths=[copy])
        assert result.returncode == 1
        assert result.stdout == ""
        # The first line is the package's warning.
        said = result.stderr.splitlines()[-1]
        assert said.startswith(text)
        assert "pip install" in said


# The doctor.


def test_a_sound_installation(metadata, copy, monkeypatch):
    """Tests that the extras are the ones of setup.py, `test` included.

    Beside the package itself may be the metadata of an earlier build.
    """
    monkeypatch.setenv("TF_DEFORM_CACHE", "/some/cache")
    status, findings = diagnose(metadata, copy)
    assert status == 0, findings
    assert findings["tf-deform"] == tf_deform.__version__
    assert findings["verdict"] == "the native ops work"
    assert findings["cache"] == "/some/cache (TF_DEFORM_CACHE)"
    assert not any("FAILED" in finding for finding in findings.values())
    versions = ", ".join(_build_info.LIBRARIES)
    assert findings["TensorFlow"].startswith(
        f"{tf.__version__}; op libraries for {versions}; sees "
    )
    assert findings["Python"].endswith(", expected >=3.9")
    package = tf.keras.Model.__module__.split(".")[0]
    assert findings["Keras"].startswith(f"{package} ")
    assert findings["Keras"].endswith("; backend tensorflow")
    assert str(copy) in findings["tf_deform"]
    if _loader.has_xla():
        assert "compile" in findings["XLA"]
    assert ("none" in findings["GPU kernels"]) == (
        _build_info.CUDA_VERSION is None
    )
    extras = [name for name in findings if name.startswith("extra ")]
    assert {"extra onnx", "extra litert", "extra docs"} <= set(extras)
    assert findings["extra test"] == "installed"


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_instruction_set_and_its_limit(isa, no_tensorflow):
    _, findings = diagnose(no_tensorflow, PACKAGE.parent, TF_DEFORM_MAX_ISA=isa)
    assert findings["instruction set"] == (
        f"{isa}, limited by TF_DEFORM_MAX_ISA={isa}"
    )


def assert_stopped_at(step: str, status: int, findings: dict[str, str]) -> str:
    assert status == 1
    assert findings["verdict"] == "the native ops do not work"
    assert findings[step].startswith("FAILED: "), findings
    later = STEPS[STEPS.index(step) + 1 :]
    assert [findings[name] for name in later] == ["not tried"] * len(later)
    return findings[step].removeprefix("FAILED: ")


# Ends of a process that imports TensorFlow, with its last words.
ENDS = {
    "raise ModuleNotFoundError('No module named tensorflow')": (
        "ModuleNotFoundError: No module named tensorflow"
    ),
    f"os.kill(os.getpid(), {int(signal.SIGSEGV)})": (
        "the process ended with signal SIGSEGV\nof the old kind"
    ),
    "os._exit(3)": "the process ended with exit status 3\nof the old kind",
}


@pytest.mark.parametrize("end", ENDS)
def test_tensorflow_cannot_be_imported(end, stubs):
    """Tests that the last words are reported, even without a line break."""
    folder = stubs(
        "import os, sys\n"
        "print('loading', end='', flush=True)\n"
        f"print('of the old kind', file=sys.stderr, flush=True)\n{end}"
    )
    status, findings = diagnose(folder, PACKAGE.parent)
    assert assert_stopped_at("TensorFlow", status, findings) == ENDS[end]


def test_the_process_hangs(stubs):
    folder = stubs("import time; time.sleep(600)")
    script = "import tf_deform_cli as c; c._TIMEOUT = 1; exit(c.main())"
    command = [sys.executable, "-c", script]
    result = run(command, "doctor", paths=[folder, PACKAGE.parent])
    assert result.returncode == 1
    assert "FAILED: the process ended with no answer for 1 s" in result.stdout


INFO = (PACKAGE / "_build_info.py").read_text()
MINOR = ".".join(tf.__version__.split(".")[:2])
LIBRARY = f"_ops_{MINOR}.so"
MARK = "\0tf_deform for TensorFlow %s\0"
# An editable installation would find in the source tree what a copy lacks.
NO_EDITABLE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
"""
DOUBLE = """
_right = deformable_conv2d
def deformable_conv2d(*args, **kwargs):
    return _right(*args, **kwargs) * 2
"""
OP = "ops/deformable_conv2d.py"
# Files of a broken package (None: not there), the step at which the doctor
# stops, and texts of its finding. The version is checked before the library is
# loaded; a package without its library can be imported, for portable ops.
BROKEN = {
    "version": (
        {
            "_build_info.py": INFO + "LIBRARIES = {'2.4': ('2.4.1', True)}",
            "_ops_2.4.so": "not a library",
        },
        "tf_deform",
        "ImportError: Expected TensorFlow 2.4, ",
        f"Received: TensorFlow {tf.__version__}",
        "pip install 'tensorflow==2.4.*'",
    ),
    "not built": (
        {"_build_info.py": None, "../sitecustomize.py": NO_EDITABLE},
        "tf_deform",
        "ImportError: Expected",
        "pip install",
    ),
    "misplaced": (
        {LIBRARY: MARK % "2.4.1"},
        "tf_deform",
        "ImportError: Expected ",
        f"/site/tf_deform/{LIBRARY} to be for TensorFlow {MINOR}, ",
        "Received: a library for TensorFlow 2.4.1.",
    ),
    "library": (
        {LIBRARY: MARK % tf.__version__},
        "tf_deform",
        "NotFoundError: ",
        f"/site/tf_deform/{LIBRARY}",
    ),
    "no library": (
        {LIBRARY: None},
        "ops",
        "FileNotFoundError: Expected op libraries of tf_deform in ",
        "/site/tf_deform. Received: none. ",
    ),
    "no core": (
        {_build_info.CORE: None},
        "tf_deform",
        f"NotFoundError: {_build_info.CORE}: cannot open",
    ),
    "results": (
        {OP: (PACKAGE / OP).read_text() + DOUBLE},
        "ops",
        "ArithmeticError: Expected outputs [[1.5, 2.5]",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package(kind, copy, forked):
    files, step, beginning, *others = BROKEN[kind]
    for name, text in files.items():
        path = copy / "tf_deform" / name
        path.unlink() if text is None else path.write_text(text)
    status, findings = diagnose(copy, run=forked)
    text = assert_stopped_at(step, status, findings)
    assert text.startswith(beginning)
    assert all(other in text for other in others), text
    expected = {"version": "2.4", "not built": "none"}.get(kind)
    if expected is not None:
        assert f"; op libraries for {expected}; " in findings["TensorFlow"]


def test_the_core_library_is_missing(copy, no_tensorflow):
    library = copy / "tf_deform" / _build_info.CORE
    library.unlink()
    status, findings = diagnose(no_tensorflow, copy)
    assert status == 1
    assert findings["instruction set"].startswith(
        "FAILED: FileNotFoundError: Expected the core library of tf_deform at "
        f"{library}. Received: no such file. "
    )
    assert "No module named tensorflow" in findings["TensorFlow"]


def test_native_ops_are_switched_off(forked):
    status, findings = diagnose(run=forked, TF_DEFORM_IMPLEMENTATION="portable")
    text = assert_stopped_at("ops", status, findings)
    assert "TF_DEFORM_IMPLEMENTATION=portable" in text


@pytest.mark.parametrize(
    "requirement, expected",
    [
        ("sybil", "installed"),
        ("sybil<1", "lacks sybil<1 (found "),
        ("no-such-thing>=2", "lacks no-such-thing>=2"),
        ("tf-deform[other]", "lacks no-such-thing"),
    ],
)
def test_an_extra_and_what_it_lacks(
    requirement, expected, tmp_path, no_tensorflow, copy
):
    folder = tmp_path / "metadata/tf_deform-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tf-deform\nVersion: 0.1.0\n"
        f'Requires-Dist: {requirement}; extra == "some"\n'
        'Requires-Dist: no-such-thing; extra == "other"\n'
    )
    _, findings = diagnose(no_tensorflow, folder.parent, copy)
    assert findings["extra some"].startswith(expected)
    assert findings["extra other"] == "lacks no-such-thing"


def test_no_extras(stubs, no_tensorflow):
    """Tests an installation without metadata, as in a source tree."""
    hidden = "import importlib.metadata as m\n"
    hidden += "def metadata(name): raise m.PackageNotFoundError(name)\n"
    folder = stubs(hidden + "m.metadata = metadata\n", "sitecustomize")
    status, findings = diagnose(folder, no_tensorflow, PACKAGE.parent)
    assert status == 1
    assert findings["extras"] == "unknown: a source tree that is not installed"
    assert findings["Python"].endswith("expected unknown")
