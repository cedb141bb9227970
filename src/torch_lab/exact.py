"""Exact resume: a run that was interrupted ends with the same bits as one that was not.

Nothing random has a history here. Generators are seeded at the start of each batch, from the seed,
the epoch and the batch's number; so a checkpoint holds no generator, and no state of a loader. What
it does hold, beside what Lightning saves, is what an epoch has gathered so far: the states of
metrics, the sums behind logged means, gradients that are still being accumulated.

Lightning cannot go on from any point, and from some it goes on wrongly. A checkpoint is therefore
written only between two batches or two epochs, or before a validation, with the counters of the
loops as they stand there; and going on from it sets the loops to that very point.

All that is private to Lightning's loops, and set for this, is set in this file.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, MetricCollection

from torch_lab.errors import CheckpointError, Interrupted
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position
from torch_lab.saving import CheckpointWriter, Point
from torch_lab.seeds import Stream, derived, seed_generators
from torch_lab.signals import StopRequest
from torch_lab.tuning import Tuning, laid_out_as, lay_out_states

__all__ = ["STATE", "ExactResume", "changed_conditions"]

log = logging.getLogger(__name__)

STATE: Final = "torch_lab_exact"
"""The key of our state in a checkpoint."""
_DRAWS: Final = 2
"""Which way random numbers are drawn for a run; another one is no exact way to go on."""
_SECONDS_BETWEEN_AGREEMENTS = 0.25
_MOST_BATCHES_BETWEEN_AGREEMENTS = 16
"""Batches that come quickly may become slow, and a signal must not wait for many of those."""


class ExactResume(pl.Callback):
    """Finds the points where a checkpoint is exact, has it written there, and goes on from it.

    It must be the first callback: a point is reached when all of the others have done their work
    for what lies before it, and none for what lies behind it.

    Args:
        seed: The seed of the run.
        position: What the samplers of the training data read.
        loaders: The loaders; they may have a state of their own.
        stop: The wish to end the run, answered at the next point.
        continues: Whether the run goes on itself; a new one that starts from another's state has
            stoppers of its own.
        refuses_changes: Whether data that is not that of the checkpoint ends the run.
        tuning: How it is computed.

    Raises:
        CheckpointError: It does.
    """

    def __init__(
        self,
        seed: int,
        position: Position,
        loaders: Loaders,
        stop: StopRequest,
        *,
        continues: bool = False,
        refuses_changes: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        self.seed = seed
        self.position = position
        self.loaders = loaders
        self.stop = stop
        self.refuses_changes = refuses_changes
        self.tuning = tuning or Tuning()
        self.continues = continues
        self._restored: dict[str, Any] | None = None
        self._seen_batches: dict[int, int] | None = None
        self._before_validation: dict[str, Any] = {}
        self._agreement = _Agreement()
        self._writer: CheckpointWriter | None = None
        self._bits_of_epoch = 0
        self._processes = 1
        self._is_new = False
        self._is_owed = False

    # Where training stands.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose for the optimizers what nobody has, before a checkpoint gives them what it has."""
        self.tuning.choose_kernels(trainer.optimizers, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set loops, metrics and sums to where the checkpoint left them; defer signals."""
        lay_out_states(trainer.optimizers)
        self._writer = _writer_of(trainer)
        self._processes = trainer.world_size
        for reason in self.reasons(pl_module):
            log.warning("if this run is interrupted, it cannot go on exactly: %s", reason)
        if self._restored is not None:
            self._check_changes(trainer, self._restored["conditions"])
            _set_loops(trainer, Point(self._restored["point"]), self._restored["batch"])
            self._restore(trainer, pl_module, self._restored)
            self._restored = None
        self._is_new = False
        self._begin_epoch(trainer)
        self.stop.deferred = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Point the samplers at this epoch; write a checkpoint of the one before."""
        self._reach(trainer, Point.EPOCH, demanded=True)
        self.position.epoch, self.position.batch = trainer.current_epoch, 0
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        self._bits_of_epoch = self._bits(trainer, Stream.TRAIN)
        self._seed_for(trainer, Stream.EPOCH)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due, end the run if that is wished, seed the batch."""
        self._reach(trainer, Point.BATCH, demanded=False)
        self._is_new = True
        seed_generators(derived(self._bits_of_epoch, batch_idx))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer a signal that came when the last checkpoint was being written."""
        self.stop.deferred = False
        self.stop.answer()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let signals end the run where they find it again."""
        self.stop.deferred = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the validation, and keep what it may change: it may have to begin again."""
        if trainer.state.fn == TrainerFn.FITTING:
            if self._seen_batches is not None:
                seen = trainer.fit_loop.epoch_loop.val_loop._seen_batches_per_dataloader
                seen.update(self._seen_batches)
                self._seen_batches = None
            self._before_validation = {
                "seen_batches": self._seen(trainer),
                "callbacks": copy.deepcopy(_states_of_callbacks(trainer)),
                "metrics": _states_of_metrics(pl_module),
                "sums": tree_map_only(Tensor, _alone, _sums_of(pl_module)),
                "marks": self._marks(trainer),
            }
        self._seed_for(trainer, Stream.VALIDATION)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed the batch; end the run if that is wished.

        Processes can agree on an end only between training batches.
        """
        self._seed_for(trainer, Stream.VALIDATION, dataloader_idx, batch_idx)
        is_fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.stop.signum is None or (is_fitting and trainer.world_size > 1):
            return
        if is_fitting and self._writer is not None:
            self._writer.write(trainer, Point.VALIDATION, is_last=True)
        self.stop.answer()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on as if no validation had been: what draws numbers after it must not depend on it."""
        self._before_validation = {}
        if trainer.state.fn == TrainerFn.FITTING:
            # Also where a run goes on with a validation: it may have found the best.
            self._is_new = True
            self._seed_for(trainer, Stream.AFTER_VALIDATION, trainer.fit_loop.batch_idx)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the test."""
        self._seed_for(trainer, Stream.TEST)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed the batch."""
        self._seed_for(trainer, Stream.TEST, dataloader_idx, batch_idx)

    def _seed_for(self, trainer: pl.Trainer, stream: Stream, *numbers: int) -> None:
        seed_generators(derived(self._bits(trainer, stream), *numbers))

    def _bits(self, trainer: pl.Trainer, stream: Stream) -> int:
        """Return what seeds are derived from; validations and tests are the same in all epochs."""
        is_training = stream in (Stream.TRAIN, Stream.EPOCH, Stream.AFTER_VALIDATION)
        epoch = trainer.current_epoch if is_training else 0
        return derived(self.seed, stream, epoch, trainer.global_rank)

    def reasons(self, module: torch.nn.Module) -> Iterator[str]:
        """Yield why a run may not be exact after an interruption, a sentence each.

        Args:
            module: What is trained; its loaders must be known by now.
        """
        yield from self.loaders.reasons
        chooses = any(map(_lets_torch_choose_sizes, module.modules()))
        if chooses and self.loaders.have_partial_batches:
            yield (
                "once a smaller last batch has come, torch.compile makes other kernels, for any "
                "size; give it dynamic=False, or the loaders drop_last=True"
            )

    # Writing.

    def _reach(self, trainer: pl.Trainer, point: Point, *, demanded: bool) -> None:
        """Write at this point, if it is `demanded` or due and there is news; end if wished."""
        writer = self._writer
        everywhere = demanded or (writer is not None and writer.is_due_by_steps(trainer))
        due = everywhere or (writer is not None and writer.is_due_by_clock())
        signum = self.stop.signum
        if self._processes > 1:
            signum, due = self._agreement.of(trainer, signum, due, at_once=everywhere)
        if not (signum or due or self._is_owed):
            return
        if writer is not None and self._is_new:
            # At the end of an accumulation there are no gradients to be written; but the best
            # weights will be others then.
            can_wait = point == Point.BATCH and _is_accumulating(trainer)
            if signum or writer.has_found_the_best or not can_wait:
                writer.write(trainer, point, is_last=bool(signum))
                self._is_new = False
            # The others would not hear of it again before they are asked for the next time.
            self._is_owed = self._is_new
        if signum:
            raise Interrupted(signum)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what an exact resume needs, if the checkpoint is written by us."""
        writer = self._writer
        if writer is None or writer.point is None:
            return
        point = writer.point
        batch = _set_counters(checkpoint, point)
        if point == Point.VALIDATION:
            checkpoint["callbacks"] |= self._before_validation["callbacks"]
        # What a validation has counted and logged before it is broken off, it does again.
        before = self._before_validation
        marks = before["marks"] if before else None
        state = {
            "point": str(point),
            "epoch": _epochs_done(trainer),
            "batch": batch,
            "should_stop": trainer.should_stop,
            "logged": _logged(trainer),
            "fresh": writer.fresh_names(trainer),
            "seen_batches": before["seen_batches"] if before else self._seen(trainer),
            "marks": writer.marks if marks is None else marks,
            "conditions": self.conditions(trainer),
        }
        checkpoint[STATE] = state | {"ranks": self._state_of_ranks(trainer, pl_module, point)}

    def _marks(self, trainer: pl.Trainer) -> dict[str, int] | None:
        """Return how long the event files are, if a validation may be broken off."""
        if self._writer is None or trainer.world_size > 1:
            return None
        return self._writer.logger.mark()

    def _seen(self, trainer: pl.Trainer) -> dict[int, int]:
        """Return the numbers of batches that validations have seen, which are steps in the log."""
        val_loop = trainer.fit_loop.epoch_loop.val_loop
        return dict(val_loop._seen_batches_per_dataloader) | (self._seen_batches or {})

    def conditions(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what must be the same when the run goes on, for its end to be the same."""
        return {
            "seed": self.seed,
            "processes": trainer.world_size,
            "loaders": self.loaders.facts(),
            "tuning": self.tuning.conditions(),
            "draws": _DRAWS,
        }

    def _state_of_ranks(
        self, trainer: pl.Trainer, module: pl.LightningModule, point: Point
    ) -> list[dict[str, Any]]:
        """Return what differs between the processes, of each."""
        own: dict[str, Any] = {"loaders": self.loaders.state_dict(_batches_done(trainer, point))}
        before = self._before_validation
        if point in (Point.BATCH, Point.VALIDATION):
            own["results"] = _states_of_results(trainer)
            own["sums"] = before["sums"] if before else _sums_of(module)
            # Of a module that optimises by itself, only it knows whether they matter.
            if _is_accumulating(trainer) or not module.automatic_optimization:
                own["gradients"] = _gradients(module)
        own["metrics"] = before["metrics"] if before else _states_of_metrics(module)
        return _gathered(own)

    # Going on.

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Point the samplers at where the checkpoint was written; keep the rest for the start."""
        if trainer.state.fn != TrainerFn.FITTING or STATE not in checkpoint:
            return
        state: dict[str, Any] = checkpoint[STATE]
        self._restored = state
        self.position.epoch = state["epoch"]
        in_epoch = state["point"] in (Point.BATCH, Point.VALIDATION)
        self.position.batch = state["batch"] if in_epoch else 0
        if in_epoch:
            self.loaders.load_state_dict(_of_this_rank(trainer, state)["loaders"])

    def _check_changes(self, trainer: pl.Trainer, before: Mapping[str, Any]) -> None:
        """Look at the data once more: that of a datamodule is known only now."""
        changes = list(changed_conditions(before, self.conditions(trainer)))
        if changes and self.refuses_changes:
            raise CheckpointError(
                f"the run cannot go on exactly: {'; '.join(changes)}",
                "undo the change, or give --not-exact to go on all the same",
            )
        for change in changes:
            log.warning("not exact: %s", change)

    def _restore(
        self, trainer: pl.Trainer, module: pl.LightningModule, state: Mapping[str, Any]
    ) -> None:
        own = _of_this_rank(trainer, state)
        if self.continues:
            trainer.should_stop = state["should_stop"]
        self._seen_batches = dict(state["seen_batches"])
        _restore_logged(trainer, state["logged"])
        _restore_metrics(module, own["metrics"])
        _restore_results(trainer, module, own.get("results", []))
        _restore_sums(module, own.get("sums"))
        _restore_gradients(module, own.get("gradients", {}))
        if writer := self._writer:
            writer.forget_old_metrics(trainer._logger_connector._callback_metrics, state["fresh"])


def changed_conditions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what is not as it was when a checkpoint was written."""
    if not before:
        yield "the checkpoint was not written at a point that can be gone on from exactly"
        return
    if before["seed"] != now["seed"]:
        yield f"the seed was {before['seed']} and is {now['seed']}"
    if before["processes"] != now["processes"]:
        yield f"the number of processes was {before['processes']} and is {now['processes']}"
    if before.get("draws") != now["draws"]:
        yield "another version of torch_lab wrote the checkpoint, which drew other random numbers"
    for key, was in before.get("tuning", Tuning().conditions()).items():
        is_now = now["tuning"].get(key)
        if was != is_now:
            yield f"{key} was {was} and is {is_now}"
    names = [" and ".join(sorted(side["loaders"])) for side in (before, now)]
    if now["loaders"] and names[0] != names[1]:  # Those of a datamodule are not known at once.
        yield f"the loaders were {names[0]} and are {names[1]}"
    for name in before["loaders"].keys() & now["loaders"].keys():
        was, is_now = before["loaders"][name], now["loaders"][name]
        if was != is_now:
            yield f"{name} had {_size(was)} and has {_size(is_now)}"


def _lets_torch_choose_sizes(part: torch.nn.Module) -> bool:
    """Return whether a part is compiled for one size first, and for any when another comes."""
    context: Any
    if type(part).__name__ == "OptimizedModule":
        context = part.dynamo_ctx
    elif compiled := vars(part).get("_compiled_call_impl"):
        # Where compiling is turned off, torch returns what it was given.
        is_made_by_torch = inspect.isfunction(compiled)
        named = inspect.getclosurevars(compiled).nonlocals if is_made_by_torch else {}
        context = named.get("self")
    else:
        return False
    return context is not None and getattr(context, "_dynamic", None) is None


def _size(facts: Mapping[str, Any]) -> str:
    return f"{facts['samples']} samples in batches of {facts['batch_size']}"


class _Agreement:
    """What the processes of a run decide together: to end, to write a checkpoint.

    To ask each other takes a moment, so they ask about four times a second.
    """

    def __init__(self) -> None:
        self._left = 0
        self._interval = 1
        self._asked_at = time.monotonic()

    def of(
        self, trainer: pl.Trainer, signum: int | None, due: bool, *, at_once: bool
    ) -> tuple[int, bool]:
        """Return a signal that one of the processes got, or 0; and whether one says it is due."""
        self._left -= 1
        if self._left > 0 and not at_once:
            return 0, False
        told = torch.tensor(
            [signum or 0, int(due), -self._proposal()], device=trainer.strategy.root_device
        )
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        agreed, is_due, interval = told.tolist()
        self._interval = self._left = -interval
        self._asked_at = time.monotonic()
        return agreed, bool(is_due)

    def _proposal(self) -> int:
        """Return after how many batches to ask again, from how long the last ones took."""
        done = max(1, self._interval - max(0, self._left))
        seconds = max(1e-6, (time.monotonic() - self._asked_at) / done)
        wanted = round(_SECONDS_BETWEEN_AGREEMENTS / seconds)
        return max(1, min(2 * self._interval, wanted, _MOST_BATCHES_BETWEEN_AGREEMENTS))


def _writer_of(trainer: pl.Trainer) -> CheckpointWriter | None:
    """Return the writer of checkpoints; a dev run has none."""
    found = (each for each in trainer.checkpoint_callbacks if isinstance(each, CheckpointWriter))
    return next(found, None)


def _gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each process gives, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    size = torch.distributed.get_world_size()
    everyones: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyones, move_data_to_device(own, torch.device("cpu")))
    return everyones


