"""A model behind an endpoint that speaks OpenAI's API, as a judge.

The key is read from the environment, given to the client, and taken out of
every text that comes back: of errors, which may repeat it, and of answers. It
is in no message, no file and no exception that is passed on.
"""

import datetime
import email.utils
import json
import os
import re
import urllib.parse

from dpo_jax.eval.judge import asking, question, verdicts

_SHOWN = 200  # characters of what an endpoint says
# What a header can carry, and no word that answers would have by chance.
_KEY = re.compile("[!-~]{8,}")


def judge(model, pairs, options):
  """Verdicts of a model, asked about each pair in both orders.

  Both say the same text: it wins. They contradict each other: a tie.

  Args:
    model: its name at the endpoint.
    pairs: list of matched.Pair.
    options: the fields of config.judge.
  Returns: (list of verdicts.Verdict, plain dict about the asking, list of
    lines that tell of it).
  Raises: ValueError, see `asking.every`.
  """
  asked = {pair: _questions(pair) for pair in pairs if pair.ours != pair.theirs}
  every = [q for both in asked.values() for q in both]
  made_of = {
    "model": model,
    "closing": question.CLOSING,
    **{name: getattr(options, name) for name in _DECIDE},
  }
  send = _sender(model, options)
  came = asking.every(every, send, made_of, options)
  out = [
    _verdict(asked[pair], came.replies, options.verdict)
    if pair in asked
    else verdicts.identical(pair)
    for pair in pairs
  ]
  about = _about(came.replies.values(), options)
  return out, about, _told(came, about, len(set(every)), options)


# What of config.judge an answer depends on, beside the question.
_DECIDE = ("base_url", "template", "verdict", "temperature", "max_tokens")


def _questions(pair):
  """The two orders of a pair: ours first, theirs first."""
  orders = (pair.ours, pair.theirs), (pair.theirs, pair.ours)
  return [question.Question(pair.prompt, *texts) for texts in orders]


def _verdict(questions, replies, verdict):
  """The Verdict of a pair by the replies to its two questions."""
  there = [replies.get(q) for q in questions]
  if any(isinstance(reply, asking.Failure) for reply in there):
    reasons = [r.reason for r in there if isinstance(r, asking.Failure)]
    return verdicts.Verdict(None, "failed", {"reasons": reasons})
  if None in there:
    return verdicts.Verdict(None, "not asked", {})
  read = [
    question.read(reply.text, q, verdict)
    for reply, q in zip(there, questions, strict=True)
  ]
  said = [letter for letter, _ in read]
  about = {"said": said, "answers": [reply.text for reply in there]}
  if None in said:
    reasons = [reason for _, reason in read if reason]
    return verdicts.Verdict(None, "malformed", {**about, "reasons": reasons})
  if said[0] == said[1]:
    return verdicts.Verdict(0.5, "flip", about)
  return verdicts.Verdict(float(said[0] == "A"), "decided", about)


def _about(replies, options):
  """What all answers cost, whenever they came; plain values."""
  replies = [r for r in replies if isinstance(r, asking.Reply)]
  tokens = None
  if all(reply.tokens is not None for reply in replies):
    tokens = [sum(reply.tokens[side] for reply in replies) for side in (0, 1)]
  return {
    "answers": len(replies),
    "tokens": tokens,
    "cost": asking.cost(tokens, options),
  }


def _told(came, about, count, options):
  """Lines on what was asked and what it cost."""
  yield (
    f"{about['answers']:,} of {count:,} answers: {came.new:,} new, the others "
    f"kept in {came.folder}"
  )
  for what, tokens in (("new", came.tokens), ("all", about["tokens"])):
    if tokens is None:
      yield f"{what}: the endpoint tells no token counts"
      continue
    price = asking.cost(tokens, options)
    price = "" if price is None else f", cost {price:.4g}"
    yield f"{what}: {tokens[0]:,} tokens asked, {tokens[1]:,} answered{price}"
  left = count - about["answers"]
  if came.stopped is not None and left:
    yield (
      f"{came.stopped}: {left:,} questions are left out; the same command goes "
      "on"
    )


