"""Everybody who harms a server, at once, for some seconds; prints the tally of statuses as JSON.

    python crowd.py URL SECONDS attacks|manners

In a minute: 1,000 ordinary requests, a third of whose clients leave before the answer; 50 streams that
nobody reads; and a schema a second that takes hours to compile. With manners the same clients stay, read, and
send a small schema.
"""

import asyncio
import json
import random
import socket
import sys
from collections import Counter

REQUESTS, READERS = 1000, 50
"""In a minute."""


def request(path: str, body: dict) -> bytes:
    """Return the bytes of a POST on a connection of its own."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Crowd:
    """The clients, and what they were answered."""

    def __init__(self, url: str, seconds: float, *, attacks: bool) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.seconds = seconds
        self.attacks = attacks
        self.counts: Counter[str] = Counter()

    async def send(self, kind: str, content: bytes, *, leave_s: float | None = None) -> None:
        """Send one request, read its answer, and count its status; leave after `leave_s` without it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(content)
            async with asyncio.timeout(leave_s or self.seconds + 30):
                reply = await reader.read()
            status = reply.split(None, 2)[1].decode() if reply else "closed"
        except TimeoutError:
            status = "left" if leave_s else "late"
        except OSError:
            status = "reset"
        finally:
            writer.close()
        self.counts[f"{kind} {status}"] += 1

    async def ordinary(self) -> None:
        """Send `REQUESTS` a minute at random moments."""
        random.seed(0)

        async def one(number: int) -> None:
            await asyncio.sleep(random.uniform(0, self.seconds))
            body = {"prompt": f"question {number}", "max_new_tokens": 8}
            leave_s = random.uniform(0.001, 0.05) if self.attacks and number % 3 == 0 else None
            await self.send("ordinary", request("/chat", body), leave_s=leave_s)

        await asyncio.gather(*(one(number) for number in range(int(REQUESTS * self.seconds / 60))))

    async def readers(self) -> None:
        """Ask for a long stream now and again; an attacker reads nothing of it until the server ends it."""
        content = request("/chat", {"prompt": "x", "stream": True, "ignore_eos": True, "max_new_tokens": 600})

        async def one(number: int) -> None:
            await asyncio.sleep(number * 60 / READERS)
            if not self.attacks:
                return await self.send("reader", content)
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, (self.host, self.port))
                await loop.sock_sendall(client, content)
                await asyncio.sleep(self.seconds)

        await asyncio.gather(*(one(number) for number in range(int(READERS * self.seconds / 60))))

    async def schemas(self) -> None:
        """Send a schema a second, each another; an attacker's is one that no compiler finishes."""
        running = set()
        for second in range(int(self.seconds)):
            count = 30 if self.attacks else 1
            patterns = [{"pattern": f"^.*a{second}b{number}.*$"} for number in range(count)]
            body = {"prompt": "x", "guided_json": {"type": "string", "allOf": patterns}, "max_new_tokens": 8}
            running.add(asyncio.create_task(self.send("schema", request("/chat", body))))
            await asyncio.sleep(1)
        await asyncio.gather(*running)

    async def run(self) -> None:
        """Run all of them to their end."""
        async with asyncio.timeout(self.seconds + 60), asyncio.TaskGroup() as crowd:
            readers = crowd.create_task(self.readers())
            await asyncio.gather(self.ordinary(), self.schemas())
            readers.cancel()


if __name__ == "__main__":
    crowd = Crowd(sys.argv[1], float(sys.argv[2]), attacks=sys.argv[3] == "attacks")
    asyncio.run(crowd.run())
    print(json.dumps(crowd.counts))