def _of_this_rank(trainer: pl.Trainer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of this process; that of the first if there were fewer."""
    ranks = state["ranks"]
    found: dict[str, Any] = ranks[trainer.global_rank if trainer.global_rank < len(ranks) else 0]
    return found


# The counters of the loops.


def _set_counters(checkpoint: dict[str, Any], point: Point) -> int:
    """Set the counters in a checkpoint to `point`; return how many batches the epoch has done.

    In the hooks that such a checkpoint is written from, Lightning has counted what is about to
    begin as begun.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if point == Point.BATCH:
        batches["is_last_batch"] = False
        _one_less(batches)
    if point == Point.EPOCH:
        _one_less(epochs)
    if point in (Point.EPOCH, Point.END):
        # The epoch that was trained, not the one that would be next.
        checkpoint["epoch"] = epochs["current"]["processed"] - 1
        return 0
    return int(batches["current"]["ready"])


def _one_less(progress: dict[str, Any]) -> None:
    for counts in (progress["total"], progress["current"]):
        counts["ready"] -= 1


def _epochs_done(trainer: pl.Trainer) -> int:
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def _batches_done(trainer: pl.Trainer, point: Point) -> int:
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.ready - (1 if point == Point.BATCH else 0)


def _is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether gradients of the batches so far wait for those of the next."""
    loop = trainer.fit_loop.epoch_loop
    # `completed` is the batch before this one in the hooks that this is asked from.
    done = loop.batch_progress.current.completed
    is_last = loop.batch_progress.is_last_batch and loop.batch_progress.current.ready == done
    return done % trainer.accumulate_grad_batches != 0 and not is_last


def _set_loops(trainer: pl.Trainer, point: Point, batch: int) -> None:
    """Set the loops, which have just read their counters, to go on at `point`.

    Lightning would take a loop for "restarting" until its first epoch ends, and skip the step of
    a plateau scheduler there; it would begin with a validation that is done already, or leave out
    one that is not; and it would reset what was logged before the first batch.
    """
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    fit._restarting = False
    if point in (Point.EPOCH, Point.END):
        fit.reset_restart_stage()
        for loop in (
            epoch,
            epoch.val_loop,
            epoch.automatic_optimization,
            epoch.manual_optimization,
        ):
            loop._restarting = False
            loop.reset_restart_stage()
        return
    # It is: the samplers skip what was trained.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    epoch._restarting = True
    epoch.val_loop._restarting = False
    epoch.val_loop.reset_restart_stage()
    if point == Point.VALIDATION:
        _replace_once(epoch, "advance", lambda _: None)
    else:
        _replace_once(epoch, "_should_check_val_fx", lambda _: False)
    if batch:
        trainer._logger_connector._first_loop_iter = False


def _replace_once(owner: Any, name: str, function: Callable[[Any], Any]) -> None:
    """Let `function` answer the next call of the method `name`, and only that."""
    assert callable(getattr(owner, name))

    def answer(argument: Any) -> Any:
        del vars(owner)[name]
        return function(argument)

    vars(owner)[name] = answer


# What was logged.


def _logged(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Return the latest values of all that was logged, which schedulers and callbacks read."""
    connector = trainer._logger_connector
    return {
        "callback": dict(trainer.callback_metrics),
        "logged": dict(connector._logged_metrics),
        "progress_bar": dict(connector._progress_bar_metrics),
    }


def _restore_logged(trainer: pl.Trainer, logged: Mapping[str, Mapping[str, Any]]) -> None:
    connector = trainer._logger_connector
    connector._callback_metrics.update(logged["callback"])
    connector._logged_metrics.update(logged["logged"])
    connector._progress_bar_metrics.update(logged["progress_bar"])


_RESULT_OPTIONS: Final = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph")


def _states_of_results(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the sums behind what `self.log` was given in this epoch."""
    results = trainer.fit_loop.epoch_loop._results
    return [_state_of_result(item) for item in results.values() if not item.has_reset]


def _state_of_result(item: Any) -> dict[str, Any]:
    meta = item.meta
    state = {name: getattr(meta, name) for name in _RESULT_OPTIONS}
    state["reduce_fx"] = meta.reduce_fx.__name__
    state["sync_dist"] = meta.sync.should
    state["rank_zero_only"] = meta.sync.rank_zero_only
    state["metric_attribute"] = meta.metric_attribute
    state["step_value"] = item._forward_cache
    if item.is_tensor:
        state["value"] = item.value
        state["count"] = getattr(item, "cumulated_batch_size", None)
    return state


def _restore_results(
    trainer: pl.Trainer, module: pl.LightningModule, states: list[dict[str, Any]]
) -> None:
    device = trainer.strategy.root_device
    parts = dict(module.named_modules())
    for state in states:
        options = {name: state[name] for name in (*_RESULT_OPTIONS, "reduce_fx", "sync_dist")}
        is_tensor = "value" in state
        value = state["value"].to(device) if is_tensor else parts[state["metric_attribute"]]
        results = trainer.fit_loop.epoch_loop._results
        results.log(
            **options,
            value=value,
            rank_zero_only=state["rank_zero_only"],
            metric_attribute=state["metric_attribute"],
            sync_dist_fn=trainer.strategy.reduce,
            batch_size=1,
        )
        item = results[f"{state['fx']}.{state['name']}"]
        step_value = state["step_value"]
        item._forward_cache = step_value.to(device) if step_value is not None else None
        if is_tensor:
            item.value = value
            if state["count"] is not None:
                item.cumulated_batch_size = torch.as_tensor(state["count"], device=device)


# Metrics, sums and gradients of the module.


def _metrics_of(module: torch.nn.Module) -> Iterator[tuple[str, Metric]]:
    for part in module.modules():
        if isinstance(part, MetricCollection):
            # The members of a group share one state, which the others get only when asked for.
            list(part.items(keep_base=True, copy_state=False))
    for name, part in module.named_modules():
        if isinstance(part, Metric):
            yield name, part


def _states_of_metrics(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Return copies of the states of all metrics that were updated since their reset."""
    return {
        name: {
            "updates": metric._update_count,
            "state": {key: _copied(getattr(metric, key)) for key in metric._defaults},
        }
        for name, metric in _metrics_of(module)
        if metric._update_count
    }


def _alone(tensor: Tensor) -> Tensor:
    """Return a copy without the graph that it may be a part of."""
    return tensor.detach().clone()


def _copied(state: Any) -> Any:
    """Return a copy of a metric's state: tensors are added to in place, lists are appended to."""
    return list(state) if isinstance(state, list) else state.clone()


def _restore_metrics(module: torch.nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
    metrics = dict(_metrics_of(module))
    for name, saved in states.items():
        metric = metrics[name]
        for key, value in saved["state"].items():
            setattr(metric, key, move_data_to_device(value, metric.device))
        metric._update_count = saved["updates"]
        metric._computed = None


def _sums_of(module: torch.nn.Module) -> Any:
    """Return what the module says it has gathered in this epoch, if it has a word for it."""
    function = getattr(module, "epoch_state_dict", None)
    return function() if function else None


def _restore_sums(module: torch.nn.Module, sums: Any) -> None:
    if sums is not None:
        module.load_epoch_state_dict(sums)  # type: ignore[operator]


def _gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: each.grad for name, each in named if each.grad is not None}


def _restore_gradients(module: torch.nn.Module, gradients: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        on_device = gradient.to(parameters[name].device)
        parameters[name].grad = laid_out_as(on_device, parameters[name])


def _states_of_callbacks(trainer: pl.Trainer) -> dict[str, Any]:
    states = {
        each.state_key: each.state_dict()
        for each in trainer.callbacks  # type: ignore[attr-defined]
    }
    return {key: state for key, state in states.items() if state}
