// Several runs on common axes: by step, by trained tokens or by seconds; a click on a run's name hides its curve. Words, figures and smoothing come ready-made from Python (sftkit.view); this file draws.

const COMPARE_CSS = `
.sft-p .m-legend{gap:6px 8px;margin:6px 0} .sft-p .m-legend button{display:inline-flex;align-items:center;gap:7px;max-width:100%;border-radius:11px;padding:1px 11px 1px 8px;background:transparent!important;border-color:rgba(128,128,128,.5)!important}
.sft-p .m-legend button span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap} .sft-p .m-legend button[aria-pressed=false]{opacity:.42} .sft-p .m-legend button[aria-pressed=false] span{text-decoration:line-through} .sft-p .m-legend svg{flex:none}
.sft-p .m-live::after{content:"";width:7px;height:7px;border-radius:50%;background:${GREEN};animation:sft-pulse 1.6s infinite} @keyframes sft-pulse{50%{opacity:.25}}
.sft-p .m-chart{width:100%;height:300px;display:block;cursor:crosshair} .sft-p .m-read{min-height:20px;display:flex;flex-wrap:wrap;gap:0 14px;margin:0 0 4px}
.sft-p .m-scroll{overflow-x:auto;margin:4px 0 12px} .sft-p table.m-table{border-collapse:collapse;border:0;margin:0;font-size:12px;font-variant-numeric:tabular-nums;width:auto}
.sft-p table.m-table :is(td,th){text-align:left;vertical-align:top;padding:4px 16px 4px 0;border:0;border-top:1px solid rgba(128,128,128,.3);max-width:320px;overflow-wrap:anywhere;background:transparent;white-space:nowrap} .sft-p table.m-table :is(td,th).m-long{white-space:normal;min-width:160px}
.sft-p table.m-table th{border-top:0;font-weight:600} .sft-p table.m-table tr,.sft-p table.m-table tr:hover{background:transparent!important} .sft-p .m-off{opacity:.42} .sft-p .m-sub{font-weight:600;font-size:13px;margin:8px 0 2px}
.sft-p .m-dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}
`;
const NS = "http://www.w3.org/2000/svg";
const draw1 = (tag, parent, at, text) => { const e = document.createElementNS(NS, tag); for (const [k, v] of Object.entries(at)) e.setAttribute(k, v); if (text !== undefined) e.textContent = text; parent.append(e); return e; };
const AXES = [["optimizer step", 0, "step"], ["trained tokens", 1, "trained tokens"], ["seconds of training", 2, "seconds"]];

const brief = (v) => v >= 1e6 ? `${(v / 1e6).toFixed(1)} M` : count(v);

function startCompare(model, redraw) {
  const store = { curves: {}, results: [], live: [], seq: -1 };
  const take = (m) => { if (m.seq < store.seq) return; store.seq = m.seq; Object.assign(store.curves, m.curves); store.results = m.results; store.live = m.live; redraw(); };
  const h = model.get("history");
  if (h && h.results) take(h);
  model.on("msg:custom", take);
  return store;
}

