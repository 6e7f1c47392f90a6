"""Programs on a mesh of devices: the laws of `mesh_laws.py`, each in a process of its own with eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no mesh to follow")
@pytest.mark.parametrize("law", ["scan", "layers", "blocks", "models", "messages", "training", "command_line", "refusals"])
def test_on_eight_devices(law):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    file = Path(__file__).with_name("mesh_laws.py")
    run = subprocess.run([sys.executable, str(file), law], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("holds\n"), run.stderr[-3000:]
