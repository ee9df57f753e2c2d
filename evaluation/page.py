"""The frame of report.html: its style, the script that sorts its table, and a policy that lets it load nothing."""

import base64
import hashlib
import html

STYLE = """
:root { color-scheme: light; --line: #d9dee3; --soft: #f4f6f8; --ink: #1d2733; --dim: #5b6876; --bad: #a61b1b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; }
.dim { color: var(--dim); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.card { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { display: block; line-height: 1.35; }
.failed { border: 1px solid #e3b4b4; border-left: .35rem solid var(--bad); background: #fdf4f4; border-radius: .4rem;
  padding: .6rem .9rem; margin: 1rem 0; overflow-wrap: anywhere; }
.failed ul { margin: .3rem 0; padding-left: 1.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
.charts img { max-width: 36rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(47%, 19rem), 1fr)); gap: .6rem; }
.panels img { background: #000; border-radius: .2rem; }
.bar { max-width: 26rem; }
figcaption { font-size: .85rem; color: var(--dim); margin: .15rem 0 .4rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ebeef1; }
th { background: var(--soft); font-weight: 600; vertical-align: bottom; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; max-width: 12rem;
  overflow: hidden; text-overflow: ellipsis; }
thead th:first-child { background: var(--soft); }
td.error { text-align: left; color: var(--bad); white-space: normal; min-width: 16rem; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: .3rem 0; cursor: pointer;
  white-space: nowrap; }
th button::after { content: " \\2195"; color: #9aa5b1; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; max-width: 48rem; }
@media print { .scroll { overflow: visible; } h2, figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = row => row.cells[head.cellIndex].dataset.value;
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return descending ? -difference : difference;
      };
      body.append(...Array.from(body.rows).sort(order));
    });
  }
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document. Its policy allows no address but inline pictures, and no script but `SCRIPT`."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""
