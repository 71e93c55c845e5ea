"""The server's side of one NBD connection, without the connection: bytes in, requests out.

Owns what a client may send and how it is refused: lengths are checked before memory is taken,
ranges and flags before the engine hears of a request, and every refusal keeps the stream in step
or ends it. Never does I/O, never waits, never raises because of what a client sent. The engine's
export drives it::

    transport.write(session.greeting)
    buffer = session.get_buffer(-1)          the transport fills it
    requests = session.received(nbytes)      valid ones; the rest is answered already; plain writes
                                             come together, as one ``Writes`` behind all others
    session.reply(request) ...               in any order
    transport.writelines(session.take_output())

until ``closing`` (send the output, then close) or ``disconnect_requested`` (answer what is
outstanding, then close). Bounds: one buffer of the largest request allowed; for each byte that
came in, a few bytes of output: the caller stops receiving while its transport is full.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nbdmirror.codec import batch, nbd, nbdreply
from nbdmirror.codec.batch import Writes
from nbdmirror.codec.nbd import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    REQUEST_MAGIC,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    ExportInfo,
    Request,
)
from nbdmirror.codec.nbdhandshake import GREETING, FindExport, Handshake, ListExports, Tls
from nbdmirror.codec.nbdslab import Slab
from nbdmirror.config import Limits
from nbdmirror.ports import Buffer

_HEADER = nbd.REQUEST.size


class _Rule(NamedTuple):
    """What a command may carry and how a range beyond the end is refused."""

    flags: int
    changes: bool
    beyond: int


# FUA is accepted on every command: clients are known to set it anywhere.
_RULES = {
    READ: _Rule(FUA | DF, False, errno.EINVAL),
    WRITE: _Rule(FUA, True, errno.ENOSPC),
    FLUSH: _Rule(FUA, False, errno.EINVAL),
    TRIM: _Rule(FUA, True, errno.EINVAL),
    CACHE: _Rule(FUA, False, errno.EINVAL),
    WRITE_ZEROES: _Rule(FUA | NO_HOLE | FAST_ZERO, True, errno.ENOSPC),
    BLOCK_STATUS: _Rule(FUA | REQ_ONE, False, errno.EINVAL),
}


class ServerSession:
    """One connection. ``find_export("")`` is the default export; it may be called many times.

    ``limits``: ``options_max`` options are answered, of ``option_bytes_max`` at most, and requests
    of ``request_bytes_max`` taken.
    ``tls``: nothing but STARTTLS is answered until ``secured``."""

    greeting = GREETING
    """What the server sends before anything else."""

    def __init__(
        self,
        find_export: FindExport,
        list_exports: ListExports,
        limits: Limits,
        *,
        tls: bool = False,
    ) -> None:
        self._slab = Slab()
        stage = Tls.REQUIRED if tls else Tls.OFF
        self._handshake = Handshake(find_export, list_exports, limits, stage)
        self._option_max = limits.option_bytes_max
        self._request_max = limits.request_bytes_max
        self._output: list[Buffer] = []
        self._shutting_down = False
        # The highest command that may skip the full check: WRITE, READ, or none (-1).
        self._plain_max = -1
        self.export: ExportInfo | None = None
        """The export that the client chose: set once transmission has begun."""
        self.name = ""
        """What it called it, which need not be its own name."""
        self.contexts: tuple[str, ...] = ()
        """The meta contexts that a block status has to answer for."""
        self.structured = False
        """Whether structured replies were negotiated."""
        self.disconnect_requested = False
        """The client said goodbye: answer what is outstanding, then close."""
        self.closing_reason: str | None = None
        """Why the connection ends, for the log; None while it does not."""

    @property
    def in_transmission(self) -> bool:
        """Whether the handshake has ended with an export."""
        return self.export is not None

    @property
    def closing(self) -> bool:
        """Nothing more is taken or expected: send the output and close."""
        return self.closing_reason is not None

    @property
    def tls_wanted(self) -> bool:
        """Send the output, then hand the connection to TLS, then ``secured``; until then nothing
        that comes in is for this session."""
        return self._handshake.tls_wanted and not self.closing

    def secured(self) -> None:
        """TLS stands: the options begin anew, within it."""
        assert self.tls_wanted and self.export is None
        self._handshake = self._handshake.after_tls()
        self._slab = Slab()

    @property
    def need(self) -> int:
        """Bytes of buffer that the item being received takes, if it is known to be a long one."""
        return self._slab.need

    def shrink(self) -> None:
        """Gives back a buffer that was larger than usual, if nothing is left in it."""
        self._slab.shrink()

    # -- input -----------------------------------------------------------------------------------

    def get_buffer(self, size_hint: int) -> memoryview:
        """Where the next bytes belong; never empty. What was returned before is void."""
        return self._slab.space()

    def received(self, nbytes: int) -> list[Request | Writes]:
        """Takes the first ``nbytes`` of the buffer; returns the requests they complete, in order.

        Writes without flags of up to ``batch.LENGTH_MAX`` come as one ``Writes`` at the end: what
        is under way at the same time has no order. Payloads are views that stay valid. What is
        refused has been answered."""
        slab = self._slab
        slab.received(nbytes)
        if self.closing_reason is not None or self.disconnect_requested:
            slab.end = slab.start
            return []
        if self._handshake.tls_wanted:
            self._end_plain_text()
            return []
        slab.need = 0
        if self.export is None:
            self._take_options()
            if self.export is None:
                return []
        return self._take_requests(self.export.size)

    def shutdown(self) -> None:
        """Later requests get ESHUTDOWN, later options ERR_SHUTDOWN; earlier ones go on."""
        self._shutting_down = self._handshake.shutting_down = True
        self._plain_max = -1

    def _close(self, reason: str) -> None:
        self.closing_reason = reason
        self._slab.need = 0
        self._slab.end = self._slab.start

    def _take_options(self) -> None:
        """Cuts flags and options out of what has been received, until the export is chosen."""
        slab, handshake = self._slab, self._handshake
        while True:
            here = slab.end - slab.start
            if handshake.awaits_flags:
                if here < nbd.CLIENT_FLAGS.size:
                    return
                handshake.client_flags(nbd.CLIENT_FLAGS.unpack_from(slab.view, slab.start)[0])
                slab.start += nbd.CLIENT_FLAGS.size
            elif here < nbd.OPTION.size or not self._take_option(here):
                return
            if handshake.failure is not None:
                self._close(handshake.failure)
                return
            if handshake.tls_wanted:
                self._end_plain_text()
                return
            if handshake.export is not None:
                self._begin_transmission(handshake.export)
                return

    def _end_plain_text(self) -> None:
        """Bytes behind STARTTLS came before TLS: somebody on the way may have put them there."""
        if self._slab.end != self._slab.start:
            self._output.clear()
            self._close("the client sent plain text behind STARTTLS")

    def _take_option(self, here: int) -> bool:
        """The next option, if it is there as a whole; else how much it needs."""
        slab, handshake = self._slab, self._handshake
        magic, number, length = nbd.OPTION.unpack_from(slab.view, slab.start)
        size = nbd.OPTION.size + length
        if magic != nbd.OPTION_MAGIC:
            handshake.failure = f"the client sent {magic:#x} where an option begins"
        elif length > self._option_max:
            self._output += handshake.oversized(number, length)
            slab.discard(size)
        elif here < size:
            slab.need = size
            return False
        else:
            data = bytes(slab.view[slab.start + nbd.OPTION.size : slab.start + size])
            slab.start += size
            self._output += handshake.option(number, data)
        return True

    def _begin_transmission(self, export: ExportInfo) -> None:
        self.name, self.export = self._handshake.name, export
        self.contexts = self._handshake.contexts
        self.structured = self._handshake.structured
        self._slab.enlarge()
        if export.block_min == 1 and not self._shutting_down:
            self._plain_max = READ if export.read_only else WRITE

    def _take_requests(self, export_size: int) -> list[Request | Writes]:
        """The hot loop: plain reads and writes are checked here, all else in ``_take_other``."""
        slab = self._slab
        view, start, end = slab.view, slab.start, slab.end
        unpack = nbd.REQUEST.unpack_from
        plain_max, length_max = self._plain_max, self._request_max
        requests: list[Request | Writes] = []
        append = requests.append
        taken: list[tuple[bytes, bytes]] = []
        size = longest = 0
        limits = batch.LENGTH_MAX, export_size
        if plain_max == WRITE:  # most often there is nothing else
            stop, places, replies, longest = batch.take_writes(view, start, end, *limits)
            if stop > start:
                taken.append((places, replies))
                size, start = stop - start, stop
        while end - start >= 28:
            magic, flags, kind, cookie, offset, length = unpack(view, start)
            if (
                magic == 0x25609513
                and kind <= plain_max
                and flags <= 1
                and length <= length_max
                and offset + length <= export_size
            ):
                if kind and not flags and 0 < length <= batch.LENGTH_MAX:
                    stop, places, replies, long = batch.take_writes(view, start, end, *limits)
                    if stop > start:
                        taken.append((places, replies))
                        size, longest, start = size + stop - start, max(long, longest), stop
                        continue
                start += 28
                if kind:
                    stop = start + length
                    if stop > end:
                        start -= 28
                        slab.need = 28 + length
                        break
                    append(Request(kind, flags, cookie, offset, length, view[start:stop]))
                    start = stop
                else:
                    append(Request(kind, flags, cookie, offset, length))
                continue
            slab.start = start
            if magic != REQUEST_MAGIC:
                self._close(f"the client sent {magic:#x} where a request begins")
            elif not self._take_other(Request(kind, flags, cookie, offset, length), requests):
                break
            start, end = slab.start, slab.end
        slab.start = start
        if taken:
            if len(taken) > 1:
                places, replies = map(b"".join, zip(*taken, strict=True))
            else:
                places, replies = taken[0]
            append(Writes(view, places, replies, size, longest))
        return requests

    def _take_other(self, request: Request, requests: list[Request | Writes]) -> bool:
        """Checks one request in full; passes it on or answers it. False: its payload is due."""
        slab = self._slab
        if request.type == DISC:
            self.disconnect_requested = True
            slab.end = slab.start
            return True
        size = _HEADER + (request.length if request.type == WRITE else 0)
        refusal = self._refusal(request)
        if refusal is not None:
            if size - _HEADER > nbd.SWALLOW_MAX:
                self._close(f"the client sent a write of {request.length} bytes: {refusal[1]}")
                return True
            self.reply(request, *refusal)
            slab.discard(size)
            return True
        if request.type == WRITE:
            if slab.end - slab.start < size:
                slab.need = size
                return False
            request.payload = slab.view[slab.start + _HEADER : slab.start + size]
        slab.start += size
        requests.append(request)
        return True

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """The errno and the text for a request that the engine shall not see, else None."""
        export = self.export
        assert export is not None
        if self._shutting_down:
            return errno.ESHUTDOWN, "the server is shutting down"
        rule = _RULES.get(request.type)
        if rule is None:
            return errno.EINVAL, f"unknown command {request.type}"
        allowed = rule.flags
        if not self.structured:
            allowed &= ~DF
        if export.read_only:
            allowed &= ~FAST_ZERO
        if request.flags & ~allowed:
            return errno.EINVAL, f"flags {request.flags:#x} are not allowed with this command"
        if rule.changes and export.read_only:
            return errno.EPERM, "the export is read-only"
        if request.type == FLUSH:
            reserved = request.offset or request.length
            return (errno.EINVAL, "a flush has no range") if reserved else None
        if request.offset + request.length > export.size:
            return rule.beyond, f"beyond the end of the export, which has {export.size} bytes"
        if (request.offset | request.length) & (export.block_min - 1):
            return errno.EINVAL, f"offset or length is no multiple of {export.block_min}"
        return self._refusal_of_length(request)

    def _refusal_of_length(self, request: Request) -> tuple[int, str] | None:
        if request.type in (READ, WRITE) and request.length > self._request_max:
            number = errno.EOVERFLOW if request.type == READ else errno.EINVAL
            return number, f"longer than {self._request_max} bytes"
        if request.type == BLOCK_STATUS:
            if not self.contexts:
                return errno.EINVAL, "no meta context was selected"
            if not request.length:  # an answer has at least one extent of at least one byte
                return errno.EINVAL, "a block status needs a length"
        return None

    # -- output ----------------------------------------------------------------------------------

    def take_output(self) -> list[Buffer]:
        """All that is to be sent, in order; the session forgets it."""
        output = self._output
        self._output = []
        return output

    def reply(self, request: Request, number: int = 0, text: str = "") -> None:
        """Answers a request without data; ``number`` is any errno, and becomes one of the wire's.

        Success is for all commands but READ (with a length) and BLOCK_STATUS."""
        assert number or request.type != READ or not request.length, "a read has data"
        self._output.append(nbdreply.plain(request, number, text, self.structured))

    def reply_many(self, requests: Sequence[Request | Writes]) -> None:
        """The success of several requests, none of them READ or BLOCK_STATUS, at once."""
        self._output.append(nbdreply.many(requests))

    def reply_read(self, request: Request, data: Buffer) -> None:
        """The data of a read, which is sent as it is and must not change until then."""
        self._output += nbdreply.read(request, data, self.structured)

    def reply_read_extents(self, request: Request, pieces: Sequence[nbdreply.Piece]) -> None:
        """A read as (offset, length, data or None for a hole); they cover it without a gap."""
        self._output += nbdreply.read_pieces(request, pieces, self.structured)

    def reply_block_status(
        self, request: Request, extents: Mapping[str, Iterable[tuple[int, int]]]
    ) -> None:
        """For each of ``contexts`` its (length, flags), from the request's offset on.

        They may go beyond the request's end (they are cut) or stop short of it."""
        assert self.export is not None
        self._output += nbdreply.block_status(request, self.export, self.contexts, extents)
