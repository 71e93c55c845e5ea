"""Replies in the transmission phase, as buffers to be sent one behind the other.

Owns how the result of a request looks on the wire, in both forms: simple, and structured where
the client negotiated it. Pure functions; ``nbdserver`` calls them. Data is passed on, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nbdmirror.codec import nbd
from nbdmirror.codec.batch import Writes
from nbdmirror.codec.nbd import (
    BLOCK_STATUS,
    CHUNK_DONE,
    CHUNK_MAGIC,
    DF,
    READ,
    REQ_ONE,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    ExportInfo,
    Request,
    wire_errno,
)
from nbdmirror.config import KIB
from nbdmirror.ports import Buffer

Piece = tuple[int, int, Buffer | None]
"""Offset, length and content of a part of a read; None is a hole, which reads as zeros."""

_ZEROS = memoryview(bytes(64 * KIB))
_pack_simple = nbd.SIMPLE_REPLY.pack
_pack_data = nbd.CHUNK_DATA.pack
_OFFSET_DATA = int(Chunk.OFFSET_DATA)


def plain(request: Request, number: int, text: str, structured: bool) -> bytes:
    """A reply without data; ``number`` is any errno, ``text`` for people (structured only).

    Success of anything but READ may be simple under structured replies too, and is."""
    if not structured:
        return _pack_simple(SIMPLE_REPLY_MAGIC, wire_errno(number), request.cookie)
    if number:
        return error_chunk(request.cookie, number, text)
    if request.type == READ:
        return nbd.CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, Chunk.NONE, request.cookie, 0)
    assert request.type != BLOCK_STATUS, "a block status has an answer or an error"
    return _pack_simple(SIMPLE_REPLY_MAGIC, 0, request.cookie)


def error_chunk(cookie: int, number: int, text: str) -> bytes:
    """A structured reply that is one error."""
    data = text.encode()[: nbd.STRING_BYTES_MAX]
    length = nbd.ERROR_HEAD.size + len(data)
    head = nbd.CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, Chunk.ERROR, cookie, length)
    return head + nbd.ERROR_HEAD.pack(wire_errno(number), len(data)) + data


def many(requests: Iterable[Request | Writes]) -> bytes:
    """The success of several requests without data, in one piece."""
    pack = _pack_simple
    return b"".join(
        [  # a batch has them ready
            one.replies if isinstance(one, Writes) else pack(SIMPLE_REPLY_MAGIC, 0, one.cookie)
            for one in requests
        ]
    )


def read(request: Request, data: Buffer, structured: bool) -> tuple[Buffer, ...]:
    """The whole of a read as one piece of data."""
    length = request.length
    assert len(data) == length
    if not structured:
        return _pack_simple(SIMPLE_REPLY_MAGIC, 0, request.cookie), data
    if not length:  # a content chunk has at least one byte
        return (plain(request, 0, "", structured),)
    head = (CHUNK_MAGIC, CHUNK_DONE, _OFFSET_DATA, request.cookie, length + 8, request.offset)
    return _pack_data(*head), data


def read_pieces(request: Request, pieces: Sequence[Piece], structured: bool) -> list[Buffer]:
    """A read as data and holes, which cover the request from its first byte to its last.

    Structured: one chunk for each, or, with DF, one for all. Simple: holes as zeros."""
    end = request.offset
    for offset, length, data in pieces:
        assert offset == end and length > 0 and (data is None or len(data) == length)
        end += length
    assert end == request.offset + request.length
    if structured and (not pieces or len(pieces) == 1 or not request.flags & DF):
        return _chunks(request, pieces)
    content: list[Buffer] = []
    for _, length, data in pieces:
        if data is None:
            content += _zeros(length)
        else:
            content.append(data)
    if not structured:
        return [_pack_simple(SIMPLE_REPLY_MAGIC, 0, request.cookie), *content]
    head = (CHUNK_MAGIC, CHUNK_DONE, _OFFSET_DATA, request.cookie, request.length + 8)
    return [_pack_data(*head, request.offset), *content]


def _chunks(request: Request, pieces: Sequence[Piece]) -> list[Buffer]:
    if not pieces:
        return [plain(request, 0, "", True)]
    result: list[Buffer] = []
    for offset, length, data in pieces:
        flags = CHUNK_DONE if offset + length == request.offset + request.length else 0
        head = (CHUNK_MAGIC, flags)
        if data is None:
            body = (Chunk.OFFSET_HOLE, request.cookie, 12, offset, length)
            result.append(nbd.CHUNK_HOLE.pack(*head, *body))
        else:
            result.append(_pack_data(*head, _OFFSET_DATA, request.cookie, length + 8, offset))
            result.append(data)
    return result


def _zeros(length: int) -> list[Buffer]:
    """So many zero bytes, without memory of their own."""
    whole, rest = divmod(length, len(_ZEROS))
    result: list[Buffer] = [_ZEROS] * whole
    if rest:
        result.append(_ZEROS[:rest])
    return result


def block_status(
    request: Request,
    export: ExportInfo,
    contexts: Sequence[str],
    extents: Mapping[str, Iterable[tuple[int, int]]],
) -> list[Buffer]:
    """One chunk for each selected context; ``extents`` has (length, flags) from the offset on.

    Never says more than was asked for, and one extent if one was asked for."""
    assert contexts and request.type == BLOCK_STATUS
    most = 1 if request.flags & REQ_ONE else nbd.EXTENTS_MAX
    result: list[Buffer] = []
    for context in contexts:
        merged = _merge(extents[context], request.length, most)
        assert merged, f"no extent in context {context}"
        payload = nbd.U32.pack(export.context_id(context))
        payload += b"".join([nbd.EXTENT.pack(*extent) for extent in merged])
        flags = CHUNK_DONE if context == contexts[-1] else 0
        head = (CHUNK_MAGIC, flags, Chunk.BLOCK_STATUS, request.cookie, len(payload))
        result.append(nbd.CHUNK.pack(*head) + payload)
    return result


def _merge(extents: Iterable[tuple[int, int]], length: int, most: int) -> list[tuple[int, int]]:
    """Neighbours with equal flags become one; at most ``most`` of them, within ``length``."""
    merged: list[tuple[int, int]] = []
    left = length
    for size, flags in extents:
        taken = min(size, left)
        if not taken:
            continue
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + taken, flags)
        elif len(merged) == most:
            break
        else:
            merged.append((taken, flags))
        left -= taken
    return merged
