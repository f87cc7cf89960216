"""Transforms: sizes, distributions and pixels against plain statements of what each should do."""

import io
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin

from top_jax.config import IMAGENET_MEAN, IMAGENET_STD
from top_jax.data import transforms
from top_jax.data.transforms import (
    color_jitter,
    decode,
    normalize,
    preprocess,
    random_resized_crop,
    resize_center_crop,
    shift_crop,
)
from top_jax.errors import InputError


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ramp(width, height):
    """An image whose red is the column and whose green is the row, to show where a crop came from."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_decode_makes_rgb_of_every_mode(mode, kind):
    red = Image.new("RGB", (9, 7), (200, 30, 30)).convert(mode)
    image = decode(encoded(red, kind))
    assert image.mode == "RGB" and image.size == (9, 7)
    np.testing.assert_allclose(np.asarray(image), np.asarray(red.convert("RGB")), atol=6)


def test_decode_takes_pixels_as_they_are():
    pixels = np.asarray(noise(5, 4))
    np.testing.assert_array_equal(np.asarray(decode(pixels)), pixels)


def with_orientation(orientation, kind="JPEG"):
    """Noise of 9 x 7 whose EXIF part holds an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(9, 7), kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_an_exif_orientation_is_followed_only_on_request(kind, orientation):
    stored = Image.open(io.BytesIO(with_orientation(orientation, kind)))
    plain, turned = (decode(with_orientation(orientation, kind), exif_rotate=rotate) for rotate in (False, True))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(stored))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(stored)))
    assert plain.info.get(transforms.IGNORED, 1) == (orientation if orientation < 9 else 1)
    assert transforms.IGNORED not in turned.info


def test_preprocess_says_once_that_it_does_not_turn(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transforms, "_noted", set())
    (tmp_path / "a.jpg").write_bytes(with_orientation(6))
    image = Image.open(tmp_path / "a.jpg")
    turned = [preprocess(given, 8, exif_rotate=True) for given in (tmp_path / "a.jpg", image)]
    assert not caplog.records
    stored = [preprocess(given, 8) for given in (tmp_path / "a.jpg", image)]
    [record] = caplog.records
    assert "a.jpg" in record.getMessage() and " 6," in record.getMessage()
    for images in (turned, stored):
        np.testing.assert_array_equal(*images)
    assert not np.array_equal(turned[0], stored[0])


GREY = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("PNG", {}, GREY >> 8),
        ("TIFF", {}, GREY >> 8),
        ("TIFF", {"big": True}, GREY >> 8),
        ("TIFF", {"tiffinfo": {262: 0}}, 255 - (GREY >> 8)),  # white is zero
        ("PNG", {"transparency": int(GREY[0, 9])}, np.where(GREY == GREY[0, 9], 255, GREY >> 8)),
    ],
)
def test_16_bits_keep_the_upper_8(kind, options, expected):
    big = options.pop("big", False)
    image = Image.fromarray(GREY.astype(">u2") if big else GREY)
    decoded = np.asarray(decode(encoded(image, kind, **options)))
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=-1))
    if not options:
        np.testing.assert_array_equal(np.asarray(transforms.to_rgb(image)), decoded)


def test_12_bits_in_a_tiff_are_scaled():
    packed = bytes.fromhex("fff000" + "800400")  # the values 4095, 0, 2048, 1024
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0)
    assert len(content) == 122
    assert np.asarray(decode(content + packed))[0, :, 0].tolist() == [255, 0, 128, 64]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_defined_range_are_refused(dtype, tmp_path):
    image = Image.fromarray(np.full((4, 4), 7, dtype))
    image.save(tmp_path / "x.tif")
    for given_image in (image, tmp_path / "x.tif"):
        with pytest.raises(InputError, match="no defined range"):
            preprocess(given_image)


