"""The licences of software inside the images, and which of them this user has accepted: once, for all commands on this machine.

An acceptance names what was accepted by a SHA-256. Where that changes, the licence has to be accepted again. The file of acceptances belongs
to the user: `$XDG_CONFIG_HOME/omnilaunch/licences.json`, or below ~/.config.
"""

import fcntl
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from launcher.errors import SHORTEST, ConfigRefused, suggest
from trainer.contract import SpecError, decode

TABLE = Path(__file__).with_name("licences.yaml")
STORE = "omnilaunch/licences.json"
STORE_SCHEMA = 1
OVERRIDE = "cluster.delivery.accept_licence=true"


@dataclass(frozen=True, kw_only=True)
class ImageLicence:
    """A row of licences.yaml, which explains the fields."""

    name: str
    column: str
    title: str
    url: str
    text_sha256: str
    packages: tuple[str, ...]
    file: str
    source: str

    @property
    def sha256(self) -> str:
        """Identifies what a user accepts."""
        return sha256("\n".join((self.name, self.title, self.url, self.text_sha256)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """That a licence was accepted: who did it where and when (ISO 8601), and what it was then."""

    title: str
    sha256: str
    accepted_at: str
    user: str
    host: str


@dataclass(frozen=True, kw_only=True)
class AcceptedLicence:
    """How the licence of a plan's image was accepted. `how`: the command or the override; `accepted_at`: '' for an override."""

    name: str
    sha256: str
    how: str
    accepted_at: str = ""

    @property
    def is_stored(self) -> bool:
        """Whether it is an acceptance of the user who made the plan, and not part of the command."""
        return self.how != OVERRIDE


@cache
def load_licences() -> dict[str, ImageLicence]:
    import yaml

    rows = yaml.load(TABLE.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: decode(ImageLicence, {"name": name, **row}, name) for name, row in rows.items()}


def find_licence(name: str) -> ImageLicence:
    """Raises ConfigRefused for an unknown name."""
    licences = load_licences()
    if name not in licences:
        texts = {known: f"{licence.title} {licence.column}".lower() for known, licence in licences.items()}
        meant = [known for known, text in texts.items() if len(name) > SHORTEST and name.lower() in text]
        hint = f"did you mean {meant[0]!r} ({licences[meant[0]].title})? valid are: {', '.join(licences)}" if len(meant) == 1 else ""
        raise ConfigRefused(f"unknown licence {name!r}; {hint or suggest(name, licences)}")
    return licences[name]


def licence_of(column: str) -> ImageLicence | None:
    """The licence that a row of versions.yaml names; None for a text that the table does not have, as in the tables of other commits."""
    return next((licence for licence in load_licences().values() if licence.column == column), None)


def how_to_accept(column: str) -> str:
    """The commands that show and accept the licence, as the end of a sentence."""
    licence = licence_of(column)
    if licence is None:
        return "read the licence, and accept it"
    return f"read it (omnilaunch licence show {licence.name}), and accept it once: omnilaunch licence accept {licence.name}"


# ---------------------------------------------------------------------------------------------------------- acceptances


def store_path(environ: Mapping[str, str]) -> Path:
    """As the XDG Base Directory Specification says: a relative path in the variable is ignored."""
    folder = environ.get("XDG_CONFIG_HOME", "")
    return (Path(folder) if folder.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".config") / STORE


def read_acceptances(path: Path) -> dict[str, Acceptance]:
    """By the name of the licence, of any version of it. Raises ConfigRefused for a file that cannot be read; it is left as it is."""
    return {name: read_entry(name, entry, path) for name, entry in read_store(path)["accepted"].items()}


def valid_acceptance(licence: ImageLicence, path: Path) -> Acceptance | None:
    """The acceptance of exactly this licence; None where it was not accepted, or has changed since. Raises ConfigRefused."""
    found = read_acceptances(path).get(licence.name)
    return found if found and found.sha256 == licence.sha256 else None


def read_store(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"schema": STORE_SCHEMA, "accepted": {}}
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from error
    if not isinstance(data, dict) or not isinstance(data.get("accepted"), dict):
        raise unreadable(path, "it has no object `accepted`")
    if data.get("schema") != STORE_SCHEMA:
        raise unreadable(path, f"its schema is {data.get('schema')!r}, and this version reads {STORE_SCHEMA}")
    return data


def read_entry(name: str, entry: Any, path: Path) -> Acceptance:
    try:
        found: Acceptance = decode(Acceptance, entry, f"accepted.{name}")
    except SpecError as error:
        raise unreadable(path, str(error)) from error
    return found


def unreadable(path: Path, why: str) -> ConfigRefused:
    return ConfigRefused(
        f"{path}, the licences that you have accepted, cannot be read: {why}. Nothing was changed. Repair the file; or move it away "
        f"({shlex.join(('mv', str(path), f'{path}.broken'))}), and accept again: omnilaunch licence accept NAME"
    )


def accept(licence: ImageLicence, path: Path, *, at: str, user: str, host: str) -> Acceptance:
    """Add the acceptance to the file, which only its owner may read. Raises ConfigRefused where the file cannot be read or written."""
    made = Acceptance(title=licence.title, sha256=licence.sha256, accepted_at=at, user=user, host=host)
    change_store(path, lambda accepted: {**accepted, licence.name: asdict(made)})
    return made


def withdraw(name: str, path: Path) -> bool:
    """Whether there was an acceptance to remove. Raises ConfigRefused."""
    if name not in read_store(path)["accepted"]:
        return False
    change_store(path, lambda accepted: {key: value for key, value in accepted.items() if key != name})
    return True


def change_store(path: Path, change: Any) -> None:
    """Under a lock, so that two commands at once lose nothing; written completely or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = read_store(path)
            replace_private(path, {**data, "accepted": change(data["accepted"])})
    except OSError as error:
        raise ConfigRefused(
            f"{path} cannot be written: {error.strerror}. Nothing was changed. XDG_CONFIG_HOME names another folder"
        ) from error


def replace_private(path: Path, data: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- text


def find_text(licence: ImageLicence, wheelhouses: Iterable[Path]) -> tuple[str, str] | None:
    """(the text, where it was found): in a package of this interpreter, or in a wheel below one of the folders. None where there is none."""
    from importlib.metadata import PackageNotFoundError, distribution

    names = [package.partition("==")[0] for package in licence.packages]
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for path in found.files or ():
            if path.name == licence.file and ".dist-info" in path.as_posix():
                return Path(str(path.locate())).read_text(encoding="utf-8"), f"{name} {found.version} of this interpreter"
    patterns = [f"{name.replace('-', '_')}-*.whl" for name in names]
    wheels = (wheel for folder in wheelhouses for pattern in patterns for wheel in sorted(folder.rglob(pattern)))
    return next(filter(None, (read_wheel(wheel, licence.file) for wheel in wheels)), None)


def read_wheel(wheel: Path, name: str) -> tuple[str, str] | None:
    import zipfile

    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((each for each in archive.namelist() if ".dist-info/" in each and each.rpartition("/")[2] == name), None)
            return (archive.read(inside).decode(), str(wheel)) if inside else None
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError):
        return None  # half a download: there may be another
