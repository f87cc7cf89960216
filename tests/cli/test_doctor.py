"""doctor: what it prints, writes, and says would stop a run."""

import io
import json
from pathlib import Path

import jax
import pytest
from PIL import Image

from top_jax.training.step_speed import StepSpeed

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"
QUICK = ("--data", TINY, "--seconds=0", "--sample=5")


@pytest.fixture
def doctor(command, tmp_path):
    """Runs it; returns the result and what the file of --json holds."""

    def run(*arguments):
        result = command("doctor", *arguments, f"--json={tmp_path}/doctor.json")
        return result, json.loads((tmp_path / "doctor.json").read_text())

    return run


def jpeg(color):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "JPEG")
    return file.getvalue()


def make_folder(root, classes, images=9):
    """Splits `train` and `test` of an image folder."""
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg((0, 25 * i, 0)))
    size = f"--config.model.num_classes={len(classes)}"
    return ("--config.data.source=image_folder", f"--config.data.data_dir={root}", size)


def test_installation(doctor):
    result, report = doctor()
    assert result.status == 0 and result.err == ""
    assert report["packages"]["jax"] == jax.__version__ and report["devices"]
    scan = report["selective_scan"]
    assert scan["implementations"][scan["auto"]] == "runs here" and scan["why"]
    assert scan["implementations"]["triton"] == "runs here" or "NVIDIA GPU" in scan["implementations"]["triton"]
    assert f"jax {jax.__version__}" in result.out and f"selective scan: auto is {scan['auto']}" in result.out
    assert "data" not in report


def test_cannot_write(command, tmp_path):
    (tmp_path / "file").write_text("")
    result = command("doctor", f"--json={tmp_path}/file/doctor.json")
    assert result.status == 2 and not result.out  # before the work
    assert f"--json={tmp_path}/file/doctor.json" in result.err
    assert result.err.count("\n") == 1


@pytest.fixture
def given_step(monkeypatch):
    """Replaces the timed step, which takes many seconds to compile; notes the batch size that it gets."""
    asked = []
    memory = {"arguments": 3_000_000, "outputs": 2_000, "temporaries": 900, "donated": 1_000, "total": 3_001_900}

    def measure_step(config, *, batch_size):
        asked.append(batch_size)
        return StepSpeed(8, 2, "TPU v9", steps=5, seconds=0.25, compile_seconds=12.0, memory=memory)

    monkeypatch.setattr("top_jax.training.step_speed.measure_step", measure_step)
    return asked


def test_data_loader_and_verdict(doctor, given_step):
    """On the digits: every part, in the file and in words."""
    result, report = doctor(*QUICK, "--step_batch_size=8")
    assert result.status == 0 and given_step == [8], result
    data, loader, step, verdict = (report[part] for part in ("data", "loader", "step", "verdict"))
    assert (data["train"]["images"], data["eval"]["images"]) == (1437, 360)
    assert (data["train"]["classes"], data["train"]["decoded"], data["train"]["shorter_side"]) == (10, 5, [8, 8, 8])
    assert data["dataset"] is None and data["notes"] == data["problems"] == []
    assert list(loader["stages_in_one_thread"]) == ["read + decode", "read + decode + crop"]
    assert (loader["workers"], loader["threads"], loader["pipeline"]["configured_batch_size"]) == (0, 2, 16)
    assert (step["configured_batch_size"], step["images_per_second"], step["with_teacher"]) == (16, 32.0, False)
    assert verdict["busy"] == pytest.approx(32 / loader["pipeline"]["images_per_second"])
    assert verdict["text"] in result.out and "the step takes 32 img/s" in verdict["text"]
    for words in (
        "train eval images 1,437 360 classes 10 10 labels read",
        "images per class 139 to 146 35 to 37 decoded 5 of 5 tried 5 of 5 tried shorter side 8 px 8 px",
        "training step: vim_tiny, float32, on 2 x TPU v9",
        "32 images/s: 250 ms for a batch of 8 (the run's has 16), the median of 5 steps on random pixels",
        "as XLA plans this step: 3 MB = 3 MB arguments, 2 kB outputs, 900 B temporaries, less 1 kB of outputs",
    ):
        assert words in " ".join(result.out.split())


def test_a_teacher_is_said_to_be_in_the_step(doctor, given_step):
    result, report = doctor(*QUICK, "--config.distillation.teacher=/nowhere")
    assert report["step"]["with_teacher"] and "vim_tiny with its teacher, float32" in result.out


