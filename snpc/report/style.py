"""How the page looks. Blue and orange are of Okabe and Ito's colours, which colour-blind readers tell apart; before and
after differ in lightness as well."""

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --soft: #5b6168; --line: #d9dde2; --card: #f5f6f8;
  --before: #aab0b8; --after: #0072b2; --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e7e9ec; --soft: #a3abb4; --line: #343a41;
  --card: #1d2226; --before: #6d757e; --after: #56b4e9; --mark: #e69f00; } }
@media print { :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --soft: #444444; --line: #cccccc;
  --card: #ffffff; --before: #aab0b8; --after: #0072b2; --mark: #d55e00; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .card { break-inside: avoid; } h2, summary { break-after: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 6px; }
p { margin: 0 0 12px; max-width: 75ch; }
.soft, figcaption, th { color: var(--soft); }
.grid { display: grid; gap: 20px; }
.cards { gap: 12px; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 24px; line-height: 1.3; font-weight: 600; }
.card span { display: block; color: var(--soft); font-size: 13px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
.curves { gap: 14px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption, .card span { text-wrap: balance; }
figcaption { font-size: 13px; line-height: 1.35; margin-bottom: 4px; }
figcaption b { color: var(--ink); font-weight: 600; }
.curves figure { display: flex; flex-direction: column; justify-content: space-between; }
svg { display: block; max-width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); }
.curves svg { font-size: 11px; }
line.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.drop { stroke: var(--mark); stroke-dasharray: 2 3; }
.curve { fill: none; stroke: var(--after); stroke-width: 2; }
.chosen { fill: var(--mark); stroke: var(--paper); stroke-width: 1.5; }
rect.before { fill: var(--before); }
rect.after { fill: var(--after); }
.key { font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; }
.key i.before { background: var(--before); }
.key i.after { background: var(--after); }
.key i.chosen { background: var(--mark); border-radius: 50%; }
.key i.ramp { width: 90px; background: linear-gradient(to right, rgb(0,34,78), rgb(78,87,108), rgb(149,143,120),
  rgb(220,201,87), rgb(254,232,56)); print-color-adjust: exact; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; vertical-align: bottom; overflow-wrap: normal; }
td { white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; min-width: 100px; white-space: normal; }
.curves figcaption b { display: block; }
@media (max-width: 600px) { h1 { font-size: 21px; } main { padding-top: 16px; }
  th, td { padding-right: 8px; } table { font-size: 13px; } th:first-child, td:first-child, .text { min-width: 70px; } }
details { border-top: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; padding: 2px 0; }
details > :nth-child(2) { margin-top: 8px; }
ul { margin: 0; padding-left: 20px; }
.picture { display: flex; flex-wrap: wrap; gap: 16px; padding: 12px 0 20px; }
.picture > img { width: 112px; border-radius: 4px; align-self: flex-start; }
.layers { flex: 1 1 300px; min-width: 0; display: grid; gap: 12px; }
.stages { flex: 1 1 300px; min-width: 0; display: flex; flex-wrap: wrap; gap: 10px 12px; }
.stages img { width: 112px; border-radius: 4px; }
.heads { display: flex; flex-wrap: wrap; gap: 10px 22px; }
.pair { display: flex; gap: 4px; }
.pair img { width: 92px; image-rendering: pixelated; border-radius: 3px; }
"""
