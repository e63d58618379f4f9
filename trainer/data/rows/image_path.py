"""Paths of images that are written otherwise than the file is named: Windows paths, file:// addresses, percent encoding, another case.

Only where no file is at the path as it is written. A form counts if it leads to exactly one file, and a relative path stays below its folder.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from trainer.data.media.folder_listing import list_folder
from trainer.data.rows.parsed_row import ImageReference, ParsedRow

DRIVE = re.compile(r"/?(?P<letter>[A-Za-z]):[/\\](?P<rest>.*)", re.DOTALL)
ABSOLUTE = ("/", "\\", "~", "file:")
ADDRESSES = ("http://", "https://", "data:")  # not files (trainer.data.rows.row_check)
READ = "path of an image, read"
OTHER_CASE = "in another case or Unicode form"
OWN_NAME = "without the name of the folder at its beginning"


@dataclass(frozen=True, kw_only=True)
class PathForm:
    """`change`: a path as it is written -> the path that it may mean; unchanged where the form does not fit."""

    name: str
    change: Callable[[str], str]


def path_text(name: str) -> str:
    return name.removeprefix("file://")


def read_address(text: str) -> str:
    """file:///a/b, file://host/a/b and file:/a/b -> /a/b (RFC 8089)."""
    if text[:5].lower() != "file:":
        return text
    rest = text[5:]
    return f"/{rest[2:].partition('/')[2]}" if rest.startswith("//") else rest


def read_mount(text: str) -> str:
    """C:/a/b -> /mnt/c/a/b, where the Linux of Windows (WSL) has it."""
    found = DRIVE.fullmatch(text)
    return f"/mnt/{found['letter'].lower()}/{found['rest']}" if found else text


def read_home(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~/") else text


FORMS = (
    PathForm(name="without the spaces around it", change=str.strip),
    PathForm(name="as the path of its file:// address", change=read_address),
    PathForm(name="with percent encoding decoded", change=lambda text: unquote(text, errors="surrogateescape")),
    PathForm(name="with back slashes as slashes", change=lambda text: text.replace("\\", "/")),
    PathForm(name="in the home folder", change=read_home),
    PathForm(name="on the drive below /mnt", change=read_mount),
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A path that may be meant, and the forms that lead to it. `strange`: a path with a drive or a server, which Linux does not have."""

    text: str
    forms: tuple[str, ...] = ()
    strange: bool = False


def find_images(parsed: ParsedRow, folder: Path) -> tuple[ParsedRow, tuple[str, ...]]:
    """The row with the paths of the files that are there, and the forms in which they were read, for its adjustments."""
    if not parsed.images:
        return parsed, ()
    found = [find_image(image, folder) for image in parsed.images]
    changes = tuple(dict.fromkeys(change for _, change in found if change))
    return replace(parsed, images=tuple(image for image, _ in found)), changes


def find_image(image: ImageReference, folder: Path) -> tuple[ImageReference, str]:
    """The image, whose name is the path of the file if it was found in another form; and how it was read, '' as it is written."""
    if not isinstance(image.name, str) or not image.name or image.name.startswith(ADDRESSES):
        return image, ""
    if is_there(folder / path_text(image.name)):
        return ImageReference(name=image.name, field=image.field, exists=True), ""
    readings = list_readings(image.name, folder)
    exact = {str(folder / each.text): each for each in reversed(readings) if is_there(folder / each.text)}
    found = exact or {
        path: replace(each, forms=(*each.forms, OTHER_CASE)) for each in reversed(readings) for path in match(folder, each.text)
    }
    if len(found) != 1:
        return image, ""
    ((path, reading),) = found.items()
    return replace(image, name=path, exists=True), f"{READ} {' and '.join(reading.forms)}"


def list_readings(name: str, folder: Path) -> tuple[Reading, ...]:
    """All that the path may mean, that with the fewest changes first."""
    text, forms = name, tuple[str, ...]()
    strange = name.strip().startswith("\\\\") or DRIVE.fullmatch(name.strip()) is not None
    found = [Reading(text=path_text(name), strange=strange)]
    for form in FORMS:
        changed = form.change(text)
        if changed != text:
            strange = strange or DRIVE.fullmatch(changed) is not None
            text, forms = changed, (*forms, form.name)
            found.append(Reading(text=text, forms=forms, strange=strange))
    found += [shorter for each in found for shorter in drop_own_name(each, folder)]
    return tuple(each for each in found if may_lead(each.text, name, folder))


def drop_own_name(reading: Reading, folder: Path) -> Iterator[Reading]:
    """Without the end of the folder's path, where the path begins with it: images/a.png in the folder images. Of a path with a drive or a
    server, what comes after the name of the folder."""
    parts, own = PurePosixPath(reading.text).parts, folder.parts
    for count in range(1, len(parts)):
        fits = parts[count - 1] == folder.name if reading.strange else parts[:count] == own[-count:]
        if fits and own:
            yield replace(reading, text="/".join(parts[count:]), forms=(*reading.forms, OWN_NAME))


def may_lead(text: str, written: str, folder: Path) -> bool:
    """Whether a form may lead there: an absolute path only where one is written, a relative path only below the folder, and `..` never where
    none is written."""
    if text.startswith("/"):
        absolute = written.strip().lower().startswith(ABSOLUTE) or DRIVE.fullmatch(written.strip()) is not None
        return absolute and (".." not in text.split("/") or ".." in re.split(r"[/\\]", written))
    below, root = os.path.normpath(folder / text), os.path.normpath(folder)
    return below.startswith(root.rstrip("/") + "/")


def is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or a null byte
        return False


# --------------------------------------------------------------------------------------------------- case, Unicode, hints


def match(folder: Path, text: str) -> tuple[str, ...]:
    """The file below the folder whose path differs only in case and Unicode form: one path, or none if there are several or none."""
    at = folder
    for part in below(folder, text):
        names = list_folder(at).like(part)
        if len(names) != 1:
            return ()
        at /= names[0]
    return (str(at),) if at != folder and is_there(at) else ()


def below(folder: Path, text: str) -> tuple[str, ...]:
    """The parts of a path below the folder; none for another one."""
    path = PurePosixPath(text)
    if path.is_absolute():
        path = PurePosixPath(path.relative_to(folder)) if path.is_relative_to(folder) else PurePosixPath()
    return () if ".." in path.parts else path.parts


def suggest(name: str, folder: Path) -> str:
    """A file near the path, for the message about a missing image; '' if there is none."""
    readings = list_readings(name, folder)
    at = folder
    for part in below(folder, readings[-1].text) if readings else ():
        names = list_folder(at).like(part)
        nearest = names[0] if names else list_folder(at).nearest(part)
        if not nearest:
            return ""
        at /= nearest
    return str(at.relative_to(folder)) if is_there(at) else ""
