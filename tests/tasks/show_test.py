# SPDX-License-Identifier: Apache-2.0
"""Tests pictures of what trained models find, and where they look."""

import pathlib
import shutil
import sys
import types

import keras
import numpy as np
import pytest
from PIL import Image

import tf_deform_cli
from tf_deform import data, layers, tasks
from tf_deform.tasks import _evaluate, _models, _pictures


def test_pictures(detector, photographs, tmp_path):
    """Tests names, of photographs with one name too, and sizes."""
    (tmp_path / "photos").mkdir()
    shutil.copy(photographs / "images/0.png", tmp_path / "photos")
    (tmp_path / "photos/notes.txt").touch()
    written = tasks.show(
        detector[0] / "best.keras",
        [tmp_path / "photos", photographs / "voc/0.png"],
        tmp_path / "pictures",
        score=0.0,
        sampling=True,
    )
    names = [path.name for path in written]
    assert names == ["0.png", "0-sampling.png", "0-2.png", "0-2-sampling.png"]
    assert all(path.exists() for path in written)
    with Image.open(tmp_path / "pictures/0.png") as picture:
        assert picture.size == (96, 64)
        drawn = np.asarray(picture)
    before = data.read_image(photographs / "images/0.png")
    assert (drawn != before).any()


def test_pictures_without_boxes(detector, photographs, tmp_path):
    """Tests that scores that are too low leave a photograph as it is."""
    photograph = photographs / "images/4.png"
    (path,) = tasks.show(
        detector[0] / "best.keras", photograph, tmp_path, score=1.0
    )
    with Image.open(path) as picture:
        drawn = np.asarray(picture)
    np.testing.assert_array_equal(drawn, data.read_image(photograph))


def drawn(boxes, size=200):
    """Returns where a picture of boxes differs from the image."""
    image = np.zeros((size, size, 3), "uint8")
    found = {
        "boxes": np.float32(boxes),
        "labels": np.zeros(len(boxes), int),
        "scores": np.linspace(1, 0.5, len(boxes)),
    }
    picture = _pictures.boxes_picture(image, found, ("platypus",), 0.3)
    return (picture != image).any(-1)


def test_many_small_boxes_stay_visible():
    """Tests that text stays where there is room, or where boxes are few."""
    small = [[x, y, x + 9, y + 9] for x in (30, 60, 90) for y in (40, 60, 80)]
    around = np.zeros((200, 200), bool)
    for x1, y1, x2, y2 in small:
        around[y1:y2, x1:x2] = True
    assert drawn(small)[~around].any()
    large = [10, 110, 190, 190]
    seen = drawn([*small, *[large] * 11])
    around[110:190, 10:190] = True
    assert not seen[~around].any()
    # Inside of the small boxes no text is drawn, of the large one it is.
    assert not seen[41:48, 31:38].any()
    assert seen[113:120, 13:100].any()
    # A line takes an eighth of a box at most.
    thick = drawn([[0, 0, 1599, 1599]], 1600)[800]
    thin = drawn([[100, 100, 116, 116]] * 20, 1600)[108]
    assert (thick[:8].sum(), thin[100:116].sum()) == (4, 2 + 2)


def test_the_text_of_boxes_is_legible():
    """Tests dark text on light strips, light text on dark ones."""
    image = np.zeros((60, 200, 3), "uint8")
    for label, color in ((0, (31, 119, 180)), (1, (255, 127, 14))):
        found = {
            "boxes": np.float32([[10, 10, 190, 50]]),
            "labels": np.array([label]),
            "scores": np.ones(1),
        }
        picture = _pictures.boxes_picture(image, found, ("a", "b"), 0.3)
        strip = picture[12:23, 11:30]
        assert (strip == color).all(-1).mean() > 0.5
        light = (strip == 255).all(-1).any()
        dark = (strip == 0).all(-1).any()
        assert (light, dark) == ((True, False) if label == 0 else (False, True))


