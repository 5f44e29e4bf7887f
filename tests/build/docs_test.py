# SPDX-License-Identifier: Apache-2.0
"""Tests README, docs and CHANGELOG: code blocks run, and links have targets."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from detectors import liven
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import tf_deform

ROOT = pathlib.Path(__file__).parents[2]
# tests/addons runs the blocks of this page, with another TensorFlow.
ADDONS = ROOT / "docs/addons.md"
PATHS = [
    ROOT / "README.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {ADDONS}),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PATHS]
# Beginnings of commands, and of Python blocks, that this test does not run.
SKIPPED = {
    "make demo": "takes minutes; trees_test.py trains",
    "make test": "is what runs this test",
    "pip install": "installs",
    "python examples/": "trains for minutes; examples_test.py trains less",
    "tf-deform train": "takes hours; tests/tasks trains small models",
    "import keras\nimport tf_deform\n\nphotographs": "trains for hours, too",
    "tensorflowjs_converter": "needs an environment of its own",
    "from tensorflowjs": "needs an environment of its own",
}


def skips(code: str) -> bool:
    return any(code.startswith(beginning) for beginning in SKIPPED)


def run_shell(example: Example) -> None:
    """Runs the lines of a block; a backslash continues a line."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command = line.partition("#")[0].strip()
        if not command or skips(command):
            continue
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_python_block(example: Example) -> None:
    if not skips(example.parsed):
        PythonEvaluator()(example)


SYBIL = Sybil(
    [
        CodeBlockParser("python", run_python_block),
        CodeBlockParser("sh", run_shell),
    ]
)


def make_detector() -> keras.Model:
    """Makes a small detector, which finds something everywhere.

    Scores lie apart: suppression would choose differently between equal ones.
    """
    keras.utils.set_random_seed(0)
    image = keras.Input((64, 64, 3))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, strides=4, padding="same")(x)
    last = keras.layers.Conv2D(4, 3, strides=2, padding="same")(x)
    model = tf_deform.models.FasterRCNN(
        keras.Model(image, {"P2": x, "P3": last}),
        2,
        image_size=64,
        class_names=("cat", "dog"),
        fpn_channels=4,
        head_units=4,
        proposals=20,
        max_detections=5,
        min_score=0.0,
    )
    return liven(model)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> pathlib.Path:
    """Returns the file of a small detector that finds something everywhere."""
    path = tmp_path_factory.mktemp("detector") / "best.keras"
    make_detector().save(path)
    return path


def write_photographs(rng: np.random.Generator) -> None:
    """Writes what docs/finetune.md has: labelled photographs, and others."""
    size = "<size><width>90</width><height>70</height></size>"
    box = "<xmin>5</xmin><ymin>9</ymin><xmax>60</xmax><ymax>50</ymax>"
    for file in ("other/1.jpg", "other/2.jpg", "new/1.jpg", "photo.jpg"):
        path = pathlib.Path(file)
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)
        keras.utils.save_img(path, pixels, scale=False)
        if path.parent.name == "other":
            path.with_suffix(".xml").write_text(
                f"<annotation><filename>{path.name}</filename>{size}<object>"
                f"<name>dog</name><bndbox>{box}</bndbox></object></annotation>"
            )


@pytest.fixture
def workplace(tmp_path, monkeypatch, detector) -> None:
    """Makes folders of images, a detector, and the command `tf-deform`."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_photographs(rng)
    (tmp_path / "run").mkdir()
    shutil.copy(detector, tmp_path / "run")
    for file in (f"{x}/{i}.jpg" for x in ("cats", "dogs") for i in range(5)):
        path = tmp_path / "photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        keras.utils.save_img(path, pixels, scale=False)
    # Nothing is fetched.
    network = functools.partial(keras.applications.ResNet50, weights=None)
    monkeypatch.setattr(keras.applications, "ResNet50", network)
    command = tmp_path / "tf-deform"
    # The text is the script that pip writes.
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom tf_deform_cli import main\n"
        "sys.exit(main())\n"
    )
    command.chmod(0o755)
    home = pathlib.Path(tf_deform.__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def names() -> dict:
    """Returns the names that blocks of docs use undefined: a model, data."""
    rng = np.random.default_rng(0)
    image = keras.Input((16, 16, 3), name="image")
    x = tf_deform.layers.DeformableConv2D(4, 3, modulation="2sigmoid")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    images = rng.random((4, 16, 16, 3), np.float32)
    return {
        "keras": keras,
        "tf_deform": tf_deform,
        "model": keras.Model(image, keras.layers.Dense(3)(x)),
        "images": images,
        "batches": [images] * 8,
        "features": rng.random((1, 12, 10, 8), np.float32),
        "rois": np.float32([[0, 8, 8, 120, 90], [-1, 0, 0, 0, 0]]),
    }


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_blocks_run(path, workplace):
    """Runs the blocks in order. A reader of README starts without names."""
    document = SYBIL.parse(path)
    document.namespace.update({} if path.name == "README.md" else names())
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_every_block_can_be_run(path):
    """Tests that the test above misses no language or form of block."""
    text = path.read_text()
    languages = re.findall(r"^ *```(.*)\n(?:.*\n)*?^ *```$", text, re.MULTILINE)
    assert set(languages) <= {"python", "sh"}
    assert len(list(SYBIL.parse(path).examples())) == len(languages)
    outside = re.sub(r"^ *```.*\n(?:.*\n)*?^ *```$", "", text, flags=re.M)
    assert "```" not in outside
    # An indented block is code too, unless it belongs to a list.
    assert not re.search(r"^(?![-*\d ]).*\n\n    \S", outside, re.MULTILINE)


def test_what_is_skipped_is_there():
    codes = [
        code.partition("#")[0].strip()
        for path in PATHS
        for example in SYBIL.parse(path).examples()
        for code in [example.parsed, *example.parsed.splitlines()]
    ]
    for beginning in SKIPPED:
        assert any(code.startswith(beginning) for code in codes), beginning


def anchors(text: str) -> set[str]:
    """Returns the anchors of the headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


MARKDOWN = [*PATHS, ADDONS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_can_be_found():
    """Tests that README links every page, or a page that links it."""
    text = (ROOT / "README.md").read_text()
    text += (ROOT / "docs/export.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"{path.name})" in text, path


def test_the_table_of_exports_is_whole():
    """Tests that no trial run of benchmarks/export_table.py replaced it."""
    text = (ROOT / "docs/export.md").read_text()
    table = text.partition("<!-- the table begins -->")[2]
    rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        assert all(cell.strip() for cell in row.strip("|").split("|")), row


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    commands = re.findall(r"^make \w+", "\n".join(lines), re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
    # One picture, and tables of layers, of gains and of speed.
    assert sum(line.startswith("![") for line in lines) == 1
    assert sum(line.startswith("|---") for line in lines) == 3


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    if len(sections) == 1:
        assert f"what {tf_deform.__version__} will hold" in text
    else:
        assert sections[1] == tf_deform.__version__
