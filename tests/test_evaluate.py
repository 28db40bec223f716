"""Perplexity against an independent full-logit computation, batched against single generation, metrics against their packages."""
import logging, math, time, types, warnings
import pytest
import torch
from transformers import GenerationConfig
import sftkit.evaluate as ev
from sftkit.evaluate import base_model, bleu, evaluate, exact_match, generate, inference, perplexity, rouge, stream
from sftkit.recipe import DataError, ModelError
from running import nats_by_hand
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tok(): return tiny_tokenizer()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tok):
    model = tiny_model(tok, cls=request.param)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.mul_(6)  # far from uniform logits, so that a wrong mask or position shows
    return model.eval()


@pytest.fixture
def lora(tok):
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(tiny_model(tok), config)


def examples(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(4, 30, (1,), generator=g))
        ids = torch.randint(3, 400, (length,), generator=g).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=g))
        out.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    out[-1]["labels"][-1] = -100  # an unscored end
    out[0]["labels"] = [-100] + out[0]["input_ids"][1:]  # all scored
    return out


def by_hand(model, rows): return nats_by_hand(model, [(r["input_ids"], r["labels"]) for r in rows])


PROMPTS = [[5, 9, 20], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38], [100, 101], [50, 60, 70, 80, 90]]


def test_acceptance_18_perplexity_is_exp_of_the_mean_nats(model):
    rows = examples()
    loss, count = by_hand(model, rows)
    got = perplexity(model, rows, 2)
    assert got["trained_tokens"] == count
    assert got["loss"] == pytest.approx(loss, abs=1e-5) and got["perplexity"] == math.exp(got["loss"])


def test_perplexity_does_not_depend_on_batch_padding_or_order(model):
    rows = examples()
    want = perplexity(model, rows, 2)["loss"]
    for changed in (perplexity(model, rows, 2, batch_size=1), perplexity(model, rows, 77, batch_size=3), perplexity(model, rows[::-1], None, batch_size=4)):
        assert changed["loss"] == pytest.approx(want, abs=1e-6)
    mean_of_rows = sum(by_hand(model, [r])[0] for r in rows) / len(rows)
    assert abs(mean_of_rows - want) > 1e-3  # the test data can tell token-weighted from row-weighted


def test_unscored_positions_get_no_logits(model):
    ids, sizes = list(range(10, 40)), []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, given, out: sizes.append(given[0].shape))
    perplexity(model, [{"input_ids": ids, "labels": [-100] * 28 + ids[28:]}], 2)
    hook.remove()
    assert sizes == [(2, model.config.hidden_size)]                # hidden states of two positions, in one call


def test_capped_logits_are_the_models_own(tok):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                          final_logit_softcapping=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad(): model.lm_head.weight.mul_(20)
    assert perplexity(model, examples(), 2)["loss"] == pytest.approx(by_hand(model, examples())[0], abs=1e-5)


def test_perplexity_of_nothing_is_an_error(model):
    with pytest.raises(DataError, match="every label is -100"): perplexity(model, [], 0)
    with pytest.raises(DataError, match="without one trained token"): perplexity(model, [{"input_ids": [4, 5], "labels": [4, -100]}], 0)


def test_perplexity_beyond_float_is_infinite(model, monkeypatch):
    monkeypatch.setattr(ev, "token_loss_sum", lambda *a: torch.tensor(1e6))
    assert perplexity(model, examples(1), 0)["perplexity"] == math.inf


def test_state_is_restored_even_after_an_error(lora):
    lora.train()
    frozen = next(m for n, m in lora.named_modules() if n.endswith("q_proj.base_layer"))
    frozen.eval()
    before = {n: m.training for n, m in lora.named_modules()}
    lora.config.use_cache = False
    generation_config = lora.generation_config
    generate(lora, tiny_tokenizer(), PROMPTS[:2], max_new_tokens=2)
    perplexity(lora, examples(2), 0)
    with pytest.raises(RuntimeError), inference(lora): raise RuntimeError
    assert {n: m.training for n, m in lora.named_modules()} == before
    assert lora.config.use_cache is False and lora.generation_config is generation_config and lora.get_base_model().generation_config is generation_config


def test_batched_generation_equals_single(model, tok):
    together = generate(model, tok, PROMPTS, max_new_tokens=12, batch_size=5, stop_ids=[])
    alone = [generate(model, tok, [p], max_new_tokens=12, stop_ids=[])[0] for p in PROMPTS]
    assert together == alone == generate(model, tok, PROMPTS, max_new_tokens=12, batch_size=2, stop_ids=[])
    assert len(set(together)) >= 4  # the prompts do matter


