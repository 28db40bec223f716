"""The live view in a real JupyterLab: it draws, it listens while a cell runs, and what is saved can be read by anybody. Events come from a formula; nothing is trained."""
import json, time
import pytest
import browser
from browser import curve, drawn, lab, notebook, untrusted_copy, write_notebook
from running import until

browser.needed()
pytestmark = pytest.mark.xdist_group("browser")        # one server for all of them

TESTS = str(browser.ROOT/"tests")
START = f"""
import json, sys, threading, time
sys.path.insert(0, {TESTS!r})
from pathlib import Path
from made_up_run import made_up_run
from sftkit.widgets import live, watch
asked = []
def play(run, steps, pause):
    run.mkdir(exist_ok=True)
    with open(run/"events.jsonl", "w") as f:
        for e in made_up_run(steps):
            e["t"] = time.time()
            f.write(json.dumps(e) + "\\n"); f.flush()
            if e["kind"] == "step": time.sleep(pause)
            if "stop" in asked:
                f.write(json.dumps({{"t": time.time(), "kind": "state", "state": "stopped", "step": e.get("step", 0)}}) + "\\n")
                return
"""
def blocking(run, steps, pause): return START + f"with live({run!r}, on_request=asked.append): play(Path({run!r}), {steps}, {pause})"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with lab(tmp_path_factory.mktemp("lab")) as server: yield server

@pytest.fixture(autouse=True)
def no_kernels_left(server):
    yield
    server.end_sessions()

@pytest.fixture(scope="module")
def finished(server):
    "A notebook whose run has ended, saved."
    write_notebook(server.root/"finished.ipynb", [blocking("finished", 60, 0.01)])
    with notebook(server, "finished.ipynb") as nb:
        nb.run_all()
        said(nb, "✓ finished")
        nb.save()
    return server.root/"finished.ipynb"

def said(nb, badge, seconds=15): nb.page.wait_for_function("t => document.querySelector('.sft-badge')?.textContent === t", arg=badge, timeout=seconds * 1000)

def steps_shown(nb): return int(nb.page.locator(".sft-live").get_attribute("data-step") or 0)


def test_the_view_moves_and_stop_arrives_while_the_cell_runs(server):
    write_notebook(server.root/"stop.ipynb", [blocking("stop", 600, 0.02), "print(asked)"])
    with notebook(server, "stop.ipynb") as nb:
        nb.run_all(wait=False)
        nb.page.wait_for_function("() => +document.querySelector('.sft-live')?.dataset.step > 40", timeout=15_000)
        first, before = steps_shown(nb), curve(nb)
        nb.page.wait_for_timeout(700)
        after = curve(nb); heights = [h for h in after if h is not None]
        assert steps_shown(nb) > first and min(drawn(before), drawn(after)) > 0.9 and before != after
        assert sum(heights[:9]) > 1.5 * sum(heights[-9:]) # it falls, as the made-up loss does
        assert not nb.page.locator(".sft-static").is_visible() # the static form waits behind the view
        nb.page.locator(".sft-chart canvas").hover(position={"x": 150, "y": 100})
        nb.page.wait_for_function("() => /step \\d+ · loss [\\d.]+ · smoothed/.test(document.querySelector('.sft-read').textContent)")
        clicked = time.monotonic()
        nb.page.locator("button[data-command=stop]").click()
        said(nb, "■ stopped", 5)
        assert time.monotonic() - clicked < 3, "the click was held back until the cell ended (ipykernel 7.4 routes it to the busy shell)"
        nb.wait_idle()
        assert "['stop']" in nb.text(1) and "stopped" in nb.text(0) and nb.page.locator(".sft-live").count() == 1 and nb.page.locator(".sft-buttons button").count() == 0 and nb.errors == []
        saved = nb.save()
    place, static = ("".join(o["data"]["text/html"]) for o in saved["cells"][0]["outputs"])
    assert "widget-view" not in json.dumps(saved) and "sft-panel" in place and "sft-static" in static and "■ stopped" in static and len(json.dumps(saved)) < 60_000

