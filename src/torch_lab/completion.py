"""What a shell completes: paths of hparams scripts, the keys of their hparams, names of runs.

Whoever presses a key waits for it: nothing of the user's is run, and nothing heavy imported.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from torch_lab.errors import UserError, did_you_mean
from torch_lab.places import CONFIG_SCRIPT, VERSION, artifacts_folder, project_of, unversioned

if TYPE_CHECKING:
    # Only newer versions of click can be asked for what is in it.
    Item: TypeAlias = CompletionItem[str]

__all__ = [
    "arguments",
    "comparable",
    "install",
    "keys",
    "names",
    "prepare",
    "runs",
    "scripts",
    "settings",
    "shells",
]

_CONFIG_FUNCTION: Final = re.compile(rb"\b(train|infer)_config\b")
_HPARAMS: Final = re.compile(rb"^\s*hparams\b|^\s*from\b.*\bhparams\b", re.MULTILINE)
_NO_PROJECT: Final = {"__pycache__", "node_modules"}
_MOST_ENTRIES: Final = 1000
"""How many names are looked at to see whether a folder leads to a script."""
_PROGRAMS: Final = "train infer torch-lab"


# What there is to choose from.


def scripts(context: click.Context, incomplete: str) -> list[Item]:
    """Return the hparams scripts whose path begins so, and the folders on the way to one."""
    found = list(_entries(incomplete))
    # A folder that is the only way is gone through at once.
    while len(found) == 1 and found[0].endswith("/") and (further := list(_entries(found[0]))):
        found = further
    return [CompletionItem(path, type="path") for path in found]


def settings(context: click.Context, incomplete: str) -> list[Item]:
    """Return the keys of values of the script that was named before, each with a `=` behind it."""
    leaves = [key for key, is_section in _keys_of(context).items() if not is_section]
    return [CompletionItem(f"{key}=", type="part") for key in leaves if key.startswith(incomplete)]


def keys(context: click.Context, incomplete: str) -> list[Item]:
    """Return all keys of the script that was named before."""
    return [CompletionItem(key) for key in _keys_of(context) if key.startswith(incomplete)]


def runs(context: click.Context, incomplete: str) -> list[Item]:
    """Return the runs whose name begins so: of the scripts that were named before, or all.

    After them come the scripts, as `--resume` may be followed by one.
    """
    given = _scripts_of(context)
    own = tuple(f"{script.parent.name}-{script.stem}-v" for script in given)
    found = [name for name in _run_names(given) if name.startswith(own or "")]
    items = [CompletionItem(name) for name in found if name.startswith(incomplete)]
    return [*items, *scripts(context, incomplete)]


def names(context: click.Context, incomplete: str) -> list[Item]:
    """Return the runs whose name begins so, without their versions and with them."""
    found = _run_names([])
    bare = dict.fromkeys(map(unversioned, found))
    return [CompletionItem(name) for name in [*bare, *found] if name.startswith(incomplete)]


def comparable(context: click.Context, incomplete: str) -> list[Item]:
    """Return the runs and the scripts whose name or path begins so."""
    return [*names(context, incomplete), *scripts(context, incomplete)]


def arguments(context: click.Context, incomplete: str) -> list[Item]:
    """Return the runs whose name begins so, or else leave it to the shell to name files."""
    return names(context, incomplete) or [CompletionItem(incomplete, type="file")]


def shells(context: click.Context, incomplete: str) -> list[Item]:
    """Return the shells that there is completion for."""
    return [CompletionItem(name) for name in _SCRIPTS if name.startswith(incomplete)]


def _entries(incomplete: str) -> Iterator[str]:
    """Yield the scripts whose path begins so, and the folders with a `/` behind them."""
    start = incomplete.rpartition("/")[2]
    typed = incomplete.removesuffix(start)
    found = sorted(_listed(Path(typed or ".").expanduser()), key=lambda entry: entry.name)
    wanted = [entry for entry in found if entry.name.startswith(start)]
    shown = [entry for entry in wanted if start.startswith(".") or not entry.name.startswith(".")]
    is_experiment = _is_experiment(found)
    for entry in shown:
        if entry.is_dir():
            if _leads_to_scripts(entry.path):
                yield f"{typed}{entry.name}/"
        elif is_experiment and _may_be_hparams(entry) and _has(entry.path, _HPARAMS):
            yield f"{typed}{entry.name}"


def _leads_to_scripts(folder: str) -> bool:
    """Return whether an experiment is in a folder or below; of very large ones nobody knows."""
    waiting, left = deque([folder]), _MOST_ENTRIES
    while waiting:
        found = _listed(waiting.popleft())
        if _is_experiment(found):
            return True
        left -= len(found)
        if left < 0:
            return True
        # In the folders of runs are copies of scripts.
        if {"run.json", "pyvenv.cfg"}.isdisjoint(entry.name for entry in found):
            waiting += [entry.path for entry in found if _may_have_more(entry)]
    return False


def _listed(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _may_have_more(entry: os.DirEntry[str]) -> bool:
    is_hidden = entry.name.startswith(".") or entry.name in _NO_PROJECT
    return not is_hidden and entry.is_dir(follow_symlinks=False)


def _is_experiment(entries: Sequence[os.DirEntry[str]]) -> bool:
    config = next((entry for entry in entries if entry.name == CONFIG_SCRIPT), None)
    return (
        config is not None
        and any(map(_may_be_hparams, entries))
        and _has(config.path, _CONFIG_FUNCTION)
    )


def _may_be_hparams(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".py") and not entry.name.startswith("__")


def _has(file: str, pattern: re.Pattern[bytes]) -> bool:
    try:
        return pattern.search(Path(file).read_bytes()) is not None
    except OSError:
        return False


def _keys_of(context: click.Context) -> dict[str, bool]:
    from torch_lab.outline import keys_in

    return {key: kind for script in _scripts_of(context) for key, kind in keys_in(script).items()}


def _scripts_of(context: click.Context) -> list[Path]:
    """Return the scripts among the words before the one that is being completed."""
    # While the last option has no value yet, click leaves the arguments unread.
    given = context.params.get("paths") or context.params.get("path") or context.args
    paths = given if isinstance(given, (list, tuple)) else [given]
    return [Path(path).expanduser().resolve() for path in paths if str(path).endswith(".py")]


def _run_names(given: Sequence[Path]) -> list[str]:
    """Return the names of the project's runs, of one name the newest first."""
    artifacts = artifacts_folder(project_of(given[0] if given else Path.cwd()))
    found = [entry.name for entry in _listed(artifacts) if VERSION.search(entry.name)]
    return sorted(found, key=_by_version)


