"""Sends many POST /chat at the same time and prints how many answers had which status."""

import asyncio
import json
import sys
from collections import Counter

BODY = b'{"prompt": "hi"}'


async def post(host: str, port: int) -> str:
    """Send one request on a connection of its own and return the status."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(BODY)
    )
    writer.write(BODY)
    reply = await reader.read()
    writer.close()
    head = reply.partition(b"\r\n\r\n")[0].lower()
    status = head.split()[1].decode()
    if status == "429":
        assert b"retry-after:" in head
    return status


async def main(url: str, count: int) -> None:
    """Send `count` requests to `url` and print the tally as JSON."""
    host, _, port = url.removeprefix("http://").partition(":")
    print(json.dumps(Counter(await asyncio.gather(*(post(host, int(port)) for _ in range(count))))))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
