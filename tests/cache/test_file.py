"""A saved cache goes on in this or another process as if it had never been saved, or is refused in words."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.halves import Halves
from helpers.memory import Allocations
from helpers.tiny import FAMILIES, SLIDING, config_for, left_padded, tiny_model
from safetensors.torch import load_file, save_file

from hf_longctx import CacheError, ConfigError, LongCtxCache, UnsupportedModelError, patch_model, unpatch_model
from hf_longctx.cache import file as cache_file
from hf_longctx.cache import finite
from hf_longctx.config.words import load, words
from hf_longctx.io import tensor_file
from hf_longctx.io.atomic import left_over
from hf_longctx.layout.segments import HeadKV, Segment
from hf_longctx.stores.base import Store
from hf_longctx.stores.full import Full, FullStore

TESTS = Path(__file__).parent


def patched_tiny(family="llama", roles="mixed", sink=4, recent=16, dtype=torch.float64, top=None, **kwargs):
    model = tiny_model(family, dtype, **kwargs)
    return patch_model(model, config_for(model, roles, sink, recent, **(top or {})))


@torch.no_grad()
def read(model, cache, ids, mask=None) -> torch.Tensor:
    """Feed new tokens; the logits of all of them."""
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def filled(model, lengths, chunk=None, max_tokens=None):
    """A cache that read left-padded rows, and their mask."""
    ids, mask = left_padded(lengths)
    cache, chunk = LongCtxCache(model, max_tokens=max_tokens), chunk or ids.shape[1]
    for at in range(0, ids.shape[1], chunk):
        read(model, cache, ids[:, at : at + chunk], mask[:, : at + chunk])
    return cache, mask


def again(cache, model, path) -> LongCtxCache:
    cache.save(path)
    return LongCtxCache.load(path, model)


def goes_on(model, cache, mask) -> list[torch.Tensor]:
    """Logits of everything a cache can be asked to do: tokens, a chunk, rollbacks, other rows."""
    batch, seen, told = mask.shape[0], [], torch.Generator().manual_seed(7)

    def step(count):
        nonlocal mask
        mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        seen.append(read(model, cache, torch.randint(3, 97, (len(mask), count), generator=told), mask))

    for count in (1, 1, 7, 1):
        step(count)
    back = min(13, cache.seen - 1)  # tokens that were there before it was saved, too
    cache.crop(-back)
    mask = mask[:, :-back]
    step(2)
    order = torch.tensor([batch - 1, *range(batch - 1)])
    cache.reorder_cache(order)
    mask = mask[order]
    step(1)
    cache.batch_repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    step(3)
    return seen


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("lengths", [[1], [15], [300], [300, 300], [300, 120, 3], [30, 25, 1]])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("max_tokens", [None, 400])
def test_a_loaded_cache_goes_on_bit_by_bit(lengths, chunk, max_tokens, tmp_path):
    model = patched_tiny()
    cache, mask = filled(model, lengths, chunk, max_tokens)
    if lengths == [300]:
        cache.crop(-30)  # what was rejected must not come back
        mask = mask[:, :-30]
    loaded = again(cache, model, tmp_path / "cache.safetensors")
    for name in ("seen", "starts", "ends", "max_tokens", "batch_size", "nbytes", "nbytes_dense", "plans"):
        assert getattr(loaded, name) == getattr(cache, name), name
    assert torch.equal(loaded.ids, cache.ids)
    want = goes_on(model, cache, mask)
    assert same(goes_on(model, loaded, mask), want)
    assert torch.equal(loaded.ids, cache.ids) and loaded.ids.shape == (2 * len(lengths), loaded.seen)


def test_a_cache_of_which_a_part_is_missing_goes_on_otherwise(tmp_path):
    model = patched_tiny()
    cache, mask = filled(model, [300, 120, 3])
    want = goes_on(model, again(cache, model, tmp_path / "a"), mask)
    for part in ("kept", "history"):
        loaded = LongCtxCache.load(tmp_path / "a", model)
        for layer in loaded.layers:
            for store in layer.stores:
                if part in store.segments:
                    store.segments[part].v.zero_()
        assert not same(goes_on(model, loaded, mask), want), part
    assert same(goes_on(model, LongCtxCache.load(tmp_path / "a", model), mask), want)


@pytest.mark.parametrize(
    ("family", "sliding"), [(family, None) for family in FAMILIES] + [(family, 13) for family in SLIDING]
)
def test_generate_from_a_loaded_cache(family, sliding, tmp_path):
    model = patched_tiny(family, sliding=sliding)
    ids, mask = left_padded([45, 9, 30])
    asked = torch.cat([ids, torch.randint(3, 97, (3, 5))], 1)
    whole = {"input_ids": asked, "attention_mask": torch.cat([mask, mask.new_ones(3, 5)], 1)}

    def prompt_read() -> LongCtxCache:
        asked = {"max_new_tokens": 1, "return_dict_in_generate": True}
        return model.generate(input_ids=ids, attention_mask=mask, **asked).past_key_values

    prompt_read().save(tmp_path / "cache")
    for mode in ({}, {"prefill_chunk_size": 3}, {"do_sample": True, "top_k": 9}):
        torch.manual_seed(3)
        want = model.generate(**whole, max_new_tokens=8, **mode)
        torch.manual_seed(3)
        loaded = LongCtxCache.load(tmp_path / "cache", model)
        assert torch.equal(model.generate(**whole, max_new_tokens=8, past_key_values=loaded, **mode), want)
    want = model.generate(**whole, max_new_tokens=8, num_beams=3)
    loaded = LongCtxCache.load(tmp_path / "cache", model)
    loaded.batch_repeat_interleave(3)
    assert torch.equal(model.generate(**whole, max_new_tokens=8, num_beams=3, past_key_values=loaded), want)
    ids = ids.flip(1)
    other = again(prompt_read(), model, tmp_path / "other")
    want = model.generate(**whole, max_new_tokens=8)
    assert not torch.equal(model.generate(**whole, max_new_tokens=8, past_key_values=other), want), "a control"


def test_a_loaded_cache_goes_on_in_another_process(tmp_path):
    model = patched_tiny()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 90)[None]
    want = model.generate(ids, max_new_tokens=9)
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :80])
    cache.save(tmp_path / "cache")
    script = f"""
        import torch
        from hf_longctx import AutoModelForCausalLM, LongCtxCache
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, dtype=torch.float64)
        model.generation_config.eos_token_id = None
        cache = LongCtxCache.load({str(tmp_path / "cache")!r}, model)
        assert torch.equal(cache.ids, torch.arange(3, 83)[None])
        print(model.generate(torch.arange(3, 90)[None], max_new_tokens=9, past_key_values=cache)[0].tolist())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == want[0].tolist()


