# QMNIST as published: VGG-5, Adam, the learning rate steered by the test accuracy; test evaluated every epoch.
# The published script is the tenth of a chain of rounds, each from the best of the one before; that is rounds=10. Its
# reloaded model trains its first epoch in evaluation mode, by the look of it an oversight: not repeated here.
#   command   pspinal-jax train qmnist-paper
#   expected  not run: data not available offline (the paper reports 99.6867 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="qmnist-paper", row="QMNIST", model="VGG-5 and head", published_accuracy=99.6867),
    data=DataConfig(
        name="qmnist",
        num_classes=10,
        mean=0.1307,
        std=0.3081,
        augment="perspective_rotation",
        drop_remainder=False,
    ),
    model=ModelConfig(backbone="vgg5", layer_width=64, dropout_rate=0.2, layer_dropout_rate=0.5, norm="batch"),
    optimizer=OptimizerConfig(name="adam", learning_rate=0.0008, steering="best_on_test"),
    epochs=100,
    batch_size=64,
    rounds=10,
    protocol="paper",
)
