"""The page of a report: all values are text, it needs no other file, and it is small for long runs too."""

import base64
import errno
import gc
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.cli import main
from launcher.config.schema import Bands
from launcher.errors import ConfigRefused, RunEnded
from launcher.record.report import page as report
from launcher.record.report.answers import MAX_SAMPLES, ImageBudget, choose_samples, read_picture
from launcher.record.report.figures import Line, draw_chart, label_tick, round_ticks
from launcher.record.report.page import compare_for_report, render_csv, render_html, render_markdown, write_report
from launcher.record.report.timeline import lay_out
from launcher.record.run_files import read_run_files
from tests.launcher.planted import Change, copy_run, set_value, stretch

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e{{ 7*7 }}\ud800\x00\x1b[31m|`code`'
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "section",
        "div",
        "span",
        "b",
        "i",
        "pre",
        "table",
    ),
    *("thead", "tr", "th", "td", "details", "summary", "figure", "article", "img", "ul", "li"),
    *("svg", "line", "text", "polyline", "polygon", "circle"),
}


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """`main` switches the garbage collector off for the whole process."""
    yield
    gc.enable()


def page_of(*folders: Path, unlike: bool = False) -> str:
    runs = [read_run_files(folder) for folder in folders]
    comparison, refused = compare_for_report(runs, Bands(), unlike=unlike)
    return render_html(runs, comparison, refused)


def answers(rows: list[dict[str, Any]]) -> Change:
    return lambda folder: (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def poison(data: Any) -> Any:
    """Replaces every text and every name of a record, except those that the reader depends on."""
    if isinstance(data, dict):
        return {key: value if key in ("schema", "status", "kind") else poison(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poison(item) for item in data] + ([EVIL] if data and isinstance(data[0], str) else [])
    return EVIL if isinstance(data, str) else data


def poisoned(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(poison(json.loads(path.read_text()))))
    for path in (folder / "evaluations.jsonl", folder / "samples.jsonl"):
        rows = [poison(json.loads(line)) | {EVIL: EVIL} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = {"host": EVIL, "rank": 0, "code": 1, "message": EVIL, "log": EVIL, "tail": [EVIL], "meaning": EVIL, "fix": EVIL}
    set_value("result.json", "failure", failed)(folder)
    set_value("result.json", "evaluation", {EVIL: 0.5})(folder)
    set_value("plan.json", "overrides", [EVIL])(folder)
    set_value("environment.json", "environment", {EVIL: EVIL})(folder)


def test_every_value_of_a_record_is_text(tmp_path: Path) -> None:
    evil = copy_run(tmp_path, '"><img src=x onerror=alert(1)>', poisoned)
    page = page_of(evil, copy_run(tmp_path, "good"), unlike=True)
    seen = Page(page)
    assert seen.tags <= TAGS, seen.tags - TAGS
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("href", "srcset", "xlink:href", "action")]
    assert all(value.startswith("data:image/") for value in seen.values("src"))
    assert "<script>alert(1)</script>" in "".join(seen.words), "it is there, as text"
    assert "{{ 7*7 }}" in "".join(seen.words) and "\x00" not in page and "\x1b" not in page
    page.encode("utf-8")


def test_markdown_and_rows_of_a_hostile_record(tmp_path: Path) -> None:
    runs = [read_run_files(copy_run(tmp_path, "=cmd|' `x`", poisoned))]
    text = render_markdown(runs, None, "")
    outside = re.sub(r"(`{3,})\n.*?\n\1|(`+) .*? \2(?!`)|`[^`\n]+`", "", text, flags=re.DOTALL)
    assert "<script" not in outside and "<script" in text and "\x00" not in text
    rows = render_csv(runs).splitlines()
    assert rows[1].startswith("'=cmd") and len(rows) == 4


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page = page_of(copy_run(tmp_path, "r"))
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert {"link", "script", "iframe"} & Page(page).tags == set()
    assert page == page_of(tmp_path / "r"), "the same record, the same page"


def test_the_page_shows_the_important_values(tmp_path: Path) -> None:
    page = page_of(copy_run(tmp_path, "r"))
    words = "".join(Page(page).words)
    for wanted in ("finished", "3 of 3", "loss", "learning rate", "samples per second", "memory, GiB", "localhost", "Which digit is this?"):
        assert wanted in words, wanted
    assert "torch.distributed.run" in words and "OMP_NUM_THREADS" in words and "2.13.0+cpu" in words
    assert page.count('class="chart"') == 4


def test_several_runs_have_one_chart_each_line_and_a_verdict(tmp_path: Path) -> None:
    other = copy_run(tmp_path, "b", set_value("plan.json", "config.run.seed", 2))
    page = page_of(copy_run(tmp_path, "a"), other)
    assert page.count('class="chart"') == 4 and page.count("<polyline") == 8
    assert "config.run.seed" in page and ">different<" in page
    unlike = copy_run(tmp_path, "c", set_value("plan.json", "config.model.name", "other"))
    assert "two experiments" in page_of(tmp_path / "a", unlike), "side by side, and why there is no verdict"


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "environment.json", "data.json", "source.json", "samples.jsonl"])
def test_a_damaged_record_is_shown_as_damaged(tmp_path: Path, name: str) -> None:
    gone = copy_run(tmp_path / "a", "r")
    (gone / name).unlink()
    half = copy_run(tmp_path / "b", "r")
    (half / name).write_bytes((half / name).read_bytes()[:-20])
    assert "the record is damaged" in page_of(half)
    assert "r" in page_of(gone)


