"""The admin protocol: JSON-RPC 2.0, one object a line, UTF-8, ended by a newline. Sans-IO.

Owns framing, the shape of requests and replies, and how an exception crosses the socket. Never
touches a socket and knows no method. Used by ``engine.control`` (one side) and ``cli.client``
(the other).

======================  =========================================================================
line                    meaning
======================  =========================================================================
request                 ``{"jsonrpc": "2.0", "id": 1, "method": "status", "params": {...}}``;
                        ``params`` may be left out and is an object, never an array; without
                        ``id`` it is carried out and not answered
result                  ``{"jsonrpc": "2.0", "id": 1, "result": {...}}``
error                   ``{"jsonrpc": "2.0", "id": 1, "error": {"code": 1004, "message": "...",
                        "data": {"exit_code": 4, "hint": "..."}}}``
notification            ``{"jsonrpc": "2.0", "method": "event", "params": {...}}``
======================  =========================================================================

Codes: -32700 not JSON, -32600 not a request, -32601 no such method, -32602 wrong parameters,
-32603 a defect in the daemon; 1000 + exit code for every error of ``errors``. Batches (arrays) are
refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from nbdmirror.errors import FormatError, NbdmirrorError, NoDaemon, Refused, TimedOut, UsageError

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
ERROR_CODE_BASE = 1000

METHOD_CHARACTERS_MAX = 64

Id = str | int | None
Json = dict[str, Any]


class RpcError(NbdmirrorError):
    """An error of JSON-RPC itself: ``code`` is one of the -32xxx. Exit 2, a defect is 1."""

    def __init__(self, code: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.exit_code = 1 if code == INTERNAL_ERROR else 2
        self.request_id: Id = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for; ``answered`` is False for a request without an id."""

    method: str
    params: Json
    id: Id = None
    answered: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request: ``error`` is None or JSON-RPC's error object."""

    id: Id
    result: Any = None
    error: Json | None = None


@dataclass(frozen=True, slots=True)
class Notification:
    """What the daemon says unasked."""

    method: str
    params: Json


class LineFramer:
    """Cuts a byte stream into lines of at most ``line_bytes_max`` bytes, the newline not counted.

    Holds at most one line and what came with it; empty lines are skipped."""

    def __init__(self, line_bytes_max: int) -> None:
        assert line_bytes_max > 0
        self._line_bytes_max = line_bytes_max
        self._rest = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """The lines that are complete with this data; FormatError if one is too long, and then
        the stream is of no more use. What came before the long line is lost with it."""
        searched = len(self._rest)
        self._rest += data
        lines = []
        start = 0
        while (end := self._rest.find(b"\n", max(start, searched))) >= 0:
            self._check(end - start)
            line = bytes(self._rest[start:end]).strip()
            if line:
                lines.append(line)
            start = end + 1
        del self._rest[:start]
        self._check(len(self._rest))
        return lines

    def _check(self, length: int) -> None:
        if length > self._line_bytes_max:
            raise FormatError(f"a line is longer than {self._line_bytes_max} bytes")


def parse_request(line: bytes) -> Request:
    """The request in a line; RpcError (with the id where it is known) if there is none."""
    data = _parse_object(line)
    request_id = data.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, str | int | None):
        raise RpcError(INVALID_REQUEST, "id must be a string or an integer")
    try:
        return _request(data, request_id)
    except RpcError as error:
        error.request_id = request_id
        raise


def _request(data: Json, request_id: Id) -> Request:
    if data.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"')
    method = data.get("method")
    if not isinstance(method, str) or not 0 < len(method) <= METHOD_CHARACTERS_MAX:
        raise RpcError(INVALID_REQUEST, "method must be the name of a method")
    params = data.get("params", {})
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "params must be an object with named parameters")
    return Request(method, params, request_id, "id" in data)


def parse_reply(line: bytes) -> Reply | Notification:
    """What a daemon sent in a line; FormatError if it is neither reply nor notification."""
    try:
        data = _parse_object(line)
    except RpcError as error:
        raise FormatError(f"the daemon sent what is not a reply: {error.message}") from None
    method, params, error_object = data.get("method"), data.get("params", {}), data.get("error")
    if isinstance(method, str) and isinstance(params, dict):
        return Notification(method, params)
    if "id" in data and isinstance(error_object, dict):
        return Reply(data["id"], error=error_object)
    if "id" in data and "result" in data:
        return Reply(data["id"], result=data["result"])
    raise FormatError("the daemon sent an object that is neither reply nor notification")


def encode_request(method: str, params: Json, request_id: Id) -> bytes:
    """A request line."""
    return _line({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})


def encode_result(request_id: Id, result: Any) -> bytes:
    """The line that answers a request that was carried out."""
    return _line({"jsonrpc": "2.0", "id": request_id, "result": result})


def encode_error(request_id: Id, error: NbdmirrorError) -> bytes:
    """The line that answers a request that was not carried out."""
    return _line({"jsonrpc": "2.0", "id": request_id, "error": error_object(error)})


def encode_notification(method: str, params: Json) -> bytes:
    """A line that answers nothing."""
    return _line({"jsonrpc": "2.0", "method": method, "params": params})


def error_object(error: NbdmirrorError) -> Json:
    """JSON-RPC's error object for an exception: code, message, data.hint, data.exit_code."""
    code = error.code if isinstance(error, RpcError) else ERROR_CODE_BASE + error.exit_code
    data = {"exit_code": error.exit_code, "hint": error.hint}
    return {"code": code, "message": error.message, "data": data}


_BY_EXIT_CODE: dict[int, type[NbdmirrorError]] = {
    error.exit_code: error for error in (UsageError, TimedOut, Refused, NoDaemon)
}


def raise_error(error: Json) -> NoReturn:
    """Raises on the client's side what the daemon raised on its own."""
    data = error.get("data")
    data = data if isinstance(data, dict) else {}
    kind = _BY_EXIT_CODE.get(data.get("exit_code", 1), NbdmirrorError)
    hint = data.get("hint")
    raise kind(str(error.get("message")), hint=hint if isinstance(hint, str) else None)


def _parse_object(line: bytes) -> Json:
    # A deep nesting ends in RecursionError, a huge integer and bad UTF-8 in ValueError.
    try:
        data = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RpcError(PARSE_ERROR, f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RpcError(INVALID_REQUEST, "a line must hold one JSON object; there are no batches")
    return data


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _line(data: Json) -> bytes:
    # ASCII with escapes, so no text that came in can break a line or fail to encode.
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