def test_counts_of_boxes(detector, photographs, tmp_path, monkeypatch, caplog):
    model = _models.load(str(detector[0] / "best.keras"))
    found = {
        "boxes": np.float32([[1, 2, 30, 40]] * 2),
        "labels": np.zeros(2, int),
        "scores": np.array([0.9, 0.4]),
    }
    monkeypatch.setattr(model, "predict_image", lambda image: found)
    monkeypatch.setattr(_models, "load", lambda *_, **__: model)
    with caplog.at_level("INFO", "tf_deform"):
        for score in (0.95, 0.5, 0.3):
            tasks.show(
                detector[0] / "best.keras",
                photographs / "images/4.png",
                tmp_path,
                score=score,
            )
    told = [text for text in caplog.messages if "4.png: " in text]
    counts = [text.split(": ")[1] for text in told]
    assert counts == ["0 boxes", "1 box", "2 boxes"]


@pytest.mark.parametrize("name", ["background", "_background_", "none"])
def test_the_background_is_clear(name):
    image = np.full((30, 40, 3), 60, "uint8")
    ids = np.zeros((30, 40), "int32")
    ids[:10], ids[20:] = 1, 255
    classes = (name, "red")
    picture = _pictures.mask_picture(image, ids, classes)
    clear = name != "none"
    assert (picture[10:20] == 60).all() == clear
    np.testing.assert_array_equal(picture[0, 0], [158, 94, 37])
    np.testing.assert_array_equal(picture[29, 0], [94, 94, 94])
    named = _pictures.with_legend(picture, [0, 1], classes)
    np.testing.assert_array_equal(named[:30, :40], picture)
    assert named.shape[1] > 40  # The names are longer.
    legend = named[30:].reshape(-1, 3).tolist()
    assert legend.count([255, 127, 14]) > 50
    assert (legend.count([31, 119, 180]) > 50) != clear
    assert legend.count([128, 128, 128]) < 50  # Void is not among the ids.


def test_classes_have_colours_of_their_own():
    assert len(np.unique(_pictures._COLORS, axis=0)) == 256


def test_masks_hold_ids(tmp_path):
    ids = np.arange(256, dtype="int32").reshape(8, 32)
    path = tmp_path / "mask.png"
    _pictures.write_mask(path, ids, ["background", "red"])
    with Image.open(path) as mask:
        assert (mask.mode, mask.size) == ("P", (32, 8))
        np.testing.assert_array_equal(np.asarray(mask), ids)
        assert mask.getpalette()[:6] == [0, 0, 0, 255, 127, 14]
    with pytest.raises(ValueError, match="at most 255.* Received: 256"):
        _pictures.write_mask(path, ids + 1, ["background", "red"])


def test_names_differ_with_their_endings():
    paths = [pathlib.Path(name) for name in ("x/a.png", "y/a.png")]
    assert _evaluate._names(paths) == ["a", "a-2"]
    paths = [pathlib.Path(name) for name in ("a.png", "a-mask.png")]
    assert _evaluate._names(paths) == ["a", "a-mask"]
    found = _evaluate._names(paths, _evaluate._ENDINGS)
    assert found == ["a", "a-mask-2"]


def test_pictures_of_a_segmenter(segmenter, photographs, tmp_path):
    folder = photographs / "images"
    model = segmenter[0] / "best.keras"
    written = tasks.show(model, folder, tmp_path)
    names = [path.name for path in written]
    assert len(names) == 14
    assert names[2:4] == ["1.png", "1-mask.png"]
    with Image.open(written[2]) as picture:
        assert picture.size[0] >= 64 and picture.size[1] > 80
    ids = data.read_mask(written[3])[..., 0]
    image = data.read_image(photographs / "images/1.png")
    expected = _models.load(str(model)).predict_image(image)
    np.testing.assert_array_equal(ids, expected)


