"""The live view: which renderer, what is sent, how it ends, and that it never harms a run. No browser here; see test_browser.py."""
import io, json, logging, re, sys, threading, time
from pathlib import Path
import pytest
from made_up_run import made_up_run
from running import environment, until as wait_for
from sftkit import view, widgets
from sftkit.recipe import RunError
from sftkit.charts import Progress
from sftkit.widgets import HtmlRenderer, LiveView, Publisher, TerminalRenderer, WidgetRenderer, choose_renderer, clicks_arrive, live, make_renderer, watch


def write(folder, events, pause=0.0):
    folder.mkdir(exist_ok=True)
    with open(folder/"events.jsonl", "a", encoding="utf-8") as f:
        for e in events: f.write(json.dumps(e) + "\n"); f.flush(); time.sleep(pause)

def view_threads(): return [t.name for t in threading.enumerate() if t.name == "sftkit-view-run"]      # the runs of this file are called so; those of others may still be watched

class Recorder:
    "A renderer that remembers what it was told."
    interval = 0.02
    def __init__(self): self.events, self.calls, self.last = [], [], None
    def start(self, progress): self.calls.append("start"); self.events += progress.steps
    def push(self, events, progress): self.calls.append("push"); self.events += events
    def finish(self, progress): self.calls.append("finish"); self.last = progress.facts()


# --- which renderer

class Kernel: _supports_kernel_subshells = True
class Shell: kernel = Kernel()

@pytest.fixture
def nowhere(monkeypatch):
    for name in ("SFTKIT_RENDERER", "KAGGLE_KERNEL_RUN_TYPE", "DATABRICKS_RUNTIME_VERSION", "VSCODE_PID", "JPY_SESSION_NAME"): monkeypatch.delenv(name, raising=False)
    return monkeypatch

