"""Connections between the processes of a run, which carry one JSON object per line.

Anybody can connect to an open port. Therefore received data never raises anything but `EOFError`,
lines longer than `MAX_LINE` end the connection, and received text is printed through `printable`.
"""

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

MAX_LINE = 1 << 16  # bytes


class Connection:
    """A connection that sends and receives JSON objects.

    Args:
      link: a connected socket.
      name: name of the other side, for error messages.
    """

    def __init__(self, link: socket.socket, name: str = ""):
        self.link = link
        self.name = name
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message. If the other side is gone, the message is lost and `read` will raise."""
        with self._lock, contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> None:
        """Receives data into the buffer; waits for some, up to the socket's timeout.

        Raises:
          EOFError: the connection was closed or broke.
        """
        try:
            data = self.link.recv(MAX_LINE)
        except TimeoutError:
            return
        except OSError as error:
            raise EOFError(f"the connection broke ({error.strerror})") from error
        if not data:
            raise EOFError("it closed the connection")
        self._buffer += data

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields the messages in the buffer; those not consumed remain for the next call.

        Raises:
          EOFError: the data is not a JSON object, or the line is too long.
        """
        while self._buffer:
            if not self._buffer.startswith(b"{"):  # checked before the line is complete
                raise EOFError("it sent data that is not a JSON object")
            line, end, rest = self._buffer.partition(b"\n")
            if len(line) > MAX_LINE:
                raise EOFError(f"it sent a line of more than {MAX_LINE} bytes")
            if not end:
                return
            self._buffer = rest
            try:
                message = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EOFError("it sent data that is not a JSON object") from error
            yield message

    def next(self, seconds: float) -> dict[str, Any]:
        """Returns the next message; an empty one if none arrives in time."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(EOFError):
            while True:
                for message in self.messages():
                    return message
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self.link.settimeout(left)
                self.read()
        return {}

    def is_open(self) -> bool:
        """Returns whether the other side has not closed the connection."""
        self.link.settimeout(0.0)
        try:
            return self.link.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self.link.close()


def say(message: str) -> None:
    """Prints a line to the standard error stream."""
    print(f"easy-jax: {message}", file=sys.stderr, flush=True)


def printable(value: Any, limit: int = 200) -> str:
    r"""Makes received text safe to print: escapes control characters and limits the length.

    Example:
      >>> printable("host\x1b[2J")
      'host\\x1b[2J'
      >>> printable("abcdef", limit=3)
      'abc...'
    """
    text = value if isinstance(value, str) else repr(value) if _is_plain(value) else "?"
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )
    return shown + ("..." if len(text) > limit else "")


def _is_plain(value: Any) -> bool:
    """Returns whether a value is a scalar; others may be nested too deeply for `repr`."""
    return value is None or isinstance(value, int | float)
