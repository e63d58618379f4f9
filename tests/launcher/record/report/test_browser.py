"""The page of a report in a real browser: light and dark, on a phone, and without running anything in a record."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from tests.launcher.planted import copy_run, stretch
from tests.launcher.record.report.test_page import page_of, poisoned

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; on Debian: apt-get install chromium")]
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
TELL_WIDTH = "<script>parent.postMessage('wide ' + document.documentElement.scrollWidth, '*')</script></body>"
FRAME = "<!doctype html><title>none</title><script>onmessage = event => {{ document.title = event.data }}</script>{}"


def browse(folder: Path, page: str, *options: str) -> str:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    argv = (
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        *options,
    )
    return subprocess.run((*argv, file.as_uri()), capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = tmp_path_factory.mktemp("runs")
    long = copy_run(runs, "a", stretch(2000, loss=lambda n: 6 / n, seconds=lambda n: 0.1 + n % 7 / 100))
    return page_of(long, copy_run(runs, "b" * 90))


def test_it_is_light_or_dark_as_the_reader_wants(page: str, tmp_path: Path) -> None:
    brightness = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        browse(tmp_path, page, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,900", f"--screenshot={shot}")
        with Image.open(shot) as image:
            assert image.size == (1280, 900)
            brightness.append(ImageStat.Stat(image.convert("L")).mean[0])
    assert brightness[0] < 80 and brightness[1] > 200


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page: str, tmp_path: Path, width: int) -> None:
    """In a frame, since a window has a minimum width. The policy against scripts is removed for the script that measures."""
    (tmp_path / "inner.html").write_text(POLICY.sub("", page).replace("</body>", TELL_WIDTH), encoding="utf-8")
    frame = FRAME.format(f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe>')
    seen = browse(tmp_path, frame, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom")
    assert int(re.search(r"<title>wide (\d+)", seen)[1]) <= width  # type: ignore[index]


def test_nothing_in_a_record_is_executed(tmp_path: Path) -> None:
    """Neither with the policy nor without it."""
    evil = page_of(copy_run(tmp_path, '"><img src=x onerror=document.title=1>', poisoned))
    evil = evil.replace("alert(1)", "document.title=1")
    for text in (evil, POLICY.sub("", evil)):
        assert "<title>1</title>" not in browse(tmp_path, text, "--dump-dom")
