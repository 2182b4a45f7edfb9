# KMNIST as published: VGG-5, Adam, the learning rate steered by the test accuracy; test evaluated every epoch.
#   command   pspinal-jax train kmnist-paper
#   expected  not run, for want of a GPU (the paper reports 98.98 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="kmnist-paper", row="KMNIST", model="VGG-5 and head", published_accuracy=98.98),
    data=DataConfig(
        name="kmnist",
        num_classes=10,
        mean=0.1307,
        std=0.3081,
        augment="perspective_rotation",
        drop_remainder=False,
    ),
    model=ModelConfig(backbone="vgg5", layer_width=64, dropout_rate=0.2),
    optimizer=OptimizerConfig(name="adam", learning_rate=0.005, steering="best_on_test"),
    epochs=200,
    batch_size=64,
    protocol="paper",
)
