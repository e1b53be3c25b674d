from __future__ import annotations

import json
import re

import pytest
import torch

from secateur.costs import machine


def test_fingerprint_is_plain_and_complete() -> None:
    found = machine.fingerprint()
    assert set(found) == {"cpu", "cores", "flags", "memory_gb", "os", "python", "torch", "transformers"}
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert found["torch"] == torch.__version__
    assert set(found["flags"]) <= set(machine.FLAGS)


def test_machine_id_is_of_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.machine_id()
    assert re.fullmatch("[0-9a-f]{12}", before)
    found = machine.fingerprint()
    monkeypatch.setattr(machine, "fingerprint", lambda: found | {"torch": "9.9", "os": "other"})
    assert machine.machine_id() == before
    monkeypatch.setattr(machine, "fingerprint", lambda: found | {"cpu": "other"})
    assert machine.machine_id() != before


def test_cpuinfo_of_two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "processor\t: 0\nmodel name\t: Fast CPU @ 2:1\nflags\t\t: fpu avx2 amx_int8\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    monkeypatch.setattr(machine.Path, "exists", lambda self: True)
    monkeypatch.setattr(machine.Path, "read_text", lambda self, **kwargs: text)
    found = machine.fingerprint()
    assert found["cpu"] == "Fast CPU @ 2:1"
    assert found["flags"] == ["avx2", "amx_int8"]
