"""A report as one HTML page that loads nothing."""

import html as html_lib

from dpo_jax.report import content, figures, folder

CSS = """
:root { color-scheme: light dark; --paper: #fefefe; --card: #f4f5f7;
  --ink: #1b1f24; --muted: #5c6571; --grid: #dde1e6; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b;
  --card: #1e2228; --ink: #e8eaed; --muted: #a2abb6; --grid: #343a42; DARK } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.2rem; margin: 48px 0 8px; }
h3 { font-size: 1rem; font-weight: 600; margin: 28px 0 10px; }
p, ul { margin: 8px 0; }
ul { padding-left: 20px; }
h1, li, p, h3 { overflow-wrap: anywhere; }
h3, .text { white-space: pre-wrap; }
.muted, figcaption, .se { color: var(--muted); }
figcaption, .muted { font-size: .875rem; max-width: 72ch; }
.missing { border-left: 3px solid var(--muted); background: var(--card);
  padding: 8px 14px; margin: 16px 0; font-size: .9375rem; list-style: none; }
figure { margin: 0; }
sub { line-height: 0; font-size: .8em; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text, figure svg tspan { font-family: inherit !important; }
svg.reward-wide { max-width: 780px; }
svg.reward-narrow, svg.curves-narrow { max-width: 480px; }
@media (max-width: 859px) { figure svg[class$=wide] { display: none; } }
@media (min-width: 860px) { figure svg[class$=narrow] { display: none; }
  .reward { display: grid; grid-template-columns: minmax(0, 780px) 1fr;
    gap: 24px; align-items: end; }
  .reward figcaption { padding-bottom: 10px; min-width: 180px; } }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
thead th { vertical-align: bottom; white-space: normal; min-width: 68px;
  color: var(--muted); font-weight: 500; line-height: 1.3; }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); padding-left: 2px; }
tbody th { font-weight: 600; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 7px;
  border-radius: 50%; background: var(--c); flex: none; }
.dot.start { border-radius: 1px; transform: rotate(45deg) scale(.85); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0;
  list-style: none; font-size: .9375rem; }
.samples { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.samples article { background: var(--card); border-top: 3px solid var(--c);
  border-radius: 2px; padding: 10px 14px 12px; min-width: 0; display: flex;
  flex-direction: column; }
.samples h4 { margin: 0 0 6px; font-size: .9375rem; }
.samples .text { overflow-wrap: anywhere; flex: 1; font-size: .9375rem; }
.samples .muted { margin: 10px 0 0; font-variant-numeric: tabular-nums; }
"""


def html(sweep, grid, pictures):
  """The report as one HTML page that loads nothing.

  Args:
    sweep: report.Sweep.
    grid: report.grid of its rows, with long heads.
    pictures: what `draw` returned; drawn into the page.
  """
  notes = content.captions(sweep)
  bodies = {
    "frontier": _figure(pictures["frontier"], notes["frontier"], "reward", ""),
    "table": _table(sweep, *grid) + _caption(notes["table"]),
    "curves": _figure(
      pictures["curves"], notes["curves"], "curves", _legend(sweep)
    ),
    "samples": _samples(sweep),
  }
  sections = [
    f"<section>\n<h2>{content.TITLES[name]}</h2>\n"
    + (body or f'<p class="muted">{content.NOTHING[name]}</p>')
    + "\n</section>"
    for name, body in bodies.items()
  ]
  title = _text(sweep.title)
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_style(len(sweep.runs))}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="muted">{_text(content.facts(sweep))}</p>
{_list(sweep.notes, "notes")}
{_list(content.missing(sweep), "missing")}
{"".join(sections)}
</main>
</body>
</html>
"""


def _text(text):
  return html_lib.escape(folder.clean(text))


def _style(count):
  """The style sheet, with a colour a run in light and dark."""
  light, dark = (
    " ".join(f"--s{i}: {color};" for i, color in enumerate(colors))
    for colors in zip(*figures.palette(count), strict=True)
  )
  return CSS.replace("LIGHT", light).replace("DARK", dark)


def _list(lines, kind):
  items = "".join(f"<li>{_text(line)}</li>" for line in lines)
  return f'<ul class="{kind}">{items}</ul>' if lines else ""


def _caption(text):
  return f'<p class="muted">{_formula(text)}</p>'


def _formula(text):
  return _text(text).replace("π_ref", "π<sub>ref</sub>")


def _color(sweep, run):
  if run is sweep.reference:
    return "--c: var(--ink)"
  return f"--c: var(--s{sweep.runs.index(run)})"


def _name(sweep, run):
  """A run's name after its colour, as in the figures."""
  kind = "dot start" if run is sweep.reference else "dot"
  dot = f'<i class="{kind}" style="{_color(sweep, run)}"></i>'
  return f"{dot}{_text(run.name)}"


def _legend(sweep):
  items = "".join(f"<li>{_name(sweep, run)}</li>" for run in sweep.runs)
  return f'<ul class="legend">{items}</ul>\n'


def _figure(picture, caption, kind, legend):
  """A figure in both widths, of which the style sheet shows one."""
  if not picture:
    return ""
  caption = f"<figcaption>{_formula(caption)}</figcaption>"
  return (
    f'{legend}<figure class="{kind}">\n{picture.svgs}\n{caption}\n</figure>'
  )


def _table(sweep, heads, body):
  lines = []
  for run, (_, *cells) in zip(sweep.everyone, body, strict=True):
    line = [f'<th scope="row">{_name(sweep, run)}</th>']
    for cell in cells:
      value, *error = (part.replace("-", "−") for part in cell)
      error = "".join(f' <span class="se">± {se}</span>' for se in error)
      line.append(f"<td>{value}{error}</td>")
    lines.append(f"<tr>{''.join(line)}</tr>")
  # U+2011 is a hyphen that no line ends after.
  head = "".join(
    f'<th scope="col">{_text(text).replace("-", "‑")}</th>' for text in heads
  )
  return (
    '<div class="scroll" tabindex="0" role="region" aria-label="All numbers">'
    f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
    + "\n".join(lines)
    + "\n</tbody>\n</table></div>\n"
  )


def _samples(sweep):
  """One card a run for each prompt; they stand side by side where they fit."""
  parts = []
  for prompt, samples in content.prompts(sweep):
    parts.append(f'<h3 dir="auto">{_text(prompt.strip())}</h3>')
    cards = (
      f'<article style="{_color(sweep, run)}"><h4>{_text(run.name)}</h4>\n'
      f'<div class="text" dir="auto">{_text(sample["completion"].strip())}'
      f"</div>\n{_caption(content.score(sweep, sample))}</article>"
      for run, sample in samples
    )
    parts.append(f'<div class="samples">{"".join(cards)}</div>')
  return "\n".join(parts)