def stores() -> list[tuple[str, str]]:
    return [(word, role) for word in words("stores") for role in load("stores", word).roles]


def test_every_store_was_found():
    assert {word for word, _ in stores()} == set(words("stores")) >= {"full", "sink_recent"}


@pytest.mark.parametrize("lengths", [[340], [340, 120, 3]])
@pytest.mark.parametrize(("word", "role"), stores())
def test_every_store_can_be_saved(word, role, lengths, tmp_path):
    """A new store needs no line here: it is found, and written and read without knowing of files."""
    model = tiny_model("llama", torch.float64)
    config = config_for(model)
    named = load("stores", word).__dataclass_fields__
    small = {name: value for name, value in {"sink": 4, "recent": 16, "residual": 32}.items() if name in named}
    patch_model(model, config, stores={role: {"store": word, **small}})
    cache, mask = filled(model, lengths)
    cache.save(tmp_path / "a")
    loaded = LongCtxCache.load(tmp_path / "a", model)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (loaded.nbytes, loaded.nbytes_dense) == (cache.nbytes, cache.nbytes_dense)
    more, longer = torch.randint(3, 97, (len(lengths), 5)), torch.cat([mask, mask.new_ones(len(lengths), 5)], 1)
    want = read(model, cache, more, longer)
    assert torch.equal(read(model, loaded, more, longer), want)
    cache.crop(-20), loaded.crop(-20)
    assert torch.equal(read(model, loaded, more, longer[:, :-15]), read(model, cache, more, longer[:, :-15]))


