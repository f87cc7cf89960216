"""Faults that a run must survive, each tried on a config: a function of a `Bench` that fills in a `Tally`.

It raises AssertionError where the fault is not survived. tests/fault_table.py runs them all and prints a table;
tests/training/test_faults.py runs them on tests/tiny_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from faults import damage, devices, disk, images, kills, not_finite, processes, signals
from faults.bench import Bench, Tally
from faults.disk import Skipped

__all__ = ["FAULTS", "Bench", "Skipped", "Tally"]

FAULTS: Final[dict[str, Callable[[Bench, Tally], None]]] = {
    "killed": kills.at_random_moments,
    "killed_with_workers": kills.with_workers,
    "killed_saving_latest": kills.while_saving_the_latest,
    "killed_saving_best": kills.while_saving_the_best,
    "worker_killed": kills.a_starting_worker,
    "interrupted_twice": signals.interrupted_twice,
    "terminated": signals.terminated,
    "terminated_evaluating": signals.terminated_in_an_evaluation,
    "two_processes": processes.uninterrupted,
    "one_of_two_killed": processes.one_killed,
    "one_of_two_stopped": processes.one_stopped,
    "both_killed": processes.both_killed,
    "one_of_two_terminated": processes.one_terminated,
    "two_processes_damaged": processes.newest_damaged,
    "full_disk": disk.full_disk,
    "full_disk_of_commands": disk.full_disk_of_commands,
    "small_shared_memory": disk.small_shared_memory,
    "truncated": damage.newest_truncated,
    "any_bit_flipped": damage.any_bit,
    "any_file_damaged": damage.any_file,
    "damaged_history": damage.history,
    "emptied": damage.newest_empty,
    "all_damaged": damage.all_damaged,
    "none_left": damage.none_left,
    "best_damaged": damage.best_damaged,
    "unreadable_images": images.unreadable,
    "not_finite": not_finite.a_few_batches,
    "not_finite_killed": not_finite.killed_after_going_back,
    "never_finite": not_finite.never_finite,
    "eight_then_one": devices.eight_then_one,
    "one_then_eight": devices.one_then_eight,
    "weights_in_parts": devices.weights_in_parts,
}
