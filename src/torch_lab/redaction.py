"""Secrets, which do not belong into a record: found by the names that they stand under."""

from __future__ import annotations

import ast
import io
import itertools
import os
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

__all__ = [
    "MASK",
    "is_secret",
    "masked",
    "masked_arguments",
    "masked_at",
    "masked_diff",
    "masked_message",
    "masked_script",
    "masked_text",
    "secrets_around",
    "secrets_in",
]

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORD = re.compile(
    r".*(password|passwd|secret|apikey|accesskey|privatekey|(auth|access|api)token)s?"
    r"|passphrase|credentials?|creds|authorization"
)
_KEYS = re.compile(r"access|account|api|encryption|master|private|secret|signing|ssh")
_TOKENS = re.compile(r"access|api|auth|bearer|refresh")
_OTHER_TOKENS = re.compile(
    r"additional|begin|beginning|blank|bos|class|cls|decoder|dist|end|eos|first|fraction|image|in|"
    r"last|mask|max|min|n|new|next|num|number|out|pad|padding|per|prev|register|sep|sos|special|"
    r"start|stop|sub|target|text|unk|unknown|vocab|word"
)
"""What stands before a token of a language model."""
_PLACE = re.compile(r"dir|file|filename|folder|path")
_WRAPPER = re.compile(r"Field|SecretStr|b64decode|bytes|decode|encode|field|format|join|str|strip")
"""Calls that return what they are given: a secret in them is one."""

# Quantifiers are possessive (`*+`): of a word of a million letters each is looked at once.
_URL = re.compile(r"((?<![a-zA-Z0-9+.-])[a-zA-Z][a-zA-Z0-9+.-]*+://[^\s:/@'\"]*):[^\s/@'\"]+@")
_NAME = r"(?<!\w)(?P<name>[A-Za-z_][\w-]*+)"
_OPENED = re.compile(
    # name = "…, "name": "…, x["name"] = "…, name: str = "…, f("name", "…
    r"""(?P<call>\([ \t]*+\\?["'])?"""
    + _NAME
    + r"""(?:\\?["']?[ \t]*+\]?[ \t]*+(?::[ \t]*+[\w.\[\]| ]+=|:=|=>|[:=])"""
    + r"""|(?(call)\\?["'][ \t]*+,|(?!)))"""
    + r"""\s*+[\[(]?\s*+[rbfuRBFU]{0,2}(?P<quote>\\?(?:\"{3}|'{3}|["']))"""
)
_BEARER = re.compile(r"\b(Bearer|bearer)[ \t]++[\w.~+/=-]{8,}+")
_LEAST_LETTERS = 8
"""Shorter values of the environment also stand in texts that have nothing to do with them."""
_WORD_VALUE = re.compile(_NAME + r"=(?P<value>[^\s\"'{}$&;,)]++)(?![\"'])")
_REST_OF_LINE = re.compile(_NAME + r"[ \t]*+[:=][ \t]*+(?P<value>[^\s\"'#][^\n]*)")
_OPTION = re.compile(r"[\w-]+")
_SECTION = re.compile(r"^(?=diff --git )", re.MULTILINE)

Edit = tuple[int, int, str]
"""Where it starts and ends in the text, and what it becomes."""


