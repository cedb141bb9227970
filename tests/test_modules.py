"""Lightning modules: training, validating, predicting, and what their checkpoints hold."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

import torch_lab.module
from torch_lab.datasets import ArrayDataset
from torch_lab.errors import ComponentsError
from torch_lab.metrics import PooledMean
from torch_lab.modules import LabModule, TrainLabModule

SAMPLES = 10  # In batches of 4, the last one is smaller.


def data(samples: int = SAMPLES) -> ArrayDataset:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=noise)
    return ArrayDataset(x, x.argmax(dim=1))


def loader(samples: int = SAMPLES) -> DataLoader[Any]:
    return DataLoader(data(samples), batch_size=4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def sgd(parameters: list[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.1)


def module(**changes: Any) -> TrainLabModule:
    arguments: dict[str, Any] = {
        "model": network(),
        "loss_function": nn.CrossEntropyLoss(),
        "optimizer_factory": sgd,
    }
    return TrainLabModule(**{**arguments, **changes})


def trainer(**changes: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**defaults, **changes})


def fitted(trained: TrainLabModule, **changes: Any) -> pl.Trainer:
    """Return the trainer that has trained `trained`, by default for one epoch."""
    done = trainer(**changes)
    done.fit(trained, loader(), loader())
    return done


def batches_scored(scored: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what the network makes of all data at once, and the labels."""
    x, md = data()[:]
    with torch.no_grad():
        return copy.deepcopy(scored).eval()(x), md["y"]


def equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


class LossOfParts(nn.Module):
    """Two losses, one weighted by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(3.0))

    def forward(self, y_pred: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(y_pred, y)
        return {"plain": loss, "weighted": self.weight * loss}


class Recording(pl.loggers.logger.Logger):
    """Keeps what is logged: (step, name, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, str, float]] = []

    name = version = "recording"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(step, name, value) for name, value in metrics.items()]

    def steps(self, name: str) -> list[int | None]:
        return [step for step, key, _ in self.rows if key == name]


# Training


def test_training_learns() -> None:
    """After some epochs the loss on the data is lower than it was."""
    trained = module()
    before = nn.functional.cross_entropy(*batches_scored(trained.model))
    fitted(trained, max_epochs=10)
    assert nn.functional.cross_entropy(*batches_scored(trained.model)) < before / 2


def test_training_is_the_same_as_a_plain_loop() -> None:
    """Weights after an epoch equal those of a loop in plain PyTorch, bit by bit."""
    trained, plain = module(), network()
    fitted(trained)
    optimizer = sgd(list(plain.parameters()))
    for x, md in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), md["y"]).backward()
        optimizer.step()
    assert equal(trained.model, plain)


def test_plain_pairs_are_batches_too() -> None:
    """`(x, y)` trains as `(x, md)` does."""
    x, md = data()[:]
    trained, paired = module(), module()
    fitted(trained)
    trainer().fit(paired, DataLoader(TensorDataset(x, md["y"]), batch_size=4), loader())
    assert equal(trained.model, paired.model)


def test_only_trainable_parameters_reach_the_optimizer() -> None:
    """Frozen layers are left out, a loss's own parameters are trained."""
    loss_function = nn.CrossEntropyLoss()
    loss_function.temperature = nn.Parameter(torch.tensor(1.0))
    frozen = module(loss_function=loss_function)
    frozen.model[0].requires_grad_(False)
    (group,) = frozen.configure_optimizers().param_groups
    expected = [*frozen.model[1:].parameters(), loss_function.temperature]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def test_nothing_to_train_is_an_error() -> None:
    """A wholly frozen model is refused in words."""
    frozen = module()
    frozen.model.requires_grad_(False)
    with pytest.raises(ComponentsError, match="nothing to train"):
        fitted(frozen)


# Logged values


def test_values_of_an_epoch_are_over_all_samples() -> None:
    """Validation values are those of all samples at once, for a smaller last batch too."""
    trained = module(metrics={"accuracy": MulticlassAccuracy(3, average="micro")})
    logged = fitted(trained).callback_metrics
    y_pred, y = batches_scored(trained.model)
    torch.testing.assert_close(logged["loss/validate"], nn.functional.cross_entropy(y_pred, y))
    torch.testing.assert_close(logged["accuracy/validate"], (y_pred.argmax(1) == y).float().mean())
    assert logged.keys() == {"loss/train", "loss/validate", "accuracy/train", "accuracy/validate"}


