"""How a report looks."""

CSS = """
:root { --ink: #1f2430; --soft: #667085; --line: #e4e7ec; --page: #f7f8fa; --card: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14.5px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 22px 28px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 34px 0 10px; scroll-margin-top: 48px; }
h3 { font-size: 14.5px; margin: 0 0 2px; }
p { margin: 4px 0 10px; max-width: 100ch; }
.soft, figcaption { color: var(--soft); }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  padding: 8px 0; margin: 8px 0 0; display: flex; gap: 4px 18px; flex-wrap: wrap; }
nav a { color: #2563eb; text-decoration: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; min-width: 0; break-inside: avoid; }
figcaption { font-size: 12.5px; line-height: 1.4; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
.grid { stroke: #eef0f3; } .axis { stroke: #98a2b3; }
.reference { stroke: #98a2b3; stroke-dasharray: 4 3; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .band { opacity: 0.14; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; margin: 2px 0; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.name { white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
th, td { text-align: left; padding: 6px 12px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 12.5px; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { font-weight: 600; }
.badge { display: inline-block; border-radius: 10px; padding: 0 9px; font-size: 12.5px; white-space: nowrap; }
.found { background: #ffe3e3; color: #a61e1e; } .absent, .done { background: #d9f2e0; color: #1c6b34; }
.unknown, .waiting { background: #eef0f3; color: #475467; } .running { background: #fff1cc; color: #7a5600; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; }
summary { cursor: pointer; padding: 8px 14px; }
details > div, details > pre { padding: 0 14px 10px; }
pre { margin: 0; font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.part { color: var(--soft); font-size: 12px; margin: 8px 0 2px; }
.good { color: #1c6b34; } .bad { color: #a61e1e; }
@media print { nav { display: none; } body { background: #fff; } }
"""
