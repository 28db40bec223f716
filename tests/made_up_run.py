"""Made-up event streams: a curve from a formula, no training. Test data for the views."""
import math, random


def made_up_run(steps=300, total=None, seed=0, state="finished"):
    "Events of a run of `steps` steps out of `total`, ending in `state`."
    rnd, out, t = random.Random(seed), [], 1_760_000_000.0
    total = total or steps
    def add(kind, dt=0.0, **fields):
        nonlocal t
        t += dt
        out.append({"t": t, "kind": kind, **fields})
    add("state", state="starting", step=0)
    add("plan", 1.2, model="HuggingFaceTB/SmolLM2-135M-Instruct", total_steps=total, epochs=3, rows=600, eval_rows=60, trainable_parameters=4_884_480,
        total_parameters=139_399_488, device="cpu", dtype="float32", trained_tokens=57_000, batch_tokens=8192, limit_bytes=17_179_869_184)
    add("state", state="training", step=0)
    add("sample", when="before", prompt="Turn on the kitchen light.", reference="light.on(kitchen)", text="I'm sorry, but as a language model I cannot")
    for i in range(1, steps + 1):
        loss = 1.1 + 2.4 * math.exp(-5 * i / total) + rnd.gauss(0, 0.13)
        warm = min(1.0, i / (0.1 * total + 1e-9)) * (1 - i / (total + 1))
        add("step", 0.31, step=i, epoch=round(3 * i / total, 3), loss=round(loss, 4), lr=5e-5 * warm, grad_norm=round(abs(rnd.gauss(1.4, 0.3)), 3), tokens=190, seq_tokens=512, seconds=0.31)
        if i % max(total // 6, 1) == 0:
            add("eval", 0.8, step=i, loss=round(loss + 0.1, 4), perplexity=round(math.exp(loss + 0.1), 3))
            add("checkpoint", 0.1, step=i, path=f"checkpoint-{i}")
        if i % 10 == 1: add("memory", step=i, device="cpu", allocated_bytes=3_400_000_000 + 9_000_000 * (i % 50), reserved_bytes=4_100_000_000, peak_bytes=5_200_000_000, limit_bytes=17_179_869_184, rss_bytes=3_400_000_000)
    if state == "finished": add("sample", when="after", prompt="Turn on the kitchen light.", reference="light.on(kitchen)", text="light.on(kitchen)")
    if state: add("state", 0.2, state=state, step=steps, **({"error": "CUDA out of memory. Tried to allocate 2.00 GiB"} if state == "failed" else {}))
    return out