def test_testing_logs_under_its_own_stage() -> None:
    """`trainer.test` gives `loss/test` and `<metric>/test`, as validation on the same data."""
    tested = module(metrics={"f1": MulticlassF1Score(3)})
    (test,) = trainer().test(tested, loader(), verbose=False)
    (validate,) = trainer().validate(tested, loader(), verbose=False)
    assert test.keys() == {"loss/test", "f1/test"}
    assert list(test.values()) == list(validate.values())


def test_several_validation_loaders_are_pooled_under_the_same_names() -> None:
    """`loss/validate` is the mean over the samples of all loaders, and can be monitored."""
    validated = module(metrics={"f1": MulticlassF1Score(3)})
    x, md = data()[:]
    parts = [TensorDataset(x[:3], md["y"][:3]), TensorDataset(x[3:], md["y"][3:])]
    loaders = [DataLoader(part, batch_size=2) for part in parts]
    done = trainer()
    done.validate(validated, loaders, verbose=False)
    pooled = dict(done.callback_metrics)
    done.validate(validated, loader(), verbose=False)
    torch.testing.assert_close(pooled, dict(done.callback_metrics))


def test_every_epoch_starts_anew() -> None:
    """Values of an epoch hold nothing of the epoch before, nor of an interrupted one."""
    metrics = {"accuracy": MulticlassAccuracy(3)}
    validated = module(metrics=metrics).eval()
    (first,) = trainer().validate(validated, loader(), verbose=False)
    validated.validation_step((torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)), 0)
    (again,) = trainer().validate(validated, loader(), verbose=False)
    assert again == first


def test_the_training_loss_is_logged_at_the_trainers_steps() -> None:
    """`loss/train_step` is in the log every `log_every_n_steps`, the rest once an epoch."""
    logger = Recording()
    trained = module(metrics={"f1": MulticlassF1Score(3)})
    fitted(trained, logger=logger, log_every_n_steps=2, max_epochs=2)
    assert logger.steps("loss/train_step") == [1, 3, 5]
    assert logger.steps("loss/train") == logger.steps("f1/train") == [2, 5]
    assert logger.steps("loss/validate") == logger.steps("f1/validate") == [2, 5]


def test_the_training_loss_is_the_mean_of_the_epoch() -> None:
    """`loss/train` weighs every sample the same, also those of a last, smaller batch."""
    losses: list[Tensor] = []
    sizes: list[int] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            losses.append(args[2]["loss"])
            sizes.append(len(args[3][0]))

    logged = fitted(module(), callbacks=[Keep()]).callback_metrics["loss/train"]
    mean = (torch.stack(losses) * torch.tensor(sizes)).sum() / sum(sizes)
    torch.testing.assert_close(logged, mean)


def test_a_loss_of_parts_is_their_mean_and_each_is_logged() -> None:
    """A dictionary of losses is logged by key, in every stage."""
    logged = fitted(module(loss_function=LossOfParts())).callback_metrics
    for stage in ("train", "validate"):
        plain = logged[f"plain/{stage}"]
        torch.testing.assert_close(logged[f"weighted/{stage}"], 3 * plain)
        torch.testing.assert_close(logged[f"loss/{stage}"], 2 * plain)


def test_values_that_are_no_scalars_are_there_for_callbacks_to_plot() -> None:
    """A confusion matrix is not logged; a callback sees it whole before the reset."""
    seen: list[Tensor] = []

    class Plot(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.metrics["validate"].compute()["confusion"])

    trained = module(metrics={"confusion": MulticlassConfusionMatrix(3)})
    logged = fitted(trained, callbacks=[Plot()]).callback_metrics
    assert seen[0].sum() == SAMPLES
    assert logged.keys() == {"loss/train", "loss/validate"}


def test_metrics_see_raw_outputs_without_a_graph() -> None:
    """They get what the network said, also in containers; `transform` is for predictions alone."""
    seen: list[Any] = []

    class Keep(MeanMetric):
        def update(self, y_pred: Any, y: Any) -> None:
            seen.append(y_pred)

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.layer(x), "rest": (torch.return_types.max((x, x)), [x], "a")}

    trained = module(
        model=Several(),
        loss_function=lambda y_pred, y: nn.functional.cross_entropy(y_pred["logits"], y),
        metrics={"keep": Keep()},
        transform=lambda y_pred: "transformed",
    )
    trained.training_step(next(iter(loader())), 0)
    assert not seen[0]["logits"].requires_grad
    assert [type(part) for part in seen[0]["rest"]][1:] == [list, str]


def test_every_stage_has_its_own_copy_of_the_metrics() -> None:
    """The caller's metrics are left alone, and so are the other stages'."""
    given = MetricCollection({"f1": MulticlassF1Score(3)}, prefix="my_")
    trained = module(metrics=given)
    trained.training_step(next(iter(loader())), 0)
    assert trained.metrics["train"]["f1"].update_called
    assert not trained.metrics["validate"]["f1"].update_called
    assert not given["f1"].update_called
    assert "my_f1/train" in fitted(trained).callback_metrics


