"""An author of chat templates who wants the server's time, its memory, its log, or Python.

What each template does is done where the last message says "now", as an author would who wants his template
to be loaded, and is refused then; and at loading where it is done at once.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.errors import ConfigError, TemplateRefusedError
from tests.chat_template.test_rendering import tokenizer_with
from tests.serving.conftest import TEMPLATE

MEMORY = {
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a list times a number": "{{ [1] * 10**9 }}",
    "a text times itself": "{% set ns = namespace(t='a' * 1000) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "a width of formats": "{{ '%2000000000d' % 1 }}",
    "a width of format": "{{ '{:>2000000000}'.format('a') }}",
    "a width of the filter format": "{{ '%2000000000s' | format('a') }}",
    "padding": "{{ 'a'.ljust(2 * 10**9) }}",
    "centering": "{{ 'a' | center(2 * 10**9) }}",
    "zeros": "{{ '1'.zfill(2 * 10**9) }}",
    "tabs": "{{ '\\t'.expandtabs(2 * 10**9) }}",
    "replacement": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "joining": "{{ (['a' * 10**6] * 10**4) | join('b' * 10**6) }}",
    "indentation": "{{ ('\\n' * 10**5) | indent(10**7, true, true) }}",
    "columns": "{{ range(9) | batch(10**9, 'a') | list }}",
    "a dictionary": "{{ dict.fromkeys('a' * 10**9) }}",
    "bytes": "{{ ('a' * 10**8).encode('utf-32').hex() * 100 }}",
    "captured text": "{% set t %}{% for i in range(10**5) %}{% for j in range(10**5) %}"
    "{{ 'a' * 10**7 }}{% endfor %}{% endfor %}{% endset %}",
}
TIME = {
    "nested loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10**(10**9) }}",
    "many digits": "{{ (7**(3 * 10**6)) % 10**999999 }}",
    "sums": "{{ range(10**5) | map('string') | map('list') | sum(start=[]) | length }}",
    "calls that call": "{% macro f(n) %}{% for i in range(99) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}"
    "{{ f(90) }}",
    "a slow filter": "{% for i in range(10**5) %}{% set t = (messages[-1].content * 10**5) | striptags %}"
    "{% endfor %}",
}
OUTPUT = {
    "a long text": "{% for i in range(10**5) %}{{ 'a' * 1000 }}{% endfor %}",
    "many texts": "{% for i in range(10**5) %}{% for j in range(10**4) %}aaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}"
    "{% endfor %}",
}
REACH = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a filter's way to classes": "{{ '' | attr('__class__') }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "the initialiser's globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "names in formats": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "a bound format": "{{ ['{0.__class__}'] | map('format', cycler) | first }}",
    "internals of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "the context": "{{ self._TemplateReference__context }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.system('true') }}",
    "a changed conversation": "{{ messages.append(1) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a large range": "{{ range(10**9) | list }}",
    "an error of a million characters": "{{ raise_exception('a' * 10**6) }}",
    "an error for a terminal": "{{ raise_exception('\\x1b]0;owned\\x07\\u202e\\r\\n500 ERROR') }}",
    "half a character": "{{ raise_exception('\\ud800') }}",
}
BOUNDED = {**OUTPUT, **REACH}
NOW = [{"role": "user", "content": "now"}]
LATER = [{"role": "user", "content": "later"}]
OPTIONS = TemplateOptions(most_characters=100_000)


def when_asked(attack: str) -> Any:
    return tokenizer_with("{% if 'now' in messages[-1].content %}" + attack + "{% endif %}fine")


def outcome(attack: str) -> str:
    """Return what comes of an attack: the text, or why there is none."""
    try:
        return chat_template.render(when_asked(attack), NOW, OPTIONS)
    except (ConfigError, TemplateRefusedError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_the_templates_own(name: str) -> None:
    said = outcome(MEMORY[name])
    assert "more than 1 s of processor time or 512 MiB" in said
    if not said.startswith("ConfigError"):  # Jinja computes what is constant while it compiles
        assert chat_template.render(when_asked(MEMORY[name]), LATER, OPTIONS) == "fine"


def test_time_is_the_templates_own() -> None:
    """All at once: none waits for another, and a harmless one is answered among them."""
    with ThreadPoolExecutor(len(TIME)) as threads:
        running = {name: threads.submit(outcome, attack) for name, attack in TIME.items()}
        assert chat_template.render(when_asked(""), NOW, OPTIONS) == "fine"
        said = {name: each.result() for name, each in running.items()}
    assert {name for name, text in said.items() if "more than 1 s of processor time" not in text} == set()
    tokenizer = when_asked(TIME["nested loops"])
    assert chat_template.is_slow(tokenizer, OPTIONS)
    assert not chat_template.is_slow(when_asked(""), OPTIONS)
    assert chat_template.render(tokenizer, LATER, OPTIONS) == "fine"


@pytest.mark.parametrize("name", OUTPUT)
def test_text_ends_where_it_is_too_long(name: str) -> None:
    assert outcome(OUTPUT[name]) == "TemplateLongError: its text is longer than 100000 characters"


@pytest.mark.parametrize("name", REACH)
def test_nothing_but_the_conversation_is_in_reach(name: str) -> None:
    said = outcome(REACH[name])
    assert said.isprintable()
    assert len(said) < 300
    refused = said.startswith("TemplateRefusedError: ")
    assert refused or said in ("fine", "<bound method>fine", "{0.__class__}fine"), said
    assert "root:" not in said


@pytest.mark.parametrize("attack", [MEMORY["padding"], OUTPUT["many texts"], TIME["a power"]])
def test_template_that_misuses_at_once_is_refused_at_loading(attack: str) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        chat_template.check(attack)
    with pytest.raises(ConfigError, match="chat template"):
        chat_template.features(tokenizer_with(attack))


@pytest.mark.parametrize(
    "template",
    [
        "a" * (1 << 20) + "a",
        "{% if x %}" * 2000 + "{% endif %}" * 2000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for m in messages %}",
        "{{ 'a' | nofilter }}",
        "{% set x = 10**(10**9) %}",
    ],
    ids=["long", "deep blocks", "deep parentheses", "unfinished", "no filter", "folded constant"],
)
def test_template_that_cannot_be_compiled_is_refused_by_name(template: str) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        chat_template.check(template)


def test_server_goes_on_while_a_template_is_ended(start_server: Any) -> None:
    hog = "{% if 'now' in messages[-1].content %}" + TIME["nested loops"] + "{% endif %}" + TEMPLATE
    server = start_server(engine={"adapters": ["theirs"]}, templates={"theirs": hog})
    done, count = threading.Event(), 0

    def ask(model: str, content: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)

    def hogging() -> list[httpx.Response]:
        replies = [ask("theirs", f"now {number}") for number in range(2)]
        done.set()
        return replies

    assert ask("theirs", "later").status_code == 200
    with ThreadPoolExecutor(1) as threads:
        replies = threads.submit(hogging)
        while not done.is_set() and count < 8:
            assert ask("base", "hi").status_code == 200
            assert httpx.get(server.url + "/livez", timeout=60).status_code == 200
            count += 1
    for reply in replies.result():
        assert reply.status_code == 400
        assert "takes more than 1 s of processor time" in reply.json()["error"]["message"]
    assert count > 1  # 8 where the template has a process of its own; none while it holds the event loop
    assert ask("theirs", "later").status_code == 200
    assert server.stop() == 0
