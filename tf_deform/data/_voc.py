# SPDX-License-Identifier: Apache-2.0
"""Reads folders of images with Pascal VOC's xml files."""

from __future__ import annotations

import os
import re
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from tf_deform.data._drafts import (
    FOREIGN,
    Draft,
    Notes,
    Told,
    collect,
    draft,
    finish,
)
from tf_deform.data._folders import (
    Index,
    files,
    flag,
    folder,
    inner,
    lines,
    number,
    pair,
    place,
    read_bytes,
    read_text,
    shown,
    stem,
)
from tf_deform.data._images import header
from tf_deform.data._records import Annotations

# Folders of the VOC form that hold masks, named as the images.
_MASKS = ("segmentationclass", "segmentationobject")
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_CROWD = ("is_crowd", "iscrowd", "crowd")


def _refuse_entity(*_: object) -> None:
    raise ValueError("Expected xml without entities. Received: an <!ENTITY")


def _parse(data: bytes) -> ElementTree.Element:
    """Parses xml that may be anybody's.

    Raises:
        ValueError: It is no xml, or declares entities, which can fill the
            memory or name other files.
    """
    text: bytes | str = data
    told = re.match(
        rb"""(?:\xef\xbb\xbf)?<\?xml[^>]*encoding=["']([\w.-]+)""", data
    )
    if told and not told[1].lower().startswith(b"utf"):
        try:  # Expat knows few encodings.
            text = data.decode(told[1].decode())
        except (LookupError, UnicodeDecodeError) as error:
            raise ValueError(
                f"Expected xml in the encoding that it names. Received: {error}"
            ) from error
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = _refuse_entity
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ValueError(
            f"Expected well-formed xml. Received: {error}"
        ) from error
    return builder.close()


def _text(parent: ElementTree.Element, name: str) -> str:
    """Returns a child's text; a missing child has none."""
    return (parent.findtext(name) or "").strip()


def _size(root: ElementTree.Element) -> tuple[float, float] | None:
    texts = [_text(root, f"size/{name}") for name in ("width", "height")]
    if not all(texts):
        return None
    return tuple(number(text, "size") for text in texts)


def _object(node: ElementTree.Element, base: int) -> Told:
    name = _text(node, "name")
    boxes = node.findall("bndbox")
    if not name or len(boxes) != 1:
        raise ValueError(
            "Expected each object to have a name and one bndbox. Received: "
            f"name {name!r}, {len(boxes)} boxes"
        )
    # Tools write the edges in any order.
    edges = [number(_text(boxes[0], key), key) for key in _EDGES]
    difficult = flag(_text(node, "difficult"), "difficult")
    crowd = any(
        flag(_text(attribute, "value"), "is_crowd")
        for attribute in node.findall("attributes/attribute")
        if _text(attribute, "name").lower() in _CROWD
    )
    all_of_it = [(x.tag, (x.text or "").strip()) for x in node.iter()]
    box = (edges[0] - base, edges[1] - base, edges[2], edges[3])
    return Told(name, box, crowd, difficult, all_of_it)


class _Reader:
    def __init__(self, root: str, split: str | None, base: int) -> None:
        root = folder(root)
        self.list: str | None = None
        if split is not None:
            self.list = _find_list(root, split)
            root = root if self.list else os.path.join(root, split)
        self.root = root
        self.base = base
        self.notes = Notes()
        annotations = inner(root, "annotations") or root
        if not files(annotations, {".xml"}):
            annotations = root  # That folder is of another form, as COCO's.
        self.xmls = [
            os.path.relpath(os.path.join(annotations, path), root)
            for path in files(annotations, {".xml"})
        ]
        self.index = Index(root, without=_MASKS)
        strict = inner(root, "jpegimages")
        start = os.path.relpath(strict, root) + "/" if strict else ""
        self.images = [x for x in self.index.paths if x.startswith(start)]

    def items(self, decode: bool) -> list[tuple[str, Any]]:
        """Returns names and functions that read one photograph each."""
        images = pair(self.images, self.xmls)
        xmls = self.xmls
        alone = self.images
        if self.list is not None:
            xmls, alone = self._listed()
        result = [
            (
                os.path.join(self.root, xml),
                lambda xml=xml: self._read(xml, images[xml], decode),
            )
            for xml in xmls
        ]
        taken = {image for found in images.values() for image in found}
        # Only reading tells which images xml files with other names mean.
        self.alone = [image for image in alone if image not in taken]
        return result

    def _listed(self) -> tuple[list[str], list[str]]:
        """Returns the xml files of the list, and its images without one."""
        by_place = {place(xml): xml for xml in self.xmls}
        by_stem = {stem(xml): xml for xml in self.xmls}
        images = {place(image): image for image in self.images}
        image_stems = {stem(image): image for image in self.images}
        xmls, alone = [], []
        for line in dict.fromkeys(lines(read_text(self.list))):
            for name in (line, re.sub(r"\s+(-1|0|1)$", "", line)):
                # A line may be a name with dots and without an ending.
                keys = (name, place(name + "."), place(name), stem(name))
                xml = _first(keys, by_place, by_stem)
                image = _first(keys, images, image_stems)
                if xml or image:
                    break
            if xml:
                xmls.append(xml)
            else:
                alone.append(image or name)
        return xmls, alone

    def _read(self, xml: str, found: list[str], decode: bool) -> Draft:
        root = _parse(read_bytes(os.path.join(self.root, xml)))
        if root.tag != "annotation":
            raise ValueError(
                "Expected Pascal VOC's <annotation>. Received: "
                f"<{root.tag!s:.80}>"
            )
        name = _text(root, "filename")
        last = re.split(r"[/\\]", name)[-1]
        others = len(found) - 1
        if len(found) > 1:
            named = [x for x in found if os.path.basename(x) == last]
            found = named or found
        if not found and name:
            found = [self.index.find(name)]
        if len(found) != 1:
            raise ValueError(
                "Expected one image of this name. Received: "
                + (", ".join(map(shown, found)) or "none")
            )
        image = os.path.join(self.root, found[0])
        told = [_object(node, self.base) for node in root.iter("object")]
        if not told and root.find(".//bndbox") is not None:
            raise ValueError(
                "Expected each bndbox in an object. Received: a bndbox outside"
            )
        one = draft(image, header(image, decode=decode), told, _size(root))
        if others > 0:
            one.odd[
                "images that share the name of an annotated one were left out"
            ] += others
        if name and stem(last) != stem(image) and last != stem(image):
            one.odd[
                "images were found by the name of their xml file, which names "
                "another"
            ] += 1
        if self.base and any(min(x.box[:2]) < 0 for x in told):
            one.odd[
                "files have a coordinate 0, so they seem to count from 0; read "
                "with base=0"
            ] += 1
        return one


