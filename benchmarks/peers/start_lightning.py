"""One batch, with plain Lightning: its default logger, its checkpoints, its progress bar."""

from __future__ import annotations

import pytorch_lightning as pl
from one_batch import FOLDER
from one_batch_lightning import Digits, FirstStep, Images

if __name__ == "__main__":
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=1, default_root_dir=FOLDER, callbacks=[FirstStep()]
    )
    trainer.fit(Digits(), datamodule=Images())
