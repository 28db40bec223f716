"""The stream of events, the run directory, and files that appear whole: what hostile files, full disks and several writers do to them."""
import json
import os
import resource
import threading

import pytest
from sftkit import Recipe, events, launch
from sftkit.events import EventLog, RunDirectory, read_events, replay, this_process
from sftkit.recipe import RunError, write_atomic
from sftkit.charts import Progress


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_write_that_is_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    log, real = EventLog(tmp_path/"events.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    log.append("note", text="ü" * 100)
    log.append("note", text="b")
    assert [e["text"] for e in read_events(log.path)[0]] == ["ü" * 100, "b"]


def test_a_full_disk_leaves_no_half_line(tmp_path):
    log = EventLog(tmp_path/"events.jsonl")
    log.append("note", text="a" * 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        with pytest.raises(OSError): log.append("note", text="b" * 1000)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.append("note", text="c")
    assert [e["text"][0] for e in read_events(log.path)[0]] == ["a", "c"]


@pytest.mark.parametrize("bad", ['{"t": 1, "kind": "st{"t": 2, "kind": "note"}', "nonsense", "5", '{"t": 1}', '{"kind": []}', "[" * 100_000])
def test_a_line_that_is_no_event_is_named(tmp_path, bad):
    path = tmp_path/"run"/"events.jsonl"
    write(path, {"t": 1, "kind": "note"}, {"t": 2, "kind": "note"})
    _, offset = read_events(path)
    with open(path, "a") as f: f.write("\n" + bad + "\n" + '{"t": 4, "kind": "note"}\n')
    for start in (0, offset):
        with pytest.raises(RunError, match="Line 4 of `.*events.jsonl`") as told: read_events(path, start)
        assert len(str(told.value)) < 1000
    with pytest.raises(RunError, match="Line 4"): RunDirectory(tmp_path/"run").status()
    path.write_text(path.read_text().replace(bad + "\n", ""))              # as the message says
    assert len(read_events(path, offset)[0]) == 1


def test_status_reads_only_what_is_new(tmp_path, monkeypatch):
    log, run = EventLog(tmp_path/"events.jsonl"), RunDirectory(tmp_path)
    log.append("state", state="training", step=0, **this_process())
    for i in range(1, 1001): log.append("step", step=i, loss=1.0)
    parsed, real = [], json.loads
    monkeypatch.setattr(events.json, "loads", lambda text, **more: parsed.append(1) or real(text, **more))
    assert run.status()["state"] == "training" and len(parsed) >= 1001
    parsed.clear()
    assert run.is_running() and run.status()["state"] == "training" and len(parsed) < 5
    log.append("state", state="paused", step=1000, **this_process())
    assert run.status()["state"] == "paused" and len(parsed) < 10


def test_status_of_another_run_that_took_the_name(tmp_path):
    run = RunDirectory(tmp_path/"run")
    assert run.status() == {}
    write(run.events_path, {"t": 1.0, "kind": "state", "state": "stopped"}, *({"t": 2.0, "kind": "step", "step": i} for i in range(50)))
    assert run.status()["state"] == "stopped"
    os.replace(tmp_path/"run", tmp_path/"run.1")
    assert run.status() == {}
    write(run.events_path, {"t": 3.0, "kind": "state", "state": "finished"})
    assert run.status()["state"] == "finished"
    write(run.events_path, {"t": 4.0, "kind": "state", "state": "failed"}, *({"t": 4.0, "kind": "step", "step": i} for i in range(500)))              # in place: the same inode
    assert run.status()["state"] == "failed"


def test_a_death_is_told_once_the_process_is_gone(tmp_path):
    log, run = EventLog(tmp_path/"events.jsonl"), RunDirectory(tmp_path)
    log.append("state", state="training", step=0, **this_process())
    assert run.status()["state"] == "training"
    log.append("step", step=3, loss=1.0)
    log.append("state", state="training", step=3, **{**this_process(), "started": 1.0})
    error = run.status()["error"]
    assert "at step 3" in error and error.count("`") % 2 == 0 and f'`Run.open("{tmp_path}").resume()`' in error


RESUMED = [dict(kind="state", state="training", step=0), dict(kind="checkpoint", step=2, path="checkpoint-2"),
           *(e for i in range(1, 6) for e in (dict(kind="step", step=i, loss=float(i), tokens=10), dict(kind="memory", step=i, allocated_bytes=i), dict(kind="sample", when=i, prompt="p", text=str(i)))),
           dict(kind="eval", step=4, loss=1.0), dict(kind="checkpoint", step=4, path="checkpoint-4"), dict(kind="oom", step=5, text="smaller"), dict(kind="note", text="kept"),
           dict(kind="state", state="training", step=2), dict(kind="step", step=3, loss=9.0, tokens=10)]


def test_what_a_resume_undoes_is_the_same_for_all_readers():
    from sftkit.events import undone
    assert [k for k in ("step", "eval", "memory", "checkpoint", "note", "oom", "state", "plan") if undone({"kind": k, "step": 3}, 2)] == ["step", "eval", "memory", "checkpoint", "note"]
    assert undone({"kind": "scores", "when": "after", "step": 2}, 2) and not undone({"kind": "note"}, 2)
    assert undone({"kind": "sample", "when": 3}, 2) and not undone({"kind": "sample", "when": "before"}, 2) and not undone({"kind": "step", "step": 2}, 2)
    whole, kept = Progress(RESUMED), replay(RESUMED)
    of = lambda kind: [e for e in kept if e["kind"] == kind]
    assert whole.steps == of("step") and [e["step"] for e in whole.steps] == [1, 2, 3] and whole.evals == of("eval") == []
    assert whole.memories == of("memory") and len(whole.memories) == 2 and whole.samples == of("sample") and len(whole.samples) == 2 and whole.trained_tokens == 30
    assert [m["step"] for m in whole.marks if m["kind"] == "checkpoint"] == [e["step"] for e in of("checkpoint")] == [2]
    assert of("note") and of("oom") and [m for m in whole.marks if m["kind"] == "out of memory"]


def test_the_log_is_opened_before_there_is_a_worker_and_its_start_is_the_first_thing_written(tmp_path, monkeypatch):
    "Opening reads the file and cuts off an unfinished line, which may be one that the worker is writing."
    run, order = RunDirectory(tmp_path/"run"), []
    run.path.mkdir()
    class Log(EventLog):
        def __init__(self, path): order.append("open"); super().__init__(path)
        def append(self, kind, **fields): order.append(fields["state"]); return super().append(kind, **fields)
    class Worker:
        pid = os.getpid()
        def __init__(self, *args, **more): order.append("worker")
        def wait(self): return 0
    monkeypatch.setattr(launch, "EventLog", Log)
    monkeypatch.setattr(launch.subprocess, "Popen", Worker)
    monkeypatch.setattr(RunDirectory, "events", lambda self: order.append("read") or [])
    launch.start_worker(Recipe(model="m", data_path="d", project_name=str(run.path)), run).join(5)
    assert order[-3:] == ["open", "worker", "starting"] and run.status()["pid"] == os.getpid()


def test_opening_a_log_cuts_only_the_unfinished_line(tmp_path):
    for kept in ("", '{"kind": "note"}\n', '{"kind": "note", "text": "' + "x" * 200_000 + '"}\n'):
        for half in ("", "{", '{"kind": "' + "y" * 150_000):
            path = tmp_path/"events.jsonl"
            path.write_text(kept + half)
            EventLog(path).close()
            assert path.read_text() == kept


# -- files that appear whole -----------------------------------------------------------------------------------------------------

def test_a_failing_write_leaves_what_was_there_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path/"recipe.yaml"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError): write_atomic(path, "new \ud800")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["recipe.yaml"]


def test_two_threads_may_write_the_same_file(tmp_path, monkeypatch):
    path, flush, first = tmp_path/"report.html", os.fsync, threading.Event()
    def fsync(fd):
        flush(fd)
        if first.is_set(): return
        first.set()
        other = threading.Thread(target=write_atomic, args=(path, "second")); other.start(); other.join()
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(path, "first")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["report.html"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o027)
    try: write_atomic(tmp_path/"a", "text")
    finally: os.umask(before)
    assert (tmp_path/"a").stat().st_mode & 0o777 == 0o640
