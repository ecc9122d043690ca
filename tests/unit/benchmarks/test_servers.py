"""Servers as the command line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import PEERS
from benchmarks.processes import ROOT
from benchmarks.servers import parse_spec


def test_ours_with_settings_and_from_another_checkout(tmp_path: Path) -> None:
    assert (parse_spec("polyhead").settings, parse_spec("polyhead").checkout) == ({}, ROOT)
    spec = parse_spec(f"polyhead@{tmp_path}:engine=torch,threads=1")
    assert (spec.kind, spec.checkout) == ("polyhead", tmp_path)
    assert spec.settings == {"engine": "torch", "threads": "1"}
    assert spec.label == f"polyhead@{tmp_path}:engine=torch,threads=1"


@pytest.mark.parametrize("text", ["vllm", "naive:threads=1", "litserve@/tmp", "polyhead:engine", "polyhead:=torch"])
def test_what_cannot_be_started_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        parse_spec(text)


def test_every_peer_has_pins_that_hold_what_it_reports() -> None:
    for peer in PEERS.values():
        pins = (ROOT / "benchmarks" / "peers" / peer.requirements).read_text().lower().replace("_", "-").splitlines()
        for package in peer.packages:
            assert any(pin.startswith(f"{package}==") for pin in pins), f"{peer.name}: {package}"
