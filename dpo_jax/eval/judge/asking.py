"""Many questions to one endpoint: at once, again after errors, kept, bounded.

An answer is written to disk when it comes, under the address of its question:
nothing is asked twice, and what was interrupted goes on. What is kept costs
nothing, so a budget is of one command.
"""

import concurrent.futures
import json
import os
import random
import threading
from typing import NamedTuple

from etils import epath

from dpo_jax import progress, store

_FIRST = 1.0  # seconds before the second try; doubled for each after it
_MOST = 60.0  # seconds that the doubling comes to
_LONGEST = 600.0  # seconds that an endpoint may ask for
_IN_A_ROW = 5  # questions that fail one after the other: it is not the question


class Reply(NamedTuple):
  """What an endpoint answered.

  Attributes:
    text: the answer.
    tokens: of the question and of the answer; None where it does not say.
  """

  text: str
  tokens: tuple[int, int] | None


class Failure(NamedTuple):
  """Why a question has no answer.

  Attributes:
    reason: to be shown; holds no secret.
    again: whether the same question may be answered later.
    after: seconds that the endpoint asks to wait, or None.
    fatal: whether no other question will be answered either.
  """

  reason: str
  again: bool = False
  after: float | None = None
  fatal: bool = False


class Asked(NamedTuple):
  """What came of some questions.

  Attributes:
    replies: {question: Reply or Failure}; what was not asked is not in it.
    new: questions answered by this command.
    tokens: [asked, answered] of these; None if the endpoint does not say.
    stopped: why it asked no more, or None.
    folder: where the answers are kept.
  """

  replies: dict
  new: int
  tokens: list | None
  stopped: str | None
  folder: str


class _Account:
  """What is spent, and whether to go on; shared by the threads that ask."""

  def __init__(self, options):
    self._options, self._lock = options, threading.Lock()
    self._over = threading.Event()
    self._failed = 0  # one after the other
    self.new, self.tokens = 0, [0, 0]
    self.stopped = self.broken = None

  def wait(self, seconds):
    """Waits; returns whether nothing is to be asked any more."""
    return self._over.wait(seconds)

  def stop(self, reason=None, broken=None):
    """Ends the asking: as was agreed, or since something is wrong."""
    with self._lock:
      if not self._over.is_set():
        self.stopped, self.broken = reason, broken
      self._over.set()

  def paid(self, reply):
    """Counts an answer, and stops where the budget is spent."""
    o = self._options
    with self._lock:
      self.new, self._failed = self.new + 1, 0
      if reply.tokens is None or self.tokens is None:
        self.tokens = None
      else:
        both = zip(self.tokens, reply.tokens, strict=True)
        self.tokens = [a + b for a, b in both]
      tokens = self.tokens
    if tokens is None:
      if o.budget is not None or o.budget_tokens is not None:
        self.stop(
          broken="the endpoint tells no token counts (usage), so that no "
          "budget can be kept; set judge.budget and judge.budget_tokens to None"
        )
      return
    if o.budget_tokens is not None and sum(tokens) >= o.budget_tokens:
      self.stop(f"judge.budget_tokens = {o.budget_tokens:,} is spent")
    if o.budget is not None and cost(tokens, o) >= o.budget:
      self.stop(f"judge.budget = {o.budget:g} is spent")

  def failed(self, failure):
    """Counts a question without an answer, and stops where all will be."""
    with self._lock:
      self._failed += 1
      often = self._failed >= _IN_A_ROW
    if failure.fatal:
      self.stop(broken=failure.reason)
    elif often:
      self.stop(
        broken=f"{_IN_A_ROW} questions failed one after the other, the last "
        f"by: {failure.reason}"
      )


def cost(tokens, options):
  """Cost of [asked, answered] tokens; None without prices."""
  if tokens is None or options.price_in is None:
    return None
  return (tokens[0] * options.price_in + tokens[1] * options.price_out) / 1e6


def every(questions, send, made_of, options):
  """Asks what is not known yet.

  Args:
    questions: list of question.Question; equal ones are asked once.
    send: question -> Reply or Failure; raises nothing.
    made_of: plain dict of what else determines an answer.
    options: the fields of config.judge.
  Returns: Asked.
  Raises: ValueError where it makes no sense to go on; the answers that came are
    kept.
  """
  folder = _folder(options.cache)
  replies = {q: _kept(_path(folder, made_of, q)) for q in questions}
  missing = [q for q, reply in replies.items() if reply is None]
  account = _Account(options)

  def ask(question):
    reply = _answer(question, send, account, options.retries)
    if isinstance(reply, Reply):
      _keep(_path(folder, made_of, question), reply)
      account.paid(reply)
    elif reply is not None:
      account.failed(reply)
    return reply

  workers = concurrent.futures.ThreadPoolExecutor(options.concurrency)
  try:
    of = {workers.submit(ask, question): question for question in missing}
    done = concurrent.futures.as_completed(of)
    came = (future for future in done if future.result() is not None)
    for future in progress.over(came, len(missing), "questions", quiet=1.0):
      replies[of[future]] = future.result()
  finally:  # also when interrupted: what is under way is waited for, and kept
    account.stop()
    workers.shutdown(cancel_futures=True)
  if account.broken is not None:
    raise ValueError(
      f"{account.broken} ({account.new:,} answers of this command are kept in "
      f"{folder}: the same command goes on)"
    )
  replies = {q: reply for q, reply in replies.items() if reply is not None}
  told = account.new, account.tokens, account.stopped, str(folder)
  return Asked(replies, *told)


def _answer(question, send, account, retries):
  """Reply or Failure of a question; None if it is not to be asked any more."""
  for number in range(retries + 1):
    if account.wait(0):
      return None
    reply = send(question)
    if isinstance(reply, Reply) or not reply.again:
      return reply
    if (reply.after or 0) > _LONGEST:
      return reply._replace(
        reason=f"{reply.reason}, to be tried in {reply.after:,.0f} s"
      )
    # A random part, or all that wait would come back at once.
    seconds = min(_MOST, _FIRST * 2**number) * random.uniform(0.5, 1)
    seconds = max(seconds, (reply.after or 0) + 0.1 * seconds)
    if number < retries and account.wait(seconds):
      return None
  return reply


def _folder(folder):
  """judge.cache, or the one of the user."""
  if folder is None:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = f"{home}/dpo_jax/answers"
  return epath.Path(folder).expanduser()


def _path(folder, made_of, question):
  path = store.address(folder, {**made_of, **question._asdict()})
  return path.parent / f"{path.name}.json"


def _kept(path):
  """The Reply of a file, or None: it is not there, or damaged."""
  if not path.exists():
    return None
  try:
    answer = store.read_json(path)
    tokens = answer["tokens"]
    return Reply(answer["text"], tokens if tokens is None else tuple(tokens))
  except (ValueError, KeyError, TypeError):
    return None


def _keep(path, reply):
  store.write(path, json.dumps(reply._asdict()).encode())
