"""Do gradients take a short path? Several networks at several depths, from initialisation through training.

python results/gradients.py [--depths 4 16 64] ..    # the same as `pspinal-jax gradients`; docs/gradient_highway.md

How much gradient arrives is measured at the features, at each layer's pre-activation and at each kernel. `PlainStack`
is the contrast: a deep stack whose layers see the layer before and nothing else.
"""

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.data.dataset import ArraySplit
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.prepare import read_digits
from pspinal_jax.data.tables import make_dataset
from pspinal_jax.environment import device, enable_compilation_cache, versions
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import check_target, expanded
from pspinal_jax.heads import DenseHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.heads.baselines import DropLinear
from pspinal_jax.heads.equation import layer_name
from pspinal_jax.layers.linear import Activation, Initializer, Linear, Tree, as_rows
from pspinal_jax.models import abstract_variables, count_parameters
from pspinal_jax.pictures import drawable, drawn
from pspinal_jax.runs.directory import write_json, writing

NETWORKS = {
    "progressive": "ProgressiveSpinalNet: every layer and the output see the features and all earlier layers",
    "spinal": "SpinalNet: half of the features and the layer before; the output sees all layers",
    "plain": "plain stack: every layer sees the layer before, the output the last; the heads' initialisation",
    "plain, He": "the same plain stack, kernels normal(0, 2 / fan_in), biases 0",
}
DENSE = "dense: one linear layer, no depth"
MEASURED_EXAMPLES = 256
_RUN_A_FEW_TIMES = {"xla_backend_optimization_level": 0}
"""Compiler options for what is compiled in seconds and runs in milliseconds."""
_DEEP = 8
"""Layers from which on the progressive head trains as the scan, whose program does not grow with them."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured; see the flags of `pspinal-jax gradients`."""

    depths: tuple[int, ...]
    width: int
    num_seeds: int
    epochs: int
    every: int
    batch_size: int
    learning_rate: float
    norm: Literal["batch"] | None


@dataclasses.dataclass(frozen=True)
class Examples:
    """float32 features [N, D] and int32 labels [N] of both splits."""

    train_features: np.ndarray
    train_labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def make_network(name: str, depth: int, num_classes: int, study: Study) -> nn.Module:
    """The network `name` of `NETWORKS` with `depth` hidden layers, without dropout; 'dense' has none."""
    if name == "dense":
        return DenseHead(num_classes)
    common: dict[str, Any] = {"num_classes": num_classes, "layer_width": study.width, "num_layers": depth}
    common["norm"] = study.norm
    if name == "progressive":
        return ProgressiveSpinalHead(
            **common, dropout_rate=0.0, implementation="scan" if depth >= _DEEP else "unrolled"
        )
    if name == "spinal":
        return SpinalHead(**common, dropout_rate=0.0)
    if name == "plain":
        return PlainStack(**common)
    return PlainStack(**common, kernel_init=nn.initializers.he_normal(), bias_init=nn.initializers.zeros)


def follow(head: nn.Module, examples: Examples, study: Study) -> dict[str, np.ndarray]:
    """Train `head` with every seed, measuring at epoch 0, every `study.every` epochs and the last.

    Returns:
      epochs [E]; features, loss, test_accuracy [E, S]; pre_activations [E, S, L]; kernels [E, S, L + 1].
    """
    optimizer = optax.sgd(study.learning_rate, momentum=0.9)
    keys = jax.vmap(jax.random.key)(jnp.arange(study.num_seeds))
    sample = examples.train_features[:1]

    def start(key: jax.Array) -> tuple[Tree, optax.OptState]:
        variables: Any = head.init(key, sample, train=False)
        return variables, optimizer.init(variables["params"])

    states = jax.jit(jax.vmap(start), compiler_options=_RUN_A_FEW_TIMES)(keys)
    measure, train_epoch = _measure(head, examples), _train_epoch(head, optimizer, examples, study.batch_size)
    at = sorted({*range(0, study.epochs + 1, study.every), study.epochs})
    measured = []
    for epoch in range(study.epochs + 1):
        if epoch in at:
            measured.append(jax.device_get(measure(states[0])))
        if epoch < study.epochs:
            states = train_epoch(states, keys, epoch)
    stacked: dict[str, np.ndarray] = {name: np.stack([each[name] for each in measured]) for name in measured[0]}
    return {"epochs": np.array(at), **stacked}


