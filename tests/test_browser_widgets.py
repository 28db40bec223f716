"""The panels in a real JupyterLab: they draw, they ask and are answered, and a saved notebook shows their static form to anybody. Models are tiny and random."""
import json
import pytest
import browser
from tiny import save_tiny
from browser import lab, notebook, untrusted_copy, write_notebook

browser.needed()
pytestmark = pytest.mark.xdist_group("browser")

START = f"""
import sys; sys.path.insert(0, {str(browser.ROOT/"tests")!r})
from sftkit import Session, Run, compare
tiny = "tiny"
rows = [{{"messages": [{{"role": "user", "content": f"turn on light {{i}}"}}, {{"role": "assistant", "content": f"light {{i}} on" + " now" * (i % 30)}}]}} for i in range(60)]
rows[1]["messages"][0]["content"] = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\\u202e\\x00"
rows[2]["messages"] = [{{"role": "system", "content": "Be short."}}, {{"role": "assistant", "content": "hello"}}, *rows[2]["messages"]]
plan = Session(tiny, project="p").data(rows, eval=6).options(max_seq_length=40)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    save_tiny(folder/"tiny", extra=("<|im_start|>", "<|im_end|>"))
    with lab(folder) as server: yield server

@pytest.fixture(autouse=True)
def no_kernels_left(server):
    yield
    server.end_sessions()

def data_of(nb): return nb.page.locator(".sft-p").evaluate("e => ({...e.dataset})")
def wait(nb, script, seconds=20): nb.page.wait_for_function(f"() => {{ const p = document.querySelector('.sft-p'); return p && {script}; }}", timeout=seconds * 1000)
def unharmed(nb): return nb.page.evaluate("() => window.hit") is None and nb.errors == [] and nb.page.locator(".sft-p script, .sft-p img[src=x]").count() == 0


def test_preview_pages_and_templates(server):
    write_notebook(server.root/"preview.ipynb", [START + "plan.preview(n=3)"])
    with notebook(server, "preview.ipynb", width=900) as nb:
        nb.run_all(); wait(nb, "p.querySelectorAll('.v-one').length === 3")
        assert not nb.page.locator(".sft-static").is_visible() and "window.hit=1" in nb.text(0) and "⟨U+202E⟩" in nb.text(0)
        nb.page.locator("button[title='Further rows']").click(); wait(nb, "p.dataset.start === '3'")
        nb.page.locator("button[data-template=llama]").click(); wait(nb, "p.dataset.columns === '2' && p.querySelectorAll('.v-cell').length === 6")
        jump = nb.page.locator(".v-jump"); jump.fill("1"); jump.press("Enter"); wait(nb, "p.dataset.start === '0'")
        nb.page.locator(".v-jump").blur()
        wait(nb, "p.innerText.includes('roles must alternate')") # a row that llama can't render, beside one that it can
        nb.page.locator(".v-t", has_text="<|im_start|>").first.hover(); wait(nb, "/^id \\d+ · “<\\|im_start\\|>” · template · not trained · special$/.test(p.querySelector('.v-read').textContent)")
        nb.page.locator("button[data-tab=sent]").click()
        wait(nb, "p.querySelectorAll('.v-caret').length >= 4")
        sent, whole = (nb.page.locator(f".v-cell[data-template=''] {s}").first.inner_text() for s in (".v-sent", ".v-text"))
        assert whole.startswith(sent) and "the answer starts here" in whole and nb.page.locator(".v-later").count() > 0
        nb.page.locator("button[data-split='held out']").click(); wait(nb, "p.querySelector('.v-where').textContent.endsWith('of 6')")
        nb.page.locator("button[data-split=training]").click(); nb.page.locator("select.v-filter").select_option("cut"); wait(nb, "/ cut$/.test(p.querySelector('.v-where').textContent)")
        assert nb.page.evaluate("() => { const p = document.querySelector('.sft-p'); return p.scrollWidth <= p.clientWidth && p.clientWidth < 760; }") # nothing sticks out
        nb.page.locator("button[data-template=llama]").focus(); nb.page.keyboard.press("d"); nb.page.keyboard.press("d")
        assert nb.page.locator(".sft-p").count() == 1 and unharmed(nb) # d d is JupyterLab's key for deleting the cell
        nb.save(); nb.reload()
        wait(nb, "p.querySelectorAll('.v-one').length === 3")
        nb.page.locator("button[title='Further rows']").click(); wait(nb, "p.dataset.start === '3'")

CHAT = START + """
run = plan.lora(r=4).fit("plain", epochs=1, lr=1e-2)
chat = run.chat(max_new_tokens=30)
"""

def test_chat_with_a_run(server):
    write_notebook(server.root/"chat.ipynb", [CHAT, "chat", "print(chat.turns[0]['tuned'] == run.generate('<b>light</b> on', 30), len(chat.turns))"])
    with notebook(server, "chat.ipynb", width=900) as nb:
        nb.run_cell(0); nb.run_cell(1); wait(nb, "p.querySelector('textarea')", 60)
        box, turns = nb.page.locator(".sft-p textarea"), nb.page.locator(".sft-p .c-turn")
        box.fill("<b>light</b> on"); box.press("Enter")
        wait(nb, "p.dataset.turns === '1' && p.dataset.busy === 'false'", 60)
        assert turns.first.locator(".c-you").inner_text() == "you\n<b>light</b> on" and nb.page.locator(".c-answer:visible").count() == 2
        nb.page.locator(".c-system input").fill("Be short."); nb.page.locator("input[type=checkbox]").uncheck(); nb.page.locator("input[type=number]").first.fill("1.5")
        box.fill("and off\nnow"); box.press("Shift+Enter"); assert data_of(nb)["turns"] == "1" and nb.page.evaluate("() => document.activeElement.tagName") == "TEXTAREA" # a new line, and no command of JupyterLab
        box.fill("and off\nnow"); box.press("Enter")
        wait(nb, "p.dataset.turns === '2' && p.dataset.busy === 'false'", 60)
        assert turns.nth(1).locator(".c-answer:visible").count() == 1 and turns.nth(1).locator(".c-you").inner_text() == "you\nand off\nnow"
        nb.run_cell(2); nb.page.wait_for_function("() => document.body.innerText.includes('True 2')", timeout=30_000)
        assert nb.page.evaluate("() => { const p = document.querySelector('.sft-p'); return p.scrollWidth <= p.clientWidth && p.clientWidth < 760; }") and unharmed(nb)

WORDS = """
import time
from sftkit.widgets import Chat
def words(side, prompt, max_new_tokens, temperature):
    for i in range(max_new_tokens): time.sleep(0.02); yield f"{side}{i} "
