// The live view of a run: loss curve, headline figures, memory, samples, and the buttons that ask the run for something.
// A page receives the whole (thinned-out) history once, then messages that only append. Words and figures come ready-made from Python
// (sftkit.view), so that the live and the saved picture agree; this file draws. Text from data only ever enters through textContent.

const TRAIN = BLUE, EVAL = ORANGE, ALARM = RED, FEW = 12;
const COMMANDS = {
  stop: ["■ Stop and save", "Finish this step, write a checkpoint, return"],
  checkpoint: ["◆ Checkpoint", "Write a checkpoint after this step and go on"],
  pause: ["‖ Pause", "Wait after this step, with the model in memory"],
  resume: ["▶ Resume", "Go on training"],
  evaluate: ["◎ Evaluate", "Evaluate on the held-out rows after this step and go on"],
};
const LIVE_CSS = `
.sft-p.sft-live{max-width:766px}
.sft-live .sft-head{display:flex;flex-wrap:wrap;align-items:center;gap:4px 8px;margin:2px 0 8px} .sft-live .sft-head b{font-size:15px;overflow-wrap:anywhere}
.sft-live .sft-soft{opacity:.7;font-size:12px;overflow-wrap:anywhere} .sft-live .sft-hint{margin:-2px 0 8px}
.sft-live .sft-badge{border:1px solid ${GREY};border-radius:10px;padding:0 9px;font-size:12px;white-space:nowrap}
.sft-live .sft-badge[data-state=training]{border-color:${TRAIN};color:${TRAIN}} .sft-live .sft-badge:is([data-state=failed],[data-state=died]){border-color:${ALARM};color:${ALARM}}
.sft-live .sft-buttons{margin-left:auto;display:flex;flex-wrap:wrap;gap:6px} .sft-live .sft-buttons button:disabled{opacity:.55}
.sft-live .sft-bar{height:3px;background:rgba(128,128,128,.22);border-radius:2px;margin:0 0 10px;overflow:hidden} .sft-live .sft-bar div{height:100%;background:${TRAIN};border-radius:2px}
.sft-live .sft-tiles{display:flex;flex-wrap:wrap;gap:4px 14px;margin-bottom:6px;font-variant-numeric:tabular-nums}
.sft-live .sft-tiles span{display:block;font-size:11px;opacity:.7} .sft-live .sft-tiles b{font-size:clamp(12px,calc((100cqi - var(--tiles)*14px)/(var(--letters)*.62)),17px);font-weight:600;white-space:nowrap}
.sft-live .sft-chart{position:relative} .sft-live .sft-chart canvas{display:block;width:100%;height:250px}
.sft-live .sft-under{display:flex;align-items:center;gap:4px 14px;min-height:20px;font-size:12px;margin-bottom:4px} .sft-live .sft-read{margin-left:auto;min-width:0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;font-variant-numeric:tabular-nums}
.sft-live .sft-under label{display:flex;flex:none;align-items:center;gap:6px;opacity:.8} .sft-live .sft-under input{width:84px;accent-color:${TRAIN};padding:0;border:0}
.sft-live .sft-panels{display:flex;flex-wrap:wrap;gap:4px 16px;margin-bottom:8px} .sft-live .sft-panels div{flex:1 1 170px;min-width:0;font-size:11px} .sft-live .sft-panels span{opacity:.75;font-variant-numeric:tabular-nums} .sft-live .sft-panels canvas{display:block;width:100%;height:44px}
.sft-live .sft-scores{font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere;margin-top:6px;opacity:.85}
.sft-live .sft-foot{display:flex;align-items:center;gap:4px 12px;font-size:12px;padding-top:4px}
.sft-live .sft-gauge{position:relative;flex:none;width:240px;max-width:45%;height:12px;border-radius:3px;background:rgba(128,128,128,.22)}
.sft-live .sft-gauge>*{position:absolute;top:0;bottom:0;left:0} .sft-live .sft-gauge i{background:${TRAIN};border-radius:3px} .sft-live .sft-gauge i:first-child{opacity:.35}
.sft-live .sft-gauge.sft-parted i{background:${GREY};border-radius:0;top:8px} .sft-live .sft-parts{right:0;height:8px;display:flex;border-radius:3px 3px 0 0;overflow:hidden} .sft-live .sft-parts span{flex:none}
.sft-live .sft-gauge .sft-peak{top:-2px;bottom:-2px;width:2px;background:${TRAIN}} .sft-live .sft-gauge.sft-full:not(.sft-parted) i,.sft-live .sft-gauge.sft-full .sft-peak{background:${ALARM}}
.sft-live .sft-gauge .sft-forecast{top:-1px;bottom:-1px;width:2px;margin-left:-1px;background:#1c2024;box-shadow:0 0 0 1px #fff} .sft-live .sft-forecast::before{content:"";position:absolute;left:-3px;top:-7px;border:4px solid transparent;border-top:6px solid ${GREY};border-bottom:0}
.sft-live .sft-legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:12px;opacity:.8;margin-top:2px} .sft-live .sft-legend i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}
.sft-live .sft-notice,.sft-live .sft-notes div{border-left:3px solid ${GREY};padding:1px 0 1px 10px;margin:6px 0;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere} .sft-live :is(.sft-notice,.sft-trouble){border-color:${EVAL}!important} .sft-live .sft-notice.sft-bad{border-color:${ALARM}!important}
.sft-live .sft-samples{margin-top:6px;font-size:12px} .sft-live .sft-samples summary{cursor:pointer;opacity:.8}
.sft-live .sft-samples dl{display:grid;grid-template-columns:max-content 1fr;gap:1px 12px;margin:6px 0;border-top:1px solid rgba(128,128,128,.3);padding-top:5px}
.sft-live .sft-samples dt{opacity:.7} .sft-live .sft-samples dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:9em;overflow:auto}
`;