@pytest.mark.parametrize("trusted", [True, False])
def test_a_saved_notebook_shows_the_run_without_its_kernel(server, finished, trusted):
    name = "finished.ipynb" if trusted else untrusted_copy(finished, server.root/"downloaded.ipynb").name
    server.end_sessions()
    with notebook(server, name) as nb:
        assert nb.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets[0].model.trusted") is trusted
        picture = nb.page.locator("img[src^='data:image/svg+xml']").first
        picture.wait_for()
        assert picture.evaluate("e => e.complete && e.naturalWidth > 300 && e.getBoundingClientRect().width > 300")
        text = nb.text(0)
        assert "✓ finished" in text and "trained tokens" in text and "Error displaying widget" not in text
        assert nb.page.locator("td", has_text="trained tokens").evaluate("e => getComputedStyle(e).textAlign") == "left" # inline styles survive

def test_a_watched_run_comes_back_after_a_page_reload(server):
    write_notebook(server.root/"watch.ipynb", [START + "w = watch('watched', on_request=asked.append); threading.Thread(target=play, args=(Path('watched'), 500, 0.02)).start()"])
    with notebook(server, "watch.ipynb") as nb:
        nb.run_all()
        nb.page.wait_for_function("() => +document.querySelector('.sft-live')?.dataset.step > 30", timeout=15_000)
        nb.save(); nb.reload()
        nb.page.wait_for_function("() => +document.querySelector('.sft-live')?.dataset.step > 60", timeout=15_000)
        points = int(nb.page.locator(".sft-live").get_attribute("data-points"))
        assert points >= steps_shown(nb) - 40 and points > 60 # the history too, not only what came since
        nb.page.locator("button[data-command=stop]").click()
        nb.page.wait_for_function("() => document.querySelector('.sft-badge')?.textContent === '■ stopped'", timeout=5_000)
        assert nb.page.locator(".sft-buttons button").count() == 0
        assert nb.errors == []

def test_a_page_that_was_closed_gets_the_end_when_it_is_opened_again(server):
    "The tab is closed in mid-run, the run ends at night; in the morning the view is there with all of it, though the file has what was saved before. Without the kernel, that is what is seen."
    write_notebook(server.root/"night.ipynb", [START + "w = watch('night', on_request=asked.append); threading.Thread(target=play, args=(Path('night'), 400, 0.02)).start()"])
    with notebook(server, "night.ipynb") as nb:
        nb.run_all()
        nb.page.wait_for_function("() => +document.querySelector('.sft-live')?.dataset.step > 180", timeout=15_000)
        nb.save()
    until(lambda: '"finished"' in (server.root/"night"/"events.jsonl").read_text(), 20); time.sleep(2)
    with notebook(server, "night.ipynb") as nb:
        said(nb, "✓ finished")
        assert steps_shown(nb) == int(nb.page.locator(".sft-live").get_attribute("data-points")) == 400 and drawn(curve(nb)) > 0.9
        assert not nb.page.locator(".sft-static").is_visible() and "▶ training" not in nb.text(0) and nb.errors == []
    server.end_sessions()
    with notebook(server, "night.ipynb") as nb:
        nb.output(0).locator("img[src^='data:image/svg+xml']").first.wait_for()
        text = nb.text(0)
        assert "▶ training" in text and "As it was at 2" in text and 'Run.open("night").watch() shows how it went on' in text and "Error displaying widget" not in nb.page.content()

