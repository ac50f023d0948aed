"""Which host a request is for: the one certain answer that HTTP wants, or why there is none.

What stands in `Host` decides which pages may call (origins.py), so it must not be read in two ways. Knows
RFC 9112, 3.2; does not know which names this server answers to. Start at `with_certain_host`.
"""

import re

_HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[\w.~%!$&'()*+,;=-]*)(?::\d*)?")

Fields = list[tuple[bytes, bytes]]


def with_certain_host(fields: Fields, target: bytes, version: str) -> Fields:
    """Return `fields`, whose names are in lower case, with the host that the request is for.

    That of a `target` that is an absolute URL, which clients send to proxies, goes before `Host`. Raises
    ValueError with what is wrong.
    """
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1:
        raise ValueError(f"the request has {len(hosts)} Host fields, expected one")
    if not hosts and version == "1.1":
        raise ValueError("the request has no Host field, which HTTP/1.1 asks for")
    if not target.startswith((b"/", b"*")):
        authority = re.split(rb"[/?#]", target.partition(b"://")[2], maxsplit=1)[0]
        fields = [(b"host", authority), *((name, value) for name, value in fields if name != b"host")]
        hosts.append(authority)
    if not all(map(_HOST.fullmatch, hosts)):
        raise ValueError("the request's host is not a name or address, with or without a port")
    return fields
