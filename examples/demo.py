"""Fine-tune a small model on a CPU and show what it learned: `make demo`."""
import json
import time

from sftkit import Session, sample_data, sample_model

ROWS = [json.loads(line) for line in open(sample_data() / "test.jsonl", encoding="utf-8")]


def main():
    plan = (Session(sample_model(), project="runs/home-assistant")
            .data(sample_data() / "train.jsonl", eval=sample_data() / "test.jsonl")
            .template("chatml")          # the model's own format, without its default system message, which costs 20 tokens a row
            .lora(r=16, dropout=0)        # on a CPU, drawing the random numbers of dropout takes a quarter of the time
            .options(epochs=0.75, batch_size=4, gradient_accumulation=1, lr=1e-3, gradient_checkpointing="auto"))
    print(plan, plan.preview(n=1), sep="\n\n")

    start = time.perf_counter()
    run = plan.fit()
    seconds = time.perf_counter() - start

    print(f"\nAnswering {len(ROWS)} held-out requests, in wordings never seen in training, before and after:")
    answers = run.versus_base(ROWS, max_new_tokens=40)
    for row in answers[:8]:
        print(f"\n  request  {row['prompt']}\n  base     {' '.join(row['base'].split())[:90]}\n  tuned    {row['tuned']}" + ("" if row["tuned"] == row["reference"] else f"\n  expected {row['reference']}"))
    before, after = (sum(row[name].strip() == row["reference"] for row in answers) for name in ("base", "tuned"))
    print(f"\nExactly right: base {before} of {len(ROWS)}, tuned {after} of {len(ROWS)} ({after / len(ROWS):.0%}), after {seconds:.0f} s of training.")
    print(f"Report: {run.report()}")


if __name__ == "__main__":
    main()
