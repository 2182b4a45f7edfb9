# Your own photographs: a folder of class folders, or of train, valid and test folders that hold class folders. The
# whole network is fine-tuned; --freeze backbone --cache-features trains a linear layer, on features computed once.
#   command   pspinal-jax train folder --data.path DIR
#   expected  depends on the pictures; Caltech-101, linear layer, 30 a class to train: 92.97 +- 0.97 % (3 splits)
#   time      depends on their number and size; features: 110 pictures a second on 2 cores of an AMD EPYC
from pspinal_jax.recipes import AugmentConfig, Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="folder", row="none", model="EfficientNet-Lite0 and head"),
    data=DataConfig(
        name="folder",
        image_size="own",
        validation_fraction=0.1,
        augment="rotation_crop_flip",
    ),
    model=ModelConfig(backbone="efficientnet_lite0", weights="pretrained", layer_width=256, dropout_rate=0.2),
    optimizer=OptimizerConfig(learning_rate=0.01, nesterov=True, schedule="one_cycle"),
    augment=AugmentConfig(color_jitter=0.3),
    epochs=12,
    batch_size=32,
    eval_batch_size=64,
    label_smoothing=0.1,
)
