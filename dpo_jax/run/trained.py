"""What a run trains, and the parameters it starts from and has saved.

A run starts from a base: all parameters of a model, random or of a checkpoint.
It trains a copy of them (`whole`), an adapter on them (`adapter`), and perhaps
scalar heads beside either (`with_heads`). Whoever needs the policy, its
reference or its memory asks the `Trained`; nobody else asks whether there is an
adapter or a head.
"""

import functools
import re
import weakref
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax import lookup, tree
from dpo_jax.config import origin
from dpo_jax.models import axes, families, gguf, hf, lora, peft
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import checkpoint

# Of a parameter of a base, by how it is held.
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "nf4": 4}


class Trained(NamedTuple):
  """What a run trains, as pure functions of a base and a trained tree.

  Attributes:
    init: (base, rng) -> the trained tree at step 0, whose policy is the base.
    policy: (base, trained) -> parameters that the algorithm's `apply` takes.
    model: (base, trained) -> those of the model alone, without heads.
    merged: (base, trained) -> those of the model in f32, adapter merged in.
    frozen: base -> what the state keeps of it and never trains.
    on_base: whether the policy is a part on a frozen base.
    frozen_bits: bits that `frozen` takes for each parameter of the model.
    heads: names of the scalar heads beside the model's tree.
    adapter: the fields of config.lora and "scale" of an adapter, else None.
  """

  init: Callable
  policy: Callable
  model: Callable
  merged: Callable
  frozen: Callable
  on_base: bool
  frozen_bits: int
  heads: tuple = ()
  adapter: dict | None = None


def whole(*, keeps_reference):
  """Trains all parameters; the base may stay beside them, as the reference."""
  return Trained(
    init=lambda base, rng: base,
    policy=lambda base, trained: trained,
    model=lambda base, trained: trained,
    merged=lambda base, trained: trained,
    frozen=lambda base: {"ref": base} if keeps_reference else {},
    on_base=False,
    frozen_bits=_BITS["float32"] if keeps_reference else 0,
  )


def adapter(shapes, options):
  """Trains an adapter; the base is the reference too.

  Args:
    shapes: all parameters of the model in f32, abstract.
    options: rank, alpha, rank_stabilised, targets, zero and base, as
      config.lora.
  """
  scale = lora.scale_of(options.rank, options.alpha, options.rank_stabilised)
  graft = functools.partial(lora.graft, scale=scale)

  def merged(base, trained):
    by_path = lora.flat(lora.merge(base, trained, scale))
    return tree.map_named(
      lambda path, x: lora.dequantize(by_path[path]).astype(x.dtype), shapes
    )

  return Trained(
    init=lambda _, rng: lora.init(
      rng, shapes, options.rank, options.targets, options.zero
    ),
    policy=graft,
    model=graft,
    merged=merged,
    frozen=lambda base: {"base": base},
    on_base=True,
    frozen_bits=_BITS[options.base],
    adapter={**options._asdict(), "scale": scale},
  )


# How the kernel of a head begins, (rng, D) -> f32[D], by the head's name. A
# value is 0 before anything is known; of a reward the gradient would be 0 for
# all below a kernel of 0, and its spread is that of published reward models.
HEADS = {
  "value": lambda rng, embed: jnp.zeros(embed),
  "reward": lambda rng, embed: (
    jax.random.normal(rng, (embed,)) / jnp.sqrt(embed + 1.0)
  ),
}


def with_heads(inner, names, embed, copies=()):
  """Trains scalar heads too, which read the last hidden state.

      value = hidden · kernel + bias, from a kernel of HEADS and bias = 0

  Args:
    inner: Trained of the model.
    names: of the heads, of HEADS; () is `inner` itself.
    embed: D, width of the hidden state.
    copies: names of further models, each trained as the policy is and starting
      where it does, such as "critic".
  Returns: Trained whose trees, and whose policy, are {"model": …, name: …}.
  """
  if not names:
    return inner

  def init(base, rng):
    trained = {"model": inner.init(base, rng)}
    for number, name in enumerate(copies, 1):
      trained[name] = inner.init(
        base, jax.random.fold_in(rng, len(names) + number)
      )
    for number, name in enumerate(names, 1):
      begin = lookup.lookup(HEADS, name, "the algorithm's heads")
      kernel = begin(jax.random.fold_in(rng, number), embed)
      trained[name] = {"kernel": kernel, "bias": jnp.zeros(())}
    return trained

  def policy(base, trained):
    models = {k: inner.policy(base, trained[k]) for k in ("model", *copies)}
    return {**trained, **models}

  return inner._replace(
    init=init,
    policy=policy,
    model=lambda base, trained: inner.model(base, trained["model"]),
    merged=lambda base, trained: inner.merged(base, trained["model"]),
    heads=tuple(names),
  )


class Source(NamedTuple):
  """Where a base comes from.

  Attributes:
    spec: "hf:NAME", "gguf:FILE", a run folder, or None for random parameters.
    adapter: "hf:NAME" of a PEFT adapter that is merged into it, or None.
    seed: of random parameters, and of an adapter's.
    held: how the base is held, of lora.BASES.
    run: of a run folder: (its Trained, its Source, its config as plain values).
    critic: of a critic that starts as a reward model: (folder, *such a run).
  """

  spec: str | None
  adapter: str | None
  seed: int
  held: str
  run: tuple | None = None
  critic: tuple | None = None


