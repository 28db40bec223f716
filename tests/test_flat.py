"""Batches without padding: the same numbers as padded ones, for every family that takes them; the others keep their padding."""
import pytest
import torch
import transformers

from sftkit import Session
from sftkit.data import collate, collate_packed
from sftkit.loss import FLAT, _in_groups, document_groups, flat_batch, token_loss_sum, use_flat_attention
from tiny import save_tiny, write_jsonl

SHAPE = dict(vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def tiny(family, **more):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**SHAPE, **more})
    return getattr(transformers, family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM"))(config).eval()


def examples(seed=0, lengths=(5, 17, 1, 30, 9)):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 200, (n,), generator=random).tolist() for n in lengths]
    return [dict(input_ids=r, labels=[-100] * min(2, len(r)) + r[2:]) for r in rows]


TAKES = [("Llama", {}), ("Mistral", dict(sliding_window=7)), ("Qwen2", {}), ("Qwen3", dict(head_dim=8)), ("Gemma", dict(head_dim=8)),
         ("Phi3", {}), ("Granite", {}), ("Cohere", {}), ("Olmo2", {}), ("GPTNeoX", {}), ("OPT", {}), ("Phi", {}), ("Starcoder2", {}), ("Mixtral", dict(num_local_experts=4)), ("SmolLM3", {}), ("GPT2", GPT2)]


@pytest.mark.parametrize("family,more", TAKES, ids=[t[0] for t in TAKES])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_without_padding_is_that_of_padded_rows(family, more, side):
    model, padded = tiny(family, **more), collate(examples(), 0, side)
    with torch.no_grad():
        before = float(token_loss_sum(model, padded))
        alone = sum(float(token_loss_sum(model, collate([e], 0))) for e in examples())
        assert use_flat_attention(model, list(range(3, 50))) is None
        flat = float(token_loss_sum(model, flat_batch(padded)))
        again = float(token_loss_sum(model, padded))                 # padded batches still work, as generation needs
    assert abs(flat - alone) < 1e-3 and abs(before - alone) < 1e-3 and abs(again - alone) < 1e-3, (before, alone, flat, again)


@pytest.mark.parametrize("family,more", [("Falcon", {}), ("StableLm", {}), ("Bloom", dict(n_head=4)), ("GptOss", dict(head_dim=8, num_local_experts=4)), ("Gemma2", dict(head_dim=8))])
def test_families_that_cannot_keep_their_padding_and_say_why(family, more):
    model = tiny(family, **more)
    before = model.config._attn_implementation
    why = use_flat_attention(model, list(range(3, 50)))
    assert why and type(model).__name__ in why and model.config._attn_implementation == before


def test_flat_batch_holds_exactly_the_tokens_and_forgets_the_first_label():
    rows = examples()
    for row in rows: row["labels"] = list(row["input_ids"])          # also the first token's, as plain text has it
    flat = flat_batch({**collate(rows, 0, "left"), "rows": torch.arange(5)})
    assert flat["input_ids"][0].tolist() == sum((r["input_ids"] for r in rows), [])
    assert flat["cu_seq_lens"].tolist() == [0, 5, 22, 23, 53, 62] and flat["cu_seq_lens"].dtype == torch.int32 and flat["max_length"] == 30
    assert flat["labels"][0, [0, 5, 22, 23, 53]].tolist() == [-100] * 5 and (flat["labels"] != -100).sum() == 62 - 5
    assert flat["rows"].tolist() == [0, 1, 2, 3, 4] and not {"attention_mask", "documents"} & set(flat)


def test_gradients_without_padding_are_those_of_the_documents():
    model, rows = tiny("Llama"), examples()
    token_loss_sum(model, collate(rows, 0)).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert use_flat_attention(model, list(range(3, 50))) is None
    for batch in (flat_batch(collate(rows, 0)), flat_batch(collate_packed([rows[:3], rows[3:]], 0))):
        model.zero_grad()
        token_loss_sum(model, batch).backward()
        assert all((p.grad - want[n]).abs().max() < 1e-5 for n, p in model.named_parameters())


@pytest.mark.parametrize("window", [None, 9])
def test_documents_in_groups_attend_as_each_alone(window):
    "Outputs and gradients, against attention that is written out for one document at a time; lengths of several groups, fewer key heads, values of another width."
    lengths, random = (40, 3, 38, 1, 100, 37, 64), torch.Generator().manual_seed(0)
    assert [len(g) for g in document_groups(lengths)] == [1, 1, 3, 2]
    draw = lambda heads, size: torch.randn(sum(lengths), heads, size, generator=random, requires_grad=True)
    q, k, v = draw(4, 8), draw(2, 8), draw(2, 6)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    def alone(q, k, v):
        at = torch.arange(len(q))
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or len(q)))
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        weights = (torch.einsum("ihd,jhd->hij", q, k) * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v)
    want = torch.cat([alone(q[a:b], k[a:b], v[a:b]) for a, b in zip(edges, edges[1:])])
    with torch.inference_mode(): first = _in_groups(q, k, v, edges, 0.3, window, 0.0)           # what was found out here serves the training after it
    got = _in_groups(q, k, v, edges, 0.3, window, 0.0)
    up = torch.randn(want.shape, generator=random)
    assert torch.allclose(first, want, atol=1e-6) and torch.allclose(got, want, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(torch.autograd.grad(got, (q, k, v), up), torch.autograd.grad(want, (q, k, v), up)))


def test_a_model_that_mixes_documents_is_noticed():
    model = tiny("Llama")
    plain = model.model.forward
    def leaky(*args, **kwargs):                                       # a recurrent state: every hidden state depends on all before it
        out = plain(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.cumsum(1)
        return out
    model.model.forward = leaky
    assert "otherwise than each alone" in use_flat_attention(model, list(range(3, 50)))


@pytest.mark.parametrize("options", [{}, dict(packing=True, max_seq_length=96), dict(gradient_accumulation=3, batch_size=2)], ids=["plain", "packed", "accumulated"])
def test_acceptance_16_training_without_padding_equals_training_with_it(tmp_path, monkeypatch, options):
    import sftkit.training as training
    model = save_tiny(tmp_path/"m")
    data = write_jsonl(tmp_path/"d.jsonl", [dict(prompt="what is it " * (i % 5 + 1), completion="the light in the kitchen " * (i % 3 + 1)) for i in range(24)])
    plan = Session(model, project=str(tmp_path/"flat")).data(data).options(**{**dict(epochs=2, batch_size=4, gradient_accumulation=1, lr=1e-3), **options})
    flat = plan.fit()
    assert next(e for e in flat.events if e["kind"] == "plan")["padding_free"] is True
    monkeypatch.setattr(training, "use_flat_attention", lambda *a: "not this time")
    padded = Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/"padded"))).fit()
    assert next(e for e in padded.events if e["kind"] == "plan")["padding_free"] is False
    assert len(flat.history) == len(padded.history) > 2
    assert (flat.history.loss - padded.history.loss).abs().max() < 1e-5
    assert flat.history.tokens.tolist() == padded.history.tokens.tolist()
    import json
    assert "attn" not in " ".join(json.loads((flat.path/"config.json").read_text())).lower().replace("attention_bias", "").replace("attention_dropout", "") and FLAT not in (flat.path/"config.json").read_text()
