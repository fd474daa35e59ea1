"""Wrong arguments: every error says what was expected and what was given."""

import math

import pytest
import torch

X = torch.ones(2, 6, 8)
Q = torch.ones(2, 3, 7, 4)
M = torch.zeros(2, 6, dtype=torch.bool)
S = torch.ones(2, 6, 6)
C = torch.zeros(2, dtype=torch.int64)  # a class for each of X's two planes

Y = torch.ones(2, 7, 8)  # all tokens


def joint(f, **changes):
    """`joint_repair` with sound arguments, but for the changes."""
    sound = {"x": Y, "y": Y, "before": X[..., :2], "candidates": M, "q": Q, "k": Q, "weight": Y[0, 0], "bias": Y[0, 0]}
    return f.joint_repair(**sound | {"dims": [1, 3], "threshold": 0.1, "grid": (2, 3)} | changes)


ERRORS = {
    # tensors: rank, size, dtype, emptiness, type
    "scores-rank": (lambda f: f.distraction_scores(X[0], [1]), "x must be", "[B>=0, N>=1, d>=1]", "float32", "[6, 8]"),
    "scores-dtype": (lambda f: f.distraction_scores(X.int(), [1]), "x must be a floating-point", "int32"),
    "scores-no-tensor": (lambda f: f.distraction_scores([[[1.0]]], [0]), "x must be", "got list"),
    "scores-no-patches": (lambda f: f.distraction_scores(X[:, :0], [1]), "N>=1", "[2, 0, 8]"),
    "mask-rank": (lambda f: f.distraction_mask(X[0], [1], 0.5), "x must be", "[6, 8]"),
    "received-q-rank": (lambda f: f.received_attention(Q[0], Q), "q must be", "[B>=0, H>=1, T>=2, D>=1]", "[3, 7, 4]"),
    "received-k-shape": (lambda f: f.received_attention(Q, Q[:, :, 1:]), "k must be", "T=7", "[2, 3, 6, 4]"),
    "received-k-dtype": (lambda f: f.received_attention(Q, Q.half()), "k must be a float32", "float16"),
    "received-cls-only": (lambda f: f.received_attention(Q[:, :, :1], Q[:, :, :1]), "T>=2", "[2, 3, 1, 4]"),
    "joint-y": (lambda f: joint(f, y=Y[:, 1:]), "y must be a float32", "T=7", "[2, 6, 8]"),
    "joint-before": (lambda f: joint(f, before=X), "before must be a float32 tensor [B=2, N=6, J=2]", "[2, 6, 8]"),
    "joint-candidates": (lambda f: joint(f, candidates=M.int()), "candidates must be a bool", "[B=2, N=6]", "int32"),
    "joint-q": (lambda f: joint(f, q=Q[:1], k=Q[:1]), "x must be", "B=1", "[2, 7, 8]"),
    "joint-weight": (lambda f: joint(f, weight=C), "weight must be a floating-point tensor [d=8]", "int64"),
    "joint-dims": (lambda f: joint(f, dims=[]), "dims must have at least one dimension"),
    "joint-threshold": (lambda f: joint(f, threshold=math.nan), "threshold must be a number", "nan"),
    "joint-grid": (lambda f: joint(f, grid=(2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "joint-size": (lambda f: joint(f, size=4), "size must be an odd", "got 4"),
    "candidate-dims": (
        lambda f: f.candidate_layer_norm(Y, None, Y[0, 0], Y[0, 0], [], 0.5),
        "dims must have at least one dimension",
    ),
    "candidate-branch": (
        lambda f: f.candidate_layer_norm(Y, X, Y[0, 0], Y[0, 0], [1], 0.5),
        "branch must be",
        "T=7",
        "[2, 6, 8]",
    ),
    "project-mask": (lambda f: f.project_tokens(Y, M[:, 1:], X[0], X[0, :, 0], X), "mask must be", "N=6", "[2, 5]"),
    "project-weight": (lambda f: f.project_tokens(Y, M, S[0], S[0, 0], Y), "weight must be", "d=8", "[6, 6]"),
    "project-bias": (lambda f: f.project_tokens(Y, M, X[0], X[0, 0], Y), "bias must be", "[e=6]", "[8]"),
    "project-out": (lambda f: f.project_tokens(Y, M, X[0], None, Y), "out must be", "e=6", "[2, 7, 8]"),
    "redistribute-x": (lambda f: f.redistribute_embeddings(X[0], M, [1], (2, 3)), "x must be", "[6, 8]"),
    "redistribute-mask-dtype": (
        lambda f: f.redistribute_embeddings(X, M.int(), [1], (2, 3)),
        "mask must be a bool tensor [B=2, N=6]",
        "int32 of shape [2, 6]",
    ),
    "redistribute-mask-shape": (lambda f: f.redistribute_embeddings(X, M[:, 1:], [1], (2, 3)), "mask", "N=6", "[2, 5]"),
    "redistribute-mask-rank": (lambda f: f.redistribute_embeddings(X, M[..., None], [1], (2, 3)), "mask", "[2, 6, 1]"),
    "weights-rank": (lambda f: f.dimension_weights(X[0]), "x must be", "[6, 8]"),
    "clamp-mask": (lambda f: f.clamp_embeddings(X, M.int(), [1], 0.5), "mask must be a bool", "int32"),
    "clamp-threshold": (lambda f: f.clamp_embeddings(X, M, [1], math.nan), "threshold must be a number", "nan"),
    "filter-mask": (lambda f: f.filter_embeddings(X, M[:, 1:], (2, 3)), "mask", "N=6", "[2, 5]"),
    "filter-grid": (lambda f: f.filter_embeddings(X, M, (2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "filter-size": (lambda f: f.filter_embeddings(X, M, (2, 3), size=4), "size must be an odd", "got 4"),
    "filter-statistic": (
        lambda f: f.filter_embeddings(X, M, (2, 3), statistic="mode"),
        "statistic",
        '"mean" or "median"',
        "'mode'",
    ),
    "blend-mask": (lambda f: f.blend_embeddings(X, M[:, 1:], (2, 3)), "mask", "N=6", "[2, 5]"),
    "blend-grid": (lambda f: f.blend_embeddings(X, M, (2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "refocused-q": (lambda f: f.refocused_attention(Q.int(), Q, Q, M, M, 0.7), "q must be a floating-point", "int32"),
    "refocused-k": (lambda f: f.refocused_attention(Q, Q[:1], Q, M, M, 0.7), "k must be", "B=2", "[1, 3, 7, 4]"),
    "refocused-v": (lambda f: f.refocused_attention(Q, Q, Q[..., :3], M, M, 0.7), "v must be", "D=4", "[2, 3, 7, 3]"),
    "refocused-v-dtype": (
        lambda f: f.refocused_attention(Q, Q, Q.double(), M, M, 0.7),
        "v must be a float32",
        "float64",
    ),
    "refocused-distraction": (
        lambda f: f.refocused_attention(Q, Q, Q, torch.zeros(2, 7, dtype=torch.bool), M, 0.7),
        "distraction must be a bool tensor [B=2, N=6]",
        "[2, 7]",
    ),
    "refocused-distraction-dtype": (
        lambda f: f.refocused_attention(Q, Q, Q, M.float(), M, 0.7),
        "distraction",
        "float32",
    ),
    "refocused-target": (
        lambda f: f.refocused_attention(Q, Q, Q, M, M[:, 1:], 0.7),
        "target must be a bool tensor [B=2, N=6] or [B=2, T=7]",
        "[2, 5]",
    ),
    "refocused-target-dtype": (lambda f: f.refocused_attention(Q, Q, Q, M, M.int(), 0.7), "target", "int32"),
    "similarity-k": (lambda f: f.key_similarity(Q[0]), "k must be", "[3, 7, 4]"),
    "similarity-running": (lambda f: f.key_similarity(Q, S[:, 1:], 1), "running", "[B=2, N=6, N=6]", "[2, 5, 6]"),
    "similarity-running-dtype": (
        lambda f: f.key_similarity(Q.half(), S.half(), 1),
        "running must be a float32",
        "float16",
    ),
    "normalizers-copy": (lambda f: f.key_normalizers(Q, copy=Q[:, :, 1:]), "copy must be", "T=7", "[2, 3, 6, 4]"),
    "normalizers-copy-dtype": (lambda f: f.key_normalizers(Q, copy=Q.half()), "copy must be a float32", "float16"),
    "affinity-normalizers": (lambda f: f.key_affinity(Q, Q[..., 0, 0]), "normalizers must be", "T=7", "[2, 3]"),
    "affinity-running": (lambda f: f.key_affinity(Q, Q[..., 0], S[:, 1:], 1), "running", "N=6", "[2, 5, 6]"),
    "affinity-running-dtype": (
        lambda f: f.key_affinity(Q.half(), Q[..., 0], S, 1),
        "running must be a float16",
        "float32",
    ),
    "affinity-count": (lambda f: f.key_affinity(Q, Q[..., 0], S), "running must come with count >= 1"),
    "tokens-affinity": (lambda f: f.defocused_tokens(S[:, 1:], M), "affinity must be", "[2, 5, 6]"),
    "tokens-distraction": (lambda f: f.defocused_tokens(S, M[:, 1:]), "distraction must be a bool", "N=6", "[2, 5]"),
    "tokens-start": (lambda f: f.defocused_tokens(S, M, S[:, 0]), "start must be", "N=6", "[2, 6]"),
    "tokens-threshold": (lambda f: f.defocused_tokens(S, M, threshold="median"), '"mean" or "otsu"', "'median'"),
    "refocused-order": (
        lambda f: f.refocused_attention(Q, Q, Q, M, M, 0.7, order=M.int()),
        "order must be an int32 tensor [B=2, N1=7]",
        "[2, 6]",
    ),
    "proxy-normalizers": (
        lambda f: f.proxy_attention(Q[None], Q, normalizers=Q[..., 0]),
        "normalizers must be",
        "[L=1, B=2, H=3, T=7]",
        "[2, 3, 7]",
    ),
    "fiedler-square": (lambda f: f.fiedler_vector(S[:, 1:]), "similarity must be", "[B>=0, N>=1, N>=1]", "[2, 5, 6]"),
    "fiedler-empty": (lambda f: f.fiedler_vector(S[:, :0, :0]), "similarity", "N>=1", "[2, 0, 0]"),
    "fiedler-start": (lambda f: f.fiedler_vector(S, torch.ones(2, 5)), "start must be", "[B=2, N=6]", "[2, 5]"),
    "defocus-rank": (lambda f: f.defocus_mask(S), "fiedler must be", "[B>=0, N>=1]", "[2, 6, 6]"),
    "defocus-dtype": (lambda f: f.defocus_mask(M), "fiedler must be a floating-point", "bool"),
    "defocus-distraction": (lambda f: f.defocus_mask(S[:, 0], M[:, 1:]), "distraction must be a bool", "N=6", "[2, 5]"),
    "defocus-distraction-dtype": (lambda f: f.defocus_mask(S[:, 0], M.int()), "distraction must be a bool", "int32"),
    "proxy-rank": (lambda f: f.proxy_attention(Q, Q), "keys must be", "[L>=1, B>=0, H>=1, T>=2, D>=1]", "[2, 3, 7, 4]"),
    "proxy-no-layers": (lambda f: f.proxy_attention(Q[None][:0], Q), "keys", "L>=1", "[0, 2, 3, 7, 4]"),
    "proxy-v": (lambda f: f.proxy_attention(Q[None], Q[:, :, 1:]), "v must be", "T=7", "[2, 3, 6, 4]"),
    "proxy-v-dtype": (lambda f: f.proxy_attention(Q[None], Q.half()), "v must be a float32", "float16"),
    "self-v": (lambda f: f.self_attention(Q, Q, Q[:, :, 1:]), "v must be", "T=7", "[2, 3, 6, 4]"),
    "self-bias-even": (lambda f: f.self_attention(Q, Q, Q, torch.ones(3, 4)), "bias", "2 gh - 1", "[3, 4]"),
    "self-bias-grid": (lambda f: f.self_attention(Q, Q, Q, torch.ones(3, 3)), "bias", "gh * gw = N = 6", "[3, 3]"),
    "self-bias-dtype": (lambda f: f.self_attention(Q, Q, Q, M.int()), "bias", "int32"),
    "self-bias-patches": (
        lambda f: f.self_attention(Q, Q, Q, S[:, 1:]),
        "bias must be",
        "[B=2, N=6, N=6]",
        "[2, 5, 6]",
    ),
    "self-k": (lambda f: f.self_attention(Q, Q.half(), Q), "k must be a float32", "float16"),
    "self-scale": (lambda f: f.self_attention(Q, Q, Q, scale=torch.ones(3)), "scale must be", "[B=2]", "[3]"),
    "self-factor": (lambda f: f.self_attention(Q, Q, Q, factor=None), "factor must be a number", "None"),
    "self-out": (lambda f: f.self_attention(Q, Q, Q, out=Q[..., 1:]), "out must be", "D=4", "[2, 3, 7, 3]"),
    "self-bias-no-tensor": (lambda f: f.self_attention(Q, Q, Q, 1.0), "bias", "got float"),
    "cosine-guide": (lambda f: f.cosine_aggregation(X[0], X, 0.4), "guide must be", "[B>=0, N>=1, d>=1]", "[6, 8]"),
    "cosine-x": (lambda f: f.cosine_aggregation(X, X[:, 1:], 0.4), "x must be", "N=6", "[2, 5, 8]"),
    "cosine-x-dtype": (lambda f: f.cosine_aggregation(X, X.half(), 0.4), "x must be a float32", "float16"),
    "cosine-cuts": (lambda f: f.cosine_aggregation(X, X, torch.ones(3)), "cut must be", "[B=2]", "[3]"),
    "cosine-gain": (lambda f: f.cosine_aggregation(X, X, 0.4, gain=-1), "gain must be a number", "-1"),
    "cosine-cut": (lambda f: f.cosine_aggregation(X, X, None), "cut must be a number", "None"),
    "average-rank": (
        lambda f: f.average_windows(X, [(0, 0)], (2, 2), (2, 2)),
        "logits must be",
        "[W>=1, K>=1, gh>=1, gw>=1]",
    ),
    "average-corners": (lambda f: f.average_windows(Q, [(0, 0)], (2, 2), (2, 2)), "corners", "W=2", "[(0, 0)]"),
    "average-corner": (lambda f: f.average_windows(Q, [(0, 0), (0, 0.5)], (2, 2), (2, 2)), "two integers", "(0, 0.5)"),
    "average-pairs": (lambda f: f.average_windows(Q, [(0, 0), (0,)], (2, 2), (2, 2)), "(top, left)", "(0,)"),
    "average-window": (lambda f: f.average_windows(Q, [(0, 0)] * 2, 2, (2, 2)), "window must be (height, width)", "2"),
    "average-size": (
        lambda f: f.average_windows(Q, [(0, 0)] * 2, (2, 2), (2,)),
        "size must be (height, width)",
        "(2,)",
    ),
    "average-outside": (
        lambda f: f.average_windows(Q, [(0, 0), (1, 2)], (2, 2), (3, 3)),
        "2 x 2 at (1, 2) is not inside a picture 3 x 3",
    ),
    "average-negative": (lambda f: f.average_windows(Q, [(0, 0), (-1, 0)], (2, 2), (2, 2)), "(-1, 0) is not inside"),
    "average-gap-right": (lambda f: f.average_windows(Q, [(0, 0)] * 2, (2, 2), (2, 3)), "covers pixel (0, 2)", "2 x 3"),
    "average-gap-between": (lambda f: f.average_windows(Q, [(0, 3), (0, 0)], (2, 2), (2, 5)), "covers pixel (0, 2)"),
    "average-gap-below": (lambda f: f.average_windows(Q, [(0, 0), (0, 1)], (2, 2), (4, 3)), "covers pixel (2, 0)"),
    "average-gap-corner": (lambda f: f.average_windows(Q, [(0, 0), (1, 1)], (2, 2), (3, 3)), "covers pixel (0, 2)"),
    "argmax-rank": (lambda f: f.upsample_argmax(Q, (2, 2), 1.0, C), "logits must be", "[K>=1, h>=1, w>=1]"),
    "argmax-classes": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C[:1]), "class_of_name must be an int64", "K=2"),
    "argmax-class-dtype": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C.int()), "class_of_name", "int32"),
    "argmax-size": (lambda f: f.upsample_argmax(X, (2, 0), 1.0, C), "size must be (height, width)", "(2, 0)"),
    "argmax-scale": (lambda f: f.upsample_argmax(X, (2, 2), "40", C), "logit_scale must be a number", "'40'"),
    "argmax-threshold": (lambda f: f.upsample_argmax(X, (2, 2), 1.0, C, 1.5), "threshold", "[0, 1]", "got 1.5"),
    "probabilities-rank": (lambda f: f.class_probabilities(Q, (2, 2), 1.0, C, 1), "logits must be", "[2, 3, 7, 4]"),
    "probabilities-classes": (lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 0), "classes", "at least 1", "got 0"),
    "probabilities-rows": (
        lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 1, range(1, 3)),
        "rows must be a range",
        "0 .. 1",
        "range(1, 3)",
    ),
    "probabilities-no-rows": (lambda f: f.class_probabilities(X, (2, 2), 1.0, C, 1, range(0)), "rows", "not empty"),
    "pamr-image": (lambda f: f.pamr(X, Q), "image must be", "[B>=0, CI>=1, H>=1, W>=1]", "[2, 6, 8]"),
    "pamr-mask": (lambda f: f.pamr(Q, Q[..., 1:]), "mask must be", "[B=2, C>=1, H=7, W=4]", "[2, 3, 7, 3]"),
    "pamr-mask-dtype": (lambda f: f.pamr(Q, Q.int()), "mask must be a floating-point", "int32"),
    "pamr-iterations": (lambda f: f.pamr(Q, Q, -1), "iterations", "at least 0", "got -1"),
    "pamr-dilations": (lambda f: f.pamr(Q, Q, 1, (8, 0)), "dilations", "at least 1", "(8, 0)"),
    "pamr-no-dilations": (lambda f: f.pamr(Q, Q, 1, ()), "dilations", "not empty", "()"),
    # dims
    "dims-too-large": (lambda f: f.distraction_scores(X, [1, 8]), "dims", "0 .. 7", "[1, 8]"),
    "dims-negative": (lambda f: f.distraction_mask(X, [-1], 0.5), "dims", "0 .. 7", "[-1]"),
    "dims-repeated": (lambda f: f.redistribute_embeddings(X, M, [2, 2], (2, 3)), "dims must be distinct", "[2, 2]"),
    "dims-fractional": (lambda f: f.distraction_scores(X, [1.0]), "dims must be a sequence of integers", "[1.0]"),
    "dims-none": (lambda f: f.distraction_mask(X, None, 0.5), "dims must be a sequence", "None"),
    # numbers and choices
    "threshold-nan": (lambda f: f.distraction_mask(X, [1], math.nan), "threshold must be a number", "nan"),
    "threshold-text": (lambda f: f.distraction_mask(X, [1], "5/d"), "threshold must be a number", "'5/d'"),
    "grid-empty": (lambda f: f.redistribute_embeddings(X, M, [1], (0, 6)), "grid", "at least 1", "(0, 6)"),
    "grid-negative": (lambda f: f.redistribute_embeddings(X, M, [1], (-2, -3)), "grid", "at least 1", "(-2, -3)"),
    "grid-mismatch": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 4)), "grid", "gh * gw = N = 6", "(2, 4)"),
    "grid-length": (lambda f: f.redistribute_embeddings(X, M, [1], (6,)), "grid must be (gh, gw)", "(6,)"),
    "grid-number": (lambda f: f.redistribute_embeddings(X, M, [1], 6), "grid must be (gh, gw)", "got 6"),
    "grid-fractional": (lambda f: f.redistribute_embeddings(X, M, [1], (2.0, 3)), "grid", "integers", "(2.0, 3)"),
    "size-even": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=4), "size must be an odd", "got 4"),
    "size-one": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=1), "size", "at least 3", "got 1"),
    "size-fractional": (lambda f: f.redistribute_embeddings(X, M, [1], (2, 3), size=3.0), "size", "integer", "got 3.0"),
    "beta-negative": (lambda f: f.refocused_attention(Q, Q, Q, M, M, -0.1), "beta", "[0, 1]", "got -0.1"),
    "beta-large": (lambda f: f.refocused_attention(Q, Q, Q, M, M, 1.5), "beta", "[0, 1]", "got 1.5"),
    "beta-nan": (lambda f: f.refocused_attention(Q, Q, Q, M, M, math.nan), "beta", "[0, 1]", "got nan"),
    "scale-nan": (lambda f: f.received_attention(Q, Q, scale=math.nan), "scale must be a number", "nan"),
    "scale-negative": (lambda f: f.key_normalizers(Q, scale=-0.1), "scale must be a number of at least 0", "-0.1"),
    "scale-text": (lambda f: f.proxy_attention(Q[None], Q, scale="auto"), "scale must be a number", "'auto'"),
    "count-negative": (lambda f: f.key_similarity(Q, S, -1), "count", "at least 0", "got -1"),
    "count-fractional": (lambda f: f.key_similarity(Q, S, 1.0), "count must be an integer", "got 1.0"),
    "count-without-running": (lambda f: f.key_similarity(Q, None, 2), "running", "running None, count 2"),
    "running-without-count": (lambda f: f.key_similarity(Q, S), "running", "running a tensor, count 0"),
    "cut-unknown": (lambda f: f.defocus_mask(S[0], threshold="median"), "threshold", '"mean" or "otsu"', "'median'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_and_given(impl, case):
    call, *words = ERRORS[case]
    with pytest.raises(ValueError) as error:
        call(impl)
    for word in words:
        assert word in str(error.value)
