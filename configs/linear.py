# A linear layer on features: what --freeze backbone --cache-features trains where no flag says otherwise.
#   command   pspinal-jax train linear --data.path features.npz
#   expected  Caltech-101, 30 a class: 92.97 +- 0.97 % (3 splits), where scikit-learn's LogisticRegression has 92.69
#   time      6 s of processor time there, beside 1.5 s of imports; AMD EPYC
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="linear", row="none", model="linear layer on features"),
    data=DataConfig(name="features"),
    model=ModelConfig(head="dense", dropout_rate=0.0),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.05, schedule="one_cycle"),
    epochs=60,
    batch_size=32,
)
