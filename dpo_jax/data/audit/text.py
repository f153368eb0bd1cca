"""The report of data/audit.py as text of at most 88 columns."""

import json
import textwrap

from dpo_jax.data.audit import counts

_WIDTH = 88
_WHOLE, _HALF = 40, 16  # tokens: shown whole; else so many of each end
_COLUMNS = 3  # sources side by side
_LABEL = 34  # width of the first column
# Rows of the table below "examples", by their names in audit_counts.Facts.
_FOUND = {
  "boundary_merges": "with a boundary merge",
  "prompt_cut": "with the prompt cut",
  "completion_cut": "with a completion cut",
  "special_tokens": "with special tokens in the text",
  "empty": "with nothing scored but the end",
  "other_end": "ending where no sample stops",
}
_HOW_MANY = {0: "no", 1: "one", 2: "two or more"}


def text(report):
  """A report of `audit.audit` for people to read."""
  about = report["tokenizer"]
  bos, eos = (
    f"{name} {'none' if i is None else f'{i} {word}'}"
    for name, (i, word) in (("BOS", about["bos"]), ("EOS", about["eos"]))
  )
  lines = [
    _rule(f"{report['field']} = {report['spec']}", "═"),
    f"tokenizer {about['name']}",
    f"{about['size']:,} ids, {bos}, {eos}, "
    f"{'a' if about['template'] else 'no'} chat template",
  ]
  for number, shown in enumerate(report["shown"], 1):
    lines += ["", *_example(number, shown)]
  parts = report["parts"]
  for start in range(0, len(parts), _COLUMNS):
    lines += ["", *_table(parts[start : start + _COLUMNS])]
  lines += [*_remarks(parts), "", *_lengths(parts), "", *_checks(report), ""]
  return "\n".join(line.rstrip() for line in lines)


def verdict(reports):
  """Which limits are exceeded, a line for each data set, or that none is."""
  lines = []
  for report in reports:
    failed = [check["name"] for check in report["checks"] if check["failed"]]
    if failed:
      names = ", ".join(dict.fromkeys(failed))
      lines.append(f"limits of {report['field']} exceeded: {names}")
  return "\n".join(lines) or "no limit is exceeded"


def _rule(title, stroke):
  title = f"{stroke * 2} {title} "
  return title + stroke * (_WIDTH - len(title))


def _example(number, shown):
  """Lines of an example, token by token."""
  yield _rule(f"example {number} · {shown['origin']}", "─")
  for what, count in shown["changed"].items():
    yield f"{count} × {what}"
  prompt = shown["prompt"]
  yield f"prompt · {_plural(len(prompt), 'token')}, not scored"
  yield from _tokens(prompt)
  for k, completion in enumerate(shown["completions"]):
    tokens = completion["tokens"]
    better = [str(loser) for winner, loser in shown["pairs"] if winner == k]
    line = f"▸ {completion['name']} · {_plural(len(tokens), 'token')}, scored"
    if better and len(shown["completions"]) > 2:
      line += f" · better than {', '.join(better)}"
    yield line
    yield from _tokens(tokens)


def _tokens(tokens):
  cells = []
  for i, word, special in tokens:
    if word is None:  # part of a character, which the next token may complete
      word = "…"
    elif not special:
      word = json.dumps(word, ensure_ascii=False)
    cells.append(f"{i} {word}")
  if len(cells) > _WHOLE:
    left_out = f"… {len(cells) - 2 * _HALF} more …"
    cells = [*cells[:_HALF], left_out, *cells[-_HALF:]]
  line = f"    {cells[0]}"
  for cell in cells[1:]:
    if len(line) + len(cell) + 3 > _WIDTH:
      yield line
      line = f"    {cell}"
    else:
      line += f" │ {cell}"
  yield line


def _plural(count, noun):
  return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _share(count, of):
  """`12.5 %`, or an empty string for none."""
  if not count:
    return ""
  return f"{100 * count / of:.1f} %" if count / of >= 5e-4 else "<0.1 %"