def test_broken_photographs(segmenter, photographs, tmp_path, capsys):
    """Tests that the others are drawn, with and without the option."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_text("text")
    shutil.copy(photographs / "images/1.png", folder / "b.png")
    (folder / "c.png").touch()
    arguments = ["show", str(segmenter[0] / "best.keras"), str(folder)]
    arguments += ["--quiet", "--out"]
    for status, options in ((1, []), (0, ["--skip-broken"])):
        out = tmp_path / f"out{status}"
        assert tf_deform_cli.main([*arguments, str(out), *options]) == status
        written = sorted(path.name for path in out.iterdir())
        assert written == ["b-mask.png", "b.png"]
        said = capsys.readouterr().err
        for name in ("a.png", "c.png"):
            assert f"{folder / name} to be a sound image" in said
        error = "Expected 3 sound files or images. Received: 2 that are not"
        assert (error in said) == (status == 1)
    (folder / "b.png").unlink()
    options = [str(tmp_path / "none"), "--skip-broken"]
    assert tf_deform_cli.main([*arguments, *options]) == 1
    assert "Received: 2 that are not" in capsys.readouterr().err


@pytest.mark.parametrize("boxes", [0, 1, None])
def test_the_point_of_a_picture_of_sampling(boxes, monkeypatch):
    """Tests where a model is looked into, and that the caption says it."""
    asked = []
    monkeypatch.setattr(
        _pictures, "write_sampling", lambda *given: asked.extend(given)
    )
    found = np.zeros((40, 80))
    if boxes is not None:
        found = {"boxes": np.float32([[10, 4, 20, 8]])[:boxes]}
    model = types.SimpleNamespace(tile=None, image_size=80)
    image = np.zeros((40, 80, 3), "uint8")
    _evaluate.draw_sampling(pathlib.Path("x.png"), model, image, found)
    if boxes:
        assert asked[3:] == [[6, 15], "the middle of the best box"]
    else:
        assert asked[3:] == [[20, 40], "the middle of the photograph"]


def test_pictures_of_sampling(tmp_path):
    """Tests that the image fills the picture, and that the cross is seen."""
    pytest.importorskip("matplotlib")
    image = keras.Input((64, 64, 3))
    x = keras.layers.Conv2D(4, 3, 8, padding="same")(image)
    x = layers.DeformableConv2D(4, 3, padding="same")(x)
    model = types.SimpleNamespace(backbone=keras.Model(image, x))
    path = tmp_path / "sampling.png"
    pixels = np.full((64, 64, 3), 90, "uint8")
    assert _pictures.write_sampling(path, model, pixels, (32, 32), "the middle")
    with Image.open(path) as picture:
        drawn = np.asarray(picture.convert("RGB")).astype(int)
    gray = (drawn == 90).all(-1)
    assert gray.any(0).mean() > 0.95
    assert gray[12].mean() > 0.95
    cyan = (drawn == [0, 255, 255]).all(-1)
    rows, columns = np.nonzero(cyan)
    assert cyan.sum() > 100 and np.ptp(rows) > 15
    around = drawn[
        rows.min() - 2 : rows.max() + 3, columns.min() : columns.max() + 1
    ]
    assert (around < 40).all(-1).sum() > 100


def test_pictures_of_sampling_need_matplotlib(
    photographs, tmp_path, monkeypatch
):
    """Tests that this is told once, before the model is read."""
    (tmp_path / "model.keras").write_text("no model")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"tf-deform\[plots\]"):
        tasks.show(
            tmp_path / "model.keras",
            photographs / "images",
            tmp_path / "pictures",
            sampling=True,
        )
    assert not (tmp_path / "pictures").exists()


def test_no_photographs(detector, tmp_path):
    with pytest.raises(ValueError, match="Expected photographs"):
        tasks.show(detector[0] / "best.keras", tmp_path, tmp_path)


# Exports.


def test_a_comparison_has_titles():
    pictures = {
        "truth": np.full((40, 60, 3), 90, np.uint8),
        "found, in words that are wider than it": np.full(
            (40, 60, 3), 190, np.uint8
        ),
    }
    row = _pictures.side_by_side(pictures)
    strip = len(row) - 40
    assert strip > 0
    for left, picture in zip((0, 68), pictures.values()):
        np.testing.assert_array_equal(row[strip:, left : left + 60], picture)
        assert row[:strip, left : left + 60].min() < 100
    assert (row[:, 60:68] == 255).all()
