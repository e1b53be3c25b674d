"""The docs name what the code has, no more and no less."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from secateur.families import FAMILIES
from secateur.methods import METHODS

ROOT = Path(__file__).parents[2]


def rows(page: str, section: str = "") -> list[list[str]]:
    """Cells of the tables of a page, or of one of its sections."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    if section:
        text = text.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_families_page_lists_the_table() -> None:
    listed = {row[0]: row[1:4] for row in rows("families.md")[1:]}
    expected = {f.name: [", ".join(f.model_types), f.modality, f.norm] for f in FAMILIES.values()}
    assert listed == expected


@pytest.mark.parametrize("method", [name for name in METHODS if (ROOT / "docs" / "methods" / f"{name}.md").exists()])
def test_method_cards_list_every_hyper_parameter(method: str) -> None:
    listed: dict[str, str] = {}
    for name, value, *_ in rows(f"methods/{method}.md", "Hyper-parameters")[1:]:
        names, values = re.findall(r"`(\w+)`", name), [part.strip("` ") for part in value.split(", ")]
        listed |= dict(zip(names, values, strict=True))
    expected = {
        f.name: f'"{f.default}"' if isinstance(f.default, str) else str(f.default) for f in fields(METHODS[method])
    }  # type: ignore[arg-type]
    assert listed == expected


def test_pages_of_the_site_exist() -> None:
    named = re.findall(r":\s+([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE)
    assert len(named) >= 7
    assert [page for page in named if not (ROOT / "docs" / page).is_file()] == []
