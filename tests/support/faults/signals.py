"""SIGTERM, which a cluster sends before it takes the machine away."""

from __future__ import annotations

import signal
import time
from typing import Final

from runs import latest_step, metrics, reached

from faults.bench import Bench, Tally


def terminated(bench: Bench, tally: Tally) -> None:
    """Sends SIGTERM once, and to the next start twice, the second time while it saves."""
    rng, workdir, reference = bench.random("terminated"), bench.workdir("terminated"), bench.finished()
    half = bench.total_steps // 2
    moments = rng.randint(1, half - 2), rng.randint(half + 2, bench.total_steps - 3)
    tally.done = f"SIGTERM at step {moments[0]}; of the next start at step {moments[1]}, and again while it saved"
    for step, signals in zip(moments, (1, 2), strict=True):
        started = bench.start(workdir).until(reached(workdir, step))
        tally.tried += 1
        for _ in range(signals):
            started.signal(signal.SIGTERM)
            time.sleep(0.02)
        started.end()
        saved = latest_step(workdir)
        assert f"SIGTERM: saved at step {saved}; start the same command again to go on." in started.out
        assert started.err == "" and not list(workdir.glob("checkpoints/*/*tmp*"))
        tally.lose(started)
        tally.survive()
    assert tally.steps_lost == 0, "a step was not saved"
    bench.start(workdir).end()
    tally.same(workdir, reference)


def interrupted_twice(bench: Bench, tally: Tally) -> None:
    """Sends SIGINT, and again while the run saves: it ends at once with one line, and the next start goes on."""
    workdir, reference = bench.workdir("interrupted-twice"), bench.finished()
    tally.done, tally.tried = "SIGINT at step 6, and again until it had ended", 1
    started = bench.start(workdir).until(reached(workdir, 6))
    while started.process.poll() is None:
        started.signal(signal.SIGINT)
        time.sleep(0.05)
    lines = started.end(130).err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("interrupted again: "), started.err
    tally.lose(started)
    bench.start(workdir).end()
    tally.same(workdir, reference)


IN_ITS_FIRST_EVALUATION: Final = """
import os, runpy, signal, sys
import top_jax.training.loop as loop
evaluate = loop.evaluate
def interrupted(*arguments, on_batch, **options):
    def on_first_batch(images):
        os.kill(os.getpid(), signal.SIGTERM)
        on_batch(images)
    return evaluate(*arguments, on_batch=on_first_batch, **options)
loop.evaluate = interrupted
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def terminated_in_an_evaluation(bench: Bench, tally: Tally) -> None:
    """Sends SIGTERM during an evaluation: it stops at once, and the next start repeats it."""
    workdir, reference = bench.workdir("terminated-in-evaluation"), bench.finished()
    first = next(line["step"] for line in metrics(reference) if line["kind"] == "eval")
    tally.done, tally.tried = f"SIGTERM during the evaluation of step {first}", 1
    started = bench.start(workdir, program=IN_ITS_FIRST_EVALUATION).end()
    assert started.err == "" and f"SIGTERM: saved at step {first}" in started.out
    lines = metrics(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, first + 1))
    assert not [line for line in lines if line["kind"] == "eval"]
    tally.lose(started)
    bench.start(workdir).end()
    tally.same(workdir, reference)
