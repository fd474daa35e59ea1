"""The cuts of the bundled CLIP in scenes with simulated distraction: eigenvalues begin like 0.995, 0.994, 0.988."""

import torch

import rfclip
from rfclip import reference
from rfclip.ops import eager
from rfclip.simulated_distraction import inject_distraction, injected
from rfclip.tiny.scenes import make_scene


def cuts_of_scenes(monkeypatch, seeds):
    """S, the distraction tokens, the defocused ones by the eager backend, and exactly; four windows of each scene."""
    cuts, cut = [], eager.KeyAverage.cut

    def kept(self, distraction, threshold):
        found = cut(self, distraction, threshold)
        S = self.similarity
        want = reference.defocus_mask(reference.fiedler_vector(S.double()), distraction, threshold=threshold)
        cuts.append((S, distraction, found.target, want))
        return found

    monkeypatch.setattr(eager.KeyAverage, "cut", kept)
    model = rfclip.load_model()
    segmenter = rfclip.Segmenter(model, config=injected(model.refocus_config), backend="eager")
    with segmenter, inject_distraction(model, 0.1):
        for seed in seeds:
            segmenter.segment(make_scene(seed).picture(), [("dog",), ("grass",)])
    return [torch.cat(each) for each in zip(*cuts, strict=True)]
