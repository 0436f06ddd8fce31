"""The table of what others say of a broken run is drawn from the snapshots that are in the repository."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_table_of_other_tools_words_is_that_of_the_snapshots() -> None:
    spec = importlib.util.spec_from_file_location("draw_words", ROOT / "docs" / "draw_words.py")
    assert spec is not None
    assert spec.loader is not None
    words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(words)
    page = (ROOT / "docs" / "why.md").read_text()
    assert words.page(page) == page, "python docs/draw_words.py"
    assert len(words.table().splitlines()) == 2 + len(list(words.CASES.glob("*.json")))
