"""The points of a sweep that a command names: the product of its axes."""

import itertools
import re

from dpo_jax.config import load

# A value of an axis: no comma but in brackets or quotes.
_VALUE = re.compile(
  r"""(?:[^,()\[\]'"]|\([^()]*\)|\[[^\[\]]*\]|'[^']*'|"[^"]*")+"""
)


def of(source):
  """The points of a sweep: of --sweep, or of the file's `sweep()`."""
  if source.axes:
    return product(source, source.axes)
  if hasattr(source.module, "sweep"):
    return list(source.module.sweep())
  raise ValueError(
    f"{source.path} has no sweep(), which yields the points: name them, "
    "--sweep loss.beta=0.05,0.1"
  )


def product(source, axes):
  """All combinations of the axes' values, the last axis fastest.

  Args:
    source: load.Source.
    axes: "loss.beta=0.05,0.1", values of a field; or ":loss=dpo,simpo", values
      of an argument of the config, as in `--config dpo:loss=simpo`. Values are
      read as those of overrides are.
  Returns: list of {"arg": "loss=dpo", "loss.beta": 0.05}.
  Raises: ValueError for what is no field, or no value of it, at any point.
  """
  choices = {}
  for axis in axes:
    name, given, text = axis.partition("=")
    if name in choices:
      raise ValueError(f"--sweep {name} is given twice; give its values in one")
    if not given:
      raise ValueError(f"--sweep {axis}: it needs values, {name}=A,B")
    choices[name] = _VALUE.findall(text)
    if not text or ",".join(choices[name]) != text:
      raise ValueError(f"--sweep {axis}: a value is empty")
  return [
    _point(source, dict(zip(choices, values, strict=True)))
    for values in itertools.product(*choices.values())
  ]


def _point(source, texts):
  """The point of {":loss": "dpo", "loss.beta": "0.05"}."""
  args = [f"{k[1:]}={v}" for k, v in texts.items() if k.startswith(":")]
  point = {"arg": ",".join(args)} if args else {}
  config, spec = source.at(point), ":".join([source.path, *args])
  if section := next((k for k in texts if hasattr(config.get(k), "items")), ""):
    raise ValueError(
      f"--sweep {section} is not a field but a section of {spec}; an argument "
      f"of the config has a colon: --sweep :{section}={texts[section]},…"
    )
  return point | {
    key: load.parsed(config, spec, key, text, f"--sweep {key}")
    for key, text in texts.items()
    if not key.startswith(":")
  }
