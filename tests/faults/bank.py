"""A real database over two volumes: SQLite, its data on one and its journal on the other.

SQLite relies on the order of its writes over both files: content goes to the journal before it is
overwritten in the data. The order is kept where the volumes of a group have one write order (V4);
where they have not, a copy of both does not recover, or recovers to what never was.

Each transfer is a function of its number alone, so a check knows every balance from how many
transfers there were. ``python -m tests.faults.bank create|work|check FILE``: ``work`` makes
transfers until it is killed, and prints after each how many are committed.
"""

from __future__ import annotations

import random
import sqlite3
import sys
from pathlib import Path

ACCOUNTS = 300
MOVES = 60
PADDING = 3000
"""Bytes of each account: hardly two of them share a page."""
JOURNAL = "-journal"


def create(path: Path) -> None:
    """Makes the database, as one file."""
    with sqlite3.connect(path) as bank:
        bank.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, padding BLOB)")
        bank.execute("CREATE TABLE transfers (count INTEGER)")
        rows = ((number, 1000, random.randbytes(PADDING)) for number in range(ACCOUNTS))
        bank.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
        bank.execute("INSERT INTO transfers VALUES (0)")
    bank.close()


def moves(number: int) -> list[tuple[int, int, int]]:
    """(from, to, amount) of a transfer."""
    source = random.Random(number)
    return [
        (source.randrange(ACCOUNTS), source.randrange(ACCOUNTS), source.randrange(100))
        for _ in range(MOVES)
    ]


def work(path: Path) -> None:
    """Makes transfers for ever, each durable when it ends; prints how many there are then."""
    bank = sqlite3.connect(path, isolation_level=None)
    # The journal's file is a volume: it can be neither removed nor cut.
    bank.execute("PRAGMA journal_mode = PERSIST")
    bank.execute("PRAGMA synchronous = FULL")
    bank.execute("PRAGMA cache_spill = OFF")
    while True:
        bank.execute("BEGIN IMMEDIATE")
        (count,) = bank.execute("SELECT count FROM transfers").fetchone()
        for source, target, amount in moves(count):
            change = "UPDATE account SET balance = balance + ? WHERE id = ?"
            bank.execute(change, (-amount, source))
            bank.execute(change, (amount, target))
        bank.execute("UPDATE transfers SET count = count + 1")
        bank.execute("COMMIT")
        print(count + 1, flush=True)


def check(path: Path) -> int:
    """Has SQLite recover; how many transfers there are. AssertionError or sqlite3.Error unless it
    is exactly what so many transfers make."""
    bank = sqlite3.connect(path)
    try:
        assert bank.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (count,) = bank.execute("SELECT count FROM transfers").fetchone()
        balances = [1000] * ACCOUNTS
        for number in range(count):
            for source, target, amount in moves(number):
                balances[source] -= amount
                balances[target] += amount
        found = [row[0] for row in bank.execute("SELECT balance FROM account ORDER BY id")]
        assert found == balances, f"after {count} transfers the balances are others"
        return int(count)
    finally:
        bank.close()


if __name__ == "__main__":
    if sys.argv[1] == "check":
        print(check(Path(sys.argv[2])))
    else:
        {"create": create, "work": work}[sys.argv[1]](Path(sys.argv[2]))
