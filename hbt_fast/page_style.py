"""How a run's page looks: light and dark, without any other file."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --rule: #dde3ea; --page: #fff; --card: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #97a4b3; --rule: #303b47; --page: #14191f; --card: #1c232b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
p { margin: .35rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.status { display: inline-block; margin: .5rem 0 0; padding: .12rem .7rem; border-radius: 1rem; background: var(--card);
  border: 1px solid var(--rule); font-size: .9rem; }
.status.stopped { border-color: #d1495b; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.3rem 0 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .82rem; }
figure { margin: .4rem 0 0; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .18; }
.area { fill: var(--c); opacity: .82; }
.dot { fill: var(--page); stroke: var(--c); stroke-width: 2; }
.mark { stroke: var(--soft); stroke-dasharray: 4 4; }
.c0 { --c: #3478c6; } .c1 { --c: #e08a1e; } .c2 { --c: #2a9d78; }
.c3 { --c: #8d5bc9; } .c4 { --c: #d1495b; } .c5 { --c: #8a95a3; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 .3rem; padding: 0;
  font-size: .88rem; }
.legend li::before { content: ""; display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem;
  border-radius: .2rem; background: var(--c); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.plain th, .plain td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
.plain th:first-child, .plain td:first-child, .words.words td, .words.words th { text-align: left; }
.plain th { font-weight: 600; }
.plain tr.best td { font-weight: 700; }
.heat { font-size: .72rem; border-spacing: 1px; border-collapse: separate; }
.heat th { font-weight: 500; color: var(--soft); padding: .1rem .25rem; }
.heat td { min-width: 1.95rem; height: 1.6rem; text-align: center; border-radius: .15rem; }
.heat .corner { text-align: left; max-width: 5rem; font-size: .66rem; line-height: 1.15; }
.maps { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
.maps > div { max-width: 100%; }
pre { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.45; }
summary { cursor: pointer; color: var(--soft); }
""".strip()
