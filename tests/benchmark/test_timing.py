"""Timing in turn; how long anything takes is not tested."""

import jax
import jax.numpy as jnp

from top_jax.benchmark.timing import Rounds, Timing, compile_all, one_line, over_sets, time_in_turn

ONCE = Rounds(most=3, seconds=60.0, measurement=0.0)


def test_functions_take_turns():
    seen = []
    runs = {name: lambda number, name=name: seen.append(name) for name in "ab"}
    results = time_in_turn(runs, ONCE)
    assert seen == list("aabb" + "ab" * 3)  # a warm-up and a sizing call each, then the rounds
    assert list(results) == ["a", "b"]
    assert all(isinstance(result, Timing) and result.calls == 1 for result in results.values())
    assert all(isinstance(result, Timing) and len(result.each) == 3 for result in results.values())
    low, high = results["a"].row()["quartiles_ms"]
    assert low <= results["a"].row()["median_ms"] <= high


def test_settled_functions_are_called_twice():
    seen = []
    runs = {name: lambda number, name=name: seen.append(name) for name in "ab"}
    results = time_in_turn(runs, ONCE._replace(settle=True))
    assert seen == list("aabb" + "aabb" * 3)
    assert all(isinstance(result, Timing) and len(result.each) == 3 for result in results.values())


def test_the_least_rounds_count_even_without_time():
    counted = []
    assert len(time_in_turn({"a": lambda number: None}, Rounds(5, 0.0, 0.0))["a"].each) == 1
    found = time_in_turn({"a": lambda number: None}, Rounds(5, 0.0, 0.0, least=3), lambda: counted.append(1))
    assert len(found["a"].each) == len(counted) == 3


def test_short_calls_are_queued():
    assert time_in_turn({"a": lambda number: None}, Rounds(1, 1.0, 0.05))["a"].calls == 1000


def test_what_fails_is_left_out():
    def at_once(number):
        raise RuntimeError("no launch")

    calls = []

    def later(number):
        calls.append(number)
        if len(calls) > 3:
            raise ValueError("no more")

    results = time_in_turn({"at once": at_once, "later": later, "good": lambda number: None}, ONCE)
    assert (
        one_line(results["at once"]) == "RuntimeError: no launch"
        and one_line(results["later"]) == "ValueError: no more"
    )
    assert isinstance(results["good"], Timing) and results["good"].row()["rounds"] == 3


def test_sets_rotate():
    run = over_sets(lambda a: a, [(0,), (1,), (2,)])
    assert [run(number) for number in range(4)] == [0, 1, 2, 0]


def test_compile_all():
    def refuse():
        raise TypeError("cannot be traced")

    x = jnp.arange(3.0)
    found = compile_all({"good": lambda: jax.jit(jnp.cos).lower(x), "bad": refuse}, workers=2)
    program, seconds = found["good"]
    assert (program(x) == jnp.cos(x)).all() and seconds > 0
    assert isinstance(found["bad"], TypeError)


def test_an_exception_is_one_short_line():
    line = one_line(RuntimeError("a\nb " + "x" * 1000))
    assert line.startswith("RuntimeError: a b x") and len(line) < 330 and "\n" not in line
