"""The page at / in a real browser: image and prompt, streamed answer, stop, token. The model is a stub."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.serving.browser import CHROMIUM, REASON, Browser, browsing
from tests.trainer.serving.service import TOKEN, EchoAnswerer, png, serve

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
    echo = EchoAnswerer(pause_s=0.02)
    with serve(echo) as served:
        browser.open(f"http://127.0.0.1:{served.port}/")
        browser.wait("document.getElementById('model').textContent === 'echo'")
        assert browser.evaluate("document.getElementById('access').hidden") is True
        browser.choose_file("#image", tmp_path / "cat.png")
        browser.wait("document.getElementById('shown').naturalWidth === 64")
        fill(browser, prompt="what is <b>this</b> here")
        ask(browser)
        assert text_of(browser, "answer") == "<image> what is <b>this</b> here" and text_of(browser, "note") == ""
        assert echo.looked == [(64, 48)] and served.metrics.count("answered") == 1
        fill(browser, prompt="a b c d", most="2")
        ask(browser)
        assert text_of(browser, "answer") == "<image> a"
        fill(browser, most="100000")
        ask(browser)
        assert "400: max_tokens: must be an integer from 1 to 512" in text_of(browser, "note")
        own = [url for url in browser.addresses() if not url.startswith("data:")]
        assert own and all(url.startswith(f"http://127.0.0.1:{served.port}/") for url in own), "nothing is loaded from other hosts"
        assert not [text for text in browser.log_messages() if "Content Security Policy" in text]


def test_words_are_streamed_and_can_be_stopped(browser: Browser) -> None:
    with serve(EchoAnswerer(pause_s=0.1)) as served:
        browser.open(f"http://localhost:{served.port}/")
        fill(browser, prompt="word " * 200)
        browser.evaluate("document.getElementById('ask').click()")
        browser.wait("document.getElementById('answer').textContent.startsWith('word word')")
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait("document.documentElement.dataset.state === 'done'")
        assert len(text_of(browser, "answer").split()) < 100
        assert served.ask("next").text == "next" and served.metrics.count("gone") == 1


def test_the_page_asks_for_the_token_if_one_is_required(browser: Browser) -> None:
    with serve(EchoAnswerer(), token=TOKEN) as served:
        browser.open(f"http://127.0.0.1:{served.port}/")
        assert browser.evaluate("document.getElementById('access').hidden") is False
        fill(browser, prompt="let me in", token="wrong")
        ask(browser)
        assert "401: a token is required" in text_of(browser, "note") and text_of(browser, "answer") == ""
        fill(browser, token=TOKEN)
        ask(browser)
        assert text_of(browser, "answer") == "let me in" and text_of(browser, "note") == ""
