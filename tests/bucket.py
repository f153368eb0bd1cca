"""A bucket on this machine: Google's JSON API for objects, as far as gcsfs and
TensorStore speak it.

Objects are whole or absent, have generations, and are neither appended to nor
renamed. Processes that are given `environment` see it as gs://bucket.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from typing import NamedTuple

_PATH = re.compile(
  r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?"
)
_STAMP = "2026-01-01T00:00:00.000Z"


class Reply(NamedTuple):
  """An answer: a dict is JSON."""

  code: int
  content: bytes | dict = b""
  headers: dict = {}  # noqa: RUF012


NOT_FOUND = Reply(404, {"error": {"code": 404, "message": "No such object"}})
CHANGED = Reply(412, {"error": {"code": 412, "message": "conditionNotMet"}})
LATER = Reply(503, {"error": {"code": 503, "message": "Backend Error"}})


class Bucket:
  """Objects by their names.

  Attributes:
    objects: {name: (generation, content)}.
    delay: seconds that every request takes.
    failing: every so many requests one is answered by a 503; 0 for none.
  """

  def __init__(self):
    self.objects, self.delay, self.failing = {}, 0.0, 0
    self._lock, self._uploads, self._count = threading.Lock(), {}, 0

  def names(self):
    return sorted(self.objects)

  def environment(self):
    """Of processes that use it."""
    url = f"http://127.0.0.1:{self.port}"
    return {
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
      "FSSPEC_GS": '{"token": "anon", "use_listings_cache": false}',
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC
      "NO_PROXY": "127.0.0.1",
      "no_proxy": "127.0.0.1",
    }

  def answer(self, command, url, headers, body):
    """The Reply to a request."""
    time.sleep(self.delay)
    url = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    with self._lock:
      self._count += 1
      if self.failing and self._count % self.failing == 0:
        return LATER
      if url.path.startswith("/upload/"):
        return self._upload(command, url.path, query, headers, body)
      found = _PATH.fullmatch(url.path)
      if found is None:
        return NOT_FOUND
      if found[2] is None:
        return self._list(query) if url.path.endswith("/o") else Reply(200, {})
      return self._object(command, url.path, found[2], query, headers)

  def _put(self, name, content, query):
    match = query.get("ifGenerationMatch")
    generation, _ = self.objects.get(name, (0, b""))
    if match and int(match) != generation:
      return CHANGED
    self.objects[name] = self._count, content
    return Reply(200, self._about(name))

  def _upload(self, command, path, query, headers, body):
    del command
    if query["uploadType"] == "media":
      return self._put(query["name"], body, query)
    if query["uploadType"] == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1]
      _, about, part, _ = body.split(b"--" + boundary.encode())
      name = json.loads(about.split(b"\n\n", 1)[1])["name"]
      return self._put(name, part.split(b"\n\n", 1)[1][:-1], query)
    if "upload_id" not in query:
      name = query.get("name") or json.loads(body)["name"]
      key = str(self._count)
      self._uploads[key] = name, b"", query
      url = f"http://{headers['Host']}{path}?uploadType=resumable"
      return Reply(200, b"", {"Location": f"{url}&upload_id={key}"})
    name, content, first = self._uploads[query["upload_id"]]
    content += body
    self._uploads[query["upload_id"]] = name, content, first
    if headers.get("Content-Range", "").endswith("/*"):
      return Reply(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
    return self._put(name, content, first)

  def _list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    start, end = query.get("startOffset", ""), query.get("endOffset")
    items, prefixes = [], set()
    for name in self.names():
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      first, more, _ = name[len(prefix) :].partition(delimiter or "\0")
      if more:
        prefixes.add(prefix + first + more)
      else:
        items.append(self._about(name))
    return Reply(200, {"items": items, "prefixes": sorted(prefixes)})

  def _object(self, command, path, name, query, headers):
    copied = re.fullmatch(r"(.*)/rewriteTo/b/[^/]+/o/(.*)", name)
    name, *target = map(
      urllib.parse.unquote, copied.groups() if copied else [name]
    )
    if name not in self.objects:
      return NOT_FOUND
    generation, content = self.objects[name]
    if target:
      about = self._put(target[0], content, {}).content
      return Reply(200, {"done": True, "resource": about})
    if command == "DELETE":
      if int(query.get("ifGenerationMatch") or generation) != generation:
        return CHANGED
      del self.objects[name]
      return Reply(204)
    if query.get("alt") != "media" and not path.startswith("/download/"):
      return Reply(200, self._about(name))
    sent = {"x-goog-generation": str(generation)}
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
    if span is None:
      return Reply(200, content, sent)
    size = len(content)
    start = int(span[1]) if span[1] else max(0, size - int(span[2]))
    stop = min(size, int(span[2]) + 1) if span[1] and span[2] else size
    if start >= stop:
      return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
    sent["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, content[start:stop], sent)

  def _about(self, name):
    generation, content = self.objects[name]
    return {
      "kind": "storage#object",
      "bucket": "bucket",
      "name": name,
      "generation": str(generation),
      "metageneration": "1",
      "size": str(len(content)),
      "updated": _STAMP,
      "timeCreated": _STAMP,
      "etag": str(generation),
    }


def _handler(bucket):
  """The class of HTTP handlers that answer for a bucket."""

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a reply is two small writes

    def log_message(self, *_):
      pass

    def _body(self):
      if "chunked" not in self.headers.get("Transfer-Encoding", ""):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
      out = b""
      while size := int(self.rfile.readline().split(b";")[0], 16):
        out += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return out

    def do_GET(self):
      reply = bucket.answer(self.command, self.path, self.headers, self._body())
      content = reply.content
      if isinstance(content, dict):
        content = json.dumps(content).encode()
      self.send_response(reply.code)
      for name, value in reply.headers.items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      with contextlib.suppress(ConnectionError):  # whoever asked was killed
        self.wfile.write(content)

    do_POST = do_PUT = do_DELETE = do_GET

  return Handler


@contextlib.contextmanager
def served():
  """Yields a Bucket that answers on a free port."""
  bucket = Bucket()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(bucket))
  bucket.port = server.server_port
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield bucket
  finally:
    server.shutdown()
    server.server_close()
