"""The chat page in headless Chromium, against a real server over the engine without a model."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import ENTER, ESCAPE, SHIFT, Browser, browser
from tests.serving.conftest import until

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="apt-get install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """One browser for all tests of the page."""
    with browser() as opened:
        yield opened


@pytest.fixture
def page(window: Browser, start_server: Any) -> Browser:
    """The page of a server with a base and an adapter that answers slowly enough to be stopped."""
    server = start_server(
        engine={"rows": 4, "pace_s": 0.01, "context_tokens": 8192, "adapters": ["shop-assistant"]},
        config={"limits": {"new_tokens": 60}},
    )
    window.resize(1000, 760)
    window.scheme("light")
    window.open(server.url)
    window.run("localStorage.clear()")
    window.open(server.url)
    until(lambda: window.texts("#left option") == ["base", "shop-assistant"])
    window.complaints()
    return window


def picture(page: Browser, name: str) -> None:
    """Keep a screenshot where the variable PICTURES names a directory."""
    if folder := os.environ.get("PICTURES"):
        page.picture(Path(folder) / f"{name}.png")


def done(page: Browser) -> bool:
    """Return whether no answer is under way."""
    return page.texts("#go") == ["Send"] and not page.texts(".text.running")


def ask(page: Browser, text: str) -> None:
    """Type a message and press Enter."""
    page.type("#prompt", text + ENTER)


def test_answer_streams_and_shows_its_rate(page: Browser) -> None:
    picture(page, "empty")
    assert page.run("return document.getElementById('versus').offsetParent") is None
    ask(page, "hello there, who are you?")
    until(lambda: len(page.texts(".text")[0]) > 5)
    assert page.texts("#go") == ["Stop"]
    until(lambda: done(page))
    assert page.texts(".mine") == ["hello there, who are you?"]
    assert "60 tokens, " in page.texts(".note")[0]
    assert "tokens/s" in page.texts(".note")[0]
    assert page.complaints() == []
    picture(page, "answer")


def test_side_by_side_asks_base_and_adapter_at_once(page: Browser) -> None:
    page.click("#compare")
    ask(page, "what is a gearbox?")
    until(lambda: done(page))
    assert page.texts(".answer h2") == ["base", "shop-assistant"]
    assert all("60 tokens" in note for note in page.texts(".note"))
    picture(page, "compare")


def test_history_goes_along_with_the_next_message(page: Browser) -> None:
    ask(page, "first")
    until(lambda: done(page))
    ask(page, "second")
    until(lambda: done(page))
    sent = page.run("return body('base', 'third').messages.map(m => m.role)")
    assert sent == ["user", "assistant", "user", "assistant", "user"]


def test_escape_stops_the_answer_and_keeps_what_came(page: Browser) -> None:
    page.click("#more")
    page.type("#max_tokens", "4000")
    ask(page, "go on and on")
    until(lambda: len(page.texts(".text")[0]) > 20)
    page.type("#prompt", ESCAPE)
    until(lambda: done(page))
    assert page.texts(".note")[0].endswith("stopped")
    assert len(page.texts(".text")[0]) > 20


def test_settings_are_sent_and_remembered(page: Browser) -> None:
    page.click("#more")
    page.type("#temperature", "0.3")
    page.type("#system", "Be brief.")
    page.click("#prompt")
    sent = page.run("return body('base', 'x')")
    assert (sent["temperature"], sent["messages"][0]) == (0.3, {"role": "system", "content": "Be brief."})
    assert "top_p" not in sent
    picture(page, "settings")
    page.run("location.reload()")
    until(lambda: page.run("return document.getElementById('temperature').value") == "0.3")


def test_shift_enter_starts_a_line_and_the_page_holds_text_only(page: Browser) -> None:
    page.type("#prompt", f"<img src=x onerror=alert(1)>{SHIFT}{ENTER}{SHIFT}two lines")
    assert page.texts(".mine") == []
    ask(page, "")
    until(lambda: done(page))
    assert page.texts(".mine") == ["<img src=x onerror=alert(1)>\ntwo lines"]
    assert page.run("return document.querySelectorAll('.mine *, .text *').length") == 0


def test_code_fences_become_blocks(page: Browser) -> None:
    page.run("show(document.body.appendChild(element('div', 'probe')), 'a\\n```py\\nx = 1\\n```\\nb')")
    assert page.texts(".probe pre") == ["x = 1"]


def test_error_is_shown_in_words(page: Browser) -> None:
    page.run("$('max_tokens').value = 99999")
    ask(page, "hi")
    until(lambda: done(page))
    assert "maximum context length is 8192 tokens" in page.texts(".note.error")[0]


def test_new_chat_forgets(page: Browser) -> None:
    ask(page, "hi")
    until(lambda: done(page))
    page.click("#fresh")
    assert page.texts(".mine") == []
    assert page.run("return turns.length") == 0


def test_copy_puts_the_answer_on_the_clipboard(page: Browser) -> None:
    ask(page, "hi")
    until(lambda: done(page))
    page.run("navigator.clipboard.writeText = async text => { window.copied_ = text; }")
    page.click(".foot button")
    until(lambda: page.texts(".foot button") == ["Copied"])
    assert page.run("return window.copied_") == page.texts(".text")[0]


def test_page_fits_a_phone_and_the_dark(page: Browser) -> None:
    page.resize(360, 740)
    page.scheme("dark")
    page.click("#compare")
    ask(page, "a question that is long enough to need more than one line on a phone")
    until(lambda: done(page))
    assert page.run("return document.documentElement.scrollWidth") <= 360
    lefts = page.run(
        "return [...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().left)"
    )
    assert lefts[0] == lefts[1], "the two answers stand below each other"
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(20, 23, 28)"
    picture(page, "phone")


def test_page_is_reached_by_keyboard_and_named(page: Browser) -> None:
    unnamed = page.run(
        "return [...document.querySelectorAll('button, select, input, textarea')].filter(e =>"
        " !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.id)"
    )
    assert unnamed == []
    assert page.run("return document.activeElement.id") == "prompt"


def test_docs_page_lists_the_routes_without_a_network(page: Browser) -> None:
    page.run("location.href = 'docs'")
    until(lambda: "/chat" in page.texts("summary code"))
    assert {"/v1/chat/completions", "/livez", "/metrics"} <= set(page.texts("summary code"))
    assert page.complaints() == []
    picture(page, "docs")


@pytest.mark.parametrize(("path", "shown"), [("/", "#left option"), ("/docs", "summary code")])
def test_pages_opened_with_the_key_in_their_address_work(
    window: Browser, start_server: Any, path: str, shown: str
) -> None:
    """fetch refuses addresses with a password, which one relative to the page's has."""
    server = start_server(config={"api_key": "KEY"})
    window.open(server.url.replace("://", "://user:KEY@") + path)
    until(lambda: window.texts(shown) != [])
    assert window.complaints() == []


