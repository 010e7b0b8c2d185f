"""Documentation runs: the Python blocks of each document, one after the other, as a program of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from planner.world import links

from tricorn.planner import store

ROOT = Path(__file__).parent.parent
RUN_BESIDE_A_SERVER = {ROOT / "docs" / "protocol.md"}  # by tests/ps/test_protocol_page.py
DOCUMENTS = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - RUN_BESIDE_A_SERVER)]


def python_of(document: str) -> str:
    """The lines inside blocks marked ``python``; the others empty, so that tracebacks name the right line."""
    lines, inside = [], False
    for line in document.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    store.save_links(links())  # a page about planning need not wait until this machine is measured
    code = python_of(document.read_text())
    if not code.strip():
        pytest.skip("no Python in it")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / f"{document.stem}.py"
    program.write_text(code)
    subprocess.run([sys.executable, "-W", "error", program], cwd=tmp_path, check=True, timeout=100)


def test_only_blocks_marked_python_are_run() -> None:
    document = "words\n```python\na = 1\n```\n```console\n$ rm -r /\n```\n```python\nb = a\n```\n"
    assert python_of(document).split() == ["a", "=", "1", "b", "=", "a"]
    assert python_of(document).splitlines()[8] == "b = a"


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "digits.py").read_text() in (ROOT / "README.md").read_text()