def _sender(model, options):
  """question -> asking.Reply or asking.Failure; it raises nothing."""
  key = _key(options.key_from)
  try:
    import openai
  except ImportError:
    raise ValueError(
      "judge.by = 'openai:…' needs the client: pip install 'dpo_jax[judge]'"
    ) from None
  client = openai.OpenAI(
    api_key=key or "none",
    base_url=options.base_url,
    timeout=options.timeout,
    max_retries=0,  # asking.py does, and counts them
  )
  settings = {"temperature": options.temperature}
  settings["max_tokens"] = options.max_tokens
  settings = {k: v for k, v in settings.items() if v is not None}

  def send(asked):
    text = question.worded(asked, options.template, options.verdict)
    try:
      response = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **settings
      )
      return _reply(response, key)
    except openai.APIStatusError as error:
      return _refused(error, key, options.key_from)
    except openai.APITimeoutError:
      return asking.Failure(f"no answer in {options.timeout:g} s", again=True)
    except openai.APIConnectionError as error:
      reason = _shown(error.__cause__ or error, key)
      return asking.Failure(f"no connection: {reason}", again=True)
    except Exception as error:  # what is no answer, in whatever way
      name = type(error).__name__
      return asking.Failure(f"no answer that can be read ({name})", again=True)

  return send


def _key(name):
  """The key in an environment variable; None where none is needed."""
  if name is None:
    return None
  key = os.environ.get(name, "").strip()
  if not _KEY.fullmatch(key):
    raise ValueError(
      f"the environment variable {name} (judge.key_from) holds no key: export "
      f"{name}=…, or set judge.key_from=None for an endpoint that needs none"
    )
  return key


def without(text, key):
  """A text in which no form of the key stands."""
  if key is None:
    return text
  forms = {key, urllib.parse.quote(key), json.dumps(key)[1:-1], repr(key)[1:-1]}
  for form in sorted(forms, key=len, reverse=True):
    text = text.replace(form, "[key]")
  return text


def _shown(said, key):
  """What an endpoint says, without what moves a terminal's cursor."""
  text = " ".join(without(str(said), key).split())
  return "".join(c if c.isprintable() else "�" for c in text)[:_SHOWN]


def _reply(response, key):
  """The asking.Reply of a response; any exception if it is none."""
  text = response.choices[0].message.content or ""
  usage, tokens = response.usage, None
  if usage is not None:
    tokens = int(usage.prompt_tokens), int(usage.completion_tokens)
  return asking.Reply(without(text, key), tokens)


def _refused(error, key, key_from):
  """The asking.Failure of a status that is an error."""
  status = error.status_code
  if status in (401, 403):  # what it says of the key is nobody's to read
    return asking.Failure(
      f"the endpoint refuses the key in {key_from} (status {status})"
      if key_from is not None
      else f"the endpoint wants a key (status {status}): set judge.key_from",
      fatal=True,
    )
  body = error.body if isinstance(error.body, dict) else {}
  said = _shown(body.get("message") or error.message, key)
  reason = f"status {status}: {said}"
  if status in (404, 405):  # no such model, no such address
    return asking.Failure(reason, fatal=True)
  again = status in (408, 409, 425, 429) or status >= 500
  after = _seconds(error.response.headers.get("retry-after"))
  return asking.Failure(reason, again, after)


def _seconds(text):
  """The seconds of a Retry-After: a number, or a date; None if it is none."""
  if text is None:
    return None
  try:
    return max(0.0, float(text))
  except ValueError:
    pass
  try:
    date = email.utils.parsedate_to_datetime(text)
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (date - now).total_seconds())
  except (TypeError, ValueError):
    return None
