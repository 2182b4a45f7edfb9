# Caltech-101 as published: the whole network fine-tuned by SGD, times 0.1 every 7 epochs; test evaluated every
# epoch.
#   command   pspinal-jax train caltech101-paper --data.path DIR
#   expected  not run: Wide-ResNet-101-2 wants a GPU (the paper reports 97.76 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="caltech101-paper", row="Caltech-101", model="Wide-ResNet-101-2 and head", published_accuracy=97.76),
    data=DataConfig(
        name="caltech101",
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        image_size=224,
        augment="rotation_crop_flip",
        drop_remainder=False,
    ),
    model=ModelConfig(backbone="wide_resnet101_2", weights="pretrained", layer_width=200, dropout_rate=0.35),
    optimizer=OptimizerConfig(learning_rate=0.001, schedule="step", decay_epochs=7),
    epochs=16,
    batch_size=16,
    eval_batch_size=64,
    protocol="paper",
)