def test_a_step_can_be_tried_out_by_hand() -> None:
    """Before and after training a step gives the loss, and logs nothing."""
    tried = module().eval()
    batch = next(iter(loader()))
    expected = nn.functional.cross_entropy(tried(batch[0]), batch[1]["y"])
    assert tried.training_step(batch, 0) == expected
    fitted(tried.train())
    assert tried.eval().training_step(batch, 0) < expected


# Optimizers and schedulers


def test_optimizer_config_is_another_spelling_of_the_factories() -> None:
    """Classes and keyword arguments train to the same weights."""
    config = {
        "optimizer": Adam,
        "optimizer_kwargs": {"lr": 0.1},
        "scheduler": StepLR,
        "scheduler_kwargs": {"step_size": 1},
    }
    configured = module(optimizer_factory=None, optimizer_config=config)
    written_out = module(
        optimizer_factory=lambda parameters: Adam(parameters, lr=0.1),
        scheduler_factory=lambda optimizer: StepLR(optimizer, step_size=1),
    )
    for trained in (configured, written_out):
        fitted(trained, max_epochs=3)
    assert equal(configured.model, written_out.model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plateau_scheduler_watches_the_validation_loss(wrapped: bool) -> None:
    """`ReduceLROnPlateau` needs no monitor, bare or in Lightning's dictionary."""

    def plateau(optimizer: Any) -> Any:
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        return {"scheduler": scheduler} if wrapped else scheduler

    done = fitted(module(scheduler_factory=plateau), max_epochs=3)
    assert done.lr_scheduler_configs[0].monitor == "loss/validate"
    assert done.optimizers[0].param_groups[0]["lr"] < 0.1


def test_a_plateau_scheduler_watches_what_the_config_says() -> None:
    """`optimizer_config["monitor"]` wins over the default."""
    config = {"optimizer": SGD, "scheduler": ReduceLROnPlateau, "monitor": "loss/train"}
    done = fitted(module(optimizer_factory=None, optimizer_config=config))
    assert done.lr_scheduler_configs[0].monitor == "loss/train"


def test_lightnings_scheduler_dictionary_is_passed_on() -> None:
    """Its interval and monitor are kept."""

    def every_step(optimizer: Any) -> dict[str, Any]:
        return {"scheduler": StepLR(optimizer, 1), "interval": "step", "monitor": "plain/train"}

    done = fitted(module(scheduler_factory=every_step))
    assert done.lr_scheduler_configs[0].monitor == "plain/train"
    assert done.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "model must be a torch.nn.Module, it is a str"),
        ({"loss_function": None}, "loss_function must be callable, it is a NoneType"),
        ({"optimizer_factory": None}, "no optimizer: give optimizer_factory"),
        ({"optimizer_factory": sgd([nn.Parameter(torch.ones(1))])}, "callable, it is a SGD"),
        ({"scheduler_factory": 3}, "scheduler_factory must be callable, it is a int"),
        ({"optimizer_config": {"optimizer": SGD}}, "optimizer_config or factories, not both"),
        ({"metrics": {"loss": MeanMetric()}}, 'a metric may not be named "loss"'),
        ({"metrics": [MeanMetric()]}, "a dictionary or a MetricCollection, it is a list"),
        ({"metrics": {"f1": len}}, r"metrics\['f1'\] must be a metric of torchmetrics"),
        (
            {"metrics": MetricCollection({"ss": MeanMetric()}, prefix="lo")},
            'a metric may not be named "loss"',
        ),
    ],
)
def test_wrong_arguments_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    """The constructor says which argument, and what was expected."""
    with pytest.raises(ComponentsError, match=message):
        module(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimiser": SGD}, r"optimizer_config\['optimiser'\]; did you mean optimizer\?"),
        ({}, 'optimizer_config needs "optimizer"'),
        ({"optimizer": "SGD"}, r"optimizer_config\['optimizer'\] must be callable, it is a str"),
        ({"optimizer": SGD, "scheduler": "step"}, r"\['scheduler'\] must be callable"),
    ],
)
def test_a_wrong_optimizer_config_is_refused_at_once(config: Any, message: str) -> None:
    """Keys and classes are checked in the constructor."""
    with pytest.raises(ComponentsError, match=message):
        module(optimizer_factory=None, optimizer_config=config)


