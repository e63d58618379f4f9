"""The page at / in a real browser: an image and a prompt in, words out as they come, a token where one is asked for. The model is a stub."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.serving.browser import CHROMIUM, REASON, Browser, browsing
from tests.trainer.serving.service import TOKEN, Echo, png, serve

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=REASON)]


@pytest.fixture
def browser(tmp_path: Path) -> Any:
    with browsing(tmp_path) as browser:
        yield browser


def fill(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.evaluate(f"document.getElementById({name!r}).value = {value!r}")


def ask(browser: Browser) -> None:
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait("document.documentElement.dataset.state === 'done'")


def text_of(browser: Browser, name: str) -> str:
    return str(browser.evaluate(f"document.getElementById({name!r}).textContent"))


def test_an_image_and_a_prompt_are_answered(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png(64, 48))
    echo = Echo(pause_s=0.02)
    with serve(echo) as served:
        browser.open(f"http://127.0.0.1:{served.port}/")
        browser.wait("document.getElementById('model').textContent === 'echo'")
        assert browser.evaluate("document.getElementById('door').hidden") is True
        browser.choose_file("#image", tmp_path / "cat.png")
        browser.wait("document.getElementById('shown').naturalWidth === 64")
        fill(browser, prompt="what is <b>this</b> here")
        ask(browser)
        assert text_of(browser, "answer") == "<image> what is <b>this</b> here" and text_of(browser, "note") == ""
        assert echo.looked == [(64, 48)] and served.meters.count("answered") == 1
        fill(browser, prompt="a b c d", most="2")
        ask(browser)
        assert text_of(browser, "answer") == "<image> a"
        fill(browser, most="100000")
        ask(browser)
        assert "400: max_tokens: can be a whole number from 1 to 512" in text_of(browser, "note")
        own = [url for url in browser.addresses() if not url.startswith("data:")]
        assert own and all(url.startswith(f"http://127.0.0.1:{served.port}/") for url in own), "nothing from elsewhere"
        assert not [said for said in browser.complaints() if "Content Security Policy" in said]


def test_words_come_one_by_one_and_can_be_stopped(browser: Browser) -> None:
    with serve(Echo(pause_s=0.1)) as served:
        browser.open(f"http://localhost:{served.port}/")
        fill(browser, prompt="word " * 200)
        browser.evaluate("document.getElementById('ask').click()")
        browser.wait("document.getElementById('answer').textContent.startsWith('word word')")
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait("document.documentElement.dataset.state === 'done'")
        assert len(text_of(browser, "answer").split()) < 100
        assert served.ask("next").text == "next" and served.meters.count("gone") == 1


def test_a_token_is_asked_for_where_there_is_one(browser: Browser) -> None:
    with serve(Echo(), token=TOKEN) as served:
        browser.open(f"http://127.0.0.1:{served.port}/")
        assert browser.evaluate("document.getElementById('door').hidden") is False
        fill(browser, prompt="let me in", token="wrong")
        ask(browser)
        assert "401: this server asks for a token" in text_of(browser, "note") and text_of(browser, "answer") == ""
        fill(browser, token=TOKEN)
        ask(browser)
        assert text_of(browser, "answer") == "let me in" and text_of(browser, "note") == ""