def test_live_js_by_itself(server):
    "Duplicates, a resume and hostile text, in a bare page with a model made here."
    page = server.browser.new_page()
    try:
        page.set_content("<body><div id=el style='width:700px'></div></body>")
        result = page.evaluate("""async ([source]) => {
            const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"}))), heard = {}, sent = [];
            const facts = (step, extra) => ({state: "training", step, total_steps: 100, badge: "▶ training", headline: [["step", "<b>x</b>"]], memory_words: "", gauge: null, ...extra});
            const state = {title: "<img src=x onerror='window.hit=1'>", run_id: "abc", commands: ["pause", "stop", "checkpoint"], hint: "",
                           history: {seq: 3, points: [[1, 3, null, null, null], [2, 2.5, null, null, null], [3, 2, null, null, null]], evals: [], marks: [], samples: [], facts: facts(3)}};
            const model = {get: (k) => state[k], on: (name, f) => heard[name] = f, send: (m) => sent.push(m)};
            const widget = module.default(), el = document.getElementById("el"), frame = () => new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)));
            widget.initialize({model}); const close = widget.render({model, el}); await frame();
            const say = heard["msg:custom"], root = el.querySelector(".sft-live"), seen = () => +root.dataset.points, out = {};
            out.loaded = seen();
            say({seq: 3, points: [[3, 9, null, null, null]], evals: [], facts: facts(3)}); await frame(); out.duplicate = seen();
            for (let i = 4; i < 104; i++) say({seq: i, points: [[i, 1 + 1 / i, 1e-5, 1, 10]], evals: [], facts: facts(i)});
            const before = +root.dataset.draws; await frame(); out.burst = [seen(), +root.dataset.draws - before];
            say({seq: 104, points: [[50, null, null, null, null]], evals: [[50, 1.5]], marks: [{step: 50, kind: "<b>", label: "<b>"}], facts: facts(50), samples: [{prompt: "<script>window.hit=1</script>", base: "a", tuned: "b"}]});
            await frame(); out.resumed = seen();
            const button = (name) => { const b = el.querySelector(`[data-command=${name}]`); return b && [b.textContent, b.disabled]; }, pressed = (name) => el.querySelector(`[data-command=${name}]`).click(), tell = (extra) => say({seq: seq += 0.001, points: [], evals: [], facts: facts(50, extra)});
            let seq = 104;
            pressed("stop"); await frame(); out.button = [button("stop")];
            say({name: "stop", refused: "Nothing is training."}); await frame(); out.refused = el.querySelector(".sft-notice").textContent; out.button.push(button("stop"));
            pressed("pause"); say({taken: "pause", pending: ["pause"]}); await frame(); out.button.push(button("pause"));
            tell({pending: ["pause"]}); await new Promise((f) => setTimeout(f, 2700)); out.button.push(button("pause")); // however long the step takes
            tell({state: "paused", enabled: ["resume", "stop"], pending: []}); await frame(); out.button.push(button("pause"), button("resume"));
            pressed("resume"); say({taken: "resume", pending: ["resume"]}); tell({pending: []}); await frame(); out.button.push(button("resume"), button("pause")); // at once, however soon
            pressed("checkpoint"); tell({state: "finished"}); tell({}); await frame(); out.button.push(button("checkpoint")); // the run ended before anybody took notice
            out.sent = sent;
            tell({enabled: ["stop"], scores: "<b>bleu</b> 3"}); await frame();
            out.checkpoint = el.querySelector("[data-command=checkpoint]").disabled; out.stop = el.querySelector("[data-command=stop]").disabled; out.scores = el.querySelector(".sft-scores").textContent;
            const labels = [], fill = CanvasRenderingContext2D.prototype.fillText; CanvasRenderingContext2D.prototype.fillText = function (s, x, y) { labels.push([s, y]); fill.apply(this, arguments); };
            say({seq: seq += 0.001, points: [], evals: [], facts: facts(50), marks: [{step: 30, kind: "resumed", label: ""}, {step: 30, kind: "paused", label: ""}], notes: [["warning", "<b>careful</b>"], ["note", "step 5: n"]]}); await frame();
            out.labels = labels.filter(([s]) => s === "paused" || s === "resumed"); out.notes = [...el.querySelectorAll(".sft-notes div")].map((e) => [e.className, e.textContent]);
            const gauge = {used: 0.25, reserved: 0.5, peak: 0.75, parts: [["weights 1 B", 0.25, "#3b7dd8"], ["<b>rest</b> 2 B", 0.5, "#d9780a"]], strip: [["in use now", "#7d838c"]], full: false, forecast: ["forecast 2 B", 0.5], words: "<b>gpu</b>"};
            tell({gauge}); await frame(); const box = el.querySelector(".sft-gauge").getBoundingClientRect(), at = (s) => { const r = el.querySelector(s).getBoundingClientRect(); return [(r.left - box.left) / box.width, (r.right - box.left) / box.width]; };
            out.legend = [...el.querySelectorAll(".sft-legend span")].map((e) => [e.textContent, e.firstElementChild ? getComputedStyle(e.firstElementChild).backgroundColor : ""]); out.gauge = [at(".sft-gauge i:nth-child(1)")[1], at(".sft-gauge i:nth-child(2)")[1], at(".sft-parts span:last-child")[1], at(".sft-peak")[1], at(".sft-forecast")];
            out.tick = getComputedStyle(el.querySelector(".sft-forecast")).backgroundColor; out.edge = [root.firstElementChild.getBoundingClientRect().left - root.getBoundingClientRect().left, getComputedStyle(el.querySelector(".sft-hint")).display];
            out.panels = [...el.querySelectorAll(".sft-panels span")].map((e) => e.textContent);
            say({seq: 105, whole: {seq: 105, points: [[1, 2, null, null, null]], evals: [], marks: [], samples: [{prompt: "<script>window.hit=1</script>"}], notes: [], facts: facts(1)}}); await frame(); out.whole = seen();
            say({seq: 106, points: [], evals: [], facts: facts(50, {state: "failed", error: "<i>boom</i>"})}); await frame(); out.buttons = el.querySelectorAll("button").length;
            out.tags = [...el.querySelectorAll("script,img,b b,i i")].length; out.hit = window.hit; out.text = root.textContent;
            close(); return out; }""", ["".join((browser.ROOT/"sftkit"/f"{n}.js").read_text() for n in ("base", "panel", "live"))])
    finally: page.close()
    assert (result["loaded"], result["duplicate"], result["resumed"]) == (3, 3, 50) and result["burst"][0] == 103 and result["burst"][1] <= 2
    assert result["sent"] == [{"type": "here", "seq": 3}, *({"type": "request", "name": n} for n in ("stop", "pause", "resume", "checkpoint"))] and result["refused"] == "Nothing is training."
    assert result["button"] == [["stopping …", True], ["■ Stop and save", False], ["asked …", True], ["asked …", True], None, ["▶ Resume", False], None, ["‖ Pause", False], ["◆ Checkpoint", False]]
    assert result["checkpoint"] is True and result["stop"] is False and result["scores"] == "<b>bleu</b> 3" and [p.rsplit(" ", 1)[0] for p in result["panels"]] == ["learning rate", "gradient norm", "tokens/s"]
    (_, first), (_, second) = sorted(result["labels"], key=lambda l: l[1]); assert {l[0] for l in result["labels"]} == {"paused", "resumed"} and second - first >= 12 # both are there, below each other
    assert result["notes"] == [["sft-trouble", "warning <b>careful</b>"], ["", "note step 5: n"]] and result["whole"] == 1
    assert result["legend"] == [["weights 1 B", "rgb(59, 125, 216)"], ["<b>rest</b> 2 B", "rgb(217, 120, 10)"], ["in use now", "rgb(125, 131, 140)"], ["▼ forecast 2 B", ""]] and result["tick"] not in [ink for _, ink in result["legend"]]
    assert result["gauge"][:4] == pytest.approx([0.5, 0.25, 0.75, 0.75], abs=0.01) and sum(result["gauge"][4]) / 2 == pytest.approx(0.5, abs=0.01) and result["edge"] == [pytest.approx(3), "none"]
    assert result["buttons"] == 0 and result["tags"] == 0 and result.get("hit") is None and "<script>" in result["text"]

