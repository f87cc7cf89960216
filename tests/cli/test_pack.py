"""pack: from a config's data to one file, and what it refuses."""

import json

import pytest

TINY = "--config=tests/tiny_run.py"


def test_packs_what_the_config_names(command, tmp_path):
    file = tmp_path / "digits.npz"
    result = command("pack", TINY, str(file))
    assert result.status == 0, result
    assert "train 1,437, test 360 images" in result.out
    assert "use it with --config.data.source=packed" in result.out
    report = json.loads(file.with_suffix(".json").read_text())
    assert report["images"] == {"train": 1437, "test": 360}
    assert report["bytes"] == file.stat().st_size


@pytest.mark.parametrize("names", [(), ("a.npz", "b.npz"), ("a.zip",)])
def test_refuses_other_than_one_file(refused, names):
    assert ".npz" in refused("pack", TINY, *names)


def test_refuses_a_file_that_is_there(refused, tmp_path):
    (tmp_path / "a.npz").touch()
    assert f"{tmp_path}/a.npz" in refused("pack", TINY, str(tmp_path / "a.npz"))
