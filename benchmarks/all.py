"""Run every benchmark, or those named, and write RESULTS.md: each figure with its command, versions and date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "same_numbers",
    "text",
    "movies",
    "fit",
    "startup",
    "recovery",
    "collectives",
    "dp",
    "slow_link",
    "mp",
    "mp_cut",
    "simulate",
    "ps_table",
    "ps_wire",
    "ps_ctr",
    "ps_quality",
    "ps_bytes",
    "planner",
)


def section(name: str, quick: list[str]) -> str:
    command = [sys.executable, HERE / f"{name}.py", "--json", *quick]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return formatted(name, quick, json.loads(output.splitlines()[-1]))


def formatted(name: str, quick: list[str], result: dict) -> str:
    """A section of RESULTS.md from what a benchmark gives as JSON."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        f"## {result['question'].capitalize()}",
        "",
        f"`python benchmarks/{name}.py{' --quick' if quick else ''}`, {date.today()}; {machine}. Medians.",
        "",
        "| system | case | figure | low | high | runs |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['system']} | {r['case']} | {r['figure']:.4g} {r['unit']} "
            f"| {r['low']:.4g} | {r['high']:.4g} | {r['runs']} |"
            for r in result["rows"]
        ),
        "",
        *(
            f"- {bar['name']}: {bar['value']:.4g}, "
            f"{'at least' if 'at_least' in bar else 'at most'} {bar.get('at_least', bar.get('at_most')):.4g}: "
            f"**{'holds' if bar['holds'] else 'fails'}**"
            for bar in result["bars"]
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    quick = [argument for argument in sys.argv[1:] if argument == "--quick"]
    names = [argument for argument in sys.argv[1:] if argument != "--quick"] or BENCHMARKS
    results = HERE / "RESULTS.md"
    sections = dict.fromkeys(BENCHMARKS, "")
    for text in results.read_text().split("\n## ")[1:]:  # what is not run again stays
        sections[re.search(r"benchmarks/(\w+)\.py", text)[1]] = f"## {text.strip()}"
    for name in names:
        sections[name] = section(name, quick)
        written = "\n\n".join(text for text in sections.values() if text)
        results.write_text(f"# Results\n\nWritten by `make bench`.\n\n{written}\n")
    print(results.read_text())


if __name__ == "__main__":
    main()