def is_secret(name: str) -> bool:
    """Return whether what stands under `name` looks like a secret: `wandb_api_key`, `HF_TOKEN`.

    Tokens of language models (`pad_token`, `max_tokens`) and places (`token_path`) are none.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or _PLACE.fullmatch(words[-1]):
        return False
    pairs = list(itertools.pairwise(words))
    return (
        any(_SECRET_WORD.fullmatch(word) for word in words)
        or any(_KEYS.fullmatch(first) and second in ("key", "keys") for first, second in pairs)
        or any(
            _TOKENS.fullmatch(first) and second in ("token", "tokens") for first, second in pairs
        )
        or (words[-1] == "token" and not any(_OTHER_TOKENS.fullmatch(word) for word in words))
    )


def masked_text(text: str) -> str:
    """Return `text` with the passwords in its URLs masked, and what stands behind `Bearer`."""
    return _BEARER.sub(rf"\1 {MASK}", _URL.sub(rf"\1:{MASK}@", text))


def masked_message(text: str) -> str:
    """Return words for people, such as those of an error, without `api_key=…` and the like."""
    return _WORD_VALUE.sub(_masked_pair, masked_text(text))


def _masked_pair(match: re.Match[str]) -> str:
    return f"{match['name']}={MASK}" if is_secret(match["name"]) else match[0]


def secrets_around() -> list[str]:
    """Return the secrets in the environment of this process, the longest first."""
    found = {value for name, value in os.environ.items() if is_secret(name)}
    return sorted((value for value in found if len(value) >= _LEAST_LETTERS), key=len, reverse=True)


def secrets_in(values: Any) -> list[str]:
    """Return the strings under secret keys, and the secrets in the environment; the longest first.

    Such a value may stand elsewhere too: `ref` and `env` put it under any key.
    """
    under = {text for text in _under_secret_keys(values) if len(text) >= _LEAST_LETTERS}
    return sorted(under | set(secrets_around()), key=len, reverse=True)


def _under_secret_keys(value: Any, *, secret: bool = False) -> Iterator[str]:
    if isinstance(value, (str, bytes)) and secret:
        yield _as_text(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _under_secret_keys(item, secret=secret or _is_secret_key(key))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _under_secret_keys(item, secret=secret)


def _as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def masked(value: Any) -> Any:
    """Return a value with its secrets masked: what stands under secret keys, wherever it stands.

    Numbers under such keys are none.

    Args:
        value: Of dictionaries, lists, sets, strings and anything else; or what `runs.encoded`
            returned.
    """
    return _Masking(secrets_in(value)).of(value, secret=False)


def masked_at(key: Sequence[object], value: Any, secrets: Sequence[str] = ()) -> Any:
    """Return the value that stands at `key` in nested dictionaries, with its secrets masked.

    Args:
        key: The keys that lead to it.
        value: The value.
        secrets: What else is one, as `secrets_in` finds it.
    """
    return _Masking(secrets).of(value, secret=any(map(_is_secret_key, key)))


class _Masking:
    """Masks secrets in nested values.

    Args:
        secrets: Texts that are secret wherever they stand.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = secrets

    def of(self, value: Any, *, secret: bool) -> Any:
        """Return a value without what is secret in it; all of it, if it is `secret` itself."""
        if isinstance(value, str):
            return MASK if secret and value else self._text(value)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.of(item, secret=secret) for item in value)
        if isinstance(value, dict):
            if "__type__" in value:
                return {**value, "value": self._tagged(value, secret=secret)}
            return {
                key: self.of(item, secret=secret or _is_secret_key(key))
                for key, item in value.items()
            }
        if isinstance(value, bytes):
            secret |= any(each in _as_text(value) for each in self._secrets)
        is_number = value is None or isinstance(value, (bool, int, float, complex))
        return MASK if secret and not is_number else value

    def _tagged(self, tagged: Mapping[str, Any], *, secret: bool) -> Any:
        kind, value = tagged["__type__"], tagged["value"]
        if kind == "dict":
            return [
                [key, self.of(item, secret=secret or _is_secret_key(key))] for key, item in value
            ]
        # The name of an infinity is no secret, and has to be read back.
        return value if kind == "float" else self.of(value, secret=secret)

    def _text(self, text: str) -> str:
        for each in self._secrets:
            text = text.replace(each, MASK)
        return masked_text(text)


def _is_secret_key(key: object) -> bool:
    return isinstance(key, str) and is_secret(key)


