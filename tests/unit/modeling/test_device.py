"""A measurement is shared between machines only where what computes is the same."""

from __future__ import annotations

from dataclasses import replace

from modeling.engines.device import fingerprint, parse_cpuinfo

CPUINFO = """processor\t: 0
model name\t: A Fast CPU @ 2.0GHz
flags\t\t: fpu sse2 avx2 avx512f amx_bf16 avx512_bf16

processor\t: 1
model name\t: A Fast CPU @ 2.0GHz
flags\t\t: fpu sse2
"""


def test_name_and_flags_come_from_the_first_processor() -> None:
    assert parse_cpuinfo(CPUINFO) == ("A Fast CPU @ 2.0GHz", ("avx2", "avx512f", "avx512_bf16", "amx_bf16"))


def test_other_systems_have_no_flags() -> None:
    assert parse_cpuinfo("") == ("", ())
    assert parse_cpuinfo("CPU implementer : 0x41\nFeatures : fp asimd\n") == ("", ())


def test_the_key_changes_with_whatever_decides_the_speed() -> None:
    here = fingerprint("cpu")
    assert here.key == fingerprint("cpu").key and here.cores >= 1
    for change in ({"name": "x"}, {"cores": 99}, {"flags": ("x",)}, {"libraries": {"torch": "9"}}):
        assert replace(here, **change).key != here.key