@pytest.mark.slow
def test_the_real_step(doctor):
    """Compiled and timed; a CPU takes 8 of the run's 16 images."""
    result, report = doctor(*QUICK)
    step = report["step"]
    assert result.status == 0 and (step["batch_size"], step["devices"]) == (8, len(jax.devices()))
    assert step["steps"] >= 3 and step["images_per_second"] == pytest.approx(8 / step["seconds"])
    assert 0 < step["memory"]["donated"] < step["memory"]["outputs"] and step["memory"]["temporaries"] > 0
    assert report["verdict"]["busy"] == pytest.approx(
        step["images_per_second"] / report["loader"]["pipeline"]["images_per_second"]
    )


def test_the_step_can_be_left_out(doctor):
    result, report = doctor(*QUICK, "--nostep", "--config.augment.color_jitter=0.3")
    assert result.status == 0 and "step" not in report
    assert report["verdict"]["text"].endswith("the step was not timed")
    assert "read + decode + crop + augment" in report["loader"]["stages_in_one_thread"]


def test_an_incomplete_imagenet_is_no_error(doctor, tmp_path):
    folder = make_folder(tmp_path / "imagenet", [f"n{wnid:08}" for wnid in range(1000)], images=1)
    result, report = doctor(*QUICK, "--nostep", *folder)
    assert result.status == 0, result
    assert report["data"]["dataset"] == "ImageNet-1K" and report["data"]["problems"] == []
    assert report["data"]["notes"] == [
        "train has 1,000 of 1,281,167 images: a sample, not ImageNet-1K",
        "eval has 1,000 of 50,000 images: a sample, not ImageNet-1K",
    ]
    assert all(note in result.out for note in report["data"]["notes"])


def test_some_wnids_are_not_compared(doctor, tmp_path):
    folder = make_folder(tmp_path / "part", ["n00000001", "n00000002"])
    _, report = doctor(*QUICK, "--nostep", *folder)
    assert report["data"]["dataset"] is None and "not compared with ImageNet-1K" in report["data"]["notes"][0]


@pytest.fixture
def broken_folder(tmp_path):
    """Settings of a folder with one file that is cut short, and the file."""
    folder = make_folder(tmp_path / "images", ["cat", "dog"])
    broken = tmp_path / "images" / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    return folder, broken


def test_unreadable_images_are_named(doctor, broken_folder):
    folder, broken = broken_folder
    result, report = doctor(*QUICK, "--nostep", *folder)
    assert result.status == 0 and f"train: unreadable: {broken} (" in result.out
    assert report["data"]["train"]["decoded_unreadable"] == 1 and report["data"]["problems"] == []


def test_unreadable_images_are_an_error_where_a_run_would_stop(doctor, broken_folder):
    folder, broken = broken_folder
    result, report = doctor(*QUICK, "--nostep", *folder, "--config.data.on_corrupt=raise")
    assert result.status == 2 and len(report["data"]["problems"]) == 1
    assert f"error: training would fail: train has unreadable images, such as {broken} (" in result.err
    assert report["loader"]["pipeline"]["images"] > 0  # the one does not hide the other


def test_nothing_readable(doctor, tmp_path):
    folder = make_folder(tmp_path / "images", ["cat", "dog"])
    for file in (tmp_path / "images" / "train").glob("*/*.jpg"):
        file.write_text("no image")
    result, report = doctor(*QUICK, "--nostep", *folder)
    assert result.status == 2 and "(5 tried)" in result.err and "train/cat/0.jpg" in result.err
    assert "loader" not in report and "verdict" not in report


def test_what_would_stop_a_run(doctor, tmp_path):
    """It is said beside everything else, and decides the status."""
    folder = make_folder(tmp_path / "images", ["cat", "dog"])[:-1]
    result, report = doctor(*QUICK, "--nostep", *folder, "--config.batch_size=20")
    name = f"{tmp_path}/images/train"
    few = f"{name} has 18 images, fewer than batch_size=20; use a smaller batch"
    classes = f"{name} has 2 classes and the model 10; set --config.model.num_classes=2"
    assert report["data"]["problems"][::2] == [classes, few] and len(report["data"]["problems"]) == 3
    assert result.status == 2 and result.err == f"error: training would fail: {classes} (2 more above)\n"
    assert f"training would fail: {few}" in result.out and "the whole pipeline" in result.out


def test_refuses(refused):
    """What is not there at all, before anything is printed."""
    message = refused("doctor", "--data", "--config=configs/vim_cifar10.py", "--config.data.data_dir=/nowhere")
    assert message.startswith("data_dir /nowhere does not exist.")
    assert "'vim_huge' is unknown" in refused("doctor", *QUICK, "--config.model.name=vim_huge")
