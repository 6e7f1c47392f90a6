"""Runs that are kept in a file of JSON, each as soon as it is done, so that a benchmark can be stopped and goes on; their spread."""

import json
import time
from importlib.metadata import version

import numpy as np


def read(file):
    "contender → seed → its result."
    return json.loads(file.read_text()) if file.exists() else {}


def in_order(kinds):
    "contender → results in the order of their seeds, from contender → seed → result."
    return {kind: [runs[seed] for seed in sorted(runs, key=int)] for kind, runs in kinds.items()}


def run_missing(file, kinds, seeds, run):
    "Run what a file lacks, seed after seed: run(kind, seed) → dict. With it are kept its seconds and what it ran on."
    versions = {name: version(name) for name in ("ssm_lib", "jax", "flax", "exponax")}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for kind in kinds:
            if str(seed) in read(file).get(kind, {}):
                continue
            began = time.perf_counter()
            result = run(kind, seed) | {"seconds": round(time.perf_counter() - began, 1)} | versions
            done = read(file)
            done.setdefault(kind, {})[str(seed)] = result
            partial_file = file.with_suffix(".partial")
            partial_file.write_text(as_json(done) + "\n", encoding="utf-8")
            partial_file.replace(file)
            print(f"{file.stem}, {kind}, seed {seed}: {result}", flush=True)


def digits(value):
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else "blows up"


def spread(values):
    "Median and quartiles; of one, itself."
    if len(values) == 1:
        return digits(values[0])
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{digits(middle)} [{digits(low)}, {digits(high)}]" if middle < 10 else "blows up"


def as_json(done):
    "A line for each run."
    lines = [
        f" {json.dumps(kind)}: {{\n"
        + ",\n".join(f"  {json.dumps(seed)}: {json.dumps(result)}" for seed, result in runs.items())
        + "\n }"
        for kind, runs in done.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}"
