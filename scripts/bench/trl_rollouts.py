"""TRL's own RLOO and GRPO trainers, held between iterations by a callback.

Their defaults, with transformers' `generate`, but for what all systems share:
completions of one length, the optimiser, the order of the file; and for no
gradient checkpointing, which would only cost them time. One iteration is one
step on all that was drawn; GRPO's loss is that of its paper, a mean over
completions, with a KL penalty.
"""

import os

import datasets
import torch
import trl

from scripts.bench import protocol, trl_worker

_OWN = {
  "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
  "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "grpo"}),
}


def config_of(job):
  """TRL's config of a job."""
  _, config, own = _OWN[job["task"]]
  return config(
    **trl_worker.shared(job),
    per_device_train_batch_size=job["batch"] * job["draws"],
    num_generations=job["draws"],
    max_completion_length=job["max_completion"],
    generation_kwargs={"min_new_tokens": job["max_completion"]},
    shuffle_dataset=False,
    beta=job["beta"],
    epsilon=job["clip"],
    **own,
  )


def main():
  channel = protocol.Channel()
  job = channel.job
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  parts, scores = protocol.Parts(), protocol.Scores(job)
  scores.__name__ = "words"  # TRL logs it by that
  losses, norms = [], []

  def take(_):
    out = {"losses": losses[:], "norms": norms[:], "scores": scores.means[:]}
    for values in (losses, norms, scores.means):
      values.clear()
    return {**out, "parts": [parts.take()]}

  made, *_ = _OWN[job["task"]]
  trainer = made(
    model=job["model"],
    reward_funcs=parts.of("score", scores),
    args=config_of(job),
    train_dataset=datasets.load_dataset(
      "json", data_files=job["in_order"], split="train"
    ),
    callbacks=[trl_worker.Gate(channel, take)],
  )
  watch(trainer, parts, losses, norms)
  channel.ready(
    ("torch", "trl", "transformers", "accelerate"),
    threads=torch.get_num_threads(),
    trained=sum(p.numel() for p in trainer.model.parameters()),
  )
  trainer.train()
  channel.steps()


def watch(trainer, parts, losses, norms):
  """Has a trainer tell its parts, its losses and the norms of its gradients."""
  loss, clip = trainer.compute_loss, trainer.accelerator.clip_grad_norm_

  def kept(*args, **kwargs):
    value = loss(*args, **kwargs)
    losses.append(float(value.detach()))
    return value

  def clipped(*args, **kwargs):
    norm = clip(*args, **kwargs)
    norms.append(float(norm))
    return norm

  trainer.compute_loss = kept
  trainer.accelerator.clip_grad_norm_ = clipped
  model = trainer.model
  model.generate = parts.of("sample", model.generate)
  name = "_generate_and_score_completions"
  setattr(trainer, name, parts.of("rollouts", getattr(trainer, name)))
  trainer.training_step = parts.of("step", trainer.training_step)


if __name__ == "__main__":
  main()
