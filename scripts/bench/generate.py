"""transformers' generate, as scripts/bench/sampling.py asks for it."""

import os

import torch
import transformers

from scripts.bench import protocol


def main():
  channel = protocol.Channel()
  job = channel.job
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    job["model"], dtype=torch.float32
  ).eval()
  rows, count = job["prompts"], job["tokens"]
  longest = max(map(len, rows))
  ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
  real = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
  mask = torch.tensor(real)
  channel.ready(("torch", "transformers"))

  def run_steps(steps):
    for _ in range(steps):
      with torch.inference_mode():
        out = model.generate(
          ids,
          attention_mask=mask,
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=job["top_p"],
          max_new_tokens=count,
          min_new_tokens=count,
          pad_token_id=0,
        )
    assert out.shape == (len(rows), longest + count)
    return list

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
