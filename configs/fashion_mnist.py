# Fashion-MNIST with VGG-5 and the progressive head: no row of the paper, but a set that everybody knows.
#   command   pspinal-jax train fashion-mnist
#   expected  not run: data not available offline
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="fashion-mnist", row="none", model="VGG-5 and head"),
    data=DataConfig(name="fashion_mnist", num_classes=10, mean=0.2860, std=0.3530, num_validation=5000),
    model=ModelConfig(backbone="vgg5", layer_width=64, dropout_rate=0.2),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, weight_decay=0.05, schedule="one_cycle"),
    epochs=20,
    batch_size=128,
    label_smoothing=0.1,
)
