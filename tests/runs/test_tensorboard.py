"""`--tensorboard`: the lines of metrics.jsonl as TensorBoard's events."""

import dataclasses

import pytest
from small_runs import Killed, metrics, options, small_recipe
from tensorboardX.proto.event_pb2 import Event

from pspinal_jax.runs.train import train
from pspinal_jax.training import loop as trainer_module
from pspinal_jax.training.costs import MEASURED


def events(workdir):
    """{step: {name: value}} of the run's one file of TensorBoard events, without times."""
    (path,) = (workdir / "tensorboard" / "train").iterdir()
    content, at, found = path.read_bytes(), 0, {}
    while at < len(content):  # a record is its length, a checksum, the event, and another checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    return {step: {key: kept for key, kept in each.items() if key not in MEASURED} for step, each in found.items()}


def test_tensorboard_events_are_the_lines_of_metrics_and_come_as_epochs_end(npz_path, tmp_path, monkeypatch):
    recipe, run = small_recipe(npz_path), tmp_path / "run"
    original, calls = trainer_module.Trainer._select, []

    def killed_in_the_third_epoch(self, *args):
        calls.append(None)
        if len(calls) == 3:
            assert list(events(run)) == [4, 8]  # the first two are there while the third lasts
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(trainer_module.Trainer, "_select", killed_in_the_third_epoch)
    with pytest.raises(Killed):
        train(recipe, dataclasses.replace(options(run, tensorboard=True), checkpoint_seconds=1000.0))
    monkeypatch.undo()
    train(recipe, options(run, tensorboard=True))  # goes on after the first epoch: the second one's events come again
    lines = metrics(run)
    assert [line["step"] for line in lines] == [4, 8, 12, 16] == list(events(run))
    for line in lines:
        for name, value in events(run)[line["step"]].items():
            assert value == pytest.approx(line[name], rel=1e-6)
    assert {"train_loss", "validation_accuracy"} <= set(events(run)[4])
