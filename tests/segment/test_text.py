"""Text embeddings and their cache."""

import copy

import open_clip
import pytest
import torch

from rfclip import Segmenter

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
    third, again = encoded()
    assert again
    assert torch.equal(first, third)
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        model.ln_final.bias += 0.1
    fourth, again = encoded()
    with torch.no_grad():
        model.ln_final.bias -= 0.1
    assert again
    assert not torch.allclose(first, fourth)


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