const figure = (v) => v == null ? "–" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));

// Bias-corrected exponential moving average over a `share` of the steps so far, at least 3 points, as sftkit.charts.Average; in steps, so that a thinned-out
// history is smoothed like a full one.
function smooth(points, share) {
  const spacing = points.length && Math.max(1, points[points.length - 1][0] / points.length);
  let mean = 0, weight = 0, last = null;
  return points.map(([x, y]) => {
    if (y != null) {
      const b = share > 0 ? Math.exp(-(last == null ? 1 : x - last) / Math.max(3 * spacing, share * x)) : 0;
      mean = b * mean + (1 - b) * y; weight = b * weight + (1 - b); last = x;
    }
    return weight ? mean / weight : null;
  });
}

// Indices of at most about `most` points, with the lowest and highest of each bucket and every first gap: what is left out would not change the picture.
function thin(points, most) {
  const n = points.length, size = n / (most / 2), keep = [];
  if (n <= most) return points.map((_, i) => i);
  for (let start = 0; start < n; start += size) {
    let low = -1, high = -1, gap = -1;
    for (let i = Math.floor(start); i < Math.min(Math.floor(start + size), n); i++) {
      const v = points[i][1];
      if (v == null) { if (gap < 0) gap = i; continue; }
      if (low < 0 || v < points[low][1]) low = i;
      if (high < 0 || v > points[high][1]) high = i;
    }
    keep.push(...[...new Set([low, high, gap])].filter((i) => i >= 0).sort((a, b) => a - b));
  }
  if (keep[keep.length - 1] !== n - 1) keep.push(n - 1);
  return keep;
}