def pretrained(spec):
  """The hf.Checkpoint of init_from, or None if it is a run folder (or None).

  Raises: ValueError if it cannot be found or is not supported.
  """
  kind, name = origin.parse(spec or "")
  if kind == "hf":
    return hf.open_folder(origin.folder(name, "init_from"))
  if kind == "gguf":
    return gguf.open_file(origin.gguf_file(name, "init_from"))
  return None


def partition_spec(mode, heads=()):
  """Function (path, shape, sizes) -> PartitionSpec of the state's arrays.

  Every device has all of the `heads` of a Trained, and of what an algorithm
  keeps that is no parameter; in `mode` "pmap" of everything.
  """
  if mode == "pmap":
    return lambda *_: PartitionSpec()
  of_head = re.compile(rf"(^|/)({'|'.join(heads)})/(kernel|bias)$")

  def spec(path, shape, sizes):
    known = tree.matches([pattern for pattern, _ in axes.AXES], path)
    kept = path.startswith("extra/") and not known
    if kept or (heads and of_head.search(path)):
      return PartitionSpec()
    return axes.spec(path, shape, sizes)

  return spec


def sharded(setup, shapes):
  """ShapeDtypeStructs with their shardings on the mesh."""
  spec = partition_spec(setup.mode, setup.trained.heads)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    *(shapes, mesh_lib.shardings(setup.mesh, shapes, spec)),
  )


def model_shapes(setup):
  """All parameters of the model in f32, abstract, with shardings."""
  return sharded(setup, jax.eval_shape(setup.model.init, jax.random.key(0)))


def base_shapes(setup):
  """The base as it is held, abstract, with shardings."""
  shapes = jax.eval_shape(_holds(setup.source.held), model_shapes(setup))
  return sharded(setup, shapes)


def trained_shapes(setup):
  """What a run trains, abstract, with shardings."""
  rng = jax.random.key(0)
  shapes = jax.eval_shape(setup.trained.init, base_shapes(setup), rng)
  return sharded(setup, shapes)


_BASES = {}  # {what a base is: (treedef, weak references to its arrays)}


def initial(setup):
  """The base that a run starts from, born sharded: also its reference.

  That of an adapter is held once however many adapters are on it: a policy's,
  a critic's, a reward model's.
  """
  if setup.base is not None:
    return setup.base
  if not setup.trained.on_base:
    return _loaded(setup)
  source, step = setup.source, None
  if source.run is not None:
    step = checkpoint.latest_step(source.spec)
  shapes = jax.tree.leaves(base_shapes(setup))
  arrays = tuple((x.shape, x.dtype.name, x.sharding) for x in shapes)
  key = source._replace(run=None, critic=None), step, arrays
  treedef, references = _BASES.get(key, (None, ()))
  leaves = [reference() for reference in references]
  if treedef is None or any(leaf is None for leaf in leaves):
    leaves, treedef = jax.tree.flatten(_loaded(setup))
    _BASES[key] = treedef, [weakref.ref(leaf) for leaf in leaves]
  return treedef.unflatten(leaves)


def _loaded(setup):
  """The base of `initial`, read or drawn anew."""
  source = setup.source
  published = pretrained(source.spec)
  if source.adapter is not None:
    if published is None or origin.parse(source.spec)[0] != "hf":
      raise ValueError("init_adapter needs its base: init_from = 'hf:…'")
    params = hf.load(published, model_shapes(setup), "float32")
    params = _with_peft(setup, published, params)
  elif published is not None:
    return hf.load(published, model_shapes(setup), source.held)
  elif source.spec is not None:
    params = _of_run(setup)
  else:
    params = setup.programs.init(jax.random.key(source.seed))
  if source.held == "float32":
    return params
  return run_lib.jitted(_holds(source.held), base_shapes(setup))(params)


def _holds(kind):
  """The function that makes a base of f32 parameters, of lora.BASES."""
  return functools.partial(
    tree.map_named, lambda path, x: lora.store(path, x, kind)
  )


def _of_run(setup):
  """The policy of another run, in f32; an adapter is merged into its base."""
  folder = setup.source.spec
  trained, source, asked = setup.source.run
  other = setup._replace(trained=trained, source=source, asked=asked)
  base = initial(other) if trained.on_base else None
  return merged(other, base, restored(other, base, folder, "init_from"))


def merged(setup, base, params):
  """The model's parameters in f32, of those of a TrainState.

  The base of `initial` is None where the policy is not on one.
  """
  if not (setup.trained.on_base or setup.trained.heads):
    return params
  merge = run_lib.jitted(setup.trained.merged, model_shapes(setup))
  return merge(base, params)


def restored(setup, base, workdir, field="the run", step=None):
  """What was trained and saved in a run's folder.

  Args:
    base: as of `merged`.
    field: what named the folder, for messages.
    step: None is the last.
  Raises: ValueError if there is nothing, or it is an adapter of another base.
  """
  if setup.trained.on_base:
    checkpoint.check_run(workdir, setup.asked, base)
  return checkpoint.load_params(workdir, trained_shapes(setup), field, step)


def _with_peft(setup, published, params):
  """Parameters in f32 with the PEFT adapter of init_adapter merged in."""
  shapes = model_shapes(setup)
  adapter, _, factor = peft.read(
    origin.folder(origin.parse(setup.source.adapter)[1], "init_adapter"),
    families.find(published.raw).table,
    setup.model.config,
    {path: x.shape for path, x in tree.named(shapes)},
    setup.model.vocab_size,
  )
  merge = run_lib.jitted(lambda p, a: lora.merge(p, a, factor), shapes)
  return merge(params, adapter)
