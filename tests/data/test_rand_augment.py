"""RandAugment: every operation equals timm's, pixel by pixel, and draws follow the notation."""

import json
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from top_jax.config import IMAGENET_MEAN
from top_jax.data import rand_augment
from top_jax.data.rand_augment import INCREASING, PLAIN, RandAugment, fill_of, parse
from top_jax.errors import InputError

FILL = (124, 116, 104)
BY_NAME = {operation.name: operation for operation in (*PLAIN, *INCREASING)}
FLIP = Image.Transpose.FLIP_LEFT_RIGHT


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "rand_augment.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def photo(official):
    return Image.fromarray(official["image"])


class Recorder:
    """Replaces the operations: records what is applied, and with which argument."""

    def __init__(self, monkeypatch, operations, set_name):
        self.applied = []

        def spy(operation):
            def apply(image, argument, fill):
                self.applied.append((operation.name, argument, fill))
                return image

            return operation._replace(apply=apply)

        monkeypatch.setattr(rand_augment, set_name, tuple(spy(operation) for operation in operations))


def test_every_operation_equals_timms(official, photo):
    record = json.loads(str(official["record"]))
    assert len(record) == len(official["output"]) == 148
    assert {case["op"] for case in record} == {operation.name for operation in INCREASING}
    for case, expected in zip(record, official["output"], strict=True):
        operation = BY_NAME[case["op"]]
        arguments = [operation.argument(case["magnitude"], negative=negative) for negative in (False, True)]
        [argument] = case["args"] or [0.0]
        if case["args"]:
            assert argument in arguments, case
        result = np.asarray(operation.apply(photo, argument, FILL))
        np.testing.assert_array_equal(result, expected, err_msg=str(case))


def test_both_signs_are_in_the_record(official):
    """The fixture holds each case of an operation with two directions once with each sign."""
    record = json.loads(str(official["record"]))
    for operation in (operation for operation in INCREASING if operation.signed):
        recorded = [tuple(case["args"]) for case in record if case["op"] == operation.name and case["magnitude"] == 9]
        ours = {(operation.argument(9, negative=negative),) for negative in (False, True)}
        assert set(recorded) == ours and len(ours) == 2


def test_fill_is_the_rounded_mean(official):
    assert fill_of(IMAGENET_MEAN) == tuple(official["fill"]) == FILL
    assert fill_of((0.5, 1.0, 1.2)) == (128, 255, 255)


def test_the_sets_are_timms():
    moves = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
    shared = ["AutoContrast", "Equalize", "Invert", "SolarizeAdd", *moves]
    changing = ["Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"]
    assert sorted(operation.name for operation in PLAIN) == sorted(shared + changing)
    assert sorted(o.name for o in INCREASING) == sorted(shared + [f"{name}Increasing" for name in changing])


@pytest.mark.parametrize(
    ("name", "at_0", "at_5", "at_10"),
    [("Posterize", 0, 2, 4), ("Solarize", 0, 128, 256), ("Color", 0.1, 1.0, 1.9), ("Sharpness", 0.1, 1.0, 1.9)],
)
def test_arguments_of_the_plain_set(name, at_0, at_5, at_10):
    """timm's ranges: magnitude 5 leaves the colours, 10 keeps four bits; there is no other direction."""
    for magnitude, expected in ((0, at_0), (5, at_5), (10, at_10)):
        for negative in (False, True):
            assert BY_NAME[name].argument(magnitude, negative=negative) == pytest.approx(expected, abs=1e-12)


def test_no_bits_are_black(photo):
    assert BY_NAME["PosterizeIncreasing"].argument(10, negative=False) == 0
    assert not np.asarray(BY_NAME["Posterize"].apply(photo, 0, FILL)).any()


@pytest.mark.parametrize("operation", [o for o in INCREASING if o.name != "ShearY"], ids=lambda o: o.name)
def test_a_flip_after_it_is_a_flip_before_it(operation, photo):
    """Apart from the sign of horizontal moves; so the device may flip after RandAugment."""
    argument = operation.argument(7.0, negative=False)
    turns = operation.name in ("Rotate", "ShearX", "TranslateXRel")
    after = operation.apply(photo, argument, FILL).transpose(FLIP)
    before = operation.apply(photo.transpose(FLIP), -argument if turns else argument, FILL)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    assert (np.asarray(after) != np.asarray(photo)).mean() > 0.3


def test_of_flipped_images_shear_y_holds_the_other_edge(photo):
    """The exception: columns move as far, in mirrored order, but relative to the right edge."""
    after = BY_NAME["ShearY"].apply(photo, 0.25, FILL).transpose(FLIP)
    from_the_right = (1, 0, 0, -0.25, 1, 0.25 * photo.width)
    how = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
    before = photo.transpose(FLIP).transform(photo.size, Image.Transform.AFFINE, from_the_right, **how)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))


def test_draws_operations_with_replacement_half_of_the_time(monkeypatch, photo):
    recorder = Recorder(monkeypatch, INCREASING, "INCREASING")
    policy, rng = parse("rand-m9-mstd0.5-inc1"), np.random.default_rng(0)
    per_image = []
    for _ in range(6000):
        recorder.applied.clear()
        policy(photo, rng, FILL)
        per_image.append([name for name, _, _ in recorder.applied])
    counts = np.bincount([len(names) for names in per_image], minlength=3) / 6000
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.02)
    names = [name for names in per_image for name in names]
    shares = [names.count(operation.name) / len(names) for operation in INCREASING]
    np.testing.assert_allclose(shares, 1 / 15, atol=0.012)
    twice = [pair for pair in per_image if len(pair) == 2]
    assert np.mean([a == b for a, b in twice]) == pytest.approx(1 / 15, abs=0.02)  # with replacement


