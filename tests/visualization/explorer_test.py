# SPDX-License-Identifier: Apache-2.0
"""Tests the explorer's page in a real browser, without a window.

The browser is Debian's chromium; `.ci/run` installs it.
"""

import os
import shutil
import time

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform._keras import keras
from tf_deform.visualization import _tree, _walk

HEIGHT, WIDTH = 64, 96
MARGIN = 6
# A place is rounded to 1/16 pixel, and then to the table's one decimal.
ROUNDED = 0.5 / 16 + 0.05
# Two places, each rounded to 1/16 pixel, and the table's whole numbers.
SPAN_ROUNDED = 2 * 0.5 / 16 + 0.5
# A weight is rounded to 1/128, and then to the table's two decimals.
WEIGHT_ROUNDED = 0.5 / 128 + 0.005


@pytest.fixture(scope="module")
def browser():
    chromium, driver = map(shutil.which, ("chromium", "chromedriver"))
    if not (chromium and driver):
        text = "needs chromium and chromedriver, which .ci/run installs"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(text)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as started:
        yield started


def make_model(modulation="2sigmoid", offset_groups=1):
    keras.utils.set_random_seed(0)
    image = keras.Input((HEIGHT, WIDTH, 3))
    x = image
    for index in range(3):
        x = keras.layers.Conv2D(
            4, 3, strides=2, padding="same", name=f"layer_{index}"
        )(x)
        x = keras.layers.ReLU()(x)
    model = keras.Model(image, x)
    tf_deform.make_deformable(
        model,
        layers="layer_",
        modulation=modulation,
        offset_groups=offset_groups,
        verbose=False,
    )
    rng = np.random.default_rng(0)
    for layer in tf_deform.deformable_layers(model):
        for weight in (layer.offset_kernel, layer.offset_bias):
            weight.assign(rng.normal(size=weight.shape) * 0.4)
    return model


def make_images(count=2):
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 1, (count, HEIGHT, WIDTH, 3))
    return values.astype("float32")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Returns a page, and the calls of its model."""
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    model, images = make_model(), make_images()
    tf_deform.visualization.explorer(
        model, images, path, title="</script>1 < 2"
    )
    return path, _walk.walk(model, tf.constant(images))


def wait(browser):
    """Waits until the picture is that of the newest place."""
    end = time.time() + 30
    while time.time() < end:
        ready = browser.execute_script(
            "return document.getElementById('canvas').dataset.ready"
        )
        if ready == "yes":
            return
        time.sleep(0.02)
    raise AssertionError(browser.get_log("browser"))


def resize(browser, width, height=900, scheme="light"):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [feature]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=width, height=height, deviceScaleFactor=1, mobile=False),
    )


@pytest.fixture
def opened(browser, page):
    resize(browser, 1200)
    browser.get(page[0].as_uri())
    wait(browser)
    yield browser
    assert browser.get_log("browser") == []


def rows(browser, table):
    return browser.execute_script(
        "return [...document.getElementById(arguments[0]).tBodies[0].rows].map("
        "(row) => [...row.cells].map((cell) => cell.textContent.trim()))",
        table,
    )


def text(browser, name):
    return browser.execute_script(
        "return document.getElementById(arguments[0]).textContent", name
    )


def picture(browser):
    return browser.execute_script(
        "return document.getElementById('canvas').toDataURL()"
    )


def point(browser, y, x):
    """Moves the pointer to a pixel of the photograph."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = browser.find_element("id", "canvas")
    box = canvas.rect
    zoom = box["width"] / (WIDTH + 2 * MARGIN)
    place = [(at + MARGIN + 0.5) * zoom for at in (x, y)]
    move = ActionChains(browser).move_to_element_with_offset(
        canvas,
        round(place[0] - box["width"] / 2),
        round(place[1] - box["height"] / 2),
    )
    move.perform()
    wait(browser)


def choose(browser, layer):
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", "layer")).select_by_visible_text(layer)
    wait(browser)


def expected(call, y, x, image=0):
    """Returns cell, places in the photograph, and weights."""
    cell = np.floor(call.outputs.cells((y, x)) + 0.5).astype(int)
    cell = tuple(np.clip(cell, 0, np.array(call.size) - 1))
    places = call.inputs.place(call.locations[image][cell])
    return cell, places.reshape(-1, 2), call.modulation[image][cell].reshape(-1)


