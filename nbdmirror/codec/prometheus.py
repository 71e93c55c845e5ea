"""The status as Prometheus reads it, and the little of HTTP that asking for it takes. Sans-IO.

The names of ``METRICS`` are stable. Text exposition format 0.0.4; every answer closes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

REQUEST_BYTES_MAX = 8 << 10
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Json = Mapping[str, Any]
Labels = dict[str, str]
REMOTE_STATES = (
    "uninitialised",
    "synchronised",
    "behind",
    "tracking",
    "resyncing",
    "paused",
    "diverged",
    "refused",
    "failed",
)


class Metric(NamedTuple):
    """What a metric is called, its type, and what it means."""

    name: str
    type: str
    help: str


def _metric(name: str, kind: str, text: str) -> Metric:
    return Metric(f"nbdmirror_{name}", kind, text)


_gauge, _counter = "gauge", "counter"
INFO = _metric("info", _gauge, "Always 1; the labels say which node of which group this is.")
UPTIME = _metric("uptime_seconds", _gauge, "Since the daemon started.")
VOLUME_SIZE = _metric("volume_size_bytes", _gauge, "Size of a volume.")
CLIENTS = _metric("volume_clients", _gauge, "NBD clients attached to a volume.")
FACET_OK = _metric("facet_in_service", _gauge, "1 if a local facet is synchronised, else 0.")
FACET_ERRORS = _metric("facet_errors_total", _counter, "I/O errors of a local facet.")
LOG_SIZE = _metric("log_size_bytes", _gauge, "Size of the log.")
LOG_USED = _metric("log_used_bytes", _gauge, "Used part of the log.")
NEXT_SEQ = _metric("log_next_seq", _counter, "Sequence number of the next record.")
DURABLE_SEQ = _metric("log_durable_seq", _counter, "Last record that is durable here.")
LINK = _metric("remote_connected", _gauge, "1 while the link to a remote is up.")
STATE = _metric("remote_state", _gauge, "1 for the state that a remote is in, 0 for the others.")
LAG_RECORDS = _metric("remote_lag_records", _gauge, "Records that a remote lacks on its disk.")
LAG_BYTES = _metric("remote_lag_bytes", _gauge, "Log bytes that a remote lacks on its disk.")
LAG_SECONDS = _metric("remote_lag_seconds", _gauge, "Age of the oldest record that it lacks.")
DIRTY = _metric("remote_dirty_bytes", _gauge, "Size of the regions marked for a remote.")
SENT = _metric("remote_sent_bytes_total", _counter, "Bytes sent to a remote.")
RESYNC_DONE = _metric("remote_resync_done_bytes", _gauge, "Done of the resync that runs.")
RESYNC_TOTAL = _metric("remote_resync_total_bytes", _gauge, "Total of the resync that runs.")
VERIFY_AGE = _metric("remote_verify_age_seconds", _gauge, "Since the last verify ended.")
VERIFY_LEFT = _metric(
    "remote_verify_unrepaired_regions", _gauge, "Found to differ by the last verify, and left so."
)
UPSTREAM = _metric("upstream_connected", _gauge, "1 while a primary is connected (secondary).")
CONSISTENT = _metric("upstream_consistent", _gauge, "1 if this copy is an exact point in time.")
APPLIED_SEQ = _metric("upstream_applied_seq", _counter, "Last record that is in the facets.")
SNAPSHOTS = _metric("snapshots", _gauge, "Snapshots, by state; lost ones are only remembered.")
SNAPSHOT_TIME = _metric(
    "snapshot_newest_timestamp_seconds", _gauge, "When the newest snapshot was taken."
)
RESTORE_DONE = _metric("restore_done_bytes", _gauge, "Done of the restore that runs.")
RESTORE_TOTAL = _metric("restore_total_bytes", _gauge, "Total of the restore that runs.")
OPEN = _metric("connections", _gauge, "Open connections of a listener.")
STRANGERS = _metric("strangers", _gauge, "Of them, those whose handshake has not ended.")
EVICTED = _metric("strangers_evicted_total", _counter, "Strangers that had to make room.")
REFUSED = _metric("strangers_refused_total", _counter, "Strangers that were turned away.")
MEMORY = _metric("client_memory_bytes", _gauge, "What large requests and replies hold.")
MEMORY_MAX = _metric("client_memory_max_bytes", _gauge, "What they may hold.")
DESCRIPTORS = _metric("descriptors_left", _gauge, "Connections that descriptors are left for.")
EXPIRES = _metric("certificate_expires_timestamp_seconds", _gauge, "When our certificate ends.")

Sample = tuple[Metric, Labels, float]


def render(status: Json) -> bytes:
    """The text for a status document of schema 1."""
    lines: dict[Metric, list[str]] = {}
    for metric, labels, value in _samples(status):
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        where = f"{{{shown}}}" if shown else ""
        lines.setdefault(metric, []).append(f"{metric.name}{where} {value:.15g}")
    text = []
    for metric, samples in lines.items():
        text += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.type}"]
        text += samples
    return "\n".join(text).encode() + b"\n"


def _samples(status: Json) -> Iterator[Sample]:
    names = {key: str(status[key]) for key in ("group", "node", "role", "version")}
    yield INFO, names, 1
    yield UPTIME, {}, status["uptime_s"]
    for volume in status["volumes"]:
        label = {"volume": volume["name"]}
        yield VOLUME_SIZE, label, volume["size"]
        yield CLIENTS, label, volume["clients"]
        for facet in volume["facets"]:
            place = {**label, "facet": facet["path"]}
            yield FACET_OK, place, facet["state"] == "synchronised"
            yield FACET_ERRORS, place, facet["errors"]
    log = status["log"]
    yield LOG_SIZE, {}, log["size"]
    yield LOG_USED, {}, log["used"]
    yield NEXT_SEQ, {}, log["next_seq"]
    yield DURABLE_SEQ, {}, log["durable_seq"]
    for remote in status["remotes"]:
        yield from _remote(remote)
    if "upstream" in status:
        upstream = status["upstream"]
        yield UPSTREAM, {}, upstream["link"] == "connected"
        yield CONSISTENT, {}, upstream["consistent"]
        yield APPLIED_SEQ, {}, upstream["applied_seq"]
    yield from _snapshots(status["snapshots"])
    if status["restore"] is not None:
        yield RESTORE_DONE, {}, status["restore"]["done_bytes"]
        yield RESTORE_TOTAL, {}, status["restore"]["total_bytes"]
    yield from _doors(status["connections"], status["limits"])
    for listener, security in status["security"].items():
        if security["expires"] is not None:
            yield EXPIRES, {"listener": listener}, security["expires"]


def _remote(remote: Json) -> Iterator[Sample]:
    label = {"remote": remote["name"]}
    yield LINK, label, remote["link"] == "connected"
    for state in REMOTE_STATES:
        yield STATE, {**label, "state": state}, remote["state"] == state
    yield LAG_RECORDS, label, remote["lag"]["records"]
    yield LAG_BYTES, label, remote["lag"]["bytes"]
    yield LAG_SECONDS, label, remote["lag"]["seconds"]
    yield DIRTY, label, remote["dirty"]["bytes"]
    yield SENT, label, remote["bytes_sent"]
    if remote["resync"] is not None:
        yield RESYNC_DONE, label, remote["resync"]["done_bytes"]
        yield RESYNC_TOTAL, label, remote["resync"]["total_bytes"]
    verify = remote["verify"]
    if verify is not None and verify["age_s"] is not None:
        yield VERIFY_AGE, label, verify["age_s"]
        yield VERIFY_LEFT, label, max(0, verify["differing"] - verify["repaired"])


def _snapshots(snapshots: list[Json]) -> Iterator[Sample]:
    states = [snapshot["state"] for snapshot in snapshots]
    for state in ("ok", "deleting", "lost"):
        yield SNAPSHOTS, {"state": state}, states.count(state)
    times = [one["time_ns"] for one in snapshots if one["state"] == "ok"]
    if times:
        yield SNAPSHOT_TIME, {}, max(times) / 1e9


def _doors(connections: Json, limits: Json) -> Iterator[Sample]:
    for listener in ("nbd", "replication", "admin"):
        counts, label = connections[listener], {"listener": listener}
        yield OPEN, label, counts["open"]
        yield STRANGERS, label, counts["strangers"]
        yield EVICTED, label, counts["evicted"]
        yield REFUSED, label, counts["refused"] + connections["refused"].get(listener, 0)
    yield MEMORY, {}, connections["memory"]["used"]
    yield MEMORY_MAX, {}, connections["memory"]["total"]
    if limits["descriptors_left"] is not None:
        yield DESCRIPTORS, {}, limits["descriptors_left"]


def metrics() -> Sequence[Metric]:
    """Every metric that there is."""
    return [value for value in globals().values() if isinstance(value, Metric)]


def _escaped(text: str) -> str:
    """A path that is no UTF-8 is shown as far as it is."""
    text = text.encode(errors="backslashreplace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def complete(request: bytes | bytearray) -> bool:
    """Whether the head of an HTTP request is there as a whole."""
    return b"\r\n\r\n" in request or b"\n\n" in request


def target(request: bytes | bytearray) -> str | None:
    """The path that is asked for by GET; None for everything else."""
    words = bytes(request).split(b"\n", 1)[0].strip().split(b" ")
    if len(words) != 3 or words[0] != b"GET" or not words[2].startswith(b"HTTP/1."):
        return None
    return words[1].decode("ascii", "replace").partition("?")[0]


def response(code: int, reason: str, body: bytes) -> bytes:
    """A whole HTTP answer, after which the connection closes."""
    head = f"HTTP/1.1 {code} {reason}\r\nContent-Type: {CONTENT_TYPE}\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