def _table(parts):
  """Lines of counts, a column each for the sources."""

  def row(label, values, of=None):
    cells = []
    for k, value in enumerate(values):
      share = "" if of is None else _share(value, of[k])
      cells.append(f"{value:8,} {share:>7} ")
    return f"{label:{_LABEL}}{' '.join(cells)}"

  def each(field, name):
    return [part[field].get(name, 0) for part in parts]

  titles = [_short(part["source"], 16) for part in parts]
  yield " " * _LABEL + " ".join(f"{title:>8}".ljust(16) for title in titles)
  records = [part["records"] for part in parts]
  yield row("records", records)
  reasons = sorted({reason for part in parts for reason in part["skipped"]})
  comparisons = [part["comparisons"] for part in parts]
  if any(comparisons):
    reasons = dict.fromkeys(["identical pair", *reasons])
  for reason in reasons:
    yield row(f"  skipped: {reason}", each("skipped", reason), records)
  examples = [part["examples"] for part in parts]
  yield row("examples", examples)
  for name, label in _FOUND.items():
    yield row(f"  {label}", each("found", name), examples)
  for count, label in _HOW_MANY.items():
    yield row(f"  with {label} BOS", each("bos", count), examples)
  completions = [part["completions"] for part in parts]
  yield row("completions", completions)
  for count, label in _HOW_MANY.items():
    yield row(f"  with {label} EOS", each("eos", count), completions)
  if any(comparisons):
    yield row("comparisons", comparisons)


def _remarks(parts):
  """Lines on how records were read, and what of them was not."""
  if any(part["remarks"] for part in parts):
    yield from ("", "how records were read")
  for part in parts:
    if part["remarks"] and len(parts) > 1:
      yield f"  {part['source']}"
    for what, count in part["remarks"].items():
      yield textwrap.fill(
        f"{count:,} × {what}",
        _WIDTH,
        initial_indent=f"{'':{2 if len(parts) == 1 else 4}}",
        subsequent_indent=" " * 8,
        break_long_words=False,
      )


def _short(name, width):
  return name if len(name) <= width else f"…{name[1 - width :]}"


def _lengths(parts):
  heads = ("mean", "median", "p95", "max")
  yield f"{'tokens, the end counted':{_LABEL}}" + "".join(
    f"{head:>9}" for head in heads
  )
  for part in parts:
    indent = ""
    if len(parts) > 1:
      yield part["source"]
      indent = "  "
    for name, values in part["lengths"].items():
      numbers = "".join(f"{values[head]:9,.1f}" for head in heads)
      yield f"{indent + name:{_LABEL}}{numbers}"
    longer = part["longer"]
    if longer:
      yield (
        f"{indent}chosen is longer in {100 * longer['share']:.1f} % of "
        f"comparisons, as long in {100 * longer['equal']:.1f} %; mean "
        f"difference {longer['difference']:+.1f}"
      )


def _checks(report):
  """Lines of the limits, and of what to do where one is exceeded."""
  parts = {part["source"]: part for part in report["parts"]}
  yield f"limits of {report['field']}"
  for name, hint in counts.CHECKS.items():
    what = "records" if name == "skipped" else "examples"
    these = [c for c in report["checks"] if c["name"] == name]
    failed = [c for c in these if c["failed"]]
    if not failed and these[0]["limit"] is None:
      yield _limit("–", name, "not checked")
    elif not failed:
      count, of = (sum(c[key] for c in these) for key in ("count", "of"))
      yield _limit("ok", name, _count(count, of, what, these[0]["limit"]))
    for c in failed:
      line = _count(c["count"], c["of"], what, c["limit"])
      yield _limit("FAILED", name, line)
      if len(parts) > 1:
        yield _indented(f"in {c['source']}")
      part = parts[c["source"]]
      if not part["examples"]:
        yield _indented("nothing is left of it to train on")
      if name == "skipped":
        yield from map(_indented, part["why"].values())
      else:
        yield _indented(f"first: {part['first'][name]}")
    if failed:
      yield _indented(f"→ {hint}; or set audit.{name} higher")


def _limit(mark, name, line):
  return f"  {mark:8}{name:17}{line}"


def _indented(line):
  gap = " " * 10
  return textwrap.fill(
    line,
    _WIDTH,
    initial_indent=gap,
    subsequent_indent=gap + "  ",
    break_long_words=False,
    break_on_hyphens=False,
  )


def _count(count, of, what, limit):
  share = f" ({_share(count, of)})" if count else ""
  bound = "" if limit is None else f", at most {100 * limit:.3g} %"
  return f"{count:,} of {of:,} {what}{share}{bound}"
