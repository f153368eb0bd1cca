"""The parameters of a run: what it starts from, trains, and has saved.

`config.init_from` names a pre-trained checkpoint (see config/origin.py), a run
folder, or nothing. With `config.lora` a run trains an adapter on that base,
which is its reference too; without, all parameters.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from dpo_jax import lookup, tree
from dpo_jax.config import origin
from dpo_jax.config import saved as saved_lib
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import axes, decoder, families, gguf, hf, lora, peft
from dpo_jax.models import config as model_config
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import checkpoint


def pretrained(spec, field="init_from"):
  """The hf.Checkpoint of a spec, or None if it is a run folder (or None).

  Raises: ValueError if it cannot be found or is not supported.
  """
  kind, name = origin.parse(spec or "")
  if kind == "hf":
    return hf.open_folder(origin.folder(name, field))
  if kind == "gguf":
    return gguf.open_file(origin.gguf_file(name, field))
  return None


def shape(config):
  """(ModelConfig, vocabulary size or None) of a config.

  config.model has the whole shape, or its RUNTIME fields only; then the shape
  is that of init_from: a checkpoint's own config.json, or that of a run.
  """
  runtime = config.model.to_dict()
  checkpoint_there = pretrained(config.init_from)
  if set(runtime) - set(model_config.RUNTIME):
    if checkpoint_there is not None:
      raise ValueError(
        f"init_from = {config.init_from!r} brings its own shape: config.model "
        f"must have the fields {model_config.RUNTIME} only; select it by the "
        f"config's argument, :model={config.init_from}"
      )
    return model_config.ModelConfig(**runtime), None
  if checkpoint_there is not None:
    found, vocab_size = checkpoint_there.config, checkpoint_there.vocab_size
  elif config.init_from is not None:
    found, vocab_size = shape(saved_lib.saved_config(config.init_from))
  else:
    raise ValueError(
      "config.model has no shape and init_from is not set; name a pre-trained "
      "model by the config's argument, :model=hf:NAME, or a preset"
    )
  runtime["unroll"] = min(runtime["unroll"], found.periods)
  return dataclasses.replace(found, **runtime), vocab_size


def build_model(config):
  """(decoder.Model, tokenize.Tokenizer) of a config.

  Raises: ValueError if the tokenizer has more tokens than the model, or the
    data may be longer than its positions.
  """
  tokenizer = tokenize.load(config.tokenizer)
  found, vocab_size = shape(config)
  if vocab_size is None:
    vocab_size = tokenizer.vocab_size
  spare = set(range(vocab_size, tokenizer.vocab_size))
  ends = {tokenizer.bos_id, tokenizer.eos_id}
  if spare <= set(tokenizer.specials) and not spare & ends:
    # Gemma 3 has a token for images, which its text models have no row for.
    tokenizer = tokenizer._replace(vocab_size=vocab_size)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"tokenizer = {config.tokenizer!r} has {tokenizer.vocab_size} tokens, "
      f"but the model of init_from = {config.init_from!r} only {vocab_size}; "
      "use its own tokenizer"
    )
  longest = config.data.max_prompt_length + config.data.max_completion_length
  if longest > found.max_positions:
    raise ValueError(
      f"data.max_prompt_length + data.max_completion_length = {longest} is "
      f"more than model.max_positions = {found.max_positions}"
    )
  return decoder.build(found, vocab_size), tokenizer


def partition_spec(mode):
  """Function (path, shape, sizes) -> PartitionSpec of the state's arrays."""
  if mode == "pmap":
    return lambda *_: PartitionSpec()
  return axes.spec


def sharded(setup, shapes):
  """ShapeDtypeStructs with their shardings on the mesh."""
  shardings = mesh_lib.shardings(setup.mesh, shapes, partition_spec(setup.mode))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def whole(setup):
  """All parameters of the model in f32, abstract, with shardings."""
  return sharded(setup, jax.eval_shape(setup.model.init, jax.random.key(0)))


def flat_shapes(setup):
  """{path: ShapeDtypeStruct} of all parameters of the model."""
  shapes = jax.eval_shape(setup.model.init, jax.random.key(0))
  return dict(tree.named(shapes))