def test_transparency_is_laid_over_white_and_opaque_colours_stay():
    rgba = np.concatenate([np.asarray(noise(16, 16)), np.full((16, 16, 1), 255, np.uint8)], axis=-1)
    np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(rgba), "PNG"))), rgba[..., :3])
    rgba[..., 3] = np.arange(256).reshape(16, 16)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("RGBa")):
        np.testing.assert_allclose(
            np.asarray(transforms.to_rgb(image)), expected, atol=2 if image.mode == "RGBA" else 300
        )
    np.testing.assert_allclose(np.asarray(decode(encoded(Image.fromarray(rgba), "PNG"))), expected, atol=2)
    for mode, clear in (("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0)):
        data = encoded(Image.new(mode, (2, 2)), "PNG", transparency=clear)
        assert (np.asarray(decode(data)) == 255).all(), mode
    for image in (Image.new("LA", (2, 2), (9, 0)).convert("La"), Image.new("RGBa", (2, 2))):
        assert (np.asarray(transforms.to_rgb(image)) == 255).all()


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_not_decoded(kind):
    with pytest.raises(OSError, match="no JPEG"):
        decode(encoded(noise(16, 16), kind))


@pytest.mark.parametrize("kind", list(transforms.FORMATS))
def test_every_error_of_a_decoder_makes_the_image_unreadable(kind):
    """Damaged bytes give an image or an OSError of one line."""
    whole, rng, failed = encoded(noise(24, 24), kind), np.random.default_rng(0), 0
    assert decode(whole).size == (24, 24)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=4):
            damaged[place] = rng.integers(256)
        try:
            decode(bytes(damaged[: rng.integers(1, len(whole) + 1)]), max_pixels=10**6)
        except OSError as error:
            failed += 1
            assert "\n" not in str(error)
    assert failed


@pytest.mark.parametrize("raised", [RuntimeError, NotImplementedError, AttributeError, MemoryError, SyntaxError])
def test_what_a_decoder_raises_is_named(raised, monkeypatch):
    def load(self):
        raise raised("two\nlines")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(OSError, match=f"{raised.__name__}: two lines"):
        decode(encoded(noise(4, 4), "PNG"))


def test_the_largest_number_of_pixels_is_a_setting(monkeypatch):
    data = encoded(noise(20, 10), "PNG")
    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(OSError, match="20 x 10 .*max_pixels=199"):
        decode(data, max_pixels=199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses more than twice that
    assert decode(data, max_pixels=400).size == (20, 10)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_another_kind_are_refused(pixels):
    with pytest.raises(InputError, match=re.escape(f"{pixels.dtype} {list(pixels.shape)}")):
        decode(pixels)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_decode_raises_on_a_damaged_file(damage):
    with pytest.raises(transforms.DECODE_ERRORS):
        decode(damage(encoded(noise(40, 40), "JPEG")))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_transform_ends_at_the_size(width, height, size, seed):
    image, rng = noise(width, height), np.random.default_rng(seed)
    for result in (
        random_resized_crop(image, size, rng),
        shift_crop(image, size, rng, shift=3),
        color_jitter(resize_center_crop(image, size), rng, 0.4),
        resize_center_crop(image, size, eval_crop=0.6),
    ):
        assert result.size == (size[1], size[0]) and result.mode == "RGB"


def test_random_resized_crop_draws_area_and_aspect_as_torchvision(monkeypatch):
    crops = []
    crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: crops.append(box) or crop(self, box))
    rng, image = np.random.default_rng(0), noise(200, 200)
    for _ in range(2000):
        random_resized_crop(image, (8, 8), rng, min_area=0.08)
    left, top, right, bottom = np.array(crops).T
    area, aspect = (right - left) * (bottom - top) / 200**2, (right - left) / (bottom - top)
    assert min(left.min(), top.min()) == 0 and max(right.max(), bottom.max()) == 200
    assert 0.075 < area.min() < 0.1 and area.max() > 0.95
    # Uniform in area, less the largest crops, which fit only at some aspects: quartiles below those of the uniform.
    np.testing.assert_allclose(np.quantile(area, [0.25, 0.5]), [0.29, 0.50], atol=0.04)
    assert 0.73 < aspect.min() < 0.78 and 1.29 < aspect.max() < 1.37
    assert abs(np.log(aspect).mean()) < 0.02
    # Positions are uniform over where the crop fits.
    roomy = right - left < 190
    place = left[roomy] / (200 - (right - left)[roomy])
    np.testing.assert_allclose(np.quantile(place, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)


def test_random_resized_crop_of_a_strip_is_its_centre():
    """No draw fits into 100 x 4, so the widest allowed part, 5 x 4, comes from the middle."""
    result = np.asarray(random_resized_crop(ramp(100, 4), (4, 5), np.random.default_rng(0), min_area=0.5))
    np.testing.assert_array_equal(result[0, :, 0], np.arange(47, 52))


def test_random_resized_crop_pixels_are_pil_bicubic():
    """With the whole image as the only possible crop, nothing but the resize is left."""
    image = noise(40, 40)
    whole = random_resized_crop(image, (16, 16), np.random.default_rng(1), min_area=1.0)
    draws = [random_resized_crop(image, (16, 16), np.random.default_rng(s), min_area=1.0) for s in range(5)]
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert any(np.array_equal(np.asarray(draw), expected) for draw in [whole, *draws])


def test_shift_crop_moves_over_black():
    image, seen = ramp(32, 32), set()
    for seed in range(300):
        result = np.asarray(shift_crop(image, (32, 32), np.random.default_rng(seed), shift=4)).astype(int)
        # At the central pixel (16, 16), column and row say how far the image moved.
        left, top = result[16, 16, 0] - 16, result[16, 16, 1] - 16
        padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
        np.testing.assert_array_equal(result, padded[4 + top : 36 + top, 4 + left : 36 + left])
        seen.add((left, top))
    assert {left for left, _ in seen} == {top for _, top in seen} == set(range(-4, 5))


def test_shift_of_zero_leaves_the_image():
    image = noise(8, 8)
    np.testing.assert_array_equal(np.asarray(shift_crop(image, (8, 8), np.random.default_rng(0), shift=0)), image)


def test_color_jitter_draws_factors_and_order(monkeypatch):
    """Three enhancements in each of the six orders, by factors uniform in 0.6 .. 1.4."""
    drawn = []
    for name in ("Brightness", "Contrast", "Color"):
        enhancement = getattr(ImageEnhance, name)

        def enhance(self, factor, name=name):
            drawn.append((name, factor))
            return self.image

        monkeypatch.setattr(enhancement, "enhance", enhance)
    image, rng = noise(4, 4), np.random.default_rng(0)
    for _ in range(600):
        color_jitter(image, rng, 0.4)
    orders = [tuple(name for name, _ in drawn[i : i + 3]) for i in range(0, len(drawn), 3)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 70
    for wanted in ("Brightness", "Contrast", "Color"):
        factors = [factor for name, factor in drawn if name == wanted]
        assert len(factors) == 600 and 0.6 <= min(factors) < 0.61 and 1.39 < max(factors) <= 1.4
        np.testing.assert_allclose(np.quantile(factors, [0.25, 0.5, 0.75]), [0.8, 1, 1.2], atol=0.04)


def test_color_jitter_pixels_are_pils():
    image = noise(9, 7)
    rng = np.random.default_rng(3)
    order, factors = rng.permutation(3), []
    expected = image
    for place in order:
        factors.append(rng.uniform(0.5, 1.5))
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[place]
        expected = kind(expected).enhance(factors[-1])
    result = color_jitter(image, np.random.default_rng(3), 0.5)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert (np.asarray(result) != np.asarray(image)).mean() > 0.5


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (343, 256), (300, 1000), (224, 224)])
def test_resize_center_crop_is_resize_256_crop_224(width, height):
    """torchvision's Resize(256, bicubic) and CenterCrop(224), written out."""
    image = noise(width, height)
    if width <= height:
        resized = image.resize((256, int(256 * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(256 * width / height), 256), Image.Resampling.BICUBIC)
    left, top = int(round((resized.width - 224) / 2.0)), int(round((resized.height - 224) / 2.0))
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(np.asarray(resize_center_crop(image, (224, 224), eval_crop=0.875)), expected)


def test_resize_center_crop_leaves_an_image_of_the_size():
    image = noise(32, 24)
    np.testing.assert_array_equal(np.asarray(resize_center_crop(image, (24, 32), eval_crop=1.0)), np.asarray(image))


def test_resize_center_crop_of_a_non_square_size_covers_both_sides():
    """A constant border of one pixel would show if the resize were too small for either side."""
    result = np.asarray(resize_center_crop(Image.new("RGB", (50, 90), (9, 9, 9)), (40, 60), eval_crop=0.8))
    assert result.shape == (40, 60, 3) and (result == 9).all()


@pytest.mark.parametrize("shape", [(100_000, 1), (1, 100_000)])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_an_extreme_shape_is_cropped_and_not_resized_as_a_whole(shape, eval_crop):
    image = Image.new("RGB", shape, (9, 8, 7))
    result = np.asarray(resize_center_crop(image, (224, 224), eval_crop=eval_crop))
    assert result.shape == (224, 224, 3) and (result == (9, 8, 7)).all()


def test_the_shortcut_for_extreme_shapes_gives_the_same_pixels(monkeypatch):
    """Smooth images agree: PIL rounds and clips between its two passes, whose order depends on the sizes."""
    for width, height in ((30, 900), (900, 30), (41, 53)):
        rows, columns = np.mgrid[:height, :width]
        waves = np.stack([np.sin(rows / 9), np.sin(columns / 9), np.cos((rows + columns) / 9)], axis=-1)
        image = Image.fromarray((127 + 120 * waves).astype(np.uint8))
        whole = resize_center_crop(image, (24, 32), eval_crop=0.9)
        monkeypatch.setattr(transforms, "MOST_AROUND", 0)
        part = resize_center_crop(image, (24, 32), eval_crop=0.9)
        monkeypatch.undo()
        np.testing.assert_allclose(np.asarray(part, int), np.asarray(whole, int), atol=1)


def test_normalize_matches_the_definition():
    images = np.asarray(noise(6, 4))[None]
    expected = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    result = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_preprocess_takes_a_path_or_an_image(tmp_path):
    image = noise(300, 260)
    image.save(tmp_path / "photo.png")
    expected = normalize(np.asarray(resize_center_crop(image, (224, 224))), IMAGENET_MEAN, IMAGENET_STD)
    for given_image in (str(tmp_path / "photo.png"), tmp_path / "photo.png", image):
        result = preprocess(given_image)
        assert result.shape == (224, 224, 3) and result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)
    assert preprocess(image.convert("L"), (32, 48), eval_crop=1.0).shape == (32, 48, 3)


def test_preprocess_names_a_missing_or_broken_file(tmp_path):
    (tmp_path / "note.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="note.jpg .*JPEG, PNG"):
        preprocess(tmp_path / "note.jpg")
    with pytest.raises(InputError, match="gone.jpg"):
        preprocess(tmp_path / "gone.jpg")
    (tmp_path / "broken.jpg").write_bytes(encoded(noise(50, 50), "JPEG")[:300])
    with pytest.raises(InputError, match="broken.jpg"):
        preprocess(tmp_path / "broken.jpg")


@pytest.mark.parametrize("img_size", [0, (1, 2, 3), (32, -1), ()])
def test_impossible_sizes_are_refused(img_size):
    with pytest.raises(InputError, match=rf"img_size={re.escape(repr(img_size))}"):
        preprocess(noise(8, 8), img_size)
