"""Trainings that are killed, interrupted, out of disk or started twice: they go on to the same losses, bit for bit.

A process imports everything once and forks a life at a time; nothing of JAX has been started in it then.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

from ssm_lib.runs import Run
from ssm_lib.training import _stoppable

LIVES = '''
import json, os, random, resource, signal, sys, time, warnings
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint
from ssm_lib.runs import Run, SaveError, load_run
from ssm_lib.training import fit

folder, steps, optimizer = Path(sys.argv[1]), 300, optax.adam(1e-2)

def loss(v, batch, key):
    return jnp.mean((v["params"]["w"] - batch + 0.1 * jax.random.normal(key, batch.shape)) ** 2)

def batches(start):
    while True:
        yield np.random.default_rng((0, start)).normal(size=8).astype(np.float32)
        start += 1

def train(name, slow=0.0, every=0, **options):
    variables = {"params": {"w": jnp.zeros(8)}}
    slowed = lambda start: (time.sleep(slow) or batch for batch in batches(start))
    run = Run(folder / name, {"rate": 1e-2}, every=every)
    return fit(loss, variables, slowed, optimizer, steps, check_every=5, run=run, average=0.9, **options)

def born(life, *args, **options):
    "A child that lives so; what it says goes to a file."
    pid = os.fork()
    if pid:
        return pid
    with open(folder / f"said {os.getpid()}", "w") as file:
        os.dup2(file.fileno(), 2)
    try:
        life(*args, **options)
        os._exit(0)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)

def died(pid):
    "How a child ended, and what it said."
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status), (folder / f"said {pid}").read_text()

def at(name):
    last = folder / name / "last"
    return max((int(p.name) for p in last.glob("[0-9]*") if p.name.isdigit()), default=0) if last.is_dir() else 0

def wait(name, step):
    while at(name) < step:
        time.sleep(0.02)

def end(name):
    "What a training has come to, as something to compare."
    variables, losses = train(name, every=1e9)
    return {"w": np.asarray(variables["params"]["w"]).tobytes().hex(), "losses": np.asarray(losses).tobytes().hex()}
'''


def lives(folder, what):
    "Run a script of lives; the JSON that it prints last."
    script = LIVES + textwrap.dedent(what)
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # a life begins sooner
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    made = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300, env=environment)
    assert made.returncode == 0, made.stderr[-2000:]
    return json.loads(made.stdout.splitlines()[-1])


def test_fifty_kills_at_random_moments_change_no_bit(tmp_path):
    found = lives(
        tmp_path,
        """
        chance, kills, reached = random.Random(0), 0, []
        died(born(end, "first"))  # all is compiled
        pid, began = born(train, "second"), time.time()
        wait("second", 5)
        young = time.time() - began  # until its first checkpoint
        os.kill(pid, signal.SIGKILL)
        died(pid)
        while kills < 50:
            pid = born(train, "killed")
            further = chance.randrange(4)  # checkpoints; none: while it begins
            wait("killed", min(at("killed") + 5 * further, steps))
            time.sleep(chance.uniform(0, 0.1 if further else 1) * young)
            os.kill(pid, signal.SIGKILL)
            kills += died(pid)[0]
            reached.append(at("killed"))
            if reached[-1] == steps:  # at the end before the fiftieth kill: once more from the beginning
                os.rename(folder / "killed", folder / f"killed {kills}")
        ends = [end(name.name) for name in sorted(folder.glob("killed*"))] + [end("whole")]
        logs = [[json.loads(line)["step"] for line in (name / "log.jsonl").open()] for name in sorted(folder.glob("killed*"))]
        print(json.dumps({"ends": ends, "logs": logs, "reached": reached}))
        """,
    )
    whole = found["ends"][-1]
    assert len(found["ends"]) > 1 and all(end == whole for end in found["ends"])
    assert all(log == list(range(5, 301, 5)) for log in found["logs"])
    assert len(set(found["reached"])) > 10  # they were killed under way


def test_asked_to_stop_full_disk_and_a_second_process_end_in_one_line_and_lose_nothing(tmp_path):
    found = lives(
        tmp_path,
        """
        said = {}
        for name, number in (("interrupted", signal.SIGINT), ("terminated", signal.SIGTERM)):
            pid = born(train, name, slow=0.02)
            wait(name, 20)
            if number == signal.SIGINT:
                said["second"] = died(born(train, name))[1]
            os.kill(pid, number)
            said[name] = died(pid)[1]

        def small_disk():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            def limit(v, done=[]):
                done.append(1)
                if len(done) == 8:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
                return 1.0
            train("full", validate=limit)

        said["full"] = died(born(small_disk))[1]
        kept, config = at("full"), load_run(folder / "full")[1]
        ends = [end(name) for name in ("interrupted", "terminated", "full", "whole")]
        print(json.dumps({"said": said, "ends": ends, "kept": kept, "config": config}))
        """,
    )
    *others, whole = found["ends"]
    assert all(end == whole for end in others)
    assert 0 < found["kept"] < 300 and found["config"] == {"rate": 1e-2}
    stopped, full, second = "stopped at step", "could not be saved", "in use by another"
    for name, words in {"interrupted": stopped, "terminated": stopped, "full": full, "second": second}.items():
        lines = [line for line in found["said"][name].splitlines() if not line.startswith(("WARNING:absl", "ERROR:absl"))]
        assert len(lines) == 1 and words in lines[0], found["said"][name]


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_is_seen_wherever_it_is(tmp_path, seed):
    import optax

    from ssm_lib.runs import Moment, Run

    rng = np.random.default_rng(seed)
    params = {"params": {"w": rng.normal(size=(16, 16)).astype("f4")}}
    like = Moment(0, params, optax.adam(1e-3).init(params["params"]), np.zeros(0, np.float32))
    with Run(tmp_path / "run") as run:
        for step in (1, 2):
            run.keep(like._replace(step=step, losses=np.arange(step, dtype=np.float32)), now=True)
    for k, file in enumerate(sorted((tmp_path / "run" / "last" / "2").rglob("*"))):
        if not file.is_file() or not file.stat().st_size:
            continue
        copy = tmp_path / f"run {k}"
        shutil.copytree(tmp_path / "run", copy)
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (copy / file.relative_to(tmp_path / "run")).write_bytes(data)
        with warnings.catch_warnings(), Run(copy) as run:
            warnings.simplefilter("ignore")
            found = run.resume(like)
        assert found.step in (1, 2)
        np.testing.assert_array_equal(found.variables["params"]["w"], params["params"]["w"], err_msg=str(file))
        np.testing.assert_array_equal(found.losses, np.arange(found.step))


def test_asked_again_it_stops_at_once(tmp_path):
    """The first Ctrl-C waits for the step to end; the second does not, nor does a second SIGTERM. Afterwards all is as before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _stoppable(Run(tmp_path / "run")) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_folder_that_could_not_be_opened_is_free(tmp_path):
    (tmp_path / "config.json").write_text("{")
    run = Run(tmp_path, {"rate": 1e-2})
    with pytest.raises(ValueError, match="config.json cannot be read; expected JSON"):
        run.__enter__()
    (tmp_path / "config.json").unlink()
    with Run(tmp_path, {"rate": 1e-2}):
        pass
