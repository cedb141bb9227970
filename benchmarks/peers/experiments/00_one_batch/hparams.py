"""The hparams of one batch."""

hparams = {
    "trainer": {"init": {"max_epochs": 1, "limit_train_batches": 1}},
    "config": {"learning_rate": 3e-3},
    "seed": 0,
}