def _by_version(name: str) -> tuple[str, int]:
    version = VERSION.search(name)
    assert version is not None
    return unversioned(name), -int(version[1])


# What passes between the shells and us. Each completion is a line: its kind, itself, and what it is
# for, with tabs between them. The kinds are `plain`; `path`, of a script or a folder; `part`, which
# is not the end of a word; and `file`, for which the shell is to name files.

_BASH: Final = r"""
_torch_lab_complete() {
    local IFS=$' \t\n' program name kind value
    COMPREPLY=()
    # Another program may have the name: it must not be run.
    program=$(type -P -- "$1")
    if ! command grep -qs torch_lab "$program"; then
        compopt -o default
        return
    fi
    name=${1##*/} name=${name//-/_}
    while IFS=$'\t' read -r kind value _; do
        case $kind in
            file) compopt -o default; continue ;;
            path) compopt -o filenames ;;
            part) compopt -o nospace ;;
            '') continue ;;
        esac
        COMPREPLY+=("$value")
    done < <(env "_${name^^}_COMPLETE=bash_complete" COMP_WORDS="${COMP_WORDS[*]}" \
        COMP_CWORD="$COMP_CWORD" "$program" 2>/dev/null)
}
complete -o nosort -F _torch_lab_complete %(programs)s
"""
_ZSH: Final = r"""
_torch_lab_complete() {
    local program=${commands[$words[1]]:-$words[1]} name=${${words[1]:t}//-/_} line
    local -a lines fields values shown parts
    # Another program may have the name: it must not be run.
    if ! command grep -qs torch_lab $program; then
        _files
        return
    fi
    lines=("${(@f)$(env _${(U)name}_COMPLETE=zsh_complete COMP_WORDS="${words[*]}" \
        COMP_CWORD=$((CURRENT-1)) $program 2>/dev/null)}")
    for line in $lines; do
        fields=("${(@ps:\t:)line}")
        case $fields[1] in
            '') ;;
            file) _files ;;
            part) parts+=("$fields[2]") ;;
            *) values+=("$fields[2]") shown+=("${fields[2]}${fields[3]:+  -- $fields[3]}") ;;
        esac
    done
    (( $#parts )) && compadd -Q -U -S '' -V torch-lab -a parts
    (( $#values )) && compadd -Q -U -V torch-lab -l -d shown -a values
    return 0
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _torch_lab_complete %(programs)s
"""
_FISH: Final = r"""
function __torch_lab_complete
    set -l words (commandline -opc)
    set -l program (command -s $words[1]); or return
    # Another program may have the name: it must not be run.
    if not command grep -qs torch_lab $program
        __fish_complete_path (commandline -ct)
        return
    end
    set -l name (string upper (string replace -a - _ (basename $words[1])))
    set -l current (commandline -ct)
    for line in (env "_"$name"_COMPLETE=fish_complete" COMP_WORDS=(commandline -cp) \
        COMP_CWORD="$current" $program 2>/dev/null)
        set -l fields (string split \t -- $line)
        if test "$fields[1]" = file
            __fish_complete_path "$current"
        else if test -n "$fields[1]"
            string join \t -- $fields[2..]
        end
    end
end
for program in %(programs)s
    complete --command $program --no-files --arguments '(__torch_lab_complete)'
end
"""