function mountCompare(model, root, store) {
  const { runs, differences } = model.get("about"), hidden = new Set();
  let axis = AXES[0], hover = null;
  const top = node("div", "p-row", root);
  node("span", "p-title", top, `${runs.length} runs compared`);
  const axes = node("span", "p-group p-right", top), legend = node("div", "p-row m-legend", root);
  for (const a of AXES) button(axes, a[2], `x axis: ${a[0]}`, () => { axis = a; hover = null; draw(); }).dataset.axis = a[2];
  const chips = runs.map((r, i) => {
    const b = button(legend, "", "Show or hide this run", () => { hidden.has(i) ? hidden.delete(i) : hidden.add(i); draw(); }), line = draw1("svg", b, { width: 22, height: 10 });
    draw1("path", line, { d: "M0 5H22", stroke: r.ink, "stroke-width": 2.4, "stroke-dasharray": r.dash });
    b.dataset.run = i; node("span", "", b, `${i + 1} ${r.name}`);
    return b;
  });
  const chart = draw1("svg", root, { class: "m-chart", role: "img", "aria-label": "loss of several runs" }), read = node("div", "m-read p-soft", root);
  const results = node("div", "m-scroll", root);
  node("div", "m-sub", root, differences.length > 1 ? "Where the recipes differ" : "The recipes do not differ");
  const other = node("div", "m-scroll", root);
  if (differences.length > 1) table(other, differences, (r, c) => r === 0 && c > 0 ? c - 1 : -1);
  other.hidden = differences.length < 2;

  function table(parent, rows, dot) {
    const t = node("table", "m-table", parent);
    rows.forEach((row, r) => {
      const tr = node("tr", "", node(r ? "tbody" : "thead", "", t));
      row.forEach((words, c) => {
        const cell = node(r ? "td" : "th", words.length > 26 ? "m-long" : "", tr), run = dot(r, c);
        if (run >= 0) { node("span", "m-dot", cell).style.background = runs[run].ink; if (hidden.has(run)) tr.className = r ? "m-off" : ""; }
        cell.append(words);
      });
    });
  }
  const shown = () => runs.map((r, i) => [r, store.curves[i], i]).filter(([, c, i]) => c && !hidden.has(i));

  function paint() {
    const width = Math.max(chart.clientWidth, 200), height = chart.clientHeight || 300, k = axis[1], left = 48, topY = 26, right = width - 34, bottom = height - 40;
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`); chart.replaceChildren(); read.replaceChildren();
    const all = shown().flatMap(([, c]) => [...c.loss, ...c.evals]), values = all.map((p) => p[3]).filter((v) => v != null);
    const label = (s, x, y, anchor, more = {}) => draw1("text", chart, { x, y, "text-anchor": anchor, fill: "currentColor", "fill-opacity": 0.68, "font-size": 11, ...more }, s);
    if (!values.length) { label(hidden.size === runs.length ? "every run is hidden" : "no steps yet", width / 2, height / 2, "middle", { "font-size": 13 }); return; }
    const [low, high] = lossRange(values, []), last = all.reduce((m, p) => Math.max(m, p[k]), 0) || 1;
    const fx = (v) => left + v / last * (right - left), fy = (v) => bottom - (Math.min(Math.max(v, low), high) - low) / (high - low) * (bottom - topY);
    const rule = (x1, y1, x2, y2, o) => draw1("line", chart, { x1, y1, x2, y2, stroke: "currentColor", "stroke-opacity": o });
    for (const v of ticks(low, high, 5)) { rule(left, fy(v), right, fy(v), 0.13); label(String(v), left - 8, fy(v) + 4, "end"); }
    for (const v of ticks(0, last, Math.max(2, Math.round(width / 120)), k < 2)) { rule(fx(v), bottom, fx(v), bottom + 4, 0.4); label(brief(v), fx(v), bottom + 17, "middle"); }
    rule(left, bottom, right, bottom, 0.4); label(axis[0], right, bottom + 33, "end"); label("loss (nats per token)", 2, 11, "start");
    const ends = [], words = [];
    for (const [run, c, i] of shown()) {
      let d = "", pen = "M";
      for (const p of c.loss) { if (p[3] == null) { pen = "M"; continue; } d += `${pen}${fx(p[k]).toFixed(1)} ${fy(p[3]).toFixed(1)}`; pen = "L"; }
      draw1("path", chart, { d, fill: "none", stroke: run.ink, "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": run.dash, "data-run": i });
      for (const p of c.evals) if (p[3] != null) draw1("circle", chart, { cx: fx(p[k]), cy: fy(p[3]), r: 3.4, fill: "none", stroke: run.ink, "stroke-width": 2 });
      const points = c.loss.filter((p) => p[3] != null), end = points[points.length - 1];
      if (end) ends.push([fy(end[3]) + 4, fx(end[k]) + 8, String(i + 1), run.ink]);
      if (hover == null || !points.length) continue;
      const want = (hover - left) / (right - left) * last, p = points.reduce((a, b) => Math.abs(b[k] - want) < Math.abs(a[k] - want) ? b : a);
      draw1("circle", chart, { cx: fx(p[k]), cy: fy(p[3]), r: 4, fill: run.ink });
      words.push([run.ink, `${i + 1} ${run.name}: ${p[3].toFixed(3)} at step ${count(p[0])}`]);
    }
    for (const e of spread(ends)) label(e[2], e[1], e[0], "start", { fill: e[3], "fill-opacity": 1, "font-weight": 600, "font-size": 12 });
    if (hover != null && hover >= left && hover <= right) rule(hover, topY, hover, bottom, 0.5);
    if (words.length) for (const [ink, w] of words) { const e = node("span", "", read); node("span", "m-dot", e).style.background = ink; e.append(w); }
    else node("span", "", read, "Lines: training loss, smoothed. Rings: evaluation.");
  }
  let frame = 0;
  function draw() {
    for (const b of axes.children) b.setAttribute("aria-pressed", b.dataset.axis === axis[2]);
    chips.forEach((b, i) => { b.setAttribute("aria-pressed", !hidden.has(i)); b.classList.toggle("m-live", !!store.live[i]); });
    results.replaceChildren(); if (store.results.length) table(results, store.results, (r, c) => r > 0 && c === 0 ? r - 1 : -1);
    root.dataset.live = store.live.filter(Boolean).length; root.dataset.shown = runs.length - hidden.size; root.dataset.points = shown().reduce((n, [, c]) => n + c.loss.length, 0);
    again();
  }
  const again = () => { if (!frame) frame = requestAnimationFrame(() => { frame = 0; paint(); }); };
  chart.onpointermove = (e) => { hover = e.clientX - chart.getBoundingClientRect().left; again(); };
  chart.onpointerleave = () => { hover = null; again(); };
  const resized = new ResizeObserver(again);
  resized.observe(chart);
  return { draw, close() { resized.disconnect(); cancelAnimationFrame(frame); } };
}

export default panel({ css: COMPARE_CSS, start: startCompare, mount: mountCompare });