def test_as_many_prompts_at_a_time_as_64_and_as_16384_tokens(model, tok, monkeypatch):
    sizes = []
    def answered(model, prompts, *rest): sizes.append(len(prompts)); return [[5]] * len(prompts)
    monkeypatch.setattr(ev, "_new_ids", answered)
    for prompts, more, want in (([[5] * 6] * 130, {}, [64, 64, 2]), ([[5] * 1000] * 30 + [[5] * 20] * 20, {}, [16, 16, 18]), ([[5] * 20_000] * 2, {}, [1, 1]),
                                ([[5] * 1000] * 8, dict(num_beams=4), [4, 4]), ([[5] * 1000] * 40, dict(batch_size=40), [40])):
        sizes.clear()
        monkeypatch.setattr(ev, "position_limit", lambda config: None)
        generate(model, tok, prompts, max_new_tokens=24, **more)
        assert sizes == want
    with pytest.raises(DataError, match="batch_size=0.*at least 1"): generate(model, tok, [[5]], batch_size=0)


def greedy(model, ids, n):
    "Greedy decoding without cache, batch or mask: what generation has to equal."
    ids = list(ids)
    with torch.no_grad():
        for _ in range(n): ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_generation_is_greedy_and_ends_at_each_stop_token(model, tok):
    for prompt in PROMPTS:
        new = greedy(model, prompt, 10)[len(prompt):]
        assert generate(model, tok, [prompt], max_new_tokens=10, stop_ids=[], skip_special_tokens=False) == [tok.decode(new, clean_up_tokenization_spaces=False)]
        for stop in (new[3], new[7]):
            want = tok.decode(new[:new.index(stop)], clean_up_tokenization_spaces=False)
            assert generate(model, tok, [prompt], max_new_tokens=10, stop_ids=[stop, 299999], skip_special_tokens=False) == [want]


def test_default_stops_are_those_of_tokenizer_and_model(tok):
    model = tiny_model(tok)
    new = greedy(model, PROMPTS[0], 6)[3:]
    model.generation_config.eos_token_id = [tok.eos_token_id, new[2]]
    assert generate(model, tok, PROMPTS[:1], max_new_tokens=6, skip_special_tokens=False) == [tok.decode(new[:new.index(new[2])], clean_up_tokenization_spaces=False)]


def test_on_text_reports_every_answer(model, tok):
    seen = {}
    answers = generate(model, tok, PROMPTS, max_new_tokens=4, batch_size=2, on_text=seen.__setitem__)
    assert [seen[i] for i in range(len(PROMPTS))] == answers


class Messages(logging.Handler):
    def __init__(self): super().__init__(logging.WARNING); self.texts = []
    def emit(self, record): self.texts.append(record.getMessage())


def test_the_models_own_settings_neither_leak_nor_warn(lora, tok, capfd):
    plain = generate(lora, tok, PROMPTS, max_new_tokens=10)
    lora.generation_config = lora.get_base_model().generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=20, repetition_penalty=5.0, min_new_tokens=9, eos_token_id=2)
    lora.train(); lora.gradient_checkpointing_enable({"use_reentrant": False}); lora.enable_input_require_grads()
    from transformers.utils import logging as hf_logging
    heard = Messages(); hf_logging.get_logger("transformers").addHandler(heard)
    pad = [p + [0] for p in PROMPTS[:3]] + [p + [tok.pad_token_id] for p in PROMPTS[3:]]
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(lora, tok, PROMPTS, max_new_tokens=10) == plain
        generate(lora, tok, pad, max_new_tokens=3)
        generate(lora, tok, PROMPTS[:2], max_new_tokens=3, temperature=0.7, top_p=0.9)
        "".join(stream(lora, tok, PROMPTS[0], max_new_tokens=3))
    hf_logging.get_logger("transformers").removeHandler(heard)
    assert heard.texts == [] and "".join(capfd.readouterr()) == ""
    assert lora.training and lora.get_base_model().generation_config.temperature == lora.generation_config.temperature == 0.6
    lora(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()  # still trains, with checkpointing
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)


def test_sampling_is_asked_for_by_naming_it(model, tok):
    torch.manual_seed(0)
    drawn = {generate(model, tok, PROMPTS[:1], max_new_tokens=8, temperature=1.5)[0] for _ in range(6)}
    assert len(drawn) > 1
    assert generate(model, tok, PROMPTS[:1], max_new_tokens=8, temperature=0, top_p=0.5) == generate(model, tok, PROMPTS[:1], max_new_tokens=8)
    assert ev._generation_config(4, {2}, {"temperature": 0.7}).top_k == 0