class HalvesStore(FullStore):
    """Keeps in halves what the first forward brought, and counts forwards."""

    kinds = (Segment, Halves)
    numbers = ("forwards",)
    forwards = 0

    def append(self, k, v, rows):
        if rows.past == 0:
            self.segments["halves"] = Halves(self.heads.take(k).clone(), self.heads.take(v).clone())
            kept = Segment(*self.incoming(k, v), rows.new)
        else:
            before = self.segments["halves"].k.shape[2]
            kept = self.grow("kept", k, v, rows.total - before)
            self.heads.copy_to(kept.k[:, :, rows.past - before : rows.total - before], k)
            self.heads.copy_to(kept.v[:, :, rows.past - before : rows.total - before], v)
            kept.length = rows.total - before
        self.forwards += 1
        self.state["sum"] = kept.k.new_full((rows.batch,), self.forwards)
        segments = [kept] if rows.past == 0 else list(self.segments.values())
        return HeadKV(self.heads, segments, self.spec, state=self.state)

    def check(self, saved):
        parts, seen = saved.segments(), saved.rows.total
        after = parts["kept"].plain(1, seen - 1, seen + 256)
        parts["halves"].of_kind(Halves, "extra")["extra"].number(5, 5)
        shape = (saved.rows.batch, saved.heads, seen - after, saved.head_dim)
        parts["halves"].holds(dict.fromkeys("kv", (saved.dtype, shape)))
        saved.number("forwards", 2, 2)
        saved.state(saved.dtype, sum=(saved.rows.batch,))


def test_streamed_segments_numbers_and_state(tmp_path, monkeypatch):
    model = patched_tiny("llama", "retrieval")
    monkeypatch.setattr(Full, "new", lambda spec, heads, max_tokens: HalvesStore(spec, heads, max_tokens))
    cache, _ = filled(model, [101])
    read(model, cache, torch.tensor([[5]]))
    loaded = again(cache, model, tmp_path / "a")
    store = loaded.layers[1].stores[0]
    assert [type(part).__name__ for part in store.segments.values()] == ["Halves", "Segment"]
    assert (store.forwards, store.state["sum"].tolist(), loaded.nbytes) == (2, [2.0], cache.nbytes)
    for token in torch.randint(3, 97, (4, 1, 1)):
        assert torch.equal(read(model, loaded, token), read(model, cache, token))
    with monkeypatch.context() as patch:
        patch.setattr(HalvesStore, "check", FullStore.check)
        with pytest.raises(CacheError, match=r"retrieval: its segments are \[.halves., .kept.\], expected"):
            LongCtxCache.load(tmp_path / "a", model)
    for left_out, said in (("number", "numbers: got"), ("state", "state: got"), ("segments", "segments: got")):

        def check(store, saved, left_out=left_out):
            parts = saved.segments() if left_out != "segments" else {}
            for part in parts.values():
                shape = (1, saved.heads, part.shape("k")[2], saved.head_dim)
                part.holds(dict.fromkeys("kv", (saved.dtype, shape)))
            if left_out != "number":
                saved.number("forwards", 2, 2)
            if left_out != "state":
                saved.state(saved.dtype, sum=(1,))

        monkeypatch.setattr(HalvesStore, "check", check)
        with pytest.raises(CacheError, match=rf"{said} .*of which the store said nothing \(Store.check\)"):
            LongCtxCache.load(tmp_path / "a", model)


def test_a_store_must_say_what_a_file_of_it_may_hold():
    unstated = {name: member for name, member in vars(FullStore).items() if name != "check"}
    with pytest.raises(TypeError, match="abstract method '?check"):
        type("Unstated", (Store,), unstated)(Full(), None, None)


def test_the_same_cache_gives_the_same_bytes_and_stays_as_it_is(tmp_path):
    model = patched_tiny()
    cache, mask = filled(model, [300, 120, 3])
    twin, bytes_before = copy.deepcopy(cache), cache.nbytes
    files = [tmp_path / name for name in ("a", "b", "c")]
    cache.save(files[0])
    cache.save(files[1])
    again(cache, model, files[1]).save(files[2])
    assert len({file.read_bytes() for file in files}) == 1
    assert cache.nbytes == bytes_before and same(goes_on(model, cache, mask), goes_on(model, twin, mask))
    cache.save(files[1])
    assert files[1].read_bytes() != files[0].read_bytes()


