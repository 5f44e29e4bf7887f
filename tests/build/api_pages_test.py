# SPDX-License-Identifier: Apache-2.0
"""Tests that the API pages are whole, and describe every argument."""

import html.parser
import inspect
import pathlib
import re
import runpy
import sys

import pdoc
import pytest

import tf_deform

ROOT = pathlib.Path(__file__).parents[2]
MODULES = {
    "tf_deform": tf_deform,
    "tf_deform.data": tf_deform.data,
    "tf_deform.demo": tf_deform.demo,
    "tf_deform.export": tf_deform.export,
    "tf_deform.layers": tf_deform.layers,
    "tf_deform.models": tf_deform.models,
    "tf_deform.ops": tf_deform.ops,
    "tf_deform.training": tf_deform.training,
    "tf_deform.visualization": tf_deform.visualization,
}
NAMES = [
    (module, name)
    for module in MODULES
    for name in MODULES[module].__all__
    if not inspect.ismodule(getattr(MODULES[module], name))
]
SECTIONS = {"Arguments", "Attributes", "Call arguments", "Raises", "Returns"}
SECTIONS |= {"Weights"}


class Page(html.parser.HTMLParser):
    """Collects the names, headings, list items and other text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.headings: list[str] = []
        self.items: dict[str, list[str]] = {}
        self.text = ""
        self._name = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        identifier = dict(attributes).get("id") or ""
        # Headings have identifiers as well.
        if tag in ("section", "div") and identifier:
            self.names.add(identifier)
            self._name = identifier
        if tag not in ("br", "hr", "input", "meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"code", "pre", "style", "script"} & set(self.open):
            return
        if self.open[-1:] == ["h6"]:
            self.headings.append(data.strip())
        elif self.open[-2:] == ["li", "strong"]:
            names = self.items.setdefault(
                f"{self._name} {self.headings[-1]}", []
            )
            names += re.findall(r"\w+", data)
        self.text += data


def build(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds the pages as the command does, anew."""
    pdoc.doc.Module.from_name.__func__.cache_clear()
    monkeypatch.setattr(sys, "argv", ["api.py", str(folder)])
    runpy.run_path(str(ROOT / "docs/api.py"), run_name="__main__")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Page]:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        build(folder, patch)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*.html")}
    expected = {f"{name.replace('.', '/')}.html" for name in MODULES}
    assert files == expected | {"index.html"}
    return {
        name: Page((folder / f"{name.replace('.', '/')}.html").read_text())
        for name in MODULES
    }


def test_every_public_name_is_there(pages):
    missing = [
        f"{module}.{name}"
        for module, name in NAMES
        if name not in pages[module].names
    ]
    assert missing == []


def test_nothing_private_is_there(pages):
    names = {name for page in pages.values() for name in page.names}
    private = {
        name
        for name in names
        if re.search(r"(^|\.)_", name) and not name.endswith("__")
    }
    assert private == set()
    # Keras describes the methods that Keras itself calls.
    assert not {name for name in names if name.endswith(".get_config")}
    assert "DeformableConv2D.set_weights" in names


def test_docstrings_became_sections_and_lists(pages):
    """Tests that every section is known to pdoc.

    Otherwise pdoc would run the section together into one line.
    """
    for page in pages.values():
        assert {heading.rstrip(":") for heading in page.headings} <= SECTIONS
        # Signatures may have these.
        text = re.sub(r"\*\*(kwargs|options): Any", "", page.text)
        assert "**" not in text and "``" not in text
        for name in ("Args", "Example", *(SECTIONS - {"Arguments"})):
            lines = [line.strip() for line in page.text.splitlines()]
            assert lines.count(f"{name}:") == sum(
                heading == f"{name}:" for heading in page.headings
            )


@pytest.mark.parametrize("module, name", NAMES)
def test_every_argument_is_described(pages, module, name):
    value = getattr(MODULES[module], name)
    if not callable(value):
        return
    page = pages[module]
    kind = "Attributes" if name in ("Report", "Surgery") else "Arguments"
    described = page.items.get(f"{name} {kind}:", [])
    assert described == list(inspect.signature(value).parameters)
    if name.startswith("Deformable"):
        call = list(inspect.signature(value.call).parameters)
        assert page.items[f"{name} Call arguments:"] == call[1:]


def test_a_name_that_is_gone_fails(tmp_path, monkeypatch):
    names = [*tf_deform.ops.__all__, "gone"]
    monkeypatch.setattr(tf_deform.ops, "__all__", names)
    with pytest.raises(Warning, match="gone"):
        build(tmp_path, monkeypatch)


def test_a_type_that_is_gone_fails(tmp_path, monkeypatch):
    types = tf_deform.ops.deformable_conv2d.__annotations__
    monkeypatch.setitem(types, "mask", "Gone")
    with pytest.raises(Warning, match="Gone"):
        build(tmp_path, monkeypatch)
