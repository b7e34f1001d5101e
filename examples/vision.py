"""Vision: train a small convolutional network, fuse it, and make it int8 from end to end.

The data are scikit-learn's digits, 1797 images of 8 x 8 pixels that come with the package. Run it as a whole,
``python examples/vision.py``, or cell by cell in an editor that knows ``# %%``.
"""

# %% [markdown]
# ## A network and its data
# Convolution, batch-norm and ReLU, and one residual connection: what most vision models are made of.

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tilewright as tw

torch.manual_seed(0)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + x)


stem = (nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
model = nn.Sequential(*stem, Residual(32), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]

optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(6):
    for rows in torch.randperm(1000).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
model.eval()


@torch.inference_mode()
def accuracy(model):
    """Per cent of the 797 images that were not trained on."""
    return 100 * (model(images[1000:]).argmax(1) == labels[1000:]).float().mean().item()


print(f"float32: {accuracy(model):.1f} % right")

# %% [markdown]
# ## Fuse
# "fuse" folds each batch-norm into its convolution, and lets the convolution's kernel do the addition and the ReLU
# behind it. It finds them by following the data, not by names. Nothing is quantised, so the answers are the same.

fused = tw.convert_model(model, "fuse", progress=False)
difference = (fused(images[:64]) - model(images[:64])).abs().max().item()
print(f"fused: {accuracy(fused):.1f} % right, the largest difference of a logit is {difference:.1e}")

# %% [markdown]
# ## int8
# In an int8 network the activations stay int8 from one convolution to the next, so their ranges must be known
# before: that is what the calibration data are for. A few hundred inputs like those to come are enough.

small = tw.convert_model(model, "int8", calibration_data=images[:256].split(64), progress=False)
print(tw.report(small))

# %% [markdown]
# ## Compare
# The accuracy stays within a point, and the weights take a quarter of the bytes.


def stored(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


print(f"int8: {accuracy(small):.1f} % right, {stored(small) / 1e3:.0f} kB instead of {stored(model) / 1e3:.0f} kB")

# %% [markdown]
# ## Where accuracy matters more
# `max_error` keeps a convolution in float whose output would differ by more than that share. Here the bound is so
# low that a layer with an error of 0.7 % stays in float, and the report says why.

careful = tw.convert_model(
    model, tw.Int8Static(max_error=0.006), calibration_data=images[:256].split(64), progress=False
)
kept = sum(type(layer) is tw.nn.ConvBnAct2d for layer in careful.modules())
print(f"with max_error=0.006: {accuracy(careful):.1f} % right, {kept} of 5 convolutions stay in float")
