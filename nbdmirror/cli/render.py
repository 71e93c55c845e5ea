"""Text for people: the status screen, progress bars, sizes and times. Pure: data in, text out.

Tolerates fields that a daemon of another version leaves out. Called by the commands.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

BAR_WIDTH = 24
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LABEL_WIDTH = 8


def size_text(size: float) -> str:
    """Bytes as people read them: ``512 B``, ``1.5 GiB``."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    number = f"{size:.1f}".removesuffix(".0") if unit else f"{size:.0f}"
    return f"{number} {_UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """A length of time in its two largest units: ``0.4 s``, ``12 s``, ``3 m 20 s``, ``2 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if whole >= length:
            parts.append(f"{whole // length} {unit}")
            whole %= length
    return " ".join(parts[:2])


def count_text(count: int, noun: str) -> str:
    """``1 record``, ``2 records``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bar(part: float, whole: float, width: int = BAR_WIDTH) -> str:
    """``[#####-----]``; full only when the part is the whole."""
    filled = int(width * _fraction(part, whole))
    return f"[{'#' * filled}{'-' * (width - filled)}]"


def percent(part: float, whole: float) -> float:
    """0.0 to 100.0, cut to one decimal so that 100.0 means done."""
    return int(1000 * _fraction(part, whole)) / 10


def _fraction(part: float, whole: float) -> float:
    return 1.0 if whole <= 0 else max(0.0, min(1.0, part / whole))


def progress_text(resync: Json) -> str:
    """One line: kind, bar, percent, bytes, rate and ETA of a resync as in ``status``."""
    done, total = resync.get("done_bytes", 0), resync.get("total_bytes", 0)
    line = (
        f"{resync.get('kind', 'resync')} {bar(done, total)} {percent(done, total):5.1f} %"
        f"  {size_text(done)} of {size_text(total)}"
    )
    rate, eta = resync.get("rate"), resync.get("eta_s")
    if rate:
        line += f", {size_text(rate)}/s"
    line += f", {seconds_text(eta)} left" if eta is not None else ", time left unknown"
    sent, saved = resync.get("sent_bytes"), resync.get("skipped_bytes")
    if sent is not None and saved is not None:
        line += f", {size_text(sent)} sent, {size_text(saved)} saved"
    return line


def remote_text(remote: Json) -> str:
    """One line about a remote: link, state, why, lag, progress."""
    parts = [f"{remote.get('name')}: {remote.get('state')}", f"link {remote.get('link')}"]
    if remote.get("why"):
        parts.append(str(remote["why"]))
    if remote.get("resync"):
        parts.append(progress_text(remote["resync"]))
    else:
        parts.append(f"lag {lag_text(remote.get('lag') or {})}")
    return ", ".join(parts)


def lag_text(lag: Json) -> str:
    """Records, bytes and seconds (X4)."""
    records = count_text(lag.get("records", 0), "record")
    return f"{records}, {size_text(lag.get('bytes', 0))}, {seconds_text(lag.get('seconds') or 0.0)}"


def verify_text(verify: Json) -> str:
    """What the last verify found, and when."""
    if verify.get("age_s") is None:
        return "verify running" if verify.get("running") else "never verified"
    parts = [f"verified {seconds_text(verify['age_s'])} ago"]
    for key, word in (
        ("differing", "differed"),
        ("unsettled", "not readable, or changed too fast to tell"),
    ):
        if verify.get(key):
            parts.append(f"{count_text(verify[key], 'region')} {word}")
    if verify.get("repaired"):
        parts.append(f"{verify['repaired']} repaired")
    return ", ".join(parts) + (", running again" if verify.get("running") else "")


def status_text(status: Json) -> str:
    """The whole status on one screen."""
    lines = [_head(status)]
    for volume in status.get("volumes", []):
        lines += _volume(volume)
    if status.get("log"):
        lines += _log(status["log"])
    if status.get("upstream"):
        lines += _upstream(status["upstream"])
    for remote in status.get("remotes", []):
        lines += _remote(remote)
    if status.get("role") == "primary" and not status.get("remotes"):
        lines += ["", _row("remotes", "none: there is no second copy")]
    return "\n".join(lines)


def status_line(status: Json) -> str:
    """The status in one line, for logs and pipes."""
    parts = [f"{status.get('group')} on {status.get('node')}: {status.get('role')}"]
    upstream = status.get("upstream")
    if upstream:
        parts.append(f"upstream link {upstream.get('link')}, {_seqs(upstream)}")
    parts += [remote_text(remote) for remote in status.get("remotes", [])]
    return "; ".join(parts)


def pairs_text(data: Json, indent: str = "") -> list[str]:
    """Any JSON object as indented ``key: value`` lines."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *pairs_text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                lines += [f"{indent}{key}:", *pairs_text(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines


def _row(label: str, text: object) -> str:
    return f"{label:<{_LABEL_WIDTH}} {text}"


def _inner(label: str, text: object) -> str:
    return f"  {label:<{_LABEL_WIDTH - 2}} {text}"


def _head(status: Json) -> str:
    parts = [f"{status.get('group')} on {status.get('node')}: {status.get('role', 'unknown')}"]
    if "uptime_s" in status:
        parts.append(f"up {seconds_text(status['uptime_s'])}")
    if status.get("generation"):
        epoch = f" epoch {status['epoch']}" if "epoch" in status else ""
        parts.append(f"generation {str(status['generation'])[:8]}{epoch}")
    if status.get("version"):
        parts.append(f"version {status['version']}")
    return ", ".join(parts)


def _volume(volume: Json) -> list[str]:
    facts = [f"{volume.get('name')}: {size_text(volume.get('size', 0))}"]
    if "region_size" in volume:
        facts.append(f"regions of {size_text(volume['region_size'])}")
    if "clients" in volume:
        facts.append(count_text(volume["clients"], "client"))
    lines = ["", _row("volume", ", ".join(facts))]
    lines += [_inner("uri", uri) for uri in volume.get("uris", [])]
    for facet in volume.get("facets", []):
        lines += _facet(facet)
    return lines


def _facet(facet: Json) -> list[str]:
    lines = [_inner("facet", facet_text(facet))]
    return lines + ([_inner("next", facet["next_action"])] if facet.get("next_action") else [])


def facet_text(facet: Json) -> str:
    """One line about a local facet: state, errors, what it lacks, progress, why."""
    parts = [f"{facet.get('path')}: {facet.get('state')}"]
    errors = facet.get("errors", 0)
    if errors:
        parts.append(count_text(errors, "error"))
    if facet.get("state") == "synchronised":
        return ", ".join(parts)
    queued = (facet.get("queue") or {}).get("count", 0)
    dirty = facet.get("dirty") or {}
    if queued:
        parts.append(f"{count_text(queued, 'record')} behind")
    if dirty.get("regions"):
        parts.append(f"{count_text(dirty['regions'], 'region')} ({size_text(dirty['bytes'])})")
    if facet.get("resync"):
        parts.append(progress_text(facet["resync"]))
    if facet.get("why"):
        parts.append(str(facet["why"]))
    return ", ".join(parts)


def _log(log: Json) -> list[str]:
    used, size = log.get("used", 0), log.get("size", 0)
    usage = f"{bar(used, size, 10)} {size_text(used)} of {size_text(size)} used"
    seqs = [
        f"{word} {log[key]}"
        for word, key in (("first", "first_seq"), ("next", "next_seq"), ("durable", "durable_seq"))
        if key in log
    ]
    mode = "in memory only" if log.get("in_memory") else f"mode {log.get('mode')}"
    lines = ["", _row("log", f"{usage}, {mode}")]
    spill = log.get("spill")
    if spill and spill.get("on_disk"):
        lines.append(_inner("spill", "all in the file, until every volume has a facet again"))
    elif spill and not log.get("in_memory"):
        memory, file = size_text(spill["memory_bytes"]), size_text(spill["file_bytes"])
        threshold = size_text(spill["threshold"])
        lines.append(_inner("spill", f"{memory} in memory (of {threshold}), {file} in the file"))
    if log.get("in_memory"):
        lines.append(_inner("next", "on a good disk: nbdmirror log replace PATH"))
    return lines + ([_inner("seq", ", ".join(seqs))] if seqs else [])


def _upstream(upstream: Json) -> list[str]:
    lines = ["", _row("upstream", upstream.get("name") or "none seen yet")]
    lines.append(_inner("link", upstream.get("link")))
    lines.append(_inner("seq", _seqs(upstream)))
    return lines + _advice(upstream)


def _seqs(upstream: Json) -> str:
    words = ("received", "durable", "applied")
    return ", ".join(f"{word} {upstream.get(word + '_seq')}" for word in words)


def _remote(remote: Json) -> list[str]:
    dirty = remote.get("dirty") or {}
    lines = [
        "",
        _row("remote", f"{remote.get('name')}: {remote.get('address')}, {remote.get('mode')}"),
        _inner("link", remote.get("link")),
        _inner("state", remote.get("state")),
        _inner("lag", lag_text(remote.get("lag") or {})),
    ]
    if dirty.get("regions") or dirty.get("bytes"):
        regions = count_text(dirty.get("regions", 0), "region")
        lines.append(_inner("dirty", f"{regions}, {size_text(dirty.get('bytes', 0))}"))
    if remote.get("resync"):
        lines.append(_inner("resync", progress_text(remote["resync"])))
    if remote.get("verify"):
        lines.append(_inner("verify", verify_text(remote["verify"])))
    return lines + _advice(remote)


def _advice(about: Json) -> list[str]:
    why = [_inner("why", about["why"])] if about.get("why") else []
    return [*why, _inner("next", about.get("next_action") or "nothing to do")]
