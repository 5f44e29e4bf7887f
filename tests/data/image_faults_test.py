# SPDX-License-Identifier: Apache-2.0
"""Tests odd and broken image files in data sets of all forms.

A fault is put into the image `a` of three.
"""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from faults import Fault, check, rows
from PIL import Image, ImageFile
from small_sets import (
    OBJECTS,
    SIZES,
    WRITERS,
    coco,
    images_of,
    mask,
    picture,
    write_json,
    write_mask,
    write_voc,
    xml,
)

from tf_deform import data

ALL = "voc coco yolo masks"
BOXES = "voc coco yolo"


def path_of(root, form):
    return images_of(form, root) / "a.png"


def saved(image, kind="PNG", **options):
    """Returns a maker that replaces the image by another file."""

    def make(root, form):
        image.save(path_of(root, form), kind, **options)

    return make


def written(content):
    def make(root, form):
        path_of(root, form).write_bytes(content)

    return make


def cut(kind, keep):
    """Returns a maker of a file of which a share is kept."""

    def make(root, form):
        buffer = io.BytesIO()
        picture("a").save(buffer, kind)
        content = buffer.getvalue()
        path_of(root, form).write_bytes(content[: int(keep * len(content))])

    return make


def gone(root, form):
    path_of(root, form).unlink()


def a_folder(root, form):
    gone(root, form)
    path_of(root, form).mkdir()


def link_to_nothing(root, form):
    gone(root, form)
    path_of(root, form).symlink_to(root / "nowhere.png")


def link(root, form):
    path = path_of(root, form)
    other = root.parent / f"{root.name}-other"
    other.mkdir()
    path.symlink_to(path.rename(other / "photo.png"))


def pipe(root, form):
    gone(root, form)
    os.mkfifo(path_of(root, form))


