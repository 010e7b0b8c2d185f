"""How a report looks, in light and in dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6778; --paper: #fff; --card: #f5f6f8; --rule: #d9dde4;
  --one: #2f6fde; --two: #e0862a; --good: #1a7f4b; --bad: #c4322b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b8; --paper: #14171c; --card: #1d2128;
  --rule: #333a45; --one: #6ea2ff; --two: #f0a558; --good: #57c98d; --bad: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .good { color: var(--good); } .wrong { color: var(--bad); }
.box { background: var(--card); border-left: 4px solid var(--bad); padding: .6rem 1rem; margin: 1rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: .5rem .9rem; }
.tiles b { display: block; font-size: 1.25rem; } .tiles span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: .6rem 0; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } details td:last-child { overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .5rem 0; } figcaption { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: .5rem 1.5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; } svg text { fill: var(--soft); font-size: 12px; }
.up { text-anchor: end; dominant-baseline: middle; } .across { text-anchor: middle; }
.grid { stroke: var(--rule); } .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
line.bad { stroke: var(--bad); stroke-width: 2; } .line { fill: none; stroke: var(--one); stroke-width: 1.8; }
.range { fill: var(--one); opacity: .18; } .dot { fill: var(--one); }
dl.bars { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .35rem .9rem; font-size: .9rem; }
dl.bars dd { margin: 0; } .bar { display: flex; align-items: center; gap: .5rem; }
.bar i { display: block; height: .65rem; min-width: 1px; border-radius: 2px; background: var(--one); }
.predicted i { background: var(--two); } .bar span { white-space: nowrap; font-variant-numeric: tabular-nums; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
"""
