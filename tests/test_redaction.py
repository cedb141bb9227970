"""Secrets are masked, and nothing else is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from torch_lab.redaction import (
    is_secret,
    masked,
    masked_arguments,
    masked_diff,
    masked_message,
    masked_script,
    masked_text,
)
from torch_lab.runs import decoded, encoded

SECRET = (
    "password passwd secret secrets api_key apikey apiKey APIKey api-key access_key private_key "
    "credential credentials auth_token access_token accessToken api_token apiTokens token Token "
    "wandb_api_key HF_TOKEN hf-token clientSecret DB_PASSWORD PGPASSWORD githubToken ssh_keys "
    "AWS_SECRET_ACCESS_KEY secret_key passphrase x-api-key Authorization"
)
NO_SECRET = (
    "tokenizer tokenizer_name max_tokens num_tokens pad_token padToken eos_token bos_token "
    "unk_token mask_token sep_token cls_token special_tokens tokens token_ids token_type_ids "
    "key keys key_dim query_key num_heads monkey passes bypass secretary token_path "
    "credentials_file image_token_index author seed sha256 id"
)


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_secrets(name: str) -> None:
    """In any case, and as a part of a name."""
    assert is_secret(name)


@pytest.mark.parametrize("name", NO_SECRET.split())
def test_names_that_only_sound_like_secrets(name: str) -> None:
    """What language models count in, and what lies somewhere, is to be kept."""
    assert not is_secret(name)


def test_secrets_in_values_of_a_record() -> None:
    """At any depth, in any type that a record can hold; numbers and empty strings stay."""
    hparams = {
        "config": {"api_key": "s1", "layers": [{"token": "s2"}], "pad_token": "<pad>"},
        "credentials": {"user": "s3", "all": ["s4", ("s5", 5)]},
        "password": "",
        "secret": None,
        "token": b"s6",
        1: {"access_token": "s7"},
        "url": "postgres://me:s8@host/db",
    }
    kept = masked(encoded(hparams))
    assert not re.search(r"s\d", repr(kept))
    back = decoded(kept)
    assert back["config"] == {"api_key": "***", "layers": [{"token": "***"}], "pad_token": "<pad>"}
    assert back["credentials"]["all"] == ["***", ("***", 5)]
    assert (back["password"], back["secret"]) == ("", None)
    assert back["url"] == "postgres://me:***@host/db"


def test_values_without_secrets_stay_as_they_are() -> None:
    """Also those that JSON has no form for."""
    value = {"a": (1, {2}), "b": float("inf"), "c": Path("x"), "max_tokens": 3, "u": "http://h:80/"}
    assert decoded(masked(encoded(value))) == value


def test_secret_options_of_a_command() -> None:
    """As one word or as two."""
    words = ["train", "h.py", "--token", "s1", "--api-key=s2", "--max-tokens", "3", "HF_TOKEN=s3"]
    assert masked_arguments([*words, "--password", "--debug", "http://me:s4@h/"]) == [
        *("train", "h.py", "--token", "***", "--api-key=***", "--max-tokens", "3"),
        *("HF_TOKEN=***", "--password", "--debug", "http://me:***@h/"),
    ]


SCRIPTS = {
    "assignment": "API_KEY = 's1'",
    "annotated": 'password: str = "s1"',
    "attribute": "self.client_secret = 's1' if x else y or 's2'",
    "subscript": 'os.environ["X_TOKEN"] = """s1\ns2"""',
    "dictionary": "{'password': ('s1' \"s2\"), 'b': 1}",
    "nested": "{'credentials': {'a': ['s1', b's2']}}",
    "keyword": "login(token=f's1{x}s2')",
    "default": "def f(a, api_key='s1', *, b, auth_token='s2'): pass",
    "tuple": "user, password = 'me', 's1'",
    "call": "os.environ.setdefault('X_TOKEN', 's1')",
    "option": "parser.add_argument('--token', default='s1', help='help')",
    "wrapped": "secret: str = field(default=SecretStr('s1'.strip()))",
    "walrus": "(token := 's1')",
    "sum": "token = 's1' + 's2' % x",
    "url": "download('https://me:s1@host/x')",
    "after umlauts": "ä = 'ü'; ä_token = 's1'",
    "comment": "x = 1  # api_key = 's1', TOKEN=s2",
    "in a string": 'json.loads(\'{"password": "s1"}\')',
    "in a command": "os.system(f'HF_TOKEN=s1 run {x}')",
    "docstring": '"""Docs.\n\npassword = "s1"\n"""',
    "windows lines": "a = 1\r\ntoken = 's1'\r\n",
    "warns": "x = '\\d'; token = 's1'",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_secrets_in_scripts(script: str) -> None:
    """Wherever a string is given to a secret name; it remains a script."""
    result = masked_script(script.encode()).decode()
    assert "***" in result and not re.search(r"s\d", result)
    with pytest.warns() if "\\d" in script else pytest.MonkeyPatch.context():
        ast.parse(result)


@pytest.mark.parametrize(
    "script",
    [
        "token = os.environ['HF_TOKEN']; secret = load('my/secret'); password = getpass('Word: ')",
        "tokenizer = 'a'; max_tokens = 3; config = {'pad_token': '<pad>', 'token': None}",
        "password = ''; api_key = f'{x}'; print('password: ', 'x'); print(f'token: {x}')",
        "url = 'https://host:8080/a@b'; key = 'x'; sha256 = 'abc'",
        "# -*- coding: latin-1 -*-\nx = 'ü'",
        "\ufeffx = 1\n\x0c\ny = '\u2028'\r\n",
        "if token == '<s>':\n    pass",
    ],
)
def test_scripts_without_secrets_stay_as_they_are(script: str) -> None:
    """To the byte."""
    encoding = "latin-1" if "latin-1" in script else "utf-8"
    assert masked_script(script.encode(encoding)) == script.encode(encoding)


def test_a_script_that_does_not_parse_is_masked_too() -> None:
    """By the looks of it."""
    result = masked_script(b'def (:\nAPI_KEY = "s1"\nx = {"token": \'s2\'} \xff\n')
    assert result == b'def (:\nAPI_KEY = "***"\nx = {"token": \'***\'} \xff\n'


DIFF = '''\
diff --git a/x.py b/x.py
--- a/x.py
+++ b/x.py
@@ -1,3 +1,4 @@
 import os
+API_KEY = "s1"
-    "password": 's2',
+os.environ["X_TOKEN"] = """s3
+s4
+"""
 login(auth_token=f"s5", tokenizer="a")
+token = get_token()
+text = """
+password = "s6"
+os.environ.setdefault("X_TOKEN", "s7")
diff --git a/n.ipynb b/n.ipynb
+    "os.environ[\\"HF_TOKEN\\"] = \\"s8\\"\\n",
diff --git a/.env b/.env
+API_KEY=s9
+max_tokens: 5
-password: s0 s0
+url=https://me:s1@h
'''


def test_secrets_in_changes() -> None:
    """Line for line; without quotes only where the language needs none."""
    result = masked_diff(DIFF.encode()).decode()
    assert not re.search(r"s\d", result)
    same = [a == b for a, b in zip(DIFF.splitlines(), result.splitlines(), strict=True)]
    assert same.count(False) == 11
    for line in (' login(auth_token=f"***", tokenizer="a")', "+token = get_token()", "+***"):
        assert line in result.splitlines()


def test_other_changes_stay_as_they_are() -> None:
    """Also those of binary files."""
    blob = b"diff --git a/t b/t\nGIT binary patch\nliteral 3\ntoken=zcmV;@\n\n"
    changes = blob + b"diff --git a/x.py b/x.py\n+x = '\xff\xfe'\n+tokens = ['a']\n"
    assert masked_diff(changes) == changes


def test_passwords_in_addresses() -> None:
    """A port is none."""
    assert masked_text("at ftp://me:pass@h:21/x and http://h:80/@") == (
        "at ftp://me:***@h:21/x and http://h:80/@"
    )


def test_secrets_in_messages() -> None:
    """Of errors, which may say what they were called with; and what a header carries."""
    told = masked_message("login(api_key=abc123, max_tokens=5) failed: Bearer abcdefgh12345")
    assert told == "login(api_key=***, max_tokens=5) failed: Bearer ***"
