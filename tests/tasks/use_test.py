# SPDX-License-Identifier: Apache-2.0
"""Tests what is done with trained models: judging, pictures, exports."""

import ast
import gc
import json
import pathlib
import shutil
import sys
import types
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import liven, make_faster_rcnn
from PIL import Image

import tf_deform_cli
from tf_deform import data, layers, tasks
from tf_deform.models import serving
from tf_deform.tasks import _evaluate, _models, _pictures


def test_evaluating_gives_what_training_gave(detector, sources, tmp_path):
    out, found = detector
    measures = tasks.evaluate(out / "best.keras", sources["coco"])
    np.testing.assert_equal(measures, found["validation"])
    # The same photographs in another form.
    measures = tasks.evaluate(
        out / "best.keras", sources["voc"], out=tmp_path / "voc"
    )
    np.testing.assert_equal(measures, found["validation"])
    results = (tmp_path / "voc/results.json").read_text()
    assert json.loads(results) == json.loads((out / "results.json").read_text())
    names = [f"pictures/validation-{number}.png" for number in range(1, 8)]
    written = (tmp_path / "voc/pictures").iterdir()
    assert {f"pictures/{path.name}" for path in written} == set(names)
    for name in names:
        picture = (tmp_path / "voc" / name).read_bytes()
        assert picture == (out / name).read_bytes()


def test_the_command_prints_json(detector, sources, capsys):
    out, found = detector
    arguments = ["eval", str(out / "best.keras"), "--data", sources["voc"]]
    assert tf_deform_cli.main([*arguments, "--max-detections", "2"]) == 0
    printed, said = capsys.readouterr()
    measures = json.loads(printed, parse_constant=pytest.fail)
    assert measures.keys() == found["validation"].keys()
    assert measures["max_detections"] == 2
    assert "max_detections  2" in said
    # There is no object of this size.
    assert measures["APl"] is None
    assert "APl             none" in said


