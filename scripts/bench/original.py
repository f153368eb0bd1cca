"""A step as the original DPO repository takes it, in eager torch.

Chosen and rejected are padded to the longest of the batch and concatenated, the
logits of policy and reference exist in whole, each goes through log_softmax
over the vocabulary, and RMSprop steps on clipped gradients.
"""

import os

import torch
import transformers

from scripts.bench import protocol


def pad(pairs):
  """(tokens, attention mask, scored) i64[2B, T], chosen first."""
  rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
  longest = max(len(prompt) + len(ids) for prompt, ids in rows)
  tokens = torch.zeros(len(rows), longest, dtype=torch.long)
  valid, scored = torch.zeros_like(tokens), torch.zeros_like(tokens)
  for row, (prompt, ids) in enumerate(rows):
    end = len(prompt) + len(ids)
    tokens[row, :end] = torch.tensor(prompt + ids)
    valid[row, :end] = 1
    scored[row, len(prompt) : end] = 1
  return tokens, valid, scored


def completion_logps(model, tokens, valid, scored):
  """f32[2B] log-probs of the completions in nats."""
  logits = model(tokens, attention_mask=valid).logits.float()
  logps = logits[:, :-1].log_softmax(-1)
  picked = logps.gather(2, tokens[:, 1:, None]).squeeze(2)
  return (picked * scored[:, 1:]).sum(-1)


def dpo_loss(logps, ref_logps, beta):
  """Mean of −log σ(β [(c − r) − (c_ref − r_ref)])."""
  chosen, rejected = (logps - ref_logps).chunk(2)
  return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def main():
  channel = protocol.Channel()
  job = channel.job
  if job["lora"] or job["ref"] != "frozen":
    raise SystemExit("the original repository has no LoRA and no cache")
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  policy, ref = (
    transformers.AutoModelForCausalLM.from_pretrained(
      job["model"],
      dtype=torch.float32,
      trust_remote_code=False,
      use_safetensors=True,
    ).eval()  # no dropout
    for _ in range(2)
  )
  ref.requires_grad_(False)
  tx = torch.optim.RMSprop(
    policy.parameters(),
    lr=job["learning_rate"],
    alpha=job["decay"],
    eps=job["eps"],
  )
  batches = protocol.batches(job)
  channel.ready(("torch", "transformers"), threads=torch.get_num_threads())

  def run_steps(count):
    losses = []
    for _ in range(count):
      batch = pad(next(batches))
      with torch.no_grad():
        ref_logps = completion_logps(ref, *batch)
      logps = completion_logps(policy, *batch)
      loss = dpo_loss(logps, ref_logps, job["beta"])
      loss.backward()
      torch.nn.utils.clip_grad_norm_(policy.parameters(), job["clip_norm"])
      tx.step()
      tx.zero_grad()
      losses.append(loss.item())
    return lambda: losses

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