def initial(setup):
  """What a run starts from, born sharded: also its reference.

  With config.lora it is the base, held as lora.base says.
  """
  if "initial" in setup.cache:
    return setup.cache["initial"]
  config, base = setup.config, base_kind(setup.config)
  there = pretrained(config.init_from)
  if config.init_adapter is not None:
    if there is None or origin.parse(config.init_from)[0] != "hf":
      raise ValueError("init_adapter needs its base: init_from = 'hf:…'")
    params = hf.load(there, whole(setup), "float32")
    return _held(setup, _with_peft(setup, there, params), base)
  if there is not None:
    return hf.load(there, whole(setup), base)
  if config.init_from is not None:
    return _held(setup, _of_run(setup, config.init_from), base)
  shardings = jax.tree.map(lambda x: x.sharding, whole(setup))
  init = setup.once("init", lambda: run_lib.jitted(setup.model.init, shardings))
  return _held(setup, init(jax.random.key(config.init_seed)), base)


def base_kind(config):
  """How a run's initial parameters are held, of lora.BASES."""
  if config.lora is None:
    return "float32"
  return lookup.lookup(lora.BASES, config.lora.base, "lora.base")


def _held(setup, params, kind):
  """Parameters as a base of this kind holds them."""
  if kind == "float32":
    return params

  def convert(params):
    return tree.map_named(lambda path, x: lora.store(path, x, kind), params)

  shapes = jax.eval_shape(convert, params)
  shardings = jax.tree.map(lambda x: x.sharding, sharded(setup, shapes))
  return run_lib.jitted(convert, shardings)(params)


def _of_run(setup, folder):
  """The policy of another run, in f32; an adapter is merged into its base."""
  saved = saved_lib.saved_config(folder)
  if saved.get("lora") is None:
    return checkpoint.load_params(folder, whole(setup))
  there = setup._replace(config=saved, cache={})
  base = initial(there)
  return merged(there, base, trained(there, base, folder))


def merged(setup, base, params):
  """All parameters of a policy in f32, its adapter merged into them.

  Args: see `policy`.
  """
  if setup.config.lora is None:
    return params
  shapes = whole(setup)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)

  def merge(base, adapter):
    by_path = lora.flat(lora.merge(base, adapter, scale(setup.config)))
    return tree.map_named(
      lambda path, x: lora.dequantize(by_path[path]).astype(x.dtype), shapes
    )

  return run_lib.jitted(merge, shardings)(base, params)


def saved(setup, base, workdir):
  """The policy saved last in a run's folder, as `policy` gives it.

  Args:
    base: of `initial`.
    workdir: run folder.
  """
  return policy(setup, base, trained(setup, base, workdir))


def trained(setup, base, workdir):
  """What was trained and saved last in a run's folder: parameters or adapter.

  Args: see `saved`; parameters need no base.
  Raises: ValueError if there is none, or it is an adapter of another base.
  """
  if setup.config.lora is not None:
    checkpoint.check_run(workdir, setup.config.to_dict(), base)
  return checkpoint.load_params(workdir, trained_shapes(setup), "the run")


def policy(setup, base, params):
  """The parameters to apply the model to, from what is trained.

  Args:
    base: of `initial`.
    params: of the TrainState.
  """
  if setup.config.lora is None:
    return params
  return lora.graft(base, params, scale(setup.config))


def scale(config):
  """The factor on the adapter's product."""
  o = config.lora
  return lora.scale_of(o.rank, o.alpha, o.rank_stabilised)


def adapter(setup):
  """A new adapter, born sharded; it adds nothing yet."""
  shardings = jax.tree.map(lambda x: x.sharding, _adapter_shapes(setup))
  return run_lib.jitted(lambda: _new_adapter(setup), shardings)()


def _with_peft(setup, there, params):
  """Parameters in f32 with the PEFT adapter of init_adapter merged in."""
  spec = setup.config.init_adapter
  found, _, factor = peft.read(
    origin.folder(origin.parse(spec)[1], "init_adapter"),
    families.find(there.raw).table,
    setup.model.config,
    {path: x.shape for path, x in flat_shapes(setup).items()},
    setup.model.vocab_size,
  )
  shardings = jax.tree.map(lambda x: x.sharding, whole(setup))
  merge = run_lib.jitted(lambda p, a: lora.merge(p, a, factor), shardings)
  return merge(params, found)


def _new_adapter(setup):
  """A new adapter, to be traced."""
  options = setup.config.lora
  rng = jax.random.key(setup.config.init_seed)
  shapes = jax.eval_shape(setup.model.init, rng)
  return lora.init(rng, shapes, options.rank, options.targets)


def trained_shapes(setup):
  """What a run trains, abstract, with shardings."""
  return whole(setup) if setup.config.lora is None else _adapter_shapes(setup)


def _adapter_shapes(setup):
  return sharded(setup, jax.eval_shape(lambda: _new_adapter(setup)))