chat = Chat(words)
chat
"""

def test_answers_grow_and_stop(server):
    write_notebook(server.root/"words.ipynb", [WORDS, "import time; time.sleep(4); len(chat.turns[0]['tuned'])"])
    with notebook(server, "words.ipynb", width=900) as nb:
        nb.run_cell(0); wait(nb, "p.querySelector('textarea')")
        nb.page.evaluate("""() => { window.seen = new Set(); new MutationObserver(() => window.seen.add(document.querySelector('.c-answer[data-side=tuned] .c-said')?.textContent)).observe(document.querySelector('.c-turns'), {childList: true, subtree: true}); }""")
        box, most = nb.page.locator(".sft-p textarea"), nb.page.locator("label", has_text="longest").locator("input")
        most.fill("5000"); box.fill("sing"); box.press("Enter")
        nb.page.wait_for_function("() => window.seen.size > 8"); nb.run_cell(1, wait=False) # a cell runs meanwhile: the kernel is free
        nb.page.wait_for_timeout(500); nb.page.locator(".c-ask button").click(); wait(nb, "p.dataset.busy === 'false' && p.innerText.includes('stopped')", 5)
        assert nb.page.locator(".c-answer:visible").count() == 1
        nb.page.locator("input[type=number]").first.fill("-1"); box.fill("hot"); box.press("Enter"); wait(nb, "p.innerText.includes('temperature is -1')")
        nb.page.locator("input[type=number]").first.fill("0"); most.fill("3"); box.fill("short"); box.press("Enter"); wait(nb, "p.dataset.turns === '2' && p.innerText.includes('base0 base1 base2')")
        nb.save(); nb.reload(); wait(nb, "p.dataset.turns === '2' && p.innerText.includes('base0 base1 base2')")
        nb.page.locator(".sft-p button[title='Forget this conversation']").click(); wait(nb, "p.dataset.turns === '0'"); assert unharmed(nb)


RUNS = f"""
import json, sys; sys.path.insert(0, {str(browser.ROOT/"tests")!r})
from pathlib import Path
from made_up_run import made_up_run
from sftkit import Recipe, Run, compare
def made_up(name, seed, steps, state="finished", **fields):
    folder = Path(name); folder.mkdir()
    Recipe(model="tiny", data_path="train.jsonl", project_name=name, **fields).to_yaml(folder/"recipe.yaml")
    (folder/"events.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in made_up_run(steps, 100, seed, state)))
    return Run.open(name)
a, b, c = made_up("first", 0, 100, lr=1e-4), made_up("<b>second<", 1, 80, lr=2e-4, peft=True), made_up("third", 2, 40, "", lr=3e-4)
compare(a, b, c)
"""
END = """
with open("third/events.jsonl", "a") as f:
    for e in made_up_run(100, 100, 2):
        if e["kind"] == "step" and e["step"] > 40 or e.get("state") == "finished": f.write(json.dumps(e) + "\\n")
"""

def test_compare_follows_and_toggles(server):
    write_notebook(server.root/"compare.ipynb", [RUNS, END])
    with notebook(server, "compare.ipynb", width=900) as nb:
        nb.run_cell(0); wait(nb, "p.dataset.shown === '3' && p.querySelectorAll('.m-chart path').length === 3")
        first, before = nb.page.locator(".m-chart path[data-run='0']").get_attribute("d"), int(data_of(nb)["points"])
        assert data_of(nb)["live"] == "1" and nb.page.locator(".m-live").count() == 1
        nb.page.locator(".m-legend button[data-run='1']").click(); wait(nb, "p.dataset.shown === '2' && p.querySelectorAll('.m-chart path').length === 2 && p.querySelector('.m-off')")
        nb.page.locator(".m-legend button[data-run='1']").click(); wait(nb, "p.querySelectorAll('.m-chart path').length === 3")
        nb.page.locator("button[data-axis=seconds]").click(); wait(nb, "p.querySelector('.m-chart').textContent.includes('seconds of training')")
        nb.page.locator(".m-chart").hover(position={"x": 300, "y": 120}); wait(nb, "/1 first: [\\d.]+ at step \\d+/.test(p.querySelector('.m-read').textContent)")
        nb.run_cell(1); wait(nb, "p.dataset.live === '0' && p.querySelector('.m-table').textContent.includes('✓ finished100')", 20) # the third run went on and ended
        assert int(data_of(nb)["points"]) > before + 30 and "<b>second<" in nb.text(0) and unharmed(nb)
        assert nb.page.evaluate("() => { const p = document.querySelector('.sft-p'); return p.scrollWidth <= p.clientWidth && p.clientWidth < 760; }")


# --- what is left of them

STATIC = {0: ["What is trained", "tokens are trained (51%) in 53 of 54 rows", "<script>window.hit=1</script>"], 2: ["Chat with p", "<b>light</b> on", "tuned", "base", "system: Be short.", "and off"],
          3: ["3 runs compared", "<b>second<", "0.0003", "Where the recipes differ", "✓ finished\t100"]}                     # by cell

@pytest.fixture(scope="module")
def saved(server):
    "A notebook with a preview, a chat of two turns and a comparison that saw a run end, saved."
    folder = server.root/"saved"; folder.mkdir(); (folder/"tiny").symlink_to(server.root/"tiny")
    chat = CHAT.removeprefix(START)
    write_notebook(folder/"panels.ipynb", [START + "plan.preview(n=3)", chat, "chat", RUNS, END])
    with notebook(server, "saved/panels.ipynb", width=900) as nb:
        def within(cell, selector): nb.output(cell).locator(f".sft-p{selector}").first.wait_for(timeout=60_000)
        for cell in range(4): nb.run_cell(cell)
        within(0, " .v-one"); within(3, "[data-live='1'][data-shown='3']"); within(2, " textarea")
        panel = nb.output(2).locator(".sft-p")
        for i, text in enumerate(("<b>light</b> on", "and off"), 1):
            panel.locator("textarea").fill(text); panel.locator("textarea").press("Enter")
            within(2, f"[data-turns='{i}'][data-busy=false]")
            panel.locator(".c-system input").fill("Be short.")
        nb.run_cell(4); within(3, "[data-live='0']")
        nb.page.wait_for_timeout(500); nb.save()
    return folder/"panels.ipynb"

@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_notebook_shows_the_static_forms_without_its_kernel(server, saved, trusted):
    server.end_sessions()
    book = saved if trusted else untrusted_copy(saved, saved.with_name("downloaded.ipynb"))
    text = book.read_text()
    assert "widget-view" not in text and all(len(json.dumps(cell)) < 120_000 for cell in json.loads(text)["cells"])
    with notebook(server, f"saved/{book.name}") as nb:
        assert nb.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.filter((w) => w.model.type === 'code').map((w) => w.model.trusted)") == [trusted] * 5
        nb.page.wait_for_timeout(800)
        for cell, words in STATIC.items():
            shown = nb.text(cell)
            assert all(w in shown for w in words), (cell, shown[:600])
        assert "Error displaying widget" not in nb.page.content() and nb.page.locator(".sft-p").count() == 0
        assert nb.page.evaluate("() => window.hit") is None and nb.errors == []


# --- the scripts by themselves, in a bare page with a model made here

FAKE = """async (source, state, hosts) => {
    const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"}))), heard = {}, sent = [];
    const model = {get: (k) => state[k], on: (name, f) => heard[name] = f, send: (m) => sent.push(m)};
    const widget = module.default();
    return {model, widget, sent, say: (m) => heard["msg:custom"](m), close: widget.initialize({model}), frame: () => new Promise((f) => setTimeout(f, 120))};
}"""
def source(name): return "".join((browser.ROOT/"sftkit"/f"{n}.js").read_text() for n in ("base", "panel", name))

def test_the_page_reckons_as_python_does(server):
    "Ticks, the range of the loss axis, and numbers that stand apart: of random values, ties and halves among them."
    import random
    from sftkit.charts import _loss_range, _spread, nice_ticks
    rnd = random.Random(0)
    axes = [(0, n, k, whole) for n in (1, 3, 12, 13, 25, 120, 1234, 99_999) for k in (2, 5, 6, 7) for whole in (True, False)] + [(0.5, 0.9, 4, False), (2.25, 2.26, 5, False), (-3, 7, 5, True)]
    losses = [[rnd.uniform(1, 3) for _ in range(n)] + [None] * (n > 20) + [1e4] * spikes for n in (1, 30, 60, 1000) for spikes in (0, 1)] + [[2.0] * 60, []]
    ends = [[[rnd.choice((10, 10.5, 20, 21.04)), rnd.choice((100, 105, 400)), str(i)] for i in range(n)] for n in (1, 2, 5, 11, 20)]
    page = server.browser.new_page()
    try: ours = page.evaluate("""([source, axes, losses, ends]) => { const {ticks, lossRange, spread} = new Function(source + "; return {ticks, lossRange, spread}")();
        return [axes.map((a) => ticks(...a)), losses.map((v) => lossRange(v, [])), ends.map((e) => spread(e))]; }""", [(browser.ROOT/"sftkit"/"base.js").read_text(), axes, losses, ends])
    finally: page.close()
    ticks, ranges, apart = ours
    for axis, found in zip(axes, ticks): assert found == pytest.approx(nice_ticks(*axis)), axis
    for values, found in zip(losses, ranges): assert found == pytest.approx(_loss_range(dict(loss=((), [v for v in values if v is not None])))[:2])
    for labels, found in zip(ends, apart): assert found == _spread([list(l) for l in labels])

def test_preview_js_by_itself(server):
    page = server.browser.new_page()
    try:
        page.set_content("<body></body>")
        out = page.evaluate(f"""async ([source]) => {{
            const token = (t, id, s) => [t, id, s], rows = (start, error) => [{{number: start + 1, where: "<b>x</b>", note: "n", prompt: {{length: 2, note: "2 tokens", tokens: null}}, tokens: [token("<i>a</i>", 1, 0), token("b", 2, 0), 5, token("c", 8, 1)]}}, ...(error ? [{{number: start + 2, where: "", error: "<script>no</script>"}}] : [])];
            const pageOf = (start, template) => ({{split: "training", which: "all", start, template, total: 7, rows: rows(start, !!template), styles: [["color:red", "user", "not trained"], ["color:green", "<u>", "trained"]]}});
            const state = {{run_id: "abc", about: {{title: "<b>t</b>", own: "own", templates: ["llama"], n: 1, splits: [{{name: "training", rows: 7, filters: [["cut", 2]], headline: "h"}}]}}, first: [pageOf(0, "")]}};
            const {{widget, model, sent, say, close, frame}} = await ({FAKE})(source, state), out = {{}};
            const place = document.createElement("div"); place.className = "sft-panel"; place.dataset.run = "abc"; // the place comes after the model, as in a notebook
            const twin = document.createElement("div"); twin.className = "sft-static"; twin.dataset.run = "abc"; twin.textContent = "static";
            document.body.append(place, twin); await frame();
            const p = place.querySelector(".sft-p"); out.hidden = getComputedStyle(twin).display; out.text = p.querySelector(".v-text").textContent;
            p.querySelector("[title='Further rows']").click(); p.querySelector("[title='Further rows']").click(); out.asked = sent.slice(); say(pageOf(1, "")); await frame(); out.start = [p.dataset.start === '2' ? 'too early' : null, p.querySelectorAll(".v-one").length];
            say(pageOf(2, "")); await frame(); out.then = p.dataset.start;
            p.querySelector("[data-template=llama]").click(); say(pageOf(2, "llama")); await frame(); out.errors = [...p.querySelectorAll(".v-cell .p-notice")].map((e) => e.textContent);
            p.querySelector("[data-tab=sent]").click(); await frame(); out.sent = p.querySelector(".v-sent").textContent; out.later = p.querySelector(".v-later").textContent;
            const filter = p.querySelector("select"); filter.value = "cut"; filter.onchange(); out.filter = sent[sent.length - 2];
            p.querySelector(".v-jump").value = 9; p.querySelector(".v-jump").onchange(); out.jump = sent[sent.length - 1];
            out.tags = p.querySelectorAll("script,i,u,b b").length;
            document.body.append(place.cloneNode()); await frame(); out.views = document.querySelectorAll(".sft-p").length; // the notebook is shown a second time
            close(); out.after = [getComputedStyle(twin).display, document.querySelectorAll(".sft-p").length]; return out; }}""", [source("preview")])
    finally: page.close()
    assert out["hidden"] == "none" and out["text"] == "<i>a</i>b… 5 more tokens …c" and out["after"] == ["block", 0] and out["views"] == 2
    assert out["asked"] == [{"type": "rows", "split": "training", "which": "all", "start": i, "template": ""} for i in (1, 2)] and out["start"] == [None, 1] and out["then"] == "2"
    assert out["errors"] == ["<script>no</script>"] and out["sent"] == "<i>a</i>b" and out["later"].endswith("c") and out["tags"] == 0
    assert out["filter"]["which"] == "cut" and out["jump"]["row"] == 9 and out["jump"]["which"] == "cut"

def test_a_place_that_left_the_page_is_drawn_no_more_and_comes_back_as_it_was(server):
    "A notebook that re-renders a cell makes a new place; one that windows long pages puts the same one back."
    page = server.browser.new_page()
    try:
        page.set_content("<body></body>")
        out = page.evaluate(f"""async ([source]) => {{
            const curve = (n) => ({{loss: [...Array(n)].map((_, i) => [i, i, i, 2 - i / 10]), evals: []}}), facts = {{results: [["run"], ["a"], ["b"]], live: [true, false]}};
            const state = {{run_id: "abc", about: {{runs: ["a", "b"].map((name) => ({{name, ink: "#123456", dash: ""}})), differences: []}}, history: {{seq: 0, curves: {{0: curve(3), 1: curve(5)}}, ...facts}}}};
            const made = await ({FAKE})(source, state), {{say, frame}} = made, out = {{}}; Object.assign(window, {{made, facts, curve}});
            window.add = () => {{ const e = document.createElement("div"); e.className = "sft-panel"; e.dataset.run = "abc"; document.body.append(e); return e; }};
            const place = add(); await frame(); const p = place.querySelector(".sft-p");
            p.querySelector(".m-legend button[data-run='1']").click(); out.first = [p.dataset.points, p.dataset.shown];
            place.remove(); await frame(); say({{seq: 1, curves: {{0: curve(4)}}, ...facts}}); await frame(); out.away = p.dataset.points;
            document.body.append(place); await frame(); out.back = [place.querySelectorAll(".sft-p").length, place.querySelector(".sft-p") === p, p.dataset.points, p.dataset.shown];
            say({{seq: 2, curves: {{0: curve(6)}}, ...facts}}); await frame(); out.drawn = p.dataset.points;
            place.remove(); window.gone = new WeakRef(p); await frame(); return out; }}""", [source("compare")])
        assert out == {"first": ["3", "1"], "away": "3", "back": [1, True, "4", "1"], "drawn": "6"}
        page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
        assert page.evaluate("() => gone.deref() === undefined"), "a place that nobody can bring back is still held"
        out = page.evaluate("""async () => {
            const place = add(); await made.frame(); const drawn = place.querySelectorAll('.sft-p').length;
            place.remove(); await made.frame(); made.close(); document.body.append(place); await made.frame(); // closed while it was away: it must not come back dead, with the static form hidden
            return [drawn, place.childNodes.length]; }""")
        assert out == [1, 0]
    finally: page.close()

def test_a_live_view_that_left_the_page_is_let_go(server):
    page = server.browser.new_page()
    try:
        page.set_content("<body></body>")
        out = page.evaluate(f"""async ([source]) => {{
            const facts = (step) => ({{state: "training", step, total_steps: 9, badge: "▶ training", headline: [], gauge: null}}), history = {{seq: 0, points: [[1, 2, null, null, null]], evals: [], marks: [], samples: [], notes: [], facts: facts(1)}};
            const made = await ({FAKE})(source, {{run_id: "abc", title: "t", hint: "", commands: [], history}}), {{say, frame}} = made, out = {{}};
            const add = () => {{ const e = document.createElement("div"); e.className = "sft-panel"; e.dataset.run = "abc"; document.body.append(e); return e; }};
            let place = add(); await frame(); const live = place.querySelector(".sft-live"); while (!live.dataset.step) await frame(); out.first = live.dataset.step;
            place.remove(); await frame(); say({{seq: 1, points: [], evals: [], facts: facts(2)}}); document.body.className = "dark"; await frame(); out.away = live.dataset.step;
            document.body.append(place); await frame(); out.back = [live.dataset.step, place.querySelector(".sft-live") === live];
            document.body.className = ""; const before = +live.dataset.draws; await frame(); out.themed = +live.dataset.draws > before;
            window.gone = new WeakRef(live); place.remove(); place = null; await frame(); return out; }}""", [source("live")])
        assert out == {"first": "1", "away": "1", "back": ["2", True], "themed": True}
        page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
        assert page.evaluate("() => gone.deref() === undefined")
    finally: page.close()

def test_rows_that_could_not_be_had_are_said_in_their_place(server):
    page = server.browser.new_page()
    try:
        page.set_content("<body><div class=sft-panel data-run=abc></div></body>")
        out = page.evaluate(f"""async ([source]) => {{
            const pageOf = (start, rows) => ({{split: "training", which: "all", start, template: "", total: 4, rows, styles: [["color:red", "user", "trained"]]}}), good = (n) => [{{number: n, where: "", note: "", prompt: {{length: 1, note: "", tokens: null}}, tokens: [["a", 1, 0]]}}];
            const state = {{run_id: "abc", about: {{title: "t", own: "own", templates: [], n: 1, splits: [{{name: "training", rows: 4, filters: [], headline: "h"}}]}}, first: [pageOf(0, good(1))]}};
            const {{sent, say, frame}} = await ({FAKE})(source, state), p = document.querySelector(".sft-p"), out = {{}};
            p.querySelector("[title='Further rows']").click();
            say(pageOf(1, [{{number: 2, where: "", error: "OSError: <i>gone</i>"}}])); await frame(); out.said = p.querySelector(".v-cell .p-notice").textContent;
            await new Promise((f) => setTimeout(f, 3200)); out.busy = [...p.querySelectorAll(".p-notice")].filter((e) => !e.hidden).map((e) => e.textContent); out.asked = sent.length;
            p.querySelector("[title='Rows before']").click(); await frame(); out.text = p.querySelector(".v-text").textContent; return out; }}""", [source("preview")])
    finally: page.close()
    assert out == {"said": "OSError: <i>gone</i>", "busy": ["OSError: <i>gone</i>"], "asked": 1, "text": "a"}
