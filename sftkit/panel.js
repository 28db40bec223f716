// What live.js, preview.js, chat.js and compare.js share; Python puts this file between base.js and theirs. A panel is drawn into the page's place for
// it, <div class="sft-panel" data-run="ID">, which a saved notebook keeps as an empty element, and hides the static form beside it,
// <div class="sft-static" data-run="ID">. No widget output is needed for that: the model alone comes to the page, looks for its place, and
// finds it again after a reload. Where no kernel answers, the static form is what is seen.

const BASE_CSS = `
.sft-p{font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,var(--vscode-editor-foreground,currentColor));max-width:960px;padding:2px 3px 8px;text-align:left;container-type:inline-size}
.sft-p *{box-sizing:border-box} .sft-p [hidden]{display:none!important}
.sft-p .p-row{display:flex;flex-wrap:wrap;align-items:center;gap:6px 10px} .sft-p .p-right{margin-left:auto}
.sft-p .p-title{font-size:15px;font-weight:700;overflow-wrap:anywhere} .sft-p .p-soft{opacity:.72;font-size:12px;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.sft-p button,.sft-p input,.sft-p select,.sft-p textarea{font:inherit;font-size:12px;line-height:18px;color:inherit;background:transparent;border:1px solid rgba(128,128,128,.5);border-radius:4px;padding:2px 9px;margin:0;height:auto;min-height:0}
.sft-p select option{color:#222;background:#fff} .sft-p button{cursor:pointer} .sft-p button:hover:not(:disabled){background:rgba(128,128,128,.16)} .sft-p button:disabled{opacity:.4;cursor:default}
.sft-p button:focus-visible,.sft-p input:focus-visible,.sft-p select:focus-visible,.sft-p textarea:focus-visible{outline:2px solid ${BLUE};outline-offset:1px}
.sft-p button[aria-pressed=true],.sft-p button[aria-pressed=true]:hover:not(:disabled){background:rgba(59,125,216,.2);border-color:${BLUE}}
.sft-p .p-group{display:inline-flex} .sft-p .p-group button{border-radius:0;margin-left:-1px} .sft-p .p-group button:first-child{border-radius:4px 0 0 4px;margin-left:0} .sft-p .p-group button:last-child{border-radius:0 4px 4px 0}
.sft-p .p-group button:only-child{border-radius:4px} .sft-p .p-group button[aria-pressed=true]{position:relative}
.sft-p .p-notice{border-left:3px solid ${ORANGE};padding:1px 0 1px 10px;margin:6px 0;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere} .sft-p .p-bad{border-color:${RED}}
`;

// `start(model, redraw)` makes what all views of a model share; `mount(model, root, store)` draws one and returns {draw, close}.
const panel = ({ css, start, mount }) => () => {
  let store;
  const views = new Set(), places = new Map(), away = new Set(); // drawn; element in the page -> its panel; those out of the page, held weakly
  const redraw = () => views.forEach((v) => v.draw());
  function open(model, el) {
    node("style", "", el, BASE_CSS + css + `.sft-static[data-run="${inSelector(model.get("run_id"))}"]{display:none}`);
    const root = node("div", "sft-p", el);
    const view = mount(model, root, store);
    const wake = () => { views.add(view); view.draw(); };
    wake();
    return { wake, sleep() { views.delete(view); }, end() { views.delete(view); view.close?.(); el.replaceChildren(); delete el.sftPanel; } };
  }
  // An element out of the page carries its panel: what was typed is there when the notebook puts it back, and both are freed when it does not.
  function place(model) {
    for (const [el, p] of places) {
      if (el.isConnected) continue;
      places.delete(el); p.sleep(); el.sftPanel = p; away.add(p.away = new WeakRef(p));
    }
    for (const ref of away) if (!ref.deref()) away.delete(ref);
    for (const el of document.querySelectorAll(`.sft-panel[data-run="${inSelector(model.get("run_id"))}"]`)) {
      if (places.has(el)) continue;
      const p = el.sftPanel;
      if (p) { away.delete(p.away); delete el.sftPanel; p.wake(); }
      places.set(el, p || open(model, el));
    }
  }
  return {
    initialize({ model }) {
      store = start(model, redraw);
      let soon = 0;
      const seen = new MutationObserver(() => { soon ||= setTimeout(() => { soon = 0; place(model); }, 60); });
      seen.observe(document.body, { childList: true, subtree: true });
      place(model);
      return () => { seen.disconnect(); clearTimeout(soon); store.close?.(); places.forEach((p) => p.end()); away.forEach((ref) => ref.deref()?.end()); };
    },
    render({ model, el }) { return open(model, el).end; },
  };
};
