"""How the tests compile: unoptimised (tests/conftest.py), but for those that are about optimised code."""

OPTIMISED = {"xla_backend_optimization_level": 3}  # XLA's own default; for `compiler_options`
