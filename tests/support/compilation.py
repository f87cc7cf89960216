"""How the tests compile: unoptimised (tests/conftest.py), except those that are about optimised code."""

import importlib.metadata
from typing import Any

# XLA ends the process at a flag that it does not know. jaxlib 0.10 knows this one, 0.12 does not.
_HAS_FUSION_EMITTERS_FLAG = importlib.metadata.version("jaxlib").startswith("0.10.")


def _options(level: int, *, fusion_emitters: bool) -> dict[str, Any]:
    emitters = {"xla_cpu_use_fusion_emitters": fusion_emitters} if _HAS_FUSION_EMITTERS_FLAG else {}
    # One LLVM module a program: splitting it for parallel code generation costs small programs a quarter of their time.
    return {"xla_backend_optimization_level": level, "xla_cpu_parallel_codegen_split_count": 1, **emitters}


# Compiling is most of what the tests do. Unoptimised it takes half the time, and without the fusion emitters, which
# build every fusion through MLIR, a third of the rest.
QUICK = _options(0, fusion_emitters=False)
# Unoptimised, but rounding as XLA's own code generator does: for equality to the last bit.
EXACT = _options(0, fusion_emitters=True)
OPTIMISED = _options(3, fusion_emitters=True)  # as XLA's own defaults
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
