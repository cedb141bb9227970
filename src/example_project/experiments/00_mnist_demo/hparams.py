"""The demo as it is meant: handwritten digits, a small network, no account and no download.

    train src/example_project/experiments/00_mnist_demo/hparams.py

Result: accuracy/validate 0.986 after 20 epochs, in 14 s on two cores (0.981 to 0.986 with other
seeds). Its best weights read 353 of the 359 held-out digits, in 4 s:

    infer src/example_project/experiments/00_mnist_demo/hparams.py 00_mnist_demo-hparams digits.csv
"""

hparams = {
    "task": {
        "project_name": "example_project",
    },
    "trainer": {
        "init": {"max_epochs": 20},
    },
    "config": {
        "dataset": "digits",  # or "mnist", which is downloaded
        "dataset_id": None,  # or the id of a ClearML dataset, which is fetched instead
        "model": "conv",  # or "mlp", quicker but at 95 %
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "batch_size": 64,
        "num_workers": 0,  # for data in memory, worker processes are slower than none
        "monitor": "loss/validate",  # steadier than the accuracy of 359 images
    },
    "seed": 0,
}
