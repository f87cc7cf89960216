"""Wrong command lines, by command: each ends with status 2 and one line that contains the offending value.

A row is a command line and what its message must contain. `{tmp}` is a folder of damaged and foreign files, `{run}` a
finished run, `{other}` one of other classes, `{tiny}` the config of that run.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

CONFIG_FILES = {
    "number.py": "def get_config():\n    return 3\n",
    "none.py": "def get_config():\n    pass\n",
    "raises.py": "def get_config():\n    value = 1\n    raise ValueError('by itself')\n",
    "key.py": "def get_config():\n    return {}['absent']\n",
    "name.py": "import nowhere_to_be_found\n\ndef get_config():\n    pass\n",
    "disk.py": "def get_config():\n    return open('/nowhere/else')\n",
    "leaves.py": "import sys\n\ndef get_config():\n    sys.exit(0)\n",
    "syntax.py": "x = 1\ndef get_config(:\n    pass\n",
    "attribute.py": "def get_config():\n    return (3).absent\n",
    "unknown.py": "from top_jax.config import make_config\n\ndef get_config():\n    return make_config(batchsize=3)\n",
    "infinite.py": "import top_jax.config as c\n\ndef get_config():\n    return c.make_config(epochs=float('inf'))\n",
    "plain.py": "print('no config')\n",
    "text.txt": "hello\n",
}
# Of every command with a config; after {tiny} where it starts with a key.
CONFIGS = [
    ("--config={tmp}/nowhere.py", "nowhere.py"),
    ("--config={tmp}/number.py", "number.py"),
    ("--config={tmp}/raises.py", "raises.py, line 3: ValueError: by itself"),
    ("--config={tmp}/syntax.py", "syntax.py, line 2"),
    ("--config={tmp}/text.txt", "text.txt"),
    ("--config={tmp}", "config.json"),
    ("--config={tmp}/broken", "config.json"),
    ("--config=train.py", "train.py"),
    ("--config=", "config"),
    ("--config={tiny} --config={tiny}", "--config"),
    ("--config={tiny} --config.batch_size=inf", "inf"),
    ("--config={tiny} --config.modle.depth=3", "--config.modle.depth=3"),
    ("--config={tiny} --config.model.depth=2 --config.model.depth=2", "--config.model.depth"),
    ("--config={tiny} --config.model.depth=", "--config.model.depth"),
    ("--config={tiny} --config.model.=3", "--config.model."),
    ("--config={tiny} --config.model=5", "--config.model=5; needed: "),
    ("--config={tiny} --config.data.mean='(1,2'", "--config.data.mean=(1,2; needed: "),
    ("--config={tiny} --unknown_flag=3", "--unknown_flag is not a flag of this command"),
]
LONG = "x" * 300
ROWS: dict[str, list[tuple[str, str]]] = {
    "train.py": [
        ("", "--config"),
        ("--workdir={tmp}/absent", "--config"),
        ("--config.seed=1", "--config.seed=1"),
        ("--config={tmp}/none.py", "none.py"),
        ("--config={tmp}/key.py", "key.py, line 2: KeyError: 'absent'"),
        ("--config={tmp}/name.py", "name.py, line 1: ModuleNotFoundError"),
        ("--config={tmp}/disk.py", "/nowhere/else"),
        ("--config={tmp}/leaves.py", "leaves.py, line 4: SystemExit"),
        ("--config={tmp}/attribute.py", "attribute.py, line 2: AttributeError"),
        ("--config={tmp}/unknown.py", "config.batchsize"),
        ("--config={tmp}/infinite.py", "inf"),
        ("--config={tmp}/plain.py", "plain.py"),
        ("--config=/dev/null", "/dev/null"),
        ("--config={tiny}:argument", "tiny_run.py"),
        ("--config={tiny} --workdir=", "--workdir"),
        ("--config={tiny} --workdir=' '", "--workdir"),
        ("--config={tiny} --workdir={tmp}/a --workdir={tmp}/b", "--workdir"),
        ("--config={tiny} --workdir={tmp}/text.txt", "text.txt"),
        ("--config={tiny} --workdir={tmp}/text.txt/run", "text.txt"),
        (f"--config={{tiny}} --workdir={{tmp}}/{LONG}", "File name too long"),
        ("--config={tiny} --workdir=gs://bucket/run", "gs://bucket/run"),
        ("--config={tiny} --workdir={run} --config.seed=7", "seed 0 there, 7 here"),
        ("--config={tiny} --config.epochs=nan", "nan"),
        ("--config={tiny} --config.epochs=-inf", "inf"),
        ("--config={tiny} --config.optimizer.learning_rate=inf", "inf"),
        ("--config={tiny} --config.optimizer.weight_decay=inf", "inf"),
        ("--config={tiny} --config.optimizer.clip_norm=inf", "inf"),
        ("--config={tiny} --config.data.std='(1e999,1,1)'", "inf"),
        ("--config={tiny} --config.data.min_area=nan", "nan"),
        ("--config={tiny} --config.augment.erasing=nan", "nan"),
        ("--config={tiny} --config.data.data_dir=", "data_dir"),
        ("--config={tiny} --config.init_from=", "init_from"),
        ("--config={tiny} --config.model.name=", "name"),
        ("--config={tiny} --config.data.source=web", "web"),
        ("--config={tiny} --config.batch_size=many", "--config.batch_size=many; needed: a whole number"),
        ("--config={tiny} --config.batch_size=0", "0"),
        ("--config={tiny} --config.batch_size=-16", "-16"),
        ("--config={tiny} --config.total_steps=1.5", "1.5"),
        ("--config={tiny} --config.model=5", "5"),
        ("--config={tiny} --config.augment.flip=maybe", "--config.augment.flip=maybe; needed: True or False"),
        ("--config={tiny} --config.pruning.after_blocks=first", "first"),
        ("--config={tiny} --config.pruning.after_blocks=1,,2", "1,,2"),
        ("--config={tiny} --config.pruning.keep_ratio=2.0", "2.0"),
        ("--config={tiny} --config.model.dtype=float8", "float8"),
        ("--config={tiny} --config.seed=-1", "-1"),
        ("--config={tiny} --config.init_from={tmp}/junk.safetensors", "junk.safetensors"),
        ("--config={tiny} --config.distillation.weight=0.2", "0.2"),
        ("--config={tiny} --config.model.mlp_ratio=2", "mlp_ratio"),
        ("--config={tiny} --num_processes=2", "--num_processes"),
        ("--config={tiny} --distributed --process_id=-1", "-1"),
        ("--config={tiny} --heartbeat_timeout=0", "heartbeat_timeout"),
        ("--config={tiny} --flagfile={tmp}/absent", "--flagfile cannot be read: No such file"),
        ("--config={tiny} --flagfile={tmp}/binary", "--flagfile cannot be read"),
        ("--config={tiny} --wordkir={tmp}/a", "did you mean --workdir?"),
        ("--config={tiny} --config.seed=1 --confg.batch_size=8", "did you mean --config.batch_size?"),
        ("--config={tiny} {run}", "run"),
        ("--config", "config"),
    ],
    "evaluate": [
        ("", "--config"),
        ("--config={tiny}", "--checkpoint"),
        ("--checkpoint={tmp}/absent", "absent"),
        ("--checkpoint={tmp}", "junk.safetensors"),
        ("--checkpoint={tmp}/hugging_face", "--config is needed"),
        ("--checkpoint={tmp}/text.txt", "text.txt"),
        ("--checkpoint=", "checkpoint"),
        ("--checkpoint={run} --checkpoint={run}", "--checkpoint"),
        ("--checkpoint={run} --json={tmp}/absent/a.json", "absent/a.json"),
        ("--checkpoint={run} --json=", "--json"),
        ("--checkpoint={run} --json={tmp}", "--json"),
        ("--checkpoint={run} --json=/dev/null", "/dev/null"),
        ("--checkpoint={run} --json=/proc/a.json", "/proc/a.json"),
        (f"--checkpoint={{run}} --json={{tmp}}/{LONG}", LONG),
        ("--checkpoint={run} --which=first", "--which=first; needed: one of best, latest"),
        ("--checkpoint={run} --ema=perhaps", "--ema=perhaps; needed: True or False"),
        ("--checkpoint={run} --config.eval_batch_size=0", "0"),
        ("--checkpoint={run} --config.data.eval_crop=nan", "nan"),
        ("--checkpoint={run} --config.model.embed_dim=32", "blocks.0"),
        ("--checkpoint={run} --config.pruning.after_blocks='(9,)'", "9"),
        ("--checkpoint={run} more", "more"),
        ("--config={tiny} --checkpoint={tmp}/junk.safetensors", "junk.safetensors"),
        ("--checkpoint={tmp}/broken", "config.json"),
    ],
    "visualize": [
        ("--checkpoint={run} --out={tmp}/v", "--examples"),
        ("--checkpoint={run} --examples=1", "--out"),
        ("--checkpoint={run} --examples=1 --out=", "--out"),
        ("--checkpoint={run} --examples=-1 --out={tmp}/v", "-1"),
        ("--checkpoint={run} --examples=1 --out={tmp}/text.txt", "text.txt"),
        ("--checkpoint={run} --examples=1 --out={tmp}/v {tmp}/a.png", "--examples"),
        ("--checkpoint={run} --out={tmp}/v {tmp}/absent.png", "absent.png"),
        ("--checkpoint={run} --out={tmp}/v {tmp}/text.txt", "text.txt"),
        ("--checkpoint={run} --out={tmp}/v {tmp}", "{tmp}"),
        ("--checkpoint={run} --examples=1 --out={tmp}/v --draw=colours", "colours"),
        ("--checkpoint={run} --examples=1 --out={tmp}/v --draw=tokens,,scores", "--draw"),
        ("--checkpoint={run} --examples=1 --out={tmp}/v --blocks=3", "3"),
        ("--checkpoint={run} --examples=1 --out={tmp}/v --blocks=one", "one"),
        ("--checkpoint={tmp}/absent --examples=1 --out={tmp}/v", "absent"),
    ],
    "export": [
        ("--checkpoint={run}", "OUT"),
        ("--checkpoint={run} {tmp}/a {tmp}/b", "2 arguments"),
        ("--checkpoint={run} {tmp}", "{tmp}"),
        ("--checkpoint={run} {tmp}/absent/out", "absent"),
        ("--checkpoint={run} {tmp}/text.txt", "text.txt"),
        ("--checkpoint={run} {tmp}/out --batch=0", "0"),
        ("--checkpoint={run} {tmp}/out --batch=all", "all"),
        ("--checkpoint={run} {tmp}/out --platforms=", "platforms"),
        ("--checkpoint={run} {tmp}/out --platforms=cpu,abacus", "abacus"),
        ("--checkpoint={run} {tmp}/out --tolerance=nan", "nan"),
        ("--checkpoint={run} {tmp}/out --tolerance=-1", "--tolerance=-1; needed: a number, at least 0"),
        ("--checkpoint={run} {tmp}/out --json={tmp}/out", "out"),
        ("--checkpoint={run} {tmp}/out --stablehlo={tmp}/out.txt", "out.txt"),
        ("--checkpoint={run} {tmp}/out --images=some", "some"),
        (f"--checkpoint={{run}} {{tmp}}/{LONG}", LONG),
        ("--checkpoint={tmp}/absent {tmp}/out", "absent"),
        ("--checkpoint={other} {tmp}/out --images=data", "only there: '10'"),
    ],
    "predict": [
        ("", "--checkpoint"),
        ("--checkpoint={run}", "image"),
        ("--checkpoint={run} {tmp}/absent.png", "absent.png"),
        ("--checkpoint={run} {tmp}/text.txt --top_k=0", "top_k"),
        ("--checkpoint={run} {tmp}/text.txt --json={tmp}/absent/a.json", "absent"),
        ("--checkpoint={run} ''", "image"),
        ("--checkpoint={tmp}/absent {tmp}/text.txt", "absent"),
        ("--checkpoint= {tmp}/text.txt", "--checkpoint"),
    ],
    "features": [
        ("--checkpoint={run} {tmp}/text.txt", "--output"),
        ("--checkpoint={run} --output={tmp}/f.npz", "image"),
        ("--checkpoint={run} --output={tmp}/f.npz {tmp}/text.txt", "text.txt"),
        ("--checkpoint={run} --output={tmp}/f.npz {tmp}/absent.png", "absent.png"),
        ("--checkpoint={run} --output= {tmp}/text.txt", "--output"),
    ],
    "ablate": [
        ("--checkpoint={run}", "--out"),
        ("--out={tmp}/abl", "--config"),
        ("--checkpoint={run} --out=", "--out"),
        ("--checkpoint={run} --out={tmp}/text.txt", "text.txt"),
        ("--checkpoint={run} --out={tmp}/abl --tables=colour", "colour"),
        ("--checkpoint={run} --out={tmp}/abl --after_blocks=two", "two"),
        ("--checkpoint={run} --out={tmp}/abl --after_blocks=9", "9"),
        ("--checkpoint={run} --out={tmp}/abl --keep_ratio=nan", "nan"),
        ("--checkpoint={run} --out={tmp}/abl --keep_ratio=0", "0"),
        ("--checkpoint={run} --out={tmp}/abl --keep_ratios=nan", "nan"),
        ("--checkpoint={run} --out={tmp}/abl --keep_ratios=half", "half"),
        ("--checkpoint={run} --out={tmp}/abl --alignments=left", "left"),
        ("--checkpoint={run} --out={tmp}/abl --scores=best", "best"),
        ("--checkpoint={run} --out={tmp}/abl --random_seeds=0", "random_seeds"),
        ("--checkpoint={run} --out={tmp}/abl --limit_images=0", "limit_images"),
        ("--checkpoint={run} --out={tmp}/abl --limit_images=100000", "100000"),
        ("--checkpoint={run} --out={tmp}/abl --finetune_seeds=1", "--finetune_seeds"),
        ("--checkpoint={run} --out={tmp}/abl --finetune_steps=1 --finetune_learning_rate=inf", "inf"),
        ("--checkpoint={run} --out={tmp}/abl --finetune_steps=1 --finetune_seeds=a", "a"),
        ("--checkpoint={run} --checkpoint={run} --out={tmp}/abl", "{run}"),
    ],
    "benchmark": [
        ("", "--config"),
        ("--suite=tpu", "tpu"),
        ("--suite=cpu --tune", "exactly one"),
        ("--suite=cpu --train", "--train"),
        ("--suite=cpu --budget=nan", "nan"),
        ("--suite=cpu --budget=0", "budget"),
        ("--suite=cpu --out=", "--out"),
        ("--config={tiny} --batch_sizes=0", "0"),
        ("--config={tiny} --batch_sizes=many", "many"),
        ("--config={tiny} --batch_sizes=", "batch_sizes"),
        ("--config={tiny} {run}", "run"),
        ("--config.seed=1", "--config.seed=1"),
    ],
    "convert": [
        ("", "0 arguments"),
        ("{tmp}/absent.pth {tmp}/out", "absent.pth"),
        ("{tmp}/absent.pth {tmp}/out --model=vim_tiny", "absent.pth"),
        ("{tmp}/junk.safetensors {tmp}/out", "junk.safetensors"),
        ("{tmp}/junk.safetensors {tmp}/out --model=vim_huge", "vim_huge"),
        ("{tmp}/junk.safetensors {tmp}/out --model=vim_tiny", "junk.safetensors"),
        ("{tmp}/junk.safetensors {tmp}/out --model=vim_tiny --override=depth", "depth"),
        ("{tmp}/junk.safetensors {tmp}/out --model=vim_tiny --override=depht=3", "depht"),
        ("{tmp}/junk.safetensors {tmp}/out --model=vim_tiny --checkpoint_img_size=0", "0"),
        ("{run} {tmp}/out", "{tmp}/out"),
        ("{run} {tmp}/out.safetensors --model=vim_small", "vim_small"),
        ("{run} {tmp}/out.safetensors --override=depth=3", "--override"),
        ("{run} {tmp}/junk.safetensors", "junk.safetensors"),
        ("{run} {tmp}/out.safetensors --json={tmp}/out.safetensors", "out.safetensors"),
        ("{run} {tmp}/out.safetensors --json=/proc/a.json", "/proc/a.json"),
        ("{run} {tmp}/out.safetensors --json={tmp}/absent/a.json", "absent"),
        ("{run} {tmp}/absent/out.safetensors", "absent"),
        ("{tmp} {tmp}/out.safetensors", "{tmp}"),
        ("{tmp}/broken {tmp}/out.safetensors", "config.json"),
        ("{run} {tmp}/out.safetensors --which=last", "last"),
    ],
    "flops": [
        ("--config={tiny} --json={tmp}/absent/a.json", "absent"),
        ("--config={tiny} --config.model.depth=0", "0"),
        ("--config={tiny} --config.pruning.alignment=left", "left"),
        ("--config={tiny} more", "more"),
    ],
    "doctor": [
        ("--sample=0", "sample"),
        ("--seconds=inf", "inf"),
        ("--seconds=-1", "-1"),
        ("--step_batch_size=0", "step_batch_size"),
        ("--json=/proc/a.json", "/proc/a.json"),
        ("--data --config.seed=1", "--config.seed=1"),
        ("--data --config={tiny} --config.data.source=image_folder --config.data.data_dir={tmp}/absent", "absent"),
        ("more", "more"),
    ],
    "pack": [
        ("--config={tiny}", ".npz"),
        ("--config={tiny} {tmp}/a.zip", "a.zip"),
        ("--config={tiny} {tmp}/a.npz {tmp}/b.npz", "b.npz"),
        ("--config={tiny} {tmp}/there.npz", "there.npz"),
        ("--config={tiny} {tmp}/absent/a.npz", "absent"),
        ("--config={tiny} {tmp}/a.npz --json={tmp}/a.npz", "a.npz"),
        (f"--config={{tiny}} {{tmp}}/{LONG}.npz", LONG),
    ],
}
FILES = ("predict", "features")  # which take no config
POSITIONAL = {"pack": " {tmp}/a.npz", "export": " {tmp}/out --checkpoint={run}"}
OTHER = {"evaluate": " --checkpoint={run}", "ablate": " --checkpoint={run} --out={tmp}/abl"}
OTHER["visualize"] = " --checkpoint={run} --out={tmp}/v --examples=1"


def test_the_table_is_long():
    assert sum(map(len, ROWS.values())) >= 190


@pytest.fixture(scope="module")
def run(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose weights are zero: nothing is trained or compiled."""
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.weights import abstract_weights, save_weights

    run = RunDirectory(tmp_path_factory.mktemp("zero") / "run")
    optimizer = dataclasses.replace(tiny_config.optimizer, ema_decay=None)
    run.claim(dataclasses.replace(tiny_config, optimizer=optimizer))
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_weights(tiny_config.model))
    save_weights(run, weights)
    run.metrics.touch()  # as if trained: a converted run would ask for its data
    return run.path