def test_a_factory_must_return_an_optimizer() -> None:
    """A class forgotten behind `lambda` is found before the first step."""
    with pytest.raises(ComponentsError, match="must return an optimizer, it returned a type"):
        fitted(module(optimizer_factory=lambda parameters: SGD))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(4), r"a scalar tensor or a dictionary of them; it is of shape \(4,\)"),
        (0.5, "it is a float"),
        ({"a": torch.zeros(4)}, r"its 'a' is of shape \(4,\)"),
        ({}, "returned an empty dictionary"),
        ({"loss": torch.zeros(())}, "'loss', the name of the mean of all keys"),
        ({"f1": torch.zeros(())}, "'f1', the name of a metric"),
    ],
)
def test_a_wrong_loss_is_refused_in_words(result: Any, message: str) -> None:
    """What a loss function may return, and what it did return, stand in the error."""
    wrong = module(loss_function=lambda y_pred, y: result, metrics={"f1": MulticlassF1Score(3)})
    with pytest.raises(ComponentsError, match=message):
        fitted(wrong)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 3), {"idx": 1}), r'md\["y"\] is missing; md has \'idx\''),
        ((torch.ones(4, 3), {}), "md has nothing"),
        ([torch.ones(4, 3)] * 3, r'\(x, md\), with labels in md\["y"\], .* it is a list of 3'),
        (torch.ones(4, 3), "it is a Tensor"),
    ],
)
def test_a_batch_without_labels_is_refused_in_words(batch: Any, message: str) -> None:
    """Training says where it looked for labels."""
    with pytest.raises(ComponentsError, match=message):
        trainer().fit(module(), DataLoader([batch], batch_size=None), loader())


# Predictions


