"""What the terminal sees: arguments, help and exit codes.

Nothing heavy is imported before it is needed: `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from torch_lab.errors import ExitCode, Interrupted, NotWrittenError, TorchLabError, UserError
from torch_lab.places import make_importable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from torch_lab.hparams import DevRun

__all__ = [
    "check",
    "diff",
    "explain",
    "infer",
    "infer_entry",
    "main",
    "runs",
    "sync",
    "torch_lab",
    "torch_lab_entry",
    "trace",
    "train",
    "train_entry",
    "verify_resume",
]

_WORDS = "torch_lab.words"
"""Where a context keeps the words of its command line."""
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Train(click.Command):
    """A command whose `--devices` takes all the numbers that follow, `--resume` a run or none.

    Its help tells of the experiment, if a path is among the words.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = ctx.meta[_WORDS] = _joined_resume(_joined_devices(args))
        return super().parse_args(ctx, list(words))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        words = list(ctx.meta.get(_WORDS, ()))
        given = self.make_context(ctx.info_name, words, resilient_parsing=True).params
        if given["paths"]:
            from torch_lab.printing import write_help

            write_help(given["paths"][0], formatter, given["set_words"], given["unset_keys"])


def _joined_resume(words: Sequence[str]) -> list[str]:
    """Return `words` with the run of `--resume` in one word; the path of a script is none."""
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--resume"]:
            is_run = not word.startswith("-") and not word.endswith(".py")
            joined[-1:] = [f"--resume={word}"] if is_run else ["--resume=", word]
        else:
            joined.append(word)
    return [*joined[:-1], "--resume="] if joined[-1:] == ["--resume"] else joined


def _joined_devices(words: Sequence[str]) -> list[str]:
    """Return `words` with `--devices 0 1` as `--devices 0,1`: to click, an option has one value."""
    joined: list[str] = []
    for word in words:
        if word.startswith("--devices="):
            joined += word.split("=", 1)
        elif joined[-2:-1] == ["--devices"] and word.isdecimal():
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined


