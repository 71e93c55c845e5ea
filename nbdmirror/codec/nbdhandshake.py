"""The option stage of an NBD connection, from the client's flags to the chosen export.

Owns what was negotiated: structured replies, meta contexts, the export. Takes whole options
(``nbdserver`` cuts them out of the stream) and returns the bytes that answer them. Never opens
anything: until ``export`` is set, nothing but names and sizes has been looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from nbdmirror.codec import nbd
from nbdmirror.codec.nbd import ExportInfo, HandshakeFlag, Info, Option, Rep
from nbdmirror.config import Limits


class Forbidden(NamedTuple):
    """An export that is there, and not for this client."""

    why: str


class Tls(Enum):
    """How a connection stands to TLS: there is no "prefer"."""

    OFF = "off"
    REQUIRED = "required"
    DONE = "done"


FindExport = Callable[[str], ExportInfo | Forbidden | None]
ListExports = Callable[[], Sequence[ExportInfo]]

_OFFERED = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
GREETING = nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, _OFFERED)
_QUOTED_MAX = 64


LISTS_MAX = 8
"""Of one connection: there may be thousands of exports, and a stranger may ask (I6)."""


class _Invalid(Exception):
    """The option's data is malformed; the text says how."""


class Handshake:
    """The state of one handshake. ``export`` ends it well, ``failure`` ends the connection."""

    def __init__(
        self,
        find_export: FindExport,
        list_exports: ListExports,
        limits: Limits,
        tls: Tls = Tls.OFF,
    ):
        self._find_export = find_export
        self._tls = tls
        self._list_exports = list_exports
        self._limits = limits
        self._options_left = limits.options_max
        self._client_flags: HandshakeFlag | None = None
        self._contexts_for = ""
        self._selected: tuple[str, ...] = ()
        self._numbered: tuple[str, ...] = ()
        self.structured = False
        self.shutting_down = False
        self._lists = 0
        self.export: ExportInfo | None = None
        self.name = ""
        """What the client called it, which need not be its own name."""
        self.contexts: tuple[str, ...] = ()
        self.failure: str | None = None
        self.tls_wanted = False
        """STARTTLS was agreed upon: what comes next is TLS, and then ``after_tls``."""
        self._handlers: dict[int, Callable[[bytes], list[bytes]]] = {
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_contexts,
            Option.SET_META_CONTEXT: self._set_contexts,
        }

    def after_tls(self) -> Handshake:
        """The handshake that goes on within TLS: it knows the client's flags, how many options are
        left, and nothing else of what was said in plain text (CVE-2021-3716)."""
        assert self.tls_wanted
        fresh = Handshake(self._find_export, self._list_exports, self._limits, Tls.DONE)
        fresh._options_left = self._options_left
        fresh._client_flags = self._client_flags
        fresh.shutting_down = self.shutting_down
        return fresh

    @property
    def awaits_flags(self) -> bool:
        """Whether the client's flags are what comes next, and not an option."""
        return self._client_flags is None

    def client_flags(self, word: int) -> None:
        """The first word of the client; a bit that was not offered ends the connection."""
        if word & ~_OFFERED:
            self.failure = f"the client set handshake flags that were not offered: {word:#x}"
        self._client_flags = HandshakeFlag(word & _OFFERED)

    def oversized(self, number: int, length: int) -> list[bytes]:
        """An option whose data is not even looked at; returns the answer.

        The caller skips the data, unless ``failure`` is set: no name and no list is that long."""
        if number == Option.ABORT:
            return self.option(number, b"")
        if not self._admit(number):
            return []
        if self._tls is Tls.REQUIRED and length <= nbd.OPTION_SKIP_MAX:
            return self._before_tls(number)
        if number == Option.EXPORT_NAME or length > nbd.OPTION_SKIP_MAX:
            self.failure = f"option {number} claims {length} bytes of data"
            return []
        if number not in self._handlers:
            return [_error(number, Rep.ERR_UNSUP, "unknown option")]
        most = self._limits.option_bytes_max
        return [_error(number, Rep.ERR_TOO_BIG, f"at most {most} bytes of data")]

    def option(self, number: int, data: bytes) -> list[bytes]:
        """One whole option; returns the answer, which may be empty (EXPORT_NAME refused)."""
        assert self.export is None and self.failure is None and not self.awaits_flags
        if not self._admit(number):
            return []
        if number == Option.ABORT:  # data with it is tolerated
            self.failure = "the client ended the handshake"
            return [_reply(number, Rep.ACK)]
        if self._tls is Tls.REQUIRED and number != Option.STARTTLS:
            return self._before_tls(number)
        if number == Option.EXPORT_NAME:
            return self._export_name(data)
        if self.shutting_down:
            return [_error(number, Rep.ERR_SHUTDOWN, "the server is shutting down")]
        handler = self._handlers.get(number)
        if handler is None:
            return [_error(number, Rep.ERR_UNSUP, "unknown option")]
        try:
            return handler(data)
        except _Invalid as error:
            return [_error(number, Rep.ERR_INVALID, str(error))]

    def _before_tls(self, number: int) -> list[bytes]:
        """Nothing is told or done in plain text (FORCEDTLS)."""
        if number == Option.EXPORT_NAME:
            self.failure = "the client asked for an export without TLS"
            return []
        return [_error(number, Rep.ERR_TLS_REQD, "this listener speaks TLS: send STARTTLS first")]

    def _admit(self, number: int) -> bool:
        assert self._client_flags is not None
        if not self._options_left:
            self.failure = f"the client sent more than {self._limits.options_max} options"
            return False
        self._options_left -= 1
        if number != Option.EXPORT_NAME and not (self._client_flags & HandshakeFlag.FIXED_NEWSTYLE):
            self.failure = f"the client sent option {number} without fixed newstyle"
            return False
        return True

    # -- options ---------------------------------------------------------------------------------

    def _export_name(self, data: bytes) -> list[bytes]:
        """No error can be told: what cannot be served ends the connection."""
        if self.shutting_down:
            self.failure = "the server is shutting down"
            return []
        try:
            name = _text(data)
        except _Invalid as error:
            self.failure = f"the export's name is malformed: {error}"
            return []
        export = self._find_export(name)
        if not isinstance(export, ExportInfo):
            self.failure = _unknown(name) if export is None else export.why
            return []
        self._enter(name, export)
        flags = export.transmission_flags(self.structured)
        answer = nbd.EXPORT_NAME_REPLY.pack(export.size, flags)
        assert self._client_flags is not None
        if self._client_flags & HandshakeFlag.NO_ZEROES:
            return [answer]
        return [answer + nbd.EXPORT_NAME_PADDING]

    def _list(self, data: bytes) -> list[bytes]:
        _no_data(data)
        self._lists += 1
        if self._lists > LISTS_MAX:
            raise _Invalid(f"listed {LISTS_MAX} times: it does not change that often")
        answer = []
        for export in self._list_exports():
            entry = _counted(export.name) + export.description.encode()
            answer.append(_reply(Option.LIST, Rep.SERVER, entry))
        return [*answer, _reply(Option.LIST, Rep.ACK)]

    def _starttls(self, data: bytes) -> list[bytes]:
        _no_data(data)
        if self._tls is Tls.OFF:
            return [_error(Option.STARTTLS, Rep.ERR_UNSUP, "this listener has no TLS")]
        if self._tls is Tls.DONE:
            raise _Invalid("this is TLS already")
        self.tls_wanted = True
        return [_reply(Option.STARTTLS, Rep.ACK)]

    def _structured_reply(self, data: bytes) -> list[bytes]:
        _no_data(data)
        self.structured = True
        return [_reply(Option.STRUCTURED_REPLY, Rep.ACK)]

    def _info(self, data: bytes) -> list[bytes]:
        return self._describe(Option.INFO, data)[0]

    def _go(self, data: bytes) -> list[bytes]:
        answer, name, export = self._describe(Option.GO, data)
        if export is not None:
            self._enter(name, export)
        return answer

    def _describe(self, option: Option, data: bytes) -> tuple[list[bytes], str, ExportInfo | None]:
        """The answer to INFO or GO, the name asked for and the export if there is one."""
        fields = _Fields(data)
        name = fields.string()
        wanted = [fields.number(nbd.U16) for _ in range(fields.number(nbd.U16))]
        fields.finish()
        export = self._find_export(name)
        if not isinstance(export, ExportInfo):
            return [_not_found(option, name, export)], name, None
        flags = export.transmission_flags(self.structured)
        infos = [nbd.INFO_EXPORT.pack(Info.EXPORT, export.size, flags)]
        if Info.NAME in wanted:
            infos.append(nbd.U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            infos.append(nbd.U16.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = (export.block_min, export.block_preferred, export.block_max)
            infos.append(nbd.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        answer = [_reply(option, Rep.INFO, info) for info in infos]
        return [*answer, _reply(option, Rep.ACK)], name, export

    def _enter(self, name: str, export: ExportInfo) -> None:
        """Ends the handshake; contexts that were selected for another name do not count. What
        numbers they have was told then, whatever contexts there are by now."""
        self.name, self.export = name, export
        self.contexts = self._selected if name == self._contexts_for else ()
        if self.contexts:
            self.export = replace(export, contexts=self._numbered)

    # -- meta contexts ---------------------------------------------------------------------------

    def _list_contexts(self, data: bytes) -> list[bytes]:
        """A query that ends in a colon is a wildcard; no query asks for all."""
        option = Option.LIST_META_CONTEXT
        name, export, queries = self._queries(data)
        if not isinstance(export, ExportInfo):
            return [_not_found(option, name, export)]
        found = [
            context
            for context in export.contexts
            if not queries or any(_matches(query, context) for query in queries)
        ]
        answer = [_context(option, 0, context) for context in found]
        return [*answer, _reply(option, Rep.ACK)]

    def _set_contexts(self, data: bytes) -> list[bytes]:
        """Replaces the selection, whatever comes of it; wildcards select nothing."""
        option = Option.SET_META_CONTEXT
        self._selected = ()
        name, export, queries = self._queries(data)
        if not isinstance(export, ExportInfo):
            return [_not_found(option, name, export)]
        self._numbered = export.contexts
        self._selected = tuple(context for context in export.contexts if context in queries)
        self._contexts_for = name
        answer = [
            _context(option, export.context_id(context), context) for context in self._selected
        ]
        return [*answer, _reply(option, Rep.ACK)]

    def _queries(self, data: bytes) -> tuple[str, ExportInfo | Forbidden | None, list[str]]:
        if not self.structured:
            raise _Invalid("negotiate structured replies first")
        fields = _Fields(data)
        name = fields.string()
        count = fields.number(nbd.U32)
        if count * nbd.U32.size > len(data):
            raise _Invalid("there cannot be so many queries in this data")
        queries = [fields.string() for _ in range(count)]
        fields.finish()
        return name, self._find_export(name), queries


class _Fields:
    """Reads the fields of an option's data one by one; ``_Invalid`` if they do not fit."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, form: struct.Struct) -> int:
        if self._at + form.size > len(self._data):
            raise _Invalid("the option's data is too short for its fields")
        value: int = form.unpack_from(self._data, self._at)[0]
        self._at += form.size
        return value

    def string(self) -> str:
        length = self.number(nbd.U32)
        if length > len(self._data) - self._at:
            raise _Invalid("a string is longer than the option's data")
        start, self._at = self._at, self._at + length
        return _text(self._data[start : self._at])

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _Invalid("the option's data is longer than its fields")


def _text(data: bytes) -> str:
    if len(data) > nbd.STRING_BYTES_MAX:
        raise _Invalid(f"a string is longer than {nbd.STRING_BYTES_MAX} bytes")
    if b"\0" in data:
        raise _Invalid("a string holds a zero byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Invalid("a string is not UTF-8") from None


def _no_data(data: bytes) -> None:
    if data:
        raise _Invalid("the option has no data")


def _matches(query: str, context: str) -> bool:
    return context == query or (query.endswith(":") and context.startswith(query))


def _unknown(name: str) -> str:
    quoted = name if len(name) <= _QUOTED_MAX else name[:_QUOTED_MAX] + "..."
    return f"there is no export named {quoted!r}"


def _not_found(option: Option, name: str, found: Forbidden | None) -> bytes:
    if found is None:
        return _error(option, Rep.ERR_UNKNOWN, _unknown(name))
    return _error(option, Rep.ERR_POLICY, found.why)


def _counted(text: str) -> bytes:
    data = text.encode()
    return nbd.U32.pack(len(data)) + data


def _context(option: Option, number: int, name: str) -> bytes:
    return _reply(option, Rep.META_CONTEXT, nbd.U32.pack(number) + name.encode())


def _reply(option: int, kind: Rep, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _error(option: int, kind: Rep, text: str) -> bytes:
    data = text.encode()[: nbd.STRING_BYTES_MAX]
    return _reply(option, kind, data)
