"""The parts of transformers' own generation tests that apply to this model class, with `apply` on.

Their files are not in transformers' wheel, so these are ours: the same modes of `generate`, each against transformers'
own run of the same model. What does not apply, and why:

- static, quantised and offloaded caches, and `generate` compiling by itself, which needs a static one: refused with a
  HalError, there is one cache. Compiled steps: `test_compile.py`.
- attention weights as an output and custom 4D masks: refused, as `test_apply.py` shows.
- eager against sdpa, flash and flex attention: there is one attention, the operators'.
- continuous batching (`generate_batch`): it brings its own paged cache and attention interface.
- contrastive search, DoLa, group and constrained beams: no longer in the library, they are downloaded code.
- encoder-decoder, multimodal and linear-attention cases: another class of model.
- gradients through `generate`'s forward, parallel and offloaded models: not supported, and said so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import KINDS, VOCAB, model, tokens
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from glm5_hal.integrations.transformers import PagedCache, apply, remove

PROMPT, NEW = 14, 12  # top-k is 16: selection starts on the way
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_several": {"num_beams": 3, "num_return_sequences": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "no_cache": {"use_cache": False},
    "stop": {"eos_token_id": list(range(0, VOCAB, 7)), "pad_token_id": 1},
    "beams_stop": {"num_beams": 3, "eos_token_id": list(range(0, VOCAB, 7)), "pad_token_id": 1},
}
LEFT = torch.ones(3, PROMPT, dtype=torch.long)
LEFT[0, :5] = LEFT[1, :9] = 0


def generated(small: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return small.generate(**{**GREEDY, **kwargs})


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left_padded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_transformers(kind: str, mode: str, padded: bool) -> None:
    small = model(kind)
    inputs = {"input_ids": tokens(3, PROMPT), "attention_mask": LEFT if padded else torch.ones_like(LEFT)}
    expected = generated(small, **inputs, **MODES[mode])
    found = generated(apply(small), **inputs, **MODES[mode])
    assert found.shape[1] > PROMPT
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["greedy", "sample", "beams", "beam_sample", "no_cache"])
def test_what_comes_beside_the_tokens_has_the_same_form_and_values(mode: str) -> None:
    small, ids = model("shared"), tokens(2, PROMPT)
    expected = generated(small, input_ids=ids, **MODES[mode], **DICT)
    found = generated(apply(small), input_ids=ids, **MODES[mode], **DICT)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for mine, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert [h.shape for h in mine] == [h.shape for h in theirs]
    if mode != "no_cache":
        assert isinstance(found.past_key_values, PagedCache)
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["assistant", "prompt_lookup"])
def test_assisted_decoding_gives_the_greedy_tokens(kind: str, how: str) -> None:
    """An assistant that is often wrong: drafts are rejected and the cache is cropped."""
    small, ids = apply(model(kind)), tokens(1, PROMPT)
    expected = generated(small, input_ids=ids, max_new_tokens=30)
    assistant = apply(model(kind))
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    apply(assistant).generation_config.num_assistant_tokens = 4
    more = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generated(small, input_ids=ids, max_new_tokens=30, **more), expected)


def test_an_assistant_of_transformers_own_serves_too() -> None:
    small, ids = apply(model("glm")), tokens(1, PROMPT)
    expected = generated(small, input_ids=ids)
    assert torch.equal(generated(small, input_ids=ids, assistant_model=model("glm", seed=1)), expected)


def test_left_padding_does_not_change_the_next_logits() -> None:
    small, ids = apply(model("glm")), tokens(2, PROMPT)
    padded = torch.cat([torch.full((2, 32), 5), ids], 1)
    mask = torch.cat([torch.zeros(2, 32), torch.ones(2, PROMPT)], 1).long()
    with torch.no_grad():
        expected = small(ids).logits[:, -1]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = small(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generation_from_embeddings_is_generation_from_tokens(mode: str) -> None:
    small, ids = apply(model("glm")), tokens(2, PROMPT)
    expected = generated(small, input_ids=ids, **MODES[mode])
    embeddings = small.get_input_embeddings()(ids).detach()
    assert torch.equal(generated(small, inputs_embeds=embeddings, **MODES[mode]), expected[:, PROMPT:])
    assert torch.equal(generated(small, input_ids=ids, inputs_embeds=embeddings, **MODES[mode]), expected)


def test_generation_goes_on_from_a_cache() -> None:
    small, ids = apply(model("shared")), tokens(2, PROMPT)
    whole = generated(small, input_ids=ids, max_new_tokens=20)
    part = generated(small, input_ids=ids, max_new_tokens=8, return_dict_in_generate=True)
    rest = generated(small, input_ids=part.sequences, max_new_tokens=12, past_key_values=part.past_key_values)
    assert torch.equal(rest, whole)


def test_a_cache_with_room_reserved_may_be_given() -> None:
    small, ids = apply(model("glm")), tokens(2, PROMPT)
    cache = PagedCache(small, batch_size=2, max_length=64)
    assert torch.equal(generated(small, input_ids=ids, past_key_values=cache), generated(small, input_ids=ids))


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 5])], ids=["last", "three", "indices"])
def test_only_the_logits_that_are_asked_for_are_made(kept: Any) -> None:
    small, ids = apply(model("glm")), tokens(2, PROMPT)
    with torch.no_grad():
        whole, some = small(ids).logits, small(ids, logits_to_keep=kept).logits
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=0)


def test_forwards_return_tuples_where_that_is_asked_for() -> None:
    small, ids = apply(model("glm")), tokens(2, PROMPT)
    with torch.no_grad():
        logits, cache = small(ids, return_dict=False)[:2]
        assert torch.equal(logits, small(ids).logits)
    assert isinstance(cache, PagedCache)


def test_streaming_sees_every_token_once() -> None:
    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            self.seen.append(torch.empty(0, dtype=torch.long))

    small, ids, streamer = apply(model("glm")), tokens(1, PROMPT), Streamer()
    out = generated(small, input_ids=ids, streamer=streamer)
    assert torch.equal(torch.cat(streamer.seen), out[0])


def test_a_loss_is_what_transformers_says() -> None:
    small, ids = model("glm"), tokens(2, PROMPT)
    with torch.no_grad():
        expected = small(ids, labels=ids).loss
        torch.testing.assert_close(apply(small)(ids, labels=ids).loss, expected, atol=1e-5, rtol=0)


def test_a_saved_model_is_the_one_that_was_applied_to(tmp_path: Any) -> None:
    small, ids = apply(model("shared")), tokens(2, PROMPT)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    loaded.set_attn_implementation("eager")
    loaded.set_experts_implementation("eager")
    assert torch.equal(generated(loaded, input_ids=ids), generated(remove(small), input_ids=ids))
    assert isinstance(apply(loaded).generation_config, GenerationConfig)
