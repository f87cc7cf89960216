"""Runs a config once without interruption, and once for each fault that a run must survive; prints a table.

python tests/fault_table.py [--config FILE] [--kills 10] [--only NAME,...] [--json FILE] [-- --config.KEY=...]

Every start is a process of its own. The exit status is 1 where one fault was not survived. The moments are random, and
the same again with the same --seed. A FILE of --json that exists keeps what it has of the faults that are not tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]  # first: they hold what this file imports
os.environ["JAX_PLATFORMS"] = "cpu"  # as in the processes that are started

from faults import FAULTS, Bench, Skipped, Tally  # noqa: E402
from rich.console import Console  # noqa: E402
from runs import TINY_CONFIG, Launcher  # noqa: E402

HEADINGS = (
    "fault",
    "what was done",
    "tried",
    "survived",
    "steps lost",
    "difference of the final loss",
    "weights bit-identical",
    "remarks",
)


@dataclasses.dataclass
class Result:
    """The result of one fault, for the table and the JSON."""

    fault: str
    outcome: str  # "survived", "skipped" or "not survived"
    why: str
    seconds: float
    tally: Tally
    commit: str | None = None

    def row(self) -> tuple[str, ...]:
        """Returns the row of the table."""
        tally = self.tally
        known = {True: "yes", False: "no", None: "-"}
        return (
            self.fault,
            tally.done or "-",
            str(tally.tried),
            str(tally.survived) if self.outcome != "skipped" else "skipped",
            "-" if tally.steps_lost is None else str(tally.steps_lost),
            "-" if tally.difference is None else f"{tally.difference:.2g}",
            known[tally.identical],
            "; ".join([*tally.notes, self.why][: None if self.why else -1]) or "-",
        )


def main() -> int:
    """Tries the faults that the flags name; prints the table and writes the JSON."""
    arguments, flags = _arguments()
    for name in ("absl", "asyncio"):  # Orbax, about what is damaged here and read in this process
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    console = Console(highlight=False, soft_wrap=True)
    say = lambda line: console.print(f"  {line}", markup=False)  # noqa: E731
    scratch = Path(arguments.scratch or tempfile.mkdtemp(prefix="faults-"))
    scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        Launcher(scratch / "compiled", optimize=arguments.config.resolve() != TINY_CONFIG),
        scratch,
        config=arguments.config.resolve(),
        flags=tuple(flags),
        kills=arguments.kills,
        seed=arguments.seed,
        say=say,
    )
    bench.finished()
    results = []
    for number, name in enumerate(arguments.only, 1):
        console.print(f"[{number}/{len(arguments.only)}] {name}", markup=False)
        results.append(_try(name, bench))
        say(f"{results[-1].outcome} {results[-1].why} ({results[-1].seconds:.0f} s)")
        if arguments.json:  # after each, so that what is known outlives this process
            arguments.json.write_text(json.dumps(_report(arguments, flags, results), indent=2) + "\n")
    console.print(_table(results), markup=False)
    failed = [result for result in results if result.outcome == "not survived"]
    if arguments.scratch is None and not failed:
        shutil.rmtree(scratch)
    else:
        console.print(f"the run directories are in {scratch}", markup=False)
    return 1 if failed else 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"faults: {', '.join(FAULTS)}"
    )
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--config", type=Path, default=TINY_CONFIG, help="tests/tiny_run.py if not given")
    parser.add_argument("--kills", type=int, default=10, help="of one run, at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of all random moments")
    parser.add_argument("--only", type=names, default=list(FAULTS), help="these faults, by name")
    parser.add_argument("--json", type=Path, help="where to write the result too")
    parser.add_argument("--scratch", type=Path, help="where the runs go, and stay; if not given, a temporary folder")
    parser.add_argument("flags", nargs="*", metavar="--config.KEY=VALUE", help="after --: changes to the config")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - FAULTS.keys():
        parser.error(f"unknown fault {sorted(unknown)[0]}; choose from {', '.join(FAULTS)}")
    if arguments.kills < 1:
        parser.error(f"--kills={arguments.kills}; it must be at least 1")
    return arguments, arguments.flags


def _try(name: str, bench: Bench) -> Result:
    tally, before = Tally(), time.monotonic()
    outcome, why = "survived", ""
    try:
        FAULTS[name](bench, tally)
    except Skipped as error:
        outcome, why = "skipped", str(error)
    except Exception as error:  # whatever it is, the other faults are still to be tried
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = str(error) or where.line
        outcome, why = "not survived", " ".join(f"{Path(where.filename).name}:{where.lineno}: {what}".split())[:600]
    from top_jax.environment import environment

    return Result(name, outcome, why, time.monotonic() - before, tally, environment()["git"])


def _report(arguments: argparse.Namespace, flags: list[str], results: list[Result]) -> dict[str, Any]:
    from top_jax.environment import environment

    tried = {result.fault: dataclasses.asdict(result) for result in results}
    kept = json.loads(arguments.json.read_text())["faults"] if arguments.json.exists() else []
    faults = {result["fault"]: result for result in kept} | tried
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": environment(),
        "config": str(arguments.config),
        "flags": flags,
        "seed": arguments.seed,
        "kills": arguments.kills,
        "faults": [faults[name] for name in FAULTS if name in faults],
    }


def _table(results: list[Result]) -> str:
    """Formats the results as a markdown table."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(result.row() for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
