// The preview: rows as the trainer sees them, page by page from Python, other chat templates beside, and what inference will send. Which token is trained, its style and its words come from Python
// (sftkit.view.preview_page); this file lays them out.

const PREVIEW_CSS = `
.sft-p .v-bar{margin:6px 0} .sft-p .v-jump{width:74px;text-align:right} .sft-p .v-chips button{border-radius:11px;padding:1px 10px}
.sft-p .v-read{min-height:22px;margin:4px 0 2px;font-size:12px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-variant-numeric:tabular-nums}
.sft-p .v-legend{font-size:12px;gap:4px 14px;margin:2px 0 8px}
.sft-p .v-one{border-top:1px solid rgba(128,128,128,.3);padding:7px 0 10px} .sft-p .v-head{font-size:12px;margin-bottom:4px;display:flex;flex-wrap:wrap;gap:2px 10px}
.sft-p .v-columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:10px 22px}
.sft-p .v-name{font-size:11px;opacity:.75;margin-bottom:2px}
.sft-p .v-text{font:12.5px/1.95 var(--jp-code-font-family,ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace);white-space:pre-wrap;overflow-wrap:anywhere;max-height:31em;overflow:auto}
.sft-p .v-t{border-left:1px solid rgba(128,128,128,.38);cursor:default} .sft-p .v-t:hover{outline:2px solid ${BLUE};outline-offset:1px;border-radius:2px}
.sft-p .v-t.special{border:1px solid rgba(128,128,128,.6);border-radius:3px} .sft-p .v-t.rtl{unicode-bidi:isolate}
.sft-p .v-gap{border:1px dashed rgba(128,128,128,.7);border-radius:3px;opacity:.75;padding:0 6px;margin:0 4px}
.sft-p .v-later{opacity:.32} .sft-p .v-caret{display:inline-block;background:${BLUE};color:#fff;border-radius:3px;padding:0 7px;margin:0 5px;font:600 11px/18px var(--jp-ui-font-family,system-ui,sans-serif);vertical-align:1px}
.sft-p .v-sent{background:rgba(59,125,216,.15);padding:2px 0} .sft-p .v-apart{background:rgba(213,72,60,.22);padding:2px 0}
`;

const pageKey = (p) => JSON.stringify([p.split, p.which, p.start, p.template]);

function startPreview(model, redraw) {
  const store = { pages: new Map(), asked: new Map(), said: "", jumped: null };
  const keep = (p) => { store.pages.set(pageKey(p), p); while (store.pages.size > 60) store.pages.delete(store.pages.keys().next().value); };
  for (const p of model.get("first")) keep(p);
  store.page = (want) => { // the page if it is here, else it is asked for
    const key = pageKey(want), here = store.pages.get(key);
    if (!here && !store.asked.has(key)) {
      store.asked.set(key, setTimeout(() => { store.said = "The kernel is busy with a cell; the rows come when it is free."; redraw(); }, 3000));
      model.send({ type: "rows", ...want });
    }
    return here;
  };
  store.jump = (want) => model.send({ type: "rows", ...want });
  model.on("msg:custom", (m) => {
    keep(m);
    clearTimeout(store.asked.get(pageKey(m))); store.asked.delete(pageKey(m)); store.said = "";
    if (m.row !== undefined) store.jumped = m;
    redraw();
  });
  return store;
}

function tokenText(parent, page, tokens, from, to, cls) { // draws tokens number `from` to `to`; a number among them stands for so many left out
  let at = 0, run = null, style = null;
  for (const t of tokens) {
    const wide = typeof t === "number" ? t : 1;
    if (at + wide > from && at < to) {
      if (typeof t === "number") { node("span", "v-gap", parent, `… ${count(Math.min(at + wide, to) - Math.max(at, from))} more tokens …`); run = null; }
      else {
        if (!run || style !== t[2]) { run = node("span", cls, parent); style = t[2]; if (!cls) run.style.cssText = page.styles[style][0]; }
        if (t[3]) run.append(t[3]);
        const e = node("span", "v-t" + (t[4] === "special" ? " special" : "") + (t[5] ? " rtl" : ""), run, t[0]);
        e.sftToken = [t, page.styles[t[2]]];
      }
    }
    at += wide;
  }
}

