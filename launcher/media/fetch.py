"""`omnilaunch data fetch`: the images that the rows of a file name by URL into a folder, and the rows with paths into it.

The folder has `images/HASH.png`, the rows under the name of their file, and fetched_images.json: URL -> hash, size, type. A second run downloads
what is missing. The user's file is only read.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import ConfigRefused
from launcher.media.row_url import KEYS, find_urls, is_url, replace_images
from launcher.media.web_image import FetchedImage, Limits, NotFetched, fetch_image
from trainer.contract import SpecError, decode, write_text
from trainer.contract.annotation_file import first_letter, is_list

MANIFEST = "fetched_images.json"
IMAGES = "images"
ATTEMPTS, PAUSE_S = 3, 1.0
SAVED_EVERY_S = 5.0
MOST_PATH = 4096
ENDINGS = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class Fetching:
    """`most_total_bytes`: that this run downloads. `keys`: at which rows have images."""

    limits: Limits = field(default_factory=Limits)
    most_total_bytes: int = 200 * 2**30
    jobs: int = 8
    keys: frozenset[str] = KEYS


@dataclass(frozen=True, kw_only=True)
class FetchResult:
    """`failed`: (row, URL, reason). `kept`: images that were here already."""

    rows: int
    images: int
    fetched: int
    kept: int
    bytes: int
    written: Path
    failed: tuple[tuple[int, str, str], ...] = ()


def fetch_rows(file: Path, folder: Path, options: Fetching, say: Callable[[str], None] = print) -> FetchResult:
    """Raises ConfigRefused for a file that cannot be read, and for a folder in which something else has the name of what is written."""
    rows = read_rows(file)
    target = folder / file.name
    manifest = read_manifest(folder)
    refuse_other(file, target, folder)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    urls = tuple(dict.fromkeys(url for _, row in rows for url in find_urls(row, options.keys)))
    have = {url: image for url in urls if (image := manifest.get(url)) and is_whole(folder, image)}
    new, failed, received = Downloads(folder, manifest | have, options, say).get([url for url in urls if url not in have])
    found = have | new
    written = [(number, replace_images(row, lambda text: place_of(text, found, file), options.keys)) for number, row in rows]
    write_rows(target, [row for _, row in written], listed=is_list(file, first_letter(file)))
    lacking = tuple(
        (number, url, failed[url]) for number, row in rows for url in dict.fromkeys(find_urls(row, options.keys)) if url in failed
    )
    return FetchResult(rows=len(rows), images=len(urls), fetched=len(new), kept=len(have), bytes=received, written=target, failed=lacking)


def place_of(text: str, found: Mapping[str, FetchedImage], file: Path) -> str:
    """What a row names in place of an image: a fetched one by its path in the folder, a local one by its whole path."""
    if image := found.get(text.strip()):
        return f"{IMAGES}/{name_of(image)}"
    with suppress(OSError, ValueError):  # a text that cannot be a path: base64, a NUL
        if not is_url(text) and len(text) < MOST_PATH and (file.parent / text).is_file():
            return str((file.parent / text).absolute())
    return text


def name_of(image: FetchedImage) -> str:
    return f"{image.sha256}.{image.kind}"


class Downloads:
    """Some at a time, in threads. The manifest is written as they arrive."""

    def __init__(self, folder: Path, manifest: Mapping[str, FetchedImage], options: Fetching, say: Callable[[str], None]) -> None:
        self.folder, self.options, self.say = folder, options, say
        self.manifest, self.failed = dict(manifest), dict[str, str]()
        self.received, self.lock, self.saved_at = 0, threading.Lock(), time.monotonic()

    def get(self, urls: list[str]) -> tuple[dict[str, FetchedImage], dict[str, str], int]:
        """(the images that arrived, why the others did not, bytes)."""
        waiting, stopped, failures = iter(enumerate(urls)), threading.Event(), list[Exception]()

        def work() -> None:
            """Until none is left, or one of the threads has failed."""
            while not stopped.is_set():
                with self.lock:
                    each = next(waiting, None)
                if each is None:
                    return
                try:
                    self.get_one(each)
                except Exception as error:
                    failures.append(error)
                    stopped.set()

        threads = [threading.Thread(target=work, name="fetch", daemon=True) for _ in range(max(1, min(self.options.jobs, len(urls))))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stopped.set()
            write_manifest(self.folder, self.manifest)
        for error in failures[:1]:
            if isinstance(error, OSError):
                advice = "What arrived is kept: free disk space, and run the command again"
                raise ConfigRefused(f"{self.folder}: {error.strerror}. {advice}") from error
            raise error
        return {url: self.manifest[url] for url in urls if url in self.manifest and url not in self.failed}, self.failed, self.received

    def get_one(self, numbered: tuple[int, str]) -> None:
        number, url = numbered
        part = self.folder / IMAGES / f".{os.getpid()}-{number}.part"
        try:
            image = self.try_often(url, part)
            part.replace(self.folder / IMAGES / name_of(image))
        except NotFetched as error:
            with self.lock:
                self.failed[url] = str(error)
        else:
            with self.lock:
                self.manifest[url] = image
                self.report()
        finally:
            part.unlink(missing_ok=True)

    def try_often(self, url: str, part: Path) -> FetchedImage:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return fetch_image(url, part, self.options.limits, self.take)
            except NotFetched as error:
                if not error.passing or attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE_S * attempt)
        raise AssertionError

    def take(self, count: int) -> None:
        with self.lock:
            self.received += count
            if self.received > self.options.most_total_bytes:
                raise NotFetched(f"the limit of {self.options.most_total_bytes:,} bytes of this run is reached (--max-total-bytes)")

    def report(self) -> None:
        if time.monotonic() - self.saved_at >= SAVED_EVERY_S:
            self.saved_at = time.monotonic()
            write_manifest(self.folder, self.manifest)
            self.say(f"{len(self.manifest):,} images here, {self.received / 1e6:,.0f} MB fetched, {len(self.failed):,} failed")


# --------------------------------------------------------------------------------------------------------------- files


def read_rows(file: Path) -> list[tuple[int, Any]]:
    """(number, row). Raises ConfigRefused."""
    if file.suffix.lower() not in ENDINGS:
        raise ConfigRefused(
            f"{file}: rows are fetched from JSON lists and JSON Lines ({', '.join(ENDINGS)}); write its rows to such a file"
        )
    try:
        return list(stream_rows(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigRefused(
            f"{file} cannot be read: {reason}. Check it first: omnilaunch data check data=files data.train={file}"
        ) from error


def stream_rows(file: Path) -> Iterator[tuple[int, Any]]:
    if is_list(file, first_letter(file)):
        yield from enumerate(json.loads(file.read_text(encoding="utf-8-sig")), start=1)
        return
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        yield from ((number, json.loads(line)) for number, line in enumerate(opened, start=1) if line.strip())


def write_rows(target: Path, rows: list[Any], *, listed: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text("[\n" + ",\n".join(lines) + "\n]\n" if listed else "".join(f"{line}\n" for line in lines), target)


def refuse_other(file: Path, target: Path, folder: Path) -> None:
    """Raises ConfigRefused. A file in the folder is ours if its manifest is there."""
    if target.exists() and (target.samefile(file) or not (folder / MANIFEST).is_file()):
        raise ConfigRefused(f"{target} exists, and this command has not written it. Take another folder: --to FOLDER")


def read_manifest(folder: Path) -> dict[str, FetchedImage]:
    """{} for none, and without entries that are damaged: their images are fetched again."""
    found: dict[str, FetchedImage] = {}
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        for url, entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["images"].items():
            with suppress(SpecError):
                found[url] = decode(FetchedImage, entry)
    return found


def write_manifest(folder: Path, images: Mapping[str, FetchedImage]) -> None:
    listed = {url: asdict(image) for url, image in sorted(images.items())}
    write_text(json.dumps({"images": listed}, indent=1, ensure_ascii=False) + "\n", folder / MANIFEST)


def is_whole(folder: Path, image: FetchedImage) -> bool:
    path = folder / IMAGES / name_of(image)
    return image.kind.isalnum() and image.sha256.isalnum() and path.is_file() and path.stat().st_size == image.bytes
