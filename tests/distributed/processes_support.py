"""Starting `pspinal-jax` as one or several processes of its own, on simulated devices."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from pspinal_jax.training.costs import MEASURED

SCRIPT = Path(__file__).with_name("observed.py")


_LONGEST = 900  # seconds, of a run that hangs


@dataclasses.dataclass
class Ended:
    """How a process ended, and what observed.py saw in it (None if it was killed)."""

    status: int
    out: str
    err: str
    seen: dict | None


def run(
    folder, arguments, *, processes=2, devices=2, seconds=None, found_by="flags", counts=None, port=None, **environment
):
    """`pspinal-jax ARGUMENTS` as so many processes; waits for all, at most `seconds` after the one that STOP names.

    They learn of each other from flags, or from variables as srun ("slurm") or Kubeflow Trainer ("kubeflow") sets them.
    `counts` are what each of them takes for the number of processes.
    """
    port = port or free_port()
    started = []
    for index in range(processes):
        flags = _flags(port, counts[index] if counts else processes, index)
        observed = folder / f"observed_{index}.json"
        observed.unlink(missing_ok=True)
        if found_by != "flags":
            variables_of = {"slurm": _slurm, "kubeflow": _kubeflow}[found_by]
            flags, environment = flags[:1], environment | variables_of(port, processes, index)
        variables = {"NPROC": "16", "DEVICES": str(devices), "OBSERVED": str(observed), **environment}
        with (folder / f"out_{index}").open("w") as out, (folder / f"err_{index}").open("w") as err:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), *arguments, *flags],
                    env={**os.environ, **variables},
                    stdout=out,
                    stderr=err,
                )
            )
    try:
        if seconds is not None:
            killed = started[int(environment["STOP"].split(":")[0])]
            killed.wait()
        for process in started:
            process.wait(timeout=seconds or _LONGEST)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [_ended(folder, index, process) for index, process in enumerate(started)]


def _flags(port, processes, index):
    if processes == 1:
        return []
    address = f"--coordinator-address 127.0.0.1:{port}"
    return f"--distributed {address} --num-processes {processes} --process-id {index}".split()


def _slurm(port, processes, index):
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


def _kubeflow(port, processes, index):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def _ended(folder, index, process):
    observed = folder / f"observed_{index}.json"
    seen = json.loads(observed.read_text()) if observed.exists() else None
    out, err = ((folder / f"{name}_{index}").read_text().splitlines(keepends=True) for name in ("out", "err"))
    # Without native code's lines, which its threads write in pieces that run into each other.
    own = re.sub(r"\[Gloo\][^\n]*\n?|^[^\n]* peer ranks[^\n]*\n?|^[\d ]*\n", "", "".join(out), flags=re.MULTILINE)
    return Ended(process.returncode, own, "".join(err), seen)


def run_to_the_end(folder, arguments, **options):
    """As `run`, of processes that all have to succeed."""
    ended = run(folder, arguments, **options)
    for process in ended:
        assert process.status == 0, process.err
        assert "Traceback" not in process.err
    assert [process.out for process in ended[1:]] == [""] * (len(ended) - 1)
    return ended


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_four_classes(path):
    """Images [N, 4, 4] of four classes, so that they can be sharded over two or four devices."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 48)):
        labels = rng.integers(0, 4, count)
        images = rng.integers(0, 120, (count, 4, 4))
        images[np.arange(count), labels] += 90
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(path, **arrays)
    return path


def small(data, workdir, *flags):
    """Arguments of a small run with SGD: 4 steps an epoch."""
    text = (
        f"train digits --data.path {data} --data.num-classes 4 --data.num-validation 32 --workdir {workdir} "
        "--model.layer-width 64 --model.num-layers 3 --optimizer.name sgd --optimizer.learning-rate 0.02 "
        "--optimizer.schedule constant --batch-size 16 --eval-batch-size 16 --epochs 3 --checkpoint-seconds 0"
    )
    return [*text.split(), *flags]


def metrics(workdir):
    """What metrics.jsonl holds, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