function drawTrained(el, page, row) { tokenText(el, page, row.tokens, 0, Infinity, ""); }

function drawSent(el, page, row) { // the prompt, then faintly what training goes on with
  const p = row.prompt;
  if (!p || p.error) { node("div", "p-notice", el, p ? p.error : "no prompt"); return; }
  if (p.tokens) {
    for (const [text, id, same] of p.tokens) node("span", `v-t ${same ? "v-sent" : "v-apart"}`, el, text).sftToken = [[text, id], ["sent", same ? "as trained" : "not as trained"]];
  } else tokenText(el, page, row.tokens, 0, p.length, "v-sent");
  node("span", "v-caret", el, "the answer starts here");
  if (!p.tokens) tokenText(el, page, row.tokens, p.length, Infinity, "v-later");
}

function mountPreview(model, root, store) {
  const about = model.get("about"), n = about.n;
  const state = { split: about.splits[0].name, which: "all", start: 0, sent: false, templates: [""] };
  const top = node("div", "p-row", root);
  node("span", "p-title", top, about.title);
  const headline = node("span", "p-soft", top), bar = node("div", "p-row v-bar", root);
  const splits = node("span", "p-group", bar), filter = node("select", "v-filter", bar), tabs = node("span", "p-group", bar), pager = node("span", "p-row p-right v-pager", bar);
  const back = button(pager, "‹", "Rows before", () => go(state.start - n));
  node("span", "p-soft", pager, "row");
  const jump = node("input", "v-jump", pager), where = node("span", "p-soft v-where", pager);
  const next = button(pager, "›", "Further rows", () => go(state.start + n));
  Object.assign(jump, { type: "number", min: 1, title: "Go to the row of this number" }); jump.setAttribute("aria-label", "row number");
  jump.onchange = () => { const row = Math.floor(+jump.value); if (row >= 1) state.which === "all" ? go(row - 1) : store.jump({ split: state.split, which: state.which, start: 0, template: "", row }); };
  jump.onkeydown = (e) => { if (e.key === "Enter") { e.preventDefault(); jump.onchange(); } };
  const chips = node("div", "p-row v-chips", root), read = node("div", "v-read p-soft", root), legend = node("div", "p-row v-legend", root), notice = node("div", "p-notice", root), body = node("div", "v-rows", root);
  for (const s of about.splits) button(splits, `${s.name} ${count(s.rows)}`, "", () => { Object.assign(state, { split: s.name, which: "all", start: 0 }); draw(); }).dataset.split = s.name;
  button(tabs, "as it is trained", "Tokens by role and by what becomes of them", () => { state.sent = false; draw(); }).dataset.tab = "trained";
  button(tabs, "as inference will send it", "The prompt that generation starts from, token by token", () => { state.sent = true; draw(); }).dataset.tab = "sent";
  if (about.templates.length) {
    node("span", "p-soft", chips, "chat template");
    for (const t of ["", ...about.templates]) button(chips, t || about.own, t ? "Show or hide the rows in this template" : "The plan's own template", () => {
      state.templates = state.templates.includes(t) ? state.templates.filter((x) => x !== t) : [...state.templates, t];
      if (!state.templates.length) state.templates = [""];
      draw();
    }).dataset.template = t;
  }
  filter.onchange = () => { state.which = filter.value; state.start = 0; draw(); };
  const rest = "Hover a token for its id, its role and what becomes of it.";
  body.onpointerover = (e) => { const t = e.target.sftToken; read.textContent = t ? `id ${t[0][1]} · “${t[0][0]}” · ${t[1].slice(-2).join(" · ")}${t[0][4] ? ` · ${t[0][4]}` : ""}` : rest; };
  body.onpointerleave = () => { read.textContent = rest; };
  read.textContent = rest;

  let shown = null, total = about.splits[0].rows; // the page of the plan's own template, and how many rows there are
  function go(start) { state.start = Math.max(0, Math.min(start, total - 1)); draw(); }
  function drawBar() {
    const split = about.splits.find((s) => s.name === state.split), want = [["all", "all rows"], ...split.filters.map(([k, c]) => [k, `${k} (${count(c)})`])];
    headline.textContent = split.headline; splits.hidden = about.splits.length < 2;
    for (const b of splits.children) b.setAttribute("aria-pressed", b.dataset.split === state.split);
    for (const b of tabs.children) b.setAttribute("aria-pressed", (b.dataset.tab === "sent") === state.sent);
    for (const b of chips.querySelectorAll("button")) b.setAttribute("aria-pressed", state.templates.includes(b.dataset.template));
    if (filter.dataset.of !== state.split) { filter.dataset.of = state.split; filter.replaceChildren(...want.map(([k, words]) => { const o = node("option", "", null, words); o.value = k; return o; })); }
    filter.value = state.which; filter.hidden = want.length < 2;
    const last = Math.min(state.start + n, total);
    where.textContent = !total ? "no rows" : state.which === "all" ? `– ${count(last)} of ${count(total)}` : `${count(state.start + 1)}–${count(last)} of ${count(total)} ${state.which}`;
    if (document.activeElement !== jump) jump.value = shown?.rows[0]?.number ?? state.start + 1;
    back.disabled = state.start <= 0; next.disabled = state.start + n >= total;
  }
  function drawRow(i, pages) {
    const one = node("div", "v-one", body), head = node("div", "v-head", one), columns = node("div", "v-columns", one), first = pages.find((p) => p)?.rows[i];
    if (first) { node("b", "", head, `row ${count(first.number)}`); if (first.where && first.where !== `row ${first.number}`) node("span", "p-soft", head, first.where); }
    pages.forEach((page, k) => {
      const cell = node("div", "v-cell", columns), row = page?.rows[i], t = state.templates[k];
      cell.dataset.template = t;
      const note = row && (state.sent ? row.prompt?.note : row.note);
      const words = [pages.length > 1 ? t || `${about.own} (this plan)` : "", note || ""].filter(Boolean).join(" — ");
      if (pages.length > 1) node("div", "v-name", cell, words); else node("span", "p-soft", head, words);
      if (!row) node("div", "p-soft", cell, "…");
      else if (row.error !== undefined) node("div", "p-notice", cell, row.error);
      else (state.sent ? drawSent : drawTrained)(node("div", "v-text", cell), page, row);
    });
  }
  function drawLegend(pages) {
    const seen = new Map();
    if (!state.sent) for (const p of pages) for (const [css, role, fate] of p?.styles || []) seen.set(fate === "cut off" ? "cut off" : `${role}, ${fate}`, css);
    legend.replaceChildren(...[...seen].map(([words, css]) => { const e = node("span", "", null, words); e.style.cssText = css; return e; }));
    legend.hidden = !seen.size;
  }
  function draw() {
    if (store.jumped) { Object.assign(state, { start: store.jumped.start }); store.jumped = null; }
    const want = (template) => store.page({ split: state.split, which: state.which, start: state.start, template });
    shown = want("") || null;
    if (shown) total = shown.total;
    const pages = state.templates.map(want), high = Math.max(...pages.map((p) => p ? p.rows.length : 0));
    drawBar(); drawLegend(pages);
    notice.hidden = !store.said; notice.textContent = store.said;
    if (!high && shown === null) return; // the rows before stay until the new ones come
    body.replaceChildren();
    for (let i = 0; i < high; i++) drawRow(i, pages);
    if (shown && !shown.total) node("div", "p-soft", body, "No row is like that.");
    root.dataset.start = state.start; root.dataset.columns = pages.filter(Boolean).length;
  }
  return { draw };
}

export default panel({ css: PREVIEW_CSS, start: startPreview, mount: mountPreview });
