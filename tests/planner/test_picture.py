from tricorn.report.links import picture

from .world import links


def test_every_operation_has_a_line_with_its_seconds() -> None:
    shown = picture(links())
    lines = shown.splitlines()
    assert len(lines) == 2 + len([name for name in links().curves if not name.startswith("exchange/mp")])
    assert lines[0].split() == ["operation", "ranks", "1", "kB", "100", "kB", "1", "MB", "10", "MB"]
    (copying,) = [line for line in lines if line.startswith("copying")]
    assert "201 us" in copying  # of 1 MB
    assert "2 ms" in copying


def test_bars_grow_with_the_time() -> None:
    (line,) = [line for line in picture(links()).splitlines() if line.startswith("copying")]
    bars = [part for part in line.split() if set(part) <= set("▏▎▍▌▋▊▉█")]
    assert [len(bar) for bar in bars] == sorted(len(bar) for bar in bars)