@pytest.mark.parametrize("env, chosen", [({"JPY_SESSION_NAME": "x.ipynb"}, "widget"), ({"VSCODE_PID": "7"}, "widget"), ({}, "html"), ({"JPY_SESSION_NAME": "x", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "html"),
    ({"JPY_SESSION_NAME": "x", "DATABRICKS_RUNTIME_VERSION": "16"}, "html"), ({"SFTKIT_RENDERER": "plain"}, "plain"), ({"SFTKIT_RENDERER": "html", "JPY_SESSION_NAME": "x"}, "html")])
def test_choice_in_a_kernel(nowhere, env, chosen):
    nowhere.setattr(widgets, "_shell", Shell)
    for k, v in env.items(): nowhere.setenv(k, v)
    assert choose_renderer() == chosen

def test_colab_gets_html(nowhere):
    nowhere.setattr(widgets, "_shell", Shell); nowhere.setenv("JPY_SESSION_NAME", "x"); nowhere.setitem(sys.modules, "google.colab", object())
    assert choose_renderer() == "html" and choose_renderer("widget") == "widget"

def test_choice_in_a_script(nowhere):
    nowhere.setattr(widgets, "_shell", lambda: None)
    nowhere.setattr(sys, "stdout", io.StringIO())
    assert choose_renderer() == "plain" and choose_renderer("widget") == "plain" and choose_renderer("terminal") == "terminal"
    class Tty(io.StringIO):
        def isatty(self): return True
    nowhere.setattr(sys, "stdout", Tty())
    nowhere.delenv("JPY_PARENT_PID", raising=False)
    assert choose_renderer() == "terminal"
    nowhere.setenv("JPY_PARENT_PID", "1")                                           # started from a notebook's cell with `!`
    assert choose_renderer() == "plain"

def test_unknown_renderer_names_the_nearest():
    with pytest.raises(RunError, match="`wigdet` is not a renderer.*Did you mean `widget`"): choose_renderer("wigdet")

def test_buttons_only_where_clicks_arrive(nowhere):
    ask = lambda name: None
    nowhere.setattr(widgets, "_shell", lambda: None); assert not clicks_arrive()
    nowhere.setattr(widgets, "_shell", Shell); nowhere.setenv("JPY_SESSION_NAME", "x")
    assert clicks_arrive() and make_renderer(on_request=ask).on_request is ask
    nowhere.setenv("VSCODE_PID", "7"); assert not clicks_arrive() and clicks_arrive(blocking=False) and make_renderer(on_request=ask).on_request is None
    nowhere.delenv("VSCODE_PID"); nowhere.setattr(Kernel, "_supports_kernel_subshells", False); assert not clicks_arrive() # ipykernel 6

def test_where_no_button_works_a_line_says_how_to_stop(nowhere):
    ask = lambda name: None
    nowhere.setattr(widgets, "_shell", Shell); nowhere.setenv("JPY_SESSION_NAME", "x")
    assert make_renderer(None, "run", ask).more["hint"] == "" and make_renderer(None, "run").more["hint"] == ""                     # buttons; nothing that listens
    nowhere.setattr(Kernel, "_supports_kernel_subshells", False); fit, start = make_renderer(None, "run", ask, project="my runs/run"), make_renderer(None, "run", ask, blocking=False)
    words = "Interrupt the cell (■) to stop: the step is finished, a checkpoint written. Elsewhere: sftkit stop 'my runs/run', or Run.open(\"my runs/run\").stop()."
    assert fit.more["hint"] == words and fit.on_request is None and start.more["hint"] == "" and start.on_request is ask
    nowhere.setattr(Kernel, "_supports_kernel_subshells", True); nowhere.setenv("VSCODE_PID", "7"); assert make_renderer(None, "run", ask).more["hint"].startswith("Interrupt the cell")
    html = make_renderer("html", "run", ask, project="my runs/run"); assert html.hint == words
    assert make_renderer("html", "run", ask, blocking=False).hint == "To stop: sftkit stop run, or Run.open(\"run\").stop(); the step is finished, a checkpoint written." and make_renderer("html", "run").hint == ""
    going, ended = (widgets._bundle(Progress(made_up_run(5, state=s)), "run", hint=words)["text/html"] for s in ("", "finished"))
    assert "Interrupt the cell (■)" in going and "Interrupt the cell" not in ended


# --- the widget

@pytest.fixture
def sent(monkeypatch):
    messages = []
    monkeypatch.setattr(LiveView, "send", lambda self, content, buffers=None: messages.append(json.loads(json.dumps(content, allow_nan=False))))
    return messages

def test_messages_only_append(sent):
    p = Progress(); v = LiveView("run", progress=p)
    for chunk in ([{"kind": "step", "step": 1, "loss": 3.0, "lr": 1e-4, "grad_norm": 1.0, "tokens": 5, "seq_tokens": 10, "seconds": 0.5}], [{"kind": "step", "step": 2, "loss": float("nan")}], [{"kind": "eval", "step": 2, "loss": 2.5, "perplexity": 12.0}]):
        p.add(chunk); v.push(chunk)
    assert [m["seq"] for m in sent] == [1, 2, 3]
    assert sent[0]["points"] == [[1, 3.0, 1e-4, 1.0, 20.0]] and sent[1]["points"] == [[2, None, None, None, None]] and sent[2]["points"] == [] and sent[2]["evals"] == [[2, 2.5]]
    assert "marks" not in sent[2] and "samples" not in sent[2] # unchanged
    v.close()

def test_a_page_that_opens_later_gets_everything(sent):
    p = Progress(made_up_run(10_000)); v = LiveView("run", progress=p)
    v.push([]); h = v.get_state()["history"]
    assert h["seq"] == 1 and len(h["points"]) <= 2000 and h["points"][-1][0] == 10_000 and h["facts"]["step"] == 10_000 and len(h["evals"]) == len(p.evals)
    assert v.get_state("title") == {"title": "run"} and v.history == {} # not kept, not sent along with other traits
    assert len(json.dumps(h, allow_nan=False)) < 150_000
    v.close()

def test_hostile_text_is_made_visible_on_the_way(sent):
    v = LiveView("a\u202eb", progress=Progress([{"kind": "sample", "when": "before", "prompt": "p\u202e\x00", "text": "x" * 10_000}, {"kind": "plan", "model": "m\u2066"}]))
    v.push([]); text = json.dumps(sent, ensure_ascii=False)
    assert v.title == "a⟨U+202E⟩b" and "\u202e" not in text and "\u2066" not in text and len(text) < 5000
    v.close()

def test_a_click_only_asks(sent):
    asked = []; v = LiveView("run", on_request=asked.append)
    for content in ({"type": "request", "name": "stop"}, {"type": "request", "name": "rm -rf"}, {"type": "other"}, "junk", {"type": "request"}): v._asked(v, content, [])
    assert asked == ["stop"] and sent == [{"taken": "stop", "pending": ["stop"]}] and v.commands == ["pause", "stop", "checkpoint", "evaluate"]
    v.close()

def test_a_refused_request_is_said(sent):
    def refuse(name): raise RunError("Nothing is training here.")
    v = LiveView("run", on_request=refuse); v._asked(v, {"type": "request", "name": "stop"}, [])
    assert sent == [{"name": "stop", "refused": "Nothing is training here."}] and v._facts()["pending"] == []; v.close()

def test_no_callback_no_buttons(): v = LiveView("run"); assert v.commands == []; v.close()

def test_closing_leaves_no_models():
    import ipywidgets
    before = set(ipywidgets.Widget._instances if hasattr(ipywidgets.Widget, "_instances") else ipywidgets.widgets.widget._instances)
    LiveView("run", progress=Progress(made_up_run(5))).close()
    assert set(ipywidgets.widgets.widget._instances) == before

def test_a_page_gets_what_was_sent_while_its_script_was_loading(sent):
    v = LiveView("run", progress=Progress(made_up_run(5))); assert not v.seen
    v.push([]); v.push([]); sent.clear()
    v._asked(v, {"type": "here", "seq": 2}, []); assert v.seen and sent == []
    for seq in (1, None, "x"): v._asked(v, {"type": "here", "seq": seq}, [])
    assert len(sent) == 3 and all(m["whole"]["seq"] == 2 and len(m["whole"]["points"]) == 5 for m in sent); v.close()

CLICKED = 1_760_000_000.0
def event(kind, later=0.0, **fields): return {"t": CLICKED + later, "kind": kind, **fields}

@pytest.mark.parametrize("asked, events, pending", [
    ("pause", [event("step", 1, step=2)], True), ("pause", [event("step", 1, step=2), event("state", 1, state="paused", step=2)], False), ("pause", [event("state", 1, state="paused", step=1)], False),
    ("pause", [event("state", 1, state="paused", step=2), event("state", 1, state="training", step=2)], False),                     # gone on with elsewhere, before anybody looked
    ("pause", [event("step", 1, step=2), event("step", 2, step=3)], False),                                                     # withdrawn elsewhere
    ("resume", [event("state", 1, state="training", step=2)], False), ("resume", [event("note", text="x")], True),
    ("checkpoint", [event("checkpoint", 1, step=1)], True),                                                                  # one that was being written when it was asked for
    ("checkpoint", [event("step", -1, step=1), event("checkpoint", 1, step=1)], True), ("checkpoint", [event("step", 1, step=2), event("eval", 9, step=2, loss=1.0)], True),
    ("checkpoint", [event("step", 1, step=2), event("checkpoint", 9, step=2)], False), ("evaluate", [event("step", 1, step=2), event("eval", 99, step=2, loss=1.0)], False),
    ("stop", [event("step", 1, step=2), event("step", 2, step=3), event("checkpoint", 3, step=3)], True), ("stop", [event("state", 1, state="stopped", step=2)], False), ("evaluate", [event("state", 1, state="failed")], False)])
def test_a_button_waits_for_what_the_run_does(sent, asked, events, pending):
    p = Progress([event("state", -2, state="training", step=0), event("step", -1, step=1, loss=1.0)]); v = LiveView("run", on_request=lambda name: None, progress=p)
    v._asked(v, {"type": "request", "name": asked}, [])
    assert sent == [{"taken": asked, "pending": [asked]}] and v.get_state("history")["history"]["facts"]["pending"] == [asked]       # also for a page that is opened now
    v._pending[asked][0] = CLICKED
    for e in events: p.add([e]); v.push([e])
    assert sent[-1]["facts"]["pending"] == [asked] * pending; v.close()

def push_seconds(steps, marks=0):
    "CPU time of the cheapest of some pushes of one new step each, in a run with so much behind it."
    p = Progress([*made_up_run(steps, total=10**6, state=""), *({"kind": "checkpoint", "step": steps} for _ in range(marks))])
    v, least = LiveView("run", progress=p), 1.0
    v.push([])
    for i in range(30):
        e = [{"kind": "step", "step": steps + 1 + i, "loss": 1.0, "seconds": 0.1}]
        begin = time.thread_time(); p.add(e); v.push(e); least = min(least, time.thread_time() - begin)
    v.close()
    return least

def test_pushing_costs_the_same_however_long_the_run(sent):
    short = push_seconds(500)
    assert short < 0.002 and push_seconds(60_000) < 3 * short and push_seconds(500, marks=2000) < 3 * short, short

def test_marks_and_samples_are_sent_when_they_change(sent):
    p = Progress(); v = LiveView("run", progress=p)
    for e in ({"kind": "step", "step": 1, "loss": 1.0}, {"kind": "checkpoint", "step": 1}, {"kind": "step", "step": 2, "loss": None}, {"kind": "sample", "when": "before", "prompt": "p", "text": "t"},
              {"kind": "state", "state": "training", "step": 1}, {"kind": "step", "step": 2, "loss": 1.0}): p.add([e]); v.push([e])
    assert [("marks" in m, "samples" in m) for m in sent] == [(False, False), (True, False), (True, False), (False, True), (True, False), (False, False)]
    assert [m["kind"] for m in sent[2]["marks"]] == ["checkpoint", "not finite"] and [m["kind"] for m in sent[4]["marks"]] == ["checkpoint", "resumed"]; v.close()

def test_live_js_is_shipped(): assert "export default" in LiveView._esm and (Path(widgets.__file__).parent/"live.js").exists()


# --- the publisher

def test_everything_arrives_once_and_in_order(tmp_path):
    r, run = Recorder(), tmp_path/"run"
    with live(run, renderer=r, total_hint=80): write(run, made_up_run(80), pause=0.001)
    steps = [e["step"] for e in r.events if e["kind"] == "step"]
    assert steps == list(range(1, 81)) and r.calls[0] == "start" and r.calls[-1] == "finish" and r.calls.count("finish") == 1 and "push" in r.calls
    assert r.last["state"] == "finished" and view_threads() == []

def test_half_a_line_waits(tmp_path):
    run, r = tmp_path/"run", Recorder(); run.mkdir()
    with live(run, renderer=r), open(run/"events.jsonl", "w") as f:
        f.write('{"kind": "step", "st'); f.flush(); time.sleep(0.1); assert r.events == []
        f.write('ep": 1, "loss": 2.0}\n'); f.flush()
    assert [e["step"] for e in r.events] == [1]

def test_line_separators_inside_text_do_not_split_events(tmp_path):
    run, r = tmp_path/"run", Recorder(); run.mkdir()
    with live(run, renderer=r): (run/"events.jsonl").write_text(json.dumps({"kind": "note", "level": "info", "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert r.last["notes"] == [dict(kind="note", step=None, text="a\u2028b\x85c")]

def test_an_error_passes_through_and_is_shown(tmp_path):
    r = Recorder()
    with pytest.raises(ValueError, match="bad row"):
        with live(tmp_path/"run", renderer=r): write(tmp_path/"run", made_up_run(3, state="")); raise ValueError("bad row")
    assert (r.last["state"], r.last["error"]) == ("failed", "ValueError: bad row") and view_threads() == []

def test_the_error_that_the_run_wrote_is_kept(tmp_path):
    r = Recorder()
    with pytest.raises(RuntimeError):
        with live(tmp_path/"run", renderer=r): write(tmp_path/"run", made_up_run(3, state="failed")); raise RuntimeError("wrapped")
    assert "CUDA out of memory" in r.last["error"]

def test_an_interrupt_is_not_a_failure(tmp_path):
    r = Recorder()
    with pytest.raises(KeyboardInterrupt):
        with live(tmp_path/"run", renderer=r): write(tmp_path/"run", made_up_run(3, state="")); raise KeyboardInterrupt
    assert (r.last["state"], r.last["error"]) == ("interrupted", "") and view_threads() == []

@pytest.mark.parametrize("where", ["start", "push", "finish"])
def test_a_broken_renderer_never_breaks_training(tmp_path, caplog, where):
    r = Recorder()
    def fail(*args): raise OSError("no terminal")
    setattr(r, where, fail)
    with caplog.at_level(logging.WARNING, "sftkit"), live(tmp_path/"run", renderer=r):
        write(tmp_path/"run", made_up_run(20), pause=0.004); trained = True
    assert trained and [m.message for m in caplog.records] == ["The view of `run` stopped: OSError: no terminal. The run is not affected."] and view_threads() == []

def test_watch_follows_to_the_end(tmp_path):
    run, r = tmp_path/"run", Recorder()
    w = watch(run, renderer=r)
    write(run, made_up_run(30), pause=0.002); w.join(5)
    assert not w.is_alive() and r.last["step"] == 30 and r.calls[-1] == "finish"

def test_a_view_that_is_dear_is_drawn_less_often(tmp_path):
    "A renderer that burns 10 ms each time and wants to be called all the time gets less than a hundredth of the time, and a little to begin with."
    run, burned = tmp_path/"run", []
    class Dear(Recorder):
        interval = 0.001
        def push(self, events, progress):
            began = time.thread_time()
            while time.thread_time() - began < 0.01: pass
            burned.append(time.thread_time() - began)
    write(run, made_up_run(3, state=""))
    stop = threading.Event(); w = watch(run, renderer=Dear(), stop=stop); began = time.monotonic()
    while time.monotonic() - began < 4: write(run, [{"kind": "step", "step": 4, "loss": 1.0}]); time.sleep(0.01)
    stop.set(); w.join(5)
    assert len(burned) >= 4 and sum(burned) < 0.04 + 0.01 * 4 + 0.02, burned

def test_watching_a_finished_run_ends_at_once(tmp_path):
    write(tmp_path/"run", made_up_run(5)); r = Recorder()
    watch(tmp_path/"run", renderer=r).join(5)
    assert r.calls == ["start", "finish"] and r.last["state"] == "finished"

def test_stop_watching(tmp_path):
    stop, r = threading.Event(), Recorder(); w = watch(tmp_path/"run", renderer=r, stop=stop); stop.set(); w.join(5)
    assert not w.is_alive() and r.calls[-1] == "finish"

def test_ctrl_c_stops_watching_and_tidies_up(tmp_path, monkeypatch):
    r = Recorder(); w = watch(tmp_path/"run", renderer=r); join = w.join
    def interrupted(timeout=None):
        monkeypatch.setattr(w, "join", join)
        raise KeyboardInterrupt
    monkeypatch.setattr(w, "join", interrupted); w.wait()
    assert not w.is_alive() and r.calls[-1] == "finish"

def test_a_run_whose_process_is_gone_is_called_dead(tmp_path, monkeypatch):
    run, r = tmp_path/"run", Recorder(); write(run, made_up_run(3, state=""))
    w = Publisher(run, r, until_end=True); monkeypatch.setattr(w.directory, "status", lambda: {"kind": "state", "state": "died", "error": "Process 1 is gone."})
    w._quiet_since -= 10; w.start(); w.join(5)
    assert not w.is_alive() and r.last["state"] == "died" and r.last["error"] == "Process 1 is gone."


# --- terminal and log

def test_log_lines(tmp_path):
    out = io.StringIO()
    with live(tmp_path/"run", renderer=TerminalRenderer("run", bar=False, seconds=60, file=out)): write(tmp_path/"run", made_up_run(200), pause=0.004)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 4 and lines[-1].startswith("finished · step 200 · loss") and "\x1b" not in out.getvalue() # not a line per step

@pytest.mark.parametrize("bar", [False, True], ids=["lines", "bar"])
def test_notes_stay_on_the_terminal_each_once(tmp_path, bar):
    class Tty(io.StringIO):
        def isatty(self): return bar
    notes = [{"kind": "note", "level": "warning", "text": "4 of 48 rows are held out. " * 9}, {"kind": "note", "level": "info", "text": "\x1b[31mkept as [bold]again.1[/]"}, {"kind": "oom", "step": 40, "text": "Memory ran out."}]
    out, events = Tty(), made_up_run(80)
    with live(tmp_path/"run", renderer=TerminalRenderer("run", bar=bar, seconds=60, file=out)): write(tmp_path/"run", [*events[:10], *notes, *events[10:]], pause=0.004)
    lines = out.getvalue().replace("\r", "\n").splitlines()
    said = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in lines]
    for text in ("warning: " + notes[0]["text"].strip(), "note: ⟨U+001B⟩[31mkept as [bold]again.1[/]", "note: Memory ran out."): assert said.count(text) == 1, (text, said)

def test_what_a_run_is_about_is_said_while_it_lasts(tmp_path):
    out, events = io.StringIO(), made_up_run(30)
    doing = lambda text: {"kind": "doing", "text": text}
    with live(tmp_path/"run", renderer=TerminalRenderer("run", bar=False, seconds=60, file=out)):
        for part in ([events[0], doing("loading the model")], [doing("answering 3 prompts")], events[1:20], [doing("evaluating on 60 rows")], events[20:]):
            write(tmp_path/"run", part); time.sleep(0.7)
    states = [line.partition(" · ")[0] for line in out.getvalue().splitlines()]
    assert states == ["starting (loading the model)", "starting (answering 3 prompts)", "training", "training (evaluating on 60 rows)", "finished"], states
    p = Progress([events[0], doing("loading the model")])
    assert widgets._live_facts(p)["badge"] == "◌ starting · loading the model" and "◌ starting · loading the model" in view.run_html(p)
    assert "doing" not in view.run_html(p.add([doing("\u202e<script>")])) and "⟨U+202E⟩&lt;script&gt;" in view.run_html(p) and Progress(events).facts()["doing"] == ""

def test_a_terminal_shows_a_run_once_however_often_it_is_asked_to(tmp_path, nowhere, capsys):
    write(tmp_path/"run", made_up_run(20, state=""))
    first, second = (watch(tmp_path/"run", "plain") for _ in range(2))
    write(tmp_path/"run", [{"kind": "note", "level": "info", "text": "only once"}, made_up_run(20)[-1]]); first.join(10)
    assert first is second and capsys.readouterr().out.count("note: only once") == 1
    assert watch(tmp_path/"run", "plain") is not first                            # of a run that ended, its end may be asked for again

def test_terminal_bar_shows_figures_and_leaves_one_line(tmp_path):
    class Tty(io.StringIO):
        def isatty(self): return True
    out = Tty()
    with live(tmp_path/"run", renderer=TerminalRenderer("my [bold]run[/]", file=out)): write(tmp_path/"run", made_up_run(150), pause=0.005)
    text = out.getvalue()
    assert "my [bold]run[/]" in text and "loss" in text and "150" in text and text.splitlines()[-1].endswith("memory peak 4.8 GiB") and "finished · step 150" in text

def test_make_renderer_gives_what_was_chosen(nowhere):
    nowhere.setattr(widgets, "_shell", Shell)
    kinds = {n: type(make_renderer(n)) for n in ("widget", "html", "terminal", "plain")}
    assert kinds == {"widget": WidgetRenderer, "html": HtmlRenderer, "terminal": TerminalRenderer, "plain": TerminalRenderer}


# --- in a kernel, without a page

CELL = """
import json, sys, threading, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from made_up_run import made_up_run
from sftkit.widgets import live
run = Path({run!r}); run.mkdir()
with live(run, renderer={renderer!r}), open(run/"events.jsonl", "w") as f:
    for e in made_up_run({steps}):
        f.write(json.dumps(e) + "\\n"); f.flush()
        if e["kind"] == "step": time.sleep({pause})
import ipywidgets
print([t.name for t in threading.enumerate() if t.name.startswith("sftkit")], len(ipywidgets.widgets.widget._instances))
"""

@pytest.mark.parametrize("renderer, steps, most", [("widget", 100, 60_000), ("html", 100, 50_000), ("widget", 10_000, 200_000)])
def test_a_run_notebook_keeps_the_static_form_only(tmp_path, renderer, steps, most, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(tests=str(Path(__file__).parent), run=str(tmp_path/"run"), renderer=renderer, steps=steps, pause=0.005 if steps < 1000 else 0))])
    nbclient.NotebookClient(nb, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    saved = nbformat.writes(nb)
    bundles = [o["data"] for o in nb.cells[0].outputs if "data" in o]
    assert "[] 0" in nb.cells[0].outputs[-1]["text"] # no thread, no widget model left
    assert "widget-view" not in saved and len(saved) < most, len(saved)
    shown = [b for b in bundles if b["text/html"]]
    assert len(shown) == 1 and f"step</span> <b" in shown[0]["text/html"] and shown[0]["text/plain"].startswith(f"finished · step {steps:,} ") and "data:image/svg+xml" in shown[0]["text/html"]


@pytest.fixture
def outputs(nowhere):
    "What cells would hold: each output as it was last."
    import IPython.display
    shown = []
    class Handle:
        def __init__(self, data): self.at = len(shown); shown.append(data)
        def update(self, data, raw): shown[self.at] = data
    nowhere.setattr(IPython.display, "display", lambda data, **kw: Handle(data))
    return shown

WIDGET = "application/vnd.jupyter.widget-view+json"

@pytest.mark.parametrize("env, output, stays", [({"JPY_SESSION_NAME": "x.ipynb"}, False, True), ({}, False, False), ({"VSCODE_PID": "7", "JPY_SESSION_NAME": "x.ipynb"}, True, False)])
def test_what_a_live_view_leaves(outputs, nowhere, env, output, stays):
    "A page gets the view whenever it is opened, as long as the kernel lives; no output needs a model to be read. Without a page, or where a widget output had to be made, the static form alone is left."
    for k, v in env.items(): nowhere.setenv(k, v)
    r, p, threads = WidgetRenderer("run", follow="Run.open(\"run\").watch()"), Progress(made_up_run(20, state="")), threading.active_count()
    r.start(p); view, (place, twin) = r.view, outputs
    assert (WIDGET in place) == output and ("sft-panel" in place["text/html"]) != output and WIDGET not in twin and place["text/plain"] == ""
    assert "▶ training" in twin["text/html"] and "As it was at 2" in twin["text/html"] and "Run.open(&quot;run&quot;).watch() shows how it went on." in twin["text/html"] # what a reader of the file needs
    p.add([{"t": 2e9, "kind": "state", "state": "finished", "step": 20}]); r.push([], p); r.finish(p)
    place, twin = outputs
    assert "✓ finished" in twin["text/html"] and "As it was" not in twin["text/html"] and twin["text/plain"].startswith("finished") and WIDGET not in {**place, **twin}
    assert (view.comm is not None, "sft-panel" in place["text/html"], "sft-static" in twin["text/html"]) == (stays,) * 3 and threading.active_count() == threads # no timer closes it
    if stays: assert view.get_state()["history"]["facts"]["state"] == "finished" and view.static() == {k: twin[k].replace(f'<div class="sft-static" data-run="{view.run_id}">', "")[:len(view.static()[k])] for k in twin} and view._progress is None
    view.close()

def test_views_of_ended_runs_are_bounded(outputs, nowhere):
    nowhere.setenv("JPY_SESSION_NAME", "x.ipynb"); nowhere.setattr(WidgetRenderer, "most", 3); nowhere.setattr(WidgetRenderer, "_ended", type(WidgetRenderer._ended)())
    views = []
    for i in range(5):
        r, p = WidgetRenderer("run"), Progress(made_up_run(5)); r.start(p); r.finish(p); views.append(r.view)
    assert [v.comm is not None for v in views] == [False] * 2 + [True] * 3
    for v in views: v.close()

@pytest.mark.parametrize("seen", [True, False])
def test_how_often_the_static_form_is_refreshed(outputs, nowhere, seen):
    nowhere.setenv("JPY_SESSION_NAME", "x.ipynb"); now = [0.0]; nowhere.setattr(widgets.time, "monotonic", lambda: now[0])
    r, p, refreshed = WidgetRenderer("run"), Progress(made_up_run(5, state="")), []
    r.start(p); nowhere.setattr(LiveView, "refresh", lambda self: refreshed.append(now[0]))
    if seen: r.view._asked(r.view, {"type": "here", "seq": 0}, [])
    for i in range(1000): now[0] += 0.1; r.push([], p)
    between = [b - a for a, b in zip(refreshed, refreshed[1:])]
    assert 1.9 < refreshed[0] < 2.2 and max(between) < (10.2 if seen else 2.2) and (min(between[-2:]) > 9.9 if seen else len(between) > 40)
    refreshed.clear(); r.push([], p); p.add([{"kind": "state", "state": "paused", "step": 5}]); r.push([], p); r.push([], p)
    assert len(refreshed) == 1; r.view.close()


# --- nothing but the view

QUIET = {"plan": "plan", "preview": "plan.preview()", "memory": "plan.memory()", "fit": "run = plan.fit()", "history": "run.history.tail(2)", "again": "more = plan.lora(r=4).fit(project_name='adapter', epochs=1)",
         "start": "aside = plan.start(project_name='aside', max_steps=3).wait()", "generate": "run.generate('turn on light 1', 8)", "both": "run.versus_base(['turn on light 1'], 8)",
         "scores": "run.evaluate(metrics='perplexity,exact_match', max_new_tokens=8)", "chat": "talk = run.chat(max_new_tokens=8)\ntalk.send('turn on light 1').join(60)\ntalk", "silent": "import time; time.sleep(1)"}

@pytest.mark.parametrize("renderer", ["html", "widget"])
def test_a_notebook_holds_what_was_asked_for_and_nothing_else(tmp_path, tiny, chat_file, renderer):
    "No warning, no bar, no log line of any library: what a cell leaves is one view or one value."
    import nbclient, nbformat
    begin = f"from sftkit import Session\nplan = Session({tiny!r}, project='quiet').data({chat_file!r}, eval=8).options(max_steps=12, batch_size=4, gradient_accumulation=1, eval_steps=4, save_steps=4)"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (begin, *QUIET.values())])
    env = environment("TOKENIZERS_PARALLELISM", "SFTKIT_RENDERER", SFTKIT_RENDERER=renderer)                # a user's environment has neither
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}, store_widget_state=False).execute(env=env)
    left = dict(zip(("begin", *QUIET), (cell.outputs for cell in book.cells)))
    for name, outputs in left.items(): assert {o.output_type for o in outputs} <= {"display_data", "execute_result"}, (name, outputs)      # no stream, no error
    seen = {name: [o.data for o in outputs if "<" in o.data.get("text/html", "") and "sft-panel" not in o.data["text/html"] or o.output_type == "execute_result"] for name, outputs in left.items()}
    assert {name: len(shown) for name, shown in seen.items()} == {"begin": 0, **dict.fromkeys(QUIET, 1), "silent": 0}
    for name in ("fit", "again", "start"):
        assert "finished" in seen[name][0]["text/plain"] and "data:image/svg+xml" in seen[name][0]["text/html"]
        assert [o.data["text/html"] for o in left[name] if o.data not in seen[name]] in ([], [""])            # the emptied twin of a widget
    assert "widget-view" not in json.dumps(book)


