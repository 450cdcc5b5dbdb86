"""Connections between the processes of a run: JSON objects, a line each.

Anybody may connect to an open port. So nothing that arrives raises anything but `EOFError`, no line
is longer than `MAX_LINE`, and what others say of themselves is printed by way of `printable`.
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
      name: of the other side, for messages.
    """

    def __init__(self, link: socket.socket, name: str = ""):
        self.link = link
        self.name = name
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; one to a peer that is gone is lost, its end shows in `read`."""
        with self._lock, contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> None:
        """Takes in what has arrived; waits for some data.

        Raises:
          EOFError: the other side is gone.
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
        """Those that have been read; what the caller does not take is kept for the next call.

        Raises:
          EOFError: the other side does not speak our language.
        """
        while self._buffer:
            if not self._buffer.startswith(b"{"):  # known before the line is whole
                raise EOFError("what it sent is no JSON object")
            line, end, rest = self._buffer.partition(b"\n")
            if len(line) > MAX_LINE:
                raise EOFError(f"it sent a line of more than {MAX_LINE} bytes")
            if not end:
                return
            self._buffer = rest
            try:
                message = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EOFError("what it sent is no JSON object") from error
            yield message

    def next(self, seconds: float) -> dict[str, Any]:
        """The next message, if it comes within the time; else an empty one."""
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
        """Whether the other side still holds its end."""
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
    """Prints a line on the standard error stream."""
    print(f"easy-jax: {message}", file=sys.stderr, flush=True)


def printable(value: Any, limit: int = 200) -> str:
    r"""Text from outside as it may be printed: control characters escaped, its length cut.

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
    """Not a list or an object, whose nesting may be too deep for `repr`."""
    return value is None or isinstance(value, int | float)
