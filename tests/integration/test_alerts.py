"""The alert rules of ``deploy/``, asked of Prometheus' own tool: each fires when it must (issue E).

The tool is unpacked from Debian's package, not installed: that would start a server.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.debian import known, unpacked
from tests.integration.cluster import Cluster
from tests.integration.process import free_port

RULES = Path(__file__).parents[2] / "deploy" / "examples" / "prometheus-alerts.yml"
NODE = 'instance="alpha:9810"'

# Alert: severity, series that make it fire, the same when all is well, what a person then reads,
# the minutes that it waits.
ALERTS: dict[str, tuple[str, dict[str, str], dict[str, str], str, int]] = {
    "NbdmirrorDown": (
        "page",
        {f'up{{job="nbdmirror",{NODE}}}': "0x90"},
        {f'up{{job="nbdmirror",{NODE}}}': "1x90"},
        "No daemon answers on alpha:9810; journalctl -u 'nbdmirror@*' says why",
        1,
    ),
    "NbdmirrorFacetFailed": (
        "page",
        {
            f'nbdmirror_facet_in_service{{{NODE},volume="data",facet="/srv/a.img"}}': "0x90",
            f'nbdmirror_info{{{NODE},role="primary"}}': "1x90",
        },
        {
            f'nbdmirror_facet_in_service{{{NODE},volume="data",facet="/srv/a.img"}}': "0x90",
            f'nbdmirror_info{{{NODE},role="secondary"}}': "1x90",
        },
        "/srv/a.img of volume data is out of service",
        1,
    ),
    "NbdmirrorRemoteRefused": (
        "page",
        {f'nbdmirror_remote_state{{{NODE},remote="beta",state="diverged"}}': "1x90"},
        {f'nbdmirror_remote_state{{{NODE},remote="beta",state="behind"}}': "1x90"},
        "Remote beta is diverged: nbdmirror status says why",
        1,
    ),
    "NbdmirrorRemoteAway": (
        "ticket",
        {
            f'nbdmirror_remote_connected{{{NODE},remote="beta"}}': "0x90",
            f'nbdmirror_remote_state{{{NODE},remote="beta",state="paused"}}': "0x90",
        },
        {
            f'nbdmirror_remote_connected{{{NODE},remote="beta"}}': "0x90",
            f'nbdmirror_remote_state{{{NODE},remote="beta",state="paused"}}': "1x90",
        },
        "No link to beta for ten minutes; the log fills",
        10,
    ),
    "NbdmirrorTracking": (
        "page",
        {f'nbdmirror_remote_state{{{NODE},remote="beta",state="tracking"}}': "1x90"},
        {f'nbdmirror_remote_state{{{NODE},remote="beta",state="tracking"}}': "0x90"},
        "The log was full: beta is behind by marked regions, out of order",
        5,
    ),
    "NbdmirrorLag": (
        "ticket",
        {f'nbdmirror_remote_lag_seconds{{{NODE},remote="beta"}}': "90x90"},
        {f'nbdmirror_remote_lag_seconds{{{NODE},remote="beta"}}': "59x90"},
        "beta lacks the last 1m 30s",
        5,
    ),
    "NbdmirrorLogFilling": (
        "ticket",
        {
            f"nbdmirror_log_used_bytes{{{NODE}}}": "75x90",
            f"nbdmirror_log_size_bytes{{{NODE}}}": "100x90",
        },
        {
            f"nbdmirror_log_used_bytes{{{NODE}}}": "70x90",
            f"nbdmirror_log_size_bytes{{{NODE}}}": "100x90",
        },
        "The log on alpha:9810 is 75% full",
        5,
    ),
    "NbdmirrorCopyInconsistent": (
        "page",
        {f"nbdmirror_upstream_consistent{{{NODE}}}": "0x90"},
        {f"nbdmirror_upstream_consistent{{{NODE}}}": "1x90"},
        "The copy on alpha:9810 has not been consistent for an hour",
        60,
    ),
    "NbdmirrorVerifyDiffers": (
        "page",
        {f'nbdmirror_remote_verify_unrepaired_regions{{{NODE},remote="beta"}}': "3x90"},
        {f'nbdmirror_remote_verify_unrepaired_regions{{{NODE},remote="beta"}}': "0x90"},
        "beta differs in 3 regions: nbdmirror verify beta --repair",
        1,
    ),
    "NbdmirrorStrangers": (
        "ticket",
        {
            f'nbdmirror_strangers_refused_total{{{NODE},listener="nbd"}}': "0+120x90",
            f'nbdmirror_strangers_evicted_total{{{NODE},listener="nbd"}}': "0x90",
        },
        {
            f'nbdmirror_strangers_refused_total{{{NODE},listener="nbd"}}': "500x90",
            f'nbdmirror_strangers_evicted_total{{{NODE},listener="nbd"}}': "0+1x90",
        },
        "Somebody knocks at nbd of alpha:9810 all the time",
        6,
    ),
    "NbdmirrorClientMemory": (
        "ticket",
        {
            f"nbdmirror_client_memory_bytes{{{NODE}}}": "95x90",
            f"nbdmirror_client_memory_max_bytes{{{NODE}}}": "100x90",
        },
        {
            f"nbdmirror_client_memory_bytes{{{NODE}}}": "90x90",
            f"nbdmirror_client_memory_max_bytes{{{NODE}}}": "100x90",
        },
        "Clients of alpha:9810 hold nearly all the memory that they may",
        1,
    ),
    "NbdmirrorCertificateEnds": (
        "ticket",
        {
            f'nbdmirror_certificate_expires_timestamp_seconds{{{NODE},listener="nbd"}}': (
                f"{10 * 86400 + 70 * 60}x90"
            )
        },
        {
            f'nbdmirror_certificate_expires_timestamp_seconds{{{NODE},listener="nbd"}}': (
                f"{40 * 86400}x90"
            )
        },
        "The nbd certificate of alpha:9810 ends in 10d 0h 0m 0s",
        60,
    ),
}


@pytest.fixture(scope="module")
def promtool() -> Path:
    """Prometheus' tool."""
    return unpacked("prometheus", lambda: known("prometheus")) / "usr" / "bin" / "promtool"