@pytest.mark.parametrize("width", [700, 760, 900])
def test_the_figures_stand_in_one_line(server, width):
    "All seven tiles of a long run, live and at rest."
    from made_up_run import made_up_run
    from sftkit.charts import Progress
    from sftkit.view import run_html
    from sftkit.widgets import LiveView
    events = made_up_run(12_345, total=100_000, state="")
    p = Progress([*events[:4], {"kind": "eval", "step": 0, "loss": 3.352, "perplexity": 28.56}, *events[4:], {"kind": "eval", "step": 12_345, "loss": 1.2, "perplexity": 3.442}])
    view = LiveView("run", progress=p)
    history = view.get_state("history")["history"]; view.close()
    page = server.browser.new_page(viewport={"width": width, "height": 1200})
    try:
        page.set_content(f"<body style='margin:0'><div id=live></div><div id=static>{run_html(p)}</div></body>")
        lines = page.evaluate("""async ([source, history]) => {
            const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})));
            const state = {title: "run", run_id: "abc", commands: [], history}, model = {get: (k) => state[k], on() {}, send() {}}, widget = module.default();
            widget.initialize({model}); widget.render({model, el: document.getElementById("live")});
            await new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)));
            const tops = (selector) => [...document.querySelectorAll(selector)].map((e) => e.getBoundingClientRect().top);
            return [tops(".sft-tiles b"), tops("#static b[style*=nowrap]")]; }""", [LiveView._esm, history])
    finally: page.close()
    assert [len(tops) for tops in lines] == [7, 7] and [len(set(tops)) for tops in lines] == [1, 1]
