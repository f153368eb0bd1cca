"""A trained policy as a folder that transformers or PEFT loads, and its upload.

What the folder holds:

    config.json, model.safetensors     the policy, an adapter merged into it; of
                                       a reward model a sequence classifier with
                                       one label, its gain in the weights
    adapter_config.json, …             or the adapter alone (export.form)
    tokenizer.json, …                  the tokenizer, with its chat template
    generation_config.json             what ends a generation
    README.md                          the model card: what it was trained on
    dpo_jax.json                       the config of the run, and its step; the
                                       bias of a reward model, which the format
                                       has no place for

None of them names a folder of this machine, but for the base of an adapter that
is one, which PEFT reads there: that is not uploaded.
"""

import jax
from etils import epath

from dpo_jax import lookup, store, tree
from dpo_jax.config import fields, origin, saved
from dpo_jax.data.tokens import vocabulary
from dpo_jax.models import families, hf, peft, write
from dpo_jax.run import build, checks, gain, trained
from dpo_jax.train import checkpoint

FORMS = ("merged", "adapter")
_SCORE = """
A reward model: the score of a prompt and a completion is read at the last token
of the completion, which is its end. `reward` in dpo_jax.json has the bias that
is to be added.
"""


def publish(config, workdir):
  """Exports the policy saved last in a run's folder.

  Args:
    config: of the run; reads export.
    workdir: run folder.
  Returns: the folder, complete: it appears when all files are written.
  Raises: ValueError for what the user can mend, before anything is written.
  """
  options, workdir = config.export, epath.Path(workdir)
  lookup.lookup(FORMS, options.form, "export.form")
  lookup.lookup(write.DTYPES, options.dtype, "export.dtype")
  if options.form == "adapter" and config.lora is None:
    raise ValueError(
      "export.form = 'adapter': this run trained all parameters, not an "
      "adapter; set it to 'merged'"
    )
  rewards = config.algo in checks.HEADED
  if rewards and options.form == "adapter":
    raise ValueError(
      "export.form = 'adapter': PEFT's files have no place for the head of a "
      "reward model; set it to 'merged'"
    )
  if jax.process_count() > 1:
    raise ValueError("export runs in one process")
  folder = epath.Path(options.folder or workdir / "export")
  if "://" in str(folder):
    raise ValueError(f"{folder}: exports go to a local folder; copy it then")
  kind, _ = origin.parse(config.init_from or "")
  whole_base = kind == "hf" and config.init_adapter is None
  if options.form == "adapter" and not whole_base:
    raise ValueError(
      "export.form = 'adapter' needs a base that PEFT can load: a run with "
      "init_from = 'hf:…' and no init_adapter. Export this one as 'merged'"
    )
  if options.form == "adapter" and options.push and not _on_hub(config):
    raise ValueError(
      f"export.push: the base of this adapter, {config.init_from!r}, is a "
      "folder that others have not; export it as 'merged'"
    )
  about = checkpoint.identity(workdir)
  about["config"] = origin.without_folders(config.to_dict())
  if rewards:
    found = gain.read(workdir, config.to_dict(), about["step"])
    about["gain"] = dict(zip(("gain", "bias"), found, strict=True))
  if folder.exists():
    if not _same(folder, about):
      raise ValueError(
        f"{folder} exists already; delete it, or set export.folder to a new one"
      )
    print(f"{folder}: done before, skipped")
  else:
    _write(config, workdir, folder, about)
  if options.push is not None:
    push(folder, options.push, options.public)
  return folder


def _same(folder, about):
  """Whether a folder is the complete export of the same policy."""
  path = folder / "dpo_jax.json"
  if not path.exists():
    return False
  there = store.read_json(path)
  if not {"config", "step", "checksums"} <= there.keys():
    return False
  # Earlier exports named folders.
  configs = origin.without_folders(there["config"]), about["config"]
  if saved.differences(*configs, fields.POLICY):
    return False
  forms = [[c["export"][name] for name in ("form", "dtype")] for c in configs]
  names = ("step", "checksums", "gain")
  same = all(there.get(n) == about.get(n) for n in names)
  return forms[0] == forms[1] and same


def _write(config, workdir, folder, about):
  setup = build.prepare_model(config)
  raw = _config_json(setup)
  base = trained.initial(setup) if setup.trained.on_base else None
  params = trained.restored(setup, base, workdir)
  # Of an older checkpoint, if the newest one proved damaged.
  about = {**about, **checkpoint.identity(workdir)}
  if "gain" in about:
    gain.read(workdir, config.to_dict(), about["step"])
  partial = folder.parent / f"{folder.name}.part"
  if partial.exists():
    partial.rmtree()
  partial.mkdir(parents=True)
  if config.export.form == "adapter":
    write_adapter(partial, setup, params)
  else:
    heads, merged = params, trained.merged(setup, base, params)
    merged = merged, setup.model.config, raw
    if "gain" in about:
      merged = _classifier(setup, *merged, heads["reward"], about)
    params, model, raw = merged
    size, dtype = setup.model.vocab_size, config.export.dtype
    write.write(partial, params, model, size, raw, dtype)
  tokenizer = vocabulary.load(config.tokenizer)
  vocabulary.write(tokenizer, partial)
  generation = _generation(setup, tokenizer)
  write.write_json(partial / "generation_config.json", generation)
  write.write_json(partial / "dpo_jax.json", about)
  card = _card(config, about["step"])
  store.write(partial / "README.md", card.encode())
  partial.rename(folder)


