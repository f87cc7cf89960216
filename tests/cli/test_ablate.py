"""ablate: what it prints, and what it refuses."""

import json
from pathlib import Path

import jax
import pytest

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    monkeypatch.setattr("top_jax.ablation.run.enable_compilation_cache", lambda: None)
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of it
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
def test_ablate(command, finished_run, tmp_path):
    """A dense and a pruned model on few images; started again, nothing is left to do."""
    out = tmp_path / "out"
    flags = (TINY, f"--checkpoint={finished_run}", f"--out={out}", "--tables=alignment", "--alignments=hold")
    result = command("ablate", *flags, "--limit_images=40")
    assert result.status == 0
    first, second, *_ = result.out.splitlines()
    assert first.startswith("2 settings x 1 checkpoint") and "40 images" in first and "0 results" in first
    assert second.startswith("dense: ")
    assert "hold, clip, keep 0.5: " in result.out and f" on 40 images, {finished_run}\n" in result.out
    assert f"{finished_run} (trained with pruning)" in result.out
    assert (out / "tables.md").read_text() in result.out
    content = json.loads((out / "results.json").read_text())
    assert [row["tokens_per_block"] for row in content["rows"]] == [[5, 5], [5, 3]]
    assert content["settings"]["limit_images"] == 40 and content["rows"][0]["images"] == 40
    again = command("ablate", *flags, "--limit_images=40")
    assert again.status == 0 and " on 40 images, /" not in again.out
    assert json.loads((out / "results.json").read_text())["rows"] == content["rows"]


def test_refuses(refused, finished_run, tmp_path):
    out = f"--out={tmp_path}/out"
    checkpoint = f"--checkpoint={finished_run}"
    assert "--checkpoint is missing" in refused("ablate", TINY, out)
    assert "--out is missing" in refused("ablate", TINY, checkpoint)
    assert "no_such" in refused("ablate", TINY, out, "--checkpoint=no_such")
    dense = "--config.pruning.after_blocks=()"
    assert "--after_blocks" in refused("ablate", TINY, checkpoint, out, dense)
    assert "after_blocks=(5,)" in refused("ablate", TINY, checkpoint, out, "--after_blocks=5")
    message = refused("ablate", TINY, checkpoint, out, "--after_blocks=one")
    assert message.startswith("--after_blocks") and "'one'" in message
    message = refused("ablate", TINY, checkpoint, out, "--tables=fill")
    assert "'fill'" in message and "alignment, score, keep_ratio" in message
    assert "zero" in refused("ablate", TINY, checkpoint, out, "--fills=zero")
    assert "order='score' with alignment='hold'" in refused("ablate", TINY, checkpoint, out, "--alignments=hold:score")
    assert "--finetune_steps" in refused("ablate", TINY, checkpoint, out, "--finetune_seeds=1,2")
    assert not (tmp_path / "out").exists()
