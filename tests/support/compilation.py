"""How the tests compile: unoptimised (tests/conftest.py), except those that are about optimised code."""

# Compiling is most of what the tests do. Unoptimised it takes half the time, and without the fusion emitters, which
# build every fusion through MLIR, a third of the rest.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# Unoptimised, but rounding as XLA's own code generator does: for equality to the last bit.
EXACT = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": True}
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}  # XLA's own defaults
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