def check_numbers(browser, calls, y, x, chosen, image=0):
    assert text(browser, "place") == f"Row {y}, column {x}"
    found = rows(browser, "layers")
    assert len(found) == len(calls)
    for row, call in zip(found, calls):
        cell, places, weights = expected(call, y, x, image)
        assert row[0] == call.name
        assert row[1] == f"{cell[0]}, {cell[1]}"
        assert abs(float(row[3]) - weights.mean()) < WEIGHT_ROUNDED
        spans = [float(x) for x in row[4].split("×")]
        np.testing.assert_allclose(spans, np.ptp(places, 0), atol=SPAN_ROUNDED)
        taps = np.stack(
            np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1
        ).reshape(-1, 2)
        regular = call.outputs.place(cell) + taps * call.inputs.step
        shift = np.linalg.norm(places - regular, axis=-1).mean()
        assert abs(float(row[2]) - shift) < 2 * ROUNDED
    _, places, weights = expected(calls[chosen], y, x, image)
    assert text(browser, "chosen") == f"Points of {calls[chosen].name}"
    table = np.array(rows(browser, "points"), float)
    np.testing.assert_array_equal(table[:, 0], np.arange(9) + 1)
    np.testing.assert_allclose(table[:, 1:3], places, atol=ROUNDED)
    np.testing.assert_allclose(table[:, 3], weights, atol=WEIGHT_ROUNDED)


def test_the_pointer_moves_the_points(opened, page):
    calls = page[1]
    before = picture(opened)
    for y, x in ((10, 20), (50, 90), (0, 0), (63, 95)):
        point(opened, y, x)
        check_numbers(opened, calls, y, x, chosen=2)
        assert picture(opened) != before
        before = picture(opened)
    assert text(opened, "live") == ""  # A pointer does not make it speak.


