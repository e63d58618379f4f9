"""README.zh-CN.md says what README.md says: the same headings, blocks, commands, links and figures, in the same order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FIGURE = re.compile(r"\d[\d,.]*\d|\d")
SAID_OTHERWISE = {"axis=name": "轴=名字", "key=value": "键=值"}
TEN_THOUSAND = {"0.6 million": "60 万"}  # Chinese counts in ten thousands


def outside_of_blocks(text: str) -> str:
    for english, chinese in TEN_THOUSAND.items():
        text = text.replace(english, "").replace(chinese, "")
    return BLOCK.sub("", text)


def test_blocks_are_the_same() -> None:
    assert BLOCK.findall(CHINESE) == BLOCK.findall(ENGLISH)


def test_headings_have_the_same_levels() -> None:
    levels = [[len(marks) for marks in re.findall(r"^(#+) ", outside_of_blocks(text), re.MULTILINE)] for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1] and len(levels[0]) > 8


@pytest.mark.parametrize("found", [LINK, CODE, FIGURE], ids=["links", "commands", "figures"])
def test_paragraphs_name_the_same(found: re.Pattern[str]) -> None:
    """By section and sorted: the order of words differs between the languages."""
    english, chinese = (re.split(r"^#+ .*$", outside_of_blocks(text), flags=re.MULTILINE) for text in (ENGLISH, CHINESE))
    for ours, theirs in zip(english, chinese, strict=True):
        expected = [SAID_OTHERWISE.get(name, name) for name in found.findall(LINK.sub("", ours) if found is FIGURE else ours)]
        seen = found.findall(LINK.sub("", theirs) if found is FIGURE else theirs)
        other = {"README.md": "README.zh-CN.md"}
        assert sorted(other.get(name, name) for name in seen) == sorted(other.get(name, name) for name in expected)


def test_the_translation_is_chinese() -> None:
    prose = outside_of_blocks(CHINESE)
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 700


def test_the_readme_is_short() -> None:
    assert len(ENGLISH.split()) <= 900