function drawChart(canvas, run, state) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
  if (!width || !height) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
  const c = canvas.getContext("2d"), ink = getComputedStyle(canvas).color, font = getComputedStyle(canvas).fontFamily;
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, width, height);
  state.pick = null;
  if (!run.points.length && !run.evals.length) {
    c.font = `13px ${font}`; c.textAlign = "center"; c.fillStyle = ink; c.globalAlpha = 0.7;
    c.fillText(run.facts.state === "training" ? "waiting for the first step …" : run.facts.doing ? `${run.facts.doing} …` : "loading the model and the data …", width / 2, height / 2);
    c.globalAlpha = 1;
    return;
  }
  const left = 46, top = 28, right = width - 52, bottom = height - 34;
  const { points, evals, marks, facts } = run, last = points.length ? points[points.length - 1][0] : 0;
  const dense = points.length > FEW;
  const smoothed = dense ? smooth(points, state.smoothing) : points.map((p) => p[1]);
  const end = Math.max(Math.min(facts.total_steps || Infinity, Math.ceil(Math.max(last * 1.12, 10))), last, 1);
  const [low, high] = lossRange(points.map((p) => p[1]), [...evals.map((e) => e[1]), ...smoothed]);
  canvas.dataset.plot = [left, top, right, bottom, left + last / end * (right - left)].join(); // the axes, and how far the curve goes
  const fx = (v) => left + v / end * (right - left), fy = (v) => bottom - (Math.min(Math.max(v, low), high) - low) / (high - low) * (bottom - top);
  const text = (s, x, y, align, color, alpha = 1, weight = "") => { c.font = `${weight} 11px ${font}`; c.textAlign = align; c.fillStyle = color; c.globalAlpha = alpha; c.fillText(s, x, y); c.globalAlpha = 1; };
  const line = (x1, y1, x2, y2, alpha, dash = [], color = ink) => { c.strokeStyle = color; c.globalAlpha = alpha; c.lineWidth = 1; c.setLineDash(dash); c.beginPath(); c.moveTo(x1, y1); c.lineTo(x2, y2); c.stroke(); c.setLineDash([]); c.globalAlpha = 1; };
  for (const v of ticks(low, high, 4)) { line(left, fy(v), right, fy(v), 0.13); text(String(v), left - 8, fy(v) + 4, "right", ink, 0.65); }
  for (const v of ticks(0, end, Math.max(2, Math.round(width / 120)), true)) { line(fx(v), bottom, fx(v), bottom + 4, 0.4); text(v.toLocaleString("en"), fx(v), bottom + 17, "center", ink, 0.65); }
  line(left, bottom, right, bottom, 0.4);
  text("optimizer step", right, bottom + 31, "right", ink, 0.65);
  let x = left + 2;
  const key = (label, color, alpha, dash, ring) => {
    c.strokeStyle = color; c.globalAlpha = alpha; c.lineWidth = ring ? 1.4 : alpha < 1 ? 1 : 2.2; c.setLineDash(dash); c.beginPath(); c.moveTo(x, 8); c.lineTo(x + 18, 8); c.stroke(); c.setLineDash([]);
    if (ring) { c.lineWidth = 2; c.beginPath(); c.arc(x + 9, 8, 3.2, 0, 7); c.stroke(); }
    c.globalAlpha = 1; text(label, x + 24, 12, "left", ink, 0.75); x += 24 + c.measureText(label).width + 18;
  };
  if (dense) key("smoothed", TRAIN, 1, []);
  key("loss of each step", TRAIN, dense ? 0.5 : 1, []);
  if (evals.length) key("evaluation", EVAL, 1, [3, 3], true);
  const free = [left, left]; // two rows of labels: a run that was paused is resumed at the same step
  let next = Infinity;
  const apart = new Set(); // checkpoints that are drawn: the last, and those far enough from the next
  for (const m of [...marks].reverse()) if (m.kind === "checkpoint" && fx(m.step) <= next - 9) { apart.add(m); next = fx(m.step); }
  for (const m of [...marks].sort((a, b) => a.step - b.step)) {
    if (m.kind === "checkpoint" && !apart.has(m)) continue;
    const at = fx(m.step), color = ["failed", "warning", "not finite"].includes(m.kind) ? ALARM : ink;
    if (m.kind === "checkpoint") { c.fillStyle = ink; c.globalAlpha = 0.6; c.beginPath(); c.moveTo(at, bottom - 4); c.lineTo(at + 4, bottom); c.lineTo(at, bottom + 4); c.lineTo(at - 4, bottom); c.fill(); c.globalAlpha = 1; continue; }
    line(at, top, at, bottom, 0.55, [2, 3], color);
    c.font = `11px ${font}`;
    const wide = c.measureText(m.kind).width, start = Math.min(at + 4, right - wide), row = free.findIndex((f) => start >= f);
    if (row >= 0) { text(m.kind, start, top + 10 + 13 * row, "left", color, 0.85); free[row] = start + wide + 8; }
  }
  const path = (xs, ys, color, w, alpha, dash = []) => {
    c.strokeStyle = color; c.lineWidth = w; c.globalAlpha = alpha; c.lineJoin = "round"; c.setLineDash(dash); c.beginPath();
    let pen = false;
    for (let i = 0; i < xs.length; i++) { if (ys[i] == null) { pen = false; continue; } if (pen) c.lineTo(fx(xs[i]), fy(ys[i])); else c.moveTo(fx(xs[i]), fy(ys[i])); pen = true; }
    c.stroke(); c.globalAlpha = 1; c.setLineDash([]);
  };
  const kept = thin(points, 1.5 * width), xs = kept.map((i) => points[i][0]);
  path(xs, kept.map((i) => points[i][1]), TRAIN, dense ? 1 : 2, dense ? 0.4 : 1);
  if (dense) path(xs, kept.map((i) => smoothed[i]), TRAIN, 2.2, 1);
  else for (const [a, b] of points) if (b != null) { c.fillStyle = TRAIN; c.beginPath(); c.arc(fx(a), fy(b), 3, 0, 7); c.fill(); }
  path(evals.map((e) => e[0]), evals.map((e) => e[1]), EVAL, 1.4, 1, [3, 3]);
  c.strokeStyle = EVAL; c.lineWidth = 2;
  for (const [a, b] of evals) if (b != null) { c.beginPath(); c.arc(fx(a), fy(b), 3.4, 0, 7); c.stroke(); }
  const ends = [[smoothed, TRAIN], [evals.map((e) => e[1]), EVAL]].map(([v, color]) => [v.filter((y) => y != null).pop(), color]).filter((e) => e[0] != null).map(([v, color]) => [fy(v) + 4, v, color]).sort((a, b) => a[0] - b[0]);
  if (ends.length === 2 && ends[1][0] - ends[0][0] < 13) { const mid = (ends[0][0] + ends[1][0]) / 2; ends[0][0] = mid - 6.5; ends[1][0] = mid + 6.5; }
  for (const e of ends) e[0] = Math.min(e[0], bottom - 5); // above the axis
  if (ends.length === 2 && ends[1][0] - ends[0][0] < 13) ends[0][0] = ends[1][0] - 13;
  const endX = Math.min(fx(Math.max(last, ...evals.slice(-1).map((e) => e[0]))) + 9, right + 6);
  for (const [y, v, color] of ends) text(v < 100 ? v.toFixed(3) : figure(v), endX, y, "left", color, 1, "600");
  const spike = points.reduce((m, p) => p[1] != null && p[1] > (m ? m[1] : -Infinity) ? p : m, null);
  if (spike && spike[1] > high) text(`▲ ${figure(spike[1])}`, fx(spike[0]), top - 4, "center", TRAIN);
  if (state.hover != null && points.length) {
    const want = (state.hover - left) / (right - left) * end;
    let a = 0, b = points.length - 1;
    while (a < b) { const m = (a + b) >> 1; if (points[m][0] < want) a = m + 1; else b = m; }
    if (a && want - points[a - 1][0] < points[a][0] - want) a--;
    const p = points[a]; state.pick = [p, smoothed[a]];
    line(fx(p[0]), top, fx(p[0]), bottom, 0.5);
    if (p[1] != null) { c.fillStyle = TRAIN; c.beginPath(); c.arc(fx(p[0]), fy(p[1]), 3.5, 0, 7); c.fill(); }
  }
}