def test_the_keyboard_moves_the_points(opened, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    y, x = HEIGHT // 2, WIDTH // 2
    check_numbers(opened, page[1], y, x, chosen=2)
    opened.execute_script("document.getElementById('canvas').focus()")
    for key, dy, dx in (
        (Keys.ARROW_UP, -1, 0),
        (Keys.ARROW_LEFT, 0, -1),
        (Keys.ARROW_LEFT, 0, -1),
        (Keys.ARROW_DOWN, 1, 0),
        (Keys.ARROW_RIGHT, 0, 1),
    ):
        ActionChains(opened).send_keys(key).perform()
        wait(opened)
        y, x = y + dy, x + dx
        check_numbers(opened, page[1], y, x, chosen=2)
        assert text(opened, "live").startswith(f"Row {y}, column {x}. layer_2")
    keys = ActionChains(opened).key_down(Keys.SHIFT)
    keys.send_keys(Keys.ARROW_UP * 40).key_up(Keys.SHIFT).perform()
    wait(opened)
    check_numbers(opened, page[1], 0, x, chosen=2)


def test_a_tab_reaches_every_control(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(5):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        reached.append(
            opened.execute_script(
                "const e = document.activeElement; return e.id || e.name"
            )
        )
    assert reached[:4] == ["photo", "layer", "reach", "canvas"]


def test_layers_and_photographs_are_chosen(opened, page):
    calls = page[1]
    every = picture(opened)
    choose(opened, "layer_0")
    check_numbers(opened, calls, 32, 48, chosen=0)
    one = picture(opened)
    assert one != every
    opened.find_elements("css selector", "#thumbs label")[1].click()
    wait(opened)
    check_numbers(opened, calls, 32, 48, chosen=0, image=1)
    assert picture(opened) != one
    glowing = picture(opened)
    opened.find_element("id", "reach").click()
    wait(opened)
    assert picture(opened) != glowing
    choose(opened, "All layers")
    check_numbers(opened, calls, 32, 48, chosen=2, image=1)


@pytest.mark.parametrize("index", range(3))
def test_the_reach_is_that_of_the_stack(opened, page, index):
    """Tests what is reached down to the first layer against Python's."""
    cell = [size // 2 for size in page[1][index].size]
    levels = check_reach(opened, page[1], index, cell)
    assert len(levels) == index + 1


def check_reach(browser, calls, index, cell):
    """Compares the page's reach with Python's, whose levels are returned."""
    found = browser.execute_script(
        "return reach(arguments[0], loaded.get(0).fields, ...arguments[1])",
        index,
        cell,
    )
    found = np.reshape(found, (-1, 3))
    levels = _tree.follow(calls, index, cell)
    first = [level for level in levels if not level.call.previous]
    places = np.concatenate([level.points for level in first])
    weights = np.concatenate([level.weights for level in first])
    assert abs(found[:, 2].sum() / weights.sum() - 1) < 0.02
    for axis in (0, 1):
        means = [
            np.average(x[:, axis], weights=w)
            for x, w in ((found, found[:, 2]), (places, weights))
        ]
        assert abs(means[0] - means[1]) < 0.2
        low, high = np.quantile(
            np.repeat(
                places[:, axis],
                np.rint(weights / weights.sum() * 1e5).astype(int),
            ),
            (0.05, 0.95),
        )
        extent = browser.execute_script(
            "return extent(arguments[0].flat(), arguments[1])",
            found.tolist(),
            axis,
        )
        assert abs(extent - (high - low + 1)) < 2
    return levels


def test_the_reach_of_parallel_branches(browser, tmp_path):
    image = keras.Input((HEIGHT, WIDTH, 3))
    x = keras.layers.Conv2D(4, 3, strides=4, padding="same")(image)
    wide = keras.layers.Conv2D(4, (1, 7), padding="same", name="layer_wide")(x)
    tall = keras.layers.Conv2D(4, (5, 1), padding="same", name="layer_tall")(x)
    x = keras.layers.Concatenate()([wide, tall, x])
    x = keras.layers.Conv2D(4, 3, padding="same", name="layer_last")(x)
    model = keras.Model(image, x)
    tf_deform.make_deformable(model, layers="layer_", verbose=False)
    rng = np.random.default_rng(0)
    for layer in tf_deform.deformable_layers(model):
        layer.offset_bias.assign(rng.normal(size=layer.offset_bias.shape))
    path, images = tmp_path / "explorer.html", make_images(1)
    tf_deform.visualization.explorer(model, images, path)
    resize(browser, 1200)
    browser.get(path.as_uri())
    wait(browser)
    calls = _walk.walk(model, tf.constant(images))
    levels = check_reach(browser, calls, 2, (8, 12))
    assert [level.call.name for level in levels] == [
        *("layer_last", "layer_tall", "layer_wide")
    ]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_every_width_and_both_schemes(opened, width):
    """Tests that nothing is cut off or hidden beside the window."""
    backs = []
    for scheme in ("light", "dark"):
        resize(opened, width, scheme=scheme)
        time.sleep(0.2)
        wait(opened)
        inside, box, back = opened.execute_script(
            "const box = document.getElementById('canvas')"
            ".getBoundingClientRect();"
            "return [document.documentElement.scrollWidth, "
            "[box.left, box.right, box.height, innerHeight], "
            "getComputedStyle(document.body).backgroundColor]"
        )
        assert inside <= width
        assert box[0] >= 0 and box[1] <= width and box[1] - box[0] > 300
        assert box[2] <= box[3]
        backs.append(back)
    assert backs[0] != backs[1]


def test_the_page_asks_for_nothing(opened, page):
    content = page[0].read_text()
    assert "http:" not in content and "https:" not in content
    names = opened.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert all(name.startswith("data:") for name in names)
    assert opened.title == "</script>1 < 2"
    assert text(opened, "title") == "</script>1 < 2"


def test_groups_and_what_is_no_number(browser, tmp_path):
    model = make_model(modulation=None, offset_groups=1)
    last = tf_deform.deformable_layers(model)[-1]
    bias = keras.ops.convert_to_numpy(last.offset_bias).copy()
    bias[:2] = np.nan, np.inf
    last.offset_bias.assign(bias)
    path = tmp_path / "explorer.html"
    tf_deform.visualization.explorer(model, make_images(1), path)
    resize(browser, 1200)
    browser.get(path.as_uri())
    wait(browser)
    found = rows(browser, "points")
    assert found[0] == ["1"] + ["no number"] * 3
    assert [row[3] for row in found[1:]] == ["1.00"] * 8
    assert not browser.find_element("id", "photos").is_displayed()
    assert browser.get_log("browser") == []


def test_the_size_of_a_page_for_a_large_model(tmp_path):
    """Tests four photographs of 512 pixels and 13 layers, of pure noise."""
    model = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(512, 512, 3)
    )
    tf_deform.make_deformable(model, verbose=False)
    rng = np.random.default_rng(0)
    for layer in tf_deform.deformable_layers(model):
        layer.offset_kernel.assign(
            rng.normal(size=layer.offset_kernel.shape) * 0.02
        )
    images = np.kron(
        rng.uniform(0, 255, (4, 32, 32, 3)), np.ones((1, 16, 16, 1))
    )
    path = tmp_path / "explorer.html"
    tf_deform.visualization.explorer(model, images.astype("float32"), path)
    assert 1e6 < path.stat().st_size < 5e6


def test_wrong_arguments_leave_no_file(tmp_path):
    model, images = make_model(), make_images(1)
    path = tmp_path / "explorer.html"

    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match):
            tf_deform.visualization.explorer(*args, **options)
        assert list(tmp_path.iterdir()) == []

    refused(TypeError, "Expected `model` to be a model", 3, images, path)
    refused(ValueError, "Received: images.shape", model, images[0], path)
    refused(ValueError, "without zeros", model, images[:0], path)
    refused(TypeError, "Expected `path`", model, images, 3)
    refused(TypeError, "Expected `title`", model, images, path, title=3)
    match = "Expected photographs to be .* Received: shape"
    refused(ValueError, match, model, images, path, photos=images[:, 1:])
    match = "Expected `layers` to name .* Received: 'none'"
    refused(ValueError, match, model, images, path, layers="none")
    plain = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.ReLU()])
    match = "with deformable convolutions"
    refused(ValueError, match, plain, np.zeros((1, 8, 8, 3)), path)
    unbuilt = keras.Sequential([keras.layers.Conv2D(2, 3)])
    refused(ValueError, "no weights yet", unbuilt, images, path)
    refused(
        FileNotFoundError, "No such", model, images, tmp_path / "no" / "x.html"
    )
