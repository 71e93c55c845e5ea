"""Receive buffers are used again, and never while anything points into them."""

from __future__ import annotations

from nbdmirror.codec.slabs import POOLED_BYTES, SlabPool


def test_a_buffer_comes_back_once_no_view_is_left() -> None:
    pool = SlabPool(4096)
    first = pool.take()
    first[:5] = b"first"
    address = first.obj
    piece = first[:5]
    del first
    second = pool.take()
    assert second.obj is not address and bytes(piece) == b"first"
    del piece
    second[:6] = b"second"
    third = pool.take()
    assert third.obj is address
    assert bytes(second[:6]) == b"second" and len(third) == 4096


def test_the_pool_is_bounded() -> None:
    """I6: what is beyond is the allocator's."""
    pool = SlabPool(16 << 20)
    views = [pool.take() for _ in range(9)]
    assert len({id(view.obj) for view in views}) == 9
    assert len(pool._buffers) == POOLED_BYTES // (16 << 20)