def test_only_what_is_kept_is_written(tmp_path):
    model = patched_tiny("llama", "retrieval")
    cache, _ = filled(model, [1000])
    cache.save(tmp_path / "a")
    kept = 2 * 3 * 4 * 8 * 8 * 1000  # k and v, layers, heads, head_dim, float64, tokens
    assert kept + 4 * 1000 <= (tmp_path / "a").stat().st_size <= kept + 4 * 1000 + 8000 < cache.nbytes
    tensors = load_file(tmp_path / "a")  # an ordinary safetensors file
    assert tensors["layers.2.retrieval.segments.kept.k"].shape == (1, 4, 1000, 8)
    assert tensors["ids"].tolist() == cache.ids.tolist()


def test_a_fork_s_shared_prompt_is_written_and_kept_once(tmp_path):
    model = patched_tiny("llama", "retrieval")
    cache, _ = filled(model, [1000])
    prompt = cache.nbytes
    forks = cache.fork()
    forks.batch_repeat_interleave(5)
    mask = torch.ones(5, 1000, dtype=torch.long)
    read(model, forks, torch.randint(3, 97, (5, 3)), torch.ones(5, 1003, dtype=torch.long))
    loaded = again(forks, model, tmp_path / "a")
    assert loaded.nbytes <= forks.nbytes < 3 * prompt and (tmp_path / "a").stat().st_size < 1.2 * prompt
    assert torch.equal(loaded.ids, forks.ids)
    mask = torch.ones(5, 1003, dtype=torch.long)
    assert same(goes_on(model, loaded, mask), goes_on(model, forks, mask))
    both = cache.fork()
    assert same(
        goes_on(model, again(both, model, tmp_path / "b"), mask[:1, :1000]), goes_on(model, both, mask[:1, :1000])
    )


def test_a_cache_with_max_tokens_never_allocates_again(tmp_path):
    model = patched_tiny(recent=64)
    cache, mask = filled(model, [390], max_tokens=600)
    loaded = again(cache, model, tmp_path / "a")
    held = [tensor.data_ptr() for layer in loaded.layers for tensor in layer.tensors()]
    ids = loaded.token_ids.buffer.data_ptr()
    for _ in range(200):
        read(model, loaded, torch.randint(3, 97, (1, 1)))
    assert [tensor.data_ptr() for layer in loaded.layers for tensor in layer.tensors()] == held
    assert loaded.token_ids.buffer.data_ptr() == ids
    with pytest.raises(CacheError, match="max_tokens=600"):
        read(model, loaded, torch.randint(3, 97, (1, 11)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, tmp_path):
    model = patched_tiny(dtype=dtype)
    cache, mask = filled(model, [60, 9])
    loaded = again(cache, model, tmp_path / "a")
    assert {tensor.dtype for layer in loaded.layers for tensor in layer.tensors()} == {dtype}
    assert same(goes_on(model, loaded, mask), goes_on(model, cache, mask))


def test_inference_mode_leaves_no_trace(tmp_path):
    model = patched_tiny()
    with torch.inference_mode():
        cache, mask = filled(model, [40, 9])
        loaded = again(cache, model, tmp_path / "a")
    assert same(goes_on(model, loaded, mask), goes_on(model, cache, mask))


def test_a_first_chunk_of_pads_and_right_pads(tmp_path):
    model = patched_tiny()
    cache, _ = filled(model, [20, 3], chunk=5)
    assert cache.starts == (0, 17)
    ids, mask = left_padded([20, 3])
    short = LongCtxCache(model)
    read(model, short, ids[:, :5], mask[:, :5])
    assert short.starts == (0, 5), "open: only pads so far"
    loaded = again(short, model, tmp_path / "a")
    assert torch.equal(read(model, loaded, ids[:, 5:], mask), read(model, short, ids[:, 5:], mask))
    right = LongCtxCache(model)
    read(model, right, ids.flip(1), mask.flip(1))
    loaded = again(right, model, tmp_path / "b")
    assert loaded.ends == right.ends == (20, 3)
    with pytest.raises(CacheError, match="right-padded"):
        read(model, loaded, ids[:, :1], torch.cat([mask.flip(1), torch.zeros_like(mask[:, :1])], 1))


# What a cache's file fits.


@pytest.fixture
def saved(tmp_path):
    model = patched_tiny()
    cache, _ = filled(model, [120])
    cache.save(tmp_path / "cache")
    return model, cache, tmp_path / "cache"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": {"roles": ["RRRR", "SRSR", "RSRS"]}}, r'another config, layer 0 .*roles: "RSRS" there, "RRRR" here'),
        ({"stores": {"streaming": {"recent": 17}}}, 'another config, layer 0 .*"recent": 16.*there.*"recent": 17'),
        ({"stores": {"streaming": {"sink": 5}}}, "another config, layer 0"),
    ],
)
def test_another_config_is_refused(saved, change, said):
    model, _, path = saved
    patch_model(model, model.base_model.longctx_state.config, **change)
    with pytest.raises(CacheError, match=said):
        LongCtxCache.load(path, model)


