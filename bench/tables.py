"""Markdown tables of what the benchmarks found: python bench/tables.py FILE.json ...

Takes what `bench/gpu.py --out` and `bench/memory.py --json` write; the tables of GPU.md are its output.
"""
import json
import sys
from pathlib import Path


def checks(found):
    "A row for each check of `bench/gpu.py`, with the figures behind it."
    yield "| check | holds | figures |\n|---|---|---|"
    for f in found:
        number = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
        figures = ", ".join(f"{k.replace('_', ' ')} {number(v)}" for k, v in f.items() if k not in ("check", "ok"))
        yield f"| {f['check']} | {'yes' if f['ok'] else '**no**'} | {figures} |"


def forecasts(found):
    "A row for each configuration of `bench/memory.py`: what was said before the run and measured in it, GiB."
    yield "| run | forecast | measured | |\n|---|---|---|---|"
    for f in found:
        said, was = f["forecast"] / 2**30, f["measured"] / 2**30
        yield f"| {f['name']} | {said:.2f} | {was:.2f} | {said / was - 1:+.1%} |"


if __name__ == "__main__":
    merged = []
    for found in (json.loads(Path(file).read_text()) for file in sys.argv[1:]):
        if isinstance(found, list): merged += found
        else: print("\n".join(forecasts(found["found"])), "\n")
    if merged: print("\n".join(checks(merged)))
