"""Where each danger of files that others wrote is tested."""

import ast

import pytest

from tests import conftest

# What is refused or made harmless -> file of tests/ and the test that shows it.
TESTED = {
  "code that a tokenizer brings": (
    "data/tokens/test_vocabulary.py",
    "test_code_that_a_tokenizer_brings_is_never_run",
  ),
  "code that a scorer brings": (
    "eval/test_rewards.py",
    "test_code_that_a_scorer_brings_is_never_run",
  ),
  "pickled weights of a scorer": (
    "eval/test_rewards.py",
    "test_pickled_weights_of_a_scorer_are_not_read",
  ),
  "calls that would allow such code, pickles, eval and exec": (
    "security/test_foreign_code.py",
    "test_no_file_runs_code_of_what_it_reads",
  ),
  "an index of weights that leads out of its folder": (
    "models/test_hf.py",
    "test_an_index_that_leads_out_of_its_folder_is_refused",
  ),
  "pickled weights": (
    "models/test_hf.py",
    "test_pickled_weights_are_refused_with_the_way_to_convert_them",
  ),
  "a chat template that never ends": (
    "security/test_template_time.py",
    "test_a_template_without_an_end_is_an_error_that_names_it",
  ),
  "a sweep that names folders elsewhere": (
    "security/test_folders.py",
    "test_a_sweep_that_names_a_folder_elsewhere_is_refused",
  ),
  "kept programs that others can write": (
    "security/test_programs.py",
    "test_a_folder_of_programs_that_others_can_write_is_warned_of",
  ),
  "a small Parquet file that is large in memory": (
    "security/test_parquet.py",
    "test_a_small_file_of_many_equal_rows_is_read_in_parts",
  ),
  "scripts in the samples that a report shows": (
    "test_report.py",
    "test_samples_are_shown_as_text_whatever_they_hold",
  ),
  "scripts in what else a report shows": (
    "security/test_pages.py",
    "test_no_text_of_a_run_is_a_tag_on_the_page_or_in_markdown",
  ),
  "scripts in what a comparison of sweeps shows": (
    "report/test_compared.py",
    "test_names_of_files_are_text_on_the_page_and_in_markdown",
  ),
  "formulas in a form for people": (
    "eval/test_judge_form.py",
    "test_a_cell_is_no_formula",
  ),
  "a completion that says what the judge is to say": (
    "eval/test_judge_question.py",
    "test_a_verdict_inside_a_text_is_none_when_it_is_repeated",
  ),
  "keys of the environment": (
    "security/test_keys.py",
    "test_no_key_is_in_any_file_or_line_of_a_run",
  ),
  "the key of a judge": (
    "eval/test_judge_endpoint.py",
    "test_an_answer_with_the_key_in_it_is_kept_without",
  ),
  "an upload that everybody sees": (
    "test_export.py",
    "test_a_push_uploads_the_folder_and_a_failed_one_keeps_it",
  ),
}


@pytest.mark.parametrize("danger", TESTED)
def test_it_is_tested(danger):
  file, name = TESTED[danger]
  tree = ast.parse((conftest.ROOT / "tests" / file).read_text())
  defined = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
  assert name in defined
