"""Real runs in a real front end, JupyterLab 4 and Notebook 7: the view moves, each button does its work while training runs, and a run survives its page, its kernel and its notebook."""
import json, os, signal
import pytest
import browser
from browser import curve, drawn, lab, notebook, untrusted_copy, write_notebook
from conftest import CHAT
from sftkit.events import RunDirectory
from running import until
from tiny import save_tiny, write_jsonl

browser.needed()
pytestmark = pytest.mark.xdist_group("browser")

PICTURE = "img[src^='data:image/svg+xml']"                                          # in the static form, which is seen where no kernel answers
PLAN = """from sftkit import Session
plan = Session("m", project={name!r}).data("rows.jsonl", eval=8).options(max_steps={steps}, batch_size=4, gradient_accumulation=1, lr=1e-4, eval_steps=10**6, save_steps=10**6)"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder/"m", extra=("<|im_start|>", "<|im_end|>"), hidden=64, layers=4)
    write_jsonl(folder/"rows.jsonl", CHAT)
    with lab(folder) as server: yield server

@pytest.fixture(autouse=True)
def nothing_left(server):
    yield
    server.end_sessions()
    for path in server.root.glob("*/recipe.yaml"):
        run = RunDirectory(path.parent)
        if run.is_running() and run.status()["pid"] != os.getpid(): os.kill(run.status()["pid"], signal.SIGKILL)


def step(nb): return int(nb.page.locator(".sft-live").last.get_attribute("data-step") or 0)
def reach(nb, n, seconds=90): nb.page.wait_for_function("n => +[...document.querySelectorAll('.sft-live')].at(-1)?.dataset.step >= n", arg=n, timeout=seconds * 1000)
def badge(nb, text, seconds=30): nb.page.wait_for_function("t => [...document.querySelectorAll('.sft-badge')].at(-1)?.textContent.includes(t)", arg=text, timeout=seconds * 1000)
def click(nb, command): nb.page.locator(f".sft-live button[data-command={command}]:not([disabled])").last.click(timeout=15_000)

def use_every_button(nb, run, first=30, more=10, seconds=60): # `first`: the step after which it begins; `more`: steps that show that it goes on
    "Pause, resume, checkpoint, evaluate: each is seen in the page and in the run directory."
    reach(nb, first, seconds=240)
    click(nb, "pause"); badge(nb, "paused", seconds)
    until(lambda: run.status()["state"] == "paused", seconds)
    at = max(e["step"] for e in run.events() if e["kind"] == "step")
    nb.page.wait_for_timeout(600)
    assert max(e["step"] for e in run.events() if e["kind"] == "step") == at
    click(nb, "resume"); badge(nb, "training", seconds); reach(nb, at + more, 2 * seconds)
    assert not run.checkpoints()
    click(nb, "checkpoint"); until(run.checkpoints, seconds)
    evaluations = sum(e["kind"] == "eval" for e in run.events())
    click(nb, "evaluate"); until(lambda: sum(e["kind"] == "eval" for e in run.events()) > evaluations, seconds)
    assert len(run.checkpoints()) == 1 and run.status()["state"] == "training"


@pytest.mark.parametrize("app", ["lab"])                       # buttons are pressed in both by the next test, pages and kernels come back in Notebook 7 by the one after the interrupt
def test_a_started_run_obeys_its_buttons_and_survives_page_and_kernel(server, app):
    name = f"started-{app}"
    write_notebook(server.root/f"{name}.ipynb", [PLAN.format(name=name, steps=100_000) + "\nrun = plan.start()", "print('free:', run.state)", f"from sftkit import Run\nagain = Run.open({name!r}).watch()"])
    run = RunDirectory(server.root/name)
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:
        nb.run_cell(0); nb.run_cell(1); nb.output(1).get_by_text("free: ").wait_for(timeout=60_000)
        assert nb.text(1).split()[-1] in ("starting", "training")                                             # the kernel answers while the worker trains
        use_every_button(nb, run)
        nb.save(); nb.reload(); reach(nb, step(nb) + 10)                          # the page goes away and comes back
        assert int(nb.page.locator(".sft-live").get_attribute("data-points")) > 40
        worker = run.status()["pid"]
        server.end_sessions()                                                      # the kernel is killed; the worker is not
        at = max(e["step"] for e in run.events() if e["kind"] == "step")
        until(lambda: max(e["step"] for e in run.events() if e["kind"] == "step") > at + 5)
        assert run.status()["pid"] == worker
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:                         # a new page, a new kernel
        nb.run_cell(2); reach(nb, at + 10)
        click(nb, "stop"); badge(nb, "stopped")
        assert not nb.output(2).locator(PICTURE).first.is_visible() and nb.output(0).locator(PICTURE).first.is_visible() # the kernel of cell 0 is gone
        until(lambda: "■ stopped" in nb.stored(2))                                # a moment after the view
        nb.save()
        assert app == "notebook" or nb.errors == []                              # Notebook 7 has errors of its own
    until(lambda: run.status()["state"] == "stopped")
    assert run.checkpoints()[-1][0] == max(e["step"] for e in run.events() if e["kind"] == "step")
    server.end_sessions()
    untrusted_copy(server.root/f"{name}.ipynb", server.root/f"{name}-copy.ipynb")
    for book in (f"{name}.ipynb", f"{name}-copy.ipynb"):
        with notebook(server, book, app=app, height=2400) as nb:                                # without the kernel that made it, trusted and not
            nb.output(2).locator(PICTURE).first.wait_for()
            assert "stopped" in nb.text(2) and "training" in nb.text(0) and "As it was at 2" in nb.text(0)               # cell 0 was saved in mid-run
            assert nb.output(0).locator(PICTURE).first.is_visible() and "Error displaying widget" not in nb.page.content() and nb.page.locator(".sft-live").count() == 0


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_fit_obeys_its_buttons_while_its_cell_is_busy(server, app):
    name = f"fit-{app}"
    write_notebook(server.root/f"{name}.ipynb", [PLAN.format(name=name, steps=100_000) + "\nrun = plan.fit()", "print(run.state, len(run.history))"])
    run = RunDirectory(server.root/name)
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:
        nb.run_all(wait=False)
        use_every_button(nb, run)
        click(nb, "stop"); badge(nb, "stopped")
        nb.output(1).get_by_text("stopped").wait_for(timeout=30_000); nb.wait_idle()
        assert nb.text(1).startswith("stopped ") and nb.page.locator(".sft-buttons button").count() == 0
        saved = nb.save()
    assert len(json.dumps(saved)) < 120_000 and "widget-view" not in json.dumps(saved) and "■ stopped" in json.dumps(saved["cells"][0]["outputs"], ensure_ascii=False)
    assert run.checkpoints()[-1][0] == int("".join(saved["cells"][1]["outputs"][0]["text"]).split()[1])


def test_the_interrupt_button_stops_a_fit_with_a_checkpoint(server):
    write_notebook(server.root/"interrupt.ipynb", [PLAN.format(name="interrupted", steps=100_000) + "\nrun = plan.fit()\nprint('then:', run.state)"])
    run = RunDirectory(server.root/"interrupted")
    with notebook(server, "interrupt.ipynb") as nb:
        nb.run_cell(0, wait=False); reach(nb, 20)
        nb.interrupt(); badge(nb, "interrupted")
        nb.output(0).get_by_text("then: ").wait_for(timeout=30_000)
        assert "then: interrupted" in nb.text(0) and "Traceback" not in nb.text(0)
    assert run.status()["state"] == "interrupted" and run.checkpoints()[-1][0] == max(e["step"] for e in run.events() if e["kind"] == "step")


@pytest.mark.parametrize("app", ["notebook"])
def test_a_fit_outlives_its_page_and_can_be_taken_up_after_its_kernel(server, app):
    "While its cell is busy the kernel cannot bring the view to a new page; the run goes on, and the view is there with everything as soon as the cell has ended. A killed kernel takes its run along, which goes on elsewhere."
    name = f"outlived-{app}"
    write_notebook(server.root/f"{name}.ipynb", [PLAN.format(name=name, steps=100_000) + "\nrun = plan.fit()", f"from sftkit import Run\nagain = Run.open({name!r}).watch()", f"from sftkit import Run\nmore = Run.open({name!r}).resume()"])
    run = RunDirectory(server.root/name)
    last = lambda: max((e["step"] for e in run.events() if e["kind"] == "step"), default=0)
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:
        nb.run_cell(0, wait=False); reach(nb, 10, seconds=120)
        nb.save(); nb.reload(kernel=False)                                                                  # it does not say what it is before the cell has ended
        at = last(); until(lambda: last() > at + 5)
        nb.interrupt(); badge(nb, "interrupted", 60)
        assert int(nb.page.locator(".sft-live").first.get_attribute("data-points")) == last() == run.checkpoints()[-1][0] > 10
        nb.run_cell(2, wait=False); reach(nb, last() + 10, seconds=60)                                     # on from the checkpoint
        os.kill(run.status()["pid"], signal.SIGKILL)                                                       # the kernel, and the run with it
        until(lambda: run.status()["state"] == "died")
    server.end_sessions()
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:
        nb.run_cell(1); badge(nb, "died", 60)
        assert "died" in nb.text(1) and "resume()" in nb.text(1)
        at = last()                                                                                            # of the run that died, which the view shows first
        nb.run_cell(2, wait=False); reach(nb, at + 10, seconds=120)
        click(nb, "stop"); badge(nb, "stopped"); nb.wait_idle()
        nb.save()
    assert run.status()["state"] == "stopped" and [e["step"] for e in run.events() if e["kind"] == "step"] == list(range(1, last() + 1))
    server.end_sessions()
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:                                     # without the kernel that made it
        nb.output(2).locator(PICTURE).first.wait_for()
        assert "stopped" in nb.text(2) and "training" in nb.text(0) and "died" in nb.text(1) and "Error displaying widget" not in nb.page.content()


@pytest.mark.parametrize("verb, app", [("start", "lab"), ("fit", "notebook")])
def test_the_sample_model_trains_with_its_curve_moving_and_obeys(server, verb, app):
    name = f"sample-{verb}"
    write_notebook(server.root/f"{name}.ipynb", [f"""import json
from sftkit import Session, sample_data, sample_model
rows = [json.loads(line) for line in open(sample_data()/"train.jsonl", encoding="utf-8")][:24]
plan = Session(sample_model(), project={name!r}).data(rows, eval=2).template("chatml").lora(r=4, dropout=0)
run = plan.{verb}(max_steps=500, batch_size=1, gradient_accumulation=1, lr=1e-3, save_steps=1000, eval_steps=1000)"""])
    run = RunDirectory(server.root/name)
    with notebook(server, f"{name}.ipynb", app=app, height=2400) as nb:
        nb.run_cell(0, wait=False)
        use_every_button(nb, run, first=2, more=1, seconds=180)
        at, before = step(nb), curve(nb); reach(nb, at + 1, seconds=120)
        after = curve(nb)
        assert min(drawn(before), drawn(after)) > 0.6 and before != after
        click(nb, "stop"); badge(nb, "stopped", 120)
        nb.wait_idle(120)
        assert "stopped" in nb.text(0)
    assert run.checkpoints()[-1][0] == max(e["step"] for e in run.events() if e["kind"] == "step")
