"""The pages in headless Chromium, against a real server over the engine without a model.

Pictures of them are left in `results/pages`, to be looked at.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import ENTER, ESCAPE, SHIFT, Browser, browser
from tests.serving.conftest import Process, start_fake_server, until

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None, reason="apt-get install chromium chromium-driver"
    ),
]

ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "results/pages"
AXE = ROOT / "tests/clients/node_modules/axe-core/axe.min.js"
MARKED = ROOT / "tests/clients/node_modules/marked/lib/marked.esm.js"
BASE, ADAPTER = "base", "shop-assistant"

FORMATTED = """Two things decide it: the **ratio** and the *load*. See [the manual](https://example.org/gears?a=1).

## What to measure

1. The speed of the motor, in `rpm`
2. The torque that is needed
   - at the start
   - under load

```python
def ratio(driving: int, driven: int) -> float:
    return driven / driving
```

| Gear | Teeth | Ratio |
|:-----|------:|------:|
| small | 12 | 1.0 |
| large | 48 | 4.0 |

> A gearbox trades speed for torque.
"""
HOSTILE = """<script>window.ran = 1</script><img src="/metrics" onerror="window.ran = 2">

a <b onclick="x">b</b> ![alt](https://example.org/i.png) ![x](/metrics "t") [j](javascript:window.ran=3)
[d](data:text/html,<script>1</script>)
[r](//example.org/x) [v]( vbscript:x) <javascript:alert(1)> [ok](https://example.org/ok)

\u202egnirts\u202c \u0085\u009b31m \u0000 \u0645\u0631\u062d\u0628\u0627

```js
access = "user\u202e"; <img src=x onerror=alert(1)>
<svg onload=alert(2)>
"""
THOUGHTFUL = "<think>The user wants one word.\n\nParis is the capital, so I say **Paris**.</think>\n\nParis."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "unit": "celsius"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ANSWERS = {
    "on and on": "and on " * 2000,
    "gearbox": FORMATTED,
    "worst": HOSTILE,
    "capital": THOUGHTFUL,
    "weather": CALL,
    "12 degrees": "It is **12 °C** in Köln.",
}


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """One browser for all tests of the pages."""
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def site() -> Iterator[Process]:
    """The server of the chat page: a base and an adapter, who answer slowly enough to be stopped."""
    server = start_fake_server(
        answers=ANSWERS,
        engine={"rows": 4, "pace_s": 0.001, "context_tokens": 65536, "adapters": [ADAPTER]},
        config={"limits": {"new_tokens": 20000}, "reasoning_parser": "qwen3"},
    )
    yield server
    server.close()


@pytest.fixture
def page(window: Browser, site: Process) -> Browser:
    """The chat page as a new user finds it."""
    window.resize(1100, 760)
    window.scheme("light")
    window.open(site.url + "/version")
    window.run("localStorage.clear()")
    load(window, site.url)
    window.complaints()
    return window


def load(page: Browser, url: str) -> None:
    """Open the chat page, and note what it sends from then on."""
    page.open(url)
    until(lambda: page.texts("#left option") == [BASE, ADAPTER])
    page.run(
        "window.sent = []; const real = fetch;"
        "window.fetch = (url, made) => {"
        " if (made?.body) sent.push(JSON.parse(made.body)); return real(url, made); }"
    )


def sent(page: Browser) -> list[dict[str, Any]]:
    """Return the bodies of the page's requests."""
    return list(page.run("return window.sent"))


def picture(page: Browser, name: str) -> None:
    """Keep a screenshot."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.picture(PICTURES / f"{name}.png")


def done(page: Browser) -> bool:
    """Return whether no answer is under way."""
    return page.texts("#go") == ["Send"] and not page.texts(".text.running")


def ask(page: Browser, text: str) -> None:
    """Type a message and press Enter."""
    page.type("#prompt", text + ENTER)


def answered(page: Browser, text: str) -> None:
    """Ask, and wait for the answer's end."""
    ask(page, text)
    until(lambda: done(page))


def press(page: Browser, label: str, within: str = "body") -> None:
    """Click the last button of this label that is shown."""
    page.run(
        "[...document.querySelector(arguments[1]).querySelectorAll('button')].filter(b =>"
        " b.offsetParent && b.textContent === arguments[0]).at(-1).click()",
        label,
        within,
    )


def stored(page: Browser) -> list[dict[str, Any]]:
    """Return the chats that the browser keeps, the newest first."""
    texts = page.run(
        "return Object.entries(localStorage).filter(e => e[0].startsWith('chat:')).map(e => e[1])"
    )
    return sorted(map(json.loads, texts), key=lambda chat: -chat["saved"])


def accessible(page: Browser) -> None:
    """AssertionError with axe-core's findings, and where anything can be scrolled sideways."""
    if not AXE.exists():
        pytest.skip("make clients installs axe-core")
    page.run(AXE.read_text(encoding="utf-8"))
    found = page.run(
        "return axe.run().then(found => found.violations.map("
        "it => [it.id, it.help, it.nodes.map(node => node.html.slice(0, 160))]))"
    )
    assert found == []
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def markdown(page: Browser, *texts: str) -> Any:
    """Show these texts in one place, one after the other, the last as a whole; return what is in it then."""
    return page.run(
        "const texts = arguments[0]; return import('./page/markdown.js').then(({Markdown}) => {"
        " const place = document.createElement('div'), shown = new Markdown(place);"
        " texts.forEach((text, i) => shown.show(text, i === texts.length - 1)); return place.innerHTML; })",
        texts,
    )


def test_answer_streams_and_shows_its_rate(page: Browser) -> None:
    picture(page, "empty")
    accessible(page)
    assert page.run("return document.getElementById('column-right').offsetParent") is None
    ask(page, "go on and on")
    until(lambda: len(page.texts(".text")[0]) > 5)
    assert page.texts("#go") == ["Stop"]
    page.type("#prompt", ESCAPE)
    until(lambda: done(page))
    assert page.texts(".mine") == ["go on and on"]
    note = page.texts(".note")[0]
    assert "tokens/s" in note
    assert note.endswith("stopped")
    assert len(page.texts(".text")[0]) > 5
    assert page.complaints() == []


def test_answer_is_formatted(page: Browser) -> None:
    answered(page, "How do I choose a gearbox?")
    assert page.texts(".text strong, .text em, .text h3") == ["ratio", "load", "What to measure"]
    assert page.texts(".text ol > li > ul > li") == ["at the start", "under load"]
    assert page.texts(".code span, .code code")[0] == "python"
    assert page.texts(".text th, .text td")[:4] == ["Gear", "Teeth", "Ratio", "small"]
    link = page.run("const a = document.querySelector('.text a'); return [a.href, a.target, a.rel]")
    assert link == ["https://example.org/gears?a=1", "_blank", "noopener noreferrer nofollow"]
    assert page.complaints() == []
    picture(page, "answer")
    accessible(page)
    page.scheme("dark")
    picture(page, "answer-dark")
    accessible(page)
    page.resize(390, 844)
    picture(page, "answer-phone-dark")
    accessible(page)


def test_answer_can_neither_run_nor_load_anything(page: Browser) -> None:
    before = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    answered(page, "do your worst")
    assert page.run("return window.ran ?? null") is None
    made = page.run("return [...new Set([...document.querySelectorAll('.text *')].map(e => e.localName))]")
    assert set(made) <= {"p", "a", "span", "br", "div", "pre", "code", "button"}
    links = page.run("return [...document.querySelectorAll('.text a')].map(a => a.href)")
    assert links == ["https://example.org/i.png", "https://example.org/ok"]
    assert (
        page.run("return document.querySelectorAll('.text [onclick], .text [onerror], .text [src]').length")
        == 0
    )
    text = page.texts(".text")[0]
    assert '<script>window.ran = 1</script><img src="/metrics" onerror="window.ran = 2">' in text
    assert '"user[U+202E]"; <img src=x onerror=alert(1)>' in text
    assert not set("\x00\x85\x9b") & set(text)
    after = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in after[len(before) :] if "/v1/chat/completions" not in name] == []
    assert page.complaints() == []


def test_no_text_becomes_html_even_by_mistake(page: Browser) -> None:
    assert "TrustedHTML" in page.run(
        "try { document.body.innerHTML = '<b>'; return 'made'; } catch (error) { return error.message; }"
    )
    page.complaints()


def test_hostile_text_is_shown_whole(page: Browser) -> None:
    texts = [
        ">" * 5000,
        "> - " * 3000,
        "\n".join("  " * depth + "- a" for depth in range(300)),
        "**a " * 50_000,
        "[" * 50_000,
        "![[a" * 20_000,
        "word " * 40_000,
        "|a|b|\n|-|-|\n" + "|x|y|\n" * 2000,
        "```\n" + "x = 1\n" * 30_000,
        "<div>\n" * 2000,
        "a\n\n" * 5000,
    ]
    for text in texts:
        shown = page.run(
            "const text = arguments[0]; return import('./page/markdown.js').then(({Markdown}) => {"
            " const place = document.createElement('div'), shown = new Markdown(place);"
            " shown.show(text.slice(0, text.length / 2)); shown.show(text, true);"
            " return place.textContent; })",
            text,
        )
        letters = "".join(letter for letter in text if letter.isalnum())
        assert letters in "".join(letter for letter in shown if letter.isalnum()), text[:20]


def test_growing_text_ends_as_the_whole_does_and_settled_blocks_stay(page: Browser) -> None:
    text = FORMATTED + "\npara\n#tag\n1.5 times\n\n[a][1]\n\n- x\n\n  y\n\n[1]: https://example.org/d\n"
    grown = markdown(page, *(text[:end] for end in range(1, len(text) + 1)))
    assert grown == markdown(page, text)
    assert 'href="https://example.org/d"' in grown
    odd = page.run(
        "const text = arguments[0]; return import('./page/markdown.js').then(({Markdown}) => {"
        " const made = () => document.createElement('div'), place = made(), shown = new Markdown(place);"
        " for (let end = 1; end <= text.length; end++) { const fresh = made(), part = text.slice(0, end);"
        "  shown.show(part); new Markdown(fresh).show(part);"
        "  if (fresh.innerHTML !== place.innerHTML) return part; } return null; })",
        text.partition("[a][1]")[0] + "- x\n\n  y\n\n---\nz\n-\n- - -\n~~~\nq\n",
    )
    assert odd is None, "shown otherwise as it grows"
    changed = page.run(
        "return import('./page/markdown.js').then(({Markdown}) => {"
        " const place = document.createElement('div'), shown = new Markdown(place); let text = '', most = 0;"
        " for (let i = 0; i < 300; i++) { const before = [...place.children]; text += `block ${i}\\n\\n`;"
        "  shown.show(text); most = Math.max(most,"
        " before.filter(node => node.parentNode !== place).length); }"
        " const before = [...place.children]; shown.show(text, true);"
        " return [most, place.children.length, before.filter(node => node.parentNode !== place).length]; })"
    )
    assert changed == [0, 300, 0]


def test_thoughts_are_folded_once_the_answer_comes(page: Browser) -> None:
    answered(page, "What is the capital of France?")
    assert page.texts(".thoughts summary") == ["Thoughts"]
    assert page.texts(".text") == ["Paris."]
    assert page.run("return document.querySelector('.thoughts').open") is False
    page.click(".thoughts summary")
    assert page.texts(".thoughts .body p")[0] == "The user wants one word."
    picture(page, "reasoning")
    accessible(page)


def test_call_is_folded_and_its_result_goes_back(page: Browser) -> None:
    page.run("document.getElementById('tools').value = arguments[0]", json.dumps(TOOLS))
    answered(page, "How is the weather in Köln?")
    assert page.texts(".call summary") == ["Call: weather"]
    assert json.loads(page.texts(".call pre")[0]) == {"city": "Köln", "unit": "celsius"}
    assert page.run("return document.querySelector('.call').open") is False
    page.click(".call summary")
    page.type(".call textarea", "12 degrees")
    picture(page, "tool-call")
    accessible(page)
    press(page, "Go on with it")
    until(lambda: done(page))
    assert page.texts(".text")[-1] == "It is 12 °C in Köln."
    messages = sent(page)[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[2]["content"] == "12 degrees"
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]


FEED = """
const text = new TextEncoder(), body = new ReadableStream({start(to) {
  window.feed = delta => to.enqueue(text.encode(`data: ${JSON.stringify({choices: [{delta}]})}\\n\\n`));
  window.finish = () => { to.enqueue(text.encode("data: [DONE]\\n\\n")); to.close(); };
}});
window.fetch = async () => new Response(body);
"""
"""Lets a test say what comes from the server, and when."""
OPENED = "return [...document.querySelectorAll('details:not([hidden])')].map(fold => fold.open)"


def test_folds_are_open_while_they_stream_and_as_the_user_left_them(page: Browser) -> None:
    page.run(FEED)
    ask(page, "hi")
    page.run("feed({reasoning_content: 'hm'})")
    until(lambda: page.texts(".thoughts summary") == ["Thinking…"])
    assert page.run(OPENED) == [True]
    page.run("feed({content: 'So'})")
    until(lambda: page.texts(".text") == ["So"])
    assert page.run(OPENED) == [False]
    page.click(".thoughts summary")
    page.run("feed({tool_calls: [{index: 0, id: 'c', function: {name: 'f', arguments: '{'}}]})")
    until(lambda: page.texts(".call pre") == ["{"])
    assert page.run(OPENED) == [True, True]
    page.run("feed({tool_calls: [{index: 0, function: {arguments: '}'}}]}); finish()")
    until(lambda: done(page))
    assert page.run(OPENED) == [True, False]


def test_long_answer_is_drawn_once_and_grows_at_its_end(page: Browser) -> None:
    """200 KB come; of the blocks that were there, only the last two may be drawn anew."""
    page.run(FEED)
    ask(page, "hi")
    page.run(
        "window.gone = 0; new MutationObserver(all => all.forEach(it => { gone += it.removedNodes.length; }))"
        ".observe(document.querySelector('.text'), {childList: true});"
        "window.drawn = 0; new MutationObserver(() => { drawn += 1; })"
        ".observe(document.querySelector('.note'), {childList: true})"
    )
    block = "Some **words** and `more` of them.\n\n" * 50
    for _ in range(115):
        page.run("feed({content: arguments[0]})", block)
    page.run("finish()")
    until(lambda: done(page))
    assert len(page.run("return [...document.querySelectorAll('.text p')]")) == 115 * 50
    gone, drawn = page.run("return [gone, drawn]")
    assert gone <= 2 * drawn


def test_chat_deleted_while_it_is_answered_stays_deleted(page: Browser) -> None:
    ask(page, "go on and on")
    until(lambda: len(page.texts(".text")[0]) > 5)
    press(page, "Delete", "#chats")
    until(lambda: done(page))
    assert stored(page) == []
    press(page, "Undo")
    assert [turn["question"] for turn in stored(page)[0]["turns"]] == ["go on and on"]
    assert page.texts(".mine") == ["go on and on"]


def test_nothing_is_changed_below_an_answer_under_way(page: Browser) -> None:
    answered(page, "SAY:one")
    ask(page, "go on and on")
    until(lambda: len(page.texts(".text")[-1]) > 5)
    disabled = "return ['left', 'right', 'compare'].map(id => document.getElementById(id).disabled)"
    assert page.run(disabled) == [True] * 3
    page.click(".asked button")
    page.type(".editor textarea", "!" + ENTER)
    assert "stop it" in page.texts("#notice")[0]
    page.type("#prompt", ESCAPE)
    until(lambda: done(page))
    assert page.run(disabled) == [False] * 3
    assert len(sent(page)) == 2


def test_functions_that_are_no_list_are_refused_at_their_field(page: Browser) -> None:
    page.run("document.getElementById('tools').value = '{broken'")
    ask(page, "hi")
    assert "no JSON" in page.run("return document.getElementById('tools').validationMessage")
    assert page.texts(".mine") == []
    assert page.run("return document.getElementById('prompt').value") == "hi"


def test_side_by_side_columns_scroll_by_themselves_below_their_names(page: Browser) -> None:
    page.click("#compare")
    answered(page, "How do I choose a gearbox?")
    answered(page, "And which gearbox for a lift?")
    assert page.texts("#column-left .author") == [BASE] * 2
    assert page.texts("#column-right .author") == [ADAPTER] * 2
    assert [body["model"] for body in sent(page)] == [BASE, ADAPTER] * 2
    tops = page.run(
        "const [left, right] = document.querySelectorAll('.turns'), head = document.querySelector('.head *');"
        "const before = head.getBoundingClientRect().top; left.scrollTop = 0; right.scrollTop = 200;"
        "return [left.scrollTop, right.scrollTop, head.getBoundingClientRect().top - before]"
    )
    assert tops == [0, 200, 0]
    picture(page, "compare")
    accessible(page)
    page.resize(390, 844)
    page.scheme("dark")
    picture(page, "compare-phone-dark")
    accessible(page)
    boxes = page.run(
        "return [...document.querySelectorAll('.column')].map(it => it.getBoundingClientRect())"
        ".map(box => [box.left, box.height])"
    )
    assert boxes[0][0] == boxes[1][0], "below each other"
    assert abs(boxes[0][1] - boxes[1][1]) <= 2, "two halves"


def test_history_goes_along_with_the_next_message(page: Browser) -> None:
    answered(page, "SAY:first")
    answered(page, "SAY:second")
    page.run(
        "const it = document.getElementById('left'); it.value = arguments[0];"
        "it.dispatchEvent(new Event('change'))",
        ADAPTER,
    )
    answered(page, "SAY:third")
    last = sent(page)[-1]
    assert last["model"] == ADAPTER
    said = [(message["role"], message["content"]) for message in last["messages"]]
    assert said == [
        ("user", "SAY:first"),
        ("assistant", "first"),
        ("user", "SAY:second"),
        ("assistant", "second"),
        ("user", "SAY:third"),
    ]


def test_settings_are_sent_and_remembered(page: Browser, site: Process) -> None:
    page.click("#more")
    page.type("#temperature", "0.3")
    page.type("#system", "Be brief.")
    page.click("#prompt")
    answered(page, "SAY:yes")
    body = sent(page)[0]
    assert (body["temperature"], body["messages"][0]) == (0.3, {"role": "system", "content": "Be brief."})
    assert "top_p" not in body
    picture(page, "settings")
    accessible(page)
    load(page, site.url)
    assert page.run("return document.getElementById('temperature').value") == "0.3"


def test_shift_enter_starts_a_line_and_a_message_is_text_only(page: Browser) -> None:
    page.type("#prompt", f"<img src=x onerror=alert(1)>{SHIFT}{ENTER}{SHIFT}SAY:no")
    assert page.texts(".mine") == []
    answered(page, "")
    assert page.texts(".mine") == ["<img src=x onerror=alert(1)>\nSAY:no"]
    assert page.run("return document.querySelectorAll('.mine *').length") == 0


def test_error_is_shown_in_words(page: Browser) -> None:
    page.run("document.getElementById('max_tokens').value = 99999")
    answered(page, "hi")
    assert "maximum context length is 65536 tokens" in page.texts(".note.error")[0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('new Response(`data: {"choices": [{"delta": {"content": "half"}}]}\\n\\n`)', "broke off"),
        ("Promise.reject(new TypeError('Failed to fetch'))", "cannot be reached"),
        (
            'new Response(`{"error": {"message": "wrong or missing API key"}}`, {status: 401})',
            "key. Load the page again to be asked for the key.",
        ),
    ],
    ids=["ends-early", "gone", "unauthorized"],
)
def test_answer_that_does_not_come_whole_says_so(page: Browser, reply: str, said: str) -> None:
    page.run(f"window.fetch = async () => {reply}")
    answered(page, "hi")
    assert said in page.texts(".note.error")[0]
    picture(page, f"error-{said.split(maxsplit=1)[0]}".rstrip("."))
    press(page, "Regenerate")
    until(lambda: done(page))


def test_chats_are_kept_listed_renamed_and_deleted(page: Browser, site: Process) -> None:
    answered(page, "SAY:one")
    page.click("#fresh")
    answered(page, "SAY:two")
    load(page, site.url)
    assert page.texts("#chat-list .name") == ["SAY:two", "SAY:one"]
    assert page.texts(".mine") == []
    page.click("#chat-list li:last-child .name")
    assert page.texts(".mine") == ["SAY:one"]
    press(page, "Rename", "#chats")
    page.run("document.querySelector('#chat-list input').value = ''")
    page.type("#chat-list input", "Numbers" + ENTER)
    assert page.texts("#chat-list .name") == ["Numbers", "SAY:two"]
    picture(page, "chats")
    accessible(page)
    press(page, "Delete", "#chats")
    assert page.texts("#chat-list .name") == ["SAY:two"]
    press(page, "Undo")
    assert page.texts("#chat-list .name") == ["Numbers", "SAY:two"]
    assert page.texts(".mine") == ["SAY:one"]
    page.resize(390, 844)
    page.click("#list")
    picture(page, "chats-phone")
    accessible(page)


def test_message_is_edited_and_what_followed_stays(page: Browser) -> None:
    answered(page, "SAY:one")
    answered(page, "SAY:two")
    page.click(".asked button")
    page.type(".editor textarea", " and more" + ENTER)
    until(lambda: done(page))
    assert page.texts(".mine") == ["SAY:one and more"]
    assert page.texts(".text") == ["one and more"]
    assert [len(chat["turns"]) for chat in stored(page)] == [1, 2]
    page.click(".asked button")
    page.type(".editor textarea", "!" + ENTER)
    until(lambda: done(page))
    assert [len(chat["turns"]) for chat in stored(page)] == [1, 2]
    assert stored(page)[0]["turns"][0]["question"] == "SAY:one and more!"


def test_last_answer_is_asked_for_anew(page: Browser) -> None:
    answered(page, "SAY:one")
    answered(page, "SAY:two")
    assert page.run(
        "return [...document.querySelectorAll('.foot')].map(e => e.innerText.includes('Regenerate'))"
    ) == [
        False,
        True,
    ]
    press(page, "Regenerate")
    until(lambda: done(page))
    assert page.texts(".text") == ["one", "two"]
    first, second, again = sent(page)
    assert again == second != first


def test_chat_is_exported_as_messages_and_as_markdown(page: Browser) -> None:
    page.run(
        "window.files = []; URL.createObjectURL = blob => { files.push(blob.text()); return 'data:,'; };"
        "HTMLAnchorElement.prototype.click = function () { files.push(this.download); }"
    )
    answered(page, "SAY:one")
    press(page, "JSON", "#chats")
    press(page, "Markdown", "#chats")
    text, name, prose, _ = page.run("return Promise.all(files)")
    assert name == "SAY-one.json"
    assert json.loads(text) == {
        "model": BASE,
        "messages": [{"role": "user", "content": "SAY:one"}, {"role": "assistant", "content": "one"}],
    }
    assert prose == "# SAY:one\n\n## You\n\nSAY:one\n\n## base\n\none\n"


def test_full_storage_drops_the_oldest_or_says_so(page: Browser, site: Process) -> None:
    answered(page, "SAY:old")
    page.run(
        "for (let text = '', more = 2**23; more >= 1;) {"
        " try { localStorage.setItem('filler', text + 'x'.repeat(more)); text += 'x'.repeat(more); }"
        " catch { more /= 2; } }"
    )
    answered(page, "SAY:" + "long " * 60)
    assert "storage is full" in page.texts("#notice")[0]
    page.click("#fresh")
    page.run("localStorage.removeItem('filler')")
    page.run(
        "for (let i = 0; i < 101; i++) localStorage.setItem(`chat:${i}`, JSON.stringify({"
        "id: `${i}`, title: `t${i}`, saved: i, "
        "turns: [{question: 'q', answers: {}}]})); localStorage.setItem('chat:odd', '{broken')"
    )
    answered(page, "SAY:new")
    assert "oldest chat was removed" in page.texts("#notice")[0]
    assert len(page.texts("#chat-list .name")) == 100
    assert len(page.run("return Object.keys(localStorage).filter(k => k.startsWith('chat:'))")) == 100


def test_page_without_storage_works_and_says_that_nothing_is_kept(page: Browser, site: Process) -> None:
    throws = "{get() { throw new DOMException('no', 'SecurityError'); }}"
    source = f"Object.defineProperty(window, 'localStorage', {throws})"
    made = page.devtools("Page.addScriptToEvaluateOnNewDocument", source=source)
    try:
        load(page, site.url)
        answered(page, "SAY:yes")
        assert page.texts(".text") == ["yes"]
        assert page.texts("#keeping") == ["This browser keeps nothing: chats end with this page."]
        assert page.complaints() == []
    finally:
        page.devtools("Page.removeScriptToEvaluateOnNewDocument", **made)


def test_two_tabs_lose_nothing_of_each_other(page: Browser) -> None:
    """The other tab is its writing into the storage: that is all that this one sees of it."""
    answered(page, "SAY:one")
    other = stored(page)[0]
    other["saved"] += 1
    other["turns"] *= 2
    page.run("localStorage.setItem(arguments[0], arguments[1])", f"chat:{other['id']}", json.dumps(other))
    answered(page, "SAY:two")
    assert "another tab" in page.texts("#notice")[0]
    assert sorted(len(chat["turns"]) for chat in stored(page)) == [2, 2]
    mine, theirs = stored(page)[0], other
    assert mine["id"] != theirs["id"]
    mine["saved"] += 1
    mine["turns"][0]["question"] = "changed there"
    page.run(
        "localStorage.setItem(arguments[0], arguments[1]);"
        "dispatchEvent(new StorageEvent('storage', {key: arguments[0]}))",
        f"chat:{mine['id']}",
        json.dumps(mine),
    )
    assert page.texts(".mine")[0] == "changed there"


def test_copy_puts_answer_and_code_on_the_clipboard(page: Browser) -> None:
    answered(page, "Which gearbox?")
    page.run("navigator.clipboard.writeText = async text => { (window.copied ??= []).push(text); }")
    press(page, "Copy", ".code")
    press(page, "Copy", ".foot")
    assert page.run("return window.copied") == [
        FORMATTED.partition("```python\n")[2].partition("\n```")[0],
        FORMATTED,
    ]


def test_phone_has_one_row_of_header_and_nothing_scrolls_sideways(page: Browser) -> None:
    page.resize(390, 844)
    tall = page.run("return document.querySelector('header').offsetHeight")
    assert tall <= 60
    page.click("#compare")
    answered(page, "a question that is long enough to need more than one line on a phone SAY:" + "x" * 300)
    assert page.run("return document.querySelector('header').offsetHeight") == tall
    accessible(page)
    page.scheme("dark")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


def test_keyboard_alone_reaches_everything(page: Browser) -> None:
    assert page.run("return document.activeElement.id") == "prompt"
    page.run("document.querySelector('#list').focus()")
    page.resize(390, 844)
    until(lambda: not page.run("return document.querySelector('#chats').open"))
    page.type("#list", ENTER)
    assert page.run("return document.querySelector('#chats').matches(':modal')")
    page.type("#chats", ESCAPE)
    until(lambda: page.run("return document.activeElement.id") == "list")


def test_vendored_marked_is_the_pinned_one(page: Browser) -> None:
    if not MARKED.exists():
        pytest.skip("make clients installs marked")
    assert MARKED.read_bytes() == (ROOT / "runtime/serving/http/page/marked/marked.esm.js").read_bytes()


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
    accessible(docs)


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
    accessible(docs)
