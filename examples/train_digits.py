"""Train and export the small Vision Transformer behind ``snpc``'s digits example (a few minutes on one CPU core).

    python examples/train_digits.py --out snpc/data/digits

The data are scikit-learn's ``load_digits``: 1797 grey 8x8 images, split once (stratified, seeded) into 1297 training
and 500 test images. The test images are looked at only after the model is written: settings were chosen on a part held
out of the training images, and what is kept is the last epoch. Written are ``digits_vit.onnx``, ``calib.npz``
(unlabelled training images) and ``eval.npz`` (the test images).

Model input ``image``: [N, 1, 8, 8] float32, pixel / 16, so in [0, 1]; output ``logits``: [N, 10] float32. Names and
layout follow timm, so the file looks like what users export: packed QKV, fused attention, a class token.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SEED = 0
TEST_IMAGES = 500
CALIB_IMAGES = 256
CLASSES = 10
IMAGE, PATCH = 8, 2
DIM, DEPTH, HEADS, MLP_RATIO = 96, 4, 4, 4
DROPOUT = 0.1
EPOCHS, BATCH, WARMUP_EPOCHS = 80, 32, 5
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, EMA_DECAY = 1e-3, 0.05, 0.1, 0.995

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int64]


class PatchEmbed(nn.Module):
    """[N, 1, 8, 8] -> [N, 16, DIM]: one token per patch."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, DIM, kernel_size=PATCH, stride=PATCH)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with packed QKV, [N, T, DIM] -> [N, T, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.proj_drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """[N, T, DIM] -> [N, T, DIM] through a hidden layer of MLP_RATIO * DIM."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, MLP_RATIO * DIM)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * DIM, DIM)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM, eps=1e-6), Attention()
        self.norm2, self.mlp = nn.LayerNorm(DIM, eps=1e-6), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """[N, 1, 8, 8] in [0, 1] -> logits [N, 10], read off the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (IMAGE // PATCH) ** 2, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.head = nn.Linear(DIM, CLASSES)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def load_split() -> tuple[FloatArray, FloatArray, LabelArray, LabelArray]:
    """Training images, test images ([N, 1, 8, 8] float32 in [0, 1]), training labels, test labels ([N] int64)."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=SEED)
    train_images, test_images, train_labels, test_labels = parts
    return train_images, test_images, train_labels, test_labels


def augment(image: Tensor) -> Tensor:
    """A random small affine change per image: up to 7 degrees, 5 % size and half a pixel; [N, 1, 8, 8] both ways."""
    count = image.shape[0]
    spread = torch.tensor([math.radians(7.0), 0.05, 2 * 0.5 / IMAGE, 2 * 0.5 / IMAGE])  # the image is 2 wide
    angle, size, right, down = ((2 * torch.rand(count, 4) - 1) * spread).unbind(1)
    cos, sin = (1 + size) * angle.cos(), (1 + size) * angle.sin()
    theta = torch.stack((cos, -sin, right, sin, cos, down), dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def learning_rate_factor(epoch: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if epoch < WARMUP_EPOCHS:
        return (epoch + 1) / WARMUP_EPOCHS
    return 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays weight matrices only: pulling norms, biases and tokens towards zero helps nothing."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def train(images: FloatArray, labels: LabelArray) -> nn.Module:
    """The exponential moving average of the weights after EPOCHS; ``images`` [N, 1, 8, 8], ``labels`` [N]."""
    image, label = torch.from_numpy(images), torch.from_numpy(labels)
    model = VisionTransformer()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(image)).split(BATCH):
            loss = F.cross_entropy(model(augment(image[batch])), label[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            total += loss.item() * len(batch)
        schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}/{EPOCHS}  training loss {total / len(image):.4f}", flush=True)
    return average.module.eval()


def export(model: nn.Module, path: Path) -> None:
    """Write ``model`` with the TorchScript exporter, whose graphs are what most existing ONNX files look like."""
    example = torch.zeros(2, 1, IMAGE, IMAGE)  # two images: a batch of one could be folded into the graph
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )


def measure(folder: Path) -> float:
    """Test accuracy in [0, 1] of the written model on the written images, through onnxruntime."""
    session = ort.InferenceSession(folder / "digits_vit.onnx", providers=["CPUExecutionProvider"])
    with np.load(folder / "eval.npz") as data:
        logits = session.run(["logits"], {"image": data["image"]})[0]
        return float((logits.argmax(1) == data["labels"]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the digits example.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the images")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # layers too small to share out, and the order of float sums depends on it
    train_images, test_images, train_labels, test_labels = load_split()
    start = time.perf_counter()
    model = train(train_images, train_labels)
    print(f"trained {sum(p.numel() for p in model.parameters())} parameters in {time.perf_counter() - start:.0f} s")
    export(model, out / "digits_vit.onnx")
    np.savez_compressed(out / "calib.npz", image=train_images[:CALIB_IMAGES])
    np.savez_compressed(out / "eval.npz", image=test_images, labels=test_labels)
    print(f"test accuracy {100 * measure(out):.2f} % ({len(test_images)} images, onnxruntime)")


if __name__ == "__main__":
    main()
