"""config.loss as the terms it names, checked; and what each may refer to."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from dpo_jax import lookup
from dpo_jax.config import code
from dpo_jax.ops import losses
from dpo_jax.ops.losses import base, divergences

REFERENCES = ("frozen", "base", "cached", "ema", "none")


class Part(NamedTuple):
  """A term of the loss.

  Attributes:
    name: in LOSSES.
    fn: the loss, with its text fields bound.
    loss: losses.Loss.
    numeric: {argument: name of its value in hparams}.
    weight: name of the term's weight in hparams, or None for 1.
    code: {function of the user's own: digest of its code}.
  """

  name: str
  fn: Callable
  loss: losses.Loss
  numeric: dict
  weight: str | None
  code: dict

  def out(self, values, hparams):
    """What the loss returns, of features and hparams by their names.

    A loss of pairs that returns "loss" alone gets the metrics of the rewards

        β (log π − log π_ref)

    with its own β, or 1 where it has none; without a reference of log π.
    """
    policy_logps, ref_logps = values["policy_logps"], values["ref_logps"]
    numbers = {k: hparams[field] for k, field in self.numeric.items()}
    needs = {name: values[name] for name in self.loss.needs}
    out = self.fn(policy_logps, ref_logps, **needs, **numbers)
    if set(out) == {"loss"} and self.loss.data == "pairs":
      ratios = policy_logps - ref_logps if self.loss.reference else policy_logps
      rewards = numbers.get("beta", 1.0) * ratios
      return base.with_metrics(out["loss"], policy_logps, rewards)
    return out


def of(fields):
  """The Parts of config.loss.

  Raises: ValueError for what no loss, or no mixture, can have.
  """
  if fields.name != "mixture":
    return (_part(fields.name, fields, ""),)
  parts = tuple(_part(name, fields[name], f"{name}.") for name in names(fields))
  kinds = {kind_of_part(part) for part in parts} - {None}
  fits = len(kinds) == 1
  if None in map(kind_of_part, parts):  # it takes the first for the better
    fits = kinds <= {"pairs"} or kinds == {"rankings"}
  if not fits:
    raise ValueError(
      f"the losses {[p.name for p in parts]} of a mixture are of different "
      f"data: {sorted(p.loss.data for p in parts)}"
    )
  return parts


def names(fields):
  """Names of the terms of config.loss; they need not be those of LOSSES.

  The heaviest first: the reward metrics are its.
  """
  if fields.name != "mixture":
    return [fields.name]
  parts = [name for name in fields if name != "name"]
  return sorted(parts, key=lambda name: -fields[name].weight)


def kind_of_part(part):
  """losses.Loss.data of a part; None if it reads the best completion alone."""
  return None if part.loss.best_alone else part.loss.data


def kind_of(fields):
  """What a comparison of config.loss is made of, see losses.Loss.data."""
  return next(filter(None, map(kind_of_part, of(fields))), "pairs")


def of_rewards(fields):
  """The Part of config.loss of a reward model, whose `fn` takes rewards.

  Raises: ValueError for a loss of log-probs, or for what the loss cannot have.
  """
  known = {name for name, loss in losses.LOSSES.items() if loss.of_rewards}
  lookup.lookup(known, fields.name, "loss.name (of algo 'reward')")
  return _part(fields.name, fields, "", of_rewards=True)


def _part(name, fields, prefix, *, of_rewards=False):
  loss = lookup.lookup(losses.LOSSES, name, "loss.name")
  if loss.of_rewards and not of_rewards:
    raise ValueError(
      f"loss.name = {name!r} is of the scalar rewards of a reward model, not "
      f"of log-probs; take --config reward:loss={name}, whose algo is 'reward'"
    )
  fn, static = loss.fn, {k: v for k, v in fields.items() if isinstance(v, str)}
  static.pop("name", None)
  takes = set(inspect.signature(fn).parameters)
  takes -= {"policy_logps", "ref_logps", "rewards", *loss.needs}
  divergence = static.pop("divergence", None)
  own = {f"LOSSES[{name!r}]": fn}
  if divergence is not None:
    if not loss.of_h:
      raise ValueError(
        f"loss.divergence = {divergence!r}: loss {name!r} reads more of the "
        "log-ratios than h, so only the reverse KL fits"
      )
    fn = divergences.under(divergence, fn)
    link = losses.DIVERGENCES[divergence].fn
    own[f"DIVERGENCES[{divergence!r}]"] = link
    takes |= {"divergence", *losses.DIVERGENCES[divergence].defaults}
  takes |= {"weight"} if prefix else {"name"}
  if set(fields) != takes:
    raise ValueError(
      f"config.loss has the fields {sorted(set(fields) - {'name'})}, but loss "
      f"{name!r} takes {sorted(takes - {'name'})}; select a loss with its own "
      f"fields by the config's argument: --config FILE.py:loss={name}"
    )
  if loss.dialects:
    field = f"loss.{prefix}dialect"
    lookup.lookup(loss.dialects, fields.dialect, field)
  losses.check_ranges(name, fields, prefix)
  numeric = {k: f"{prefix}{k}" for k in takes if not isinstance(fields[k], str)}
  weight = numeric.pop("weight", None)
  own = {k: digest for k, f in own.items() if (digest := code.digest(f))}
  fn = functools.partial(fn, **static)
  return Part(name, fn, loss, numeric, weight, own)


def check_reference(ref, on_base, parts):
  """Raises ValueError where config.ref does not fit what is trained.

  What its own fields may be is of run.checks.

  Args:
    ref: of REFERENCES.
    on_base: whether an adapter is trained.
    parts: of `of`.
  """
  lookup.lookup(REFERENCES, ref, "ref")
  reads = any(part.loss.reference for part in parts)
  names = "+".join(part.name for part in parts)
  if not reads and ref != "none":
    raise ValueError(
      f"ref = {ref!r} has no effect with loss {names!r}, which reads no "
      "reference: set ref = 'none'"
    )
  whole = any("sequence_kl" in part.loss.needs for part in parts)
  if whole and ref in ("cached", "none"):
    raise ValueError(
      f"ref = {ref!r}: loss {names!r} needs the reference's whole "
      "distribution at every token, which only its weights give: set ref = "
      "'frozen'"
    )
  if ref == "base" and not on_base:
    raise ValueError(
      "ref = 'base' is the base of an adapter, and config.lora is not set: set "
      "ref = 'frozen'"
    )
  if ref == "frozen" and on_base:
    raise ValueError(
      "ref = 'frozen' would be a second copy of the adapter's base: set ref = "
      "'base'"
    )
