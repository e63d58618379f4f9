"""What is taken for a credential, and what is left when it is masked."""

import json
import re
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.redact import for_file, for_terminal, holds_credentials, mask_credentials, names_a_secret, printable, show
from launcher.run.progress import ProgressView
from trainer.contract import STREAM_FILE


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://ann:pass@mirror.example/simple", "https://***@mirror.example/simple"),
        ("https://ann:p@ss@mirror.example/simple", "https://***@mirror.example/simple"),
        ("https://token@mirror.example", "https://***@mirror.example"),
        ("cluster.delivery.proxy=http://ann:pass@proxy:3128", "cluster.delivery.proxy=http://***@proxy:3128"),
        ("first https://a:b@c/d, then ssh://e@f", "first https://***@c/d, then ssh://***@f"),
        ("https://mirror.example/simple/pkg@1.0", "https://mirror.example/simple/pkg@1.0"),
        ("ann@192.0.2.11:22", "ann@192.0.2.11:22"),
        ("https://***@mirror.example", "https://***@mirror.example"),
    ],
)
def test_urls_lose_their_user_and_nothing_else(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked
    assert mask_credentials({"a": ({"b": text},), "c": 1}) == {"a": [{"b": masked}], "c": 1}
    assert holds_credentials(text) == ("***" in masked)


SECRETS = (
    "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "GITHUBTOKEN", "hf_token", "MY_SECRETS",
    "TOKEN_1", "TOKENS", "MYSQL_PWD", "PGPASS", "PGPASSWORD", "MYSQLPASSWORD", "SSHPASS", "DB_PASS", "REDIS_PASSWD", "GITHUB_PAT",
    "AZURE_PAT", "HF_AUTH", "PROXY_AUTHORIZATION", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CREDENTIALS", "DB_CREDENTIAL",
    "REGISTRY_CREDS", "COOKIE", "SESSION_COOKIE", "COOKIES", "SESSION", "SESSION_ID", "DJANGO_SESSIONID", "APIKEY", "OPENAI_APIKEY",
    "KEY", "KEYS", "SIGNING_JWT", "SENTRY_DSN", "SLACK_WEBHOOK_URL", "GPG_PASSPHRASE", "BEARER",
    "HUAWEICLOUD_SDK_SK", "OBS_AK", "SECRETKEY", "MINIO_ACCESSKEY", "AWS_SECRETACCESSKEY", "PRIVATEKEY", "SMTP_PW", "HF_TOKEN2", "OPENAI_KEY1",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS", "PASSCODE", "OTEL_EXPORTER_OTLP_HEADERS",
)  # fmt: skip
HARMLESS = (
    "TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "HF_TOKEN_PATH", "SSL_KEY_FILE", "KEYRING", "MONKEY", "OMP_NUM_THREADS", "PWD", "OLDPWD",
    "PATH", "PGPASSFILE", "SSH_AUTH_SOCK", "HF_HUB_ENABLE_HF_TRANSFER", "GIT_AUTHOR_NAME", "AUTH_METHOD", "PATTERN", "NCCL_PATH_DISABLE",
    "COMPASS", "BYPASS_MODE", "PASSES", "SSL_CERT_FILE", "HCCL_WHITELIST_FILE", "HCCL_WHITELIST_DISABLE", "PYTORCH_CUDA_ALLOC_CONF",
    "MAX_SESSIONS_PER_NODE_TIMEOUT", "__", "LD_LIBRARY_PATH", "DSNAME", "ASCEND_LAUNCH_BLOCKING", "MASK", "TASK_QUEUE_ENABLE", "HEADERLESS",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(name: str) -> None:
    assert names_a_secret(name)


@pytest.mark.parametrize("name", [*HARMLESS, ""])
def test_names_of_other_things(name: str) -> None:
    assert not names_a_secret(name)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("two\nlines\tand a tab, 中文 \u3000 é", "two\nlines\tand a tab, 中文 \u3000 é"),
        ("\033[31mred\033[0m \033[1;96mbright\033[m", "\033[31mred\033[0m \033[1;96mbright\033[m"),
        ("\033[2J\033]0;title\a", "\\u001b[2J\\u001b]0;title\\u0007"),
        ("\033[8mhidden", "\\u001b[8mhidden"),
        ("over\rwritten \x9b2J \x7f", "over\\u000dwritten \\u009b2J \\u007f"),
        ("turned \u202e round, no text \udc80", "turned \\u202e round, no text \\udc80"),
    ],
)
def test_a_terminal_gets_lines_and_colours_but_no_commands(text: str, printed: str) -> None:
    assert for_terminal(text) == printed


def test_json_stays_what_it_was() -> None:
    text = json.dumps({"name": "a\033[2J\x7f\x9b中"}, ensure_ascii=False)
    assert json.loads(for_terminal(text)) == json.loads(text) and for_terminal(text) != text


def test_one_line_of_another_ones_text() -> None:
    assert printable("a\n\033[31mb 中") == "a\\n\\x1b[31mb 中"


def test_a_file_has_no_colours_either_and_can_be_written() -> None:
    text = for_file("\033[31mred\033[0m\t中\n\ud800\u202e")
    assert text == "\\u001b[31mred\\u001b[0m\t中\n\\ud800\\u202e" and text.encode("utf-8")


PRINTING = ("launcher/redact.py", "launcher/cli.py", "launcher/commands/completion.py", "launcher/commands/model.py")
OF_NODES = ("launcher/doctor/node_scripts/", "launcher/run/delivery/node_scripts/")  # their output is read by the launcher


def test_only_texts_of_our_own_are_printed_without_show() -> None:
    root = Path(__file__).parents[2]
    files = [str(path.relative_to(root)) for path in (root / "launcher").rglob("*.py") if re.search(r"(?<![\w.])print\(", path.read_text())]
    assert {file for file in files if not file.startswith(OF_NODES)} == {*PRINTING}


def test_show_gives_the_terminal_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    show("a\033[2Jb", end="")
    show("c\a", file=sys.stderr)
    assert capsys.readouterr() == ("a\\u001b[2Jb", "c\\u0007\n")


def test_an_answer_of_a_model_gives_the_terminal_no_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STREAM_FILE).write_text("7\033]0;title\a", encoding="utf-8")
    with ProgressView(tmp_path, print, terminal=False) as progress:
        progress.tick()
    assert capsys.readouterr().out == "7\\u001b]0;title\\u0007\n"


def test_options_and_licences_give_the_terminal_no_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (Path(__file__).parents[2] / "conf/model/tiny_llava.yaml").read_text(encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/own.yaml").write_text(
        re.sub("^title: .*$", lambda _: 'title: "x\\e[2Jy"', model, flags=re.MULTILINE), encoding="utf-8"
    )
    words = ("--conf", str(tmp_path))
    for argv in (["options", "model", *words], ["options", "data.train", "data=files", "data.train=a\033[2Jb", *words]):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert "\\u001b[2J" in printed and "\033" not in printed
    monkeypatch.setattr("launcher.image.licence.find_text", lambda *_: ("text\033[2J", "a\awheel"))
    assert main(["licence", "show", "cann"]) == 0
    assert "text\\u001b[2J" in (printed := capsys.readouterr().out) and "\033" not in printed and "\a" not in printed