def _classifier(setup, params, model, raw, head, about):
  """What is written of a reward model: (parameters, ModelConfig, config.json).

  Its bias goes to about["reward"]. transformers reads the last token that does
  not pad, so an end that pads too would be read past: then nothing pads.
  """
  head = gain.folded(head, *about["gain"].values())
  bias = float(head["bias"])
  about["reward"] = {"bias": bias}
  if bias:
    print(
      f"the score has no bias in this format: add {bias:.6g} to what "
      "transformers computes (dpo_jax.json has it, and reward:hf: adds it)"
    )
  if raw.get("pad_token_id") in setup.tokenizer.end_ids:
    raw = {**raw, "pad_token_id": None}
  return write.classifier(params, model, raw, head["kernel"])


def _config_json(setup):
  """The config.json of what is exported.

  Raises: ValueError if no published architecture is this model.
  """
  model = setup.model
  checkpoint_there = _origin(setup.source)
  if checkpoint_there is not None:
    return checkpoint_there.raw
  raw = write.describe(model.config, model.vocab_size)
  bos, eos = setup.tokenizer.bos_id, setup.tokenizer.eos_id
  return {**raw, "bos_token_id": bos, "eos_token_id": eos}


def _origin(source):
  """The checkpoint that a run, or the run it started from, began with."""
  if source.run is not None:
    return _origin(source.run[1])
  return trained.pretrained(source.spec)


def _generation(setup, tokenizer):
  """generation_config.json: the checkpoint's own, or of the tokenizer.

  What ended the texts of the training ends a generation.
  """
  there, ends = _origin(setup.source), setup.tokenizer.end_ids
  if there:
    ends = tuple(dict.fromkeys((*there.ends, *ends)))  # in its own order
    found = origin.without_folders(hf.generation(there.where, there.raw))
  else:
    names = ("bos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    found = {name: i for name, i in ids.items() if i is not None}
  return {**found, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}


def write_adapter(folder, setup, adapter):
  """Writes an adapter as PEFT reads it.

  Args:
    folder: epath.Path that exists.
    setup: base.Setup of a config with lora, init_from = "hf:…".
    adapter: tree of arrays.
  """
  model = setup.model
  shapes = {p: x.shape for p, x in tree.named(trained.model_shapes(setup))}
  about = {
    **setup.trained.adapter,
    "base": origin.parse(setup.source.spec)[1],
  }
  table = families.find(_config_json(setup)).table
  peft.write(
    folder, adapter, table, model.config, shapes, model.vocab_size, about
  )


def _card(config, step):
  """The model card, with the metadata that the hub reads."""
  said = origin.without_folders(config.to_dict())
  library = "peft" if config.export.form == "adapter" else "transformers"
  loss = ", ".join(f"{k} {v}" for k, v in config.loss.items() if k != "name")
  base = ""
  if _on_hub(config):
    base = f"base_model: {origin.parse(config.init_from)[1]}\n"
  return f"""\
---
library_name: {library}
{base}tags: [dpo_jax]
---

Trained with dpo_jax: {config.loss.name}{f" ({loss})" * bool(loss)}, \
{step} steps on `{said["data"]["train"]}`, from \
`{said["init_from"] or "random parameters"}`.
{_SCORE * (config.algo in checks.HEADED)}"""


def _on_hub(config):
  """Whether a run starts from a model of the Hugging Face hub."""
  kind, name = origin.parse(config.init_from or "")
  return kind == "hf" and not epath.Path(name).exists()


def push(folder, name, public):
  """Uploads a folder to the Hugging Face hub, as a new commit of `name`.

  The token is that of `hf auth login`, or HF_TOKEN.

  Args:
    folder: what `publish` wrote.
    name: of the repository; a new one is private unless `public`.
    public: whether everybody may see it.
  Raises: ValueError with what the hub said, or if the repository is public
    and may not be.
  """
  import huggingface_hub

  try:
    api = huggingface_hub.HfApi()
    api.create_repo(name, exist_ok=True, private=not public)
    seen = not (public or api.repo_info(name).private)
    if seen:
      raise ValueError("it is public; set export.public = True, or a new name")
    api.upload_folder(repo_id=name, folder_path=str(folder))
  except Exception as error:  # no token, no right, no network: anything
    raise ValueError(
      f"{folder} is written, but could not be pushed to {name!r}: {error}. "
      "Log in with `hf auth login`, or set HF_TOKEN"
    ) from error
