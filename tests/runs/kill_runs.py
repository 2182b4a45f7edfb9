"""Runs that are killed again and again, beside one that is left alone; the table of the moments.

python tests/runs/kill_runs.py --kills 50 --output results/kills
"""

import argparse
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DRIVER = Path(__file__).with_name("marked_train.py")
REPOSITORY = Path(__file__).parents[2]
EPOCHS = 400
KILL, TERM = signal.SIGKILL, signal.SIGTERM

# What to be killed at, in an order in which one run comes by all of it: a run is killed at each of these in turn and
# then left to end. Every third run takes the other signal; those that fit one signal only say which. "any" is a random
# moment since the start of the process. With TERM while it writes its result, a run ends.
AIMS = [
    ("interpreter", None),
    ("imports", None),
    ("compilation", None),
    ("compilation", None),
    ("saving", None),
    ("training steps", None),
    ("evaluation", None),
    ("saving", None),
    ("any", None),
    ("restoring", None),
    ("metrics line", None),
    ("any", None),
    ("evaluation", None),
    ("next stage", KILL),
    ("next stage", TERM),
    ("saving", None),
    ("result", KILL),
    ("curves", KILL),
    ("result.json", KILL),
    ("closing the checkpoints", TERM),
]
NEEDED = {"imports", "compilation", "training steps", "saving", "evaluation", "next stage"}


def write_data(path: Path) -> Path:
    """Images [8, 8] of ten classes, hard enough that validation accuracy goes on changing."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 1400), ("test", 300)):
        arrays[f"{part}_labels"] = rng.integers(0, 10, count)
        images = rng.integers(0, 150, (count, 8, 8))
        images[np.arange(count), arrays[f"{part}_labels"] % 8] += 60
        arrays[f"{part}_images"] = images.astype(np.uint8)
    np.savez(path, **arrays)
    return path


class Runs:
    """Starts the processes of one table, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder / "data.npz")
        self.marks = folder / "marks"
        self.marks.mkdir()

    def command(self, name: str) -> list[str]:
        """The run `name`, as on the command line."""
        flags = f"--epochs {EPOCHS} --checkpoint-seconds 0 --data.num-validation 200 --retrain"
        return ["train", "digits", *flags.split(), "--data.path", str(self.data), "--workdir", str(self.folder / name)]

    def start(self, name: str, aim: dict | None = None) -> subprocess.Popen:
        """A process of the run `name`; each run has a compilation cache of its own, empty at first."""
        for mark in self.marks.iterdir():
            mark.unlink()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        environment |= {"PSPINAL_JAX_CACHE": str(self.folder / f"{name}-cache"), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, str(DRIVER), str(self.marks), json.dumps(aim), *self.command(name)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def log(self) -> dict[str, dict]:
        """What the last process noted, by event."""
        lines = (self.marks / "log.jsonl").read_text().splitlines()
        return {line["event"]: line for line in map(json.loads, lines)}

    def now(self) -> dict:
        """What the process is doing."""
        try:
            return json.loads((self.marks / "now").read_text())
        except (OSError, ValueError):
            return {"doing": "interpreter", "stage": None, "epochs": None, "steps": None}

    def outcome(self, name: str) -> dict:
        """All that a finished run leaves, but for times: to be equal, bit for bit."""
        run = self.folder / name
        (newest, *_) = sorted((run / "checkpoints").iterdir(), key=lambda path: -int(path.name))
        record = json.loads((newest / "record" / "metadata").read_text())
        result = json.loads((run / "result.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        times = ("seconds", "total_seconds", "examples_per_second", "compile_seconds")
        keep = lambda tree: {key: value for key, value in tree.items() if key not in times}  # noqa: E731
        return {
            "checkpoint": newest.name,
            "checksums": record["checksums"],
            "position": keep(record["position"]),
            "result": keep(result),
            "metrics": [keep(line) for line in lines],
            "curves": (run / "curves.png").read_bytes().hex(),
        }


def kill_one(runs: Runs, name: str, aim: dict) -> dict:
    """One process of the run `name`, signalled as `aim` says: a row of the table."""
    start = time.time()
    if aim["doing"] == "any":
        process = runs.start(name)
        try:
            output, error = process.communicate(timeout=aim["delay"])
            raise AssertionError(f"the run ended before {aim}: {output} {error}")
        except subprocess.TimeoutExpired:
            moment = runs.now() | {"seconds": round(time.time() - start, 3)}
        process.send_signal(aim["signal"])
    else:
        process = runs.start(name, aim)
        moment = None
    output, error = process.communicate(timeout=300)
    log = runs.log()
    if moment is None:
        assert "signal" in log, f"the run did not come by {aim}: {error}"
        moment = log["signal"]
    return {
        "run": name,
        "aimed_at": aim["doing"],
        "signal": aim["signal"].name,
        "seconds": moment["seconds"],
        **{key: moment[key] for key in ("doing", "stage", "epochs", "steps")},
        "went_on_from_step": log.get("restored", {}).get("steps"),
        "exit_status": process.returncode,
        "said": [line for line in error.splitlines() if "step/s" not in line],
        "ended": (runs.folder / name / "result.json").exists(),
    }


def plan(rng: random.Random, means: dict[str, float], start_up: float, training: float):
    """The aims of one run after the other, without end: a list a run."""
    for number in itertools.count():
        aims = []
        for index, (doing, only) in enumerate(AIMS):
            which = only or (KILL, TERM)[(index + number) % 2]
            if doing == "any":
                delay = rng.uniform(0.1, start_up + training / 10)
            else:  # every other at the very start of it, others anywhere in its length
                delay = rng.choice((0.0, rng.uniform(0, means[doing])))
            often = doing in ("training steps", "evaluation", "metrics line")
            which_time = rng.randint(2, 40) if often else rng.randint(2, 3) if doing == "saving" and index < 15 else 1
            aims.append({"doing": doing, "time": which_time, "delay": delay, "signal": which})
        yield aims


def run_kills(count: int, seed: int, folder: Path) -> dict:
    """Kill runs `count` times in all.

    Returns:
      'kills': a row for each; 'runs': for each run, whether what it left is what the undisturbed run left.
    """
    runs = Runs(folder)
    process = runs.start("undisturbed")
    output, error = process.communicate()
    assert process.returncode == 0, error
    end, restored = runs.log()["end"], runs.log()["restored"]
    means = end["means"] | {"interpreter": 0.3, "restoring": 0.3}  # which this run does not tell
    start_up = restored["seconds"] + means["compilation"]
    training = end["seconds"] - start_up
    expected = runs.outcome("undisturbed")
    table: dict = {"undisturbed_seconds": round(end["seconds"], 1), "kills": [], "runs": {}}
    for number, aims in enumerate(plan(random.Random(seed), means, start_up, training)):
        left = count - len(table["kills"])
        if not left:
            return table
        name = f"run_{number + 1}"
        for aim in aims[:left]:
            row = kill_one(runs, name, aim)
            table["kills"].append(row)
            print(len(table["kills"]), row, flush=True)
        if not row["ended"]:
            process = runs.start(name)
            output, error = process.communicate(timeout=300)
            assert process.returncode == 0 and "Traceback" not in error, error
            table["runs"][name] = {"went_on_from_step": runs.log()["restored"]["steps"]}
        outcome = runs.outcome(name)
        unequal = [key for key in expected if outcome[key] != expected[key]]
        table["runs"].setdefault(name, {})["unequal"] = unequal
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = run_kills(arguments.kills, arguments.seed, Path(folder))
    print(json.dumps(table["runs"], indent=1))


if __name__ == "__main__":
    main()