def _line(kind: str, value: str, told: str | None) -> str:
    words = " ".join((told or "").split())
    return "\t".join([kind, value, words]).rstrip("\t")


def _with_option(value: str, typed: str) -> str:
    """Return `value` with the option before it, if both are to be one word: `--resume=NAME`."""
    option, sign, _ = typed.partition("=")
    return f"{option}{sign}{value}" if sign and option.startswith("--") else value


class _OurWords(ShellComplete):
    """What the shells have in common: our script, and a word that is kept to complete it."""

    def source(self) -> str:
        return _script_for(self.name)

    def get_completion_args(self) -> tuple[list[str], str]:
        before, self._typed = super().get_completion_args()
        return before, self._typed


class _Bash(_OurWords, BashComplete):
    """Completion for bash, which takes words apart at each `=`, and completes what is behind it."""

    def get_completion_args(self) -> tuple[list[str], str]:
        given, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in [*given, incomplete]:
            if words and word and (word == "=" or words[-1].endswith("=")):
                words[-1] += word
            else:
                words.append(word)
        *before, self._typed = words
        return before, self._typed

    def format_completion(self, item: Item) -> str:
        # Readline adds the `/` itself, and knows that the path goes on.
        value = item.value.removesuffix("/") if item.type == "path" else item.value
        known = self._typed[: self._typed.rfind("=") + 1]
        return _line(item.type, value.removeprefix(known), item.help)


class _Zsh(_OurWords, ZshComplete):
    """Completion for zsh, which takes what it is given as it is."""

    def format_completion(self, item: Item) -> str:
        whole = _with_option(item.value, self._typed)
        home = re.match(r"~[^/]*/", whole)
        start = home[0] if home else ""
        value = start + re.sub(r"([^\w@%+=:,./-])", r"\\\1", whole.removeprefix(start))
        is_folder = item.type == "path" and item.value.endswith("/")
        return _line("part" if is_folder else item.type, value, item.help)


class _Fish(_OurWords, FishComplete):
    """Completion for fish, which adds no space behind `/` and `=` by itself."""

    def format_completion(self, item: Item) -> str:
        return _line(item.type, _with_option(item.value, self._typed), item.help)


_SCRIPTS: Final = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def _script_for(shell: str) -> str:
    title = "# Completion of train, infer and torch-lab; torch-lab --install-completion writes it."
    return title + _SCRIPTS[shell] % {"programs": _PROGRAMS}


def prepare() -> None:
    """Let click talk to the shells in our words."""
    for kind in (_Bash, _Zsh, _Fish):
        add_completion_class(kind)


# Installing.


def install(shell: str, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Write the completion of all commands for a shell, and let the shell read it at its start.

    The shell reads a file, and starts no Python: nothing becomes slower, nothing depends on which
    environment is active then.

    Args:
        shell: `bash`, `zsh` or `fish`; that of the user if it is empty.
        variables: The environment.

    Returns:
        What was done, in words.

    Raises:
        UserError: The shell is another one, or a file cannot be written.
    """
    name = shell or Path(variables.get("SHELL", "")).name
    if name not in _SCRIPTS:
        what = f"there is no completion for the shell {name!r}{did_you_mean(name, _SCRIPTS)}"
        raise UserError(
            what if name else "the environment has no SHELL, which would name yours",
            f"name one: torch-lab --install-completion {'|'.join(_SCRIPTS)}",
        )
    try:
        return _installed(name, _Places(variables))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error


def _installed(shell: str, places: _Places) -> list[str]:
    """Write what is to be written, and return what was done."""
    file, start = places.script(shell), places.start(shell)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_script_for(shell), encoding="utf-8")
    done = [f"wrote {file}"]
    if start is not None:
        line = f"source {shlex.quote(str(file))}  # completion of torch-lab"
        # It is only searched, and may be in any encoding.
        text = start.read_text(encoding="latin-1") if start.is_file() else ""
        if line not in text.splitlines():
            begin = "" if not text or text.endswith("\n") else "\n"
            with start.open("a", encoding="utf-8") as end:
                end.write(f"{begin}{line}\n")
            done.append(f"added a line to {start}")
    return [*done, f"start a new {shell}, or: source {shlex.quote(str(file))}"]


class _Places:
    """Where shells look for things of the user's.

    Args:
        variables: The environment.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._home = Path(variables.get("HOME") or Path.home())

    def script(self, shell: str) -> Path:
        """Return where the completion for `shell` is written."""
        if shell == "fish":
            config = self._variables.get("XDG_CONFIG_HOME") or self._home / ".config"
            return Path(config, "fish/conf.d/torch-lab.fish")
        data = self._variables.get("XDG_DATA_HOME") or self._home / ".local/share"
        return Path(data, f"torch-lab/completion.{shell}")

    def start(self, shell: str) -> Path | None:
        """Return what `shell` reads at its start, unless it finds the completion by itself."""
        if shell == "bash":
            return self._home / ".bashrc"
        if shell == "zsh":
            return Path(self._variables.get("ZDOTDIR") or self._home, ".zshrc")
        return None