def test_kernel_and_prefill_do_not_matter(saved):
    model, cache, path = saved
    want = read(model, cache, torch.tensor([[5]]))
    settings = model.base_model.longctx_state.config
    patch_model(
        model, settings, kernel="reference", prefill={"retrieval": {"pattern": "block_topk"}, "min_tokens": 200}
    )
    torch.testing.assert_close(
        read(model, LongCtxCache.load(path, model), torch.tensor([[5]])), want, rtol=0, atol=1e-9
    )


def test_another_model_is_refused(saved):
    model, _, path = saved
    weight = model.base_model.layers[1].mlp.up_proj.weight
    weight.data.add_(1e-9)
    with pytest.raises(CacheError, match='another model \\(weights: "[0-9a-f]{32}" there'):
        LongCtxCache.load(path, model)
    weight.data.sub_(1e-9)
    config = model.base_model.longctx_state.config
    for other, said in (
        (tiny_model("llama", torch.float64, layers=4), "num_hidden_layers: 3 there, 4 here; weights"),
        (tiny_model("llama", torch.float32), 'dtype: "torch.float64" there, "torch.float32" here; weights'),
        (tiny_model("mistral", torch.float64), 'model_type: "llama" there, "mistral" here'),
    ):
        patch_model(other, config_for(other))
        with pytest.raises(CacheError, match=said):
            LongCtxCache.load(path, other)
    twin = tiny_model("llama", torch.float64)
    twin.load_state_dict(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="needs a patched model"):
        LongCtxCache.load(path, twin)
    patch_model(twin, config)
    if not torch.equal(weight, twin.base_model.layers[1].mlp.up_proj.weight):
        pytest.fail("the twin has other weights")


def test_the_same_weights_loaded_again_are_the_same_model(saved, tmp_path):
    model, cache, path = saved
    model.save_pretrained(tmp_path / "model")
    twin = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    path = tmp_path / "again"
    cache.save(path)
    assert LongCtxCache.load(path, patch_model(twin)).seen == cache.seen


def test_the_model_must_be_known(saved, tmp_path):
    model, cache, _ = saved
    unpickled = pickle.loads(pickle.dumps(cache))
    with pytest.raises(CacheError, match=r"not known which model filled this cache.*save\(path, model=model\)"):
        unpickled.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    unpickled.save(tmp_path / "a", model=model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "cache").read_bytes()
    read(model, unpickled, torch.tensor([[5]]))
    unpickled.save(tmp_path / "a")
    cache.fork().save(tmp_path / "a")
    other = patched_tiny(roles="streaming")
    with pytest.raises(CacheError, match="model: this cache was made for another model or another config"):
        cache.save(tmp_path / "a", model=other)
    with pytest.raises(UnsupportedModelError, match="needs a patched model"):
        cache.save(tmp_path / "a", model=unpatch_model(other))


# Files that are something else, or damaged.


def test_a_flipped_bit_is_found_wherever_it_is(saved):
    model, _, path = saved
    whole, found = bytearray(path.read_bytes()), []
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 9), *range(header, len(whole), len(whole) // 100), len(whole) - 1]
    for place in places:
        for bit in (0, 6) if place < header else (0,):
            whole[place] ^= 1 << bit
            path.write_bytes(whole)
            with pytest.raises(CacheError, match="is damaged|is no file|has format|must have|another") as error:
                LongCtxCache.load(path, model)
            whole[place] ^= 1 << bit
            found.append(str(error.value))
    path.write_bytes(whole)
    assert LongCtxCache.load(path, model).seen == 120, "a control: the file as it was"
    assert len(found) > 600 and sum("is damaged" in one for one in found) > 200


def test_a_part_of_a_file_is_refused(saved):
    model, _, path = saved
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheError, match="is no file that cache.save wrote, or only a part of one"):
            LongCtxCache.load(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheError, match="is no file"):
        LongCtxCache.load(path, model)


