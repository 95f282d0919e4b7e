"""Messages between the runner and a worker: JSON in frames over a socket of their own.

Never over stdout, which belongs to the kernels; and never pickled, because a worker's memory may be damaged and what
comes from it is read with suspicion.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

HEAD = struct.Struct(">4sI")
MAGIC = b"hal1"
#: A frame that says it is longer than this is no frame.
LONGEST = 1 << 24


class Garbage(Exception):  # noqa: N818 - what was received, not what went wrong here
    """Bytes that are no message."""


def frame(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return HEAD.pack(MAGIC, len(body)) + body


class Channel:
    """One end. Only the process that made it can send: a fork of a worker is silent."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self._owner, self._read = end, os.getpid(), bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        if os.getpid() == self._owner:
            self.socket.sendall(frame(message))

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message; None at the end of the stream."""
        while (message := self._next()) is None:
            if not (chunk := self.socket.recv(65536)):
                return None
            self._read += chunk
        return message

    def waiting(self) -> tuple[list[dict[str, Any]], bool, str]:
        """What has come so far without waiting, whether the stream is still open, and what came that is no message."""
        is_open = True
        with suppress(BlockingIOError):
            for _ in range(64):  # a worker that floods us must not hold us
                chunk = self._arrived()
                if not chunk:
                    is_open = False
                    break
                self._read += chunk
        messages = []
        try:
            while (message := self._next()) is not None:
                messages.append(message)
        except Garbage as problem:
            return messages, is_open, str(problem)
        return messages, is_open, ""

    def _arrived(self) -> bytes:
        try:
            return self.socket.recv(65536, socket.MSG_DONTWAIT)
        except ConnectionError:
            return b""

    def _next(self) -> dict[str, Any] | None:
        if len(self._read) < HEAD.size:
            return None
        magic, length = HEAD.unpack_from(self._read)
        if magic != MAGIC or length > LONGEST:
            raise Garbage("a frame that begins with " + repr(bytes(self._read[:16])))
        if len(self._read) < HEAD.size + length:
            return None
        body = bytes(self._read[HEAD.size : HEAD.size + length])
        del self._read[: HEAD.size + length]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise Garbage("a frame that is no JSON: " + repr(body[:40])) from None
        if not isinstance(message, dict):
            raise Garbage("a message that is no object: " + repr(body[:40]))
        return message
