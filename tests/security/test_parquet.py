"""What a small Parquet file may take of the memory."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.read import files

ROWS, LETTERS = 1_000_000, 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A file of 1 GB of rows that are equal, in one row group."""
  path = tmp_path_factory.mktemp("small") / "equal.parquet"
  places = pa.array(np.zeros(ROWS, np.int32))
  column = pa.DictionaryArray.from_arrays(places, pa.array(["x" * LETTERS]))
  # As plain text to its reader.
  table = pa.table({"text": column})
  pq.write_table(table, path, store_schema=False, row_group_size=ROWS)
  assert path.stat().st_size < 2**17
  assert pq.ParquetFile(path).num_row_groups == 1
  return path


@pytest.fixture
def pool():
  """Arrow's memory while the test runs."""
  before = pa.default_memory_pool()
  counted = pa.proxy_memory_pool(before)
  pa.set_memory_pool(counted)
  yield counted
  pa.set_memory_pool(before)


def test_a_small_file_of_many_equal_rows_is_read_in_parts(small, pool):
  rows = list(itertools.islice(files.parquet(str(small)), 2000))
  assert rows[-1] == (f"{small}:2000", {"text": "x" * LETTERS})
  assert pool.max_memory() < 2**25


def test_rows_of_one_large_value_are_read_in_smaller_parts(
  tmp_path, pool, monkeypatch
):
  """A value that stands in the file once may be that of every row."""
  monkeypatch.setattr(files, "_BATCH", 2**22)
  places = pa.array(np.zeros(300, np.int32))
  column = pa.DictionaryArray.from_arrays(places, pa.array(["x" * 2**19]))
  path = tmp_path / "large.parquet"
  pq.write_table(pa.table({"text": column}), path, store_schema=False)
  rows = list(itertools.islice(files.parquet(str(path)), 30))
  assert len(rows[-1][1]["text"]) == 2**19
  assert pool.max_memory() < 2**25  # 256 of them are 2**27


def test_a_row_group_that_is_too_large_is_refused_with_a_way_out(
  tmp_path, monkeypatch
):
  path = tmp_path / "large.parquet"
  text = [str(number) * 100 for number in range(1000)]
  pq.write_table(pa.table({"text": text}), path)
  monkeypatch.setattr(files, "_GROUP", 2**16)
  with pytest.raises(ValueError, match=r"row group 0 has .*row_group_size"):
    next(files.parquet(str(path)))
  pq.write_table(pa.table({"text": text}), path, row_group_size=100)
  assert len(list(files.parquet(str(path)))) == 1000
