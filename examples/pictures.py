"""Makes the pictures and figures of the README from the demo's run: `make demo`, then `make pictures`."""
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from sftkit import Run, Session, sample_data, sample_model
from sftkit.view import curve_svg, series, Progress

DOCS = Path(__file__).resolve().parent.parent / "docs"


def screenshot(html, path, width, height):
    "PNG of an HTML fragment, through Chromium."
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:14px;background:#fff;color:#222;font:14px system-ui,\'DejaVu Sans\',sans-serif">{html}', encoding="utf-8")
        subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2", f"--window-size={width},{height}",
                        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder}/profile",
                        f"--screenshot={path}", page.as_uri()], check=True, capture_output=True)


def main():
    run, rows = Run.open("runs/home-assistant"), [json.loads(line) for line in open(sample_data() / "test.jsonl", encoding="utf-8")]
    plan = Session(sample_model(), project="home-assistant").data(sample_data() / "train.jsonl", eval=sample_data() / "test.jsonl").template("chatml").lora(r=16, dropout=0)
    screenshot(plan.preview(n=2).html, DOCS / "preview.png", 960, 362)
    screenshot(run._repr_html_(), DOCS / "curve.png", 800, 500)
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
