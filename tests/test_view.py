"""Views are pure functions: what they say is checked against values worked out here, and what they emit is parsed, not eyeballed."""
import base64, json, math, random, re, time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
import pytest
from made_up_run import made_up_run
from sftkit import charts, view
from sftkit.events import replay
from sftkit.charts import (Average, Progress, Thinned, clip, compare_curves, curve_svg, decimate, gauge_html, history_figure, html_escape, human_bytes, human_number, human_seconds,
                           nice_ticks, series)
from sftkit.view import compare_html, forecast_html, plan_html, plan_text, preview_html, preview_text, report_html, run_html, run_text

EVIL = "</div></td></table><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover=\"x' \u202egpj.exe\x00\u2028\ud800 & 🤗"
ALLOWED = {"div", "span", "b", "bdi", "code", "img", "table", "tr", "td", "th", "thead", "tbody"}
VOID = {"img", "meta"}


class Page(HTMLParser):
    "Collects tags, attributes and text, and insists that tags nest."
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = set(), [], [], []
        self.feed(html); self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag); self.attributes += attrs
        if tag not in VOID: self._open.append(tag)

    def handle_startendtag(self, tag, attrs): self.tags.add(tag); self.attributes += attrs
    def handle_endtag(self, tag): assert self._open.pop() == tag
    def handle_data(self, data): self.text.append(data)

    @property
    def words(self): return " ".join(" ".join(self.text).split())


def safe(html):
    page = Page(html)
    assert page.tags <= ALLOWED, page.tags - ALLOWED
    assert {name for name, _ in page.attributes} <= {"style", "title", "src", "alt"}
    for c in "\x00\u202e\u2028\ud800": assert c not in html
    html.encode("utf-8")
    return page


def images(html): return [base64.b64decode(m).decode() for m in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)]


# --- text and numbers

def test_escape_shows_what_hides():
    assert html_escape("<a b='c'>\u202e\x00\u2066\t\n") == "&lt;a b=&#x27;c&#x27;&gt;⟨U+202E⟩⟨U+0000⟩⟨U+2066⟩\t\n"
    assert html_escape("é漢🤗שלום") == "é漢🤗שלום"

def test_clip_counts():
    assert clip("a" * 100_000, 10) == "aaaaaaaaaa… 99,990 more characters" and clip("abc", 3) == "abc"