def _measure(head: nn.Module, examples: Examples) -> Callable[[Tree], dict[str, jax.Array]]:
    """The measurement of all seeds, as one program."""
    features, labels = (
        jnp.asarray(array[:MEASURED_EXAMPLES]) for array in (examples.train_features, examples.train_labels)
    )
    test_features, test_labels = jnp.asarray(examples.test_features), jnp.asarray(examples.test_labels)
    probed = head.clone(implementation="unrolled") if isinstance(head, ProgressiveSpinalHead) else head

    def measure(variables: Tree) -> dict[str, jax.Array]:
        logits: Any = head.apply(variables, test_features, train=False)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == test_labels)
        return {**gradient_norms(probed, variables, features, labels), "test_accuracy": accuracy}

    return jax.jit(jax.vmap(measure), compiler_options=_RUN_A_FEW_TIMES)


def _train_epoch(
    head: nn.Module, optimizer: optax.GradientTransformation, examples: Examples, batch_size: int
) -> Callable[..., Any]:
    """An epoch of all seeds, as one program; the order is a function of (seed, epoch), a last smaller batch is left."""
    features, labels = jnp.asarray(examples.train_features), jnp.asarray(examples.train_labels)
    steps = len(labels) // batch_size

    def step(state: tuple[Tree, Any], batch: jax.Array) -> tuple[tuple[Tree, Any], None]:
        variables, opt_state = state

        def loss_fn(params: Tree) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            logits, new = head.apply(given, features[batch], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    def epoch_of_one(state: tuple[Tree, Any], key: jax.Array, epoch: jax.Array) -> tuple[Tree, Any]:
        order = jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(labels))
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(step, state, batches)[0]

    return jax.jit(jax.vmap(epoch_of_one, in_axes=(0, 0, None)), donate_argnums=0)


