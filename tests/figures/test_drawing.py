"""What can be seen: the pixels of kept and dropped patches, crops, and whole sheets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from top_jax.data.transforms import resize_center_crop
from top_jax.figures.examine import ARRAYS, arrays_of, name_of, variants_of, with_reduction
from top_jax.figures.page import DPI, MARGIN, PITCH, Panel, Section, draw_map, draw_page
from top_jax.figures.photo import Picture, crop_for_display
from top_jax.figures.sheet import describe_reduction, draw_sheet, kept_section, paths_section, scores_section
from top_jax.models import abstract_model, model_config
from top_jax.pruning import Evit, Merging, Pruning


def test_dropped_patches_are_grey_and_kept_ones_are_not(examination, photo, pixels_of):
    section = kept_section(arrays_of(examination, 6), photo, merges=False)
    (panels,) = section.rows
    assert "2 x 3 = 6 tokens" in panels[0].title and "block 1: 3 of 6 tokens" in panels[1].title
    before, after = (pixels_of(panel.draw, photo).astype(int) for panel in panels)
    for place, stays in enumerate([1, 0, 0, 1, 0, 1]):
        row, column = divmod(place, 3)
        colour = after[row * 32 + 16, column * 32 + 16]
        if stays:
            np.testing.assert_array_equal(colour, (200, 0, 0) if place == 0 else (0, 0, 200))
        else:
            assert np.ptp(colour) <= 2 and colour.min() > 180
        assert np.ptp(before[row * 32 + 16, column * 32 + 16]) == 200


def test_merged_patches_have_one_colour(examination, photo, pixels_of):
    arrays = {**arrays_of(examination, 6), "source": np.array([[0, 0, 1, 2, 2, 2]])}
    (panels,) = kept_section(arrays, photo, merges=True).rows
    assert "block 1: 6 patches in 3 tokens" in panels[1].title
    after = pixels_of(panels[1].draw, photo)
    np.testing.assert_array_equal(after[16, 16], (100, 0, 100))  # half red, half blue
    np.testing.assert_array_equal(after[16, 48], (100, 0, 100))
    np.testing.assert_array_equal(after[16, 80], (0, 0, 200))


def test_fused_tokens_are_in_the_title(examination, photo):
    arrays = {**arrays_of(examination, 6), "tokens": np.array([4]), "fused": np.array([1])}
    (panels,) = kept_section(arrays, photo, merges=False).rows
    assert "3 of 6 tokens" in panels[1].title and "fused into 1" in panels[1].title


def test_the_brightest_score_and_the_hatched(examination, photo, pixels_of):
    arrays = arrays_of(examination, 6)
    arrays["scores"] = np.where(np.arange(6) == 4, np.nan, arrays["scores"])
    (panels,) = scores_section(arrays, photo, score="clip").rows
    picture = pixels_of(panels[0].draw, photo).astype(int)
    centres = [picture[row * 32 + 16, column * 32 + 16] for row in range(2) for column in range(3)]
    brightness = [centre.sum() for place, centre in enumerate(centres) if place != 4]
    assert np.argmax(brightness) == 4 and np.argmin(brightness) == 1  # scores 0.9 and 0.1
    assert np.ptp(centres[4]) == 0  # grey


def test_paths_of_equal_shape_are_one_panel(examination, photo):
    traces = {**examination.traces, "decay": examination.own}
    (panels,) = paths_section(arrays_of(examination._replace(traces=traces), 6), photo).rows
    titles = [panel.title for panel in panels]
    assert len(titles) == 6 and "hold = decay: forward" in titles and "dense: backward" in titles


@pytest.mark.parametrize(("width", "height"), [(300, 200), (90, 400), (16, 24)])
def test_the_photo_is_what_preprocess_crops(width, height):
    """Shrunk to the model's size, the drawn photo is the model's input."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([columns * 255 / width, rows * 255 / height, 0 * rows], -1).astype(np.uint8))
    config = model_config("vim_tiny", img_size=(32, 48), patch_size=16, stride=8)
    photo = crop_for_display(image, config, eval_crop=0.9)
    assert photo.pixels.shape[0] % 32 == 0 and photo.pixels.shape[1] % 48 == 0 and photo.grid == (3, 5)
    small = np.asarray(Image.fromarray(photo.pixels).resize((48, 32), Image.Resampling.BOX)).astype(int)
    expected = np.asarray(resize_center_crop(image, (32, 48), eval_crop=0.9)).astype(int)
    assert np.abs(small - expected)[1:-1, 1:-1].max() <= 12
    assert photo.area == (4, 44, 28, 4)
    np.testing.assert_array_equal(photo.centres(np.array([0, 6])), [[8, 8], [16, 16]])
    assert photo.places()[0, 0] == 0 and photo.places()[-1, -1] == 14