def test_other_files_are_refused(saved, tmp_path, monkeypatch):
    model, cache, path = saved
    with pytest.raises(CacheError, match="there is no file"):
        LongCtxCache.load(tmp_path / "nowhere", model)
    with pytest.raises(CacheError, match="is no file that cache.save wrote"):
        LongCtxCache.load(tmp_path, model)
    (tmp_path / "text").write_text("a cache")
    save_file({"a": torch.ones(3)}, tmp_path / "plain", metadata={"format": "pt"})
    save_file({"a": torch.ones(3)}, tmp_path / "bare")
    for other, why in (("text", ""), ("plain", "it has no checksums"), ("bare", "it has no checksums")):
        with pytest.raises(CacheError, match=f"is no file that cache.save wrote.*{why}"):
            LongCtxCache.load(tmp_path / other, model)
    with (tmp_path / "ours").open("wb") as file:
        tensor_file.write(file, {"a": torch.ones(3)}, {"format": "something else"})
    with pytest.raises(CacheError, match="is no file that cache.save wrote"):
        LongCtxCache.load(tmp_path / "ours", model)
    monkeypatch.setattr(cache_file, "SAVED", ())
    cache.save(path)
    monkeypatch.undo()
    with pytest.raises(
        CacheError, match=r"file.cache: got no keys, expected an object with the keys starts, ends, staggered"
    ):
        LongCtxCache.load(path, model)
    monkeypatch.setattr(cache_file, "VERSION", 3)
    cache.save(path)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="has format 3, this version of hf_longctx reads 1 and 2"):
        LongCtxCache.load(path, model)


def test_a_file_that_cannot_be_written_changes_nothing(saved, tmp_path, monkeypatch):
    model, cache, path = saved
    before, want = path.read_bytes(), read(model, copy.deepcopy(cache), torch.tensor([[5]]))
    read(model, cache, torch.tensor([[5]]))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "_bytes", full)
    with pytest.raises(CacheError, match="cannot be written .*No space left"):
        cache.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and left_over(path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        cache.save(tmp_path / "file" / "cache")
    cache.crop(-1)
    assert torch.equal(read(model, cache, torch.tensor([[5]])), want)


# What cannot be saved.


def test_empty_and_interrupted_caches_are_refused(saved, tmp_path):
    model, cache, _ = saved
    with pytest.raises(CacheError, match="this cache is empty"):
        LongCtxCache(model).save(tmp_path / "a")
    cache.layers[1].seen -= 1
    with pytest.raises(CacheError, match="interrupted"):
        cache.save(tmp_path / "a")
    cache.layers[1].seen += 1
    cache.layers[1].whole = False
    with pytest.raises(CacheError, match="interrupted while it was written"):
        cache.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["kept", "history"])
def test_nan_and_inf_are_never_saved_nor_loaded(saved, part, wrong, tmp_path, monkeypatch):
    model, cache, path = saved
    before = path.read_bytes()
    store = next(store for store in cache.layers[2].stores if part in store.segments)
    store.segments[part].v[0, 1, 17] = wrong  # position 17 + 2 * 255 is not yet there: row position 17 of the history
    said = f"holds NaN or inf in layer 2, .*segments.{part}.v"
    with pytest.raises(CacheError, match=said):
        cache.save(path)
    assert path.read_bytes() == before and left_over(path) == []
    monkeypatch.setattr(cache_file, "is_finite", lambda tensor: True)
    cache.save(path)
    monkeypatch.undo()
    with pytest.raises(CacheError, match=said):
        LongCtxCache.load(path, model)


