"""What every test runs under. As a program: the flags, for `make test`.

Nearly all of a test is compilation; XLA does it in less than half the time without optimisation and with its older emitters
of loops, which it had until jaxlib 0.11. XLA_FLAGS of one's own, empty ones too, are left as they are: `XLA_FLAGS= pytest
tests/test_space.py` compiles as users do. `make test` runs the pages under these flags, too, and what is compared with
published values or measured of a program without them.
"""

import os
from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

if __name__ == "__main__":
    print(QUICK)
