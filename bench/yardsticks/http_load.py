"""Ask one server for the same pages again and again, over connections that stay open; how fast it answers.

    python bench/yardsticks/http_load.py '{"port": 8000, "paths": ["/"], "headers": {}, "clients": 8, "seconds": 3}'

Every client sends its next request when it has the answer to the one before. The requests are made beforehand and of an
answer only its head is read, so that one thread asks for more than any server of one process can answer. Prints a line
of JSON: answers by status, their rate a second, milliseconds of each (median, 99th of a hundred, longest), and the
processor seconds that asking took.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import statistics
import sys
import time
from collections import Counter
from itertools import cycle
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Client:
    """One open connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked = 0.0
        self._answer = b""

    def ask(self, request: bytes) -> None:
        self.asked = time.perf_counter()
        self.socket.sendall(request)

    def read(self) -> int:
        """The answer's status, once it is there as a whole; 0 before."""
        piece = self.socket.recv(1 << 16)
        if not piece:
            raise SystemExit("The server has closed a connection.")
        self._answer += piece
        head = self._answer.find(b"\r\n\r\n")
        if head < 0:
            return 0
        length = _LENGTH.search(self._answer, 0, head)
        if len(self._answer) < head + 4 + (int(length[1]) if length else 0):
            return 0
        status = int(self._answer[9:12])
        self._answer = b""
        return status


def load(port: int, paths: list[str], headers: dict[str, str], clients: int, seconds: float) -> dict[str, Any]:
    said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = cycle([f"GET {path} HTTP/1.1\r\nhost: bench\r\n{said}\r\n".encode() for path in paths])
    statuses: Counter[int] = Counter()
    waits: list[float] = []
    with selectors.DefaultSelector() as selector:
        for client in [Client(port) for _ in range(clients)]:
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.ask(next(requests))
        started, cpu = time.perf_counter(), time.process_time()
        end = started + seconds
        while time.perf_counter() < end:
            for key, _ in selector.select(1):
                client = key.data
                if status := client.read():
                    waits.append(time.perf_counter() - client.asked)
                    statuses[status] += 1
                    client.ask(next(requests))
        taken, cpu = time.perf_counter() - started, time.process_time() - cpu
        for key in list(selector.get_map().values()):
            key.data.socket.close()
    hundredths = [1000 * wait for wait in statistics.quantiles(waits, n=100)]
    return {
        "statuses": statuses,
        "rate": round(len(waits) / taken, 1),
        "ms_p50": round(hundredths[49], 3),
        "ms_p99": round(hundredths[98], 3),
        "ms_longest": round(1000 * max(waits), 3),
        "asking_cpu_seconds": round(cpu, 2),
    }


if __name__ == "__main__":
    print(json.dumps(load(**json.loads(sys.argv[1]))))