const PANELS = [["learning rate", 2, "#16946a"], ["gradient norm", 3, "#9a67c4"], ["tokens/s", 4, "#7d838c"]];
function drawPanel(canvas, words, run, [label, column, color]) {
  const points = run.points.map((p) => [p[0], p[column] ?? null]), values = points.map((p) => p[1]).filter((v) => v != null);
  words.textContent = `${label} ${values.length ? column === 2 ? values[values.length - 1].toExponential(2) : figure(values[values.length - 1]) : "–"}`;
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
  if (!width || !height) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
  const c = canvas.getContext("2d"), first = points.length ? points[0][0] : 0, span = (points.length ? points[points.length - 1][0] : 1) - first || 1;
  const high = values.reduce((m, v) => Math.max(m, v), 0) || 1;
  c.setTransform(ratio, 0, 0, ratio, 0, 0); c.clearRect(0, 0, width, height); c.strokeStyle = color; c.lineWidth = 1.2; c.beginPath();
  let pen = false;
  for (const i of thin(points, 1.5 * width)) {
    const [x, y] = points[i];
    if (y == null) { pen = false; continue; }
    const px = (x - first) / span * (width - 2) + 1, py = height - 2 - Math.max(y, 0) / high * (height - 6);
    if (pen) c.lineTo(px, py); else c.moveTo(px, py);
    pen = true;
  }
  c.stroke();
}

const isRunning = (facts) => ["starting", "training", "paused"].includes(facts.state);

