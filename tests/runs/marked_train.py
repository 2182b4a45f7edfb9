"""`pspinal_jax train` in a process that notes what it is doing, and may send itself a signal while it does it.

    python tests/runs/marked_train.py FOLDER AIM train digits ..

FOLDER gets `now` (what the run is doing, and how far it is) and `log.jsonl` (what it went on from, when it was
signalled, how long things took). AIM is JSON, null for none:
{"doing": .., "time": 1 for the first time that it does it, "delay": seconds from there on, "signal": 9}.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

START = time.time()


class Marks:
    """What the process is doing: the innermost of the marked calls that it is in."""

    def __init__(self, folder: Path, aim: dict | None) -> None:
        self._now = os.open(folder / "now", os.O_RDWR | os.O_CREAT)
        self._log = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._aim = aim
        self._stack: list[str] = []
        self._times: dict[str, int] = {}
        self.durations: dict[str, list[float]] = {}
        self.progress = None
        self.enter("interpreter")

    def state(self) -> dict:
        """What the run is doing, and its progress."""
        progress = self.progress
        if progress is None:
            return {"doing": self._stack[-1], "stage": None, "epochs": None, "steps": None}
        return {"doing": self._stack[-1], "stage": progress.stage, "epochs": progress.lines, "steps": progress.serial}

    def enter(self, doing: str) -> None:
        """Note that it does this now; signals itself if that is what it was aimed at."""
        self._stack.append(doing)
        self._write()
        self._times[doing] = self._times.get(doing, 0) + 1
        aim = self._aim
        if aim and aim["doing"] == doing and aim["time"] == self._times[doing]:
            if aim["delay"] == 0.0:
                self._signal()
            else:
                timer = threading.Timer(aim["delay"], self._signal)
                timer.daemon = True
                timer.start()

    def leave(self) -> None:
        """Note that it does again what it did before."""
        self._stack.pop()
        self._write()

    def base(self, doing: str) -> None:
        """What it does outside every marked call from now on."""
        self._stack[0] = doing
        self._write()

    def log(self, **event) -> None:
        """Add a line to log.jsonl."""
        os.write(self._log, (json.dumps(event) + "\n").encode())

    def _write(self) -> None:
        os.pwrite(self._now, json.dumps(self.state()).ljust(200).encode(), 0)

    def _signal(self) -> None:
        self.log(event="signal", seconds=round(time.time() - START, 3), **self.state())
        os.kill(os.getpid(), self._aim["signal"])

    @contextlib.contextmanager
    def doing(self, name: str):
        """In a `with`: it does this."""
        start = time.perf_counter()
        self.enter(name)
        try:
            yield
        finally:
            self.leave()
            self.durations.setdefault(name, []).append(time.perf_counter() - start)


def wrap(marks: Marks, owner, name: str, doing: str, after=None) -> None:
    """Mark every call of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def marked(*args, **kwargs):
        with marks.doing(doing):
            result = original(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, marked)


def mark_calls(marks: Marks) -> None:
    """Mark what a run consists of; imports it all."""
    from pspinal_jax.checkpoints import CheckpointStore
    from pspinal_jax.runs import train
    from pspinal_jax.runs.directory import MetricsWriter, RunDirectory
    from pspinal_jax.training import loop as trainer
    from pspinal_jax.training.examples import EvaluatedSplit

    def remember(self) -> None:
        marks.progress = self.progress

    def restored(self) -> None:
        remember(self)
        marks.log(event="restored", seconds=time.time() - START, steps=self.progress.serial, stage=self.progress.stage)

    wrap(marks, train, "load_data", "reading data")
    wrap(marks, train, "set_up", "setting up")
    wrap(marks, train, "make_result", "result")
    wrap(marks, train, "plot_curves", "curves")
    wrap(marks, RunDirectory, "write_result", "result.json")
    wrap(marks, MetricsWriter, "append", "metrics line")
    wrap(marks, trainer.Trainer, "_fresh_seed_states", "compilation (initialisation)")
    wrap(marks, trainer.Trainer, "_restore", "restoring", after=restored)
    wrap(marks, trainer.Trainer, "_warm_up", "compilation")
    wrap(marks, trainer.Trainer, "_run_epoch", "training steps")
    wrap(marks, trainer.Trainer, "_next_stage", "next stage", after=remember)
    wrap(marks, CheckpointStore, "save", "saving")
    wrap(marks, CheckpointStore, "__exit__", "closing the checkpoints")
    wrap(marks, EvaluatedSplit, "evaluate", "evaluation")


def main() -> int:
    """Run the command."""
    sys.setswitchinterval(1e-4)  # so that a signal comes when it is due
    folder, aim, *command = sys.argv[1:]
    marks = Marks(Path(folder), json.loads(aim))
    from pspinal_jax.__main__ import main as run
    from pspinal_jax.commands import train

    leave_at_once = train.leave_at_once

    @contextlib.contextmanager
    def marked(advice, status):
        with leave_at_once(advice, status):
            with marks.doing("imports"):  # they happen here without marks too
                mark_calls(marks)
            marks.base("the loop")
            yield

    train.leave_at_once = marked
    status = run(command)
    means = {name: sum(durations) / len(durations) for name, durations in marks.durations.items()}
    marks.log(event="end", seconds=time.time() - START, means=means)
    return status


if __name__ == "__main__":
    sys.exit(main())