# --- what the buttons and the panels say

@pytest.mark.parametrize("events, enabled", [([{"kind": "state", "state": "starting"}], ["stop"]), ([{"kind": "state", "state": "training", "step": 0}], ["pause", "stop", "checkpoint"]),
    ([{"kind": "plan", "eval_rows": 4}, {"kind": "state", "state": "training", "step": 0}], ["pause", "stop", "checkpoint", "evaluate"]), ([{"kind": "state", "state": "paused", "step": 3}], ["resume", "stop"]),
    ([{"kind": "state", "state": "finished", "step": 3}], []), ([{"kind": "state", "state": "failed", "step": 3}], [])])
def test_buttons_follow_the_state(events, enabled): assert widgets._live_facts(Progress(events))["enabled"] == enabled

def test_every_request_passes_and_resume_only_with_pause(sent):
    from sftkit.events import RunDirectory
    asked = []; v = LiveView("run", on_request=asked.append); w = LiveView("run", on_request=asked.append, commands=("stop",))
    for name in RunDirectory.requests: v._asked(v, {"type": "request", "name": name}, [])
    w._asked(w, {"type": "request", "name": "resume"}, [])
    assert asked == list(RunDirectory.requests); v.close(); w.close()

def test_no_page_gets_more_than_it_can_draw_and_the_extremes_stay(sent):
    events = made_up_run(10_000); steps = [e for e in events if e["kind"] == "step"]
    steps[4321]["grad_norm"], steps[777]["loss"], steps[9000]["seconds"] = 99.0, 77.0, 0.0001
    p = Progress(events + [{"kind": "note", "text": "n"}] * 5000 + [{"kind": "eval", "step": i, "loss": 1.0} for i in range(1, 5000)]); v = LiveView("run", progress=p)
    h = v.get_state("history")["history"]; v.push(events)
    for points in (h["points"], sent[0]["points"]):
        assert len(points) <= 2000 and max(q[3] for q in points) == 99.0 and max(q[1] for q in points) == 77.0 and max(q[4] for q in points) > 1e6
    assert len(h["evals"]) <= 2000 and len(h["marks"]) <= 2000; v.close()

