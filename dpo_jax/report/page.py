"""A report as one HTML page that loads nothing."""

import jinja2

from dpo_jax.report import content, figures, folder

PAGE = """\
{% macro color(run) -%}
--c: var(--{{ "ink" if run is sameas sweep.reference
  else "s%d" % sweep.runs.index(run) }})
{%- endmacro %}
{# A run's name after its colour, as in the figures. #}
{% macro name(run) -%}
<i class="dot{{ " start" if run is sameas sweep.reference }}" \
style="{{ color(run) }}"></i>{{ run.name }}
{%- endmacro %}
{% macro formula(text) -%}
{{ text | replace("π_ref", "π<sub>ref</sub>" | safe) }}
{%- endmacro %}
{# A figure in both widths, of which the style sheet shows one. #}
{% macro figure(section, kind) -%}
<figure class="{{ kind }}">
{{ pictures[section].svgs | safe }}
<figcaption>{{ formula(content.captions(sweep)[section]) }}</figcaption>
</figure>
{%- endmacro %}
{% macro section(name) %}
<section>
<h2>{{ content.TITLES[name] }}</h2>
{{ caller()
  or '<p class="muted">%s</p>' | safe | format(content.NOTHING[name]) }}
</section>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ sweep.title }}</title>
<style>
:root { color-scheme: light dark; --paper: #fefefe; --card: #f4f5f7;
  --ink: #1b1f24; --muted: #5c6571; --grid: #dde1e6;
{%- for light, _ in palette %} --s{{ loop.index0 }}: {{ light }};{% endfor %} }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b;
  --card: #1e2228; --ink: #e8eaed; --muted: #a2abb6; --grid: #343a42;
{%- for _, dark in palette %} --s{{ loop.index0 }}: {{ dark }};{% endfor %} } }
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
</style>
</head>
<body>
<main>
<h1>{{ sweep.title }}</h1>
<p class="muted">{{ content.facts(sweep) }}</p>
{% for kind, lines in (
  ("notes", sweep.notes), ("missing", content.missing(sweep))) if lines %}
<ul class="{{ kind }}">
{% for line in lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endfor %}
{% call section("frontier") %}
{% if pictures.frontier %}{{ figure("frontier", "reward") }}{% endif %}
{% endcall %}
{% call section("table") %}
<div class="scroll" tabindex="0" role="region" aria-label="All numbers"><table>
<thead><tr>
{% for head in heads %}
<th scope="col">{{ head | replace("-", "\N{NON-BREAKING HYPHEN}") }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for run, cells in rows %}
<tr><th scope="row">{{ name(run) }}</th>
{% for cell in cells %}
<td>{{ cell[0] | replace("-", "−") }}
{%- if cell[1:] %} <span class="se">± {{ cell[1] }}</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="muted">{{ formula(content.captions(sweep).table) }}</p>
{% endcall %}
{% call section("curves") %}
{% if pictures.curves %}
<ul class="legend">
{% for run in sweep.runs %}
<li>{{ name(run) }}</li>
{% endfor %}
</ul>
{{ figure("curves", "curves") }}
{% endif %}
{% endcall %}
{% call section("samples") %}
{% for prompt, samples in content.prompts(sweep) %}
<h3 dir="auto">{{ prompt | trim }}</h3>
<div class="samples">
{% for run, sample in samples %}
<article style="{{ color(run) }}"><h4>{{ run.name }}</h4>
<div class="text" dir="auto">{{ sample.completion | trim }}</div>
<p class="muted">{{ content.score(sweep, sample) }}</p></article>
{% endfor %}
</div>
{% endfor %}
{% endcall %}
</main>
</body>
</html>
"""


def html(sweep, grid, pictures):
  """The report as one HTML page that loads nothing.

  Args: as markdown.markdown, but for the report.grid of its rows.
  """
  template = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda x: folder.clean(x) if type(x) is str else x,
  ).from_string(PAGE)
  heads, body = grid
  return template.render(
    sweep=sweep,
    palette=figures.palette(len(sweep.runs)),
    content=content,
    pictures=pictures,
    heads=heads,
    rows=[(r, c) for r, (_, *c) in zip(sweep.everyone, body, strict=True)],
  )
