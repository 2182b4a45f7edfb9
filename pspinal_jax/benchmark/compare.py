"""The trials of `compare`, beside the same trainings written in eager PyTorch: same heads, data, epochs, batches."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pspinal_jax.benchmark.measurement import Case, Entry, Settings, has_torch, table
from pspinal_jax.comparison.settings import CompareConfig, HeadName, Hparams, draw_trial, training_seed
from pspinal_jax.comparison.train import Examples, Part, Schedule, Task, Trainer, build_head
from pspinal_jax.errors import UsageError

OURS, TORCH, FIRST = "pspinal_jax compare", "PyTorch eager", "first trial, compilation included"
NUM_FEATURES, NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION = 1280, 101, 2424, 606
"""Caltech-101 on frozen features, as `compare` splits it."""


def cases(
    settings: Settings,
    trials: int = 4,
    epochs: int = 20,
    batch_size: int = 64,
    heads: Sequence[HeadName] = ("progressive", "spinal", "mlp", "dense"),
) -> list[Case]:
    """Trials of each head, on both sides.

    Args:
      settings: not used: nothing is repeated.
      trials: of every head.
      epochs: passes of each trial.
      batch_size: examples a step.
      heads: their names.

    Raises:
      UsageError: without torch.
    """
    if not has_torch():
        raise UsageError("benchmark compare has nothing to compare with: torch is not installed (extra `torch`)")
    plan = Schedule(epochs, NUM_TRAIN // batch_size, batch_size, 500)
    measured: dict[str, dict[str, float]] = {}
    title = f"{trials} trials of {epochs} epochs a head, batch {batch_size}"

    def case(name: HeadName) -> list[Entry]:
        measured[name] = seconds = measure(name, trials, plan)
        totals = {side: sum(each[side] for each in measured.values()) for side in (OURS, TORCH)}
        times = {name: seconds[TORCH] / seconds[OURS], "together": totals[TORCH] / totals[OURS]}
        row = [name, seconds[OURS], seconds[FIRST], seconds[TORCH], times[name], times["together"]]
        columns = ["head", f"{OURS}, s", f"{FIRST}, s", f"{TORCH}, s", "times as long", "together so far"]
        bars = {"s": {f"{name}, {side}": [seconds[side]] for side in (OURS, TORCH)}}
        fields: dict[str, Any] = {"trials": trials, "epochs": epochs, "batch_size": batch_size}
        fields |= {"seconds": {name: seconds}, "times_faster": times}
        return [table(title, columns, [row], bars, fields)]

    return [(name, partial(case, name)) for name in heads]


def measure(name: HeadName, trials: int, plan: Schedule) -> dict[str, float]:
    """Seconds of so many trials of a head, by side, and of our first, which compiles."""
    tasks, examples = make_work(trials, name)
    head: Any = build_head(name, NUM_FEATURES, NUM_CLASSES, 256, 4, "published")[0]
    runner = Trainer({name: head}, plan, trials)

    def ours(some: list[Task]) -> float:
        start = time.perf_counter()
        list(runner.run(some, examples))
        return time.perf_counter() - start

    seconds = {FIRST: ours(tasks[:1]), OURS: ours(tasks)}
    start = time.perf_counter()
    for task in tasks:
        model = torch_head(name, getattr(head, "layer_width", 0), task.hparams.dropout_rate)
        train_in_torch(model, plan, task.hparams, task.seed, examples)
    return seconds | {TORCH: time.perf_counter() - start}


def make_work(trials: int, head: HeadName) -> tuple[list[Task], Examples]:
    """So many trials of a head, on random features of Caltech-101's sizes."""
    rng = np.random.default_rng(0)
    count = NUM_TRAIN + NUM_VALIDATION
    examples = Examples(
        rng.normal(size=(count, NUM_FEATURES)).astype(np.float32), rng.integers(0, NUM_CLASSES, count).astype(np.int32)
    )
    train, validation = np.split(np.arange(count, dtype=np.int32), [NUM_TRAIN])
    padded = np.pad(validation, (0, -NUM_VALIDATION % 500))
    shift, scale = np.zeros(NUM_FEATURES, np.float32), np.ones(NUM_FEATURES, np.float32)
    part = Part(train, padded, np.int32(NUM_VALIDATION), shift, scale)
    tasks = [
        Task(
            number, head, draw_trial(CompareConfig(), number, ("all",)).hparams, training_seed(0, "trial", number), part
        )
        for number in range(trials)
    ]
    return tasks, examples


def torch_head(name: HeadName, layer_width: int, rate: float) -> Any:
    """The PyTorch module of a head with four hidden layers of `layer_width`, or one (mlp), or none (dense)."""
    import torch
    from torch import nn

    from pspinal_jax.benchmark.torch_reference import TorchProgressiveHead

    class Spinal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [NUM_FEATURES // 2] + [NUM_FEATURES // 2 + layer_width] * 3
            self.layers = nn.ModuleList(nn.Linear(width, layer_width) for width in widths)
            self.output = nn.Linear(4 * layer_width, NUM_CLASSES)
            self.dropout = nn.Dropout(rate)

        def forward(self, features: Any) -> Any:
            halves, outputs = features.split(NUM_FEATURES // 2, 1), list[Any]()
            for index, layer in enumerate(self.layers):
                inputs = torch.cat([halves[index % 2], *outputs[-1:]], 1)
                outputs.append(torch.relu(layer(self.dropout(inputs))))
            return self.output(self.dropout(torch.cat(outputs, 1)))

    if name == "progressive":
        return TorchProgressiveHead(NUM_FEATURES, NUM_CLASSES, layer_width, 4, rate)
    if name == "spinal":
        return Spinal()
    if name == "dense":
        return nn.Sequential(nn.Dropout(rate), nn.Linear(NUM_FEATURES, NUM_CLASSES))
    return nn.Sequential(
        nn.Dropout(rate),
        nn.Linear(NUM_FEATURES, layer_width),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(layer_width, NUM_CLASSES),
    )


def train_in_torch(model: Any, plan: Schedule, setting: Hparams, seed: int, examples: Examples) -> np.ndarray:
    """The same training as `train_head` in eager PyTorch, one thread a core; predictions of the validation rows."""
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    inputs, labels = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels).long()
    kernels = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": kernels, "weight_decay": setting.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setting.learning_rate)
    model.train()
    for rates in plan.rates():
        order = torch.randperm(NUM_TRAIN)
        for step, rate in enumerate(rates.tolist()):
            rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * rate
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(inputs[rows]), labels[rows], label_smoothing=setting.label_smoothing)
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return np.asarray(model(inputs[NUM_TRAIN:]).argmax(1))