def test_notes_reach_the_page_once_and_trouble_stays(sent):
    p = Progress(made_up_run(9, state="")); v = LiveView("run", progress=p); v.push([])
    events = [{"kind": "oom", "step": 9, "text": "Memory ran out; half a batch.\u202e"}, *({"kind": "note", "level": "info", "text": f"n{i}"} for i in range(9)), {"kind": "eval", "step": 9, "loss": 1.0}]
    for e in events: p.add([e]); v.push([e])
    assert ["notes" in m for m in sent] == [False] + [True] * 10 + [False] and sent[-2]["notes"] == [["out of memory", "step 9: Memory ran out; half a batch.⟨U+202E⟩"], *(["note", f"step 9: n{i}"] for i in range(4, 9))]
    assert v.get_state("history")["history"]["notes"] == sent[-2]["notes"]; v.close()

def test_scores_reach_the_page():
    p = Progress([{"kind": "step", "step": 1, "loss": 2.0, "ce": 2.0, "kl": 0.5}, {"kind": "step", "step": 2, "loss": 1.0, "ce": 1.0, "kl": 0.25}, {"kind": "eval", "step": 2, "loss": 1.5, "bleu": 12.5, "a\u202eb": 1.0}])
    assert widgets._live_facts(p)["scores"] == "evaluation: loss 1.5 · bleu 12.5 · a⟨U+202E⟩b 1\nloss parts: ce 2 → 1 · kl 0.5 → 0.25"


