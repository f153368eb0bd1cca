"""TRL's own `DPOTrainer.train()`, held between steps by a callback.

Its defaults, but for no gradient checkpointing (which would only cost it time),
the optimiser of all systems, the order of the file, and no saving or logging.
On CPUs in f32; on an accelerator with bf16 autocast, random weights of its own
and, where a batch does not fit at once, gradients accumulated over parts of it.
"""

import copy
import os
import pathlib
import time

import datasets
import numpy as np
import peft
import torch
import transformers
import trl
from safetensors import torch as torch_files

from scripts.bench import protocol


class Gate(transformers.TrainerCallback):
  """Lets n steps pass for each command, and times them."""

  def __init__(self, channel, take):
    """Args:
    channel: protocol.Channel.
    take: TrainingArguments -> what to say of the steps since it was called.
    """
    self._channel, self._take = channel, take
    self._left = 0

  def on_step_begin(self, args, state, control, **kwargs):
    if self._left == 0:
      self._left = self._channel.steps()
      self._begin = time.perf_counter()

  def on_step_end(self, args, state, control, **kwargs):
    self._left -= 1
    if self._left == 0:
      if torch.cuda.is_available():
        torch.cuda.synchronize()
      seconds = time.perf_counter() - self._begin
      self._channel.reply(seconds=seconds, **self._take(args))


class Trainer(trl.DPOTrainer):
  """Keeps the loss of each step, unrounded."""

  losses = ()

  def compute_loss(self, *args, **kwargs):
    loss = super().compute_loss(*args, **kwargs)
    self.losses.append(loss.detach())
    return loss


def config_of(job):
  """TRL's config of a job."""
  return trl.DPOConfig(
    **shared(job),
    per_device_train_batch_size=job["batch"] // job.get("parts", 1),
    gradient_accumulation_steps=job.get("parts", 1),
    max_length=job["max_length"],
    beta=job["beta"],
    precompute_ref_log_probs=job["ref"] == "cached",
    train_sampling_strategy="sequential",
  )


def shared(job):
  """What the configs of all its trainers have."""
  return {
    "output_dir": job["workdir"],
    "use_cpu": not torch.cuda.is_available(),
    "bf16": bool(job.get("device")),
    "gradient_checkpointing": False,
    "max_steps": job["steps"],
    "optim": "rmsprop",
    "optim_args": f"alpha={job['decay']},eps={job['eps']}",
    "learning_rate": job["learning_rate"],
    "lr_scheduler_type": "constant",
    "max_grad_norm": job["clip_norm"],
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
  }


def models(job):
  """{model, ref_model} of the trainer, if it is not to read weights."""
  if not job.get("device"):
    return {"model": job["model"]}
  config = transformers.AutoConfig.from_pretrained(
    job["model"], trust_remote_code=False
  )
  dtype = torch.bfloat16 if job["lora"] else torch.float32
  with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
  model.name_or_path = config._name_or_path = job["model"]
  if job["lora"]:  # the base is the reference
    return {"model": model}
  return {"model": model, "ref_model": copy.deepcopy(model)}


def start_from(adapter, model):
  """Gives PEFT's model the adapter of a folder."""
  path = pathlib.Path(adapter) / "adapter_model.safetensors"
  found = peft.set_peft_model_state_dict(model, torch_files.load_file(path))
  if found.unexpected_keys:
    raise ValueError(f"{path}: no place for {found.unexpected_keys}")


def main():
  channel = protocol.Channel()
  job = channel.job
  if torch.cuda.is_available():
    channel.peak = torch.cuda.max_memory_allocated
  threads = int(os.environ["OMP_NUM_THREADS"])
  torch.set_num_threads(threads)
  lora = job["lora"] and peft.LoraConfig(
    task_type="CAUSAL_LM",
    target_modules="all-linear",
    r=job["lora"]["rank"],
    lora_alpha=job["lora"]["alpha"],
    lora_dropout=0.0,
  )
  losses = []

  def take(args):
    parts = args.gradient_accumulation_steps
    found = np.reshape([float(loss) for loss in losses], (-1, parts))
    losses.clear()
    return {"losses": found.mean(1).tolist()}

  trainer = Trainer(
    **models(job),
    args=config_of(job),
    train_dataset=datasets.load_dataset(
      "json", data_files=job["in_order"], split="train"
    ),
    peft_config=lora,
    callbacks=[Gate(channel, take)],
  )
  trainer.losses = losses
  if job.get("adapter"):
    start_from(job["adapter"], trainer.model)
  channel.ready(
    ("torch", "trl", "transformers", "peft", "accelerate"),
    device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    parts=job.get("parts", 1),
    threads=torch.get_num_threads(),
    trained=sum(
      p.numel() for p in trainer.model.parameters() if p.requires_grad
    ),
  )
  trainer.train()
  channel.steps()


if __name__ == "__main__":
  main()
