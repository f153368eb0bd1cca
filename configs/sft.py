"""Supervised fine-tuning on the chosen completions, or on plain text.

    dpo-jax train --config sft \\
      --config.data.train=my.jsonl --workdir runs/sft

Its run folder is what `--config.init_from` of a DPO run takes. `:model=hf:NAME`
starts from a pre-trained model, `:optim=adamw` takes another optimiser, `:lora`
trains an adapter, `:smoke` is two steps of a micro model on generated text.
"""

from dpo_jax.configs import base, common


def get_config(arg=None):
  arg = common.parse_arg(
    arg, model="tiny", optim="rmsprop", lora=False, smoke=False
  )
  c = base.get_config()
  c.algo = "sft"
  c.loss = common.loss("sft")
  c.ref = "none"
  common.select_model(c, arg.model)
  common.select_optim(c, arg.optim, learning_rate=1e-3)
  if arg.lora:
    c.lora = common.lora()
  if arg.smoke:
    c = common.smoke(c)
  return c