def test_promtool_takes_the_rules(promtool: Path) -> None:
    done = subprocess.run(
        [promtool, "check", "rules", "--lint-fatal", RULES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
    assert set(re.findall(r"alert: (\w+)", RULES.read_text())) == set(ALERTS)


def _case(name: str, series: dict[str, str], fires: bool) -> dict[str, object]:
    severity, _, _, summary, minutes = ALERTS[name]
    labels: dict[str, str] = {"severity": severity, "instance": "alpha:9810"}
    if fires:
        first = next(iter(series))
        labels |= dict(re.findall(r'(\w+)="([^"]*)"', first))
    told = [{"exp_labels": labels, "exp_annotations": {"summary": summary}}] if fires else []
    # A minute for the first look, and not before the time that it waits.
    looks = [(70, told)] + ([(minutes - 1, [])] if minutes > 1 else [])
    return {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{at}m", "alertname": name, "exp_alerts": wanted} for at, wanted in looks
        ],
    }


def test_each_alert_fires_when_it_must_and_says_what_a_person_needs(
    promtool: Path, tmp_path: Path
) -> None:
    """After its time, with its labels and its text; not before, and not when all is well."""
    cases = []
    for name, (_, bad, good, _, _) in ALERTS.items():
        cases += [_case(name, bad, True), _case(name, good, False)]
    file = tmp_path / "tests.yml"  # JSON is YAML
    file.write_text(
        json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases})
    )
    done = subprocess.run(
        [promtool, "test", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_running_nodes_say_what_the_rules_ask_for(make_cluster: Callable[..., Cluster]) -> None:
    """Every metric of a rule is in what a primary or a secondary says, but for the certificates'
    of a node without one; what a verify found, after the first."""
    cluster = make_cluster()
    said = set()
    ports = [free_port() for _ in cluster.nodes]
    for node, port in zip(cluster.nodes, ports, strict=True):
        node.keys["admin"] = [f'metrics = "tcp:127.0.0.1:{port}"']
        node.write_config()
    cluster.start()
    cluster.primary.ok("verify", "beta", "--wait")
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            said |= set(re.findall(r"(?m)^(nbdmirror_\w+)[ {]", answer.read().decode()))
    used = set(re.findall(r"nbdmirror_[a-z_]+", RULES.read_text()))
    assert used - said == {"nbdmirror_certificate_expires_timestamp_seconds"}