def test_a_run_without_rows_or_record(tmp_path: Path) -> None:
    folder = copy_run(tmp_path, "r")
    for name in ("result.json", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "environment.json", "train_result.json"):
        (folder / name).unlink()
    words = "".join(Page(page_of(folder)).words)
    assert "no record yet" in words and "No node has ended yet" in words


# ------------------------------------------------------------------------------------------------------------------ charts


def test_a_chart_of_100_000_steps_is_small_and_has_its_spike() -> None:
    values = [2 + math.sin(step / 900) for step in range(100_000)]
    values[50_123] = 9.0
    chart = draw_chart("loss", [Line(label="r", steps=range(100_000), values=values, colour=0)], from_zero=False)
    assert len(chart) < 25_000
    heights = [float(point.split(",")[1]) for point in re.search(r'polygon[^>]*points="([^"]+)"', chart)[1].split()]  # type: ignore[index]
    assert min(heights) < 35, "the spike is there: the highest mean of a bucket would be at 157"


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_nothing_to_draw_is_no_chart(values: list[float]) -> None:
    assert draw_chart("loss", [Line(label="r", steps=range(len(values)), values=values, colour=0)], from_zero=False) == ""


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-300, 2e-300], [1e300, -1e300], [5.0, 5.0, 5.0], [-3.0]])
def test_any_numbers_have_a_chart(values: list[float]) -> None:
    chart = draw_chart("x", [Line(label="r", steps=range(1, len(values) + 1), values=values, colour=9)], from_zero=True)
    assert "nan" not in chart and "inf" not in chart and chart.count("<text") >= 3


def test_ticks_are_round() -> None:
    assert round_ticks(0.0, 6.0) == [0, 2, 4, 6] and len(round_ticks(0.13, 0.17)) <= 6
    assert [label_tick(value) for value in (0.0, 2.5, 12000.0, 5e-5, 2e6)] == ["0", "2.5", "12k", "5e-5", "2e6"]


# ---------------------------------------------------------------------------------------------------------------- pictures


