"""Which environment variable holds a secret, judged by its name. Standard library only."""

# A word of a variable's name, the parts between underscores, that ends with one of these: HF_TOKEN, GITHUBTOKEN, MYSQLPASSWORD.
SECRET_ENDINGS = ("TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "PASSCODE", "SECRET", "CREDENTIAL", "COOKIE",
    "APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY")  # fmt: skip
# A whole word: PAT is a personal access token of GitHub or Azure; PGPASS and SSHPASS hold passwords; a DSN or a webhook has one in its URL; AK and SK
# are the keys of Huawei Cloud, a SAS and the connection string of Azure hold one.
SECRET_WORDS = ("KEY", "SK", "AK", "PW", "SAS", "HEADER", "AUTH", "AUTHORIZATION", "PAT", "PWD", "PASS", "PGPASS", "SSHPASS", "CRED",
    "JWT", "BEARER", "SESSION", "SESSIONID", "DSN", "WEBHOOK")  # fmt: skip
SHELL_FOLDERS = ("PWD", "OLDPWD")  # whole names; the PWD of MYSQL_PWD is a password
# The last word of a name that says where or how: SSL_KEY_FILE, SSH_AUTH_SOCK, AUTH_METHOD.
HARMLESS_ENDINGS = ("FILE", "PATH", "DIR", "FOLDER", "HOME", "SOCK", "TYPE", "METHOD", "TIMEOUT")


def names_a_secret(variable: str) -> bool:
    """Whether the value of an environment variable is a secret, judged by the words of its name: NCCL_IB_PKEY is a partition of InfiniBand,
    and TOKENIZERS_PARALLELISM a switch."""
    name = variable.upper()
    words = [word for word in name.split("_") if word]
    if not words or name in SHELL_FOLDERS or words[-1].endswith(HARMLESS_ENDINGS):
        return False
    stems = {stem for word in words for stem in (word.rstrip("0123456789"), to_singular(word.rstrip("0123456789")))}
    return "CONNECTION_STRING" in name or any(stem.endswith(SECRET_ENDINGS) or stem in SECRET_WORDS for stem in stems)


def to_singular(word: str) -> str:
    """PASS is not a plural."""
    return word if word.endswith("SS") else word.removesuffix("S")