def test_sheet(examination, photo, tmp_path):
    """Size in pixels as laid out, many colours, and every array as documented."""
    model = abstract_model(
        "vim_tiny",
        img_size=(16, 24),
        patch_size=8,
        depth=2,
        num_classes=2,
        pruning=Pruning(after_blocks=(1,), keep_ratio=0.5),
    )
    picture, options = Picture("a.jpg", "a.b", Image.new("RGB", (1, 1)), 0), {"about": "a model"}
    said = draw_sheet(tmp_path / "a.b", picture, photo, examination, model, class_names=("cat", "dog"), **options)
    assert said["png"] == "a.b.png" and said["prediction"] == "dog" and said["label"] == "cat"
    assert said["probability"] == pytest.approx(1 / (1 + np.exp(-2))) and said["tokens"] == {"1": 3}
    assert json.loads(json.dumps(said))["predictions"] == dict.fromkeys(examination.traces, "dog")
    with Image.open(tmp_path / "a.b.png") as png:
        assert png.width == round((2 * MARGIN + 4 * PITCH) * DPI)
        assert png.height > png.width * 0.7
        pixels = np.asarray(png.convert("RGB"))
    assert len(np.unique(pixels.astype(np.int32) @ (1, 256, 65536))) > 50
    edge = round(MARGIN * DPI * 0.9)
    for side in (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]):
        assert (side == 255).all()  # nothing reaches into the margin
    with np.load(tmp_path / "a.b.npz") as arrays:
        documented = {name.split("/")[0] for name in ARRAYS}
        assert {name.split("/")[0] for name in arrays.files} == documented
        np.testing.assert_array_equal(arrays["kept"], [[True, False, False, True, False, True]])
        assert "attention/none, score order/2" in arrays.files


@pytest.mark.parametrize("name", ["caf\udce9", "a$b", "$\\nosuch$", "x_{", "\n"])
def test_any_name_can_be_drawn(photo, tmp_path, name):
    """Class and file names are any bytes; matplotlib would read dollars as formulas."""
    section = Section(name, name, [[Panel(name, lambda axes: None)]])
    draw_page(tmp_path / "page.png", name, name, photo, [section])
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_variants():
    """ToP is compared with itself under other alignments; what has no scan only with the dense model."""
    sizes = dict(img_size=16, patch_size=4, depth=2, embed_dim=24)
    build = lambda name, pruning: abstract_model(name, pruning=pruning, **sizes)  # noqa: E731
    once = dict(after_blocks=(1,), keep_ratio=0.5)
    top = build("vim_tiny", Pruning(**once, alignment="none"))
    assert list(variants_of(top)) == ["dense", "none, score order", "hold", "decay", "none, position order"]
    assert name_of(top.reduction) == "none, position order"
    assert list(variants_of(build("vim_tiny", Merging(**once)))) == ["dense", "none", "hold", "decay"]
    assert list(variants_of(build("deit_tiny", Evit(**once)))) == ["dense", "EViT, score order"]
    assert list(variants_of(build("vim_tiny", None))) == ["dense"]
    other = with_reduction(top, variants_of(top)["decay"])
    assert (
        [cut.after for cut in other.schedule] == [8]
        and other.reduction.alignment == "decay"
        and top.reduction.alignment == "none"
    )


@pytest.mark.parametrize(
    ("reduction", "text"),
    [
        (Pruning(), "dense"),
        (
            Pruning(after_blocks=(2, 4), keep_ratio=0.7),
            "pruned after blocks 2, 4 to 70 % each time, score 'clip', alignment 'hold'",
        ),
        (
            Evit(after_blocks=(4,), keep_ratio=0.55),
            "pruned by EViT after block 4 to 55 %, score 'attention', in score order, alignment 'none'",
        ),
        (
            Merging(after_blocks=(1, 3), keep_ratio=(0.5, 0.75)),
            "merged after blocks 1, 3 to 50, 75 %, alignment 'hold'",
        ),
    ],
)
def test_describe(reduction, text):
    assert describe_reduction(reduction) == text


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0.35, 2.5, ["0.5", "1", "2"]), (0.004, 30.0, ["0.01", "0.1", "1", "10"]), (0.982, 1.018, ["0.986", "1.01"])],
)
def test_labels_of_a_logarithmic_bar(photo, tmp_path, monkeypatch, low, high, labels):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    values = np.geomspace(low, high, 6)
    panel = Panel("map", lambda axes: draw_map(axes, photo, values, low, high, log=True), "x mean")
    draw_page(tmp_path / "a.png", "title", "", photo, [Section("heading", "note", [[panel]])])
    bar = drawn[0].axes[1]
    assert [label.get_text() for label in bar.get_yticklabels()] == labels
    np.testing.assert_allclose(bar.get_ylim(), (low, high))