def masked_arguments(arguments: Iterable[str]) -> list[str]:
    """Return the words of a command line with the values of secret options masked."""
    words = ["", *arguments]
    return [_masked_word(before, word) for before, word in itertools.pairwise(words)]


def _masked_word(before: str, word: str) -> str:
    is_value = before.startswith("-") and "=" not in before and is_secret(before)
    if is_value and word and not word.startswith("--"):
        return MASK
    name, sign, value = word.partition("=")
    if name == "--set":
        return f"{name}={_masked_word('', value)}"
    if sign and value and is_secret(name):
        return f"{name}={MASK}"
    return masked_text(_edited(word, _quoted(word)))


def masked_diff(changes: bytes) -> bytes:
    """Return a patch with what looks like a secret masked.

    In other files than Python's a value needs no quotes: `API_KEY=abc`, `password: abc`.
    """
    text = changes.decode("utf-8", errors="surrogateescape")
    sections = [_masked_section(section) for section in _SECTION.split(text)]
    return masked_text("".join(sections)).encode("utf-8", errors="surrogateescape")


def _masked_section(section: str) -> str:
    if "\nGIT binary patch" in section:
        return section
    header = section.partition("\n")[0].rstrip('"')
    is_python = header.endswith((".py", ".pyi", ".ipynb"))
    return _edited(
        section, [*_quoted(section), *(() if is_python else _unquoted(section, _REST_OF_LINE))]
    )


def _quoted(text: str) -> Iterator[Edit]:
    """Yield what to mask of the strings that look as if they were given to secret names."""
    for match in _OPENED.finditer(text):
        if is_secret(match["name"]):
            yield _masking(text, match.end(), _closing(text, match.end(), match["quote"]))


def _unquoted(text: str, pattern: re.Pattern[str]) -> Iterator[Edit]:
    """Yield what to mask of the values of `pattern`."""
    for match in pattern.finditer(text):
        if is_secret(match["name"]):
            yield _masking(text, *match.span("value"))


def _closing(text: str, start: int, quote: str) -> int:
    """Return where the string that was opened at `start` ends; one of several lines may not."""
    escaped = quote.startswith("\\")
    pattern = re.escape(quote) if escaped else rf"(?<!\\){quote}"
    ends = pattern if len(quote) > 2 + escaped else rf"{pattern}|\n"
    found = re.compile(ends).search(text, start)
    return found.start() if found else len(text)


def _masking(text: str, start: int, end: int) -> Edit:
    """Mask a span in as many lines as it has, each with the sign that a patch has in front."""
    masks = re.sub(r"(?m)(?<=\n)([-+ ]?+).+|\A.+", rf"\1{MASK}", text[start:end])
    return start, end, masks


def _edited(text: str, edits: Iterable[Edit]) -> str:
    """Return `text` with the edits made; where some overlap, the first and longest."""
    parts, done = [], 0
    for start, end, new in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if start >= done and text[start:end].strip():
            parts += [text[done:start], new]
            done = end
    return "".join([*parts, text[done:]])