@pytest.mark.parametrize("n, said", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB"), (200 * 2**30, "200 GiB"), (None, "–")])
def test_human_bytes(n, said): assert human_bytes(n) == said

@pytest.mark.parametrize("s, said", [(0, "0.0 s"), (9.94, "9.9 s"), (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (90061, "1 d 1 h"), (None, "–"), (math.inf, "–")])
def test_human_seconds(s, said): assert human_seconds(s) == said

@pytest.mark.parametrize("x, said", [(5e-5, "5e-05"), (999, "999"), (12345, "12,345"), (134_515_008, "134.5 M"), (1.08349, "1.083"), (math.nan, "–"), (None, "–"), (12345.6, "12,346")])
def test_human_number(x, said): assert human_number(x) == said


# --- curves

@pytest.mark.parametrize("seed", range(5))
def test_decimation_keeps_extremes_ends_and_gaps(seed):
    rnd = random.Random(seed)
    y = [rnd.gauss(0, 1) for _ in range(rnd.randrange(3000, 9000))]
    low, high, gap = rnd.sample(range(1, len(y) - 1), 3)
    y[low], y[high], y[gap] = -99.0, 99.0, math.nan
    kept = decimate(y, 500)
    assert {0, low, high, gap, len(y) - 1} <= set(kept) and len(kept) <= 500 and kept == sorted(set(kept))

def test_decimation_leaves_short_curves_alone(): assert decimate([1.0, math.nan, 3.0], 2000) == [0, 1, 2]

@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000, 12_345])
def test_a_growing_curve_keeps_what_a_whole_one_keeps(n):
    rnd = random.Random(n)
    y, grown = [rnd.gauss(0, 1) for _ in range(n)], Thinned(64)
    if n > 100: y[n // 3], y[n // 2], y[n - 7] = -99.0, 99.0, math.nan
    for i, v in enumerate(y):
        grown.add(v)
        if i % 97 == 0: assert grown.keep(500)[-1] == i                                      # it may be looked at meanwhile
    kept = grown.keep(500)
    assert kept[0] == 0 and kept[-1] == n - 1 and kept == sorted(set(kept)) and len(kept) <= 3 * 64 + 2
    if n <= 64: assert kept == list(range(n))
    if n > 100: assert {n // 3, n // 2, n - 7} <= set(kept)
    assert sum(map(len, grown.stretches)) <= 3 * 64                                     # however long the curve

def smooth(y, span=None):
    average = Average(span)
    return [average.add(v) for v in y]

def test_smoothing_is_the_bias_corrected_average():
    y, b = [4.0, 2.0, 3.0], math.exp(-1 / 2) # by definition: sum of b^(n-i) (1-b) y_i over 1 - b^n
    for n in (1, 2, 3):
        by_hand = sum(b ** (n - i) * (1 - b) * y[i - 1] for i in range(1, n + 1)) / (1 - b ** n)
        assert smooth(y, span=2)[n - 1] == pytest.approx(by_hand)
    assert smooth([7.0] * 50)[-1] == pytest.approx(7.0)

def test_smoothing_over_a_span_that_grows_with_the_run():
    y = [random.Random(0).gauss(0, 1) for _ in range(400)]
    mean = weight = 0.0
    for n, v in enumerate(y, 1):
        b = math.exp(-1 / max(3, n / 40))                                                    # a fortieth of the steps so far
        mean, weight = b * mean + (1 - b) * v, b * weight + 1 - b
    assert smooth(y)[-1] == pytest.approx(mean / weight) and smooth(y[:100]) == smooth(y)[:100]      # what is drawn stays

def test_smoothing_passes_over_nan():
    out = smooth([math.nan, 5.0, math.nan])
    assert math.isnan(out[0]) and out[1:] == [5.0, 5.0]

@pytest.mark.parametrize("low, high", [(0, 1), (0.9, 3.7), (1e-7, 2e-7), (-5, 5), (0, 1e9), (3, 3)])
def test_ticks_are_inside_and_even(low, high):
    t = nice_ticks(low, high)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in t) and len(t) <= 12
    assert len({round(b - a, 12) for a, b in zip(t, t[1:])}) <= 1
    whole = nice_ticks(low, high, whole=True)
    assert all(v == int(v) and low - 1e-9 <= v <= high + 1e-9 for v in whole)

def test_series_names_and_values():
    s = series(made_up_run(20))
    assert set(s) == {"loss", "smooth_loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "memory"}
    assert s["tokens_per_second"][1][0] == pytest.approx(512 / 0.31) and s["loss"][0] == list(range(1, 21)) and s["memory"][0] == [1, 11]
    assert all(x == [] and y == [] for x, y in series([]).values())

def test_null_loss_is_a_gap():
    events = [{"kind": "step", "step": i, "loss": None if i == 2 else 1.0} for i in (1, 2, 3)]
    assert math.isnan(series(events)["loss"][1][1]) and [m["kind"] for m in Progress(events).marks] == ["not finite"]


# --- progress

def test_facts():
    f = Progress(made_up_run(300)).facts()
    assert (f["step"], f["total_steps"], f["state"], f["rows"], f["trained_tokens"], f["peak_bytes"]) == (300, 300, "finished", 600, 57_000, 5_200_000_000)
    assert f["tokens_per_second"] == pytest.approx(512 / 0.31) and f["left"] is None
    assert f["elapsed"] == pytest.approx(1.2 + 300 * 0.31 + 6 * 0.9 + 0.2, abs=0.01) # plan, steps, 6 evaluations with checkpoints, the end

def test_time_left(): assert Progress(made_up_run(100, total=300, state="")).facts()["left"] == pytest.approx(200 * 0.31)

def test_time_between_runs_is_not_counted():
    first = made_up_run(50, total=100, state="interrupted")
    day_later = [{"t": first[-1]["t"] + 86_400, "kind": "state", "state": "starting"}, {"t": first[-1]["t"] + 86_402, "kind": "state", "state": "training", "step": 50}]
    assert Progress(first + day_later).elapsed == pytest.approx(Progress(first).elapsed + 2)
    killed = first[:-1] # a killed run says nothing before its next start
    assert Progress(killed + day_later).elapsed == pytest.approx(Progress(killed).elapsed + 2)

def test_a_resume_counts_what_replay_keeps():
    events = made_up_run(120, total=300, state="interrupted") + [{"t": 2e9, "kind": "state", "state": "starting"}, {"t": 2e9, "kind": "state", "state": "training", "step": 100}]
    events += [e for e in made_up_run(300, seed=1) if e["kind"] in ("step", "eval") and e["step"] > 100]
    whole, kept = Progress(events), Progress(replay(events))
    assert [e["step"] for e in whole.steps] == list(range(1, 301)) and whole.facts()["trained_tokens"] == 300 * 190
    assert [e["loss"] for e in whole.steps] == [e["loss"] for e in kept.steps] and whole.evals == kept.evals
    assert [m["kind"] for m in whole.marks if m["kind"] != "checkpoint"] == ["interrupted", "resumed"]

def test_feeding_in_pieces_is_feeding_at_once():
    events, p = made_up_run(200), Progress()
    for e in events: p.add([e])
    assert p.facts() == Progress(events).facts() and p.marks == Progress(events).marks

def test_curves_may_be_looked_at_while_they_grow():
    events = made_up_run(2500, total=6000, state="interrupted") + [{"kind": "state", "state": "training", "step": 2400}]
    events += [{"kind": "eval", "step": 2400, "loss": 9.0}] + [e for e in made_up_run(6000, seed=1) if e["kind"] in ("step", "eval", "memory") and e["step"] > 2400]
    p = Progress()
    for i in range(0, len(events), 53):
        p.add(events[i:i + 53])
        series(p, 300)
    whole = Progress(events)
    assert series(p, 300) == series(whole, 300) and compare_curves(p) == compare_curves(whole) and p.facts() == whole.facts()
    x, y = series(p, 300)["loss"]
    by_step = {e["step"]: e["loss"] for e in p.steps}
    assert x == sorted(set(x)) and y == [by_step[s] for s in x] and min(y) == min(by_step.values()) and max(y) == max(by_step.values()) and len(by_step) == 6000

def test_what_a_look_costs_does_not_grow_with_the_run():
    def seconds(n):
        p, least = Progress(made_up_run(n, total=10**6, state="")), math.inf
        run_html(p, max_points=400)
        for i in range(8):
            p.add([{"kind": "step", "step": n + i + 1, "loss": 1.0, "lr": 1e-5, "grad_norm": 1.0, "tokens": 10, "seconds": 0.1}, {"kind": "eval", "step": n + i + 1, "loss": 1.0}])
            began = time.thread_time()
            p.facts(); run_html(p, max_points=400); compare_curves(p, 400)
            least = min(least, time.thread_time() - began)
        return least
    assert seconds(60_000) < 2.5 * seconds(4_000)


def test_what_went_wrong_stays_said():
    say = lambda text, level="info", **more: {"kind": "note", "level": level, "text": text, **more}
    events = made_up_run(60, total=100, state="")
    events[2:2] = [say("rows were held out", "warning")]
    events += [{"kind": "oom", "step": 60, "text": "Memory ran out; half a batch from now on."}, *[say(f"note {i}") for i in range(20)], say("note 19"), {"t": 2e9, "kind": "state", "state": "finished", "step": 60}]
    before, p = Progress(events).marks, Progress(events + [say("Merged model in Merged('out')."), say("Uploaded to https://example.org")])
    assert [(n["kind"], n["step"], n["text"]) for n in p.notes] == [("warning", None, "rows were held out"), ("out of memory", 60, "Memory ran out; half a batch from now on."), ("note", 60, "note 18"),
        ("note", 60, "note 19"), ("note", None, "Merged model in Merged('out')."), ("note", None, "Uploaded to https://example.org")]
    assert p.marks == before and {m["kind"] for m in before} == {"checkpoint", "out of memory", "note"}          # what is said before the first step, or after the end, is no place on the curve
    for html in (run_html(p), report_html(p, {})):
        for words in ("rows were held out", "step 60: Memory ran out; half a batch", "step 60: note 19", "Uploaded to"): assert words in Page(html.replace("<!doctype html>", "")).words
    assert Progress(events[:-2] + [say("The best step is kept.", when="after")]).notes[-1]["step"] is None
    back = p.add([say("at step 60", step=60), {"kind": "state", "state": "training", "step": 50}])
    assert "at step 60" not in [n["text"] for n in back.notes] and "out of memory" in [n["kind"] for n in back.notes]

def test_no_time_is_left_after_the_last_step():
    going = lambda n: Progress(made_up_run(n, total=100, state="") + [{"kind": "doing", "text": "answering 3 prompts"}])
    assert "time left" in run_text(going(99)) and going(100).facts()["left"] is None and "time left" not in run_text(going(100)) + run_html(going(100))


# --- the chart

def odd_runs():
    nan = made_up_run(40)
    for e in nan:
        if e["kind"] == "step": e["loss"] = None
    spike = made_up_run(200)
    next(e for e in spike if e.get("step") == 90)["loss"] = 1e30
    flat = [{"kind": "step", "step": i, "loss": 2.0} for i in range(1, 30)]
    return {"empty": [], "one": made_up_run(1), "three": made_up_run(3), "all nan": nan, "spike": spike, "flat": flat, "zero": [{"kind": "step", "step": 1, "loss": 0.0}],
            "negative": [{"kind": "step", "step": i, "loss": -float(i)} for i in range(1, 20)], "many marks": made_up_run(60) + [{"kind": "note", "level": "warning", "text": EVIL}] * 40,
            "late start": [{"kind": "step", "step": 10_000_000 + i, "loss": 1.0 + i} for i in range(20)]}

@pytest.mark.parametrize("name", odd_runs())
def test_the_chart_is_well_formed_for(name):
    p = Progress(odd_runs()[name])
    svg = curve_svg(series(p), p.marks)
    root = ET.fromstring(svg)
    assert "nan" not in svg.lower().replace("not finite", "") and "inf" not in svg.replace("not finite", "")
    for e in root.iter():
        for k in ("x", "cx", "x1", "x2"):
            if e.get(k): assert -60 <= float(e.get(k)) <= 720, (e.tag, k, e.get(k))

def test_a_spike_is_cut_and_named():
    p = Progress(odd_runs()["spike"])
    assert "▲" in curve_svg(series(p), p.marks) and "▲" not in curve_svg(series(made_up_run(200)))

def test_the_curve_falls_when_loss_falls():
    svg = curve_svg(series([{"kind": "step", "step": i, "loss": 10.0 - i} for i in range(1, 6)]))
    heights = [float(c.get("cy")) for c in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")]
    assert len(heights) == 5 and heights == sorted(heights) # down the page


# --- HTML forms

@pytest.mark.parametrize("name", odd_runs())
def test_run_forms_of(name):
    events = odd_runs()[name]
    safe(run_html(events, title=EVIL))
    for svg in images(run_html(events)): ET.fromstring(svg)
    assert "\n" not in run_text(events) and "\x1b" not in run_text(events)

def test_run_html_of_a_hostile_run():
    events = [{"kind": "plan", "model": EVIL, "device": EVIL, "rows": 3}, {"kind": "memory", "device": EVIL, "allocated_bytes": 1, "limit_bytes": 2}, {"kind": "note", "level": "info", "text": EVIL},
              {"kind": "sample", "when": "before", "prompt": EVIL, "text": EVIL * 1000}, {"kind": "state", "state": "failed", "error": EVIL + "A" * 100_000}]
    page = safe(run_html(events, EVIL))
    assert "more characters" in page.words and len(run_html(events)) < 40_000

def test_run_html_reads_without_styles():
    words = safe(run_html(made_up_run(300), "kitchen")).words
    for part in ("kitchen ✓ finished", "step 300", "memory peak 4.8 GiB", "trained tokens 57,000 in 3 epochs", "rows 600"): assert part in words

def test_run_html_is_small_for_a_long_run(): assert len(run_html(made_up_run(10_000))) < 200_000

def test_run_text_of_a_failure(): assert run_text(made_up_run(3, state="failed")).endswith("CUDA out of memory. Tried to allocate 2.00 GiB")

def test_gauge():
    page = safe(gauge_html(dict(device="NVIDIA <H100>", allocated_bytes=70 * 2**30, reserved_bytes=72 * 2**30, peak_bytes=78 * 2**30, limit_bytes=80 * 2**30)))
    assert "70.0 GiB in use · 72.0 GiB reserved · peak 78.0 GiB of 80.0 GiB (98%) · nearly full" in page.words
    assert gauge_html({}) == "" and safe(gauge_html({"allocated_bytes": 5}))

GIB = 2**30
def gauge(used=9, reserved=10, peak=12, limit=80, **more): return dict(device="GPU", allocated_bytes=used * GIB, reserved_bytes=reserved * GIB, peak_bytes=peak * GIB, limit_bytes=limit * GIB, **more)

@pytest.mark.parametrize("memory, end", [(gauge(), 15), (gauge(forecast_bytes=20 * GIB), 25), (gauge(reserved=16), 20), (gauge(peak=27), 80), (gauge(forecast_bytes=90 * GIB), 80), (gauge(limit=30), 30)])
def test_a_gauge_is_legible_far_from_the_limit(memory, end):
    f = charts.gauge_facts(memory)
    assert f["peak"] == pytest.approx(memory["peak_bytes"] / GIB / end, abs=1e-4) and f["used"] == pytest.approx(9 / end, abs=1e-4) and (f"the bar ends at {end}.0 GiB" in f["words"]) == (end != memory["limit_bytes"] / GIB)
    assert f"of {memory['limit_bytes'] / GIB:.1f} GiB (" in f["words"] and f["words"] in safe(gauge_html(memory)).words

def test_a_gauge_says_what_its_colours_are_in_the_words_of_the_forecast():
    from sftkit.memory import _LABELS
    memory = gauge(forecast_bytes=11 * GIB, parts=dict(weights=6 * GIB, adapter=GIB, optimizer=2 * GIB, gradients=GIB))
    html, (svg,) = gauge_html(memory), images(gauge_html(memory))
    parts = charts.memory_parts(memory)
    assert [(name, size // GIB) for name, size, _ in parts] == [(_LABELS[n], s) for n, s in dict(weights=6, adapter=1, optimizer=2, gradients=1).items()] + [("activations and rest", 2)]
    assert charts.memory_parts({**memory, "device": "cpu"})[-1][0] == f"{_LABELS['activations']}, {_LABELS['process']}"
    for name, size, ink in parts: assert f"{name} {human_bytes(size)}" in safe(html).words and f"background:{ink}" in html and ink in svg # each has an entry, in its colour
    for name in ("weights", "adapter", "optimizer", "gradients", "activations"): assert f"background:{charts.PART_INKS[name]}" in forecast_html(forecast() | dict(parts={name: GIB}, labels={name: name}))
    assert "▼ forecast 11.0 GiB" in safe(html).words and "in use now, fainter: reserved" in safe(html).words
    pointer = [e.get("fill") for e in ET.fromstring(svg).iter() if e.get("width") == "1.6" or e.get("d")]
    assert len(pointer) == 2 and pointer[0] not in {ink for *_, ink in parts}                                   # it stands in the midst of them: 11 of the 12 GiB that were needed

def test_plan_forms():
    plan = dict(title=EVIL, rows=[("model", "a\nb"), (EVIL, EVIL)], warnings=[EVIL])
    assert "⚠" in safe(plan_html(plan)).words
    text = plan_text(dict(title="t", rows=[("model", "a\nb"), ("x", 3)], warnings=["careful"]))
    assert text.splitlines() == ["t", "  model  a", "         b", "  x      3", "  ! careful"] and safe(plan_html({}))

def test_compare_ticks_only_what_is_equal():
    rows = [dict(prompt="p", reference="yes", base="no", tuned=" yes\n"), dict(prompt=EVIL, reference=None, base=EVIL, tuned=None), dict(prompt="q", reference="", base="", tuned="")]
    page = safe(compare_html(rows))
    assert page.words.count("✓") == 2 and "✓ exactly the reference: base 0 of 3, tuned 1 of 3" in page.words # one row, one sum
    assert "58 more rows" in safe(compare_html([dict(prompt="p", base="b", tuned="t")] * 60, max_rows=2)).words and safe(compare_html([]))


# --- the forecast

def forecast(total=30, limit=24, verdict="does not fit"):
    parts = {"weights": (total - 10) * 2**30, "activations": 10 * 2**30}
    return dict(total_bytes=total * 2**30, peak_bytes=total * 2**30, limit_bytes=limit * 2**30, parts=parts, labels={"weights": "weights", "activations": EVIL}, moment="backward pass", verdict=verdict,
                sentence=f"{verdict}: {total}.0 GiB of {limit}.0 GiB on {EVIL}", details=["Highest in the backward pass.", EVIL])

def test_a_forecast_is_a_bar_with_the_limit_and_what_would_help():
    html = forecast_html(forecast(), [("batch_size=1", 20 * 2**30, True), (f"lr={EVIL}", 29 * 2**30, False)])
    words, styles = safe(html).words, [v for k, v in Page(html).attributes if k == "style"]
    assert "does not fit: 30.0 GiB of 24.0 GiB" in words and "What would help batch_size=1 : 20.0 GiB ✓" in words and ": 29.0 GiB" in words and words.count("✓") == 1
    assert any("width:66.667%" in s for s in styles) and any("width:33.333%" in s for s in styles) and any("left:calc(80.000% - 2px)" in s for s in styles) # of the larger: the whole
    roomy = forecast_html(forecast(total=12, limit=24, verdict="fits"))
    assert "What would help" not in roomy and "width:8.333%" in roomy and "left:calc(100.000% - 2px)" in roomy # of the larger: the limit
    assert "weights: 20.0 GiB (67%)" in titles(html)

def test_the_forecast_of_a_plan_is_drawn_so(tiny, chat_file):
    from sftkit import Session
    from sftkit.memory import Forecast
    said = Session(tiny, project="p").data(chat_file).memory(device_bytes=2**20)
    html = said._repr_html_()
    assert isinstance(said, Forecast) and html == forecast_html(said.facts(), [(r.code, r.total_bytes, r.fits) for r in said.remedies]) and "does not fit" in html and safe(html)
    assert json.loads(json.dumps(said.facts())) == said.facts()


# --- the preview

def row(text, pieces, trained=(), limit=None, roles=None, where=None):
    "An encoded row whose tokens are `pieces` of `text`, in order; a repeated piece marked with + is a further part of the same character."
    offsets, at = [], 0
    for p in pieces:
        if p == "+": offsets.append(offsets[-1]); continue
        at = text.index(p, at); offsets.append((at, at + len(p))); at += len(p)
    ids = list(range(100, 100 + len(pieces)))
    labels = [t if i in trained else -100 for i, t in enumerate(ids)]
    limit = limit or len(ids)
    out = dict(text=text, input_ids=ids[:limit], labels=labels[:limit], roles=(roles or ["assistant"] * len(ids))[:limit], cut_ids=ids[limit:], cut_labels=labels[limit:], offsets=offsets)
    return out | ({"where": where} if where else {})

def titles(html): return [v for k, v in Page(html).attributes if k == "title"]

def test_every_token_has_its_box():
    r = row("<|user|>hi 🤗 ok", ["<|user|>", "hi", " ", "🤗", "+", "+", " ok"], trained={6}, roles=["template", "user", "user", "user", "user", "user", "assistant"])
    html = preview_html([r], str)
    assert titles(html) == ["id 100 · template · not trained · special", "id 101 · user · not trained", "id 102 · user · not trained", "id 103 · user · not trained",
                            "id 104 · user · not trained · a further part of the character before", "id 105 · user · not trained · a further part of the character before", "id 106 · assistant · trained"]
    assert html.count("🤗") == 1 and "1 of 7 tokens are trained" in safe(html).words

def test_cut_tokens_are_struck_through_and_counted():
    r = row("a b c d", ["a", " b", " c", " d"], trained={1, 2, 3}, limit=2)
    html = preview_html([r], str, stats=dict(rows=600, trained_tokens=3, total_tokens=9, cut_rows=1, lost_rows=["row 4", "row 9"], max_seq_length=2))
    assert "whole data: 3 of 9 tokens are trained (33%) in 598 of 600 rows · 1 row of 600 is cut at 2 · ⚠ 2 rows have no trained token" in safe(html).words and html.count("line-through") == 2 # the stretch and the legend
    assert titles(html)[2:] == ["id 102 · beyond the limit · cut off", "id 103 · beyond the limit · cut off"]

@pytest.mark.parametrize("stats, said", [(None, "2 of 8 tokens are trained in these 2 rows"), (dict(rows=2, trained_tokens=2, total_tokens=8), "whole data: 2 of 8 tokens are trained (25%) in 2 rows"),
    (dict(rows=1, trained_tokens=1, total_tokens=4, lost_rows=[]), "whole data: 1 of 4 tokens are trained (25%) in 1 row"),
    (dict(rows=3, trained_tokens=2, total_tokens=8, lost_rows=["row 3"]), "whole data: 2 of 8 tokens are trained (25%) in 2 of 3 rows · ⚠ 1 row has no trained token: row 3"),
    (dict(rows=9, trained_tokens=2, total_tokens=8, lost_rows=["a", "b", "c", "d"]), "whole data: 2 of 8 tokens are trained (25%) in 5 of 9 rows · ⚠ 4 rows have no trained token: a, b, c, …")])
def test_the_headline_of_a_preview_makes_one_statement(stats, said):
    rows = [row("a b c d", ["a", " b", " c", " d"], trained={1})] * 2
    assert view.preview_headline(rows, stats or {}) == said and f" {said} " in safe(preview_html(rows, str, stats=stats)).words
    assert view.preview_headline(rows[:1], {}) == "1 of 4 tokens are trained in this row"

def test_an_appended_eos_is_decoded():
    r = row("ab", ["ab"], trained={0}) | dict(input_ids=[100, 2], labels=[-100, 2], roles=["text", "eos"], offsets=[(0, 2), (2, 2)])
    assert "</s>" in safe(preview_html([r], {2: "</s>"}.get)).text and "eos              ● </s>" in preview_text([r], {2: "</s>"}.get)

def test_text_that_no_token_covers_is_still_shown():
    r = row("a   b", ["a", "b"])
    assert "".join(Page(preview_html([r], str)).text).endswith("a···b") and "a   b" in preview_text([r], str)

def test_whitespace_is_readable():
    page = safe(preview_html([row("a\n\tb  ", ["a", "\n", "\t", "b", "  "])], str))
    assert page.text[-5:] == ["a", "↵\n", "→\t", "b", "··"]

def test_trained_differs_without_colour():
    html = preview_html([row("ab", ["a", "b"], trained={1})], str)
    colourless = re.sub(r"(background|color):[^;\"]+", "", html)
    assert "font-weight:600" in colourless and "2px solid" in colourless and "1px dotted" in colourless

def test_long_rows_are_clipped_around_the_cut():
    text = "x" * 5000
    r = row(text, ["x"] * 5000, limit=4000)
    html = preview_html([r], str, max_tokens=400)
    shown = [t for t in titles(html) if t.startswith("id")]
    assert len(shown) == 400 and "id 4099 · assistant · not trained" in shown and "id 4100 · beyond the limit · cut off" in shown and "4,600" not in html
    left_out = sum(int(n.replace(",", "")) for n in re.findall(r"… ([\d,]+) more tokens", html))
    assert left_out == 4600 and len(html) < 100_000

def plain_row(n, word="word ", **kw): return row(word * n, [word] * n, trained=set(range(n // 2, n)), roles=["user"] * (n // 2) + ["assistant"] * (n - n // 2), **kw)

BIG = {"twenty long rows": [plain_row(2048)] * 20, "one row": [plain_row(30_000)], "many rows": [plain_row(40)] * 2000, "wide tokens": [plain_row(600, "<&" * 150)] * 20,
       "hidden characters": [row("\u202e" * 9000, ["\u202e" * 15] * 600, where="\u202e" * 300)] * 300, "right to left": [plain_row(2048, "שלום ")] * 20,
       "a role for each token": [row("ab " * 600, ["ab "] * 600, roles=[f"<b>{i} {'r' * 500}" for i in range(600)])] * 20, "special tokens": [plain_row(2048, "<|im_start|>")] * 20}

@pytest.mark.parametrize("name", BIG)
def test_a_preview_stays_small_whatever_it_is_given(name):
    html, text = preview_html(BIG[name], str), preview_text(BIG[name], str)
    page = safe(html)
    assert len(html.encode()) < 200_000 and len(text.encode()) < 200_000
    assert any(t.startswith("id 100 ") for t in titles(html)), "the first tokens tell their id"
    shown = html.count("tokens trained") # a head for each row
    left_out = re.search(r"([\d,]+) more rows? (?:is|are) not shown", page.words)
    assert shown + (int(left_out[1].replace(",", "")) if left_out else 0) == len(BIG[name])

def test_tokens_without_an_id_are_still_told_apart():
    html = preview_html([plain_row(2048)] * 20, str)
    words = safe(html).words
    said = int(re.search(r"ids of the first (\d+) tokens", words)[1])
    assert len([t for t in titles(html) if t.startswith("id ")]) == 20 * said and said >= 20
    assert html.count("word ") == 20 * 600 and html.count("┊word ") == 20 * (600 - said) # each token, hovered or not, has an edge
    small = preview_html([plain_row(300)], str)
    assert "┊" not in small and "ids of the first" not in small and len([t for t in titles(small) if t.startswith("id ")]) == 300

def test_one_enormous_token(): assert len(preview_html([row("y" * 100_000, ["y" * 100_000])], str)) < 5_000

def test_hostile_rows():
    r = row(EVIL, list(EVIL), where=EVIL, roles=[EVIL] * len(EVIL))
    page = safe(preview_html([r], str, title=EVIL))
    assert "script" not in page.tags and "\x1b" not in preview_text([r], str) and "\u202e" not in preview_text([r], str)

def test_terminal_variant_is_only_colour():
    r = row("a b", ["a", " b"], trained={1})
    ansi = preview_text([r], str, ansi=True)
    assert "\x1b[1;7m" in ansi and re.sub(r"\x1b\[[\d;]*m", "", ansi) == preview_text([r], str)

def test_the_preview_of_a_real_encoder():
    from tiny import tiny_tokenizer
    from sftkit.chat import resolve_template
    from sftkit.data import Encoder, detect_shape
    from sftkit.rows import Row
    tok = tiny_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    data = {"messages": [{"role": "user", "content": "what is it 🤗?\n<b>"}, {"role": "assistant", "content": "the kitchen light 🤗"}]}
    encoder = Encoder(tok, detect_shape([Row(data, "row 1")]), resolve_template("chatml", tok), max_seq_length=40)
    enc = encoder(data)
    html = preview_html([enc], lambda i: tok.decode([i]))
    assert len(titles(html)) == len(enc["input_ids"]) + len(enc["cut_ids"]) and safe(html)
    assert sum("· trained" in t for t in titles(html)) == sum(v != -100 for v in enc["labels"])
    trained = "".join(line.split("● ")[1] for line in preview_text([enc], lambda i: tok.decode([i])).splitlines()[3:] if "● " in line)
    assert trained and enc["text"].replace("\n", "↵").find(trained) > 0


# --- report and figure

SECRET = "hf_" + "aB3" * 10

def report(**kw):
    recipe = dict(model="m", lr=5e-5, add_eos_token=True, token="plain-secret", hub_token="another-secret", note=f"see {SECRET}", data_path=EVIL, target_modules=["q_proj"], versions={"torch": "2.13"}, hardware={"gpu": EVIL})
    return report_html(made_up_run(50), recipe, title=EVIL, preview=preview_html([row("ab", ["a", "b"])], str), **kw)

def test_report_holds_no_secret():
    html = report()
    assert "plain-secret" not in html and "another-secret" not in html and SECRET not in html and "add_eos_token" in html

def test_report_stands_alone():
    html = report()
    page = Page(html.replace("<!doctype html>", ""))
    assert "script" not in page.tags and "link" not in page.tags and not re.search(r"(src|href)=\"(?!data:)", html) and "@import" not in html and "url(" not in html
    for part in ("Before and after", "light.on(kitchen)", "Recipe", "Made with", "2.13", "Data, as it was trained"): assert part in page.words

def test_report_prefers_the_comparison_given(): assert "only this one" in report(comparison=[dict(prompt="only this one", base="b", tuned="t")])

def test_history_figure():
    fig = history_figure(made_up_run(3000), max_points=500)
    assert [t.name for t in fig.data] == ["loss of each step", "smoothed", "evaluation", "learning rate", "gradient norm"] and len(fig.data[0].x) <= 500
    assert fig.data[4].yaxis == "y3" and json.loads(fig.to_json())
    broken = history_figure([{"kind": "step", "step": i, "loss": None if i == 2 else 1.0} for i in (1, 2, 3)])
    assert broken.data[0].y[1] is None
    assert history_figure([]) is not None

def test_a_figure_of_several_runs_is_thinned_with_its_extremes():
    events = made_up_run(10_000); events[5000]["loss"], events[6000]["loss"], EVIL_NAME = 77.0, None, "a\u202e<b>" + "x" * 999
    fig = charts.compare_figure({EVIL_NAME: events, "b": made_up_run(30)})
    assert [len(t.x) <= 2000 for t in fig.data] == [True] * 4 and max(v for v in fig.data[0].y if v is not None) == 77.0 and None in fig.data[0].y and len(fig.data[2].x) == 30
    assert "\u202e" not in fig.data[0].name and len(fig.data[0].name) < 300 and len(fig.to_json()) < 120_000

@pytest.mark.parametrize("shown", ["plotly_mimetype+notebook", "plotly_mimetype", "vscode", "colab", "browser"])
def test_a_figure_is_stored_as_its_numbers_and_a_picture_without_plotly_itself(shown, monkeypatch):
    import pickle
    import plotly.graph_objects as go
    import plotly.io
    from IPython.core.interactiveshell import InteractiveShell
    monkeypatch.setattr(plotly.io.renderers, "_default_name", shown)
    monkeypatch.setattr(plotly.io, "show", lambda fig: asked.append(fig))
    asked, events = [], list(made_up_run(10_000))
    for fig in history_figure(events), charts.compare_figure({"a\u202e<b>": events, "b": made_up_run(30)}):
        bundle, _ = InteractiveShell.instance().display_formatter.format(fig)
        if shown in ("colab", "browser"): assert bundle == {} and asked.pop() is fig; continue
        assert asked == [] and set(bundle) == {"application/vnd.plotly.v1+json", "text/html", "text/plain"} and len(json.dumps(bundle)) < 200_000
        picture, drawn = bundle["text/html"], bundle["application/vnd.plotly.v1+json"]
        assert "<img" in picture and "<script" not in picture and "data:image/svg+xml;base64," in picture and drawn["data"] and drawn["layout"]
        assert type(again := pickle.loads(pickle.dumps(fig))) is go.Figure and again.to_dict().keys() == fig.to_dict().keys()


# --- scores, panels, and rows that mean harm

def test_evaluation_metrics_stand_in_the_table():
    evals = [{"kind": "eval", "step": 1, "loss": 2.0, "bleu": 5.0, EVIL: 1.0, "note": EVIL, "rougeL": None}, {"kind": "eval", "step": 2, "loss": 1.0, "bleu": 12.5, "rougeL": 0.5, "exact_match": 0.25}]
    words = safe(run_html([{"kind": "step", "step": 1, "loss": 2.0, "ce": 2.0, "kl": 0.5}] + evals)).words
    assert "bleu 5 → 12.5 · " in words and "rougeL 0.5" in words and "exact_match 0.25" in words and "ce 2 · kl 0.5" in words

@pytest.mark.parametrize("name", odd_runs())
def test_the_panels_are_well_formed_for(name):
    svg = view.panels_svg(series(odd_runs()[name]))
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg

@pytest.mark.parametrize("last, highest", [(4.583e-4, 4.583e-4), (4.583e-4, 5.017e-4), (1.2345e-5, 0.001), (0.0001875, 0.003)])
def test_the_words_of_a_panel_do_not_run_into_each_other(last, highest):
    steps = [{"kind": "step", "step": i, "loss": 1.0, "lr": lr, "grad_norm": lr, "seconds": 0.01, "tokens": 123_456_789} for i, lr in enumerate((1e-6, highest, last), 1)]
    texts = [(float(e.get("x")), e.get("text-anchor"), e.text, float(e.get("font-size"))) for e in ET.fromstring(view.panels_svg(series(steps))).iter("{http://www.w3.org/2000/svg}text")]
    spans = sorted((x, x + 0.575 * size * len(t)) if anchor == "start" else (x - 0.575 * size * len(t), x) for x, anchor, t, size in texts) # DejaVu Sans, the widest of the fonts asked for
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), texts

def test_numbers_of_compared_runs_stand_where_their_lines_end():
    runs = {f"run {i}": compare_curves([{"kind": "step", "step": s, "loss": 4 - s / 100 + i / 100} for s in range(1, last)]) for i, last in enumerate((300, 300, 150))}
    texts = [(e.text, float(e.get("x")), float(e.get("y"))) for e in ET.fromstring(view.compare_svg(runs)).iter("{http://www.w3.org/2000/svg}text") if e.get("font-weight") == "600"]
    lines = [re.findall(r"[ML]([\d.]+) ([\d.]+)", e.get("d"))[-1] for e in ET.fromstring(view.compare_svg(runs)).iter("{http://www.w3.org/2000/svg}path")]
    at = {name: (x, y) for name, x, y in texts}
    for name, (x, y) in zip("123", lines): assert at[name][0] == pytest.approx(float(x) + 8, abs=0.2) and -0.2 < at[name][1] - float(y) - 4 < 14.2
    assert at["3"][1] == pytest.approx(float(lines[2][1]) + 4, abs=0.2) and abs(at["1"][1] - at["2"][1]) >= 13      # apart where they would meet, and only there

def test_checkpoints_stay_apart_and_the_last_is_drawn():
    steps = [{"kind": "step", "step": s, "loss": 4 - s / 300} for s in range(1, 301)] + [{"kind": "checkpoint", "step": s} for s in range(1, 301)]
    svg = ET.fromstring(view.curve_svg(series(steps), Progress(steps).marks))
    at = sorted(float(re.match(r"M([\d.]+) ", e.get("d"))[1]) for e in svg.iter("{http://www.w3.org/2000/svg}path") if e.get("d").endswith("z"))
    assert 20 < len(at) < 80 and min(b - a for a, b in zip(at, at[1:])) >= 8.9 and at[-1] == pytest.approx(640 - 64 - 4, abs=0.2)

@pytest.mark.parametrize("loss, evals", [(0.0, 0.0), (0.001, 0.0), (0.0, 3.0)])
def test_numbers_at_the_ends_of_curves_stand_above_the_axis_and_apart(loss, evals):
    steps = [{"kind": "step", "step": s, "loss": 4.0 * (s < 290) + loss * (s >= 290)} for s in range(1, 601)] + [{"kind": "eval", "step": 600, "loss": evals}]
    ends = [float(e.get("y")) for e in ET.fromstring(view.curve_svg(series(steps))).iter("{http://www.w3.org/2000/svg}text") if e.get("font-weight") == "600"]
    assert len(ends) == 2 and max(ends) <= 250 - 42 - 5 and abs(ends[0] - ends[1]) >= 13

def test_blank_answers_take_one_line_wherever_they_are_shown():
    rows, turns = [dict(prompt="p", base="\n \n\n", tuned="yes\n\n\n")], [dict(user="p", base="\n\n", tuned="yes\n\n", note="")]
    for text in (compare_html(rows), view.transcript_html(turns), view.transcript_text(turns)): assert "(blank)" in text and "yes\n\n" not in text and "\n\n" not in text
    assert "\n\n" in view.transcript_html([dict(user="p", base=None, tuned="yes\n\n", note="…")])          # what is being written is left alone

def test_marks_are_thinned_but_trouble_stays():
    marks = [{"step": i, "kind": "failed" if i == 7 else "checkpoint", "label": "x"} for i in range(5000)]
    kept = view.few_marks(marks, 100)
    assert len(kept) == 100 and kept[0]["kind"] == "failed" and kept[-1]["step"] == 4999 and view.few_marks(marks[:3], 100) == marks[:3]

@pytest.mark.parametrize("text", [EVIL, "</div>" * 50, "\u202e\u2066\u200f", "z" * 100_000, "🤗👩‍👩‍👧", "\x00\x1b[31m", "<script>alert(1)</script>"])
def test_hostile_text_in_every_view(text):
    events = [{"kind": "plan", "model": text, "device": text, "dtype": text}, {"kind": "state", "state": text, "step": 0}, {"kind": "step", "step": 1, "loss": 1.0}, {"kind": "note", "level": "info", "text": text},
              {"kind": "eval", "step": 1, "loss": 1.0, text: 2.0}, {"kind": "memory", "device": text, "allocated_bytes": 1, "limit_bytes": 2}, {"kind": "sample", "when": "before", "prompt": text, "reference": text, "text": text},
              {"kind": "state", "state": "failed", "error": text, "step": 1}]
    r = row(text[:300], list(text[:300]), where=text, roles=[text[:50]] * 300)
    rows = [dict(prompt=text, reference=text, base=text, tuned=text)]
    for html in (run_html(events, text), compare_html(rows), plan_html(dict(title=text, rows=[(text, text)], warnings=[text])), gauge_html({"device": text, "allocated_bytes": 1}), preview_html([r], str, text)):
        safe(html)
        assert len(html) < 400_000
        for svg in images(html): ET.fromstring(svg)
    page = Page(report_html(events, {"model": text, "versions": {text: text}}, title=text, preview=preview_html([r], str)).replace("<!doctype html>", ""))
    assert "script" not in page.tags
    from sftkit.session import Comparison
    many = Comparison(rows * 100)
    for said in (run_text(events), plan_text(dict(title=text, rows=[(text, text)], warnings=[text])), preview_text([r], str, text), repr(many), view.compare_text(rows)):
        assert not set(said) & set("\x00\x1b\u202e\u2066\u200f\ud800") and len(said) < 400_000
    assert "50 more rows" in repr(many) and "50 more rows" in many._repr_html_() and all(re.match(r" *(prompt|reference|base|tuned): | {11}|✓|$", line) for line in repr(many).splitlines())
    assert view.compare_text([dict(prompt="a\n    tuned: b")]) == "   prompt: a\n" + " " * 15 + "tuned: b"

def test_views_import_nothing_heavy():
    import subprocess
    from running import PYTHON
    code = "import sys, sftkit.view; print([m for m in ('torch', 'transformers', 'ipywidgets', 'plotly', 'IPython', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True, cwd=Path(view.__file__).parent.parent).stdout.strip() == "[]"