def gradient_norms(head: nn.Module, variables: Tree, features: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Norms of the gradient of the cross-entropy loss, in training mode without dropout.

    Args:
      head: a head of this package without dropout, or a `PlainStack`; a progressive one with
        ``implementation='unrolled'``, for every layer's activation is called on its own.
      variables: of the head.
      features: float32 [N, D].
      labels: int32 [N].

    Returns:
      features: scalar, root mean square over the examples of the norm of d loss_n / d x_n.
      pre_activations: [L], the same of d loss_n / d z_i, z_i what layer i's activation takes (after batch norm).
      kernels: [L + 1], Frobenius norm of d mean loss / d kernel, layers 1 .. L and the output.
      loss: scalar, mean loss in nats.
      Without batch norm, loss_n depends on example n alone; with it, d loss_n stands for d sum of all losses.
    """
    num_layers = getattr(head, "num_layers", 0)
    rows = features.shape[0]
    probes = [jnp.zeros((rows, head.layer_width), features.dtype) for _ in range(num_layers)]

    def summed_loss(params: Tree, features: jax.Array, probes: list[jax.Array]) -> jax.Array:
        probed, seen = _with_probes(head, probes)
        given = {**variables, "params": params}
        logits, _ = probed.apply(given, features, train=True, mutable=["batch_stats"])
        if len(seen) != num_layers:
            raise RuntimeError(f"{len(seen)} activations were called in {num_layers} layers")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    loss, grads = jax.value_and_grad(summed_loss, argnums=(0, 1, 2))(variables["params"], features, probes)
    of_params, of_features, of_probes = grads
    names = [*(layer_name(i + 1) for i in range(num_layers)), "output"]
    return {
        "features": root_mean_square_norm(of_features),
        "pre_activations": jnp.array([root_mean_square_norm(grad) for grad in of_probes]),
        "kernels": jnp.array([root_mean_square_norm(of_params[name]["kernel"].reshape(1, -1)) for name in names])
        / rows,
        "loss": loss / rows,
    }


def root_mean_square_norm(rows: jax.Array) -> jax.Array:
    """Root mean square of the norms of `rows` [N, K], exact also where the squares would underflow."""
    largest = jnp.max(jnp.abs(rows))
    scaled = rows / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.mean(jnp.sum(jnp.square(scaled), axis=1)))


def _with_probes(head: Any, probes: list[jax.Array]) -> tuple[nn.Module, list[int]]:
    """`head` with probe i added to what layer i's activation takes, and a list that grows by one at every call."""
    seen: list[int] = []
    if not probes:
        return head, seen

    def activation(values: jax.Array) -> jax.Array:
        seen.append(len(seen))
        return head.activation(values + probes[seen[-1]])

    return head.clone(activation=activation), seen


class PlainStack(nn.Module):
    """L layers one after the other: y_i = act(norm(W_i y_{i-1} + b_i)) with y_0 = x, logits = W_{L+1} y_L + b_{L+1}.

    No head of the package: the gradient reaches layer i through every later one. Attributes as of
    `pspinal_jax.ProgressiveSpinalHead`; parameters ``layer_1`` .. ``layer_L`` and ``output``.
    """

    num_classes: int
    layer_width: int
    num_layers: int
    norm: Literal["batch"] | None = None
    activation: Activation = nn.relu
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits [N, C] of floating-point features [N, D]."""
        hidden = as_rows(features, None, self.param_dtype)
        inits = (self.param_dtype, self.kernel_init, self.bias_init)
        layer = Linear(self.layer_width, self.norm == "batch", *inits)
        for index in range(1, self.num_layers + 1):
            hidden = DropLinear(layer, activation=self.activation, name=layer_name(index))(hidden, train)
        return DropLinear(Linear(self.num_classes, False, *inits), name="output")(hidden, train)


def read_examples(path: Path | None, most: int, batch_size: int) -> tuple[Examples, str]:
    """At most `most` examples of each split, drawn with seed 0, and where they come from.

    Args:
      path: an .npz file, or None for scikit-learn's digits.
      most: at most so many training, and so many test examples.
      batch_size: of training; there must be that many training examples.

    Raises:
      DataError: if the file cannot be used, or holds fewer training examples than a batch.
    """
    if path is None:
        data = make_dataset(dict(read_digits()), "scikit-learn's digits", None)
    else:
        data = read_npz(expanded(path), None)
    (train, train_labels), (test, test_labels) = (_some(split, most) for split in (data.train, data.test))
    if len(train) < batch_size:
        raise DataError(
            f"{data.source}: {len(train)} training examples are less than a batch of {batch_size}; "
            "lower --batch-size or raise --max-examples"
        )
    return Examples(train, train_labels, test, test_labels, data.num_classes), data.source


def _some(split: ArraySplit, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D], pixels scaled to 0 .. 1, and labels."""
    chosen = split.take(np.random.default_rng(0).permutation(len(split))[:most])
    scale = np.float32(255 if chosen.inputs.dtype == np.uint8 else 1)
    return chosen.inputs.reshape(len(chosen), -1).astype(np.float32) / scale, chosen.labels


HEADER = (
    "| network | L | parameters | at the features, start | end | layer 1 / layer L, start | end | test accuracy % |\n"
    "|---|---|---|---|---|---|---|---|"
)
_DIGITS = 4


def report(workdir: Path, study: Study, examples: Examples, source: str, command: str) -> dict[str, Any]:
    """Measure every network at every depth, print a row for each, and write results.json and results.png.

    Returns:
      What results.json holds.
    """
    print(HEADER, flush=True)
    dense = _measured("dense", 0, study, examples)
    networks: dict[str, Any] = {}
    for name in NETWORKS:
        networks[name] = {str(depth): _measured(name, depth, study, examples) for depth in study.depths}
    results = {
        "title": f"gradient norms on {source}, D {examples.train_features.shape[1]}, W {study.width}, "
        f"norm {study.norm or 'none'}, {study.num_seeds} seeds",
        "command": command,
        "study": dataclasses.asdict(study),
        "data": source,
        "train_examples": len(examples.train_labels),
        "test_examples": len(examples.test_labels),
        "measured_on": f"the first {min(MEASURED_EXAMPLES, len(examples.train_labels))} training examples",
        "described": NETWORKS | {"dense": DENSE},
        "dense": dense,
        "networks": networks,
        "device": device(),
        "versions": versions(),
    }
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "results.json", results)
    _plot(workdir / "results.png", results, study)
    return results