# --- panels

from sftkit.widgets import Panel, PreviewView # noqa: E402
HOSTILE = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\u202e\x00\u2066"

@pytest.fixture
def told(monkeypatch):
    "Messages of panels to their pages, as JSON keeps them."
    messages = []
    monkeypatch.setattr(Panel, "send", lambda self, content, buffers=None: messages.append(json.loads(json.dumps(content, allow_nan=False))))
    return messages

@pytest.fixture
def plan(tiny):
    from sftkit import Session
    rows = [{"messages": [{"role": "user", "content": f"turn on light {i}" + " please" * (i % 20)}, {"role": "assistant", "content": f"light {i} on"}]} for i in range(60)]
    rows[7]["messages"][0]["content"] = HOSTILE; rows[8]["messages"][1]["content"] = "x\u2028y" * 40_000
    rows[9]["messages"] = [{"role": "system", "content": "Be short."}, {"role": "assistant", "content": "hello"}, *rows[9]["messages"]]
    return Session(tiny, project="p").data(rows, eval=6).options(max_seq_length=40)

def preview_of(plan, n=3, **kw): return plan.preview(n, **kw).panel()

def test_preview_pages_are_what_the_trainer_gets(plan):
    v, data = preview_of(plan, 5), plan._work.data
    for split, rows in (("training", data.train_rows), ("held out", data.valid_rows)):
        for start in range(0, len(rows), 5):
            page = v.page(split, start)
            assert page["total"] == len(rows) and [r["number"] for r in page["rows"]] == [i + 1 for i in range(start, min(start + 5, len(rows)))]
            for shown, row in zip(page["rows"], rows[start:start + 5]):
                e = plan.encode(row.value)
                if any(isinstance(t, int) for t in shown["tokens"]): continue
                assert [t[1] for t in shown["tokens"]] == e["input_ids"] + e["cut_ids"] and shown["where"] == row.where
                fates = [page["styles"][t[2]][2] for t in shown["tokens"]]
                assert fates == ["not trained" if l == -100 else "trained" for l in e["labels"]] + ["cut off"] * len(e["cut_ids"])
                ids = data.encoder.prompt(row.value)
                assert shown["prompt"]["length"] == len(ids) and shown["prompt"]["tokens"] is None and (e["input_ids"] + e["cut_ids"])[:len(ids)] == ids
    v.close()

def test_every_template_shows_what_its_plan_would_train(plan, tiny):
    from sftkit import Session
    from sftkit.chat import templates
    v, row = preview_of(plan, 1), plan._work.data.train_rows[0]
    assert set(v.about["templates"]) | {v.about["own"]} == set(templates())
    for name in v.about["templates"]:
        page, e = v.page("training", 0, name), Session(tiny, project="q").data([row.value]).template(name).options(max_seq_length=400).encode(row.value)
        shown = page["rows"][0]
        assert [t[1] for t in shown["tokens"]] == e["input_ids"] and [page["styles"][t[2]][2] == "trained" for t in shown["tokens"]][:40] == [l != -100 for l in e["labels"]][:40], name
    v.close()

