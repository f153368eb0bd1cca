"""The table of losses that `dpo-jax losses` prints, from their docstrings."""

import inspect
import re

from dpo_jax.ops import losses


def entries(defaults):
  """What is known of each loss, as plain values.

  Args:
    defaults: {loss: {field: default}}.
  Returns: {loss: {"title", "formula" (lines), "source", "optimum", "needs",
    "dialects", "data", "reference", "batch_level", "of_h", "defaults"}}.
  """
  out = {}
  for name, loss in losses.LOSSES.items():
    told = sections(loss.fn)
    dialects = re.findall(r'"(\w+)"', told.get("dialect", ""))
    out[name] = {
      "title": told["title"],
      "formula": told["formula"],
      "source": told.get("Source", ""),
      "optimum": told.get("Optimum", ""),
      "needs": list(loss.needs),
      "dialects": dialects,
      "data": loss.data,
      "reference": loss.reference,
      "batch_level": loss.batch_level,
      "of_h": loss.of_h,
      "defaults": defaults.get(name, {}),
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


def text(defaults):
  """The table for a terminal, 80 columns wide."""
  blocks = []
  for name, entry in entries(defaults).items():
    facts = [f"source: {entry['source']}", f"optimum: {entry['optimum']}"]
    if entry["defaults"]:
      facts.append(
        "defaults: "
        + ", ".join(f"{k} {v}" for k, v in entry["defaults"].items())
      )
    if entry["dialects"]:
      facts.append("dialects: " + ", ".join(entry["dialects"]))
    if entry["needs"]:
      facts.append("needs: " + ", ".join(entry["needs"]))
    facts += _notes(entry)
    lines = [f"{name:14} {entry['title']}"]
    lines += [f"      {line}".rstrip() for line in entry["formula"]]
    lines += [wrapped for fact in facts for wrapped in _wrap(fact)]
    blocks.append("\n".join(lines))
  count = len(losses.LOSSES)
  others = ", ".join(losses.DIVERGENCES)
  blocks.append(
    f"{count} losses. Δ = log π − log π_ref of a completion, h = Δ_w − Δ_l, σ "
    "logistic, sg\nstop-gradient. --config configs/dpo.py:loss=NAME selects "
    "one with its defaults,\nloss=0.8*dpo+0.2*bco+nll a mixture (rpo and mpo "
    f"are two), divergence=NAME one of\n{others} for the reverse KL in a loss "
    "of h."
  )
  return "\n\n".join(blocks)


def _notes(entry):
  notes = []
  if entry["data"] != "pairs":
    notes.append(f"data: {entry['data']}")
  if not entry["reference"]:
    notes.append("reads no reference")
  if entry["batch_level"]:
    notes.append("couples the batch")
  if entry["of_h"]:
    notes.append("of h: other divergences fit")
  return notes


def _wrap(fact, width=78):
  lines, line = [], "   "
  for word in fact.split():
    if len(line) + len(word) + 1 > width:
      lines.append(line)
      line = "     "
    line += f" {word}"
  return [*lines, line]
