"""How the pages and their files are served: types, policy, caching and the key; what is in the folder."""

import re
from pathlib import Path
from typing import Any

import pytest

from runtime.serving.http import pages

pytestmark = pytest.mark.anyio

FOLDER = Path(pages.__file__).parent / "page"
HTML = {"Accept": "text/html"}


async def test_files_have_types_tags_and_are_not_sent_twice(open_site: Any) -> None:
    async with open_site() as site:
        for name, kind in pages.ASSETS.items():
            first = await site.client.get(f"/page/{name}")
            assert (first.status_code, first.headers["content-type"]) == (200, f"{kind}; charset=utf-8"), name
            assert first.headers["x-content-type-options"] == "nosniff"
            assert first.headers["cache-control"] == "no-cache"
            again = await site.client.get(
                f"/page/{name}", headers={"If-None-Match": f'"x", W/{first.headers["etag"]}'}
            )
            assert (again.status_code, again.content) == (304, b"")


async def test_only_listed_files_are_served(open_site: Any) -> None:
    async with open_site() as site:
        for name in ("index.html", "marked/LICENSE", "..%2fpages.py", "%2e%2e/pages.py", "chat.js/x", ""):
            assert (await site.client.get(f"/page/{name}")).status_code == 404, name


async def test_files_need_no_key_and_the_chat_page_does(open_site: Any) -> None:
    async with open_site(api_key="KEY") as site:
        assert (await site.client.get("/page/chat.js")).status_code == 200
        assert (await site.client.get("/page/other.js")).status_code == 401
        assert (await site.client.get("/", headers=HTML)).status_code == 401
        assert (await site.client.get("/v1/models")).status_code == 401


async def test_policy_allows_this_servers_files_and_no_html_from_text(open_site: Any) -> None:
    async with open_site() as site:
        for path in ("/", "/docs"):
            reply = await site.client.get(path, headers=HTML)
            policy = reply.headers["content-security-policy"]
            assert "unsafe" not in policy
            assert "default-src 'none'; script-src 'self'" in policy
            assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
            assert not re.search(r" on\w+=| style=|<script>|https?://", reply.text)


def test_every_file_is_served_loaded_and_small() -> None:
    scripts = {
        path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in {".js", ".css"}
    }
    assert scripts == set(pages.ASSETS)
    own = [path for path in FOLDER.iterdir() if path.is_file()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in own}
    assert [name for name in scripts if f'{name}"' not in "".join(texts.values())] == []
    assert {name: text.count("\n") for name, text in texts.items() if text.count("\n") > 500} == {}


def test_vendored_library_states_version_and_licence() -> None:
    assert "marked v18.2.1 - " in (FOLDER / "marked/marked.esm.js").read_text(encoding="utf-8")[:200]
    assert "Permission is hereby granted" in (FOLDER / "marked/LICENSE").read_text(encoding="utf-8")