def test_predictions_are_outputs_transformed_outputs_and_metadata() -> None:
    """`out` is what the transform made of `y_pred` and md."""
    predicting = LabModule(network(), transform=lambda y_pred, md: y_pred.argmax(1) == md["y"])
    batches = trainer().predict(predicting, loader())
    assert [len(batch["md"]["idx"]) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert batch.keys() == {"y_pred", "out", "md"}
        assert batch["out"].equal(batch["y_pred"].argmax(1) == batch["md"]["y"])


def test_without_a_transform_out_is_the_prediction() -> None:
    """Nothing is copied either."""
    (batch, *_) = trainer().predict(LabModule(network()), loader())
    assert batch["out"] is batch["y_pred"]


@pytest.mark.parametrize("batch", [X := torch.ones(4, 3), [X], (X, X[:, 0]), (X, {"a": 1})])
def test_predictions_need_no_labels(batch: Any) -> None:
    """Batches may be `x` alone, `(x,)`, `(x, y)`, or `(x, md)`; several loaders are fine."""
    loaders = [DataLoader([batch], batch_size=None)] * 2
    results = trainer().predict(LabModule(network()), loaders)
    for (result,) in results:
        assert result["out"].shape == (4, 3)
        assert result["md"].keys() <= {"a", "y"}


def test_a_transform_that_is_a_module_moves_along() -> None:
    """Its buffers are on the device of the network."""
    moved = LabModule(network(), transform=nn.BatchNorm1d(3)).to("meta")
    assert moved.predict_step(torch.ones(4, 3, device="meta"))["out"].is_meta


# Checkpoints


def stateful() -> TrainLabModule:
    """Return a module whose loss and metrics have state of their own."""
    metrics = MetricCollection({"f1": MulticlassF1Score(3)})
    metrics.persistent(True)
    return module(
        loss_function=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        optimizer_factory=lambda parameters: Adam(parameters, lr=0.1),
        metrics=metrics,
        transform=nn.BatchNorm1d(3),
    )


@pytest.mark.parametrize("make", [module, stateful])
def test_the_bare_network_loads_a_checkpoint(make: Any, tmp_path: Path) -> None:
    """`state_dict` has the network's own names, whatever state the loss and metrics have."""
    trained = make()
    fitted(trained).save_checkpoint(tmp_path / "a.ckpt")
    bare = network()
    bare.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert equal(bare, trained.model)


def test_training_goes_on_exactly_from_a_checkpoint(tmp_path: Path) -> None:
    """Two epochs, and one epoch, a checkpoint and another epoch, end at the same bits."""
    straight, first, second = stateful(), stateful(), stateful()
    fitted(straight, max_epochs=2)
    fitted(first).save_checkpoint(tmp_path / "a.ckpt")
    second.loss_function.weight.zero_()
    trainer(max_epochs=2).fit(second, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert equal(second, straight)
    assert not equal(second, first)


def test_validation_and_prediction_load_a_checkpoint(tmp_path: Path) -> None:
    """`trainer.validate` loads all of it; a `LabModule` predicts from it, without the loss."""
    trained = stateful()
    done = fitted(trained)
    done.save_checkpoint(tmp_path / "a.ckpt")
    (values,) = trainer().validate(
        stateful(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert values["loss/validate"] == done.callback_metrics["loss/validate"]
    untrained = LabModule(network())
    trainer().predict(untrained, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert equal(untrained.model, trained.model)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    """Loading is strict: missing and unexpected names are an error."""
    fitted(module()).save_checkpoint(tmp_path / "a.ckpt")
    other = LabModule(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3)))
    with pytest.raises(
        RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"model.2.weight\""
    ):
        trainer().predict(other, loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_in_lightnings_own_form_is_loaded_too(tmp_path: Path) -> None:
    """Files that another LightningModule of the same shape wrote still fit."""

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def predict_step(self, batch: Any) -> Tensor:
            return self.model(batch[0])

    plain, ours = Plain(), LabModule(network())
    nn.init.ones_(plain.model[0].weight)
    done = trainer()
    done.predict(plain, loader())
    done.save_checkpoint(tmp_path / "a.ckpt")
    trainer().predict(ours, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert equal(ours.model, plain.model)


def compiled(model: nn.Module) -> nn.Module:
    """Return `model` compiled, a layer of it once more, without a compiler at work."""
    model[0] = torch.compile(model[0], backend="eager")
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_compiling_leaves_no_trace_in_a_checkpoint(
    before: bool, after: bool, tmp_path: Path
) -> None:
    """A compiled network's checkpoint fits the bare one, the bare one's fits the compiled one."""
    writer = LabModule(compiled(network()) if before else network())
    with torch.no_grad():
        next(writer.model.parameters()).fill_(7)
    done = trainer()
    done.strategy.connect(writer)
    done.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == network().state_dict().keys()
    reader = LabModule(compiled(network()) if after else network())
    torch._dynamo.config.disable = True
    try:
        trainer().predict(reader, loader(), ckpt_path=tmp_path / "a.ckpt")
    finally:
        torch._dynamo.config.disable = False
    assert next(reader.model.parameters()).unique() == 7


# Processes


def trained_in_two_processes(rank: int, store: str) -> None:
    """Validate on 3 samples in the first process and on 7 in the second."""
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    x, md = data()[:]
    part = slice(3) if rank == 0 else slice(3, None)
    own = DataLoader(TensorDataset(x[part], md["y"][part]), batch_size=7)
    accuracy = MulticlassAccuracy(3, average="micro")
    pooled = PooledMean(nn.functional.cross_entropy)
    trained = module(metrics={"accuracy": accuracy, "pooled": pooled})
    done = trainer(
        devices=2,
        strategy=DDPStrategy(cluster_environment=Launched(rank)),
        use_distributed_sampler=False,
    )
    done.fit(trained, loader(), own)
    y_pred, y = batches_scored(trained.model)
    logged = done.callback_metrics
    loss = nn.functional.cross_entropy(y_pred, y)
    torch.testing.assert_close(logged["loss/validate"], loss)
    torch.testing.assert_close(logged["pooled/validate"], loss)
    right = (y_pred.argmax(1) == y).float().mean()
    torch.testing.assert_close(logged["accuracy/validate"], right)
    done.save_checkpoint(f"{store}.ckpt")
    distributed.destroy_process_group()


class Launched(LightningEnvironment):
    """Processes that somebody else has started."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    creates_processes_externally = True

    def local_rank(self) -> int:
        return self.rank


def test_values_of_an_epoch_are_over_the_samples_of_all_processes(tmp_path: Path) -> None:
    """Two processes log what one would, and their checkpoint fits the bare network."""
    arguments = (tmp_path / "store",)
    mp.start_processes(trained_in_two_processes, arguments, nprocs=2, start_method="fork")
    state = torch.load(tmp_path / "store.ckpt", weights_only=True)["state_dict"]
    network().load_state_dict(state)


def test_modules_can_be_copied_and_pickled() -> None:
    """Copies keep their stages' metrics apart from the original's."""
    original = module(metrics={"f1": MulticlassF1Score(3)})
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        twin.training_step(next(iter(loader())), 0)
        assert twin.metrics["train"]["f1"].update_called
        assert not original.metrics["train"]["f1"].update_called
        assert "f1/train" in fitted(twin).callback_metrics


def test_the_old_name_of_the_file_still_works() -> None:
    """`torch_lab.module` has what `torch_lab.modules` has."""
    assert torch_lab.module.TrainLabModule is TrainLabModule
    assert torch_lab.module.__all__ == torch_lab.modules.__all__