def test_draws_magnitudes_and_signs(monkeypatch, photo):
    """Rotations are 3 degrees for each unit of a magnitude from N(9, 0.5), clipped at 10, to either side."""
    recorder = Recorder(monkeypatch, [BY_NAME["Rotate"]], "INCREASING")
    policy, rng = parse("rand-m9-mstd0.5-inc1-n4-p1"), np.random.default_rng(1)
    for _ in range(1000):
        policy(photo, rng, FILL)
    degrees = np.array([argument for _, argument, _ in recorder.applied])
    assert len(degrees) == 4000 and {fill for _, _, fill in recorder.applied} == {FILL}
    assert np.mean(degrees < 0) == pytest.approx(0.5, abs=0.03)
    magnitudes = np.abs(degrees) / 3
    quantiles = np.quantile(magnitudes, [0.1587, 0.5, 0.8413])
    np.testing.assert_allclose(quantiles, [8.5, 9.0, 9.5], atol=0.05)
    assert magnitudes.max() <= 10 and np.mean(magnitudes > 10 - 1e-9) == pytest.approx(0.0228, abs=0.01)
    # The sign says nothing of the magnitude.
    assert np.mean(magnitudes[degrees < 0]) == pytest.approx(np.mean(magnitudes[degrees > 0]), abs=0.05)


def test_infinite_deviation_is_uniform(monkeypatch, photo):
    recorder = Recorder(monkeypatch, [BY_NAME["Rotate"]], "PLAIN")
    policy, rng = parse("rand-m8-mstd101-p1-n4"), np.random.default_rng(2)
    for _ in range(500):
        policy(photo, rng, FILL)
    magnitudes = np.abs([argument for _, argument, _ in recorder.applied]) / 3
    np.testing.assert_allclose(np.quantile(magnitudes, [0.0, 0.25, 0.5, 0.75, 1.0]), [0, 2, 4, 6, 8], atol=0.25)


def test_without_deviation_the_magnitude_is_m(monkeypatch, photo):
    recorder = Recorder(monkeypatch, [BY_NAME["SolarizeAdd"]], "PLAIN")
    parse("rand-m3-n5-p1")(photo, np.random.default_rng(0), FILL)
    assert [argument for _, argument, _ in recorder.applied] == [33] * 5


def test_probability_zero_leaves_the_image(photo):
    assert parse("rand-m9-p0")(photo, np.random.default_rng(0), FILL) is photo


def test_two_operations_in_a_row_are_their_composition(photo):
    """The result of a seed, computed by hand from the same draws."""
    policy = parse("rand-m6-mstd0.5-inc1-p1")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        expected = photo
        for place in rng.integers(15, size=2):
            rng.random()
            magnitude = min(max(rng.normal(6, 0.5), 0), 10)
            negative = rng.random() < 0.5
            operation = INCREASING[place]
            expected = operation.apply(expected, operation.argument(magnitude, negative=negative), FILL)
        result = policy(photo, np.random.default_rng(seed), FILL)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
        assert result.size == photo.size and result.mode == "RGB"


def test_notation():
    assert parse("rand-m9-mstd0.5-inc1") == RandAugment(magnitude=9, magnitude_std=0.5, increasing=True)
    assert (
        parse("rand")
        == RandAugment()
        == RandAugment(magnitude=10, magnitude_std=0, increasing=False, num_layers=2, probability=0.5)
    )
    assert parse("rand-n3-p0.25-inc0") == RandAugment(num_layers=3, probability=0.25)
    for uniform in ("rand-m9-mstdinf", "rand-m9-mstd101", "rand-m9-mstd1000"):
        assert parse(uniform).magnitude_std == math.inf
    assert parse("rand-mstd100").magnitude_std == 100
    policy = parse("rand-m9-mstd0.5-inc1")
    assert pickle.loads(pickle.dumps(policy)) == policy and policy.operations is INCREASING


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("augmix-m5", "'augmix-m5' .*'rand'"),
        ("", "'' .*'rand'"),
        ("rand-m9-w0", " 'w0'; .* m .*; mstd .*; n .*; p .*; inc "),
        ("rand-mmax15", " 'mmax15'; "),
        ("rand-m", " 'm'; "),
        ("rand-m9-", " ''; "),
        ("rand-m-9", " 'm'; "),
        ("rand-n1.5", " 'n1.5'; "),
        ("rand-inc2", " 'inc2'; "),
        ("rand-minf", " 'minf'; "),
        ("rand-m9.5.5", " 'm9.5.5'; "),
        ("rand-m11", " m11; .*0..10"),
        ("rand-n0", " n0; .* 1"),
        ("rand-p1.5", " p1.5; .*0..1"),
    ],
)
def test_bad_notation_is_refused(notation, message):
    with pytest.raises(InputError, match=f"^config.augment.rand_augment.*{message}") as error:
        parse(notation)
    assert "\n" not in str(error.value)


def test_a_deviation_below_zero_is_refused():
    with pytest.raises(InputError, match=" mstd-1; "):
        RandAugment(magnitude_std=-1.0)
