// The conversation: what is asked, and what the tuned model and its base answer, as they write it. A page gets the turns once, then what is added. Python keeps the conversation; this file draws it.

const CHAT_CSS = `
.sft-p .c-turns{margin:8px 0;max-height:620px;overflow:auto;border-top:1px solid rgba(128,128,128,.3)}
.sft-p .c-turn{padding:9px 0 11px;border-bottom:1px solid rgba(128,128,128,.3)} .sft-p .c-turn:last-child{border-bottom:0}
.sft-p .c-name{font-size:11px;opacity:.72;margin-bottom:1px;display:flex;align-items:center;gap:6px} .sft-p .c-said{white-space:pre-wrap;overflow-wrap:anywhere;max-height:340px;overflow:auto}
.sft-p .c-you{background:rgba(128,128,128,.14);border-radius:8px;padding:5px 12px 7px;margin-bottom:8px;width:fit-content;max-width:88%}
.sft-p .c-answers{display:grid;grid-template-columns:repeat(var(--sides),1fr);gap:8px 16px} @container (max-width:520px){.sft-p .c-answers{grid-template-columns:1fr}}
.sft-p .c-answer{border-left:3px solid ${GREY};padding:1px 0 2px 11px;min-width:0} .sft-p .c-answer[data-side=tuned]{border-color:${GREEN}}
.sft-p .c-answer.c-writing .c-said::after{content:"▍";color:${BLUE};animation:sft-blink 1s steps(2) infinite} @keyframes sft-blink{50%{opacity:0}} @media (prefers-reduced-motion:reduce){.sft-p .c-said::after{animation:none}}
.sft-p .c-none{opacity:.6} .sft-p .c-empty{padding:22px 0;opacity:.65}
.sft-p textarea{width:100%;resize:vertical;line-height:1.45;font-size:13px;padding:7px 10px;border-radius:6px} .sft-p .c-ask{display:flex;gap:8px;align-items:stretch} .sft-p .c-ask textarea{flex:1;min-width:0;height:58px}
.sft-p .c-ask button{width:84px;border-radius:6px;font-size:13px;background:${BLUE};border-color:${BLUE};color:#fff} .sft-p .c-ask button:hover:not(:disabled){background:#2f69bb} .sft-p .c-ask button.c-stop,.sft-p .c-ask button.c-stop:hover{background:transparent;color:${RED};border-color:${RED}}
.sft-p .c-settings{margin-top:7px;gap:6px 16px} .sft-p label{display:inline-flex;align-items:center;gap:7px;font-size:12px} .sft-p .c-settings input[type=number]{width:72px} .sft-p .c-settings input[type=checkbox]{accent-color:${BLUE};width:14px;height:14px;padding:0}
.sft-p .c-system{margin-top:7px;display:flex} .sft-p .c-system input{flex:1;min-width:0;padding:4px 10px;font-size:12px}
`;

function startChat(model, redraw) {
  const store = { turns: [], first: 0, busy: false, seq: -1, refused: "", settings: null, version: 0 };
  const take = (m) => {
    if (m.seq <= store.seq) return;
    store.seq = m.seq; store.refused = m.refused || "";
    if (m.refused) store.busy = store.pending || false;
    if (m.cleared) { store.turns = []; store.first = 0; store.version++; }
    if (m.whole) { while (store.turns.length < m.turn - store.first) store.turns.push(null); store.turns[m.turn - store.first] = m.whole; store.busy = m.busy; store.pending = m.busy; }
    if (m.grown) for (const [side, more] of Object.entries(m.grown)) { const t = store.turns[m.turn - store.first]; if (t) t[side] += more; }
    redraw();
  };
  const h = model.get("history");
  if (h && h.turns) Object.assign(store, { turns: h.turns, first: h.first, busy: h.busy, pending: h.busy, seq: h.seq, settings: h });
  model.on("msg:custom", take);
  return store;
}

