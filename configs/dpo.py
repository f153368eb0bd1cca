"""DPO and its family on pairs of text.

    dpo-jax train --config dpo \\
      --config.data.train=my.jsonl --workdir runs/mine

`dpo:loss=ipo` selects another loss with its own defaults (see
`dpo-jax losses`; `loss=dpo+0.1*nll` is a mixture), `:divergence=js` another
f-divergence, `:ref=ema` a reference that follows the policy,
`:model=pythia-70m` another shape, `:model=hf:NAME` a pre-trained model,
`:optim=adamw` another optimiser, `:lora` an adapter, `:smoke` two steps of a
micro model on generated pairs; `dpo-jax sweep` in the place of `train` runs the
paper's β, `dpo-jax sweep --sweep :loss=dpo,ipo` two losses.
The optimiser's constants are the paper's (arXiv:2305.18290
appendix B) but for the learning rate: the model here is small and starts from
random parameters unless `--config.init_from` names a run folder, so the
paper's 1e-6 would not move it. For a pre-trained model set
`--config.optim.learning_rate=1e-6`.
"""

from dpo_jax.configs import base, common, losses


def sweep():
  for beta in (0.05, 0.1, 1.0, 5.0):
    yield {"loss.beta": beta}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    loss="dpo",
    divergence="reverse_kl",
    ref="",
    model="tiny",
    optim="rmsprop",
    lora=False,
    smoke=False,
  )
  c = base.get_config()
  c.loss = losses.loss(arg.loss, arg.divergence)
  own = "base" if arg.lora else "frozen"
  if not losses.needs_reference(arg.loss):
    own = "none"
  common.select_ref(c, arg.ref or own)
  common.select_model(c, arg.model)
  common.select_optim(c, arg.optim, learning_rate=3e-4)
  if arg.lora:
    c.lora = common.lora()
  if arg.smoke:
    c = common.smoke(c)
  return c
