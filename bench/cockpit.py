"""What the live view costs the run that it shows: python bench/cockpit.py [--pairs 12] [--seconds 2] [--write]

Runs are made up (no model, no browser), the notebook kernel is a real one with a widget in it. A step is pure Python work of 50 ms, so it holds the interpreter
lock and whatever the view does in its thread delays it. Stretches with and without the view take turns, and three things are measured: how much longer a
step takes (the median over the pairs; on a machine that others use as well it is noise), how long the step's thread slept, which it does to wait for the lock
alone (Linux tells that apart from waiting for a processor), and how much processor time the other threads of the process took. The latter two are means, which
leave nothing out.
`--write` puts the table into docs/cockpit.md.
"""
import argparse, json, os, platform, queue, statistics, sys, tempfile, threading, time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))

from sftkit.charts import Progress
from sftkit.events import EventLog, made_up_run
from sftkit.view import run_html
from sftkit.widgets import Publisher, make_renderer

STEP = 0.05                                     # seconds: 20 steps a second
DOC = ROOT/"docs"/"cockpit.md"


class Switched(Publisher):
    "A publisher that can be told to rest, and that times itself. The time is of its own thread on the CPU: waiting for the lock is not in it."
    on, updates, cpu_seconds, messages, bytes = False, 0, 0.0, 0, 0

    def _tick(self):
        if not self.on:
            self.allowance.left = min(self.allowance.left, 0.0)       # what is saved up while it rests would be spent in the stretches that count
            return
        began, offset = time.thread_time(), self._offset
        super()._tick()
        if self._offset > offset: self.updates += 1; self.cpu_seconds += time.thread_time() - began

    def count_messages(self, view):
        send = view.send
        def counted(content, buffers=None):
            self.messages += 1; self.bytes += len(json.dumps(content))
            send(content, buffers)
        view.send = counted


def work(n): # pure Python: holds the interpreter lock
    x = 0
    for i in range(n): x += i & 7
    return x


def slept(): # seconds in which this thread neither ran nor waited for a processor
    ran, queued, _ = map(int, Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split())
    return time.perf_counter() - (ran + queued) / 1e9


def stretch(log, seconds, count, start): # -> seconds a step, share of the time that the thread slept, share of a processor that other threads took, steps
    steps, began, cpu, sleep = 0, time.perf_counter(), time.process_time() - time.thread_time(), slept()
    while time.perf_counter() - began < seconds:
        work(count)
        steps += 1
        log.append("step", step=start + steps, loss=2.0, lr=1e-4, grad_norm=1.0, tokens=190, seq_tokens=512, seconds=STEP, epoch=0.1)
    wall = time.perf_counter() - began
    return wall / steps, (slept() - sleep) / wall, (time.process_time() - time.thread_time() - cpu) / wall, steps


def contention(before, pairs, seconds): # runs in a kernel
    "What a view costs a run that has `before` steps behind it."
    began = time.perf_counter(); work(200_000)
    count = round(200_000 * STEP / (time.perf_counter() - began))
    with tempfile.TemporaryDirectory() as folder:
        run, unseen = Path(folder)/"run", Path(folder)/"unseen"
        run.mkdir(); unseen.mkdir()
        (run/"events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in made_up_run(before, total=before * 2, state="")))
        watched, other = EventLog(run/"events.jsonl"), EventLog(unseen/"events.jsonl")
        publisher = Switched(run, make_renderer(None, "run", print))
        publisher.count_messages(publisher.renderer.view)
        publisher.start()
        step, slower, waits, cpu, shown = before, [], [], [], 0.0
        stretch(other, seconds, count, 0)
        for pair in range(pairs):
            took, asleep, others = {}, {}, {}
            for on in (True, False) if pair % 2 else (False, True):
                publisher.on = on
                took[on], asleep[on], others[on], steps = stretch(watched if on else other, seconds, count, step)
                if on: step += steps; shown += steps * took[on]
            slower.append(took[True] / took[False] - 1); waits.append(asleep[True] - asleep[False]); cpu.append(others[True] - others[False])
        publisher.finish()
    return dict(slower=statistics.median(slower), waits=statistics.mean(waits), cpu=statistics.mean(cpu), updates=publisher.updates / shown,
                update_ms=1000 * publisher.cpu_seconds / max(publisher.updates, 1), messages=publisher.messages / shown,
                message_bytes=publisher.bytes / max(publisher.messages, 1))


def in_kernel(code, seconds): # -> what the code prints as JSON on its last line
    "Run code in a kernel of its own, as JupyterLab would start it, with a client that takes its messages."
    from jupyter_client.manager import start_new_kernel
    env = {**os.environ, "JPY_SESSION_NAME": "bench.ipynb", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"bench")])}
    env.pop("SFTKIT_RENDERER", None)
    manager, client = start_new_kernel(env=env)
    try:
        asked, text, end = client.execute(code), "", time.monotonic() + seconds
        while time.monotonic() < end:
            try: message = client.get_iopub_msg(timeout=1)
            except queue.Empty: continue
            if message["parent_header"].get("msg_id") != asked: continue
            kind, content = message["msg_type"], message["content"]
            if kind == "error": raise RuntimeError("\n".join(content["traceback"]))
            if kind == "stream": text += content["text"]
            if kind == "status" and content["execution_state"] == "idle": return json.loads(text.splitlines()[-1])
        raise TimeoutError(f"the kernel did not end within {seconds:g} seconds; it printed: {text[-2000:]}")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def machine():
    info = Path("/proc/cpuinfo")
    name = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), "") if info.exists() else ""
    return f"{os.cpu_count()} × {name or platform.machine()}"


def table(pairs, seconds):
    "The figures as Markdown lines, as they come."
    packages = ", ".join(f"{n} {version(n)}" for n in ("ipykernel", "anywidget", "ipywidgets"))
    command = f"`python bench/cockpit.py --pairs {pairs} --seconds {seconds:g} --write`"
    yield f"{time.strftime('%Y-%m-%d')} · {machine()} · Python {platform.python_version()}, {packages} · {command}\n"
    yield ("| steps before | a step takes longer by | it waits for the lock | CPU of all other threads | CPU per update | updates/s | messages/s | "
           "bytes per message | saved form |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for steps in (100, 1_000, 10_000, 100_000):
        f = in_kernel(f"import cockpit, json; print(); print(json.dumps(cockpit.contention({steps}, {pairs}, {seconds})))", 300 + 3 * pairs * seconds)
        saved = len(run_html(Progress(made_up_run(steps))).encode())
        yield (f"| {steps:,} | {f['slower']:.2%} | {f['waits']:.2%} | {f['cpu']:.2%} | {f['update_ms']:.2f} ms | {f['updates']:.1f} | "
               f"{f['messages']:.1f} | {f['message_bytes']:,.0f} | {saved / 1000:,.0f} kB |")


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--pairs", type=int, default=12, help="stretches with and without the view")
    ask.add_argument("--seconds", type=float, default=2.0, help="length of each")
    ask.add_argument("--write", action="store_true", help=f"put the table into {DOC.relative_to(ROOT)}")
    given = ask.parse_args()
    lines = []
    for line in table(given.pairs, given.seconds): print(line, flush=True); lines.append(line)
    if given.write:
        before, begin, rest = DOC.read_text().partition("<!-- made by bench/cockpit.py -->\n")
        DOC.write_text(before + begin + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->"):])


if __name__ == "__main__": main()
