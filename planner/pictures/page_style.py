"""The style sheet and the script of the page. Hues are Okabe and Ito's, which colour-blind readers tell apart; text
and hatching say the same again."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2126;--soft:#5d6670;--line:#dfe2e6;--idle:#eceef0;
--over:#c1121f;--hatch:#3c4148;--hatch2:#8b939c;--move:#1d2126;
--c0:#0072b2;--c1:#56b4e9;--c2:#009e73;--c3:#cc79a7;--c4:#d55e00;--c5:#e69f00;--c6:#f0e442;--c7:#9aa3ad}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e8eaed;--soft:#9aa4ae;--line:#333a41;
--idle:#262b30;--over:#ff6b6b;--hatch:#d6dade;--hatch2:#6a737c;--move:#fff;--c0:#2b8fd0;--c4:#e2711d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1280px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:0}h3{font-size:13px;margin:18px 0 6px;color:var(--soft);
font-weight:600}
p{margin:0}.soft{color:var(--soft);font-size:13px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:16px 0}
.figures{display:flex;flex-wrap:wrap;gap:6px 26px;margin:8px 0 12px}
.figures div{display:flex;flex-direction:column}.figures b{font-size:20px;font-weight:600}
.figures span{color:var(--soft);font-size:12px}.bad{color:var(--over)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:14px 0 0;align-items:center}
.legend i{display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:6px;vertical-align:-2px;
overflow:hidden}
.legend svg{width:14px;height:14px;display:block}
.grid{display:grid;grid-template-columns:minmax(76px,max-content) minmax(0,1fr);column-gap:10px}
.lanes{position:relative;min-width:12.5em;font-size:12px;color:var(--soft)}
.lanes span{position:absolute;right:0;left:0;display:flex;align-items:center;justify-content:flex-end;text-align:right;
line-height:1.1;white-space:nowrap;overflow:hidden}
.scroll{overflow-x:auto;overflow-y:hidden}
svg.time{display:block;width:calc(100% * var(--zoom,1))}svg.memory{display:block;width:100%}
svg.b{cursor:default;outline:none}svg.b>rect{width:100%;height:100%;rx:2px}
svg.b:hover>rect,svg.b:focus>rect{filter:brightness(1.12);stroke:var(--ink);stroke-width:1.5px}
svg text{font-size:12px;fill:var(--ink);pointer-events:none}svg .n{opacity:.7;font-size:10px}
.axis{fill:var(--soft)!important;font-size:11px!important}.tick{stroke:var(--line);stroke-width:1;pointer-events:none}
.time .tick{mix-blend-mode:multiply;opacity:.8}
@media (prefers-color-scheme:dark){.time .tick{mix-blend-mode:screen}}
.idle rect,rect.idle{fill:var(--idle)}.capacity{stroke:var(--over);stroke-width:1.5;stroke-dasharray:4 3}
.k0>rect{fill:var(--c0)}.k1>rect{fill:var(--c1)}.k2>rect{fill:var(--c2)}.k3>rect{fill:var(--c3)}
.k4>rect{fill:var(--c4)}.k5>rect{fill:var(--c5)}.k6>rect{fill:var(--c6)}.k7>rect{fill:var(--c7)}
.b text{fill:#111}.k0 text{fill:#fff}
.reallocate>rect,.load>rect{fill:url(#hatch)}
.transfer{overflow:visible}svg.transfer>rect{fill:var(--move);stroke:var(--move);rx:0}.over>rect{fill:var(--over)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;font-size:12px;vertical-align:bottom}
.table td{white-space:nowrap}td:first-child,th:first-child{text-align:left;padding-left:0}.table{overflow-x:auto}
.calls td,.calls th{text-align:left}.calls td:last-child,.calls th:last-child{text-align:right}
.zoom{display:flex;align-items:center;gap:8px;font-size:13px;color:var(--soft);margin-left:auto}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:16px 22px;margin-top:8px}
.curves h3{margin:0 0 2px}svg.curve{display:block;width:100%}.curve path{fill:none;stroke-width:1.6;stroke:var(--c0)}
.curve path.raw{stroke-width:1;opacity:.4}.curve circle{fill:var(--c4)}.curve path.s1{stroke:var(--c4)}
.texts{overflow-x:auto}
.texts td,.texts th{text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}
#tip{position:fixed;z-index:9;max-width:min(380px,90vw);background:var(--ink);color:var(--bg);padding:8px 11px;
border-radius:7px;font-size:12.5px;line-height:1.4;white-space:pre-line;pointer-events:none;opacity:0}
#tip.on{opacity:1}#tip::first-line{font-weight:600}
@media (max-width:640px){main{padding:14px 10px}section{padding:12px 10px}.lanes{min-width:11.5em;
font-size:10px}.grid{column-gap:6px}svg.time{min-width:560px}svg text{font-size:11px}}
"""

