"""A wire to a server that can be cut: what a bad network does, with real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from tests.servers import HOST

PIECE_BYTES = 16 * 1024


@dataclass
class Trouble:
    """What happens to the next connection whose request holds `asking`, once `after` bytes of it have gone `way`."""

    way: Literal["up", "down"]
    after: int
    then: Literal["cut", "hold"] = "cut"
    asking: bytes = b""
    #: For every such connection, not only for the next one.
    always: bool = False


class Wire:
    def __init__(self, port: int, server_port: int) -> None:
        self.url = f"http://{HOST}:{port}"
        self.troubles: list[Trouble] = []
        #: Troubles that have come about.
        self.met = 0
        #: Bytes that came down in all.
        self.down = 0
        self._server_port = server_port
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def cut_all(self) -> None:
        with self._lock:
            for end in list(self._open):
                _end(end)

    def carry(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection((HOST, self._server_port))
        except OSError:
            client.close()
            return
        line = _Line(self, client, server)
        with self._lock:
            self._open |= {client, server}
        for run in (line.up, line.down):
            threading.Thread(target=run, daemon=True).start()

    def trouble_for(self, piece: bytes) -> Trouble | None:
        with self._lock:
            for trouble in self.troubles:
                if trouble.asking in piece:
                    if not trouble.always:
                        self.troubles.remove(trouble)
                    return trouble
        return None

    def forget(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)


class _Line:
    """One connection."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self._wire = wire
        self._client = client
        self._server = server
        self._trouble: Trouble | None = None
        self._gone = {"up": 0, "down": 0}

    def up(self) -> None:
        self._pump("up", self._client, self._server)

    def down(self) -> None:
        self._pump("down", self._server, self._client)

    def _pump(self, way: Literal["up", "down"], source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if way == "up" and self._trouble is None and (found := self._wire.trouble_for(piece)):
                    self._gone = {"up": 0, "down": 0}
                    self._trouble = found
                if not self._lets_through(way, piece):
                    return
                sink.sendall(piece)
                if way == "down":
                    self._wire.down += len(piece)
        for end in (self._client, self._server):
            _end(end)
        self._wire.forget(self._client, self._server)

    def _lets_through(self, way: str, piece: bytes) -> bool:
        trouble = self._trouble
        self._gone[way] += len(piece)
        if trouble is None or trouble.way != way or self._gone[way] <= trouble.after:
            return True
        self._wire.met += 1
        if trouble.then == "cut":
            _end(self._client)
            _end(self._server)
        return False


def _end(socket_end: socket.socket) -> None:
    """What was sent before still arrives, so that a test can tell how much that was."""
    with suppress(OSError):
        socket_end.shutdown(socket.SHUT_RDWR)
    socket_end.close()


@contextmanager
def wire_to(server_port: int) -> Iterator[Wire]:
    with socket.create_server((HOST, 0)) as listener:
        wire = Wire(listener.getsockname()[1], server_port)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    wire.carry(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield wire
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            wire.cut_all()
            thread.join()
