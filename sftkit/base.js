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

function ticks(low, high, n, whole) { // about `n` round numbers in the range, as sftkit.view.nice_ticks
  const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw)), out = [];
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(+(i * step).toPrecision(12));
  return out;
}

