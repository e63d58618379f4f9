"""What is taken for a credential, and what is left when it is masked."""

import pytest

from launcher.redact import holds_credentials, mask_credentials, names_a_secret


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


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "GITHUBTOKEN", "hf_token", "MY_SECRETS", "TOKEN_1"]
)
def test_names_of_secrets(name: str) -> None:
    assert names_a_secret(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "HF_TOKEN_PATH", "SSL_KEY_FILE", "KEYRING", "MONKEY", "OMP_NUM_THREADS", ""]
)
def test_names_of_other_things(name: str) -> None:
    assert not names_a_secret(name)