def _measured(name: str, depth: int, study: Study, examples: Examples) -> dict[str, Any]:
    head = make_network(name, depth, examples.num_classes, study)
    shapes = abstract_variables(head, examples.train_features.shape[1:])
    summary = summarise(follow(head, examples, study))
    summary = {"parameters": count_parameters(shapes["params"]), **summary}
    print(format_row(name, depth, summary), flush=True)
    return summary


def summarise(followed: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `follow` returns, as JSON: each seed where it is one number, median and range where it is one per layer."""
    pre = followed["pre_activations"]
    with np.errstate(divide="ignore", invalid="ignore"):  # no gradient at all: no ratio
        ratio = pre[..., 0] / pre[..., -1] if pre.shape[-1] else None
    return {
        "epochs": followed["epochs"].tolist(),
        "features": _rounded(followed["features"]),
        "first_to_last_layer": None if ratio is None else _rounded(ratio),
        "loss": _rounded(followed["loss"]),
        "test_accuracy": _rounded(followed["test_accuracy"]),
        "pre_activations": {
            "median": _rounded(np.median(pre, axis=1)),
            "low": _rounded(pre.min(axis=1)),
            "high": _rounded(pre.max(axis=1)),
        },
        "kernels": {"median": _rounded(np.median(followed["kernels"], axis=1))},
    }


def _rounded(values: np.ndarray) -> Any:
    """Nested lists with four significant digits, and None for what is not finite."""
    if values.ndim:
        return [_rounded(value) for value in values]
    number = float(values)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None


def format_row(name: str, depth: int, summary: dict[str, Any]) -> str:
    """A row of the table: medians over seeds, with the range."""
    features, ratio = summary["features"], summary["first_to_last_layer"]
    accuracy = [None if value is None else 100 * value for value in summary["test_accuracy"][-1]]
    cells = [
        name,
        str(depth) if depth else "-",
        f"{summary['parameters']:,}",
        _spread(features[0]),
        _spread(features[-1]),
        "-" if ratio is None else _spread(ratio[0], otherwise="no ratio"),
        "-" if ratio is None else _spread(ratio[-1], otherwise="no ratio"),
        _spread(accuracy, ".1f"),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float | None], digits: str = ".2g", otherwise: str = "not finite") -> str:
    if any(value is None for value in values):
        return otherwise
    numbers = np.array(values, float)
    return f"{np.median(numbers):{digits}} ({numbers.min():{digits}} .. {numbers.max():{digits}})"


def _plot(path: Path, results: dict[str, Any], study: Study) -> None:
    """Top: at the features, by depth. Bottom: at each layer of the deepest. Left: at the start. Right: at the end."""
    with drawn(path, 11, 7) as figure:
        axes = figure.subplots(2, 2, sharey="row")
        deepest = study.depths[-1]
        for column, (index, epoch) in enumerate(((0, 0), (-1, study.epochs))):
            top, bottom = axes[:, column]
            for name, by_depth in results["networks"].items():
                values = np.array([by_depth[str(depth)]["features"][index] for depth in study.depths], float)
                _line(top, study.depths, (np.median(values, 1), values.min(1), values.max(1)), name)
                layers = by_depth[str(deepest)]["pre_activations"]
                low_to_high = tuple(np.array(layers[key][index], float) for key in ("median", "low", "high"))
                _line(bottom, range(1, deepest + 1), low_to_high, name)
            dense = np.median(np.array(results["dense"]["features"][index], float))
            top.axhline(dense, color="grey", linestyle=":", label="dense")
            top.set(title=f"at the features, epoch {epoch}", xlabel="hidden layers", xscale="log")
            top.set_xticks(study.depths, [str(depth) for depth in study.depths])
            top.minorticks_off()
            bottom.set(title=f"at each layer of {deepest}, epoch {epoch}", xlabel="layer")
        for axis in axes.flat:
            axis.set_yscale("log", nonpositive="mask")
            axis.grid(alpha=0.3)
        for axis in axes[:, 0]:
            axis.set_ylabel("gradient norm per example")
        axes[0, 0].legend(fontsize=8)
        figure.suptitle(drawable(f"{results['title']} (median and range)", 200), fontsize=10)


def _line(axis: Any, x: Sequence[int], low_to_high: tuple[np.ndarray, ...], name: str) -> None:
    """The median over seeds as a line, in a band from the lowest to the highest."""
    median, low, high = low_to_high
    (line,) = axis.plot(x, median, marker=".", label=name)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


@dataclasses.dataclass(frozen=True)
class GradientsArguments:
    """Measure gradient norms at the features and at every layer, from initialisation through training, by depth."""

    workdir: Path = Path("runs/gradients")
    """Folder for results.json and results.png."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """An .npz file with train_images (or 2-D float features), train_labels, test_images and test_labels; by default
    scikit-learn's 8x8 digits."""
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of hidden layers."""
    width: int = 16
    """Width of each hidden layer."""
    num_seeds: int = 5
    """Number of seeds, 0 .. num_seeds - 1, of initialisation and order."""
    epochs: int = 20
    """Epochs of training; 0 only measures the initialisation."""
    every: int = 5
    """Epochs between two measurements."""
    batch_size: int = 64
    """Examples per training step."""
    learning_rate: float = 0.05
    """Learning rate of SGD with momentum 0.9."""
    norm: Literal["none", "batch"] = "none"
    """Normalisation in every hidden layer: none, or batch norm."""
    max_examples: int = 2000
    """Largest number of training examples, and of test examples; more are sampled with seed 0."""

    def __post_init__(self) -> None:
        for name in ("width", "num_seeds", "every", "batch_size", "max_examples"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(bool(self.depths) and min(self.depths) >= 1, "depths", self.depths, "one or more, each at least 1")
        _require(len(set(self.depths)) == len(self.depths), "depths", self.depths, "each depth once")
        _require(self.epochs >= 0, "epochs", self.epochs, "at least 0")
        _require(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "above 0")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}, expected {expected}")


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    arguments = parse(GradientsArguments, args, "gradients", "")
    names = {field.name for field in dataclasses.fields(Study)}
    given = {name: value for name, value in dataclasses.asdict(arguments).items() if name in names}
    study = Study(**{**given, "depths": tuple(sorted(arguments.depths)), "norm": _norm(arguments)})
    check_target(arguments.workdir, "work directory", "results.json")
    examples, source = read_examples(arguments.data_path, arguments.max_examples, study.batch_size)
    enable_compilation_cache()
    report(arguments.workdir, study, examples, source, f"pspinal-jax gradients {shlex.join(args)}".strip())
    return 0


def _norm(arguments: GradientsArguments) -> Literal["batch"] | None:
    return "batch" if arguments.norm == "batch" else None


if __name__ == "__main__":
    from pspinal_jax.__main__ import main as command

    sys.exit(command(["gradients", *sys.argv[1:]]))
