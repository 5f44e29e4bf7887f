# SPDX-License-Identifier: Apache-2.0
"""Tests what is done with trained models: judging, pictures, exports."""

import ast
import gc
import json
import shutil
import types
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import liven, make_faster_rcnn
from PIL import Image

import tf_deform_cli
from tf_deform import data, tasks
from tf_deform.models import serving
from tf_deform.tasks import _evaluate, _models


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
    assert (
        "Expected objects of blue, red alone. Received: objects of green"
        in said
    )


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
    words = r"Expected objects of none, blue.*\(--classes\) names them"
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
