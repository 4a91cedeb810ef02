"""Files of checkpoints, and pieces of weights, on their way from one machine to another: each serves its own, and
fetches what it lacks."""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plans.flat_tensors import ByteRange
from plans.seals import CHUNK_BYTES, Seal, altered
from runtime.processes.network import family_of

PATIENCE_S = 60.0
"""How long either side waits for the next bytes of a file."""
_MOST_REQUEST = 2**16
_PIECES = 512
"""Of a file, that are asked for at once."""
_SERVED = re.compile(
    r"(global_step_\d{1,15}|\.global_step_\d{1,15}\.partial)/"
    r"(rank-\d{5,9}\.safetensors|index\.json|plan\.json|run\.yaml|metrics\.jsonl)"
)


Source = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to be had, as it was sealed, and who serves it, as (host, port, secret)."""

    name: str
    seal: Seal
    sources: Sequence[Source]


class FileServer:
    """Serves the files of checkpoints in a folder, and those of `more`, to whoever knows the secret, read-only and by
    their names alone, on one address of this machine."""

    def __init__(self, host: str, folder: Path) -> None:
        self.secret = secrets.token_hex(16)
        self._server = _Server(host, self)
        self.folder = folder
        self.more: dict[str, Path] = {}
        self.source: Source = (host, int(self._server.server_address[1]), self.secret)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def __init__(self, host: str, files: FileServer) -> None:
        self.address_family = family_of(host)
        self.files = files
        super().__init__((host, 0), _Request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The other side sees that the connection ends."""


class _Request(socketserver.StreamRequestHandler):
    timeout = PATIENCE_S

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        files = self.server.files
        asked = json.loads(self.rfile.readline(_MOST_REQUEST))
        name = str(asked["name"])
        if not hmac.compare_digest(str(asked["secret"]), files.secret):
            return
        if name in files.more:  # a folder of weights may be one of links
            descriptor = os.open(files.more[name], os.O_RDONLY)
        elif _SERVED.fullmatch(name):
            descriptor = os.open(files.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        else:
            return
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            pieces = [_piece(piece, size) for piece in asked.get("pieces", [[0, size]])]
            self.wfile.write(json.dumps({"bytes": sum(stop - start for start, stop in pieces)}).encode() + b"\n")
            for start, stop in pieces:
                if start < stop:  # none at all means all that is left
                    self.connection.sendfile(file, start, stop - start)


def _piece(words: Any, size: int) -> ByteRange:
    """A piece of a file of a size. Raises ValueError for one that is not in it."""
    start, stop = (int(word) for word in words)
    if not 0 <= start <= stop <= size:
        raise ValueError("no piece of the file")
    return start, stop


def fetch(folder: Path, wanted: Wanted, step: str) -> None:
    """Have a file of checkpoint folder `step` in `folder`: what is there and right stays, what is not comes from the
    first source that has it whole. Raises OSError."""
    target = folder / wanted.name
    if os.path.isfile(target) and not altered(folder, {wanted.name: wanted.seal}):
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial, said = folder / f".{wanted.name}.fetched", "nobody has it"
    for source in wanted.sources:
        try:
            _receive(source, f"{step}/{wanted.name}", partial)
            if fault := altered(folder, {partial.name: wanted.seal}):
                raise OSError(fault)
            partial.rename(target)
            return
        except (OSError, ValueError, KeyError) as error:
            said = f"{source[0]}: {error}"
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    raise OSError(f"`{step}/{wanted.name}` cannot be fetched ({said})")


def fetch_pieces(sources: Sequence[Source], name: str, pieces: Sequence[ByteRange], target: Path, size: int) -> None:
    """Have pieces of a served file in the same places of a file of its size, from the first source that gives them; the
    rest of a new one is holes. Raises OSError."""
    for first in range(0, len(pieces), _PIECES):
        said, some = "nobody has it", pieces[first : first + _PIECES]
        for source in sources:
            try:
                descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "wb") as file, _asked(source, name, some) as (stream, _):
                    file.truncate(size)
                    for start, stop in some:
                        file.seek(start)
                        _copy(stream, file, stop - start)
                break
            except (OSError, ValueError, KeyError) as error:
                said = f"{source[0]}: {error}"
        else:
            raise OSError(f"`{name}` cannot be fetched ({said})")


def _receive(source: Source, name: str, target: Path) -> None:
    with _asked(source, name) as (stream, content), target.open("wb") as file:
        _copy(stream, file, content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _asked(source: Source, name: str, pieces: Sequence[ByteRange] | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """The bytes of a file of another machine, or of pieces of it, and how many they are."""
    host, port, secret = source
    with socket.create_connection((host, port), timeout=PATIENCE_S) as end:
        request: dict[str, Any] = {"secret": secret, "name": name} | ({"pieces": pieces} if pieces else {})
        end.sendall(json.dumps(request).encode() + b"\n")
        with end.makefile("rb") as stream:
            head = stream.readline(_MOST_REQUEST)
            if not head:
                raise OSError("it has no such file")
            yield stream, int(json.loads(head)["bytes"])


def _copy(stream: BinaryIO, file: BinaryIO, left: int) -> None:
    while left:
        chunk = stream.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise OSError("the connection ended before the file did")
        file.write(chunk)
        left -= len(chunk)
