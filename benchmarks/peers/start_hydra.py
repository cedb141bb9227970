"""One batch, with a Hydra application: module, data and trainer made of its configuration."""

from __future__ import annotations

import hydra
import pytorch_lightning as pl
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="start_hydra", config_name="train")
def main(config: DictConfig) -> None:
    """Train what `config` describes."""
    pl.seed_everything(config.seed, workers=True)
    data = hydra.utils.instantiate(config.data)
    module = hydra.utils.instantiate(config.module)
    trainer = hydra.utils.instantiate(config.trainer)
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main()
