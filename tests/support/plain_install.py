"""What works with a plain install, and what names the extra that it lacks: a program for a process of its own.

python plain_install.py RUN FOLDER [--block] [--refusals]

RUN is a finished run on the digits, FOLDER an empty one to write to. Prints JSON: for each command its status and its
last line of stderr, for each library call "works" or its exception. --block makes the packages of all extras
unimportable, for an environment that has them. --refusals leaves out `COSTLY`.

A test imports this module for `unexpected(results)`.
"""

import contextlib
import importlib.abc
import importlib.util
import io
import json
import runpy
import shutil
import sys
import time
from pathlib import Path

WORKS = ("create", "scan", "load", "preprocess")
LACKS = {
    "torch_file": "convert",
    "make_config": "train",
    "train": "train",
    "digits": "train",
    "batches": "train",
    "figures": "figures",
    "ablation": "figures",
}
COMMANDS = {  # None: works
    "train --config=vim_digits": "train",
    "train --workdir=RUN": "train",
    "evaluate --checkpoint=RUN --config=vim_digits": "train",
    "evaluate --checkpoint=RUN": "train",
    "convert RUN /out.pth": "convert",
    "convert RUN/ /out.safetensors": "convert",
    "flops --config=RUN": None,
    "benchmark --config=vim_digits": "train",
    "ablate --checkpoint=RUN --out=/ablation": "train,figures",
    "visualize --checkpoint=RUN --out=/pictures": "figures",
    "export --checkpoint=RUN /out.stablehlo": "export",
    "doctor": None,
    "doctor --data": "train",
    "pack --config=RUN /out.npz": "train",
    "predict --checkpoint=RUN /photo.png": None,
    "features  --checkpoint=RUN": None,
}
COSTLY = (  # what works and takes seconds
    "create",
    "scan",
    "load",
    "predict --checkpoint=RUN /photo.png",
    "features  --checkpoint=RUN",
)


class Blocked(importlib.abc.MetaPathFinder):
    """Finds nothing for some packages, and says so as Python does."""

    def __init__(self, names):
        self.names = frozenset(names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def main(run, folder, block, refusals):
    start = time.perf_counter()
    import top_jax

    results = {"seconds": time.perf_counter() - start, "file": top_jax.__file__}
    results["loaded"] = sorted({"jax", "flax", "numpy", "absl"} & sys.modules.keys())
    from top_jax import optional

    if block:
        names = set(optional.EXTRAS) - {"rich", "scipy"}  # which Flax and JAX load
        sys.meta_path.insert(0, Blocked(names))
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name in names else find_spec(name, package)
    calls, lines = library(run, folder), {}
    for line in commands(run, folder):
        lines[" ".join(line[:3]).replace(str(run), "RUN").replace(str(folder), "")] = line
    results["left out"] = COSTLY if refusals else ()
    for kind, tried, end in (("library", calls, outcome), ("commands", lines, lambda line: command(*line))):
        results[kind] = {name: end(what) for name, what in tried.items() if name not in results["left out"]}
    print(json.dumps(results))


def library(run, folder):
    """Calls by name; each imports what it needs."""
    import jax
    import jax.numpy as jnp

    def create():
        import top_jax

        sizes = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, d_state=4, num_classes=3)
        pruning = top_jax.Pruning(after_blocks=(1,), keep_ratio=0.5)
        model = top_jax.create_model("vim_tiny", pruning=pruning, **sizes)
        assert jax.jit(lambda m, x: m(x))(model, jnp.ones((1, 8, 8, 3))).shape == (1, 3)

    def scan():
        import top_jax

        ones = jnp.ones((1, 3, 2))
        top_jax.ops.selective_scan(ones, ones, -jnp.ones((2, 2)), ones, ones, implementation="xla").block_until_ready()

    def load():
        import top_jax

        assert top_jax.load_checkpoint(run).config.num_classes == 10

    def preprocess():
        import numpy as np
        from PIL import Image

        import top_jax

        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "photo.png")
        assert top_jax.preprocess(folder / "photo.png", img_size=8).shape == (8, 8, 3)

    def torch_file():
        import top_jax

        (folder / "vim.pth").write_bytes(b"PK")
        top_jax.load_torch_checkpoint(folder / "vim.pth", "vim_tiny")

    def make_config():
        from top_jax.config import make_config

        make_config()

    def train():
        from top_jax.config import RunConfig
        from top_jax.training import train

        train(RunConfig(), folder / "never")

    def digits():
        from top_jax.config import DataConfig
        from top_jax.data import open_source

        open_source(DataConfig(), train=True)

    def batches():
        from top_jax.config import DataConfig
        from top_jax.data import eval_batches

        class Source:
            name, num_classes, class_names = "mine", 1, ("a",)

            def __len__(self):
                return 1

            def __getitem__(self, index):
                raise NotImplementedError

        eval_batches(Source(), DataConfig(), img_size=8, batch_size=1)

    def figures():
        import top_jax.figures.sheet  # noqa: F401

    def ablation():
        import top_jax.ablation  # noqa: F401

    return {name: call for name, call in locals().items() if callable(call) and name not in ("jax", "jnp")}


