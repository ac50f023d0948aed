"""WWW-Authenticate as registries and their proxies write it."""

import pytest

from runtime.oci.challenges import Challenge, parse

BASIC = Challenge("basic", "R")
BEARER = Challenge("bearer", "https://r.io/token", "r.io")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Basic realm="R"', [BASIC]),
        ('Bearer realm="https://r.io/token",service="r.io"', [BEARER]),
        ('bearer REALM = "https://r.io/token" , Service=r.io', [BEARER]),
        ('Basic realm="R", Bearer realm="https://r.io/token",service="r.io"', [BEARER, BASIC]),
        ('Bearer realm="https://r.io/token",service="r.io",Basic realm="R"', [BEARER, BASIC]),
        ('Bearer realm="https://r.io/token",service="r.io" Basic realm="R"', [BEARER, BASIC]),
        ('Negotiate, Basic realm="R"', [BASIC]),
        ('Negotiate YII=, Basic realm="R"', [BASIC]),
        ('NTLM TlRMTVNTUAACAAAA==, Negotiate, Basic realm="R"', [BASIC]),
        (
            'Basic realm="a, Bearer realm=\\"x\\"", charset="UTF-8"',
            [Challenge("basic", 'a, Bearer realm="x"')],
        ),
        ('Bearer realm="https://r.io/token",scope="repository:a:pull,push",service="r.io"', [BEARER]),
        ('Bearer realm="https://r.io/t",realm="https://evil.net/t"', [Challenge("bearer", "https://r.io/t")]),
        ("Basic", [Challenge("basic")]),
        ("Negotiate", []),
        ("", []),
        (',,=,"', []),
        ('realm="x"', []),
    ],
)
def test_challenges_are_told_apart(text: str, expected: list[Challenge]) -> None:
    assert parse(text) == expected


def test_a_long_header_takes_no_time() -> None:
    for piece in ("a ", "a=", 'a="', ",", "a" * 99, "=", ' "'):
        parse(piece * 20_000)