def png(width, height, bits=8, colour=2, rows=b""):
    """Returns a PNG of any claims."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def trailing(root, form):
    """Appends what telephones append."""
    path = path_of(root, form)
    picture("a").save(path, "JPEG")
    path.write_bytes(path.read_bytes() + b"SEFT" + bytes(300))


def uppercase(root, form):
    path = path_of(root, form)
    path.rename(path.with_suffix(".PNG"))


def broken_exif(root, form):
    path = path_of(root, form)
    picture("a").save(path, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")


def resized(root, form):
    picture("a").resize((48, 32)).save(path_of(root, form))


def hidden(root, form):
    """Leaves what macOS leaves beside files."""
    for name in ("._a.png", "._a.xml", ".DS_Store"):
        (images_of(form, root) / name).write_bytes(b"\0\5\x16\7")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX/a.png").write_bytes(b"\0\5\x16\7")


WIDTH, HEIGHT = SIZES["a"]
GREY16 = Image.fromarray(
    np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 100
)
PALETTE = picture("a").quantize(16)
FRAMES = [picture("a", "L").rotate(180), picture("a", "L")]
GREY = "are gray or have a palette, as masks do, .*: 1 .*a.png"
DEEP = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH * 6), np.uint8)
DEEP = png(
    WIDTH,
    HEIGHT,
    16,
    rows=b"".join(b"\0" + row.tobytes() for row in DEEP),
)
FAULTS = [
    Fault("image missing", BOXES, gone, "broken", "no file of|one image of"),
    Fault(
        "image missing",
        "masks",
        gone,
        "kept",
        "masks without an image were left out: 1 .a.",
        check=lambda found: found.keys() == {"b", "c"} or pytest.fail(),
    ),
    Fault("image of no bytes", ALL, written(b""), "broken", "an empty file"),
    Fault("PNG cut", ALL, cut("PNG", 0.6), "broken", "a sound image"),
    Fault(
        "PNG cut within its header", ALL, cut("PNG", 0.02), "broken", "a.png"
    ),
    Fault("JPEG cut", ALL, cut("JPEG", 0.9), "broken", "a sound image"),
    Fault("text named png", ALL, written(b"hello"), "broken", "none of JPEG"),
    Fault("folder named png", ALL, a_folder, "broken", "a folder|a.png"),
    Fault("link to nothing", ALL, link_to_nothing, "broken", "a.png"),
    Fault("pipe", ALL, pipe, "broken", "a.png"),
    Fault(
        "PNG of 10 000 megapixels",
        ALL,
        written(png(100_000, 100_000)),
        "broken",
        "pixels.*MAX_IMAGE_PIXELS",
    ),
    Fault("PNG of no width", ALL, written(png(0, 5)), "broken", "a.png"),
    Fault("16-bit grey PNG", ALL, saved(GREY16), "broken", "have 8 bits"),
    Fault(
        "float TIFF",
        ALL,
        saved(picture("a", "L").convert("F"), "TIFF"),
        "broken",
        "have 8 bits",
    ),
    Fault(
        "EPS, which would run a program",
        ALL,
        saved(picture("a"), "EPS"),
        "broken",
        "none of JPEG",
    ),
    Fault("resized since", "voc coco", resized, "broken", "24x16 .*48x32"),
    Fault("mask of another size", "masks", resized, "broken", "24x16 .*48x32"),
    Fault("16-bit colour PNG", ALL, written(DEEP), "kept"),
    Fault("grey", ALL, saved(picture("a", "L")), "kept", GREY),
    Fault(
        "grey JPEG",
        ALL,
        saved(picture("a", "L"), "JPEG"),
        "kept",
        r"(?s)\A(?!.*are gray)",
    ),
    Fault("grey and alpha", ALL, saved(picture("a", "LA")), "kept"),
    Fault("colour and alpha", ALL, saved(picture("a", "RGBA")), "kept"),
    Fault("one bit", ALL, saved(picture("a", "1")), "kept", GREY),
    Fault("palette", ALL, saved(PALETTE), "kept", GREY),
    Fault(
        "palette with transparency",
        ALL,
        saved(PALETTE, transparency=b"\0\x80\xff"),
        "kept",
    ),
    Fault("CMYK JPEG", ALL, saved(picture("a", "CMYK"), "JPEG"), "kept"),
    Fault(
        "animated GIF",
        ALL,
        saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "kept",
        "are animated; the first picture was taken: 1 .*a.png",
    ),
    Fault("WebP named png", ALL, saved(picture("a"), "WEBP"), "kept"),
    Fault("JPEG named png", ALL, saved(picture("a"), "JPEG"), "kept"),
    Fault("BMP named png", ALL, saved(PALETTE, "BMP"), "kept"),
    Fault("bytes after the image", ALL, trailing, "kept"),
    Fault("broken EXIF", ALL, broken_exif, "kept"),
    Fault("ending in capitals", ALL, uppercase, "kept"),
    Fault("link", ALL, link, "kept"),
    Fault("what macOS leaves", ALL, hidden, "kept"),
]


@pytest.mark.parametrize("form, fault", rows(FAULTS))
@pytest.mark.filterwarnings("error:Palette images")
def test_an_image(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")


@pytest.mark.parametrize("form", ALL.split())
def test_a_folder_that_links_to_itself_is_read_once(form, tmp_path):
    source = WRITERS[form](tmp_path)
    notes = data.read(source).notes
    folder = images_of(form, tmp_path)
    (folder / "again").symlink_to(folder)
    result = data.read(source)
    assert len(result.photographs) == 3 and result.notes == notes


EXIF = {
    # The pixel of an upright image `(h, w)` at (row, column), as the stored
    # image has it: EXIF's table of where the stored first row and column are.
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 1),  # Turned left: to be turned right.
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


def with_exif(path, pixels, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(
        path, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})
    )


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("form", ["voc", "coco", "yolo", "masks"])
@pytest.mark.parametrize("claims", ["upright", "stored"])
def test_orientation(form, claims, orientation, tmp_path):
    """Tests that boxes and masks lie where the drawn pixels are.

    The objects are drawn into a stored image of grey. A file that claims the
    stored size has boxes of the stored image, and so has a mask of that size.
    """
    kinds = {5: "JPEG", 6: "PNG", 7: "TIFF", 8: "WEBP"}
    source = WRITERS[form](tmp_path)
    upright = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for value, (_, (x1, y1, x2, y2)) in zip(
        (0, 255), OBJECTS["a"], strict=True
    ):
        upright[y1:y2, x1:x2] = value
    stored = EXIF[orientation](upright)
    kind = kinds.get(orientation, "PNG")
    with_exif(path_of(tmp_path, form), stored, orientation, kind)
    turned = orientation > 4 and claims == "stored" and form != "yolo"
    if turned:
        # Draws the boxes of the stored image.
        boxes = []
        for label, (x1, y1, x2, y2) in OBJECTS["a"]:
            drawn = np.zeros((HEIGHT, WIDTH), bool)
            drawn[y1:y2, x1:x2] = True
            rows, columns = np.nonzero(EXIF[orientation](drawn))
            edges = (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
            boxes.append((label, tuple(map(int, edges))))
        size = stored.shape[1::-1]
        if form == "voc":
            (tmp_path / "a.xml").write_text(xml("a", boxes, size))
        elif form == "coco":
            content = coco()
            content["images"][0].update(width=size[0], height=size[1])
            for one, (_, (x1, y1, x2, y2)) in zip(
                content["annotations"], boxes, strict=False
            ):
                one["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            write_json(tmp_path, content)
        else:
            pixels = np.ascontiguousarray(EXIF[orientation](mask("a")))
            write_mask(tmp_path, "a", pixels)
    result = data.read(source)
    photograph = next(x for x in result.photographs if "a.png" in x.path)
    image = data.read_image(photograph.path)
    assert (photograph.width, photograph.height) == (WIDTH, HEIGHT)
    assert image.shape == upright.shape
    if kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(image, upright)
    else:
        assert np.abs(image.astype(int) - upright).mean() < 12
    if form == "masks":
        np.testing.assert_array_equal(
            data.read_mask(photograph.mask)[..., 0], mask("a")
        )
    else:
        wanted = [edges for _, edges in OBJECTS["a"]]
        np.testing.assert_allclose(photograph.boxes, wanted, atol=1e-5)
    notes = "\n".join(result.notes)
    assert ("annotated as they are stored" in notes) == turned
    assert ("annotated upright" in notes) == (orientation > 1 and not turned)


def test_headers_alone_are_read(tmp_path, monkeypatch):
    """Tests that sizes cost no decoding, but skipping what is broken does."""
    source = write_voc(tmp_path)
    picture("b").save(tmp_path / "b.png", "JPEG")
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile,
        "load",
        lambda self: (decoded.append(self.filename), load(self))[1],
    )
    data.read(source)
    assert not decoded
    data.read(source, skip_broken=True)
    assert len(decoded) == 3


def test_a_flaw_within_the_pixels_is_found_if_asked(tmp_path):
    source = write_voc(tmp_path)
    content = bytearray((tmp_path / "b.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "b.png").write_bytes(content)
    result = data.read(source)
    photograph = next(x for x in result.photographs if "b.png" in x.path)
    with pytest.raises(
        ValueError, match="Expected .*b.png to be a sound image"
    ):
        data.read_image(photograph.path)
    left = data.read(source, skip_broken=True)
    assert len(left.photographs) == 2
    assert re.search(
        "broken and left out: .*b.xml: Expected .*b.png to be a sound",
        "\n".join(left.notes),
    )