def test_ids_that_are_not_known_must_be_given(tmp_path):
    model = patched_tiny()
    ids = torch.randint(3, 97, (2, 40))
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    read(model, cache, ids[:, :1])
    assert cache.ids is None
    whole = torch.cat([ids, ids[:, :1]], 1)
    with pytest.raises(CacheError, match=r"ids of this cache's tokens are not known .* shape \[2, 41\]"):
        cache.save(tmp_path / "a")
    for wrong in (ids, whole[:1], whole.double()):
        with pytest.raises(CacheError, match="needs whole numbers of shape"):
            cache.save(tmp_path / "a", ids=wrong)
    cache.save(tmp_path / "a", ids=whole)
    assert torch.equal(LongCtxCache.load(tmp_path / "a", model).ids, whole)
    read(model, known := LongCtxCache(model), ids)
    known.save(tmp_path / "a", ids=ids)
    with pytest.raises(CacheError, match="ids are others than those this cache has seen"):
        known.save(tmp_path / "a", ids=ids.flip(1))


# Memory.


@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_memory_is_never_doubled(roles, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 1 << 14)
    model = patched_tiny("llama", roles, kv_heads=4, layers=4, dtype=torch.float32)
    cache, _ = filled(model, [9000])
    assert cache.nbytes > 3_000_000
    with Allocations() as made:
        cache.save(tmp_path / "a")
    assert made.peak < 300_000 < cache.nbytes / 10
    with Allocations() as made:
        loaded = LongCtxCache.load(tmp_path / "a", model)
    heads = {"retrieval": 4, "mixed": 2}[roles]
    mapped = 2 * 9000 * heads * 8 * 4  # k and v of one layer: views of the file, no memory of the process
    assert loaded.nbytes <= made.peak < loaded.nbytes + mapped + 300_000
    with Allocations() as made:
        torch.cat([tensor.contiguous().flatten() for layer in cache.layers for tensor in layer.tensors()])
    assert made.peak >= cache.nbytes, "a control: a second copy would be seen"


# The check of every forward.


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setenv("HF_LONGCTX_CHECK", "1")
    finite.every_forward.cache_clear()
    yield
    monkeypatch.undo()
    finite.every_forward.cache_clear()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_first_layer_with_nan_is_named(wrong, checking):
    model = patched_tiny()
    ids = torch.randint(3, 97, (1, 30))
    cache = LongCtxCache(model)
    want = read(model, cache, ids)
    bias = model.base_model.layers[1].self_attn.v_proj.weight
    kept = bias.data[3].clone()
    bias.data[3] = wrong
    with pytest.raises(CacheError, match="layer 1 was given values with NaN or inf"):
        read(model, cache, ids[:, :1])
    bias.data[3] = kept
    with pytest.raises(CacheError, match="interrupted"):
        read(model, cache, ids[:, :1])
    cache.crop(0)
    assert cache.seen == 30 and torch.equal(cache.ids, ids)
    assert torch.equal(read(model, LongCtxCache(model), ids), want)


def test_without_the_switch_nothing_is_looked_at():
    model = patched_tiny()
    model.base_model.layers[1].self_attn.v_proj.weight.data[3] = float("nan")
    assert read(model, LongCtxCache(model), torch.randint(3, 97, (1, 30))).isnan().any()


def test_the_switch_is_0_or_1(monkeypatch):
    monkeypatch.setenv("HF_LONGCTX_CHECK", "yes")
    finite.every_forward.cache_clear()
    with pytest.raises(ConfigError, match="HF_LONGCTX_CHECK is 0 .* given 'yes'"):
        LongCtxCache(patched_tiny())
    monkeypatch.undo()
    finite.every_forward.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_is_finite(dtype):
    numbers = torch.ones(3, 70).to(dtype)
    assert finite.is_finite(numbers) and finite.is_finite(numbers[:0]) and finite.is_finite(numbers.long())
    for wrong in (float("nan"), float("inf"), float("-inf")):
        if dtype == torch.float8_e4m3fn and wrong == wrong:
            continue  # has no inf
        spoilt = numbers.clone()
        spoilt[2, 69] = wrong
        assert not finite.is_finite(spoilt)
        assert finite.is_finite(spoilt[:2]) and not finite.is_finite(spoilt.t())


def test_path_and_model_in_the_wrong_order(tmp_path):
    model = patched_tiny()
    with pytest.raises(CacheError, match=r"model: got .*Path.*LongCtxCache.load\(path, model\)"):
        LongCtxCache.load(model, tmp_path / "cache.safetensors")