def picture(path: Path, size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> Path:
    Image.new(mode, size).save(path, kind)
    return path


def test_pictures_are_scaled(tmp_path: Path) -> None:
    found = read_picture(picture(tmp_path / "a.png", (3000, 1500)), "a")
    with Image.open(io.BytesIO(base64.b64decode(found.data.partition(",")[2]))) as small:
        assert small.size == (160, 80)
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        assert read_picture(picture(tmp_path / f"{mode[0]}.tif", (8, 8), mode, "TIFF"), "b").data.startswith("data:image/png"), mode


def test_without_pillow_small_ones_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = picture(tmp_path / "s.png", (8, 8)), picture(tmp_path / "l.bmp", (300, 300), kind="BMP")
    monkeypatch.setattr("launcher.record.report.answers.scale", lambda content: None)
    assert read_picture(small, "s").data.startswith("data:image/png;base64,") and read_picture(large, "l").missing


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\nbroken", b"root:x:0:0"])
def test_a_file_that_is_not_an_image_is_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    found = read_picture(tmp_path / "x.png", "x.png")
    assert found.data == "" and found.missing


@pytest.mark.parametrize("name", ["/dev/zero", "none.png", "a\0b", "n" * 5000, "."])
def test_an_image_that_does_not_exist(tmp_path: Path, name: str) -> None:
    assert read_picture(tmp_path / name, name).missing


def test_metrics_and_the_answers_of_a_base_are_shown(tmp_path: Path) -> None:
    """Answers that are worse than the base come first. Invalid scores and changes are left out."""
    answered = {"got": "eight", "match": False, "scores": {"anls": 0.2}}
    rows = [
        {"row": 1, "prompt": "p", "expected": "7", "got": "1", "match": False, "base": {**answered, "change": "same"}},
        {
            "row": 2,
            "prompt": "p",
            "expected": "7",
            "got": "7",
            "match": True,
            "scores": {"rouge_l": 0.75, "x": "y"},
            "base": {**answered, "change": "worse"},
        },
        {"row": 3, "prompt": "p", "expected": "7", "got": "7", "match": True, "base": {"change": EVIL}, "scores": EVIL},
        {"row": 4, "prompt": "p", "expected": "7", "got": "7", "match": True, "base": EVIL, "scores": {"a" * 999: 1, EVIL: True}},
    ]
    folder = copy_run(tmp_path, "r", answers(rows))
    shown = choose_samples(read_run_files(folder), ImageBudget())
    assert [(one.row, one.base, one.change) for one in shown] == [
        ("2", "eight", "worse"),
        ("1", "eight", "same"),
        ("3", "", ""),
        ("4", "", ""),
    ]
    assert [one.scores for one in shown] == ["rouge l 0.75", "", "", "a" * 40 + " 1"]
    page = render_html([read_run_files(folder)], None, "")
    for wanted in ("this is worse", "base: eight", "rouge l 0.75"):
        assert wanted in page


def test_answers_are_bounded_and_wrong_ones_come_first(tmp_path: Path) -> None:
    rows = [
        {"row": n, "prompt": "p" * 9000, "expected": "1", "got": "1", "match": n % 100 != 0, "images": ["a.png"] * 9} for n in range(1, 301)
    ]
    run = read_run_files(copy_run(tmp_path, "r", answers(rows), set_value("plan.json", "spec.data.root", str(tmp_path))))
    picture(tmp_path / "a.png", (8, 8))
    shown = choose_samples(run, ImageBudget())
    assert [sample.row for sample in shown[:3]] == ["100", "200", "300"] and len(shown) == MAX_SAMPLES
    assert len(shown[0].pictures) == 4 and len(shown[0].prompt) < 2100 and shown[0].pictures[0].data
    odd = read_run_files(copy_run(tmp_path, "odd", answers([{"row": None, "images": "x", "got": [1], "match": "yes"}, {}])))
    assert [(sample.got, sample.match) for sample in choose_samples(odd, ImageBudget())] == [("[1]", False), ("", False)]


def test_the_pictures_of_a_page_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.record.report.answers.MAX_PAGE_BYTES", 100)
    album = ImageBudget()
    found = [album.take(picture(tmp_path / f"{n}.png", (8, 8)), str(n)) for n in range(3)]
    assert [bool(one.data) for one in found] == [True, False, False] or sum(len(one.data) for one in found) < 500


# ---------------------------------------------------------------------------------------------------------------- timeline


def node(host: str, rank: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"host": host, "node_rank": rank, "code": 0, "seconds": seconds, "killed": False, "lost": False, "left": ""} | more


def failed(host: str, message: str) -> dict[str, Any]:
    return {
        "host": host,
        "rank": 2,
        "code": 1,
        "message": message,
        "log": "",
        "tail": ["the last line"],
        "meaning": "",
        "fix": "free memory",
    }


def test_attempts_and_failures_are_at_their_times(tmp_path: Path) -> None:
    def two_attempts(folder: Path) -> None:
        (folder / "attempts/1").mkdir(parents=True)
        first = {
            "number": 1,
            "started_at": "2026-11-21T18:12:40.367+00:00",
            "seconds": 30.0,
            "steps": 1,
            "nodes": [node("a", 0, 30.0, killed=True, code=-9), node("b", 1, 25.0, code=1)],
            "failure": failed("b", "out of memory"),
        }
        (folder / "attempts/1/attempt.json").write_text(json.dumps(first))
        set_value("result.json", "nodes", [node("a", 0, 40.0), node("spare", 1, 40.0)])(folder)
        set_value("result.json", "seconds", 100.0)(folder)

    run = read_run_files(copy_run(tmp_path, "r", two_attempts))
    found = lay_out(run)
    bars = {host: [(bar.attempt, round(bar.begin_s), bar.seconds, bar.end) for bar in row] for host, row in found.rows}
    assert bars == {
        "a": [(1, 10, 30.0, "killed"), (2, 60, 40.0, "ended")],
        "b": [(1, 10, 25.0, "failed")],
        "spare": [(2, 60, 40.0, "ended")],
    }
    assert found.failures == ("attempt 1: rank 2 on b failed first: out of memory\nwhat to do: free memory\nthe last line",)
    page = page_of(tmp_path / "r")
    assert 'class="killed"' in page and "out of memory" in page and "left:60.0%;width:40.0%" in page


# ----------------------------------------------------------------------------------------------------------------- writing


def test_an_existing_report_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_report("one", path, replace=False)
    with pytest.raises(ConfigRefused, match=r"exists already.*--replace"):
        write_report("two", path, replace=False)
    assert path.read_text() == "one"
    write_report("two", path, replace=True)
    assert path.read_text() == "two"


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunEnded, match=r"could not be written to .*No space left on device.*--out FILE"):
        write_report("new", path, replace=True)
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(tmp_path / "runs", "a", stretch(40, loss=lambda n: 1 / n, seconds=lambda n: 0.1))
    copy_run(tmp_path / "runs", "b", stretch(40, loss=lambda n: 1 / n, seconds=lambda n: 0.1 / 0.9))
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "a", "b"]) == 0 and "verdict: same" in capsys.readouterr().out
    assert main(["compare", "a", str(tmp_path / "runs/b"), "--band", "throughput=0.05"]) == 7
    assert "outside the stated band" in capsys.readouterr().out
    assert main(["compare", "a", "b", "--json"]) == 0 and json.loads(capsys.readouterr().out)["outcome"] == "same"
    assert main(["report", "a", "b"]) == 0 and (tmp_path / "report-a-and-1-more.html").stat().st_size > 20_000
    assert main(["report", "a", "b"]) == 2 and "exists already" in capsys.readouterr().err
    plain = copy_run(tmp_path / "runs", "q")
    planted = copy_run(tmp_path / "runs", "p", set_value("environment.json", "packages.numpy", "0.1"))
    for words, verdict in (((), "verdict: different"), (("--allow", "environment.packages.numpy"), "verdict: equivalent")):
        assert main(["report", str(plain), str(planted), "--markdown", "--out", "-", *words]) == 0 and verdict in capsys.readouterr().out
    assert main(["report", "a", "--csv", "--out", "-"]) == 0 and capsys.readouterr().out.count("\na,") == 40
    assert main(["report", "a", "--markdown"]) == 0 and (tmp_path / "report-a.md").read_text().startswith("# `a`")
    for words, said in (
        (["compare", "a"], "name at least 2 runs"),
        (["compare", "a", "a"], "named twice"),
        (["compare", "a", "c"], "there is no run 'c'"),
        (["compare", "a", "b", "--band", "los=1"], "did you mean 'loss'"),
        (["compare", "a", "b", "--band", "loss=-1"], "is not a share"),
        (["compare", "a", "b", "--allow", "hardwear"], "did you mean 'hardware'"),
        (["report", "./nowhere/"], "is not the folder of a run"),
    ):
        assert main(words) == 2 and said in capsys.readouterr().err, words
    assert report.TEMPLATE.is_file()