def test_a_template_that_refuses_a_row_says_why_beside_the_others(plan):
    v = preview_of(plan, 20)
    at = next(i for i, r in enumerate(plan._work.data.train_rows) if len(r.value["messages"]) == 4)
    page = v.page("training", at, "llama")
    assert "roles must alternate" in page["rows"][0]["error"] and "tokens" in page["rows"][1]; v.close()

def test_preview_filters_count_what_they_show(plan):
    v, data = preview_of(plan, 20), plan._work.data
    cut = [i + 1 for i, r in enumerate(data.train_rows) if data.encoder(r.value)["cut_ids"]]
    lost = [i + 1 for i, r in enumerate(data.train_rows) if all(l == -100 for l in data.encoder(r.value)["labels"])]
    split = v.about["splits"][0]
    assert split["filters"] == [["cut", len(cut)], ["lost answer", len(lost)]] and len(cut) > 5 and lost
    assert [r["number"] for r in v.page("training", 0, which="cut")["rows"]] == cut[:20] and v.page("training", 0, which="lost answer")["total"] == len(lost)
    assert v.page("training", 0, which="cut", row=cut[3])["start"] == 3; v.close()

def test_preview_messages_are_checked_and_bounded(plan, told):
    v = preview_of(plan, 20)
    ask = lambda **kw: v._asked(v, {"type": "rows", "split": "training", "which": "all", "template": "", "start": 0, **kw}, [])
    ask(); ask(start=40); ask(template="llama", start=5); ask(start=10**9); ask(row=7)
    assert len(told) == 5 and told[3]["rows"][0]["number"] == 54 and told[4]["rows"][0]["number"] == 7
    assert all(len(json.dumps(m, ensure_ascii=False).encode()) < 300_000 for m in told) and "\u202e" not in json.dumps(told, ensure_ascii=False)
    for wrong in (dict(split="x"), dict(split=[]), dict(which="rm"), dict(template="../x"), dict(start="1"), dict(start=True), dict(row=1.5), dict(type="other")): ask(**wrong)
    v._asked(v, "junk", []); assert len(told) == 5
    assert len(json.dumps(v.get_state(), ensure_ascii=False, default=str).encode()) < 400_000; v.close()

def test_preview_of_given_rows_and_of_plain_text(plan, tiny, text_file):
    from sftkit import Session
    v = preview_of(plan, rows=[{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}])
    assert [(s["name"], s["rows"]) for s in v.about["splits"]] == [("given", 1)] and v.first[0]["rows"][0]["prompt"]["length"] > 3; v.close()
    v = preview_of(Session(tiny, project="t").data(text_file)); assert v.about["templates"] == [] and "tokens" in v.first[0]["rows"][0]; v.close()

@pytest.mark.parametrize("renderer", ["widget", "html", "plain"])
def test_shown_has_every_form(plan, nowhere, renderer):
    shown = plan.preview(2)
    nowhere.setattr(widgets, "_shell", lambda: None if renderer == "plain" else Shell); nowhere.setenv("SFTKIT_RENDERER", renderer)
    bundle = shown._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert shown.html in data["text/html"] and data["text/plain"] == shown.text == repr(shown) and shown._repr_html_() == shown.html and "<script>" not in shown.html
    assert ("application/vnd.jupyter.widget-view+json" in data) == (renderer == "widget")
    if renderer != "widget":
        with pytest.raises(NotImplementedError): shown._ipython_display_()

def test_a_panel_shows_its_place_and_its_static_form(nowhere):
    outputs = []
    class Handle:
        def update(self, data, raw): outputs.append(data)
    import IPython.display
    nowhere.setattr(IPython.display, "display", lambda data, **kw: outputs.append(data) or Handle())
    v = PreviewView({"training": []}, type("E", (), {"max_seq_length": 9, "tokenizer": None})(), {"text/html": "<i>x</i>", "text/plain": "x"})
    v.show(); v.refresh()
    assert outputs == [{"text/html": f'<div class="sft-panel" data-run="{v.run_id}"></div>', "text/plain": ""}] + [{"text/html": f'<div class="sft-static" data-run="{v.run_id}"><i>x</i></div>', "text/plain": "x"}] * 2
    nowhere.setenv("VSCODE_PID", "7"); v.show()
    assert "application/vnd.jupyter.widget-view+json" in outputs[3] and outputs[3]["text/html"] == ""; v.close()
    assert v.comm is None


# --- the conversation

from sftkit.widgets import Chat, ChatView # noqa: E402

def echo(side, prompt, max_new_tokens, temperature):
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    for i, word in enumerate(text.split(" ")[:max_new_tokens]): yield (" " if i else "") + (word.upper() if side == "tuned" else word)

class Slow:
    "Answers that go on until they are stopped."
    def __init__(self): self.closed, self.started = [], threading.Event()
    def __call__(self, side, prompt, max_new_tokens, temperature):
        try:
            while True: self.started.set(); time.sleep(0.002); yield "la "
        finally: self.closed.append(side)

def test_each_model_goes_on_from_its_own_answers():
    c = Chat(echo, system="Be brief.")
    c.ask("one two"); c.ask("three", sides=("tuned",))
    assert c.turns == [dict(user="one two", base="one two", tuned="ONE TWO", note=""), dict(user="three", base=None, tuned="THREE", note="")]
    assert c.messages("tuned", "x") == [{"role": "system", "content": "Be brief."}, *({"role": r, "content": t} for r, t in (("user", "one two"), ("assistant", "ONE TWO"), ("user", "three"), ("assistant", "THREE"), ("user", "x")))]
    assert [m["content"] for m in c.messages("base", "x")] == ["Be brief.", "one two", "one two", "x"] # what the base was not asked is no part of its conversation
    c.clear(); assert c.turns == [] and Chat(echo, turns_are_sent=False, system="s").messages("base", "x") == "x"

def test_ask_prints_in_scripts(capsys):
    Chat(echo).ask("good \u202eday")
    assert capsys.readouterr().out == "tuned: GOOD ⟨U+202E⟩DAY\nbase: good ⟨U+202E⟩day\n"

def test_a_chat_stops_and_says_so(told):
    slow = Slow(); c = Chat(slow); v = ChatView(c)
    thread = c.send("sing"); wait_for(lambda: len(c.turns[0]["tuned"] or "") > 30)
    with pytest.raises(RunError, match="still being written"): c.ask("again")
    with pytest.raises(RunError, match="stop"): c.clear()
    v._asked(v, {"type": "stop"}, []); thread.join(5)
    assert c.turns[0]["note"] == "stopped" and c.turns[0]["base"] is None and slow.closed == ["tuned"] and not c.busy
    assert told[0]["whole"]["note"] == "…" and told[-1]["whole"] == c.turns[0] and told[-1]["busy"] is False and [m["seq"] for m in told] == list(range(1, len(told) + 1)); v.close()

def test_pieces_add_up_to_the_answer(told):
    c = Chat(echo); v = ChatView(c); v.interval = 0
    c.ask("a <b> 🤗 \u202e c"); turn = None
    for m in told:
        if "whole" in m: turn = m["whole"]
        for side, more in m.get("grown", {}).items(): turn[side] += more
    assert turn == {**c.turns[0], "user": "a <b> 🤗 ⟨U+202E⟩ c", "base": "a <b> 🤗 ⟨U+202E⟩ c", "tuned": "A <B> 🤗 ⟨U+202E⟩ C"} and any("grown" in m for m in told); v.close()

def test_an_answer_that_fails_is_said_and_the_chat_goes_on(told):
    def broken(side, prompt, **kw):
        yield "so "
        raise MemoryError("CUDA out of memory")
    c = Chat(broken); v = ChatView(c); c.send("x").join(5)
    assert c.turns[0] == dict(user="x", base=None, tuned="so ", note="MemoryError: CUDA out of memory") and not c.busy and told[-1]["whole"]["note"].startswith("MemoryError")
    with pytest.raises(MemoryError): c.ask("y")
    assert not c.busy and len(c.turns) == 2; v.close()

