"""Runs that are killed again and again, beside one that is left alone; the table of the moments.

python tests/runs/kill_runs.py --kills 50 --output results/kills
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pspinal_jax.training.costs import MEASURED

DRIVER = Path(__file__).with_name("marked_train.py")
REPOSITORY = Path(__file__).parents[2]
EPOCHS = 500
KILL, TERM = signal.SIGKILL, signal.SIGTERM

# What to be killed at, in an order in which one run comes by all of it: a run is killed at each of these in turn. Every
# other run takes the other signal, but where one is named. "any" is a random moment since the start of the process.
AIMS = [
    ("interpreter", None),
    ("imports", None),
    ("compilation", None),
    ("compilation", None),
    ("saving", None),
    ("training steps", None),
    ("evaluation", None),
    ("evaluation", None),
    ("any", None),
    ("restoring", None),
    ("metrics line", None),
    ("any", None),
    ("saving", None),
    ("next stage", KILL),
    ("next stage", TERM),
    ("training steps", None),
    ("result", KILL),
    ("curves", KILL),
    ("result.json", KILL),
]
LAST = ("result", "curves", "closing the checkpoints")
"""With SIGTERM at these a run ends, so each comes last."""
OFTEN = ("evaluation", "metrics line", "training steps")
BRIEF = ("next stage", "metrics line", "result.json")
"""Over before a timer runs out."""
NEEDED = {"imports", "compilation", "training steps", "saving", "evaluation", "next stage"}
"""With either signal."""


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


def train_command(data: Path | str, workdir: Path | str) -> list[str]:
    """What each process runs."""
    flags = f"--epochs {EPOCHS} --checkpoint-seconds 0 --data.num-validation 200 --retrain"
    return ["train", "digits", *flags.split(), "--data.path", str(data), "--workdir", str(workdir)]


class Runs:
    """Starts the processes of one table, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder / "data.npz")
        self.marks = folder / "marks"
        self.marks.mkdir()

    def start(self, name: str, aim: dict | None = None) -> subprocess.Popen:
        """A process of the run `name`; each run has a compilation cache of its own, empty at first."""
        for mark in self.marks.iterdir():
            mark.unlink()
        cache = ("JAX_COMPILATION_", "JAX_PERSISTENT_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(cache)}
        environment |= {"PSPINAL_JAX_CACHE": str(self.folder / f"{name}-cache"), "PYTHONPATH": str(REPOSITORY)}
        driver = [sys.executable, str(DRIVER), str(self.marks), json.dumps(aim)]
        command = driver + train_command(self.data, self.folder / name)
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
        # result.json's own checksum covers its times.
        times = (*MEASURED, "total_seconds", "costs", "checksum")
        keep = lambda tree: {key: value for key, value in tree.items() if key not in times}  # noqa: E731
        return {
            "checkpoint": newest.name,
            "checksums": record["checksums"],
            "position": keep(record["position"]),
            "result": keep(result),
            "metrics": [keep(line) for line in lines],
            "curves": (run / "curves.png").read_bytes().hex(),
        }


def kill_one(runs: Runs, name: str, aim: dict) -> dict | None:
    """One process of the run `name`, signalled as `aim` says: a row of the table. None if the run ended before."""
    start = time.time()
    if aim["doing"] == "any":
        process = runs.start(name)
        try:
            process.communicate(timeout=aim["delay"])
            return None
        except subprocess.TimeoutExpired:
            moment = runs.now() | {"seconds": time.time() - start}
        process.send_signal(aim["signal"])
        _, error = process.communicate(timeout=300)
    else:
        process = runs.start(name, aim)
        _, error = process.communicate(timeout=300)
        if "signal" not in runs.log():
            assert process.returncode == 0, error
            return None
        moment = runs.log()["signal"]
    return {
        "run": name,
        "signal": aim["signal"].name,
        "seconds": round(moment["seconds"], 2),
        **{key: moment[key] for key in ("doing", "stage", "epochs", "steps")},
        "exit_status": process.returncode,
        "said": [line.replace(str(runs.folder), "FOLDER") for line in error.splitlines() if is_said(line)],
        "ended": (runs.folder / name / "result.json").exists(),
        "restored": runs.log().get("restored", {}).get("steps"),
    }


SUMMARY = re.compile(r"digits: .* examples: | {2}(class|\d) |input 8 x 8|[\d,]+ parameters; |costs: |cpu \(")
"""The lines that a run prints before it starts."""


def is_said(line: str) -> bool:
    """Whether a line of standard error is none of the progress bar's, nor of the run's summary."""
    return bool(line.strip()) and "step/s" not in line and not SUMMARY.match(line)


def plan(rng: random.Random, means: dict[str, float], start_up: float, training: float):
    """The aims of one run after the other, without end: a list a run."""
    for number in itertools.count():
        aims = []
        for index, (doing, only) in enumerate([*AIMS, (LAST[number % len(LAST)], TERM)]):
            if doing == "any":
                delay = rng.uniform(0.1, start_up + training / 10)
            else:  # at the very start of it, or anywhere in its length
                delay = rng.choice((0.0, rng.uniform(0, means[doing])))
            time_of_it = rng.randint(2, 12) if doing in OFTEN else 1
            if doing == "saving" and index < AIMS.index(("next stage", KILL)):
                time_of_it = 2
            if doing in BRIEF:
                delay = 0.0
            which = only or (KILL, TERM)[(index + number) % 2]
            aims.append({"doing": doing, "time": time_of_it, "delay": delay, "signal": which})
        yield aims


def run_kills(count: int, seed: int, folder: Path) -> dict:
    """Kill runs `count` times in all.

    Returns:
      'kills': a row for each; 'runs': for each run, what of it differs from the undisturbed run (nothing should).
    """
    runs = Runs(folder)
    finish(runs, "undisturbed")
    end, restored = runs.log()["end"], runs.log()["restored"]
    means = end["means"] | {"interpreter": 0.3, "restoring": 0.3}  # which this run does not tell
    start_up = restored["seconds"] + means["compilation"]
    expected = runs.outcome("undisturbed")
    table: dict = {"undisturbed_seconds": round(end["seconds"], 1), "kills": [], "runs": {}}
    for number, aims in enumerate(plan(random.Random(seed), means, start_up, end["seconds"] - start_up)):
        if len(table["kills"]) == count:
            return table
        name = f"run_{number + 1}"
        rows: list[dict] = []
        for aim in aims[: count - len(table["kills"])]:
            row = kill_one(runs, name, aim)
            if row is None:  # the run ended before it came to that
                break
            rows.append(row)
            print(len(table["kills"]) + len(rows), row, flush=True)
        ended_at = runs.log().get("restored", {}).get("steps")
        steps = ended_at if (folder / name / "result.json").exists() else finish(runs, name)
        for row in reversed(rows):  # what the next process that came so far went on from
            row["resumed_from_step"] = None if row["ended"] else steps
            steps = steps if row["restored"] is None else row.pop("restored")
        table["kills"] += rows
        outcome = runs.outcome(name)
        table["runs"][name] = [key for key in expected if outcome[key] != expected[key]]
    raise AssertionError


def finish(runs: Runs, name: str) -> int | None:
    """Let the run `name` come to its end, and return the step that it went on from."""
    process = runs.start(name)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert not [line for line in error.splitlines() if is_said(line)], error
    return runs.log().get("restored", {}).get("steps")


STAGES = {None: "", 0: "train", 1: "retrain"}


def page(table: dict) -> str:
    """The table in Markdown."""
    lines = [
        "# Runs killed at random moments",
        "",
        f"`{table['command']}` on {table['hardware']} (shared with other work),",
        f"jax {table['versions']['jax']}, Python {table['versions']['python']}: {table['minutes']} minutes.",
        "",
        f"Each run is `pspinal-jax {table['train']}`:",
        "batch norm, dropout, selection on validation data, and a second training on all data; 1,400 images of 8x8.",
        f"Undisturbed it took {table['undisturbed_seconds']} s. A run is killed, restarted with the same command,",
        "killed again, and at last left to finish. Then its last checkpoint (checksums of every leaf of parameters,",
        "running statistics, optimizer state and best parameters), metrics.jsonl, result.json and curves.png are",
        "compared bit for bit with those of the undisturbed run, except for times:",
        "",
        *(
            f"- {name}: {'equal' if not unequal else 'DIFFERENT: ' + ', '.join(unequal)}"
            for name, unequal in table["runs"].items()
        ),
        "",
        "Seconds count from the start of the process; epochs and steps are those finished by then in both trainings.",
        "Most moments are aimed at a phase of the run, at its start or within its usual duration; others are random.",
        "Exit status -9 and -15 are the signal's own; -15 occurs only before the command has started. 0 is a stop",
        'that saved, or had nothing to save, and printed how to resume; "ended" means that the run was about to end',
        "and did.",
        "",
        "| | run | signal | after s | doing | stage | epochs | steps | exit status | said | resumed from step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index, row in enumerate(table["kills"], 1):
        said = "; ".join(re.split(r" (?:Go on|Resume) with", line)[0] for line in row["said"])
        cells = [index, row["run"], row["signal"], row["seconds"], row["doing"], STAGES[row["stage"]]]
        cells += [row["epochs"], row["steps"], row["exit_status"], said, row["resumed_from_step"]]
        if row["ended"]:
            cells[-1] = "ended"
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        table = run_kills(arguments.kills, arguments.seed, Path(folder))
        train = shlex.join(train_command("data.npz", "RUN"))
    from pspinal_jax.environment import device, versions

    table |= {
        "command": shlex.join(["python", "tests/runs/kill_runs.py", *sys.argv[1:]]),
        "train": train,
        "minutes": round((time.time() - start) / 60),
        "hardware": device()["kind"],
        "versions": {"python": platform.python_version(), **versions()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(table, indent=1) + "\n")
    (arguments.output / "README.md").write_text(page(table))


if __name__ == "__main__":
    main()
