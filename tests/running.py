"""What the tests that train share: plans over the small chat, a run's steps, the loss by hand, waiting, and how a process is started."""
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable                    # as new as a process can be; in tests, `sys.executable` is that of warm.py


def chat_plan(model, project, source, eval=None, **fields):
    "A plan in the chatml format with a learning rate at which a tiny model moves."
    from sftkit import Session
    return Session(model, project=project, **{**dict(chat_template="chatml", lr=1e-2), **fields}).data(source, eval=eval)


def steps(run, field="loss"): return [e[field] for e in run.events if e["kind"] == "step"]
def losses(run): return steps(run)


def nats_by_hand(
    model, # in eval mode, or without dropout
    rows, # (ids, labels) of one document each, without padding
)->tuple: # mean nats per trained token, trained tokens
    "Cross-entropy of the trained tokens, row by row from full logits in float64, each label against the position before it."
    import torch
    total, count = 0.0, 0
    for ids, labels in rows:
        ids = torch.as_tensor(ids)
        with torch.no_grad(): logp = model(ids[None]).logits[0].double().log_softmax(-1)
        for i in range(1, len(ids)):
            if labels[i] != -100: total, count = total - logp[i - 1, labels[i]].item(), count + 1
    return total / count, count


def real_rows(batches):
    "(ids, labels) of each row of padded batches, without the padding."
    return [(ids[mask], labels[mask]) for b in batches for ids, mask, labels in zip(b["input_ids"], b["attention_mask"].bool(), b["labels"])]


def until(
    true, # called until it returns something true
    seconds=60,
    every=0.02,
):
    "Wait for something; an AssertionError if it does not come."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(every)


def environment(
    *without, # prefixes of names that are left out
    **more, # names that are set
)->dict:
    "The environment of a process that is started: this checkout's sftkit, and not the ranks of a process group that this process may be in."
    without = ("WORLD_SIZE", "RANK", "LOCAL_RANK", *without)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {k: v for k, v in os.environ.items() if not k.startswith(without)} | {"PYTHONPATH": path} | more
