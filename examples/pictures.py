"""Makes the pictures and figures of the README from the demo's run: `make demo`, then `make pictures`."""
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from sftkit import Run, Session, sample_data

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS.parent / "tests"))
from browser import headless, lab, notebook, write_notebook
from tiny import save_tiny


def screenshot(html, path, width):
    "PNG of an HTML fragment, as high as it is, through Chromium."
    with headless() as browser:
        page = browser.new_page(viewport=dict(width=width, height=100), device_scale_factor=2)
        page.set_content(f'<!doctype html><body style="margin:14px;background:#fff;color:#222;font:14px system-ui,\'DejaVu Sans\',sans-serif">{html}')
        page.screenshot(path=path, full_page=True)


def compared():
    "Three short runs of a tiny random model that differ in one thing, trained if they are not there: folders."
    tiny = save_tiny("runs/tiny", extra=("<|im_start|>", "<|im_end|>"), hidden=64)
    plan = Session(tiny, project="x").data(sample_data() / "train.jsonl", eval=40).template("chatml")
    plan = plan.options(batch_size=8, gradient_accumulation=1, max_seq_length=128, epochs=2, eval_steps=25)
    for name, lr in (("runs/lr-3e-4", 3e-4), ("runs/lr-1e-3", 1e-3), ("runs/lr-3e-3", 3e-3)):
        if not Path(name).exists(): plan.options(project_name=name, lr=lr).fit()
        yield name


def widget_pictures(run="runs/home-assistant"):
    "The panels, as JupyterLab shows them: preview_widget.png, chat.png, compare.png."
    here, runs = Path.cwd(), list(compared())
    load = f"import os; os.chdir({str(here)!r}); from sftkit import Run, Session, compare, sample_data, sample_model; "
    cells = dict(preview_widget='Session(sample_model(), project="home-assistant").data(sample_data()/"train.jsonl", eval=sample_data()/"test.jsonl").template("chatml").options(max_seq_length=48).preview(2)',
                 chat=f'Run.open({run!r}).chat(max_new_tokens=48)', compare=f"compare(*map(Run.open, {runs!r}))")
    def asked(page): # two questions in wordings that are not in the data
        for text in ("somebody left the light on in the hall, switch it off please", "now dim the kitchen lights to 20%"):
            page.locator(".sft-p textarea").fill(text)
            page.locator(".sft-p textarea").press("Enter")
            page.wait_for_timeout(300)
            page.wait_for_function("() => document.querySelector('.sft-p').dataset.busy === 'false'", timeout=300_000)
        page.evaluate("() => document.activeElement.blur()")
    def beside(page):
        page.locator("button[data-template=llama]").click()
        page.wait_for_function("() => document.querySelector('.sft-p').dataset.columns === '2'")
        page.locator(".v-t.special").nth(2).hover()
    with tempfile.TemporaryDirectory() as folder, lab(folder) as server:
        for dark in (False, True): # the theme is a setting of the server: first all in the light
            for name, act in dict(preview_widget=beside, chat=asked, compare=lambda page: None).items():
                if not dark: write_notebook(Path(folder) / f"{name}.ipynb", [load + cells[name]])
                with notebook(server, f"{name}.ipynb", width=1000, height=1100, dark=dark, scale=1.5) as nb:
                    if not dark:
                        nb.run_all(seconds=300)
                        nb.save() # opened again in the dark, while its kernel lives
                    nb.page.wait_for_selector(".sft-p :is(.v-one, textarea, .m-chart path)", timeout=120_000)
                    if not dark or act is beside: act(nb.page)
                    nb.page.wait_for_timeout(800)
                    nb.page.locator(".sft-p").screenshot(path=DOCS / f"{name}.png" if not dark else Path(tempfile.gettempdir()) / f"sftkit-{name}-dark.png")


def live_picture(steps=230):
    "live.png: a tiny random model in its worker process, in the middle of training, as JupyterLab shows it."
    cell = """from sftkit import Session, sample_data
plan = Session("tiny", project="home-assistant").data(sample_data()/"train.jsonl", eval=40).template("chatml")
run = plan.options(batch_size=8, gradient_accumulation=1, max_seq_length=128, epochs=4, lr=2e-3, eval_steps=50, save_steps=100).start()"""
    with tempfile.TemporaryDirectory() as folder, lab(folder) as server:
        save_tiny(Path(folder) / "tiny", extra=("<|im_start|>", "<|im_end|>"), hidden=64)
        write_notebook(Path(folder) / "live.ipynb", [cell])
        with notebook(server, "live.ipynb", width=1000, height=1400, scale=1.5) as nb:
            nb.run_all()
            nb.page.wait_for_function("n => +document.querySelector('.sft-live')?.dataset.step >= n", arg=steps, timeout=300_000)
            nb.page.locator("button[data-command=pause]").click()            # so that the picture is not of a moment that is gone
            nb.page.wait_for_timeout(1500)
            nb.page.locator("button[data-command=resume]").click()
            nb.page.wait_for_timeout(700)
            nb.page.evaluate("() => document.querySelector('.sft-samples').open = false")
            nb.page.locator(".sft-live").screenshot(path=DOCS / "live.png")
            nb.page.locator("button[data-command=stop]").click()
            nb.page.wait_for_function("() => document.querySelector('.sft-badge').textContent.includes('stopped')", timeout=60_000)


def main():
    live_picture()
    widget_pictures()
    run, rows = Run.open("runs/home-assistant"), [json.loads(line) for line in open(sample_data() / "test.jsonl", encoding="utf-8")]
    screenshot(run._repr_html_(), DOCS / "curve.png", 800)
    answers = run.versus_base(rows, max_new_tokens=40)
    exact = {name: sum(a[name].strip() == a["reference"] for a in answers) for name in ("base", "tuned")}
    history = run.history
    plan_event = next(e for e in run.events if e["kind"] == "plan")
    import torch
    facts = dict(requests=len(rows), base_exact=exact["base"], tuned_exact=exact["tuned"], steps=len(history), seconds=float(run.events[-1]["t"] - plan_event["t"]), date=time.strftime("%Y-%m-%d"),
                 cpus=os.cpu_count(), machine=platform.machine(), torch=torch.__version__, command="make demo", answers=[dict(a) for a in answers[:6]])
    (DOCS / "demo.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print({k: v for k, v in facts.items() if k != "answers"})


if __name__ == "__main__":
    main()