def _completed_by(
    name: str,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """Return what completes a word by the function of `torch_lab.completion` with this name."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from torch_lab import completion

        found: list[CompletionItem[str]] = getattr(completion, name)(context, incomplete)
        return found

    return complete


_paths = click.argument(
    "paths",
    metavar="PATH...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=_completed_by("scripts"),
)
_debug = click.option(
    "--debug",
    "--pdb",
    is_flag=True,
    help="Log debug records, use no worker processes, and open a debugger where your code fails.",
)
_json = click.option(
    "--json", "as_json", is_flag=True, help="Print what came out as a line of JSON."
)
_set = click.option(
    "--set",
    "set_words",
    metavar="KEY=VALUE",
    multiple=True,
    shell_complete=_completed_by("settings"),
    help="Set one of the hparams for this time: config.learning_rate=3e-3, config.layers[0]=64, or "
    "config.milestones+=[9] to add to a list. A value is a Python literal, or else a string. May "
    "be given several times.",
)
_unset = click.option(
    "--unset",
    "unset_keys",
    metavar="KEY",
    multiple=True,
    shell_complete=_completed_by("keys"),
    help="Remove one of the hparams for this time. May be given several times.",
)
_strict = click.option(
    "--strict",
    is_flag=True,
    help="As strict=True in the hparams: a key of config is an error that a layer adds without "
    "new(…), or that train_config never reads.",
)
_trust = click.option(
    "--trust-checkpoint",
    is_flag=True,
    help="Read a checkpoint that holds more than tensors and plain values: loading it runs the "
    "code in it, which can do anything that you can. A damaged one is refused all the same.",
)
_offline = click.option("--offline", is_flag=True, help="Never touch ClearML.")
_online = click.option(
    "--online", is_flag=True, help="Refuse to start (exit 5) without a ClearML server."
)


@click.command(cls=_Train, context_settings=_HELP)
@_paths
@_set
@_unset
@_strict
@click.option(
    "--dev-run",
    metavar="N",
    help="Overfit on N batches (an int; -1 is one), or on a fraction of them (0.5; 1.0 is all).",
)
@_offline
@_online
@click.option(
    "--upload-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=10.0,
    help="How long the end may wait for what is still to be sent to ClearML. The default is 10.",
)
@click.option(
    "--queue",
    metavar="NAME",
    help="Hand the runs to the ClearML agents of this queue, with the code that is on disk now.",
)
@_debug
@click.option("--no-validate", is_flag=True, help="Skip the validation before fitting.")
@click.option(
    "--resume",
    metavar="[RUN]",
    shell_complete=_completed_by("runs"),
    help="Go on with an interrupted run: with RUN, or the newest one of this script.",
)
@click.option(
    "--not-exact",
    is_flag=True,
    help="With --resume: go on although the seed, the number of processes or of samples, the batch "
    "size or the loaders are not what they were. The end will be another one.",
)
@_trust
@click.option(
    "--jobs", metavar="N", type=click.IntRange(min=1), help="Run up to N paths side by side."
)
@click.option("--devices", metavar="I...", help="GPUs to deal out, one for each job: --devices 0 1")
@click.option(
    "--print",
    "prints",
    is_flag=True,
    help="Print the hparams as they would be used, as Python or with --json as JSON, and stop.",
)
@_json
def train(
    paths: tuple[Path, ...],
    jobs: int | None,
    devices: str | None,
    queue: str | None,
    prints: bool,
    **options: Any,
) -> None:
    """Train the experiments of the hparams scripts at PATH..., one after another.

    Each run is recorded in a folder of its own, data/artifacts/EXPERIMENT-HPARAMS-vN.
    """
    with _failures(options["debug"]):
        _check_options({**options, "queue": queue, "print": prints})
        if prints:
            for path in paths:
                click.echo(_printed(path, options))
        elif queue is not None:
            _enqueue(paths, queue, {**options, "jobs": jobs, "devices": devices})
        elif len(paths) == 1 and jobs is None and devices is None:
            _train_one(paths[0], options)
        else:
            _train_several(paths, jobs, devices, options)


def _printed(path: Path, options: Mapping[str, Any]) -> str:
    from torch_lab.afresh import imported_afresh
    from torch_lab.experiment import Experiment
    from torch_lab.printing import as_python
    from torch_lab.redaction import masked
    from torch_lab.runs import encoded, project_root
    from torch_lab.utils import shown

    dev_run = _dev_run(options)
    # What a script prints itself is not what was asked for.
    with contextlib.redirect_stdout(sys.stderr), imported_afresh(project_root(path.resolve())):
        experiment = Experiment.load(path, **_overrides(options))
    found = masked(experiment.hparams.as_used(dev_run, debug=options["debug"]).as_dict())
    if options["as_json"]:
        return json.dumps(encoded(found))
    return f"# {shown(experiment.script)}\n{as_python(found)}"


def _dev_run(options: Mapping[str, Any]) -> DevRun | None:
    from torch_lab.hparams import DevRun

    return DevRun.parse(options["dev_run"]) if options["dev_run"] is not None else None


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other, whatever the paths are."""
    if options["not_exact"] and options["resume"] is None:
        raise UserError("--not-exact is for --resume: a new run has nothing to differ from")
    pairs = [("offline", "online"), ("print", "resume"), ("print", "queue")]
    for one, other in pairs:
        if all(options[name] not in (None, False) for name in (one, other)):
            raise UserError(f"--{one} and --{other} contradict each other")


def _train_one(path: Path, options: Mapping[str, Any]) -> None:
    from torch_lab.experiment import Experiment
    from torch_lab.hparams import check_goes_with_dev_run
    from torch_lab.importing import heavy_imports

    # A mistake in the scripts is found before torch is imported, which takes seconds.
    dev_run = _dev_run(options)
    if dev_run is not None:
        check_goes_with_dev_run(resumes=options["resume"] is not None, online=options["online"])
    experiment = Experiment.load(path, **_overrides(options))
    experiment.check_added_keys()
    with heavy_imports():
        from torch_lab.runner import train as train_experiment

    train_experiment(
        experiment,
        dev_run=dev_run,
        debug=options["debug"],
        validate=not options["no_validate"],
        as_json=options["as_json"],
        resume=options["resume"] if options["resume"] is not None else False,
        must_be_exact=not options["not_exact"],
        trust_checkpoint=options["trust_checkpoint"],
        tracking=_tracking(options),
        upload_limit_s=options["upload_timeout"],
    )


def _overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--set`, `--unset` and `--strict` say, as `Experiment.load` takes it."""
    from torch_lab.overrides import parsed_words

    strict = {"strict": True} if options.get("strict") else {}
    words = parsed_words(options["set_words"])
    return {"set": {**words, **strict}, "unset": options["unset_keys"]}


def _override_words(options: Mapping[str, Any]) -> list[str]:
    """Return `--set`, `--unset` and `--strict` as they were given."""
    words = [f"--set={word}" for word in options["set_words"]]
    words += [f"--unset={key}" for key in options["unset_keys"]]
    return [*words, *(["--strict"] if options["strict"] else [])]


def _enqueue(paths: Sequence[Path], queue: str, options: Mapping[str, Any]) -> None:
    for name in ("dev_run", "resume", "not_exact", "offline", "jobs", "devices"):
        if options[name] not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} and --queue contradict each other")
    from torch_lab.queueing import enqueue

    flags = ("online", "debug", "no_validate", "trust_checkpoint")
    words = [f"--{flag.replace('_', '-')}" for flag in flags if options[flag]]
    words += _override_words(options)
    # The machine may be gone afterwards, so the end waits longer there.
    source = click.get_current_context().get_parameter_source("upload_timeout")
    is_given = source is click.core.ParameterSource.COMMANDLINE
    words.append(f"--upload-timeout={options['upload_timeout'] if is_given else 300}")
    for path in paths:
        enqueue(
            path,
            queue,
            words,
            trust_checkpoint=options["trust_checkpoint"],
            as_json=options["as_json"],
            **_overrides(options),
        )


def _tracking(options: Mapping[str, Any]) -> str:
    return next((mode for mode in ("offline", "online") if options[mode]), "auto")


def _train_several(
    paths: Sequence[Path], jobs: int | None, devices: str | None, options: Mapping[str, Any]
) -> None:
    from torch_lab import jobs as several
    from torch_lab.console import print_table

    for name in ("dev_run", "debug", "resume"):
        if options[name] not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} takes one path, without --jobs and --devices")
    dealt = _devices(devices)
    flags = ("offline", "online", "no_validate", "as_json", "trust_checkpoint")
    words = [f"--{flag.removeprefix('as_').replace('_', '-')}" for flag in flags if options[flag]]
    outcomes = several.run_all(
        paths,
        [*words, *_override_words(options), f"--upload-timeout={options['upload_timeout']}"],
        jobs=jobs or len(dealt) or 1,
        devices=dealt,
        **_overrides(options),
    )
    table = sys.stderr if options["as_json"] else sys.stdout
    print_table(["script", "run", "state", "time", "best"], several.outcome_rows(outcomes), table)
    several.check(outcomes)


def _devices(given: str | None) -> list[str]:
    devices = (given or "").replace(",", " ").split()
    for device in devices:
        if not device.isdecimal():
            raise UserError(f"--devices {given}: expected indices of GPUs, like 0 1")
    return devices


@click.command(context_settings={**_HELP, "allow_interspersed_args": False})
@_set
@_unset
@_offline
@_debug
@_trust
@_json
@click.argument("path", type=click.Path(path_type=Path), shell_complete=_completed_by("scripts"))
@click.argument(
    "arguments",
    metavar="[ARGUMENTS]...",
    nargs=-1,
    type=click.UNPROCESSED,
    shell_complete=_completed_by("arguments"),
)
def infer(
    path: Path,
    arguments: tuple[str, ...],
    offline: bool,
    debug: bool,
    trust_checkpoint: bool,
    as_json: bool,
    **overrides: tuple[str, ...],
) -> None:
    """Predict with the experiment of the hparams script at PATH.

    All that follows PATH goes to infer_config(hparams, ...) as it is, in strings; one -- right
    after PATH is dropped.
    """
    with _failures(debug):
        from torch_lab.experiment import Experiment
        from torch_lab.importing import heavy_imports

        experiment = Experiment.load(path, **_overrides(overrides))
        with heavy_imports():
            from torch_lab.runner import infer as infer_experiment

        given = arguments[1:] if arguments[:1] == ("--",) else arguments
        infer_experiment(
            experiment,
            *given,
            debug=debug,
            as_json=as_json,
            trust_checkpoint=trust_checkpoint,
            tracking="offline" if offline else "auto",
        )


def _install_completion(
    context: click.Context, parameter: click.Parameter, shell: str | None
) -> None:
    if shell is None or context.resilient_parsing:
        return
    with _failures(debug=False):
        from torch_lab.completion import install

        for line in install(shell):
            click.echo(line)
    context.exit()


@click.group(context_settings=_HELP)
@click.version_option(package_name="torch-lab", message="%(prog)s %(version)s")
@click.option(
    "--install-completion",
    metavar="[SHELL]",
    is_flag=False,
    flag_value="",
    is_eager=True,
    expose_value=False,
    callback=_install_completion,
    shell_complete=_completed_by("shells"),
    help="Let SHELL (bash, zsh or fish; yours, if not given) complete paths, keys and runs.",
)
def torch_lab() -> None:
    """Run experiments with PyTorch, and keep a record of each."""


torch_lab.add_command(train)
torch_lab.add_command(infer)


@torch_lab.command(context_settings=_HELP)
@click.argument("name", required=False, default="", shell_complete=_completed_by("names"))
@_json
def runs(name: str, as_json: bool) -> None:
    """List the runs of the project in the working directory, the newest last.

    With NAME only those whose names start with it. A run is lost if its process ended without a
    word; train --resume goes on with it.
    """
    with _failures(debug=False):
        from torch_lab import listing
        from torch_lab.console import print_table
        from torch_lab.runs import artifacts_folder, project_root

        rows = listing.listed_runs(artifacts_folder(project_root()), name)
        if as_json:
            click.echo(json.dumps(rows))
        else:
            print_table(listing.TITLES, map(listing.listed_words, rows), sys.stdout)


@torch_lab.command(context_settings=_HELP)
@click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=_completed_by("names"))
@click.option("--all", "everything", is_flag=True, help="All runs of the project.")
@_json
def sync(names: tuple[str, ...], everything: bool, as_json: bool) -> int:
    """Send to ClearML what it has not got of each RUN, and read back that it has all.

    A run without a task gets one, and so do the runs that it comes from. What was interrupted is
    gone on with the next time; where nothing is missing, nothing is sent. Ends with 1 if anything
    differs afterwards, and with 5 without a server.
    """
    with _failures(debug=False):
        from torch_lab import sync as syncing
        from torch_lab.console import print_table
        from torch_lab.runs import artifacts_folder, project_root
        from torch_lab.tracking import found_server

        runs = syncing.to_sync(artifacts_folder(project_root()), names, everything=everything)
        server = found_server()
        found = [syncing.sync(run, server, lambda line: click.echo(line, err=True)) for run in runs]
        if as_json:
            click.echo(json.dumps([each.record() for each in found]))
        else:
            print_table(syncing.TITLES, [each.words() for each in found], sys.stdout)
        is_equal = not any(each.differences for each in found)
        return int(ExitCode.DONE if is_equal else ExitCode.CODE_FAILED)


@torch_lab.command(context_settings=_HELP)
@click.argument("path", type=click.Path(path_type=Path), shell_complete=_completed_by("scripts"))
@click.argument("keys", metavar="[KEY]...", nargs=-1, shell_complete=_completed_by("keys"))
@_set
@_unset
@_json
def explain(path: Path, keys: tuple[str, ...], as_json: bool, **overrides: tuple[str, ...]) -> None:
    """Show where each value of the hparams script at PATH comes from.

    Below each key stand the lines that have set it, the newest first: that one holds. With KEYs
    only those, or what is below them. Warnings name what looks wrong in the layers.
    """
    with _failures(debug=False):
        from torch_lab import explaining
        from torch_lab.console import print_rows
        from torch_lab.experiment import Experiment

        # What the scripts print is no part of it.
        with contextlib.redirect_stdout(sys.stderr):
            experiment = Experiment.load(path, **_overrides(overrides))
        found = explaining.explained(experiment, keys)
        warnings = list(explaining.layer_warnings(experiment))
        if as_json:
            keys_found = [each.record() for each in found]
            click.echo(json.dumps({"keys": keys_found, "warnings": warnings}))
            return
        print_rows(explaining.explained_rows(found), sys.stdout)
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)


@torch_lab.command(context_settings=_HELP)
@click.argument("one", metavar="A", shell_complete=_completed_by("comparable"))
@click.argument("other", metavar="B", shell_complete=_completed_by("comparable"))
@click.option("--exit-code", is_flag=True, help="End with 1 if anything differs, as diff does.")
@click.option("--verbose", "-v", is_flag=True, help="Show the lines of the code that differ.")
@_json
def diff(one: str, other: str, exit_code: bool, verbose: bool, as_json: bool) -> int:
    """Show in what A and B differ: hparams, code, packages and results.

    Each is the path of an hparams script, which stands for what it is now; the name or the folder
    of a run, or its name without the version for the newest; or one of its checkpoints, RUN@best.
    """
    with _failures(debug=False):
        from torch_lab.comparing import compared
        from torch_lab.console import print_rows, print_table

        # What the scripts print is no part of it.
        with contextlib.redirect_stdout(sys.stderr):
            comparison = compared(one, other)
        if as_json:
            click.echo(json.dumps(comparison.record()))
        else:
            print_rows(comparison.header(), sys.stdout)
            for titles, rows in comparison.tables():
                print_table(titles, rows, sys.stdout)
            for line in comparison.details() if verbose else ():
                click.echo(line)
            print_rows(comparison.footer(), sys.stdout)
        differs = exit_code and not comparison.is_equal
        return int(ExitCode.CODE_FAILED if differs else ExitCode.DONE)


@torch_lab.command(context_settings=_HELP)
@_paths
@_set
@_unset
@_strict
@click.option(
    "--no-batch",
    is_flag=True,
    help="Look at scripts, keys, config scripts and structures alone: make no model, read no data.",
)
@_offline
@_trust
@_json
def check(
    paths: tuple[Path, ...],
    no_batch: bool,
    offline: bool,
    trust_checkpoint: bool,
    as_json: bool,
    **overrides: Any,
) -> int:
    """Check the hparams scripts at PATH... as far as can be without training.

    A batch of each goes forward and backward on the CPU, and nothing of it is kept. Scripts that
    hold no hparams are left out. Ends with 1 if anything is not ok.
    """
    with _failures(debug=False):
        from torch_lab import checking

        checked = checking.check(
            paths,
            batch=not no_batch,
            tracking="offline" if offline else "auto",
            trust_checkpoint=trust_checkpoint,
            **_overrides(overrides),
        )
        if as_json:
            click.echo(json.dumps(checked.record()))
        else:
            checked.show(sys.stdout)
        return int(ExitCode.DONE if checked.is_ok else ExitCode.CODE_FAILED)


@torch_lab.command("verify-resume", context_settings=_HELP)
@click.argument("path", type=click.Path(path_type=Path), shell_complete=_completed_by("scripts"))
@click.option(
    "--kill-at",
    "kills",
    metavar="STEP[:PLACE]",
    multiple=True,
    help="Kill the run in this step: at its end (7, or 7:batch-end), or at another place with "
    "7:batch-start, 7:optimizer, 7:validation or 7:epoch-end. If the step has no such place, the "
    "next that has. May be given several times.",
)
@click.option(
    "--random",
    "count",
    metavar="N",
    type=click.IntRange(min=1),
    help="Kill it at N random places, each in a run of its own. The default is 3.",
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(min=1),
    help="Train for N steps at most. The default is 200, or twice the last --kill-at.",
)
@click.option(
    "--debug", is_flag=True, help="Keep all that was written, also when there is no difference."
)
@_trust
@_json
def verify_resume(
    path: Path,
    kills: tuple[str, ...],
    count: int | None,
    steps: int | None,
    debug: bool,
    trust_checkpoint: bool,
    as_json: bool,
) -> int:
    """Prove that the experiment of the hparams script at PATH can be interrupted and resumed.

    It is trained once through, then again, killed and resumed, each time in a temporary folder; and
    all that came out is compared, to the bit. Ends with 1 if anything differs.

    Checkpoints are written at the end of each epoch, and once halfway between the start of an epoch
    and the kill in it, whatever every_minutes and every_n_steps say.
    """
    with _failures(debug):
        from torch_lab import verify
        from torch_lab.console import print_rows, print_table

        points = [verify.KillPoint.parse(kill) for kill in kills]
        report = verify.Verification(
            path,
            points,
            count or (0 if points else 3),
            steps,
            trust=trust_checkpoint,
            keep=debug,
            say=lambda line: click.echo(line, err=True),
        ).run()
        if as_json:
            click.echo(json.dumps(report.record()))
        else:
            print_table(verify.TITLES, report.table(), sys.stdout)
            print_rows(report.rows(), sys.stdout)
        return int(ExitCode.DONE if report.is_exact else ExitCode.CODE_FAILED)


@torch_lab.command(hidden=True)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--artifacts", required=True, type=click.Path(path_type=Path))
@click.option("--trace", required=True, type=click.Path(path_type=Path))
@click.option("--steps", required=True, type=int)
@click.option("--every", type=int)
@click.option("--kill-at")
@click.option("--resume")
@_trust
def trace(
    path: Path, kill_at: str | None, resume: str | None, trust_checkpoint: bool, **options: Any
) -> None:
    """Train for verify-resume, and write down what is seen and made."""
    with _failures(debug=False):
        from torch_lab.importing import heavy_imports

        with heavy_imports():
            from torch_lab.tracing import TracedRun
        from torch_lab.verify import KillPoint

        kill = KillPoint.parse(kill_at) if kill_at else None
        TracedRun(path, trust=trust_checkpoint, **options).train(kill, resume)


@contextlib.contextmanager
def _failures(debug: bool) -> Iterator[None]:
    """Answer signals; show an error as its reader needs it, and leave with its exit code."""
    from torch_lab.signals import stopping_on_signals
    from torch_lab.utils import process_rank

    parent, follows = os.getppid(), process_rank() > 0
    try:
        with stopping_on_signals(quiet=follows) as stop:
            try:
                yield
            except Exception:
                # What was interrupted may swallow that, and fail later: such as half an import.
                stop.answer()
                raise
    except (Exception, Interrupted) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            raise click.exceptions.Exit(int(ExitCode.CODE_FAILED)) from error
        from torch_lab.console import rendered
        from torch_lab.processes import has_left

        if isinstance(error, Interrupted) and follows:
            # The process that launched this one would take another code for a failure.
            raise click.exceptions.Exit(int(ExitCode.DONE)) from error
        if follows and (has_left(parent) or isinstance(error, NotWrittenError)):
            # Who launched it was interrupted, and has said so; that it is missed says nothing. And
            # that checkpoints cannot be written all processes are told by it.
            raise click.exceptions.Exit(int(ExitCode.CODE_FAILED)) from error
        click.echo(rendered(error, debug=debug), err=True)
        ours = isinstance(error, (TorchLabError, Interrupted))
        if debug and not ours and sys.stdin.isatty() and sys.stderr.isatty():
            _post_mortem(error)
        code = getattr(error, "exit_code", ExitCode.CODE_FAILED) if ours else ExitCode.CODE_FAILED
        raise click.exceptions.Exit(int(code)) from error


def _has_no_reader(stream: TextIO) -> bool:
    """Return whether who read a stream has had enough, as `head` has; then let it lead nowhere."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _post_mortem(error: BaseException) -> None:
    import pdb

    from torch_lab.console import user_frames

    pdb.post_mortem(user_frames(error.__traceback__))


def main(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run `command` as `program`, and return its exit code.

    Args:
        command: One of the commands of this module.
        program: The name that the user typed.
        arguments: What followed the name; those of the process if not given.
    """
    # As for `python -m`.
    make_importable(Path.cwd())
    if f"_{program.replace('-', '_')}_complete".upper() in os.environ:
        from torch_lab.completion import prepare

        prepare()
    try:
        code = command.main(arguments, prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return int(ExitCode.USAGE)
    except click.ClickException as error:
        message = error.format_message()
        context = getattr(error, "ctx", None)
        command_path = context.command_path if context else program
        click.echo(f"error: {message[:1].lower()}{message[1:]}", err=True)
        click.echo(f"  try: {command_path} --help", err=True)
        return int(ExitCode.USAGE)
    except click.Abort:
        return int(ExitCode.INTERRUPT)
    return code if isinstance(code, int) else int(ExitCode.DONE)


def _leave(command: click.Command, program: str) -> NoReturn:
    from torch_lab.processes import leave

    leave(main(command, program))


def train_entry() -> NoReturn:
    """Run `train` with the arguments of the process."""
    _leave(train, "train")


def infer_entry() -> NoReturn:
    """Run `infer` with the arguments of the process."""
    _leave(infer, "infer")


def torch_lab_entry() -> NoReturn:
    """Run `torch-lab` with the arguments of the process."""
    _leave(torch_lab, "torch-lab")
