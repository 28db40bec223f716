"""A worker of tests/test_distributed.py: optimizer steps of a model in DeepSpeed's ZeRO-3, every weight shared out, against the same model whole; the processes need unlike numbers of chunks of logits. torchrun tests/zero3.py FOLDER"""
import copy
import sys
import deepspeed
import torch
import torch.distributed as dist
import sftkit.loss as loss_module
from sftkit.model import load_base, recompute_activations
from sftkit.loss import token_loss_sum

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False              # which would be compiled for a minute
deepspeed.init_distributed("gloo")
whole = load_base(sys.argv[1]).train()
loss_module._CHUNK_LOGITS = 64 * whole.config.vocab_size                    # 64 tokens at a time
sharded = copy.deepcopy(whole)
for m in (whole, sharded): recompute_activations(m)
config = dict(zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), gradient_clipping=0, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, zero_allow_untested_optimizer=True)
engine, *_ = deepspeed.initialize(model=sharded, config=config, optimizer=torch.optim.SGD(sharded.parameters(), lr=0.5))
optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
for step in range(3):
    rows = [torch.randint(5, 250, (1, n), generator=torch.Generator().manual_seed(step)) for n in (200, 50 + 40 * step)]       # four chunks, and one to three
    batches = [dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)) for ids in rows]
    loss = sum(token_loss_sum(whole, b) for b in batches) / 200
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    own = token_loss_sum(engine, batches[dist.get_rank()]) / 100
    engine.backward(own); engine.step()
    mean = own.detach().clone(); dist.all_reduce(mean)
    assert abs(float(loss) - float(mean) / 2) < 1e-4, (float(loss), float(mean) / 2)
for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters()):
    with deepspeed.zero.GatheredParameters([b]): assert torch.allclose(a, b, atol=1e-5), name
tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
print(f"same as whole, {'tied' if tied else 'untied'}")
