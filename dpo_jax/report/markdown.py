"""A report as Markdown, with the figures as links."""

import html
import re

from dpo_jax.report import best_of, content, folder, provenance, samples


def plain(text):
  """Text as Markdown that shows just this text, on one line."""
  text = html.escape(folder.clean(text).strip(), quote=False)
  text = re.sub(r"([\\`*_{}\[\]#|~$@])", r"\\\1", text)
  text = re.sub(r"^(\d*)([-+.)])(?=\s)", r"\1\\\2", text)  # not a list
  text = text.replace("://", "&#58;//").replace("www.", "www&#46;")
  return re.sub(r"\s*\n\s*", "<br>", text)


def table(heads, body):
  """Strings as a Markdown table: heads, and a list a row of name and cells."""
  lines = [
    [plain(head) for head in heads],
    ["---", *["---:"] * (len(heads) - 1)],
    *([plain(name), *map(content.cell, cells)] for name, *cells in body),
  ]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(sweep, grid, pictures):
  """The report as Markdown.

  Args:
    sweep: folder.Sweep.
    grid: the report.grid of its rows, for a page.
    pictures: what `draw` returned; linked as frontier.png and curves.png.
  """
  notes = content.captions(sweep)
  bodies = {
    "table": table(*grid),
    "best_of": _best_of(sweep),
    "provenance": _provenance(sweep),
    "samples": _samples(sweep),
  }
  for name, picture in pictures.items():
    bodies[name] = picture and f"![{content.TITLES[name]}]({name}.png)"
  parts = [f"# {plain(sweep.title)}", content.facts(sweep)]
  for lines in (sweep.notes, content.missing(sweep)):
    parts.append("\n".join(f"- {plain(line)}" for line in lines))
  for name, title in content.TITLES.items():
    if not bodies[name] and name not in content.NOTHING:
      continue  # nobody asked for it
    caption = plain(notes.get(name, "")) if bodies[name] else ""
    parts += [f"## {title}", bodies[name] or content.NOTHING[name], caption]
    if name == "frontier":
      parts.append("\n".join(f"- {plain(r)}" for r in content.remarks(sweep)))
  return "\n\n".join(part for part in parts if part) + "\n"


def _best_of(sweep):
  lines = best_of.grid(sweep)
  if lines is None:
    return ""
  heads, body = lines
  return table(heads, [(entry.name, *texts) for entry, texts in body])


def _provenance(sweep):
  alike, heads, body = provenance.facts(sweep)
  lines = [f"- {plain(what)}: {plain(value)}" for what, value in alike]
  body = [(name, *((plain(cell),) for cell in cells)) for name, *cells in body]
  return "\n".join(lines) + (f"\n\n{table(heads, body)}" if body else "")


def _samples(sweep):
  parts = []
  for prompt, drawn in samples.prompts(sweep):
    parts.append(f"### {plain(prompt)}")
    parts.append(
      "\n".join(
        f"- **{plain(run.name)}** ({plain(samples.score(sweep, sample))})<br>"
        f"{plain(sample['completion'])}"
        for run, sample in drawn
      )
    )
  return "\n\n".join(parts)
