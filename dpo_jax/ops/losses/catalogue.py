"""The table of losses that `dpo-jax losses` prints, from their docstrings."""

import inspect
import re
import textwrap

from dpo_jax.ops import losses


def entries():
  """What is known of each loss.

  Returns: {loss: {"title", "formula" (lines), "source", "optimum", and the
    fields of its row in LOSSES}}.
  """
  out = {}
  for name, loss in losses.LOSSES.items():
    told = sections(loss.fn)
    out[name] = loss._asdict() | {
      "title": told["title"],
      "formula": told["formula"],
      "source": told.get("Source", ""),
      "optimum": told.get("Optimum", ""),
    }
  return out


def sections(fn):
  """A docstring as {"title", "formula", section or argument: text}."""
  lines = inspect.cleandoc(fn.__doc__ or fn.__name__).splitlines()
  out, name = {"title": lines[0], "formula": []}, None
  for line in lines[1:]:
    head = re.match(r"(?:  )?(\w[\w, ]*): ?(.*)", line)
    if line.startswith("    ") and name is None:
      out["formula"].append(line[4:].rstrip())
    elif head and (line[0] != " " or name is not None):
      name = head.group(1)
      out[name] = head.group(2)
    elif name is not None:
      out[name] = f"{out[name]} {line.strip()}".strip()
  return out


def text():
  """The table for a terminal, 80 columns wide."""
  blocks = []
  for name, entry in entries().items():
    defaults = ", ".join(f"{k} {v}" for k, v in entry["defaults"].items())
    told = {
      "source": entry["source"],
      "optimum": entry["optimum"],
      "defaults": defaults,
      "dialects": ", ".join(entry["dialects"]),
      "needs": ", ".join(entry["needs"]),
      "data": entry["data"] if entry["data"] != "pairs" else "",
    }
    notes = {
      "reads no reference": not entry["reference"],
      "couples the batch": entry["batch_level"],
      "of h: other divergences fit": entry["of_h"],
    }
    facts = [f"{what}: {words}" for what, words in told.items() if words]
    facts += [note for note, holds in notes.items() if holds]
    lines = [f"{name:14} {entry['title']}"]
    lines += [f"      {line}".rstrip() for line in entry["formula"]]
    lines += [_filled(fact, "    ") for fact in facts]
    blocks.append("\n".join(lines))
  about = (
    f"{len(losses.LOSSES)} losses. Δ = log π − log π_ref of a completion, h = "
    "Δ_w − Δ_l, σ logistic, sg stop-gradient. --config "
    "dpo:loss=NAME selects one with its defaults, "
    "loss=0.8*dpo+0.2*bco+nll a mixture (rpo and mpo are two), divergence=NAME "
    f"one of {', '.join(losses.DIVERGENCES)} for the reverse KL in a loss of h."
  )
  blocks.append(_filled(about, ""))
  return "\n\n".join(blocks)


def _filled(text, indent):
  deeper = f"{indent}  " if indent else ""
  return textwrap.fill(
    text,
    78,
    initial_indent=indent,
    subsequent_indent=deeper,
    break_on_hyphens=False,
  )
