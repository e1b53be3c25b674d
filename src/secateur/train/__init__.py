"""Training: the loop, its losses, and the verb `finetune`."""

from secateur.sparsity.settings import PruningSettings
from secateur.train.binarizing import KeepBest, LatentWeights
from secateur.train.finetuning import finetune
from secateur.train.loop import BucketTrainer, CompressionTrainer, Settings, fit, last_checkpoint
from secateur.train.losses import Objective, distilled, imitated, output_distance
from secateur.train.precision import bf16_pays
from secateur.train.pruning import Pruning

__all__ = [
    "BucketTrainer",
    "CompressionTrainer",
    "KeepBest",
    "LatentWeights",
    "Objective",
    "Pruning",
    "PruningSettings",
    "Settings",
    "bf16_pays",
    "distilled",
    "finetune",
    "fit",
    "imitated",
    "last_checkpoint",
    "output_distance",
]
