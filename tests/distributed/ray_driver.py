"""Run as a script: DATA FOLDER. Two runs on two workers of Ray; the second loses each of them once, with SIGKILL.

Prints as JSON what stood in the second's metrics.jsonl at the last kill, and the numbers of the processes killed.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
from ray.train import ScalingConfig

import pspinal_jax.ray

data, folder = map(Path, sys.argv[1:])
MARK = f"PSPINAL_JAX_TEST={folder}".encode()
os.environ["PSPINAL_JAX_TEST"] = str(folder)
RUN = {
    **{"data__path": data, "data__num_classes": 4, "data__num_validation": 32, "batch_size": 16, "eval_batch_size": 16},
    **{"model__layer_width": 64, "model__num_layers": 3, "optimizer__name": "sgd", "optimizer__learning_rate": 0.02},
    **{"optimizer__schedule": "constant", "epochs": 8, "checkpoint_seconds": 0},
}
seen = {"lines": [], "killed": []}


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def workers():
    """The processes of this script's Ray that train."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayTrainWorker" in (path / "cmdline").read_bytes() and MARK in (path / "environ").read_bytes():
                yield int(path.name)
        except OSError:
            pass  # it has ended


def kill(workdir):
    """Process 1 after an epoch, process 0, which holds the run directory, after four."""
    for primary, epochs in ((False, 1), (True, 4)):
        while len(lines(workdir)) < epochs:
            time.sleep(0.02)
        first = int((workdir / ".lock").read_text().split()[1])
        (process,) = [pid for pid in workers() if (pid == first) == primary]
        seen["lines"] = lines(workdir)
        os.kill(process, signal.SIGKILL)
        seen["killed"].append(process)


def train(name):
    os.chdir(folder)
    return pspinal_jax.ray.train("digits", ScalingConfig(num_workers=2), workdir=name, **RUN)


ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
try:
    train("whole")
    threading.Thread(target=kill, args=(folder / "killed",), daemon=True).start()
    run = train("killed")
    assert run.path == folder / "killed" and run.result["device"]["processes"] == 2
finally:
    ray.shutdown()
print(json.dumps(seen))
