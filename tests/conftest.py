"""What every test runs under. As a program: the flags, for `make test`.

Nearly all of a test is compilation; XLA does it in less than half the time without optimisation and with its older emitters
of loops, which it had until jaxlib 0.11. XLA_FLAGS of one's own, empty ones too, are left as they are: `XLA_FLAGS= pytest
tests/test_space.py` compiles as users do. `make test` runs the pages under these flags, too, and what is compared with
published values or measured of a program without them.

The rest is tracing, which leaves many small objects behind that live: they are looked through seldom. What one process has
compiled the others find in `.pytest_cache/compiled`, the next run too; it may be removed at any time.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
gc.set_threshold(100_000, 50, 50)

if __name__ == "__main__":
    print(QUICK)
