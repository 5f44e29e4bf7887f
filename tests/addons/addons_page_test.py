# SPDX-License-Identifier: Apache-2.0
"""Runs the blocks of code of docs/addons.md, which docs_test.py cannot."""

import pathlib

import numpy as np
import pytest

pytest.importorskip(
    "tensorflow_addons",
    reason="tensorflow_addons runs with TensorFlow 2.15 alone",
    exc_type=ImportError,
)
sybil = pytest.importorskip("sybil", reason="finds blocks of code")
markdown = pytest.importorskip("sybil.parsers.markdown")

ROOT = pathlib.Path(__file__).parents[2]
# Commands that are not run here.
ELSEWHERE = {
    "pip install 'tf-deform[addons]' 'tensorflow==2.15.*'": "installs",
    "python examples/addons_segmentation.py --out runs/addons": (
        "addons_segmentation_test.py runs it"
    ),
}


def check_command(example) -> None:
    assert example.parsed.strip() in ELSEWHERE


def test_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsers = [
        markdown.PythonCodeBlockParser(),
        markdown.CodeBlockParser("sh", check_command),
    ]
    page = ROOT / "docs/addons.md"
    document = sybil.Sybil(parsers).parse(page)
    rng = np.random.default_rng(0)
    document.namespace.update(
        images=rng.random((4, 64, 64, 3), np.float32),
        targets=rng.integers(0, 2, (4, 64, 64, 5)).astype(np.float32),
    )
    examples = list(document.examples())
    assert len(examples) == page.read_text().count("\n```") / 2
    for example in examples:
        example.evaluate()
    names = document.namespace
    assert names["optimizer"].offset_multiplier == 0.3
    # The state was in the file.
    assert int(names["loaded"].optimizer.iterations) == 3
    np.testing.assert_allclose(
        names["logits"],
        names["model"].predict(names["images"], verbose=0),
        atol=1e-4,
    )
