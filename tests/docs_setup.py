"""What the Python blocks of a page take as given: by the page's name, code that is run before each of its blocks."""

from __future__ import annotations

_ENCODER = """
import torch
from transformers import BertConfig, BertModel

config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
make_model = lambda: BertModel(config)
model = make_model().eval()
batches = [{"input_ids": torch.randint(100, (4, 8))} for _ in range(2)]
"""

_DATA = (
    _ENCODER
    + """
from torch.utils.data import DataLoader

encoder = small = model
dataset = [{"input_ids": torch.randint(100, (8,)), "label": 3} for _ in range(16)]
tokenize = lambda sentence: {"input_ids": torch.tensor([[len(word) for word in sentence.split()]])}
"""
)

_PERCEPTRON = """
import torch, tilewright
from torch import nn

model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128)).eval()
x = torch.randn(8, 256)
batches = [torch.randn(32, 256) for _ in range(2)]
train = lambda model: None
"""

_LAUNCH = """
import functools, torch
from tilewright.kernels.quantize.reference import quantize_per_row
from tilewright.kernels.quantize.triton_quantize import CONFIGS, plan_quantize_per_row

rows = torch.randn(4, 512).half()
out, scale = torch.zeros(4, 512, dtype=torch.int8), torch.zeros(4)
configs = CONFIGS[1:3]
plan = functools.partial(plan_quantize_per_row, rows, None, out, scale)
(launch,) = plan(configs[0])
reference = quantize_per_row(rows)[0]
"""

_TUNING = """
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int4_linear import triton_fused
from tilewright.kernels.int8_linear.triton_tile import TileConfig, candidates, why_not_config
from tilewright.kernels.tuning import tunable

problem = Problem("int8_linear", m=128, n=256, k=256, x_dtype=torch.float16)
"""

SETUP = {
    "README.md": _ENCODER,
    "ahead-of-time.md": _LAUNCH,
    "calibration.md": _DATA,
    "autotune.md": _PERCEPTRON + _TUNING,
    "derivatives.md": "import tilewright as tw\n" + _PERCEPTRON,
    "emulator.md": _LAUNCH,
    "sparse24.md": _PERCEPTRON,
}