function mountChat(model, root, store) {
  const about = model.get("about"), two = about.sides.length > 1, sides = two ? ["base", "tuned"] : about.sides, set = store.settings || {};
  const top = node("div", "p-row", root);
  node("span", "p-title", top, about.title);
  const words = node("span", "p-soft", top), clear = button(node("span", "p-right", top), "Clear", "Forget this conversation", () => model.send({ type: "clear" }));
  const turns = node("div", "c-turns", root), notice = node("div", "p-notice", root), ask = node("div", "c-ask", root);
  const box = node("textarea", "", ask), go = button(ask, "Send", "Send (Enter); a new line is Shift+Enter", () => store.busy ? model.send({ type: "stop" }) : send());
  box.placeholder = "Ask something"; box.setAttribute("aria-label", "your message"); turns.setAttribute("aria-live", "polite");
  const system = node("div", "c-system", root), order = node("input", "", system);
  Object.assign(order, { type: "text", placeholder: "System message (none)", value: set.system || "", title: "System message, sent before the conversation" }); order.setAttribute("aria-label", "system message");
  system.hidden = !about.turns_are_sent;
  const settings = node("div", "p-row c-settings", root);
  const field = (text, options, title) => { const l = node("label", "", settings, options.type === "checkbox" ? undefined : text), i = node("input", "", l); Object.assign(i, options); l.title = title; if (options.type === "checkbox") l.append(text); return i; };
  const heat = field("temperature", { type: "number", min: 0, max: 10, step: 0.1, value: set.temperature ?? 0 }, "0: the likeliest token each time; higher: more chance");
  const most = field("longest answer, tokens", { type: "number", min: 1, max: 100000, step: 1, value: set.max_new_tokens ?? 256 }, "New tokens at most");
  const also = two ? field("ask the base model too", { type: "checkbox", checked: true }, "The base answers after the tuned model, going on from its own answers") : null;
  words.textContent = about.turns_are_sent ? "" : "trained on plain text: each message is continued on its own";
  box.onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); if (!store.busy) send(); } };

  function send() {
    const text = box.value;
    if (!text.trim()) return;
    const number = (i, fallback) => i.value === "" || isNaN(+i.value) ? fallback : +i.value;
    store.busy = true; store.refused = "";
    model.send({ type: "ask", text, system: order.value, temperature: number(heat, 0), max_new_tokens: Math.round(number(most, 256)), sides: also && !also.checked ? ["tuned"] : about.sides });
    box.value = ""; draw(); box.focus();
    const seq = store.seq;
    setTimeout(() => { if (store.busy && store.seq === seq) { store.refused = "The kernel is busy with a cell; the answer comes when it is free."; draw(); } }, 4000);
  }
  const drawn = []; // per turn: the nodes, so that what grows is changed in place and a selection stays
  function drawTurn(t, i) {
    let d = drawn[i];
    if (!d) {
      const el = node("div", "c-turn", turns), you = node("div", "c-you", el);
      d = drawn[i] = { you: (node("div", "c-name", you, "you"), node("div", "c-said", you)), answers: node("div", "c-answers", el), note: node("div", "p-notice", el), cells: {} };
      for (const s of sides) { const a = node("div", "c-answer", d.answers); a.dataset.side = s; node("div", "c-name", a, s); d.cells[s] = [a, node("div", "c-said", a)]; }
    }
    const writing = t.note === "…", said = sides.filter((s) => t[s] != null), now = writing ? (t.base != null ? "base" : t.tuned != null ? "tuned" : about.sides[0]) : "";
    const put = (e, text) => { if (e.textContent !== text) e.textContent = text; };
    put(d.you, t.user);
    d.answers.style.setProperty("--sides", writing || said.length > 1 ? sides.length : 1);
    for (const s of sides) {
      const [a, e] = d.cells[s];
      a.hidden = !writing && t[s] == null; a.classList.toggle("c-writing", s === now);
      put(e, t[s] == null ? "" : writing ? t[s] : t[s].trimEnd() || "(blank)"); e.classList.toggle("c-none", t[s] != null && !t[s].trim() && !writing);
    }
    d.note.hidden = !t.note || writing; put(d.note, t.note && !writing ? t.note : "");
    d.note.className = t.note === "stopped" ? "p-notice" : "p-notice p-bad";
  }
  let version = -1, empty = null;
  function draw() {
    const low = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
    if (version !== store.version) { version = store.version; drawn.length = 0; turns.replaceChildren(); empty = null; }
    if (!store.turns.length && !empty) empty = node("div", "c-empty", turns, two ? "Ask something: the tuned model answers on the right, its base on the left." : "Ask something.");
    if (store.turns.length && empty) { empty.remove(); empty = null; }
    store.turns.forEach((t, i) => { if (t) drawTurn(t, i); });
    if (low) turns.scrollTop = turns.scrollHeight;
    go.textContent = store.busy ? "■ Stop" : "Send"; go.classList.toggle("c-stop", store.busy); clear.disabled = store.busy || !store.turns.length;
    notice.hidden = !store.refused; notice.textContent = store.refused;
    root.dataset.turns = store.turns.length; root.dataset.busy = store.busy;
  }
  return { draw };
}

export default panel({ css: CHAT_CSS, start: startChat, mount: mountChat });
