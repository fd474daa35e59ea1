"""Text embeddings and their cache."""

import copy
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import load, save_file
from torch.testing._internal.two_tensor import TwoTensor

import rfclip
from rfclip import Segmenter
from rfclip.segment.text import digest

pytestmark = pytest.mark.filterwarnings("ignore:rfclip-tiny was never trained on")


def calls_of(model, monkeypatch):
    calls = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    return calls


def test_text_embeddings_are_cached(model, tmp_path, monkeypatch):
    calls = calls_of(model, monkeypatch)

    def embeddings(names=("cat", "dog"), **options):
        with Segmenter(model, cache=tmp_path, **options) as segmenter:
            first = segmenter.text_embeddings(names)
            count = len(calls)
            assert torch.equal(segmenter.text_embeddings(names), first)
            assert len(calls) == count, "encoded again within one segmenter"
            return first

    def encoded(*arguments, **options):
        before = len(calls)
        return embeddings(*arguments, **options), len(calls) > before

    first, again = encoded()
    assert again
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2))
    second, again = encoded()
    assert not again
    assert torch.equal(first, second)
    swapped, again = encoded(("dog", "cat"))
    assert not again
    assert torch.equal(swapped, first.flip(0))
    more, again = encoded(("cat", "sky", "dog"))
    assert again
    assert torch.equal(more[::2], first), "a name's embedding depends on the others"
    assert encoded(templates=[lambda name: f"a {name}"])[1]
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="not a cached text embedding .*encoded anew") as said:
        third, again = encoded()
    assert again and len(said) == 1
    assert torch.equal(first, third)
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        model.ln_final.bias += 0.1
    fourth, again = encoded()
    with torch.no_grad():
        model.ln_final.bias -= 0.1
    assert again
    assert not torch.allclose(first, fourth)


@pytest.mark.parametrize("change", ["swapped", "scaled", "zero tail", "float16", "int64", "short", "NaN", "no check"])
def test_a_changed_entry_is_encoded_anew(model, tmp_path, change):
    def embeddings():
        with Segmenter(model, cache=tmp_path) as segmenter:
            return segmenter.text_embeddings(("cat", "dog"))

    want = embeddings()
    first, second = sorted(tmp_path.iterdir())
    if change == "swapped":
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    else:
        entry = load(first.read_bytes())
        value = entry["embedding"]
        zeroed, damaged = value.clone(), value.clone()
        zeroed[len(value) // 2 :], damaged[0] = 0, float("nan")
        changed = {"scaled": 2 * value, "zero tail": zeroed, "float16": value.half(), "int64": value.long()}
        changed |= {"short": value[1:].clone(), "NaN": damaged, "no check": value}
        kept = {} if change == "no check" else {"check": entry["check"]}
        save_file({"embedding": changed[change]} | kept, first)
    with pytest.warns(UserWarning, match="not a cached text embedding") as said:
        assert torch.equal(embeddings(), want)
    assert len(said) == 1
    assert torch.equal(embeddings(), want)  # mended, and without a warning


def heads(model):
    model.transformer.resblocks[0].attn.num_heads = 4


def mask(model):
    model.attn_mask.zero_()


def pooling(model):
    model.text_pool_type = "last"


def hook(model):
    model.ln_final.register_forward_hook(lambda module, inputs, output: 2 * output)


def frozen_adapter(model):
    model.transformer.resblocks[1].mlp.adapters = {"default": {"disabled": True}}


@pytest.mark.parametrize("change", [heads, mask, pooling, hook, frozen_adapter], ids=lambda change: change.__name__)
def test_a_model_is_more_than_its_weights(model, change):
    """None of these changes a weight or the model's description."""
    before, twin = digest(model), copy.deepcopy(model)
    assert digest(twin) == before
    change(twin)
    assert str(twin) == str(model) and digest(twin) != before


def test_the_digest_of_quantized_weights():
    """Neither a packed weight nor a tensor of tensors is one of plain values."""
    seen = set()
    for gain in (1, 1.5):
        for quantize in (dynamic, packed):
            twin = rfclip.load_model()
            with torch.no_grad():
                twin.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(gain)
            quantize(twin)
            assert digest(twin) == digest(twin)
            seen.add(digest(twin))
    assert len(seen) == 4


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.visual = torch.ao.quantization.quantize_dynamic(model.visual, {torch.nn.Linear}, dtype=torch.qint8)


def packed(model):
    linear = model.visual.transformer.resblocks[0].mlp.c_fc
    linear.weight = torch.nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach() + 1))


def test_autocast_has_entries_of_its_own(model, tmp_path):
    with Segmenter(model, cache=tmp_path) as segmenter:
        segmenter.text_embeddings(("cat",))
    with Segmenter(model, cache=tmp_path) as segmenter, torch.autocast("cpu", torch.bfloat16):
        segmenter.text_embeddings(("cat",))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_tells_activations_and_tokenizers_apart(model, tmp_path):
    quick = copy.deepcopy(model)
    for block in quick.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    shorter = open_clip.SimpleTokenizer(context_length=32, clean="whitespace")
    found = []
    for clip, tokenizer in ((model, None), (quick, None), (model, lambda texts: shorter([f"{t}!" for t in texts]))):
        for cache in (tmp_path, False):
            with Segmenter(clip, tokenizer=tokenizer, cache=cache) as segmenter:
                found.append(segmenter.text_embeddings(("cat",)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert torch.equal(found[4], found[5])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], found[4])


def test_no_cache_on_disk(model, tmp_path, monkeypatch):
    calls = calls_of(model, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with Segmenter(model, cache=False) as segmenter:
            segmenter.text_embeddings(("cat",))
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache_costs_time_only(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with Segmenter(model, cache=blocked) as segmenter:
        assert segmenter.text_embeddings(("cat",)).shape == (1, 128)