def test_classes_that_the_model_does_not_know(
    detector, photographs, tmp_path, capsys
):
    out, _ = detector
    shutil.copytree(photographs / "voc", tmp_path / "voc")
    path = tmp_path / "voc/1.xml"
    path.write_text(path.read_text().replace("red", "green"))
    arguments = ["eval", str(out / "best.keras")]
    arguments += ["--data", f"voc:{tmp_path}/voc"]
    assert tf_deform_cli.main([*arguments, "--quiet"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "Expected no classes but blue, red. Received: green" in said


def test_photographs_of_another_kind(detector, segmenter, sources):
    with pytest.raises(ValueError, match="voc, coco or yolo photographs"):
        tasks.evaluate(detector[0] / "best.keras", sources["masks"])
    with pytest.raises(ValueError, match="masks photographs for a segmenter"):
        tasks.evaluate(segmenter[0] / "best.keras", sources["voc"])


@pytest.mark.parametrize(
    "name", ["settings.json", "truth.json", "pictures", "masks"]
)
def test_results_are_not_replaced(name, sources, tmp_path):
    """Tests that this is answered before the model is read."""
    (tmp_path / "model.keras").write_text("no model")
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"judged, which has {name}"):
        tasks.evaluate(
            tmp_path / "model.keras", sources["voc"], out=tmp_path / "judged"
        )
    assert (tmp_path / "judged" / name).read_text() == "{}"


def test_evaluating_a_segmenter(segmenter, sources, tmp_path, monkeypatch):
    model, masks = segmenter[0] / "best.keras", sources["masks"]
    # Names of training and validation may stand for other ids.
    words = r"Expected no classes but none, blue.*\(--classes\) names them"
    with pytest.raises(ValueError, match=words):
        tasks.evaluate(model, masks)
    monkeypatch.setattr(_evaluate, "MOST_PICTURES", 3)
    names = ("none", "blue", "red")
    measures = tasks.evaluate(model, masks, classes=names, out=tmp_path / "a/b")
    assert measures.keys() == segmenter[1]["validation"].keys()
    assert len(list((tmp_path / "a/b/pictures").iterdir())) == 3
    with Image.open(tmp_path / "a/b/pictures/validation-2.png") as picture:
        drawn = np.asarray(picture)
    # The names of the classes stand below.
    assert drawn.shape[1] == 64 + 8 + 64 and len(drawn) > 80
    assert (drawn[:80, 64:72] == 255).all()
    assert (drawn[80:] == 128).all(-1).sum() > 50  # Void is in the truth.
    # Of each photograph that is judged there is a mask.
    written = sorted((tmp_path / "a/b/masks").iterdir())
    assert [path.name for path in written] == [f"{i}.png" for i in range(7)]
    loaded = _models.load(str(model))
    for path in written[:2]:
        ids = data.read_mask(path)[..., 0]
        image = data.read_image(
            sources["masks"][6:].split(",")[0] + f"/{path.name}"
        )
        np.testing.assert_array_equal(ids, loaded.predict_image(image))


def test_a_mask_for_each_photograph(tmp_path, caplog):
    """Tests photographs of one name, and an end before all are judged."""
    photographs = [
        types.SimpleNamespace(path=f"{folder}/a.png") for folder in "xy"
    ]
    model = types.SimpleNamespace(class_names=["none", "red"])
    found = [(i + 1, np.full((3, 4), i, "int32")) for i in range(2)]
    folder = tmp_path / "out/masks"
    arguments = (folder, iter(found), photographs, model)
    with pytest.raises(OSError, match="broken"):
        with _evaluate._writing_masks(*arguments) as written:
            next(written)
            raise OSError("broken")
    assert not list((tmp_path / "out").iterdir())
    arguments = (folder, iter(found), photographs, model)
    with caplog.at_level("INFO", "tf_deform"):
        with _evaluate._writing_masks(*arguments) as written:
            assert [number for number, _ in written] == [1, 2]
    assert "y/a.png: its mask is a-2.png" in caplog.text
    for name, value in (("a", 0), ("a-2", 1)):
        ids = data.read_mask(folder / f"{name}.png")
        assert ids.shape == (3, 4, 1) and (ids == value).all()


def test_a_model_keeps_its_tiles(lively, sources, tmp_path, caplog):
    """Tests that photographs are cut as those that the model learned from."""
    model = _models.load(str(lively), max_detections=500, tile=48)
    assert model.max_detections == model.proposals == 500
    model = _models.load(str(lively), tile=48)
    model.save(tmp_path / "of_tiles.keras")
    cut = tasks.evaluate(tmp_path / "of_tiles.keras", sources["voc"])
    assert cut == tasks.evaluate(lively, sources["voc"], tile=48)
    assert cut != tasks.evaluate(lively, sources["voc"])
    with caplog.at_level("WARNING", "tf_deform"):
        tasks.export_model(tmp_path / "of_tiles.keras", tmp_path / "m.tflite")
    assert "learned from tiles of 48 pixels" in caplog.text
    about = json.loads((tmp_path / "m.tflite.json").read_text())
    assert about["tile"] == 48


@pytest.mark.parametrize(
    "tile, point, corner",
    [
        (None, (30, 50), (0, 0)),
        (40, (30, 50), (10, 30)),
        (40, (3, 95), (0, 60)),
        (90, (30, 50), (0, 5)),  # A tile is higher than the photograph.
    ],
)
def test_what_a_model_sees(tile, point, corner):
    model = types.SimpleNamespace(tile=tile, image_size=80)
    image = np.random.default_rng(3).integers(0, 256, (60, 100, 3), "uint8")
    square, found = _models.view(model, image, np.array(point))
    side = tile or 100
    part = image[corner[0] :, corner[1] :][:side, :side]
    scale = 80 / side
    shape = [round(extent * scale) for extent in part.shape[:2]]
    expected = np.full((80, 80, 3), 114, "float32")
    expected[: shape[0], : shape[1]] = tf.image.resize(
        part, shape, antialias=True
    )
    np.testing.assert_allclose(square, expected, atol=1e-3)
    # Sides become whole pixels, and the scale with them.
    np.testing.assert_allclose(
        found, np.subtract(point, corner) * scale, atol=0.5
    )


def test_masks_are_not_kept():
    """Tests that of all predictions the first ones alone stay in memory."""
    kept, alive = [], []

    def predict():
        for number in range(1, 6):
            mask = np.zeros(3)
            alive.append(weakref.ref(mask))
            yield number, mask

    numbers = [number for number, _ in _models.first(predict(), 2, kept)]
    gc.collect()
    assert numbers == [1, 2, 3, 4, 5]
    assert [number for number, _ in kept] == [1, 2]
    assert [ref() is not None for ref in alive] == [True, True, *[False] * 3]


@pytest.mark.parametrize("kind", ["text", "another model", "weights"])
def test_a_file_of_no_model(kind, sources, tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("text")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    if kind == "another model":
        model.save(path)
    if kind == "weights":
        model.save_weights(tmp_path / "a.weights.h5")
        path = tmp_path / "a.weights.h5"
    with pytest.raises(ValueError, match=f"Expected {path} to be a "):
        tasks.evaluate(path, sources["voc"])


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
    image = image_of(photographs, 1)
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


@pytest.fixture(scope="module")
def lively(detector, tmp_path_factory):
    """Makes a file of a detector whose scores lie apart, as after training.

    After a few steps they nearly tie, and which of two boxes goes that overlap
    each other is up to the last bits of a processor's sums.
    """
    model = liven(_models.load(str(detector[0] / "best.keras")))
    path = tmp_path_factory.mktemp("lively") / "best.keras"
    model.save(path)
    return path


def image_of(photographs, number: int) -> np.ndarray:
    return data.read_image(photographs / f"images/{number}.png")


def test_onnx(lively, photographs, tmp_path):
    """Tests what docs tell people to do with the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    tasks.export_model(lively, path)
    about = json.loads((tmp_path / "model.onnx.json").read_text())
    assert about["classes"] == ["blue", "red"]
    session = onnxruntime.InferenceSession(path)
    kept = session.get_modelmeta().custom_metadata_map
    assert json.loads(kept["tf_deform"]) == about
    assert ast.literal_eval(kept["names"]) == {0: "blue", 1: "red"}
    # This photograph has the model's size along its longer side.
    image = image_of(photographs, 1)
    height, width = image.shape[:2]
    model = keras.saving.load_model(lively, compile=False)
    pixels, scale = data.letterbox(image, about["size"])
    (given,) = session.get_inputs()
    assert given.shape == [1, 64, 64, 3]
    outputs = session.run(None, {given.name: np.uint8(np.round(pixels))[None]})
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, outputs, strict=True))
    expected = model.detect(np.round(pixels)[None])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-3)
    np.testing.assert_allclose(scale, [51 / width, 64 / height] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "portable", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_saved_model(portable, lively, photographs, tmp_path):
    path = tmp_path / "model"
    samples = [photographs / f"images/{number}.png" for number in (0, 1)]
    tasks.export_model(lively, path, portable=portable, sample=samples)
    about = json.loads((path / "model.json").read_text())
    assert about["kind"] == "detector"
    assert "files" in about["input"] and "scale" not in about["boxes"]
    loaded = tf.saved_model.load(path)
    model = keras.saving.load_model(lively, compile=False)
    content = (photographs / "images/6.png").read_bytes()
    found = loaded.serve(tf.constant([content]))
    expected = serving(model)(tf.constant([content]))
    for name, value in expected.items():
        if value.dtype.is_floating:
            np.testing.assert_allclose(found[name], value, atol=1e-3)
        else:
            np.testing.assert_array_equal(found[name], value)
    # Boxes are in pixels of the photograph.
    best_box = found["boxes"][0, 0].numpy()
    expected = model.predict_image(image_of(photographs, 6))["boxes"][0]
    np.testing.assert_allclose(best_box, expected, atol=1)
    assert {b"blue", b"red"} & set(np.ravel(found["names"]))


@pytest.mark.parametrize(
    "suffix", ["onnx", pytest.param("tflite", marks=pytest.mark.slow)]
)
def test_untrained_detectors(suffix, photographs, tmp_path):
    """Tests that scores which all nearly tie are no reason to refuse."""
    keras.utils.set_random_seed(1)
    model = make_faster_rcnn(class_names=("blue", "red"), min_score=1e-3)
    for number in (1, 3):
        found = model.predict_image(image_of(photographs, number))
        assert len(found["scores"]) > 5 and np.ptp(found["scores"]) < 2e-3
    model.save(tmp_path / "model.keras")
    arguments = ["export", str(tmp_path / "model.keras")]
    path = tmp_path / f"model.{suffix}"
    arguments += [str(path), "--quiet", "--tolerance", "1e-3", "--sample"]
    arguments += [str(photographs / f"images/{i}.png") for i in (1, 3)]
    assert tf_deform_cli.main(arguments) == 0
    assert path.stat().st_size > 10000


def test_a_photograph_to_compare_on_that_is_none(lively, tmp_path):
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(ValueError, match="a.jpg"):
        tasks.export_model(
            lively,
            tmp_path / "model.onnx",
            sample=tmp_path / "a.jpg",
        )
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_litert(lively, tmp_path):
    pytest.importorskip("ai_edge_litert")
    path = tmp_path / "model.tflite"
    tasks.export_model(lively, path)
    about = json.loads((tmp_path / "model.tflite.json").read_text())
    assert about["size"] == 64
    assert path.stat().st_size > 10000


@pytest.mark.slow
def test_exports_of_a_segmenter(segmenter, photographs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    best = segmenter[0] / "best.keras"
    tasks.export_model(best, path)
    session = onnxruntime.InferenceSession(path)
    image = image_of(photographs, 1)
    pixels = np.uint8(np.round(data.letterbox(image, 64)[0]))[None]
    (ids,) = session.run(None, {session.get_inputs()[0].name: pixels})
    assert ids.shape == (1, 64, 64)
    assert ids.dtype == np.int32
    model = keras.saving.load_model(best, compile=False)
    expected = np.argmax(model(pixels.astype("float32")), -1)
    assert np.mean(ids == expected) > 0.99


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