def masked_script(source: bytes) -> bytes:
    """Return a Python script with the strings masked that it gives to secret names.

    What cannot be parsed is masked by the looks of it.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = source.decode(encoding)
        edits = list(_script_edits(text))
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        encoding, text = "utf-8", source.decode("utf-8", errors="surrogateescape")
        edits = list(_quoted(text))
    return masked_text(_edited(text, edits)).encode(encoding, errors="surrogateescape")


def _script_edits(text: str) -> Iterator[Edit]:
    with warnings.catch_warnings():
        # What a script deserves to be warned of, it was warned of when it ran.
        warnings.simplefilter("ignore")
        nodes = list(_nodes(ast.parse(text)))
    lines = _Lines(text)
    for node in nodes:
        for name, value in _named_values(node):
            for literal in _literals(value) if is_secret(name) else ():
                is_bytes = isinstance(literal, ast.Constant) and isinstance(literal.value, bytes)
                yield *lines.span(literal), f'{"b" * is_bytes}"{MASK}"'
    strings = (lines.span(node) for node in nodes if _is_string(node))
    for start, end in (*strings, *lines.comments()):
        inner = text[start:end]
        for first, last, new in (*_quoted(inner), *_unquoted(inner, _WORD_VALUE)):
            yield start + first, start + last, new


class _Lines:
    """Finds places in a text by the lines and columns of its syntax tree and its tokens."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.split("\n")
        self.starts = [0, *itertools.accumulate(len(line) + 1 for line in self.lines)]

    def span(self, node: ast.expr) -> tuple[int, int]:
        """Return where a node starts and ends."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._offset(node.lineno, node.col_offset)
        return start, self._offset(node.end_lineno, node.end_col_offset)

    def comments(self) -> Iterator[tuple[int, int]]:
        """Yield where the comments start and end."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                start = self.starts[token.start[0] - 1] + token.start[1]
                yield start, start + len(token.string)

    def _offset(self, line: int, column: int) -> int:
        # The tree counts columns in the bytes of UTF-8.
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree, not those in f-strings: they do not know their places."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.JoinedStr):
            stack.extend(ast.iter_child_nodes(node))


def _is_string(node: ast.AST) -> TypeGuard[ast.expr]:
    """Return whether it is a string, bytes or an f-string, and has anything of its own in it."""
    if isinstance(node, ast.JoinedStr):
        return any(isinstance(part, ast.Constant) for part in node.values)
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and bool(node.value)
    )


def _named_values(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a node gives to names, with the names."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _assigned(target, value)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield from _assigned(target, value)
        case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
            yield from _assigned(target, value)
        case ast.keyword(arg=str(name), value=value):
            yield name, value
        case ast.Dict(keys=keys, values=values):
            yield from (
                (key.value, value)
                for key, value in zip(keys, values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            )
        case ast.arguments():
            yield from _defaults(node)
        case ast.Call(args=[ast.Constant(value=str(name)), *others], keywords=keywords) if (
            _OPTION.fullmatch(name)
        ):
            # As in setdefault("X_TOKEN", "…"), or add_argument("--token", default="…").
            defaults = [each.value for each in keywords if each.arg in ("default", "value")]
            yield from ((name, value) for value in (*others, *defaults))


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match target, value:
        case ((ast.Name(id=name) | ast.Attribute(attr=name)), _):
            yield name, value
        case ast.Subscript(slice=ast.Constant(value=str(name))), _:
            yield name, value
        case ((ast.Tuple() | ast.List()), (ast.Tuple() | ast.List())):
            for each_target, each_value in zip(target.elts, value.elts, strict=False):
                yield from _assigned(each_target, each_value)


def _defaults(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    with_default = names[len(names) - len(arguments.defaults) :]
    yield from zip(with_default, arguments.defaults, strict=True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            yield argument.arg, default


def _literals(value: ast.expr) -> Iterator[ast.expr]:
    """Yield the strings that `value` may become, not those that only lead to it: `env["NAME"]`."""
    match value:
        case ast.Constant() | ast.JoinedStr():
            if _is_string(value):
                yield value
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            yield from _literals_in(parts)
        case ast.Dict(values=parts) | ast.BoolOp(values=parts):
            yield from _literals_in(parts)
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            yield from _literals_in([left, right])
        case ast.Starred(value=inner) | ast.NamedExpr(value=inner):
            yield from _literals(inner)
        case ast.Call(func=ast.Name(id=name)) if _WRAPPER.fullmatch(name):
            yield from _literals_in([*value.args, *(each.value for each in value.keywords)])
        case ast.Call(func=ast.Attribute(value=inner, attr=name)) if _WRAPPER.fullmatch(name):
            yield from _literals_in([inner, *value.args])


def _literals_in(values: Iterable[ast.expr]) -> Iterator[ast.expr]:
    for value in values:
        yield from _literals(value)