function startLive(model, redraw) {
  const run = { points: [], evals: [], marks: [], samples: [], notes: [], facts: {}, seq: -1, sent: {}, refused: "", draws: 0 };
  const append = (list, more) => { for (const p of more || []) { while (list.length && list[list.length - 1][0] >= p[0]) list.pop(); list.push(p); } };
  const take = (m) => {
    if (m.whole) { Object.assign(run, { points: [], evals: [], seq: -1 }); take(m.whole); return; }
    if (m.taken !== undefined) { delete run.sent[m.taken]; run.refused = ""; run.facts = { ...run.facts, pending: m.pending }; }
    else if (m.refused !== undefined) { delete run.sent[m.name]; run.refused = m.refused; }
    else if (m.seq > run.seq) {
      run.seq = m.seq; run.facts = m.facts;
      if (!isRunning(m.facts)) run.sent = {};
      for (const list of [run.points, run.evals]) while (list.length && list[list.length - 1][0] > m.facts.step) list.pop(); // a resumed run went back
      append(run.points, m.points); append(run.evals, m.evals);
      if (run.points.length > 4000) { // a page left open for days keeps no more than it can draw, the extremes of loss and gradient norm among it
        const kept = new Set([...thin(run.points, 1200), ...thin(run.points.map((p) => [p[0], p[3]]), 800)]);
        run.points = run.points.filter((_, i) => kept.has(i));
      }
      for (const name of ["marks", "samples", "notes"]) if (m[name]) run[name] = m[name];
    }
    redraw();
  };
  const h = model.get("history");
  if (h && h.facts) take(h);
  model.on("msg:custom", take);
  model.send({ type: "here", seq: run.seq }); // what was sent while this script was loading is sent again
  const themed = new MutationObserver(redraw);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  run.close = () => themed.disconnect();
  return run;
}