# The tooltip takes over from <title> only where the script runs. `data-*` say that it ran, and what it found.
SCRIPT = """
(() => {
  const tip = document.getElementById('tip'), bars = [...document.querySelectorAll('svg.b')];
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + 'px';
    tip.style.top = (y + box.height + 24 > innerHeight ? Math.max(4, y - box.height - 12) : y + 16) + 'px';
  };
  const extent = bar => bar.querySelector('rect').getBoundingClientRect();  // of the bar, not of its clipped label
  const hide = () => tip.classList.remove('on');
  for (const bar of bars) {
    const title = bar.querySelector('title'), words = title.textContent;
    bar.setAttribute('aria-label', words);
    title.remove();
    const show = (x, y) => { tip.textContent = words; tip.classList.add('on'); place(x, y); };
    bar.addEventListener('pointermove', e => show(e.clientX, e.clientY));
    bar.addEventListener('pointerdown', e => show(e.clientX, e.clientY));
    bar.addEventListener('pointerleave', hide);
    bar.addEventListener('focus', () => { const r = bar.getBoundingClientRect(); show(r.left, r.bottom - 10); });
    bar.addEventListener('blur', hide);
  }
  const fit = () => {
    const labels = bars.map(bar => bar.querySelector('text')).filter(Boolean);
    for (const text of labels) { text.style.display = ''; text.removeAttribute('transform'); }
    const sizes = labels.map(t => [t.getComputedTextLength() + 8, extent(t.parentNode)]);
    labels.forEach((text, i) => {
      const [length, box] = sizes[i], y = +text.getAttribute('y');
      if (length <= box.width) return;
      if (length > box.height || box.width < 14) text.style.display = 'none';
      else text.setAttribute('transform', `translate(${box.width / 2 - 4 + y},2) rotate(90)`);
    });
  };
  const zoom = document.getElementById('zoom'), panes = [...document.querySelectorAll('.scroll')];
  if (zoom) zoom.addEventListener('input', () => {
    document.documentElement.style.setProperty('--zoom', zoom.value);
    fit();
  });
  for (const pane of panes) pane.addEventListener('scroll', () => {
    for (const other of panes) if (other.scrollLeft !== pane.scrollLeft) other.scrollLeft = pane.scrollLeft;
  });
  addEventListener('resize', fit);
  addEventListener('keydown', e => { if (e.key === 'Escape') hide(); });
  fit();
  const drawn = bars.filter(bar => extent(bar).width > 0 && extent(bar).height > 0).length;
  Object.assign(document.body.dataset, {ready: 'yes', bars: bars.length, drawn});
})();
"""

# Reported before the main script, so that its own errors are seen too.
ERRORS = "addEventListener('error', e => { document.body.dataset.error = e.message; });"

HATCH = (
    '<svg width="0" height="0" style="position:absolute"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" style="fill:var(--hatch2)"/><rect width="2.5" height="6" style="fill:var(--hatch)"/>'
    "</pattern></defs></svg>"
)