def test_interrupting_ask_keeps_what_is_there():
    def interrupted(side, prompt, **kw):
        yield "half"
        raise KeyboardInterrupt
    c = Chat(interrupted)
    with pytest.raises(KeyboardInterrupt): c.ask("x")
    assert c.turns[0]["tuned"] == "half" and c.turns[0]["note"] == "stopped" and not c.busy

def test_messages_from_the_page_are_checked(told):
    c = Chat(echo); v = ChatView(c)
    for m in (dict(text=""), dict(text=7), dict(text="x", temperature=-1), dict(text="x", temperature="hot"), dict(text="x", max_new_tokens=0), dict(text="x", max_new_tokens=True), dict(text="x", system=3)): v._asked(v, {"type": "ask", **m}, [])
    assert c.turns == [] and all("refused" in m for m in told) and len(told) == 7
    for m in ("junk", {}, {"type": "rm"}): v._asked(v, m, [])
    v._asked(v, {"type": "ask", "text": "x", "sides": ["tuned", "../x", []]}, []); wait_for(lambda: not c.busy)
    assert c.turns[0]["base"] is None and c.turns[0]["tuned"] == "X" and len(told) > 7
    v._asked(v, {"type": "clear"}, []); assert c.turns == [] and told[-1]["cleared"] is True; v.close()

def test_a_page_gets_the_conversation_bounded():
    c = Chat(echo); c.turns += [dict(user=HOSTILE * 1000, base="b" * 50_000, tuned="t" * 50_000, note="")] * 80
    v = ChatView(c); h = v.get_state("history")["history"]
    assert len(h["turns"]) == 50 and h["first"] == 30 and "\u202e" not in json.dumps(h, ensure_ascii=False) and v.history == {}
    assert len(json.dumps(h)) < 700_000 and len(json.dumps(v.static())) < 500_000; v.close()

@pytest.mark.parametrize("renderer", ["widget", "html", "plain"])
def test_a_chat_has_every_form(nowhere, renderer):
    c = Chat(echo, title="Chat with <x>")
    nowhere.setattr(widgets, "_shell", lambda: None if renderer == "plain" else Shell); nowhere.setenv("SFTKIT_RENDERER", renderer)
    assert "chat.ask(" in repr(c) and "chat.ask(" in c._repr_html_() and "<x>" not in c._repr_html_()
    c.ask(HOSTILE); bundle = c._repr_mimebundle_(); data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "<script" not in data["text/html"] and "&lt;script" in data["text/html"] and "<script>" in data["text/plain"] and "chat.ask(" not in repr(c)
    assert ("application/vnd.jupyter.widget-view+json" in data) == (renderer == "widget")
    if renderer != "widget":
        with pytest.raises(NotImplementedError): c._ipython_display_()

@pytest.mark.parametrize("adapter", [True, False])
def test_chatting_with_a_run(tiny, adapter):
    from sftkit import Session
    rows = [{"messages": [{"role": "user", "content": f"turn on light {i}"}, {"role": "assistant", "content": f"light {i} on"}]} for i in range(32)]
    plan = Session(tiny, project="chatted").data(rows)
    run = (plan.lora(r=4) if adapter else plan).fit(epochs=2, lr=2e-2)
    c = run.chat(max_new_tokens=12)
    c.ask("turn on light 3"); c.send("and light 4").join(60)
    asked = [{"role": "user", "content": "turn on light 3"}, None, {"role": "user", "content": "and light 4"}]
    for side in ("base", "tuned"):
        history = [{"role": "assistant", "content": c.turns[0][side]} if m is None else m for m in asked]
        if c.turns[0][side].strip(): assert c.turns[1][side] == run.versus_base([history], 12)[0][side], side
    first = run.versus_base(["turn on light 3"], 12)[0]
    assert (c.turns[0]["base"], c.turns[0]["tuned"]) == (first["base"], first["tuned"]) and first["base"] != first["tuned"]
    assert c.turns[1]["note"] == "" and "Chat with chatted" in repr(c)

def test_a_cell_that_uses_the_model_waits_for_the_chat(tiny):
    "While the base answers, the adapter is off; run.generate must not get the base's answer."
    from sftkit import Session
    rows = [{"messages": [{"role": "user", "content": f"turn on light {i}"}, {"role": "assistant", "content": f"light {i} on"}]} for i in range(32)]
    run = Session(tiny, project="shared").data(rows).lora(r=4).fit(epochs=2, lr=2e-2)
    before, c = run.generate("turn on light 5", 12), run.chat(max_new_tokens=400, temperature=1.0)
    for _ in range(3):
        thread = c.send("turn on light 5", sides=("base",)); wait_for(lambda: c.turns[-1]["base"] is not None)
        assert run.generate("turn on light 5", 12) == before
        c.stop(); thread.join(60)

def test_a_chat_without_chat_template_continues_text(tiny, text_file):
    from sftkit import Session
    run = Session(tiny, project="plain").data(text_file).lora(r=4).fit(epochs=1)
    c = run.chat(base=False, max_new_tokens=6); c.ask("Question: what")
    assert not c.turns_are_sent and c.sides == ("tuned",) and c.turns[0]["tuned"] == run.generate("Question: what", 6)


# --- the comparison

from sftkit.widgets import CompareView # noqa: E402
from sftkit.events import RunDirectory # noqa: E402

def view_of(tmp_path, **runs):
    for name, events in runs.items(): write(tmp_path/name, events)
    return CompareView({name: RunDirectory(tmp_path/name) for name in runs}, {"lr": list(range(len(runs)))})

def test_finished_runs_are_not_followed(tmp_path, told):
    v = view_of(tmp_path, a=made_up_run(50), b=made_up_run(20, state="failed"))
    h = v.get_state("history")["history"]
    assert v.follow() is None and told == [] and h["live"] == [False, False] and [len(c["loss"]) for c in h["curves"].values()] == [50, 20] and v.history == {}
    assert h["curves"][0]["loss"][-1][:3] == [50, 50 * 190, round(50 * 0.31, 3)] and v.about["differences"][1] == ["lr", "0", "1"]
    assert "CUDA" not in json.dumps(h) and "✕ failed" in v.static()["text/plain"]; v.close()

def test_a_running_run_is_followed_to_its_end(tmp_path, told):
    events = made_up_run(60)
    v = view_of(tmp_path, a=made_up_run(50), b=events[:40]); v.interval = 0.01
    thread = v.follow(); write(tmp_path/"b", events[40:], pause=0.002); thread.join(10)
    assert not thread.is_alive() and told and all(set(m["curves"]) == {"1"} for m in told) and len(told[-1]["curves"]["1"]["loss"]) == 60 and told[-1]["live"] == [False, False]
    assert [m["seq"] for m in told] == list(range(1, len(told) + 1)) and "sftkit-view-compare" not in [t.name for t in threading.enumerate()]; v.close()

def test_a_run_that_died_is_not_followed(tmp_path):
    events = made_up_run(10, state=""); events[0] |= {"pid": 2**22 + 12345, "host": __import__("socket").gethostname(), "started": 1.0}; events[2] |= {k: events[0][k] for k in ("pid", "host", "started")}
    v = view_of(tmp_path, a=events, b=made_up_run(5)); assert v.follow() is None and "✕ died" in v.static()["text/plain"]; v.close()

def test_closing_stops_following(tmp_path, told):
    v = view_of(tmp_path, a=made_up_run(50, state=""), b=made_up_run(5)); v.interval = 0.01
    thread = v.follow(); assert thread.is_alive(); v.close(); thread.join(5); assert not thread.is_alive()