function mountLive(model, root, run) {
  root.classList.add("sft-live");
  const head = node("div", "sft-head", root);
  node("b", "", head, model.get("title"));
  const badge = node("span", "sft-badge", head), name = node("span", "sft-soft", head), buttons = node("span", "sft-buttons", head), hint = node("div", "sft-soft sft-hint", root, model.get("hint") || "");
  const bar = node("div", "", node("div", "sft-bar", root)), tiles = node("div", "sft-tiles", root);
  const chart = node("div", "sft-chart", root), canvas = node("canvas", "", chart), under = node("div", "sft-under", root), panels = node("div", "sft-panels", root), foot = node("div", "sft-foot", root), legend = node("div", "sft-legend", root);
  canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", "loss by optimizer step");
  const gauge = node("div", "sft-gauge", foot), [reserved, used] = [node("i", "", gauge), node("i", "", gauge)], parts = node("div", "sft-parts", gauge), peak = node("div", "sft-peak", gauge), tick = node("div", "sft-forecast", gauge), words = node("span", "sft-soft", foot);
  const label = node("label", "", under, "smoothing"), slider = node("input", "", label), read = node("span", "sft-read", under);
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 35, title: "Weight of the past in the smoothed curve" });
  const small = PANELS.map(([label]) => { const d = node("div", "", panels); return [node("span", "", d, label), node("canvas", "", d)]; });
  const scores = node("div", "sft-scores", root), notice = node("div", "sft-notice", root), notes = node("div", "sft-notes", root), samples = node("details", "sft-samples", root);
  samples.open = true;
  const state = { smoothing: 0.025, hover: null, pick: null };
  let shownSamples = null, shownNotes = null, frame = 0;

  function drawButtons() {
    const running = isRunning(run.facts), names = running ? model.get("commands").map((n) => n === "pause" && run.facts.state === "paused" ? "resume" : n) : [];
    const asked = [...(run.facts.pending || []), ...Object.keys(run.sent)], can = run.facts.enabled || names, want = JSON.stringify([names, asked, can]);
    hint.hidden = !running || !hint.textContent;
    if (buttons.dataset.shown === want) return;
    buttons.dataset.shown = want; buttons.replaceChildren();
    for (const n of names) {
      const waits = asked.includes(n), b = button(buttons, waits ? (n === "stop" ? "stopping …" : "asked …") : COMMANDS[n][0], COMMANDS[n][1], () => {
        const mine = run.sent[n] = {}; run.refused = "";
        model.send({ type: "request", name: n });
        setTimeout(() => { if (run.sent[n] === mine) { run.refused = "The kernel has not taken notice yet: this front-end delivers clicks only when no cell runs. Interrupting the cell (■ in the toolbar) stops the run just as safely."; draw(); } }, 4000);
        draw();
      });
      b.dataset.command = n; b.disabled = waits || !can.includes(n);
    }
  }
  function drawGauge(g) {
    foot.hidden = legend.hidden = !g;
    if (!g) return;
    const percent = (v) => `${100 * v}%`;
    words.textContent = g.words;
    gauge.className = `sft-gauge${g.full ? " sft-full" : ""}${g.parts.length ? " sft-parted" : ""}`;
    reserved.style.width = percent(g.reserved); used.style.width = percent(g.used); peak.style.left = `calc(${percent(g.peak)} - 2px)`;
    tick.hidden = !g.forecast; if (g.forecast) tick.style.left = percent(g.forecast[1]);
    const shown = JSON.stringify([g.parts, g.strip, g.forecast]);
    if (legend.dataset.shown === shown) return;
    legend.dataset.shown = shown;
    parts.replaceChildren(...g.parts.map(([, share, ink]) => { const e = node("span"); e.style.cssText = `width:${percent(share)};background:${ink}`; return e; }));
    legend.replaceChildren(...[...g.parts, ...g.strip].map((p) => { const e = node("span"); node("i", "", e).style.background = p[p.length - 1]; e.append(p[0]); return e; }));
    if (g.forecast) node("span", "", legend, `▼ ${g.forecast[0]}`);
  }
  function drawNotes() {
    if (shownNotes === run.notes) return;
    shownNotes = run.notes;
    notes.replaceChildren(...run.notes.map(([kind, said]) => { const e = node("div", kind === "note" ? "" : "sft-trouble"); node("b", "", e, kind); e.append(` ${said}`); return e; }));
  }
  function drawSamples() {
    if (shownSamples === run.samples) return;
    shownSamples = run.samples; samples.replaceChildren(); samples.hidden = !run.samples.length;
    node("summary", "", samples, `What it says (${run.samples.length})`);
    for (const s of run.samples) {
      const dl = node("dl", "", samples);
      for (const [k, v] of [["prompt", s.prompt], ["reference", s.reference], ["before", s.base], ["now", s.tuned]])
        if (v != null) { node("dt", "", dl, k); node("dd", "", dl, v); }
    }
  }
  function paint() {
    frame = 0;
    const f = run.facts;
    badge.textContent = f.badge || "◌ starting"; badge.dataset.state = f.state || "starting";
    name.textContent = f.model || "";
    bar.parentNode.hidden = !f.total_steps; bar.style.width = f.total_steps ? `${Math.min(100, 100 * f.step / f.total_steps)}%` : 0;
    const headline = f.headline || [];
    tiles.replaceChildren(...headline.map(([k, v]) => { const d = node("div"); node("span", "", d, k); node("b", "", d, v); return d; }));
    tiles.style.setProperty("--tiles", headline.length); // the figures are as large as fits into one line
    tiles.style.setProperty("--letters", headline.reduce((n, [k, v]) => n + Math.max(v.length, 0.6 * k.length), 1));
    const said = run.refused || f.error || "";
    notice.hidden = !said; notice.textContent = said; notice.className = f.error && !run.refused ? "sft-notice sft-bad" : "sft-notice";
    label.style.visibility = run.points.length > FEW ? "" : "hidden";
    panels.hidden = !run.points.length; scores.hidden = !f.scores; scores.textContent = f.scores || "";
    drawButtons(); drawGauge(f.gauge); drawNotes(); drawSamples(); drawChart(canvas, run, state); small.forEach(([words, c], i) => drawPanel(c, words, run, PANELS[i]));
    if (state.pick) {
      const [[step, loss, lr, norm, rate], smoothed] = state.pick;
      read.textContent = `step ${step.toLocaleString("en")} · loss ${figure(loss)} · smoothed ${figure(smoothed)} · lr ${lr == null ? "–" : lr.toExponential(2)} · grad norm ${figure(norm)} · ${figure(rate && Math.round(rate))} tok/s`;
    } else read.textContent = "";
    run.draws++; root.dataset.draws = run.draws; root.dataset.points = run.points.length; root.dataset.step = f.step || 0;
  }
  const draw = () => { if (!frame) frame = requestAnimationFrame(paint); };
  canvas.onpointermove = (e) => { state.hover = e.offsetX; draw(); };
  canvas.onpointerleave = () => { state.hover = null; draw(); };
  slider.oninput = () => { state.smoothing = slider.value === "0" ? 0 : 0.2 * (slider.value / 100) ** 2; draw(); };
  const resized = new ResizeObserver(draw);
  resized.observe(chart);
  return { draw, close() { resized.disconnect(); cancelAnimationFrame(frame); } };
}

export default panel({ css: LIVE_CSS, start: startLive, mount: mountLive });
