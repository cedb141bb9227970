"""One batch, with LightningCLI."""

from __future__ import annotations

from one_batch_lightning import Digits, FirstStep, Images
from pytorch_lightning.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(
        Digits, Images, seed_everything_default=0, trainer_defaults={"callbacks": [FirstStep()]}
    )
