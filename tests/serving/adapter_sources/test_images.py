"""Adapters from a registry where a signature is required: what is served, also of files on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import oci
from tests.oci.conftest import indexed
from tests.oci.keypairs import KeyPair, make_pair
from tests.serving.adapter_sources.conftest import ACCESS, OpenShop, Shelf

pytestmark = [pytest.mark.model, pytest.mark.anyio]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def sign(pair: KeyPair, shelf: Shelf) -> Callable[[str, str], None]:
    """Return what signs an image, named by the repository and the digest, as the source names it."""

    def signing(name: str, digest: str) -> None:
        reference = oci.parse(f"{shelf.source}/{name}")
        oci.sign(reference, digest, oci.read_private(pair.private), access=ACCESS)

    return signing


@pytest.mark.parametrize("signed", ["image", "index"])
async def test_signed_images_are_served_and_others_are_not_though_their_files_are_there(
    open_shop: OpenShop,
    shelf: Shelf,
    pair: KeyPair,
    sign: Callable[[str, str], None],
    colours: dict[str, Path],
    tmp_path: Path,
    signed: str,
) -> None:
    """In an index of several machines, either the index is signed or the image in it."""
    name = f"{signed}-signed"
    for tag in ("yes", "no"):
        shelf.push(colours["red" if tag == "yes" else "blue"], f"{name}:{tag}")
        index = indexed(oci.parse(f"{shelf.host}/team/adapters/{name}:{tag}"), shelf.digests[f"{name}:{tag}"])
        if tag == "yes":
            sign(name, index if signed == "index" else shelf.digests[f"{name}:{tag}"])
    access = replace(ACCESS, required_keys=(str(pair.public),))
    async with open_shop(cache=tmp_path / "cache") as shop:
        for tag in ("yes", "no"):
            await shop.answer(f"{name}:{tag}")
    for cache in (tmp_path / "cache", tmp_path / "new", tmp_path / "new"):
        async with open_shop(cache=cache, access=access) as shop:
            await shop.answer(f"{name}:yes")
            refused = await shop.ask(f"{name}:no")
            assert refused.json()["error"]["message"].endswith("the server's log says why"), refused.text