@pytest.fixture
def docs(window: Browser, start_server: Any) -> Browser:
    """The page of the routes of a server with a key, opened without it."""
    server = start_server(config={"api_key": "KEY", "limits": {"new_tokens": 8}})
    window.resize(1000, 900)
    window.scheme("light")
    window.open(server.url + "/docs")
    until(lambda: "/chat" in window.texts("summary code"), timeout_s=60)
    window.complaints()
    return window


def unfold(page: Browser, path: str) -> str:
    """Open the box of a POST route and return a selector of it."""
    page.run(
        "const box = [...document.querySelectorAll('#routes > section > details')].find(e =>"
        " e.querySelector('code').textContent === arguments[0]);"
        "box.id = 'opened'; box.open = true; box.scrollIntoView()",
        path,
    )
    until(lambda: page.texts("#opened h3") != [], timeout_s=60)
    return "#opened"


def test_docs_page_tells_fields_limits_errors_and_examples(docs: Browser) -> None:
    box = unfold(docs, "/v1/chat/completions")
    assert docs.texts(f"{box} h3")[:2] == ["Fields", "Example"]
    rows = docs.texts(f"{box} > .fields tr")
    assert rows[0].startswith("messagesrequired")
    assert any("default 1" in row and "1 to 8" in row for row in rows if row.startswith("n"))
    assert any(row.startswith("429") for row in rows)
    assert "curl http" in docs.texts(f"{box} pre")[0]
    docs.run("[...document.querySelectorAll('#opened button')].find(b => b.textContent === 'Python').click()")
    assert "import httpx" in docs.texts(f"{box} pre")[0]
    assert docs.complaints() == []
    picture(docs, "docs-fields")


def test_docs_page_tries_a_route_with_the_key_that_is_given(docs: Browser) -> None:
    box = unfold(docs, "/chat")
    go = "[...document.querySelectorAll('#opened button')].find(b => b.textContent === 'Send').click()"
    docs.run(go)
    until(lambda: docs.texts(f"{box} .status.bad") != [], timeout_s=60)
    assert docs.texts(f"{box} .status.bad")[0].startswith("401 in")
    docs.type("#key", "KEY")
    docs.run(go)
    until(lambda: any(text.startswith("200 in") for text in docs.texts(f"{box} .status")), timeout_s=60)
    assert '"Result":' in docs.texts(f"{box} pre")[-1]
    docs.run('document.querySelector(\'#opened textarea\').value = \'{"prompt": "hi", "stream": true}\'')
    docs.run(go)
    until(lambda: "[DONE]" in docs.texts(f"{box} pre")[-1], timeout_s=60)
    docs.run("document.querySelector('#opened textarea').scrollIntoView()")
    picture(docs, "docs-try")


def test_docs_page_fits_a_phone_and_the_dark(docs: Browser) -> None:
    docs.resize(360, 740)
    docs.scheme("dark")
    unfold(docs, "/v1/chat/completions")
    assert docs.run("return document.documentElement.scrollWidth") <= 360
    assert docs.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    unnamed = docs.run(
        "return [...document.querySelectorAll('button, input, textarea')].filter(e =>"
        " !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert unnamed == []
    picture(docs, "docs-phone")