def test_generation_stops_where_positions_end(tok):
    model = tiny_model(tok, cls="gpt2")
    long = list(range(3, 403)) + list(range(3, 112))  # 509 of 512 positions
    both = generate(model, tok, [long, PROMPTS[0]], max_new_tokens=8, stop_ids=[], skip_special_tokens=False)
    assert both[0] == tok.decode(greedy(model, long, 3)[509:]) and both[1] == tok.decode(greedy(model, PROMPTS[0], 8)[3:])
    with pytest.raises(DataError, match="Prompt 1 has 512 tokens"): generate(model, tok, [PROMPTS[0], long + [4, 5, 6]])


def test_generate_errors_name_what_to_type(model, tok):
    with pytest.raises(ModelError, match="Did you mean `temperature`"): generate(model, tok, PROMPTS, temprature=1)
    with pytest.raises(ModelError, match="not a generation setting"): generate(model, tok, PROMPTS, num_return_sequences=2)
    with pytest.raises(ModelError, match="max_new_tokens=0"): generate(model, tok, PROMPTS, max_new_tokens=0)
    with pytest.raises(DataError, match="Prompt 1 is empty"): generate(model, tok, [[4], []])
    with pytest.raises(DataError, match="Prompt 0 is empty"): stream(model, tok, [])
    assert generate(model, tok, []) == []


def test_stream_pieces_join_to_the_answer(model, tok):
    for prompt in PROMPTS:
        pieces = list(stream(model, tok, prompt, max_new_tokens=12, stop_ids=[]))
        assert "".join(pieces) == generate(model, tok, [prompt], max_new_tokens=12, stop_ids=[])[0] and all(pieces)
        assert not any(p.endswith("\ufffd") for p in pieces[:-1])


def test_stream_raises_what_the_model_raises(tok):
    model = tiny_model(tok)
    model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken layer")))
    with pytest.raises(ValueError, match="broken layer"): list(stream(model, tok, PROMPTS[0]))


def test_closing_the_stream_stops_the_generation(tok):
    model, calls = tiny_model(tok).train(), []
    model.register_forward_pre_hook(lambda *_: (calls.append(1), time.sleep(0.005))[0])
    pieces = stream(model, tok, PROMPTS[0], max_new_tokens=3000, stop_ids=[])
    next(pieces); pieces.close()
    assert len(calls) < 200 and model.training
    count = len(calls); time.sleep(0.05)
    assert len(calls) == count


def test_base_model_is_the_model_behind_the_adapter(lora, tok):
    base, rows = tiny_model(tok), examples(3)  # same seed: the same weights
    tuned = perplexity(lora, rows, 0)["loss"]
    with base_model(lora) as model:
        assert perplexity(model, rows, 0)["loss"] == pytest.approx(perplexity(base, rows, 0)["loss"], abs=1e-6)
        assert generate(model, tok, PROMPTS, 5) == generate(base, tok, PROMPTS, 5)
    assert perplexity(lora, rows, 0)["loss"] == tuned != perplexity(base, rows, 0)["loss"]
    with pytest.raises(ModelError, match="has no adapter.*from_pretrained"):
        with base_model(base): pass


@pytest.mark.parametrize("tie", [True, False])
def test_base_model_has_the_untrained_token_rows(tok, tie):
    from peft import LoraConfig, get_peft_model
    base, rows, where = tiny_model(tok, tie=tie), examples(4), list(range(3, 60))
    spec = {"embed_tokens": where} if tie else {"embed_tokens": where, "lm_head": where}
    model = get_peft_model(tiny_model(tok, tie=tie), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=spec))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens" in name: p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    want = perplexity(base, rows, 0)["loss"]
    assert abs(perplexity(model, rows, 0)["loss"] - want) > 1e-3
    with base_model(model): assert perplexity(model, rows, 0)["loss"] == pytest.approx(want, abs=1e-6)


def test_base_model_of_an_adapter_that_transformers_loaded(lora, tok, tmp_path):
    from transformers import AutoModelForCausalLM
    tiny_model(tok).save_pretrained(tmp_path / "base"); lora.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapter"))
    rows = examples(3)
    tuned = perplexity(model, rows, 0)["loss"]
    assert tuned == pytest.approx(perplexity(lora, rows, 0)["loss"], abs=1e-6)
    with base_model(model): assert perplexity(model, rows, 0)["loss"] == pytest.approx(perplexity(tiny_model(tok), rows, 0)["loss"], abs=1e-6)
    assert perplexity(model, rows, 0)["loss"] == tuned


