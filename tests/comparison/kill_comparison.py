"""A comparison that is killed again and again, beside one that is left alone; and one on four simulated devices.

python tests/comparison/kill_comparison.py --kills 10 --output results/compare-kills
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from comparison_support import lasting, make_features

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    *("--trials", "8", "--num-seeds", "3", "--layer-width", "48", "--epochs", "60"),
    *("--batch-size", "32", "--seed", "1"),
)


def write_data(folder: Path) -> Path:
    """Features of three classes as an .npz file."""
    splits = make_features(num_train=900, num_test=300)
    arrays = {}
    for name, (inputs, labels) in splits.items():
        arrays |= {f"{name}_images": inputs, f"{name}_labels": labels}
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def start(folder: Path, name: str, devices: int = 1, more: Sequence[str] = ()) -> subprocess.Popen:
    """The comparison in the work directory `name`, with a compilation cache of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "PSPINAL_"))}
    kept |= {"PSPINAL_JAX_CACHE": str(folder / f"{name}-cache"), "PYTHONPATH": str(REPOSITORY)}
    if devices > 1:
        kept |= {"JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(2 * devices)}
    command = [sys.executable, "-m", "pspinal_jax", "compare", "data.npz", "--workdir", name, *FLAGS, *more]
    return subprocess.Popen(command, cwd=folder, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> float:
    """Seconds until it has ended well."""
    began = time.perf_counter()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]
    return time.perf_counter() - began


def result_of(folder: Path, name: str) -> dict:
    """compare.json but for its execution and the command, which names the folder."""
    found = lasting(json.loads((folder / name / "compare.json").read_text()))
    found.pop("command")
    return found


def kill_again_and_again(folder: Path, kills: int, seed: int) -> list[dict]:
    """One comparison, killed `kills` times and then left to end; a record of every kill.

    Each comes at a random moment: up to a second after so many more lines as are drawn, none of them included, which is
    while the program starts or compiles. So all kills come before the end, beside the last line at the latest.
    """
    rng, records, trials = random.Random(seed), [], folder / "killed" / "trials.jsonl"
    total = (folder / "alone" / "trials.jsonl").read_bytes().count(b"\n")

    def lines() -> int:
        return trials.read_bytes().count(b"\n") if trials.exists() else 0

    for number in range(kills):
        wanted = min(total - 1, lines() + rng.randint(0, 2 * total // (kills + 1)))
        process, began = start(folder, "killed"), time.perf_counter()
        while lines() < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 1.0) ** 3)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seconds = round(time.perf_counter() - began, 2)
        records.append({"kill": number + 1, "after_seconds": seconds, "lines": lines(), "had_ended": ended})
    finish(start(folder, "killed"))
    return records


def main() -> None:
    """Run both, compare, and write kills.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        seconds = finish(start(folder, "alone"))
        records = kill_again_and_again(folder, arguments.kills, seed=0)
        alone, killed = result_of(folder, "alone"), result_of(folder, "killed")
        summary = {
            "command": f"python tests/comparison/kill_comparison.py {shlex.join(sys.argv[1:])}",
            "seconds_alone": round(seconds, 1),
            "kills": records,
            "same_but_for_execution": alone == killed,
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "kills.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    sys.exit(0 if alone == killed else 1)


if __name__ == "__main__":
    main()
