"""Programs on a mesh of devices: the laws of `mesh_laws.py`, each in a process of its own with eight simulated devices."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

from ssm_lib import ProcessLostError, fit

pytestmark = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no mesh to follow")


LAWS = Path(__file__).with_name("mesh_laws.py")
PROCESS = """
import runpy, sys
import jax
n, rank, port, *sys.argv = *map(int, sys.argv[1:4]), *sys.argv[4:]
jax.config.update("jax_num_cpu_devices", 8 // n)
jax.distributed.initialize(f"127.0.0.1:{port}", n, rank, heartbeat_timeout_seconds=10)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(*words, devices=None):
    flags = os.environ.get("XLA_FLAGS", "") + (f" --xla_force_host_platform_device_count={devices}" if devices else "")
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holds(program):
    said, errors = program.communicate()
    assert program.returncode == 0 and said.endswith("holds\n"), errors[-3000:]


@pytest.mark.parametrize("law", ["scans", "layers", "blocks", "guests", "models", "what_is_sent", "training", "command_line", "refusals"])
def test_on_eight_devices(law):
    holds(started(LAWS, law, devices=8))


def test_several_processes(tmp_path):
    "Two begin a run and one of them is killed; four go on at its last checkpoint, one ends it: the losses are those of one."
    for n in (2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = [started("-c", PROCESS, n, rank, port, LAWS, "process", tmp_path) for rank in range(n)]
        if n == 2:
            survivor, killed = together
            assert killed.wait() == -signal.SIGKILL, killed.stderr.read()[-3000:]
            errors = survivor.communicate(timeout=60)[1]
            told = "several processes could not go on together" in errors and "the checkpoint of step 4 in" in errors
            assert survivor.returncode != 0 and (told or "another task died" in errors), errors[-3000:]
            continue
        for program in together:
            holds(program)
    holds(started(LAWS, "processes", tmp_path))


def test_what_stops_several_processes_is_told(monkeypatch):
    def batches():
        raise jax.errors.JaxRuntimeError("a connection was closed\nand more of it")
        yield

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ProcessLostError, match=r"together: a connection was closed; nothing was kept\. If one"):
        fit(lambda *_: 0.0, {"params": {}}, batches(), optax.sgd(0.1), 3)


def test_on_paper_in_short(tmp_path):
    "The benchmark behind the page on many devices."
    script, file = Path(__file__).parents[1] / "benchmarks" / "mesh.py", tmp_path / "mesh.json"
    program = started(script, "--quick", "--out", file)
    assert program.wait() == 0, program.stderr.read()[-3000:]
    (step,) = json.loads(file.read_text())["rollout, 4"].values()
    assert set(step["sent"]) == {"collective-permute"} and step["flops"] > 0
