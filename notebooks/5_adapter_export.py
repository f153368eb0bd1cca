# %% [markdown]
# # Adapter, export, transformers
#
# From a checkpoint in the files of Hugging Face, through an adapter (LoRA),
# back to files that `transformers` loads. The model is a tiny Llama of random
# weights which this notebook writes itself, so nothing is downloaded; the name
# of a model on the hub in its place is all that a real run changes.

# %%
# In Colab: clone the repository there, then take the # of the next line away.
# # %pip install -q ./dpo_jax

# %% [markdown]
# ## A checkpoint
#
# Three kinds of file: a tokenizer (here one of bytes), the shape and the
# weights.

# %%
import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

folder = pathlib.Path("tiny-llama")
folder.mkdir(exist_ok=True)
alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: number for number, letter in enumerate(alphabet)}
byte_level = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
  add_prefix_space=False
)
byte_level.decoder = tokenizers.decoders.ByteLevel()
tokenizer = transformers.PreTrainedTokenizerFast(
  tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>"
)
tokenizer.save_pretrained(folder)
shape = transformers.LlamaConfig(
  vocab_size=len(tokenizer),
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  bos_token_id=tokenizer.bos_token_id,
  eos_token_id=tokenizer.eos_token_id,
  architectures=["LlamaForCausalLM"],
)
shape.save_pretrained(folder)

# %%
rng, width, wide, heads = np.random.default_rng(0), 32, 64, 16
shapes = {"model.embed_tokens": (len(tokenizer), width), "model.norm": (width,)}
shapes["lm_head"] = (len(tokenizer), width)
for layer in range(2):
  at = f"model.layers.{layer}"
  shapes |= {
    f"{at}.input_layernorm": (width,),
    f"{at}.self_attn.q_proj": (width, width),
    f"{at}.self_attn.k_proj": (heads, width),
    f"{at}.self_attn.v_proj": (heads, width),
    f"{at}.self_attn.o_proj": (width, width),
    f"{at}.post_attention_layernorm": (width,),
    f"{at}.mlp.gate_proj": (wide, width),
    f"{at}.mlp.up_proj": (wide, width),
    f"{at}.mlp.down_proj": (width, wide),
  }
weights = {
  f"{name}.weight": np.ones(size, np.float32)
  if len(size) == 1
  else rng.normal(0, 0.05, size).astype(np.float32)
  for name, size in shapes.items()
}
safetensors.numpy.save_file(
  weights, folder / "model.safetensors", metadata={"format": "pt"}
)
sorted(path.name for path in folder.iterdir())

# %% [markdown]
# ## An adapter on it
#
# `model=hf:…` takes shape, weights and tokenizer from the folder (or the hub);
# `lora` trains an adapter beside its frozen kernels. That base is the reference
# too: there is no second copy of the weights.

# %%
import dpo_jax as dj

config = dj.load_config(
  f"dpo:lora,model=hf:{folder},optim=adamw",
  [
    "data.train=toy",
    "data.eval=toy:64",
    "data.max_prompt_length=64",
    "data.max_completion_length=64",
    "data.batch_size=8",
    "train.steps=30",
    "optim.learning_rate=1e-2",
  ],
)
result = dj.fit(config, "runs/adapter")
result

# %% [markdown]
# The checkpoint holds the adapter alone. `policy` grafts it onto its base: a
# pure function and parameters, as `dj.build` gives them.

# %%
import jax

run = dj.load_run("runs/adapter")
apply, params = run.policy
base = dj.build(run.config)[1]
count = {
  "base": sum(x.size for x in jax.tree.leaves(base)),
  "adapter": sum(x.size for x in jax.tree.leaves(result.state.params)),
}
count

# %%
dj.sample(run, ["The plot was"], temperature=0.0, max_new_tokens=8)

# %% [markdown]
# ## Export
#
# `merged` folds the adapter into the weights and writes a whole model; with
# `export.form=adapter` the files would be PEFT's. The command line says
# `dpo-jax export --workdir runs/adapter`.

# %%
from dpo_jax import export

exported = export.publish(run.config, "runs/adapter")
sorted(path.name for path in exported.iterdir())

# %% [markdown]
# ## transformers reads it
#
# With torch installed, the exported model is loaded and asked for the most
# likely continuation: the same tokens as above.

# %%
try:
  import torch
except ImportError:
  torch = None
  print("torch is not installed: pip install torch shows the comparison")

if torch is not None:
  ours = dj.sample(run, ["The plot was"], temperature=0.0, max_new_tokens=8)[0]
  model = transformers.AutoModelForCausalLM.from_pretrained(str(exported))
  reader = transformers.AutoTokenizer.from_pretrained(str(exported))
  ids = [reader.bos_token_id, *reader("The plot was")["input_ids"]]
  prompt = torch.tensor([ids])
  with torch.no_grad():
    theirs = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=8,
      pad_token_id=reader.eos_token_id,
    )[0, len(ids) :].tolist()
  print("here        ", ours["tokens"])
  print("transformers", theirs)
  assert theirs == ours["tokens"]

# %% [markdown]
# `dpo_jax.json` in the folder says which run it is from, `README.md` is the
# model card; `export.push=NAME` uploads the folder to the hub.

# %%
about = json.loads((exported / "dpo_jax.json").read_text())
{"step": about["step"], "loss": about["config"]["loss"]}
