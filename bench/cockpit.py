"""What the live view costs: python bench/cockpit.py [--seconds 4]

Three things, on made-up runs (no model, no browser): the time one recorded step takes in the training process with and without a view in another thread, how many
messages a second go to the front end, and how large the saved static form is.
"""
import argparse, json, platform, statistics, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

from made_up_run import made_up_run
from sftkit.events import EventLog
from sftkit.view import Progress, run_html
from sftkit.widgets import LiveView, Publisher


class Counted:
    "The widget without a page: what it would send is serialised and counted."
    interval = 0.2
    def __init__(self): self.messages, self.bytes = 0, 0
    def start(self, progress):
        self.view = LiveView("bench", progress=progress)
        self.view.send = self._send
    def _send(self, content, buffers=None): self.messages += 1; self.bytes += len(json.dumps(content))
    def push(self, events, progress): self.view.push(events)
    def finish(self, progress): self.view.close()


def recording(seconds, before, view, rate=20):
    "Milliseconds that each recorded step takes in the training thread (a view works in another), and what the view sent."
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"; run.mkdir()
        log = EventLog(run / "events.jsonl")
        for e in made_up_run(before, total=before * 2, state="") if before else []: log.append(**{k: v for k, v in e.items() if k != "t"})
        counted = Counted()
        publisher = Publisher(run, counted) if view else None
        if view: publisher.start()
        taken, begin, step = [], time.perf_counter(), before
        while time.perf_counter() - begin < seconds:
            step += 1
            at = time.perf_counter()
            log.append("step", step=step, loss=2.0, lr=1e-4, grad_norm=1.0, tokens=190, seq_tokens=512, seconds=1 / rate, epoch=0.1)
            taken.append(1000 * (time.perf_counter() - at))
            time.sleep(1 / rate)
        wall = time.perf_counter() - begin
        sent = counted.messages, counted.bytes
        if view: publisher.finish()
        log.close()
    return taken, sent[0] / wall, sent[1] / max(sent[0], 1)


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seconds", type=float, default=4.0, help="length of each recording")
    seconds = ask.parse_args().seconds
    packages = ", ".join(f"{n} {version(n)}" for n in ("anywidget", "ipywidgets"))
    print(f"{time.strftime('%Y-%m-%d')} · Python {platform.python_version()}, {packages} · {platform.machine()} · `python bench/cockpit.py --seconds {seconds:g}`\n")
    print("| steps before | view | ms per recorded step, median | mean | most | messages/s | bytes per message |")
    print("|---|---|---|---|---|---|---|")
    for before in (0, 10_000):
        for view in (False, True):
            taken, rate, size = recording(seconds, before, view)
            print(f"| {before:,} | {'widget' if view else 'none'} | {statistics.median(taken):.3f} | {statistics.mean(taken):.3f} | {max(taken):.2f} | {rate:.1f} | {size:,.0f} |", flush=True)
    print("\n| steps | static form, bytes |\n|---|---|")
    for steps in (100, 10_000): print(f"| {steps:,} | {len(run_html(Progress(made_up_run(steps))).encode()):,} |")


if __name__ == "__main__": main()