def _first(keys: tuple[str, ...], *tables: dict[str, str]) -> str | None:
    for table in tables:
        for key in keys:
            if key in table:
                return table[key]
    return None


def _find_list(root: str, split: str) -> str | None:
    """Returns the file that lists a part of the images, None for a folder.

    Raises:
        FileNotFoundError: There is neither.
    """
    sets = inner(root, "imagesets")
    folders = [root]
    if sets is not None:
        main = inner(sets, "main")
        folders = [sets, root] if main is None else [main, sets, root]
    for where in folders:
        path = os.path.join(where, split + ".txt")
        if os.path.isfile(path):
            return path
    if os.path.isdir(os.path.join(root, split)):
        return None
    lists = [stem(path) for path in files(folders[0], {".txt"})]
    raise FileNotFoundError(
        f"Expected a list {split}.txt in {shown(folders[0])} or a folder "
        f"{split} in {shown(root)}. Received: the lists "
        f"{', '.join(lists) or 'none'}"
    )


def _names(root: str) -> list[str]:
    """Returns the classes of a labelmap.txt without its background."""
    path = os.path.join(root, "labelmap.txt")
    if not os.path.isfile(path):
        return []
    names = [line.split(":")[0].strip() for line in lines(read_text(path))]
    return [name for name in names if name and name != "background"]


def read_voc(
    root: str,
    split: str | None = None,
    *,
    classes: list[str] | None,
    base: int,
    crowds: str,
    skip_broken: bool,
) -> Annotations:
    """Reads Pascal VOC's form; see `tf_deform.data.read`."""
    reader = _Reader(root, split, base)
    notes = reader.notes
    end = " and both ends are inside" if base else ", far edges are outside"
    notes.say(f"VOC boxes are read as counting pixels from {base}{end}")
    drafts = collect(reader.items(skip_broken), skip_broken, notes)
    if not drafts and not reader.xmls:
        raise FileNotFoundError(
            f"Expected xml files in {shown(reader.root)}. Received: none"
        )
    known = {one.path for one in drafts}
    places = {os.path.dirname(path) for path in known}

    def alone(path: str) -> Draft:
        found = os.path.join(reader.root, reader.index.find(path))
        return draft(found, header(found, decode=skip_broken), [])

    items = []
    for path in reader.alone:
        full = os.path.join(reader.root, path)
        if (
            reader.list is None
            and places
            and (os.path.dirname(full) not in places)
        ):
            notes.add(FOREIGN, full)
        elif full not in known:
            items.append((full, lambda path=path: alone(path)))
    without = collect(items, skip_broken, notes)
    for one in without:
        notes.add("images without an xml file, taken as empty", one.path)
    drafts += without
    used = sorted({told.key for one in drafts for told in one.told})
    known_names = _names(reader.root)
    order = known_names + [name for name in used if name not in known_names]
    if not order and classes is None:
        raise ValueError(
            f"Expected at least one object in {shown(reader.root)}. Received: "
            f"none in {len(drafts)} images"
        )
    return finish(
        drafts, {name: name for name in order}, classes, crowds, notes
    )
