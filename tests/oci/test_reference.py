"""Image names: what parses into what, and the errors for what does not parse."""

from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.oci import Reference, checkpoints, is_image, parse
from runtime.oci.reference import below, parse_repository, with_suffix

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", Reference("docker.io", "library/busybox", "latest")),
        ("me/img:1", Reference("docker.io", "me/img", "1")),
        ("docker.io/busybox", Reference("docker.io", "library/busybox", "latest")),
        ("index.docker.io/a/b", Reference("docker.io", "a/b", "latest")),
        ("localhost/a", Reference("localhost", "a", "latest")),
        ("127.0.0.1:5000/a/b:v1", Reference("127.0.0.1:5000", "a/b", "v1")),
        ("[::1]:5000/a:v1", Reference("[::1]:5000", "a", "v1")),
        ("my.azurecr.io/a_b/c-d:0.0.1", Reference("my.azurecr.io", "a_b/c-d", "0.0.1")),
        (f"my.azurecr.io/a@{DIGEST}", Reference("my.azurecr.io", "a", None, DIGEST)),
        (f"my.azurecr.io/a:v1@{DIGEST}", Reference("my.azurecr.io", "a", "v1", DIGEST)),
        ("oci:out", Reference("", "", None, layout=Path("out"))),
        ("oci:./out:v1", Reference("", "", "v1", layout=Path("out"))),
        ("oci:/a:b/c", Reference("", "", None, layout=Path("/a:b/c"))),
        ("oci://my.azurecr.io/a/b:v1", Reference("my.azurecr.io", "a/b", "v1")),
        (f"oci://127.0.0.1:5000/a@{DIGEST}", Reference("127.0.0.1:5000", "a", None, DIGEST)),
        ("oci:/a:b/c:v1", Reference("", "", "v1", layout=Path("/a:b/c"))),
        ("oci:./a@b/c:v1", Reference("", "", "v1", layout=Path("a@b/c"))),
        (f"oci:out@{DIGEST}", Reference("", "", None, DIGEST, Path("out"))),
        ("ACR_REPO_HERE.azurecr.io/image:0.0.1", Reference("ACR_REPO_HERE.azurecr.io", "image", "0.0.1")),
    ],
)
def test_reference_is_read_as_docker_reads_it(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "lower-case"),
        ("https://my.azurecr.io/a:1", "without the scheme"),
        ("my.azurecr.io/a:tag with space", "tag"),
        ("my.azurecr.io/a:", "tag"),
        ("my.azurecr.io/a@sha256:123", "digest"),
        ("my.azurecr.io/a//b", "repository"),
        ("my.azurecr.io/../etc", "repository"),
        ("my.azurecr.io:99999/a", "host"),
        ("my..io?x/a", "host"),
        ("", "expected"),
        (" a", "expected"),
        ("oci:", "no directory"),
        ("oci::v1", "no directory"),
        ("oci:///srv/layout:v1", "for a directory write 'oci:/srv/layout:v1'"),
    ],
)
def test_wrong_reference_says_which_part(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_tagged_changes_the_tag_alone() -> None:
    assert str(parse(f"r.io/a:1@{DIGEST}").tagged("1-checkpoint")) == "r.io/a:1-checkpoint"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("r.io/a:1", "r.io/a:1-checkpoint"),
        ("r.io/a", "r.io/a:latest-checkpoint"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest-checkpoint"),
        (f"r.io/a:1@{DIGEST}", "r.io/a:1-checkpoint"),
        (f"r.io/a@{DIGEST}", "r.io/a:latest-checkpoint"),
        ("oci:out", "oci:out:latest-checkpoint"),
        ("oci://r.io/a:1", "oci://r.io/a:1-checkpoint"),
        ("oci:/a:b/c:v1", "oci:/a:b/c:v1-checkpoint"),
        ("X.azurecr.io/IMAGE_NAME_HERE:0.0.1", "X.azurecr.io/IMAGE_NAME_HERE:0.0.1-checkpoint"),
    ],
)  # fmt: skip
def test_checkpoints_lie_beside_the_output(output: str, expected: str) -> None:
    assert checkpoints.beside(output) == expected


@pytest.mark.parametrize("length", [116, 117, 118, 128])
def test_a_checkpoint_tag_is_never_too_long_and_never_anothers(length: int) -> None:
    first, second = (f"r.io/a:{'t' * (length - 1)}{end}" for end in "ab")
    tags = [parse(checkpoints.beside(output)).tag or "" for output in (first, second)]
    tags += [
        parse(with_suffix(checkpoints.beside(output), "-previous")).tag or "" for output in (first, second)
    ]
    assert len(set(tags)) == 4
    assert all(len(tag) <= 128 for tag in tags)
    assert tags[0].endswith("-checkpoint")
    assert (tags[0] == f"{'t' * (length - 1)}a-checkpoint") == (length <= 117)


def test_a_tag_alone_makes_an_image_only_where_no_repository_id_is_possible() -> None:
    assert is_image("me/adapter:1")
    assert not is_image("me/adapter:1", or_repository_id=True)
    assert is_image("some.org/model-1.5")
    assert not is_image("some.org/model-1.5", or_repository_id=True)


@pytest.mark.parametrize("text", ["user:pw123@127.0.0.1:1/x:1", "user:pw123@x.io/a:1"])
def test_a_login_in_a_name_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="a name holds no login") as caught:
        parse(text)
    assert "pw123" not in str(caught.value)


def test_upper_case_is_refused_with_a_name_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"not 'IMAGE'; for example 'image'$"):
        parse("IMAGE")
    with pytest.raises(ConfigError, match=r"not 'Team/Tarn'; for example 'r.io/team/tarn:V1'$"):
        parse("r.io/Team/Tarn:V1")


@pytest.mark.parametrize("host", ["100.64.3.2", "100.101.102.103:5000", "10.0.0.7:5000", "[fd00::5]:5000"])
def test_registries_of_private_and_overlay_networks_are_taken(host: str) -> None:
    assert parse(f"{host}/adapters/a:1").registry == host


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "168.63.129.16:80", "[::ffff:a9fe:a9fe]:443", "0xa9fea9fe:80", "metadata.goog"],
)
def test_registries_at_metadata_addresses_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="a link-local or metadata address; nothing is sent there"):
        parse(f"{host}/x/y")


def test_names_below_a_source_keep_its_host_and_path() -> None:
    source = parse_repository("r.io:5000/team/adapters")
    assert str(below(source, "support:3")) == "r.io:5000/team/adapters/support:3"
    assert str(below(source, "support")) == "r.io:5000/team/adapters/support:latest"
    assert str(below(source, "a/b_c.d:V1.0")) == "r.io:5000/team/adapters/a/b_c.d:V1.0"
    assert str(below(source, ":3")) == "r.io:5000/team/adapters:3"
    for name in (
        "",
        ":",
        "a:",
        "A",
        "a//b",
        "/a",
        "a/",
        "..",
        "a/../b",
        "a@b",
        "a:1:2",
        "a:1@x",
        "a\n",
        "a:1\n",
    ):
        assert below(source, name) is None, name
    assert below(source, "a" * 255) is None


@pytest.mark.parametrize(
    "text",
    ["r.io/a:1", "r.io/a@sha256:" + "0" * 64, "team/a", "a", "oci:/x", "https://r.io/a", "r.io/", ""],
)  # fmt: skip
def test_what_is_no_folder_of_a_registry_is_no_source(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_repository(text)
