"""`fit` trains anyone's model: linen, nnx, functions; arrays and iterables; what it gives back."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pspinal_jax
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.interop.nnx import ProgressiveSpinalHead as NnxHead
from pspinal_jax.training import keys
from pspinal_jax.training.models import as_model
from pspinal_jax.training.programs import Programs
from pspinal_jax.weights.variables import read_variables

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 6)).astype(np.float32)
Y = X[:, :3].argmax(1).astype(np.int32)
fit = functools.partial(pspinal_jax.fit, optimizer=optax.adamw(1e-2), epochs=2, batch_size=16)


class Net(nn.Module):
    """Batch norm and dropout, and one of the heads."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return pspinal_jax.ProgressiveSpinalHead(num_classes=3, layer_width=4)(x, train=train)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)])
        self.output = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(nnx.relu(x))


def linear_init(key, x):
    return [0.1 * jax.random.normal(key, (x.shape[1], 3)), jnp.zeros(3)]


def linear(params, x):
    return x @ params[0] + params[1]


def squared(outputs, targets):
    return (outputs[:, 0] - targets) ** 2


@pytest.fixture(scope="module")
def fitted():
    return fit(Net(), (X, Y), validation=0.2, epochs=12)


def test_fit_learns_and_its_history_tells(fitted):
    first, last = fitted.history[0], fitted.history[-1]
    assert [line["epoch"] for line in fitted.history] == list(range(1, 13))
    assert last["validation_loss"] < first["validation_loss"] and last["train_loss"] < first["train_loss"]
    assert last["validation_accuracy"] > 0.6 and "learning_rate" not in last
    assert "validation_loss" in fitted._repr_html_() and "12 epochs" in repr(fitted)
    assert [axis.get_ylabel() for axis in fitted.plot().axes] == ["loss", "accuracy (%)"]
    assert len(fitted.history.to_pandas()) == 12


def test_fit_variables_are_what_the_module_applies(fitted):
    logits = Net().apply(fitted.variables, X, train=False)
    np.testing.assert_allclose(fitted.predict(X), logits, rtol=1e-5, atol=1e-6)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, Y)
    found = fitted.evaluate(X, Y)
    np.testing.assert_allclose(found["loss"], expected.mean(), rtol=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == Y).mean())


def test_fit_save_writes_the_variables(fitted, tmp_path):
    fitted.save(tmp_path / "net.safetensors")
    chex.assert_trees_all_equal(read_variables(tmp_path / "net.safetensors"), jax.device_get(fitted.variables))


