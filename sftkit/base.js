// What the scripts of all widgets share; Python puts this file first. Text from data only ever enters through textContent.

const BLUE = "#3b7dd8", ORANGE = "#d9780a", RED = "#d5483c", GREEN = "#16946a", GREY = "#7d838c";

const node = (tag, cls, parent, text) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  if (e.tabIndex >= 0) e.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's command keys (d d deletes a cell) are not meant while a button here has the focus
  if (parent) parent.append(e);
  return e;
};
const button = (parent, text, title, act) => { const b = node("button", "", parent, text); b.type = "button"; b.title = title; b.onclick = act; return b; };
const count = (n) => Number(n).toLocaleString("en");
const inSelector = (id) => String(id).replace(/[^\w-]/g, "");

function ticks(low, high, n, whole) { // about `n` round numbers in the range, as sftkit.charts.nice_ticks
  const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw)), out = [];
  const steps = [1, 2, 2.5, 5, 10].map((m) => m * power).filter((s) => !(whole && s % 1)), off = (s) => Math.max(s / raw, raw / s);
  const step = steps.sort((a, b) => off(a) - off(b))[0] ?? 1;
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(+(i * step).toPrecision(12));
  return out;
}

// The range of a loss axis, as sftkit.charts._loss_range: a spike of `raw` beyond its 99.5th percentile does not flatten the rest.
function lossRange(raw, other) {
  raw = raw.filter((v) => v != null).sort((a, b) => a - b); other = other.filter((v) => v != null);
  if (!raw.length && !other.length) return [0, 1];
  let low = raw[0] ?? Infinity, high = raw[raw.length - 1] ?? -Infinity, otherHigh = -Infinity;
  for (const v of other) { if (v < low) low = v; if (v > otherHigh) otherHigh = v; }
  high = Math.max(high, otherHigh);
  if (raw.length >= 50) {
    const usual = Math.max(raw[Math.floor(0.995 * raw.length) - 1], otherHigh);
    if (high > usual + 0.5 * (usual - low)) high = usual;
  }
  const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 0.5;
  return [low >= 0 ? Math.max(low - pad, 0) : low - pad, high + pad];
}

function spread(ends, gap = 13) { // pushes labels [y, x, ...] apart that stand close to each other, downwards, as sftkit.charts._spread
  ends.sort((a, b) => a[0] - b[0]);
  ends.forEach((end, i) => { for (const other of ends.slice(0, i)) if (Math.abs(end[1] - other[1]) < gap) end[0] = Math.max(end[0], other[0] + gap); });
  return ends;
}
