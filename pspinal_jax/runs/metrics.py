"""An epoch's line as it ends, mean and std over seeds, TensorBoard events, and plots."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import UsageError
from pspinal_jax.files import json_text
from pspinal_jax.pictures import drawable, drawn
from pspinal_jax.progress import warn
from pspinal_jax.runs.directory import RunDirectory, whole_file, write_json, writing
from pspinal_jax.training.fitted import History
from pspinal_jax.training.loop import REPORT

MAX_NUMBERED_CLASSES = 30  # of a confusion matrix; more show colours only
_MAX_DRAWN_CLASSES = 500
_MAX_CAPTION = 26


class MetricsWriter:
    """Writes an epoch's line as the epoch ends: to metrics.jsonl and, if asked for, as TensorBoard events.

    Use in a `with`. Of several processes only process 0 writes. The events are scalars by step, a curve for each stage,
    and of several seeds their mean; they are always those of the lines in metrics.jsonl, whatever was resumed.

    Attributes:
      directory: where they are written.
    """

    def __init__(self, directory: RunDirectory, tensorboard: bool = False) -> None:
        self.directory = directory
        self._events = _Events(directory.path / "tensorboard") if tensorboard and is_primary() else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._events is not None:
            self._events.close()

    def rewind(self, finished: Sequence[tuple[str, int]]) -> None:
        """Keep the lines of `finished`, the (stage, epoch) that the restored checkpoint knows; warn of missing ones.

        Raises:
          RunError: if it cannot be written.
        """
        if not is_primary():
            return
        path = self.directory.metrics_path
        known = {(line["stage"], line["epoch"]): line for line in reversed(self.directory.metrics())}
        lines = [known[epoch] for epoch in finished if epoch in known]
        if missing := [f"{stage} {epoch}" for stage, epoch in finished if (stage, epoch) not in known]:
            warn(
                f"{path} is damaged: it lacks the lines of finished epochs ({', '.join(missing[:5])}); the run goes "
                "on, and its result does not depend on them"
            )
        with whole_file(path) as part:
            part.write_text("".join(json_text(line) + "\n" for line in lines))
        if self._events is not None:
            self._events.restart(lines)

    def report(self, found: dict[str, Any]) -> Path:
        """Write what is known of a step that was not finite, and say where; raises as `rewind`."""
        path = self.directory.path / REPORT
        if is_primary():
            write_json(path, found)
        return path

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; raises as `rewind`."""
        if not is_primary():
            return
        path = self.directory.metrics_path
        with writing(path), path.open("a") as file:
            file.write(json_text(line) + "\n")
        if self._events is not None:
            self._events.add(line)


class _Events:
    """TensorBoard's files, a folder for each stage.

    By tensorboardX's file writer: its SummaryWriter writes in a thread, so a flush may miss lines and an error is lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers: dict[str, Any] = {}

    def restart(self, lines: list[dict[str, Any]]) -> None:
        """Begin anew with `lines`."""
        self.close()
        with writing(self._path):
            for old in self._path.glob("*/events.out.tfevents.*"):
                old.unlink()
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        stage, step = line["stage"], line["step"]
        with writing(self._path):
            if stage not in self._writers:
                (self._path / stage).mkdir(parents=True, exist_ok=True)
                self._writers[stage] = EventsWriter(str((self._path / stage / "events").absolute()))
            for name, value in line.items():
                if name not in ("stage", "step"):
                    summary = scalar(name, float(np.mean(np.asarray(value, float))))
                    self._writers[stage].write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self._writers[stage].flush()

    def close(self) -> None:
        """Close the files; every line was flushed as it was added."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}


def check_installed() -> None:
    """Raise UsageError, naming the extra, where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UsageError("tensorboard needs tensorboardX; in the checkout: pip install '.[tensorboard]'") from None


def summary(values: list[float]) -> dict[str, Any]:
    """mean, std (of the sample; null for one value) and each."""
    with np.errstate(invalid="ignore"):  # of a loss that is infinite
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "each": list(values)}


def plot_curves(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch, see `History`."""
    with drawn(path, 10, 4) as figure:
        History(lines).draw(figure, ["loss", "accuracy"])
        if title:
            figure.suptitle(drawable(title))


def plot_confusion(matrix: Any, class_names: list[str], path: Path, title: str) -> None:
    """The confusion matrix [C, C], an array or a sparse one, rows the true class; colours are fractions of the row.

    Of more than 500 classes neighbours are drawn together.
    """
    from scipy.sparse import coo_array

    pairs, count = coo_array(matrix), len(class_names)
    each = -(-count // _MAX_DRAWN_CLASSES)
    side = -(-count // each)
    matrix = coo_array((pairs.data, (pairs.row // each, pairs.col // each)), shape=(side, side)).toarray()
    size = float(np.clip(0.45 * count, 5, 16)) if count <= MAX_NUMBERED_CLASSES else 9.0
    with drawn(path, size + 1, size) as figure:
        axis = figure.subplots()
        fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        extent = (-0.5, count - 0.5, count - 0.5, -0.5)
        image = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, extent=extent)
        figure.colorbar(image, ax=axis, label="fraction of the true class")
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        axis.set_title(drawable(title))
        if len(class_names) <= MAX_NUMBERED_CLASSES:
            labels = [drawable(name) for name in class_names]
            # Names that are cut to the same text get numbers.
            labels = labels if len({*labels}) == len(labels) else [f"{i}: {label}" for i, label in enumerate(labels)]
            axis.set_xticks(range(len(labels)), labels, rotation=90)
            axis.set_yticks(range(len(labels)), labels)
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if fractions[row, column] > 0.5 else "black"
                    axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)


def plot_mistakes(pictures: Sequence[np.ndarray], captions: Sequence[str], path: Path, title: str) -> None:
    """A contact sheet of `pictures`, each uint8 [H, W, C], C 1 or 3, with its caption of some lines above it."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    with drawn(path, 1.9 * columns + 0.4, 2.25 * rows + 0.5) as figure:
        for axis in figure.subplots(rows, columns, squeeze=False).flat:
            axis.set_axis_off()
        for axis, picture, caption in zip(figure.axes, pictures, captions, strict=False):
            axis.imshow(picture[..., 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=255)
            lines = [drawable(line, _MAX_CAPTION) for line in caption.splitlines()]
            axis.set_title("\n".join(lines), fontsize=7)
        figure.suptitle(drawable(title))