def test_fit_is_the_plain_loop_written_out():
    """Without dropout: every step by hand, in the order that the keys give, with the optimiser's own schedule."""
    optimizer = optax.sgd(optax.linear_schedule(0.5, 0.1, 10), momentum=0.9)
    result = pspinal_jax.fit((linear_init, linear), (X, Y), optimizer=optimizer, epochs=2, batch_size=32, seed=3)
    params = linear_init(keys.init_key(3), X)
    opt_state = optimizer.init(params)
    for epoch in range(2):
        order = np.asarray(keys.epoch_order(3, epoch, 90))
        for start in range(0, 90, 32):
            rows = order[start : start + 32]
            gradients = jax.grad(
                lambda params, rows=rows: optax.softmax_cross_entropy_with_integer_labels(
                    linear(params, X[rows]), Y[rows]
                ).mean()
            )(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(result.variables, params, rtol=1e-4, atol=1e-6)


def test_fit_nnx_module_stays_and_its_statistics_move():
    module = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    result = fit(module, (X, Y), epochs=8)
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    trained = result.variables
    assert isinstance(trained, NnxNet) and float(jnp.abs(trained.layers[1].mean[...]).max()) > 0
    np.testing.assert_allclose(trained(X), result.predict(X), rtol=1e-5, atol=1e-6)
    assert result.evaluate(X, Y)["accuracy"] > 0.6
    # Dropout draws anew in every step: the same training without it ends elsewhere.
    module.layers[2].rate = 0.0
    assert not np.allclose(fit(module, (X, Y), epochs=8).predict(X), result.predict(X))


def test_fit_nnx_module_in_tree_mode_is_the_same():
    graph = fit(NnxNet(nnx.Rngs(0)), (X, Y))
    before = {name: getattr(flax.config, name) for name in ("nnx_graph_mode", "nnx_graph_updates")}
    try:
        for name in before:
            flax.config.update(name, False)
        tree = fit(NnxNet(nnx.Rngs(0)), (X, Y))
        assert np.array_equal(tree.predict(X), graph.predict(X))
        np.testing.assert_allclose(tree.variables(X), tree.predict(X), rtol=1e-5, atol=1e-6)
    finally:
        for name, value in before.items():
            flax.config.update(name, value)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
        self.layers = make(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_nnx_layers_in_a_stack_draw_masks_of_their_own():
    model = as_model(NnxStack(nnx.Rngs(0)))
    variables = model.init(jax.random.key(0), X)
    kept, _ = model.apply(variables, np.ones((400, 6), np.float32), train=True, rngs={"dropout": jax.random.key(1)})
    assert set(np.unique(kept)) == {0.0, 8.0} and 0.05 < (np.asarray(kept) > 0).mean() < 0.2  # an eighth


@pytest.mark.slow
def test_tests_of_nnx_pass_in_tree_mode():
    tests = Path(__file__).parents[1]
    files = [tests / "interop" / f"test_interop_{name}.py" for name in ("behaviour", "equality")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "nnx", *files]
    environment = os.environ | {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    ran = subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


class NnxHeadNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 8, rngs=rngs)])
        options = {"num_classes": 3, "layer_width": 4, "norm": "batch", "rngs": rngs}
        self.heads = nnx.List([NnxHead(8, dropout_rate=0.0, **options)])

    def __call__(self, x):
        return self.heads[0](nnx.relu(self.blocks[0](x)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Net, lambda: NnxHeadNet(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_fit_trains_heads_in_their_own_layout(make, monkeypatch, tmp_path):
    """In batches of 32 and more they are fused inside the compiled epoch, and nowhere else."""
    seen = []
    monkeypatch.setattr(
        "pspinal_jax.training.fit.Programs",
        lambda *args, **options: (seen.append(options["head_layouts"]), Programs(*args, **options))[1],
    )
    arguments = {"batch_size": 40, "optimizer": optax.sgd(0.1, momentum=0.9), "ema_decay": 0.9}

    def callback(epoch, state, metrics):
        flat = "/".join(str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
        assert "layer_2" in flat and "hidden_kernel" not in flat

    fused = fit(make(), (X, Y), callbacks=[callback], **arguments)
    plain = fit(make(), (X, Y), on_device=False, **arguments)
    assert set(seen[0].values()) == {"fused"}
    np.testing.assert_allclose(fused.predict(X), plain.predict(X), rtol=1e-4, atol=1e-5)
    fit(make(), (X, Y), workdir=tmp_path, **arguments | {"epochs": 1})
    resumed = fit(make(), (X, Y), workdir=tmp_path, **arguments)
    assert np.array_equal(resumed.predict(X), fused.predict(X))


def test_fit_regression_with_a_loss_and_metrics_of_ones_own():
    targets = (X @ np.arange(6)).astype(np.float32)
    result = fit(
        nn.Dense(1),
        (X, targets),
        loss=squared,
        metrics={"error": lambda outputs, targets: jnp.abs(outputs[:, 0] - targets).mean()},
        optimizer=optax.adam(0.3),
        epochs=30,
        validation=(X[:30], targets[:30]),
    )
    predicted = result.predict(X[:30])[:, 0]
    found = result.evaluate(X[:30], targets[:30])
    assert found["loss"] == pytest.approx(((predicted - targets[:30]) ** 2).mean(), rel=1e-4)
    assert found["error"] == pytest.approx(np.abs(predicted - targets[:30]).mean(), rel=1e-4)
    assert result.history[-1]["validation_error"] == pytest.approx(found["error"], rel=1e-4)
    assert found["error"] < 0.1 * np.abs(targets).mean()


def batches():
    for start in range(0, 90, 30):
        yield X[start : start + 30], Y[start : start + 30]


def test_fit_takes_batches_of_any_iterable_in_their_order():
    made = fit((linear_init, linear), batches)
    listed = fit((linear_init, linear), list(batches()))
    chex.assert_trees_all_equal(made.variables, listed.variables)
    assert [line["step"] for line in made.history] == [3, 6]
    with pytest.raises(UsageError, match="iterator"):
        fit((linear_init, linear), batches())


@pytest.mark.parametrize("model", [pytest.param(Net(), marks=pytest.mark.slow), (linear_init, linear)])
def test_fit_with_arrays_on_the_host_is_the_compiled_epoch(model):
    for dropped in (False, True):
        options = {"drop_remainder": dropped}
        compiled, stepped = fit(model, (X, Y), **options), fit(model, (X, Y), on_device=False, **options)
        np.testing.assert_allclose(compiled.predict(X), stepped.predict(X), rtol=1e-4, atol=1e-5)
        assert compiled.history[-1]["step"] == stepped.history[-1]["step"] == 2 * (5 if dropped else 6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_fit_seeds_are_the_single_trainings(mode):
    # SGD: Adam makes much of the rounding in the gradients of biases that batch norm cancels.
    arguments = {"validation": (X[:20], Y[:20]), "optimizer": optax.sgd(0.1)}
    together = fit(Net(), (X, Y), num_seeds=2, seed=4, seed_mode=mode, **arguments)
    alone = fit(Net(), (X, Y), seed=5, **arguments)
    assert together.predict(X[:3]).shape == (2, 3, 3) and len(together.variables) == 2
    np.testing.assert_allclose(together.predict(X)[1], alone.predict(X), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(together.variables[1], alone.variables, rtol=1e-4, atol=1e-5)
    assert together.history[-1]["validation_loss"][1] == pytest.approx(alone.history[-1]["validation_loss"], rel=1e-4)


def test_fit_takes_trees_frames_and_tensors():
    def both(params, inputs):
        return linear(params, inputs["a"] + inputs["b"])

    def init(key, inputs):
        return linear_init(key, inputs["a"])

    pandas = pytest.importorskip("pandas")
    tree = {"a": pandas.DataFrame(X / 2), "b": (X / 2).tolist()}
    plain, found = fit((linear_init, linear), (X, Y)), fit((init, both), (tree, pandas.Series(Y)))
    np.testing.assert_allclose(found.predict(tree), plain.predict(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="first axis"):
        found.predict({"a": X[:3], "b": X[:2]})


@pytest.mark.slow
def test_fit_options_do_what_they_say():
    frozen = fit(Net(), (X, Y), frozen=("Dense_0",)).variables["params"]
    initial = Net().init(keys.init_key(0), X[:2], train=False)["params"]
    chex.assert_trees_all_equal(frozen["Dense_0"], initial["Dense_0"])
    assert not np.allclose(frozen["ProgressiveSpinalHead_0"]["output"]["bias"], 0)
    plain, clipped = (
        fit((linear_init, linear), (X, Y), gradient_clip=clip, optimizer=optax.sgd(1.0)) for clip in (0, 1e-6)
    )
    start = linear_init(keys.init_key(0), X)
    assert np.abs(clipped.variables[0] - start[0]).max() < 1e-4 < np.abs(plain.variables[0] - start[0]).max()
    parts = fit((linear_init, linear), (X, Y), micro_batches=4)
    chex.assert_trees_all_close(parts.variables, fit((linear_init, linear), (X, Y)).variables, rtol=1e-4, atol=1e-6)
    averaged = fit((linear_init, linear), (X, Y), ema_decay=0.9)
    assert not np.allclose(averaged.variables[0], parts.variables[0])


def test_fit_keeps_the_epoch_that_is_selected():
    rising = optax.sgd(optax.linear_schedule(1e-3, 40.0, 12))  # ends worse than it began
    result = fit((linear_init, linear), (X, Y), validation=(X, Y), optimizer=rising, epochs=4, select="loss")
    losses = [line["validation_loss"] for line in result.history]
    assert min(losses) < losses[-1]
    assert result.evaluate(X, Y)["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_fit_callbacks_see_every_epoch_and_may_end_it():
    seen = []

    def callback(epoch, state, metrics):
        seen.append((epoch, int(state.step), metrics.get("validation_loss")))
        return epoch == 2

    result = fit((linear_init, linear), (X, Y), validation=0.2, epochs=9, callbacks=[callback])
    finished = [each for each in seen if each[2] is not None]
    assert [epoch for epoch, *_ in finished] == [1, 2] and len(result.history) == 2
    assert finished[-1][2] == result.history[-1]["validation_loss"]


def test_fit_callback_ends_the_training_within_an_epoch():
    seen = []

    def callback(epoch, state, metrics):
        seen.append(int(state.step))
        return True

    result = fit((linear_init, linear), (X, Y), epochs=9, callbacks=[callback])
    assert seen == [5, 5]  # after the five whole batches of the first epoch, and with its line
    assert len(result.history) == 1 and "train_loss" in result.history[0]


class Stop(Exception):
    pass


def test_fit_resumes_bit_for_bit_and_goes_on_from_the_end(tmp_path):
    def killed(epoch, state, metrics):
        if epoch == 2 and "validation_loss" in metrics:
            raise Stop

    arguments = {"data": (X, Y), "validation": 0.2, "checkpoint_seconds": 0.0}
    whole = fit(Net(), epochs=5, **arguments)
    with pytest.raises(Stop):
        fit(Net(), epochs=3, workdir=tmp_path, callbacks=[killed], **arguments)
    fit(Net(), epochs=3, workdir=tmp_path, **arguments)
    longer = fit(Net(), epochs=5, workdir=tmp_path, **arguments)
    chex.assert_trees_all_equal(whole.variables, longer.variables)
    losses = [line["validation_loss"] for line in whole.history]
    assert [line["validation_loss"] for line in longer.history] == losses
    with pytest.raises(UsageError, match="batch_size was 16 and is 8"):
        fit(Net(), workdir=tmp_path, **arguments | {"batch_size": 8})


def test_fit_stops_where_the_loss_is_not_finite(tmp_path):
    bad = X.copy()
    bad[7] = np.inf
    with pytest.raises(RunError, match=r"not finite at step .*on_nonfinite=skip"):
        fit((linear_init, linear), (bad, Y), workdir=tmp_path)
    assert (tmp_path / "nonfinite.json").exists()
    skipped = fit((linear_init, linear), (bad, Y), on_nonfinite="skip")
    assert skipped.history[0]["skipped_steps"] == 1 and np.isfinite(skipped.predict(X)).all()


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (UsageError, "model is of type int", {"model": 3}),
        (UsageError, "labels reach from 0 to 5", {"data": (X, Y + (Y == 2) * 3)}),
        (UsageError, "labels are", {"data": (X, Y.astype(np.float32))}),
        (DataError, r"y is of type <U3", {"data": (X, np.where(Y == 0, "cat", "dog"))}),
        (DataError, "shapes", {"data": (X, Y[:-1])}),
        (UsageError, "batch_size is 91", {"batch_size": 91}),
        (UsageError, "epochs is 0", {"epochs": 0}),
        (UsageError, "validation is 0.999, expected a fraction that leaves some of 90", {"validation": 0.999}),
        (UsageError, "validation is of type str, expected", {"validation": "half"}),
        (UsageError, "validation is of type float, expected", {"data": lambda: [(X, Y)], "validation": 0.2}),
        (UsageError, "loss is 'mse'", {"loss": "mse"}),
        (UsageError, "metrics has 'count'", {"metrics": {"count": squared}}),
        (UsageError, "select is 'loss'", {"select": "loss"}),
        (UsageError, "micro_batches is 3", {"micro_batches": 3}),
        (UsageError, "frozen names 'nobody'", {"frozen": ("nobody",)}),
        (TypeError, "unexpected keyword argument 'epoch'", {"epoch": 3}),
    ],
)
def test_fit_refuses_in_one_line(error, text, change):
    arguments = {"model": (linear_init, linear), "data": (X, Y)} | change
    with pytest.raises(error, match=text):
        fit(arguments.pop("model"), arguments.pop("data"), **arguments)
