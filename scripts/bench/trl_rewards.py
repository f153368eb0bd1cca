"""TRL's own `RewardTrainer.train()`, held between steps by a callback.

Its defaults, but for no gradient checkpointing (which would only cost it time),
the optimiser of all systems, the order of the file, and the value head that
`ours` starts from. The token to pad with is not the end: it reads a reward at
the last token that is none of these.
"""

import os

import datasets
import numpy as np
import torch
import trl

from scripts.bench import protocol, trl_worker


class Trainer(trl.RewardTrainer):
  """Keeps the loss of each step, unrounded."""

  losses = ()

  def compute_loss(self, *args, **kwargs):
    loss = super().compute_loss(*args, **kwargs)
    self.losses.append(loss.detach())
    return loss


def main():
  channel = protocol.Channel()
  job = channel.job
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  losses = []

  def take(_):
    out = [float(loss) for loss in losses]
    losses.clear()
    return {"losses": out}

  trainer = Trainer(
    model=job["model"],
    args=trl.RewardConfig(
      **trl_worker.shared(job),
      per_device_train_batch_size=job["batch"],
      max_length=job["max_length"],
      train_sampling_strategy="sequential",
      pad_token="1",  # a word, which may stand anywhere but at the end
    ),
    train_dataset=datasets.load_dataset(
      "json", data_files=job["in_order"], split="train"
    ),
    callbacks=[trl_worker.Gate(channel, take)],
  )
  trainer.losses = losses
  with torch.no_grad():
    head = torch.from_numpy(np.load(job["head"]))
    trainer.model.score.weight.copy_(head[None])
  channel.ready(
    ("torch", "trl", "transformers", "accelerate"),
    threads=torch.get_num_threads(),
    trained=sum(p.numel() for p in trainer.model.parameters()),
  )
  trainer.train()
  channel.steps()


if __name__ == "__main__":
  main()