def test_exact_match_counts_and_checks():
    assert exact_match(["a ", "b", "C"], ["a", "\nb", "c"]) == pytest.approx(2 / 3)
    assert exact_match(["a  b"], ["a b"]) == 0
    with pytest.raises(DataError, match="2 predictions against 1"): exact_match(["a", "b"], ["a"])
    for metric in (exact_match, bleu, rouge):
        with pytest.raises(DataError, match="of no predictions"): metric([], [])


class PairEncoder:
    def __init__(self, tok): self.tok, self.seen = tok, []
    def __call__(self, row, where="row"):
        self.seen.append(where)
        p, c = self.tok(row["prompt"]).input_ids, self.tok(row["completion"]).input_ids + [self.tok.eos_token_id]
        return {"input_ids": p + c, "labels": [-100] * len(p) + c}
    def prompt(self, row): return self.tok(row["prompt"]).input_ids
    def reference(self, row): return row["completion"]


def test_the_encoder_of_training_is_what_evaluation_uses():
    from sftkit.chat import templates
    from sftkit.data import Encoder, detect_shape
    from sftkit.rows import read_rows
    tok = tiny_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    model, end = tiny_model(tok), tok.convert_tokens_to_ids("<|im_end|>")
    rows = read_rows([{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in (("what time is it?", "time to go"), ("hello", "hello world"))])
    encoder = Encoder(tok, detect_shape(rows), templates()["chatml"])
    got = evaluate(model, tok, rows, encoder, max_new_tokens=4, stop_ids=[end])
    assert [p["reference"] for p in got["predictions"]] == ["time to go", "hello world"]
    assert got["predictions"][1]["prompt"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert got["loss"] == pytest.approx(by_hand(model.eval(), [encoder(r.value, r.where) for r in rows])[0], abs=1e-5)
    text = read_rows([{"text": "only text here"}])
    with pytest.raises(DataError, match="no reference answer"): evaluate(model, tok, text, Encoder(tok, detect_shape(text), None))
    assert evaluate(model, tok, text, Encoder(tok, detect_shape(text), None), metrics="perplexity")["trained_tokens"] > 2


ROWS = [{"prompt": "what is a word?", "completion": "a word is a word"}, {"prompt": "time", "completion": "the light on"}, {"prompt": "turn off the light please", "completion": "other"}]


LEARNED = [("what is a word?", "a word is a thing that you say"), ("time", "the time is up for the day"), ("turn off the light please", "the light in the kitchen is off now")]
MEANT = [("what is a word?", "a word is some thing that you would like to write"), ("time", "the time is up for the day"), ("turn off the light please", "now the light is off in the kitchen")]


@pytest.fixture(scope="module")
def taught(tok):
    "A model that answers in words of its own, some of which are those of the reference."
    model, encoder = tiny_model(tok), PairEncoder(tok)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = [encoder({"prompt": q, "completion": a}) for q, a in LEARNED]
        sum(model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in rows).backward()
        optimizer.step(); optimizer.zero_grad()
    return model.eval()


def test_acceptance_18_scores_equal_the_packages_on_the_predictions(tok, taught):
    import sacrebleu
    from rouge_score import rouge_scorer
    encoder, rows = PairEncoder(tok), [{"prompt": q, "completion": a} for q, a in MEANT]
    got = evaluate(taught, tok, rows, encoder, metrics="perplexity, bleu,rouge,exact_match", max_new_tokens=30, batch_size=2)
    said, meant = [p["prediction"] for p in got["predictions"]], [p["reference"] for p in got["predictions"]]
    assert [(p["prompt"], p["reference"]) for p in got["predictions"]] == MEANT
    for row, answer in zip(rows, said):                                                  # greedy, and from the prompt alone
        ids = tok(row["prompt"]).input_ids
        new = greedy(taught, ids, 30)[len(ids):]
        assert answer == tok.decode(new[:new.index(tok.eos_token_id)], clean_up_tokenization_spaces=False)
    want = sacrebleu.corpus_bleu(said, [meant]).score
    assert got["bleu"] == want and 20 < want < 90 and abs(want - sacrebleu.corpus_bleu(meant, [said]).score) > 1e-3
    assert abs(want - sum(sacrebleu.sentence_bleu(s, [m]).score for s, m in zip(said, meant)) / 3) > 1e-3        # of the corpus, not a mean of rows
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    wanted = {kind: sum(scorer.score(m, s)[kind].fmeasure for s, m in zip(said, meant)) / 3 for kind in ("rouge1", "rouge2", "rougeL")}
    assert {kind: got[kind] for kind in wanted} == pytest.approx(wanted) and all(0.3 < v < 1 for v in wanted.values()) and len(set(wanted.values())) == 3
    assert got["exact_match"] == pytest.approx(1 / 3) and got["loss"] == pytest.approx(by_hand(taught, [encoder(r) for r in rows])[0], abs=1e-5)


def test_bleu_and_rouge_of_texts_that_differ():
    import sacrebleu
    said, meant = ["The cat sat on a mat today .", "hello world"], ["the cat sat on the mat today .", "hello there world"]
    assert bleu(said, meant) == sacrebleu.corpus_bleu(said, [meant]).score and 10 < bleu(said, meant) < bleu([s.lower() for s in said], meant) < 90
    assert bleu(meant, meant) == pytest.approx(100) and rouge(meant, meant) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge(["a b c d"], ["b a c"]) == pytest.approx({"rouge1": 6 / 7, "rouge2": 0, "rougeL": 4 / 7})        # by hand: 3 of 4 and 3 of 3 words, 2 in order, no pair
    assert rouge(["a b", "x"], ["a b", "y"])["rouge2"] == 0.5                             # a mean over rows
    assert rouge(["turning lights"], ["turned light"])["rouge1"] == 0                    # words as they are, not their stems


def test_own_functions_rows_with_origin_and_perplexity_alone(tok):
    model, encoder = tiny_model(tok), PairEncoder(tok)
    def letters(predictions, references): return torch.tensor(sum(map(len, references)))
    assert evaluate(model, tok, ROWS, encoder, metrics=[letters], max_new_tokens=2)["letters"] == 33.0
    assert evaluate(model, tok, ROWS, encoder, metrics=letters, max_new_tokens=2)["letters"] == 33.0
    rows = [types.SimpleNamespace(value=r, where=f"chat.jsonl line {i}") for i, r in enumerate(ROWS)]
    encoder.seen.clear()
    got = evaluate(model, tok, rows, encoder, metrics="perplexity")
    assert got["predictions"] == [] and encoder.seen == ["chat.jsonl line 0", "chat.jsonl line 1", "chat.jsonl line 2"] and got["trained_tokens"] > 3


def test_evaluate_refuses_before_it_runs(tok, monkeypatch):
    with pytest.raises(DataError, match="Unknown metric `perplexty`. Did you mean `perplexity`"): evaluate(None, tok, ROWS, None, metrics=["perplexty"])
    with pytest.raises(DataError, match="row 2 has no reference"): evaluate(None, tok, [ROWS[0], {"prompt": "x", "completion": ""}], PairEncoder(tok), metrics=["exact_match"])
    with pytest.raises(DataError, match="row 1 has an empty prompt"): evaluate(None, tok, [{"prompt": "", "completion": "x"}], PairEncoder(tok), metrics=["exact_match"])
    find = ev.importlib.util.find_spec
    monkeypatch.setattr(ev.importlib.util, "find_spec", lambda name: None if name == "rouge_score" else find(name))
    with pytest.raises(DataError, match="pip install rouge-score"): evaluate(None, tok, ROWS, None, metrics="rouge")


def test_answers_past_the_positions_that_a_rotary_model_states_are_given_without_a_word(monkeypatch):
    import logging
    from tiny import tiny_model, tiny_tokenizer
    tok, said = tiny_tokenizer(), []
    handler = logging.Handler(); handler.emit = said.append
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    model = tiny_model(tok)
    model.config.max_position_embeddings = 8
    assert generate(model, tok, [[5, 6, 7, 8]], max_new_tokens=12, stop_ids=[]) and not said


def test_an_answer_that_did_not_end_by_itself_can_be_marked(tiny):
    from sftkit.evaluate import generate
    from sftkit.model import load_base, load_tokenizer
    model, tokenizer = load_base(tiny), load_tokenizer(tiny)
    prompts = [[5, 6, 7], [9, 10]]
    plain = generate(model, tokenizer, prompts, 5, stop_ids=[])
    assert generate(model, tokenizer, prompts, 5, stop_ids=[], cut=" …") == [text + " …" for text in plain]
    first = model.generate(torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=1)[0, -1].item()
    assert generate(model, tokenizer, prompts[:1], 5, stop_ids=[first], cut=" …") == [""]