@pytest.mark.parametrize("program", ROWS)
@pytest.mark.usefixtures("without_type_checks")  # which compile a check for every function that is called first
def test_wrong_command(command: Any, run: Path, tmp_path: Path, program: str):
    """All rows of a command in one process; every bad row is reported."""
    for name, text in CONFIG_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "junk.safetensors").write_bytes(b"no checkpoint")
    (tmp_path / "hugging_face").mkdir()
    (tmp_path / "hugging_face" / "config.json").write_text('{"architectures": []}')
    (tmp_path / "hugging_face" / "model.safetensors").write_bytes(b"no checkpoint")
    (tmp_path / "there.npz").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"seed": ')
    run = shutil.copytree(run, tmp_path / "run")
    other = shutil.copytree(run, tmp_path / "other")
    (other / "data.json").write_text(json.dumps({"class_names": [str(number) for number in range(1, 11)]}))
    names = {
        "tmp": str(tmp_path),
        "run": str(run),
        "other": str(other),
        "tiny": str(Path(__file__).parents[1] / "tiny_run.py"),
    }
    before = _content(tmp_path)
    more = POSITIONAL.get(program, "") + OTHER.get(program, "")
    rows = ROWS[program] + [
        (line + more, part) for line, part in CONFIGS if program not in ("convert", "train.py", *FILES)
    ]
    rows += [(line, part) for line, part in CONFIGS if program == "train.py"]
    wrong = []
    for line, part in rows:
        try:
            result = command(program, *shlex.split(line.format(**names)))
            errors = result.err.splitlines()
            good = result.status == 2 and len(errors) == 1 and errors[0].startswith("error: ")
            if not (good and part.format(**names) in errors[0]):
                wrong.append((line, result))
        except BaseException as error:
            wrong.append((line, repr(error)[:300]))
        if _content(tmp_path) != before:
            wrong.append((line, f"wrote {_content(tmp_path) ^ before}"))
            before = _content(tmp_path)
    assert not wrong, json.dumps(wrong, indent=1)


def _content(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_size if path.is_file() else 0) for path in folder.rglob("*")}