def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


def commands(run, folder):
    photo = str(folder / "photo.png")
    return [
        ["train", "--config=vim_digits"],
        ["train", f"--workdir={run}"],
        ["evaluate", f"--checkpoint={run}", "--config=vim_digits"],
        ["evaluate", f"--checkpoint={run}"],
        ["convert", str(run), str(folder / "out.pth")],
        ["convert", f"{run}/", str(folder / "out.safetensors")],
        ["flops", f"--config={run}"],
        ["benchmark", "--config=vim_digits"],
        ["ablate", f"--checkpoint={run}", f"--out={folder}/ablation"],
        ["visualize", f"--checkpoint={run}", f"--out={folder}/pictures", photo],
        ["export", f"--checkpoint={run}", f"{folder}/out.stablehlo"],
        ["doctor"],
        ["doctor", "--data"],
        ["pack", f"--config={run}", f"{folder}/out.npz"],
        ["predict", f"--checkpoint={run}", photo],
        ["features", str(folder), f"--checkpoint={run}", f"--output={folder}/features.npz"],
    ]


def command(name, *arguments):
    """Runs `top-jax name ...`; returns its status and its last lines."""
    from absl import flags

    sys.argv = ["top-jax", name, *arguments]
    out, err, status = io.StringIO(), io.StringIO(), None
    before = set(flags.FLAGS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("top_jax", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        err.write(f"{type(error).__name__}: {error}")
    by_module = flags.FLAGS.flags_by_module_dict()
    ours = [module for module in by_module if "/top_jax/cli/" in module or module == "top_jax.cli.shared_flags"]
    defined = {flag.name for module in ours for flag in by_module[module]}
    for flag in defined | {flag for flag in set(flags.FLAGS) - before if flag.startswith("config.")}:
        delattr(flags.FLAGS, flag)  # so that the next command may define it
    flags.FLAGS.unparse_flags()
    return {"status": status, "err": err.getvalue().strip(), "out": out.getvalue()}


def unexpected(results):
    """Returns what of `main`'s results neither works as it should nor names the missing extra."""
    wrong = {}
    for name, text in results["library"].items():
        good = text == "works" if name in WORKS else f"pip install 'top-jax[{LACKS[name]}]'" in text
        if not good or (name in LACKS and not text.startswith("MissingPackageError: ")):
            wrong[name] = text
    for line, result in results["commands"].items():
        if (extra := COMMANDS[line]) is None:
            good = result["status"] == 0 and not result["err"]
        else:
            named = "pip install" in result["err"] and f"'top-jax[{extra}]'" in result["err"]
            good = result["status"] == 2 and named and "\n" not in result["err"]
        if not good:
            wrong[line] = result
    lines = {*WORKS, *LACKS, *COMMANDS} ^ {*results["library"], *results["commands"], *results["left out"]}
    return {**wrong, **dict.fromkeys(lines, "not tried, or not expected")}


if __name__ == "__main__":
    finished, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    copy = Path(shutil.copytree(finished, scratch / "run"))
    main(copy, scratch, "--block" in sys.argv, "--refusals" in sys.argv)
