"""The gradient study: the norms are the gradients', the command writes what it measured and refuses nonsense."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.commands import tools

study = tools.load_study()
gradient_norms, make_network = study.gradient_norms, study.make_network
STUDY = study.Study((2,), width=4, num_seeds=1, epochs=0, every=1, batch_size=8, learning_rate=0.1, norm=None)
FAST = {"xla_backend_optimization_level": 0}


def drawn(head, rng, num_features=6, rows=5):
    shapes = jax.eval_shape(lambda x: head.init(jax.random.key(0), x, train=False), jnp.zeros((2, num_features)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), dict(shapes))
    features = jnp.asarray(rng.standard_normal((rows, num_features)), jnp.float32)
    return variables, features, jnp.asarray(rng.integers(0, 3, rows))


def measured(head, variables, features, labels):
    return jax.device_get(
        jax.jit(gradient_norms, static_argnums=0, compiler_options=FAST)(head, variables, features, labels)
    )


@pytest.mark.parametrize("name", ["progressive", "spinal", "plain"])
def test_norms_are_those_of_each_examples_own_gradient(name):
    """d loss_n / d z_i is d loss_n / d b_i, taken for one example at a time."""
    head = make_network(name, 2, 3, STUDY)
    if name == "progressive":
        head = head.clone(implementation="unrolled")
    variables, features, labels = drawn(head, np.random.default_rng(0))
    found = measured(head, variables, features, labels)

    def gradients_of_one(row, label):
        def loss(params, row):
            logits = head.apply({"params": params}, row[None], train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label[None])[0]

        return jax.grad(loss, (0, 1))(variables["params"], row)

    gradients_of_one = jax.jit(gradients_of_one, compiler_options=FAST)
    each = jax.device_get([gradients_of_one(row, label) for row, label in zip(features, labels, strict=True)])

    def rms(rows):
        return np.sqrt(np.mean([np.sum(np.square(row)) for row in rows]))

    assert found["features"] == pytest.approx(rms([row for _, row in each]), rel=1e-5)
    layers = ("layer_1", "layer_2")
    expected = [rms([params[layer]["bias"] for params, _ in each]) for layer in layers]
    np.testing.assert_allclose(found["pre_activations"], expected, rtol=1e-5)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *[params for params, _ in each])
    expected = [np.linalg.norm(mean[layer]["kernel"]) for layer in (*layers, "output")]
    np.testing.assert_allclose(found["kernels"], expected, rtol=1e-5)


def test_dense_has_no_layers_and_its_gradient_is_known():
    head = make_network("dense", 0, 3, STUDY)
    variables, features, labels = drawn(head, np.random.default_rng(1))
    found = measured(head, variables, features, labels)
    kernel, bias = (np.asarray(variables["params"]["output"][name]) for name in ("kernel", "bias"))
    residual = np.asarray(jax.nn.softmax(features @ kernel + bias)) - np.eye(3)[np.asarray(labels)]
    assert found["pre_activations"].shape == (0,)
    expected = np.sqrt(np.mean(np.sum(np.square(residual @ kernel.T), axis=1)))
    assert found["features"] == pytest.approx(expected, rel=1e-5)


def test_norms_whose_squares_underflow_are_not_zero():
    rows = jnp.full((3, 4), 1e-30, jnp.float32)
    assert float(study.root_mean_square_norm(rows)) == pytest.approx(2e-30, rel=1e-5)
    assert float(study.root_mean_square_norm(jnp.zeros((3, 4)))) == 0.0


def test_a_head_whose_activations_cannot_be_told_apart_is_refused():
    head = make_network("progressive", 9, 3, STUDY)  # a scan: one call of the activation for all layers
    variables, features, labels = drawn(head, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="activations were called in 9 layers"):
        jax.eval_shape(lambda *given: gradient_norms(head, *given), variables, features, labels)


def test_what_is_not_finite_is_no_number_in_the_json():
    ones = np.ones((2, 3))
    followed = {"epochs": np.array([0, 1]), "features": ones.copy(), "loss": ones, "test_accuracy": ones}
    followed |= {"pre_activations": np.ones((2, 3, 2)), "kernels": np.ones((2, 3, 3))}
    followed["features"][1, 0] = np.nan
    followed["pre_activations"][0, 1] = 0
    summary = {"parameters": 5, **study.summarise(followed)}
    assert summary["features"] == [[1.0, 1.0, 1.0], [None, 1.0, 1.0]]
    assert summary["first_to_last_layer"][0] == [1.0, None, 1.0]
    json.dumps(summary, allow_nan=False)
    assert "| 1 (1 .. 1) | not finite | no ratio | 1 (1 .. 1) |" in study.format_row("plain", 2, summary)


@pytest.mark.slow
def test_the_command_measures_trains_and_writes(npz_path, tmp_path, monkeypatch, capsys):
    two = {name: study.NETWORKS[name] for name in ("progressive", "plain, He")}
    monkeypatch.setattr(study, "NETWORKS", two)
    monkeypatch.setattr(tools, "load_study", lambda: study)
    workdir = tmp_path / "new" / "study"
    flags = ["--depths", "1", "--width", "8", "--num-seeds", "2", "--epochs", "3", "--every", "2", "--norm", "batch"]
    flags += ["--data.path", str(npz_path), "--batch-size", "16", "--workdir", str(workdir)]
    assert main(["gradients", *flags]) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["networks"]) == set(two)
    for by_depth in results["networks"].values():
        found = by_depth["1"]
        assert found["epochs"] == [0, 2, 3]
        assert np.shape(found["features"]) == np.shape(found["loss"]) == (3, 2)
        assert np.shape(found["pre_activations"]["high"]) == (3, 1) and np.shape(found["kernels"]["median"]) == (3, 2)
        assert found["features"][0][0] != found["features"][0][1]  # two seeds
        assert np.mean(found["loss"][-1]) < np.mean(found["loss"][0])
        assert (np.array(found["pre_activations"]["low"]) > 0).all()
    assert (workdir / "results.png").stat().st_size > 10_000
    assert not list(workdir.glob("*.part"))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 1 + 2 and table[3].startswith("| progressive | 1 |")


@pytest.mark.parametrize(
    ("flags", "status", "fragments"),
    [
        (["--depths", "4", "0"], 2, ["depths is (4, 0)", "at least 1"]),
        (["--depths", "4", "4"], 2, ["depths is (4, 4)", "each depth once"]),
        (["--num-seeds", "0"], 2, ["--num-seeds is 0", "at least 1"]),
        (["--epochs", "-1"], 2, ["epochs is -1"]),
        (["--learning-rate", "nan"], 2, ["--learning-rate is nan", "above 0"]),
        (["--norm", "layer"], 2, ["invalid choice 'layer'"]),
        (["--data.path", "none.npz"], 1, ["none.npz cannot be read", "No such file"]),
        (["--batch-size", "5000"], 1, ["scikit-learn's digits: 1437 training examples", "--batch-size"]),
        (["--workdir", "file/in"], 1, ["work directory file/in cannot be written"]),
    ],
)
def test_bad_input_gets_one_line(flags, status, fragments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["gradients", *flags]) == status
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and not captured.out
    for fragment in fragments:
        assert fragment in line
