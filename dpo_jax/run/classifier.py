"""Published reward models: a sequence classifier of one label, as a Setup."""

import functools
from typing import NamedTuple

import jax
from etils import epath

from dpo_jax import store
from dpo_jax.config import origin
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import axes, decoder, hf
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import base, forward
from dpo_jax.run import model as model_lib

ABOUT = "dpo_jax.json"  # what an export of this project says beside its files


class Reading(NamedTuple):
  """How texts become batches: the fields of config.data that say so."""

  max_prompt_length: int
  max_completion_length: int
  long_prompt: str = "error"
  bad_records: str = "error"
  batch_size: int = 32
  packed: bool = True
  shared: bool = True
  max_row_length: int | None = None
  max_shapes: int = 3
  shape_multiple: int = 32


def published(name):
  """(Setup, parameters, id that pads or None) of a checkpoint.

  The Setup scores and does nothing else. An export of a reward model trained
  here brings its bias in dpo_jax.json, which the format has no place for.

  Args:
    name: of the Hugging Face hub, or a local folder.
  Raises: ValueError for what is no reward model of a supported family.
  """
  folder = origin.folder(name, "scorer reward")
  checkpoint = hf.open_classifier(folder)
  tokenizer = tokenize.load(f"hf:{name}")
  ends = (*tokenizer.other_ends, *checkpoint.ends)
  tokenizer = model_lib.fitting(
    tokenizer._replace(other_ends=ends),
    *(checkpoint.vocab_size, f"hf:{name}", f"the reward model {name!r}"),
  )
  model = decoder.build(checkpoint.config, checkpoint.vocab_size)
  mesh = mesh_lib.of_devices(jax.devices())
  reading = Reading(*[checkpoint.config.max_positions] * 2)
  model = decoder.with_kernel(model, mesh.devices.flat[0], reading.shared, 1)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  kernel = jax.ShapeDtypeStruct((checkpoint.config.embed, 1), "float32")
  shapes = {**shapes, "score": {"kernel": kernel}}
  shardings = mesh_lib.shardings(mesh, shapes, axes.spec)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    *(shapes, shardings),
  )
  params = hf.load(checkpoint, shapes, "float32")
  kernel = params.pop("score")["kernel"][:, 0]
  head = {"kernel": kernel, "bias": jax.numpy.float32(_bias(folder))}
  setup = base.Setup(
    mesh=mesh,
    mode="jit",
    model=model,
    tokenizer=tokenizer,
    trained=None,
    source=None,
    programs=base.Programs(
      init=None,
      token_logps=None,
      token_kl=None,
      rewards=run_lib.forward(
        functools.partial(forward.of_slots, model.apply), mesh
      ),
      sample=None,
    ),
    data=reading,
    sample=None,
    compute=None,
    precision="highest",
    asked={},
  )
  pad = checkpoint.raw.get("pad_token_id")
  return setup, {"model": params, "reward": head}, pad


def _bias(folder):
  """The bias that an export brings; 0 of others."""
  path = epath.Path(folder) / ABOUT
  there = store.read_json(path) if path.exists() else {}
  return there.get("reward", {}).get("bias", 0.0)