def test_many_long_runs_stay_small(tmp_path):
    v = view_of(tmp_path, **{f"run{i}": made_up_run(3000, seed=i) for i in range(8)})
    h = v.get_state("history")["history"]
    assert all(len(c["loss"]) <= 1000 for c in h["curves"].values()) and len(json.dumps(h)) < 600_000 and len(v.static()["text/html"]) < 250_000; v.close()

@pytest.mark.parametrize("renderer", ["widget", "html", "plain"])
def test_compared_has_every_form(tmp_path, nowhere, renderer):
    from sftkit import Recipe, Run, compare
    for i, name in enumerate(("a<b>", "c")):
        write(tmp_path/name, made_up_run(20, seed=i)); Recipe(model="m", data_path="d", project_name=name, lr=1e-4 * (i + 1), chat_template=None if i else "chatml").to_yaml(tmp_path/name/"recipe.yaml")
    both = compare(Run.open(tmp_path/"a<b>"), Run.open(tmp_path/"c"))
    nowhere.setattr(widgets, "_shell", lambda: None if renderer == "plain" else Shell); nowhere.setenv("SFTKIT_RENDERER", renderer)
    bundle = both._repr_mimebundle_(); data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "a&lt;b&gt;" in data["text/html"] and "a<b>" not in data["text/html"] and "data:image/svg+xml" in data["text/html"] and "0.0002" in data["text/plain"] == repr(both) and both._repr_html_() in data["text/html"]
    assert ("application/vnd.jupyter.widget-view+json" in data) == (renderer == "widget") and set(both.differences.index) == {"lr", "chat_template"} and len(both.results) == 2 and len(both.plot().data) == 4
    if renderer != "widget":
        with pytest.raises(NotImplementedError): both._ipython_display_()


# --- what cannot be read, and views that fail

BAD = '{"t": 1, "kind": "st{"t": 2, "kind": "note"}\n'

def test_a_line_that_cannot_be_read_ends_the_view_and_is_said_in_it(tmp_path, caplog):
    run, r = tmp_path/"run", Recorder()
    with caplog.at_level(logging.WARNING, "sftkit"):
        w = watch(run, renderer=r); write(run, made_up_run(30, state=""))
        wait_for(lambda: w.progress.step == 30)
        with open(run/"events.jsonl", "a") as f: f.write(BAD)
        w.join(5)
    lines = (run/"events.jsonl").read_text().count("\n")
    assert not w.is_alive() and r.calls[-1] == "finish" and r.last["step"] == 30 and f"Line {lines} of" in r.last["notes"][0]["text"] and view_threads() == []
    assert len(caplog.records) == 1 and f"Line {lines} of" in caplog.records[0].message
    r = Recorder(); watch(run, renderer=r).join(5); assert r.calls == ["start", "finish"] and f"Line {lines} of" in r.last["notes"][0]["text"] # opened when it was bad already

def test_a_line_that_cannot_be_read_does_not_hide_what_ended_the_run(tmp_path):
    run, r = tmp_path/"run", Recorder(); write(run, made_up_run(3, state=""))
    with pytest.raises(ValueError, match="bad row"):
        with live(run, renderer=r), open(run/"events.jsonl", "a") as f: f.write(BAD); f.flush(); time.sleep(0.1); raise ValueError("bad row")
    assert (r.last["state"], r.last["error"]) == ("failed", "ValueError: bad row") and "Line" in r.last["notes"][0]["text"] and view_threads() == []
    with live(run, renderer=Recorder()): trained = True
    assert trained

def test_a_status_that_cannot_be_read_ends_the_view(tmp_path):
    run, r = tmp_path/"run", Recorder(); write(run, made_up_run(3, state=""))
    w = Publisher(run, r, until_end=True)
    def unreadable(): raise RunError("Line 1 of the file is no event")
    w.directory.status = unreadable; w._quiet_since -= 10; w.start(); w.join(5)
    assert not w.is_alive() and "no event" in r.last["notes"][0]["text"] and r.calls[-1] == "finish"

def test_a_view_that_fails_does_not_stop_the_chat(told, caplog):
    class Broken:
        def told(self, *args): raise OSError("the page went away")
    c = Chat(echo); c._views.append(Broken()); v = ChatView(c)
    with caplog.at_level(logging.WARNING, "sftkit"): c.ask("one"); c.send("two").join(5); c.clear()
    assert not c.busy and told[-1]["cleared"] is True and any(m.get("whole", {}).get("tuned") == "TWO" for m in told) # the other view heard all of it
    assert len(caplog.records) == 1 and "OSError: the page went away" in caplog.records[0].message; v.close()

@pytest.mark.parametrize("where", ["told", "messages", "thread"])
def test_a_question_that_does_not_get_through_leaves_the_chat_free(monkeypatch, where):
    class Interrupted:
        def told(self, *args): raise KeyboardInterrupt
    c = Chat(echo)
    if where == "told": c._views.append(Interrupted())
    def fail(*args): raise RuntimeError("can't start new thread")
    with monkeypatch.context() as m:
        if where == "messages": m.setattr(Chat, "messages", fail)
        if where == "thread": m.setattr(threading.Thread, "start", fail)
        with pytest.raises((KeyboardInterrupt, RuntimeError)): c.send("one")
    c._views.clear()
    assert not c.busy and all(t["note"] != "…" for t in c.turns)
    c.ask("two"); assert c.turns[-1]["tuned"] == "TWO"

def test_a_page_of_rows_that_fails_is_said(plan, told, monkeypatch):
    v = preview_of(plan, 20)
    def fail(*args): raise OSError(f"no tokenizer {HOSTILE}")
    monkeypatch.setattr(v, "_numbers", fail)
    for more in (dict(start=20), dict(which="cut", row=7)): v._asked(v, {"type": "rows", "split": "training", "which": "all", "template": "llama", "start": 0, **more}, [])
    assert [(m["start"], m["which"], m["template"], m.get("row")) for m in told] == [(20, "all", "llama", None), (0, "cut", "llama", 7)] and told[0]["rows"][0]["number"] == 21
    assert all(m["rows"][0]["error"].startswith("OSError: no tokenizer <script>") and "\u202e" not in m["rows"][0]["error"] for m in told); v.close()


def test_a_view_follows_its_run_when_the_working_folder_changes(tmp_path, monkeypatch):
    (tmp_path/"elsewhere").mkdir(); monkeypatch.chdir(tmp_path)
    r = Recorder()
    with live("run", renderer=r, total_hint=20):
        monkeypatch.chdir(tmp_path/"elsewhere")
        write(tmp_path/"run", made_up_run(20), pause=0.001)
    assert r.last["state"] == "finished" and [e["step"] for e in r.events if e["kind"] == "step"] == list(range(1, 21))


def test_waiting_for_a_run_waits_for_its_view(tmp_path):
    "A notebook drops what a view sends after its cell: the end is shown before `wait` returns."
    from sftkit import Run
    from sftkit.events import EventLog, this_process
    from sftkit.recipe import Recipe
    Recipe(model="m", data_path="d", project_name=str(tmp_path/"run")).to_yaml((tmp_path/"run").mkdir() or tmp_path/"run"/"recipe.yaml")
    log = EventLog(tmp_path/"run"/"events.jsonl"); log.append("state", state="training", **this_process())
    class Slow:
        interval, shown = 0.5, []
        def start(self, progress): pass
        def push(self, events, progress): self.shown += [e.get("state") for e in events]
        def finish(self, progress, error=None): time.sleep(0.3); self.shown.append("end")
    widgets.watch(tmp_path/"run", Slow())
    log.append("state", state="finished"); log.close()
    Run.open(tmp_path/"run").wait(10)
    assert Slow.shown[-1] == "end"
