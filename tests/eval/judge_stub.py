"""An endpoint on this machine that speaks as much of OpenAI's API as we use.

And configs of a judge behind it.
"""

import contextlib
import http.server
import json
import re
import threading
from typing import NamedTuple

from dpo_jax.config import load

KEY = "sk-a-secret/that+nobody=may-see"
VARIABLE = "STUB_KEY"
_FENCED = re.compile(
  r"\[(\w+) (PROMPT|A|B) begins\]\n(.*?)\n\[\1 \2 ends\]", re.S
)


class Asked(NamedTuple):
  """A question that came in.

  Attributes:
    prompt, a, b: the texts in it.
    content: the whole.
    body: of the request.
    key: that came with it.
    mark: between which the texts stand.
  """

  prompt: str
  a: str
  b: str
  content: str
  body: dict
  key: str
  mark: str


class Stub(NamedTuple):
  """A server that runs; `asked` is what came in, in order."""

  url: str
  asked: list


class Error(NamedTuple):
  """What it says instead of an answer."""

  status: int
  text: str = "no"
  headers: tuple = ()


def preferring(better):
  """An honest judge: the text that is `better`, a function of texts, wins."""

  def answer(asked):
    letter = "A" if better(asked.a) > better(asked.b) else "B"
    return f"{letter} says more.\nPreferred: {letter}"

  return answer


@contextlib.contextmanager
def serve(answer):
  """A Stub; answer(Asked) -> text, Error, or bytes of a body."""
  asked, lock = [], threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
      pass

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["content-length"])))
      one = _read(body, self.headers.get("authorization", ""))
      with lock:
        asked.append(one)
      said = answer(one)
      status, headers = 200, ()
      if isinstance(said, Error):
        status, headers = said.status, said.headers
        said = json.dumps({"error": {"message": said.text}}).encode()
      elif isinstance(said, str):
        said = json.dumps(completion(said)).encode()
      with contextlib.suppress(OSError):  # who asked may have gone
        self.send_response(status)
        for name, value in (
          *headers,
          ("content-type", "application/json"),
          ("content-length", str(len(said))),
        ):
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said)

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield Stub(f"http://127.0.0.1:{server.server_port}/v1", asked)
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def _read(body, key):
  (message,) = body["messages"]
  content = message["content"]
  texts = {name: text for _, name, text in _FENCED.findall(content)}
  mark = _FENCED.search(content)[1]
  sides = (texts[name] for name in ("PROMPT", "A", "B"))
  return Asked(*sides, content, body, key.removeprefix("Bearer "), mark)


def completion(text, usage=(100, 10)):
  """A response of the API, 100 tokens asked and 10 answered."""
  out = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "stub",
    "choices": [
      {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
      }
    ],
  }
  if usage is not None:
    names = ("prompt_tokens", "completion_tokens")
    out["usage"] = {**dict(zip(names, usage, strict=True))}
    out["usage"]["total_tokens"] = sum(usage)
  return out


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def samples(path, texts):
  """A sample file of {prompt: completion}."""
  rows = [{"prompt": p, "completion": text} for p, text in texts.items()]
  return write(path, rows)


def config(folder, ours, theirs, url="http://127.0.0.1:9/v1", **fields):
  """A locked config of {prompt: completion} against another.

  Args:
    folder: gets the sample files and the answers.
    url: of a Stub.
    **fields: of config.judge.
  """
  values = {
    "samples": (samples(folder / "ours.jsonl", ours),),
    "against": samples(folder / "theirs.jsonl", theirs),
    "by": "openai:stub",
    "base_url": url,
    "key_from": VARIABLE,
    "cache": str(folder / "answers"),
    **fields,
  }
  return load.load_config(
    "judge", {f"judge.{name}": value for name, value in values.items()}
  )
