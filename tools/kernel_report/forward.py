"""What a whole forward launches, plain and refocused, and the least time that this can take. Counted, not measured.

Both run on tensors without data, on a GPU that need not exist, in fp16: plain is open_clip's `encode_image` with
PyTorch's attention and OpenAI's QuickGELU, refocused is `rfclip.dense_features` with the preset on the Triton kernels.
A launch of Triton is one, and so is an operator of PyTorch, although some, such as a sort, launch several kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

import rfclip
from rfclip.ops import dispatch
from tools.kernel_report.launches import Recording, Shape, Step, recording, tensor_bytes


@dataclass(frozen=True)
class GPU:
    """`flops`: dense fp16 products summed in fp32, a second; `bandwidth`: bytes a second; `torch`: part of its name."""

    flops: float
    bandwidth: float
    torch: str


# NVIDIA's "Ampere GA102 GPU Architecture" whitepaper (RTX 3090: 71 TFLOPS with FP32 accumulate, 936 GB/s), the A100
# data sheet (SXM, 80 GB: 312 TFLOPS, 2039 GB/s) and the H100 data sheet (SXM: 1979 TFLOPS with sparsity, so half of it
# without, and 3.35 TB/s). The H200 data sheet has the same products and 4.8 TB/s.
GPUS = {
    "RTX 3090": GPU(71e12, 936e9, "RTX 3090"),
    "A100 SXM 80 GB": GPU(312e12, 2039e9, "A100-SXM4-80GB"),
    "H100 SXM": GPU(989.5e12, 3350e9, "H100 80GB HBM3"),
    "H200 SXM": GPU(989.5e12, 4800e9, "H200"),
}


@dataclass(frozen=True)
class Assumptions:
    """What a projection assumes.

    Attributes:
        gpu: one of `GPUS`.
        peak: share of the peak rate that matrix products reach.
        bandwidth: share of the peak bandwidth that every step reaches.
        launch: microseconds that a launch costs without a CUDA graph.
        graph_launch: and within one.
    """

    gpu: str = "H100 SXM"
    peak: float = 1.0
    bandwidth: float = 1.0
    launch: float = 3.0
    graph_launch: float = 1.0

    def seconds(self, steps: list[Step], *, graph: bool) -> float:
        """Of steps that run one after another, each no faster than its operations and its bytes allow."""
        gpu, each = GPUS[self.gpu], self.graph_launch if graph else self.launch
        rates = gpu.flops * self.peak, gpu.bandwidth * self.bandwidth
        return sum(max(step.operations / rates[0], step.moved / rates[1]) + 1e-6 * each for step in steps)


@dataclass(frozen=True)
class Goal:
    """A shape and a batch, and what is asked of the path there.

    Attributes:
        launches: the most that a refocused forward may launch.
        time: the most it may take in a CUDA graph, over plain CLIP in one; None where nothing is asked.
    """

    shape: Shape
    batch: int
    launches: int
    time: float | None = None


@dataclass(frozen=True)
class Forward:
    """What was counted for a goal: the steps of plain CLIP, the same under `torch.compile`, and the refocused ones."""

    goal: Goal
    plain: list[Step]
    compiled: list[Step]
    refocused: list[Step]

    @property
    def launches(self) -> tuple[int, int]:
        """Of Triton and of PyTorch, refocused."""
        own = sum(step.triton for step in self.refocused)
        return own, len(self.refocused) - own

    @property
    def passes(self) -> float:
        """How often a block passes over its similarity, at most: bytes moved of it over those of [B, N, N] in fp32."""
        blocks = [0]
        for step in self.refocused:
            if step.name == "key_similarity_kernel":
                blocks.append(0)
            blocks[-1] += step.similarity
        return max(blocks) / (4 * self.goal.shape.sizes.N**2 * self.goal.batch)

    def missed(self, assumed: Assumptions) -> list[str]:
        """What is asked and not met."""
        time = assumed.seconds(self.refocused, graph=True) / assumed.seconds(self.plain, graph=True)
        found = []
        if len(self.refocused) > self.goal.launches:
            found.append(f"{len(self.refocused)} launches, at most {self.goal.launches} allowed")
        if self.passes > MOST_PASSES:
            found.append(f"{self.passes:.1f} passes over the similarity, at most {MOST_PASSES} allowed")
        if self.goal.time is not None and time > self.goal.time:
            found.append(f"{time:.2f} of plain CLIP's projected time, at most {self.goal.time} allowed")
        return found


MOST_PASSES = 8  # over the similarity of a block
WHOLE, STEPS = 150, 5  # launches of a forward of at most 256 patches; above, these more in each of the refocused blocks
FORWARDS = [
    Goal(Shape("ViT-B/16", (224, 224)), 1, WHOLE, 1.05),
    Goal(Shape("ViT-B/16", (224, 224)), 32, WHOLE, 1.05),
    Goal(Shape("ViT-B/16", (336, 448)), 8, WHOLE + 11 * STEPS, 1.15),
    Goal(Shape("ViT-B/16", (672, 896)), 1, WHOLE + 11 * STEPS, 1.5),
    Goal(Shape("ViT-B/16", (1024, 2048)), 1, WHOLE + 11 * STEPS, 1.8),
    Goal(Shape("ViT-L/14", (224, 224)), 1, 337),  # today's, as in the next
    Goal(Shape("ViT-L/14", (336, 448)), 8, 465),
]


def plain_model(shape: Shape, batch: int) -> tuple[CLIP, Tensor]:
    """open_clip's model with OpenAI's QuickGELU in fp16, and images for it, without data, on the current device."""
    config = open_clip.get_model_config(shape.model.replace("/", "-"))
    height, width = shape.size
    vision = config["vision_cfg"] | {"image_size": (height, width)}
    model = CLIP(config["embed_dim"], vision, config["text_cfg"], quick_gelu=True).eval()
    return _halved(model), torch.empty(batch, 3, height, width, dtype=torch.float16)


def compare(goal: Goal, kernels: list[int]) -> Forward:
    """Count both forwards; `kernels` are the bytes of what Inductor generates of the plain one."""
    plain, refocused = count(goal.shape, goal.batch)
    libraries = [step for step in plain if step.operations]
    return Forward(goal, plain, libraries + [Step("generated", True, 0, moved) for moved in kernels], refocused)


def count(shape: Shape, batch: int) -> tuple[list[Step], list[Step]]:
    """The steps of both forwards, plain and refocused."""
    name = shape.model.replace("/", "-")
    with (
        recording() as found,
        patch.object(F, "scaled_dot_product_attention", partial(_fused_attention, found)),
        patch.object(dispatch, "_obstacle", lambda device, dtype: None),
        torch.device("cuda"),
        torch.no_grad(),  # in inference mode, operators would be recorded before they are taken apart
    ):
        model, images = plain_model(shape, batch)
        found.steps.clear()
        model.encode_image(images)
        plain = list(found.steps)
        with rfclip.refocus(model, rfclip.RefocusConfig.preset(name, "openai"), backend="triton"):
            found.steps.clear()
            rfclip.dense_features(model, images)
    return plain, found.steps


def _fused_attention(found: Recording, q: Tensor, k: Tensor, v: Tensor, *given: Any, **named: Any) -> Tensor:
    """PyTorch's attention as one step, which it is on a GPU; on one that does not exist it is taken apart."""
    operations = 4.0 * q.numel() * k.shape[-2]
    found.steps.append(Step("scaled_dot_product_attention", False, operations, tensor_bytes([q, k, v, q])))
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _halved(model: CLIP) -> CLIP:
    """The model in fp16; its own `half` cannot exchange parameters without data."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                half = torch.empty_like(parameter, dtype=torch.float16)
                module._parameters[name] = torch.nn.Parameter(half, requires_grad=False)
    return model
