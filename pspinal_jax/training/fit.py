"""`fit` trains any model with the compiled, sharded loop that the recipes use."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from pspinal_jax.checkpoints import CheckpointStore
from pspinal_jax.data.arrays import checksum
from pspinal_jax.environment import convolution_options
from pspinal_jax.errors import UsageError
from pspinal_jax.heads.layouts import Layout, training_layout
from pspinal_jax.recipes.typed import typed
from pspinal_jax.training.costs import Inspection
from pspinal_jax.training.examples import EvaluatedSplit, InMemoryExamples, Source, as_source, check_at_least
from pspinal_jax.training.fitted import Fit, HistoryLog, held_workdir
from pspinal_jax.training.loop import Callback, Setup, Trainer
from pspinal_jax.training.models import Model, as_model
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.sharding import AXES, fit_mesh, num_batch_shards, shards_parameters
from pspinal_jax.training.signals import Stopped, StopRequest
from pspinal_jax.training.stages import LoopConfig
from pspinal_jax.training.state import Layouts, commutes, head_layouts, trainable
from pspinal_jax.training.step import CLASSIFICATION, EvalStep, Loss, Metrics, TrainStep, cross_entropy

_RESERVED = ("loss", "count", "bad_step", "skipped", "predictions", "correct")


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """Further options of training. Each field is a keyword of `fit`.

    Attributes:
      micro_batches: K, number of parts that each batch is split into to save memory; the gradient is their mean.
      gradient_clip: largest global L2 norm of the gradient; 0 for no limit.
      ema_decay: decay of moving averages of parameters and statistics, which are then evaluated and returned; 0 for
        none.
      frozen: names of top-level entries of the parameters that are not trained.
      drop_remainder: leave out the last, smaller batch of each epoch.
      eval_batch_size: examples per evaluation step, by default `batch_size`. Every example counts once in any case.
      select: keep the epoch with the best value on the validation examples: ``"loss"``, or the name of a metric, of
        which the largest is best. By default the last epoch is kept.
      patience: stop after this many epochs without improvement; needs `select`. 0 for no limit.
      on_nonfinite: what to do if the loss or a gradient is not finite: ``"stop"`` with an error that names the step, or
        ``"skip"`` the step.
      seed_mode: train several seeds as one program (``"vmap"``) or one after the other (``"loop"``); ``"auto"`` uses
        vmap on accelerators.
      on_device: whether all arrays are kept on the devices, with an epoch as one compiled loop. The default is True,
        except for models that convolve on CPU, where XLA compiles the gradients of convolutions badly in loops.
      checkpoint_seconds: time between checkpoints; the end of the first epoch is always saved.
      profile: folder for a trace of a few steps, after the first ones; open it with XProf or ui.perfetto.dev.
      dump_hlo: folder for the compiled programs, as text.
    """

    micro_batches: int = 1
    gradient_clip: float = 0.0
    ema_decay: float = 0.0
    frozen: tuple[str, ...] = ()
    drop_remainder: bool = False
    eval_batch_size: int | None = None
    select: str | None = None
    patience: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    seed_mode: Literal["auto", "loop", "vmap"] = "auto"
    on_device: bool | None = None
    checkpoint_seconds: float = 600.0
    profile: Path | str | None = None
    dump_hlo: Path | str | None = None


_DEFAULTS = FitOptions()


def fit(
    model: Any,
    data: Any,
    *,
    validation: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    loss: Literal["cross_entropy"] | Loss = "cross_entropy",
    metrics: Metrics | None = None,
    seed: int = 0,
    num_seeds: int = 1,
    mesh: Mesh | None = None,
    augment: Callable[[jax.Array, Any], Any] | None = None,
    callbacks: Sequence[Callback] = (),
    workdir: Path | str | None = None,
    **options: Any,
) -> Fit:
    """Train your own model with compiled steps on all devices.

    An epoch over arrays is one compiled loop on the device. Batches of an iterable are sharded over the devices, and
    the next one is prepared while the current one computes. Random numbers and the order of examples depend only on
    (seed, epoch, step).

    Example::

        >>> import flax.linen as nn, numpy as np, optax, pspinal_jax
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.Dropout(0.2, deterministic=not train)(nn.relu(nn.Dense(32)(x)))
        ...         return pspinal_jax.ProgressiveSpinalHead(num_classes=3, layer_width=8)(x, train=train)
        >>> x = np.random.default_rng(0).normal(size=(256, 8)).astype('float32')
        >>> y = x[:, :3].argmax(1)
        >>> result = pspinal_jax.fit(Net(), (x, y), validation=0.2, optimizer=optax.adamw(1e-2), epochs=5)
        >>> result.predict(x[:5]).shape
        (5, 3)

    Args:
      model: a linen module called as ``model(x)`` or ``model(x, train=..)``, an nnx module, or a pair of functions
        (init(key, x) -> params, apply(params, x) -> logits). Batch statistics and dropout are detected.
      data: ``(x, y)``, arrays [N, ...] of NumPy, JAX or PyTorch, pandas or Polars frames, or tuples and dicts of them.
        Or batches: an iterable of ``(x, y)`` that can be iterated once per epoch, or a function that returns one.
      validation: ``(x, y)``, or the fraction of the arrays to hold out, chosen by `seed`; None for no validation.
      optimizer: any optax transformation, including its schedule; by default ``optax.adamw(1e-3)``.
      epochs: passes over the data. With a `workdir`, a larger number continues a finished training.
      batch_size: examples per step over all devices. It does not change the batches of an iterable.
      loss: ``"cross_entropy"`` of logits [N, C] and integer labels [N], or a function of (logits, labels) that returns
        the loss of each example [N], or the mean. It becomes part of the compiled step.
      metrics: name -> function of (logits, labels), like `loss`; by default accuracy for the cross-entropy.
      seed: first seed.
      num_seeds: K, number of models, with seeds seed .. seed + K - 1; results then have a leading axis K.
      mesh: a `jax.sharding.Mesh` with axes data, fsdp and model; by default all devices that divide the batch.
      augment: (key, x) -> x, applied to every training batch as part of the compiled step.
      callbacks: functions of (finished epochs, state, metrics), called between chunks of an epoch with means over the
        examples so far, and after each epoch with its entry of the history. A callback stops the training by returning
        True. The next step overwrites the arrays of the state (`TrainState`), so copy those that you keep.
      workdir: folder for checkpoints and metrics.jsonl. To resume a training that was stopped or killed, repeat the
        call; the result is bit for bit that of an uninterrupted training.
      **options: the fields of `FitOptions`.

    Returns:
      A `Fit` with variables, history, predict, evaluate, plot and save.

    Raises:
      UsageError: if an argument is not as described.
      DataError: if arrays do not hold numbers, or do not match each other.
      RunError: if the loss or a gradient is not finite, or the workdir cannot be written or read.
    """
    chosen = FitOptions(**options)
    source = as_source(data, validation, batch_size, seed, chosen.drop_remainder)
    training = CompiledTraining(
        model,
        source.example,
        source.batch_size,
        chosen,
        optimizer=optimizer,
        loss=loss,
        metrics=metrics,
        augment=augment,
        mesh=mesh,
        num_seeds=num_seeds,
        from_host=source.arrays is None,
    )
    return training.train(source, epochs, seed, callbacks, workdir)


class CompiledTraining:
    """A model and the programs that train it on examples of one shape, for several trainings.

    Arguments and errors are those of `fit`. `example` is (inputs, labels) of one example, as trees of
    `jax.ShapeDtypeStruct`. With `from_host`, batches come from an iterable.

    Attributes:
      programs: the programs, each compiled when first called.
      on_device: whether all examples are kept on the devices.
    """

    def __init__(
        self,
        model: Any,
        example: Any,
        batch_size: int,
        options: FitOptions = _DEFAULTS,
        *,
        optimizer: optax.GradientTransformation | None = None,
        loss: Literal["cross_entropy"] | Loss = "cross_entropy",
        metrics: Metrics | None = None,
        augment: Callable[[jax.Array, Any], Any] | None = None,
        mesh: Mesh | None = None,
        num_seeds: int = 1,
        from_host: bool = False,
    ) -> None:
        check_at_least(1, num_seeds=num_seeds, micro_batches=options.micro_batches)
        typed("on_nonfinite", options.on_nonfinite, Literal["stop", "skip"])
        typed("seed_mode", options.seed_mode, Literal["auto", "loop", "vmap"])
        if batch_size % options.micro_batches:
            raise UsageError(f"micro_batches is {options.micro_batches}, expected a divisor of batch_size {batch_size}")
        rows = batch_size // options.micro_batches
        if mesh is None:
            mesh = fit_mesh(-1, 1, 1, rows=rows)
        elif not isinstance(mesh, Mesh) or tuple(mesh.axis_names) != AXES:
            raise UsageError(f"mesh is {mesh!r:.100}, expected a jax.sharding.Mesh with the axes {', '.join(AXES)}")
        adapted = as_model(model)
        evaluation = _eval_step(adapted, loss, metrics)
        inputs, labels = example
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), inputs)
        params, logits = jax.eval_shape(partial(_start, adapted), batch)
        if missing := set(options.frozen) - set(params):
            raise UsageError(f"frozen names {min(missing)!r}, expected entries of the parameters: {', '.join(params)}")
        clip = [optax.clip_by_global_norm(options.gradient_clip)] if options.gradient_clip else []
        step = TrainStep(
            adapted.apply,
            # The step descends along a direction; an optax transformation ends with the update.
            optax.chain(*clip, optax.adamw(1e-3) if optimizer is None else optimizer, optax.scale(-1.0)),
            evaluation.loss,
            evaluation.metrics,
            augment=augment,
            ema_decay=options.ema_decay,
            frozen=tuple(options.frozen),
            micro_batches=options.micro_batches,
            skip_nonfinite=options.on_nonfinite == "skip",
        )
        platform = mesh.devices.flat[0].platform
        convolves = any(leaf.ndim > 3 for leaf in jax.tree.leaves(params))
        on_device = not (convolves and platform == "cpu") if options.on_device is None else options.on_device
        together = options.seed_mode == "vmap" or (options.seed_mode == "auto" and platform != "cpu")
        layouts = _layouts(adapted, params, batch, step, rows // num_batch_shards(mesh))
        self.programs = Programs(
            adapted,
            step,
            evaluation,
            inputs,
            batch_size,
            options.eval_batch_size or batch_size,
            labels,
            vectorized=num_seeds > 1 and together and on_device and not from_host,
            head_layouts={} if shards_parameters(mesh) else layouts,
            mesh=mesh,
            compiler_options=convolution_options(platform) if convolves else {},
        )
        self._model, self._options, self._num_seeds, self._logits = adapted, options, num_seeds, logits
        self.on_device = on_device and not from_host

    def train(
        self,
        source: Source,
        epochs: int,
        seed: int,
        callbacks: Sequence[Callback] = (),
        workdir: Path | str | None = None,
        **loop: Any,
    ) -> Fit:
        """Train on `source`. The other arguments are those of `fit`, and fields of `LoopConfig`."""
        options, programs = self._options, self.programs
        check_at_least(1, epochs=epochs)
        check_at_least(0, patience=options.patience)
        names = ["loss", *programs.eval_step.metrics]
        if options.select is None and options.patience:
            raise UsageError(f"patience is {options.patience}, which needs select: one of {', '.join(names)}")
        if options.select is not None and (options.select not in names or source.validation is None):
            raise UsageError(f"select is {options.select!r}, expected one of {', '.join(names)} on validation examples")
        if programs.eval_step.classifies:
            _check_labels(source, self._logits)
        config = LoopConfig(
            seed=seed,
            num_seeds=self._num_seeds,
            epochs=epochs,
            batch_size=source.batch_size,
            selected_by=options.select,
            patience=options.patience,
            stop_on_nonfinite=options.on_nonfinite == "stop",
            **loop,
        )
        validation = source.validation
        splits = {} if validation is None else {"validation": EvaluatedSplit.in_memory(programs, validation)}
        examples = InMemoryExamples(programs, source.arrays) if self.on_device else source.from_host(programs)
        setup = Setup(config, programs, examples, splits, [source.stage], labels=None)
        with contextlib.ExitStack() as opened:
            log, store, stop = HistoryLog(None), None, StopRequest()
            if workdir is not None:
                arrays = None if source.arrays is None else checksum((source.arrays, source.stage.subset, validation))
                identity = {"seed": seed, "num_seeds": self._num_seeds, "batch_size": source.batch_size, "data": arrays}
                folder = opened.enter_context(held_workdir(workdir, identity))
                log, store = HistoryLog(folder), opened.enter_context(CheckpointStore(folder / "checkpoints"))
                opened.enter_context(stop)
            trainer = Trainer(setup, log, store, stop, options.checkpoint_seconds, callbacks=callbacks)
            trainer.inspection = Inspection(options.profile, options.dump_hlo)
            try:
                trainer.run()
            except Stopped as stopped:
                if stop.received == signal.SIGINT:
                    raise KeyboardInterrupt(f"saved in {workdir}: repeat the call to resume") from stopped
                raise SystemExit(128 + signal.SIGTERM) from stopped
        return Fit(self._model, programs, trainer.seed_states, log.history, best=options.select is not None)


def _eval_step(model: Model, loss: Any, metrics: Metrics | None) -> EvalStep:
    """What is minimised, and what is measured beside it."""
    classifies = isinstance(loss, str) and loss == "cross_entropy"
    if not classifies and not callable(loss):
        raise UsageError(f"loss is {loss!r:.100}, expected 'cross_entropy' or a function of (logits, labels)")
    if metrics is None:
        metrics = {"accuracy": CLASSIFICATION["correct"]} if classifies else {}
    for name, function in metrics.items():
        if name in _RESERVED or not callable(function):
            names = ", ".join(_RESERVED)
            raise UsageError(f"metrics has {name!r}, expected functions of (logits, labels) not called {names}")
    return EvalStep(model.apply, cross_entropy if classifies else loss, dict(metrics), classifies)


def _check_labels(source: Source, logits: jax.ShapeDtypeStruct) -> None:
    labels = source.example[1]
    if not isinstance(labels, jax.ShapeDtypeStruct) or labels.shape or labels.dtype.kind not in "iu":
        raise UsageError(f"labels are {labels}, expected integers [N] for the cross-entropy; pass a loss of your own")
    if logits.ndim != 2:
        raise UsageError(f"the model gives logits of shape {list(logits.shape)}, expected [N, C] for the cross-entropy")
    for arrays in filter(None, (source.arrays, source.validation)):
        least, most = int(np.min(arrays[1])), int(np.max(arrays[1]))
        if not 0 <= least <= most < logits.shape[1]:
            raise UsageError(f"labels reach from {least} to {most}, expected 0 .. {logits.shape[1] - 1} for the logits")


def _layouts(model: Model, params: Any, inputs: Any, step: TrainStep, rows: int) -> Layouts:
    """The layouts of the model's heads in training, where the optimiser does the same to them in any."""
    layouts: dict[tuple[str, ...], Layout] = {}
    for head, path, statistics in model.heads(inputs):
        if not step.frozen or (path and path[0] not in step.frozen):
            layout = training_layout(head.implementation, head.num_layers, rows, head.layer_dropout_rate > 0)
            layouts |= head_layouts(layout, path, statistics)
    return layouts if layouts and commutes(step.optimizer, trainable(params, step.frozen), layouts) else {}


def _start(model: Model, inputs: Any) -> tuple[Any, jax.Array]:
    """The parameters and the logits that training starts from."""
    variables = model.init(jax.random.key(0), inputs)
    return variables["params"], model.apply(variables, inputs, train=False)
