"""sample.py: each sampling rule against a plain reference, batches, the cache beyond the context, what is printed."""
import io
import json
import math
import os
import shutil
import threading
import types
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import ivme
import run
import runfolder
import sample
import tinymemory
from architectures import ARCHITECTURES, randomised
from common import UserError
from corpus.chats import chat_ids, encode_chats
from corpus.tokenizer import (
    END_OF_TEXT, SPECIAL_TOKENS, fast_encoder, from_tiktoken, load_tokenizer, train_hybrid,
)
from corpus_helpers import small_gpt2

TINY = dict(n_layer=2, d_model=16, n_head=2, d_ff=16, vocab_size=40, context_length=16)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[ivme, tinymemory], ids=["ivme", "tinymemory"])
def model(request):
    torch.manual_seed(0)
    shape = dict(TINY, n_kv_head=1) if request.param is ivme else TINY
    model = request.param.Model(replace(request.param.Config(), **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


# ---------------------------------------------------------------------------------------------------- choosing a token

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), top_k=st.integers(0, 12), top_p=st.floats(0, 1), min_p=st.floats(0, 0.9))
def test_top_k_top_p_and_min_p_keep_what_transformers_keeps(seed, top_k, top_p, min_p):
    logits = torch.randn(3, 12, generator=seeded(seed)) * 3
    expected = logits
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    assert torch.equal(sample.keep_likely(logits, top_k, top_p, min_p), expected)


def test_repetition_penalty_is_transformers_own():
    logits, idx = torch.randn(3, 12), torch.randint(12, (3, 7))
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, idx, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(idx, logits)
    assert torch.equal(sample.penalize_repetition(logits, seen, 1.3), expected)


@settings(max_examples=50, deadline=None)
@given(row=st.lists(st.integers(0, 3), max_size=30), n=st.integers(1, 5))
def test_banned_tokens_are_those_that_transformers_bans(row, n):
    logits = torch.zeros(1, 4)
    idx = torch.tensor([row], dtype=torch.long).view(1, -1)
    expected = transformers.NoRepeatNGramLogitsProcessor(n)(idx, logits)
    assert set(sample.SeenNgrams(n, row).banned()) == set(torch.where(expected[0] == -math.inf)[0].tolist())


def test_no_ngram_is_repeated(model):
    ids = sample.generate(model, torch.tensor([[1, 2, 3]]), 100, temperature=0, no_repeat_ngram_size=2)[0].tolist()
    pairs = list(zip(ids, ids[1:]))
    assert len(pairs) == len(set(pairs))
    plain = sample.generate(model, torch.tensor([[1, 2, 3]]), 100, temperature=0)[0].tolist()
    assert len(set(zip(plain, plain[1:]))) < 102  # without the rule it does repeat


@pytest.mark.parametrize("rules", [{}, dict(no_repeat_ngram_size=1, exempt=(0,)), dict(top_p=1e-30, min_p=1.0),
                                   dict(repetition_penalty=math.inf), dict(top_k=10 ** 9)])
def test_any_temperature_gives_tokens_and_a_tiny_one_the_likeliest(model, rules):
    prompt = torch.tensor([[1, 2, 3]])
    greedy = sample.generate(model, prompt, 12, temperature=0, **rules)
    for temperature in (1e-9, 1e-39, 1e-320):
        assert torch.equal(sample.generate(model, prompt, 12, temperature=temperature, **rules), greedy)
    for temperature in (1e30, 1e300, math.inf):
        drawn = sample.generate(model, prompt, 12, temperature=temperature, generator=seeded(0), **rules)
        assert drawn.shape == greedy.shape and 0 <= drawn.min() and drawn.max() < model.cfg.vocab_size


def test_greedy_beyond_the_context_equals_rereading_the_second_half(model):
    """Reference without a cache: all of it until the context is full, then its second half and what comes after."""
    idx, C, begin = torch.tensor([[5, 6, 7], [8, 9, 10]]), 16, 0
    got = sample.generate(model, idx, 40, temperature=0)
    for _ in range(40):
        if idx.size(1) - begin > C:
            begin = idx.size(1) - C // 2
        with torch.no_grad():
            idx = torch.cat((idx, model(idx[:, begin:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(got, idx)
    assert torch.equal(got, model.generate(got[:, :3], 40, temperature=0))


def test_a_prompt_longer_than_the_context_is_read_from_its_end(model):
    long = torch.randint(40, (1, 50))
    whole = sample.generate(model, long, 5, temperature=0)
    end = sample.generate(model, long[:, -16:], 5, temperature=0)
    assert torch.equal(whole[:, 50:], end[:, 16:])


def test_same_seed_same_text_and_another_seed_another(model):
    a, b, c = (sample.generate(model, torch.tensor([[1]]), 60, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_samples_follow_the_models_distribution(model):
    prompt = torch.tensor([[3, 4]])
    n = 20_000
    drawn = sample.generate(model, prompt.repeat(n, 1), 1, temperature=0.7, generator=seeded(0))[:, -1]
    with torch.no_grad():
        p = (model(prompt)[0][0, -1] / 0.7).softmax(-1)
    assert (torch.bincount(drawn, minlength=40) / n - p).abs().max() < 4 * math.sqrt(0.25 / n)


def test_rows_of_a_batch_are_what_each_gives_alone(model):
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    together = sample.generate(model, prompts, 30, temperature=0, repetition_penalty=1.2)
    for i in range(3):
        alone = sample.generate(model, prompts[i:i + 1], 30, temperature=0, repetition_penalty=1.2)
        assert torch.equal(together[i], alone[0])


def test_rows_end_at_the_stop_token_and_are_filled_up_with_it(model):
    def draw(**kw):
        return sample.generate(model, torch.tensor([[1], [2]]), 40, generator=seeded(4), **kw).tolist()
    free = draw()
    stop = next(t for t in free[0][1:] if t in free[1][1:])  # a token that both rows come to, at different places
    ends = [row.index(stop, 1) for row in free]
    assert ends[0] != ends[1]
    for row, plain, end in zip(draw(stop_token=stop), free, ends):
        assert row == plain[:end + 1] + [stop] * (max(ends) - end)


# ---------------------------------------------------------------------------------------------------- text

@pytest.fixture(scope="module")
def byte_tokenizer():
    return load_tokenizer(train_hybrid(["a b"], 263).to_str())


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), stop=st.text(max_size=3))
def test_streamed_text_is_the_whole_text_up_to_the_stop_and_never_takes_anything_back(text, stop, byte_tokenizer):
    shown = sample.Text(byte_tokenizer, 2, stop)
    pieces = [shown.add(i) for i in byte_tokenizer.encode(text).ids] + [shown.finish()]
    assert "".join(pieces) == (text.split(stop)[0] if stop else text)
    assert all("\ufffd" not in p or "\ufffd" in text for p in pieces)  # no half characters


def test_text_ends_at_the_end_token(byte_tokenizer):
    t = sample.Text(byte_tokenizer, 2)
    ids = byte_tokenizer.encode("ab").ids
    assert [t.add(i) for i in (ids[0], 2, ids[1])] == ["a", "", ""] and t.done


def show(capsys, *flags):
    """What sample.py prints."""
    sample.main(list(flags))
    return capsys.readouterr().out


def test_one_sample_continues_the_prompt(trained, capsys):
    flags = f"--ckpt={trained}/best.pt", "--prompt=import os", "--max_new_tokens=20"
    text = show(capsys, *flags)
    assert text.startswith("import os") and len(text) > len("import os\n")
    assert text == show(capsys, *flags)
    assert text != show(capsys, *flags, "--seed=3")


def test_several_samples_are_marked_and_differ(trained, capsys):
    shown = show(capsys, f"--ckpt={trained}/best.pt", "--prompt=def", "--num_samples=3", "--max_new_tokens=15")
    parts = shown.split("--- sample ")
    assert len(parts) == 4 and len({p.split("\n", 1)[1] for p in parts[1:]}) == 3
    assert all("\ndef" in p for p in parts[1:])


def test_the_prompt_may_come_from_standard_input(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("class A\n"))
    assert show(capsys, f"--ckpt={trained}/best.pt", "--max_new_tokens=4").startswith("class A")


def test_who_waits_for_a_prompt_that_does_not_end_is_told_so(trained, capsys, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(sample, "note", lambda text: told.set() if "read from standard input" in text else None)
    monkeypatch.setattr(sample, "PATIENCE", 0.01)
    stdin = types.SimpleNamespace(isatty=lambda: False, read=lambda: "def" if told.wait(30) else "")
    monkeypatch.setattr("sys.stdin", stdin)
    assert show(capsys, f"--ckpt={trained}/best.pt", "--max_new_tokens=2").startswith("def")


@pytest.fixture
def read(monkeypatch):
    """A list that receives the token ids that sample.py lets the model read; nothing is generated."""
    ids = []
    monkeypatch.setattr(sample, "stream", lambda model, idx, *args, **kw: iter(ids.append(idx[0].tolist()) or ()))
    return ids


def test_a_prompt_that_spells_a_special_token_is_plain_text(trained, capsys, read):
    show(capsys, f"--ckpt={trained}/best.pt", "--prompt=<|eos|>x")
    bos, *rest = read[0]
    tokenizer = run.load_checkpoint(trained / "best.pt")[1]
    assert bos == 1 and min(rest) > 6 and tokenizer.decode(rest) == "<|eos|>x"


def test_a_prompt_in_gpt2s_tokenizer_begins_and_ends_with_its_only_special_token(trained, tmp_path, capsys, read):
    checkpoint = run.read_checkpoint(trained / "best.pt")
    checkpoint["tokenizer"] = from_tiktoken(small_gpt2(vocab_size=500)).to_str()
    runfolder.save_checkpoint(tmp_path / "gpt2.pt", checkpoint)
    show(capsys, f"--ckpt={tmp_path}/gpt2.pt", "--prompt=a word")
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    end_of_text, *rest = read[0]
    assert end_of_text == tokenizer.token_to_id(END_OF_TEXT) and tokenizer.decode(rest) == "a word"
    with pytest.raises(UserError, match="which chats are framed with"):
        sample.main([f"--ckpt={tmp_path}/gpt2.pt", "--chat"])


def test_ema_and_no_ema_choose_the_weights(trained, monkeypatch, capsys):
    asked, load = [], sample.load_checkpoint

    def loading(path, device, ema):
        asked.append(ema)
        return load(path, device, ema)
    monkeypatch.setattr(sample, "load_checkpoint", loading)
    for flag in ((), ("--ema",), ("--no-ema",), ("--ema=false",)):
        show(capsys, f"--ckpt={trained}/ckpt.pt", "--prompt=x", "--max_new_tokens=1", *flag)
    assert asked == [None, True, False, False]


def test_generation_ends_before_the_stop_text(trained, capsys):
    flags = (f"--ckpt={trained}/best.pt", "--prompt=import", "--max_new_tokens=80")
    free = show(capsys, *flags)[len("import"):-1]
    stop = free[20:22]
    assert show(capsys, *flags, f"--stop={stop}") == "import" + free.split(stop)[0] + "\n"


# ---------------------------------------------------------------------------------------------------- chat

@pytest.fixture(scope="module")
def byte_ids(byte_tokenizer):
    return chat_ids(byte_tokenizer)


def small(name, context_length=64):
    """A small model of an architecture, for the byte tokenizer."""
    arch = ARCHITECTURES[name]
    shape = dict(arch.tiny, vocab_size=263)
    if context_length:
        shape["context_length"] = context_length
    return arch.module.Model(arch.module.Config(**shape))


def babbling(name):
    """One that hardly ever says a special token: it writes on until it is stopped."""
    return randomised(small(name)).eval()


@pytest.fixture(params=ARCHITECTURES)
def talker(request):
    return babbling(request.param)


def plain_reply(model, ids, n, specials):
    """n greedy tokens behind ids, or fewer if one is special: everything is read anew for each."""
    said = []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + said]))[0][0, -1].argmax())
        if token in specials:
            break
        said.append(token)
    return said


def test_a_chat_through_the_cache_equals_reading_all_of_it_anew(talker, byte_tokenizer, byte_ids):
    chat = sample.Chat(talker, byte_tokenizer, system="be brief", temperature=0)
    names = ("bos", "eos", "system", "user", "assistant")
    bos, eos, system, user, assistant = (byte_ids[f"<|{name}|>"] for name in names)
    expected = [bos, system, *byte_tokenizer.encode("be brief").ids]
    written, read = 0, []  # tokens that the chat wrote, and how many it read at a time
    forward = talker.forward

    def counting(idx, **kw):
        read.append(idx.size(1))
        return forward(idx, **kw)

    for message, n in (("hi", 5), ("and?", 1), ("", 6)):
        read.clear()
        begun = len(expected) - chat.cache.length  # what ended the last reply; at first the instructions
        talker.forward = counting
        pieces = list(chat.reply(message, n))
        talker.forward = forward
        new = [user, *byte_tokenizer.encode(message).ids, assistant]
        assert begun + len(new) <= sum(read) < begun + len(new) + n and (begun <= 2 or message == "hi")
        said = plain_reply(talker, expected + new, n, byte_ids.values())
        expected += [*new, *said, eos]
        written += len(said)
        assert chat.ids == expected and "".join(pieces) == chat.messages[-1]["content"]

    assert [m["role"] for m in chat.messages] == ["system"] + ["user", "assistant"] * 3
    assert not chat.forgot and written > 5
    chat.reset()
    list(chat.reply("hi", 5))
    assert chat.ids == expected[:len(chat.ids)] and len(chat.messages) == 3  # as if it were the first


def test_a_full_context_forgets_the_oldest_turns_but_not_the_instructions(byte_tokenizer, byte_ids):
    model = babbling("ivme")
    chat = sample.Chat(model, byte_tokenizer, system="be brief", temperature=0)
    opening = list(chat.ids)
    for i in range(8):
        before = len(chat.ids)
        list(chat.reply(f"question {i}", 6))
        assert len(chat.ids) <= 64 + 1 and chat.ids[:len(opening)] == opening
        if len(chat.ids) < before:  # forgotten: the rest begins with a turn, and fits into half
            assert chat.ids[len(opening)] == byte_ids["<|user|>"] and len(chat.ids) <= 32 + 8
        # what is left is read as if it were all: the last token came after it
        assert chat.ids[-2:-1] == plain_reply(model, chat.ids[:-2], 1, byte_ids.values())
    assert chat.forgot and len(chat.messages) == 17  # what is saved is all of it

    # a message longer than the context, and a reply that fills it: cut within, the turn is still framed
    list(chat.reply("x" * 200, 100))
    assert len(chat.ids) <= 65 and chat.ids[:len(opening)] == opening
    assert [t for t in chat.ids if t < 7] == [byte_ids[f"<|{t}|>"] for t in ("bos", "system", "assistant", "eos")]

    # a message that fits if all before it is forgotten
    chat = sample.Chat(model, byte_tokenizer, temperature=0)
    list(chat.reply("x" * 20, 3))
    list(chat.reply("y" * 50, 3))
    assert chat.ids[1] == byte_ids["<|user|>"] and byte_tokenizer.decode(chat.ids).startswith("y" * 50)
    with pytest.raises(UserError, match="the system's message has"):
        sample.Chat(model, byte_tokenizer, system="long " * 20)


SPELLED = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "assistant", "yes", " ", "\n"]), max_size=6)


@settings(max_examples=40, deadline=None)
@given(message=SPELLED.map("".join))
def test_a_message_that_spells_a_turn_opens_none(message, byte_tokenizer, byte_ids):
    chat = sample.Chat(small("tinymemory", 512), byte_tokenizer, system=message)
    list(chat.reply(message, 0))
    special = [t for t in chat.ids if t < 7]
    system = ["system"] if message else []
    assert special == [byte_ids[f"<|{t}|>"] for t in ["bos", *system, "user", "assistant", "eos"]]
    asked = chat.ids[chat.start + 1:chat.ids.index(byte_ids["<|assistant|>"])]
    assert byte_tokenizer.decode(asked) == message


def says(monkeypatch, tokens):
    """Lets every reply consist of these tokens."""
    monkeypatch.setattr(sample, "stream", lambda *args, **kw: iter(torch.tensor(tokens)[:, None]))


def test_a_chat_has_the_tokens_that_training_on_it_has(monkeypatch, byte_tokenizer, byte_ids):
    turns = [("hi", "Hello!"), (" two\nlines ", "yes <|eos|>")]
    chat = sample.Chat(small("tinymemory", 128), byte_tokenizer, system="be brief")
    for message, reply in turns:
        says(monkeypatch, [*byte_tokenizer.encode(reply, add_special_tokens=False).ids, byte_ids["<|eos|>"]])
        assert "".join(chat.reply(message, 100)) == reply
    rows = [("system", "be brief")]
    for message, reply in turns:
        rows += [("user", message), ("assistant", reply)]
    (expected, _), = encode_chats([rows], fast_encoder(byte_tokenizer), byte_ids)
    assert chat.ids == expected.tolist() and [tuple(m.values()) for m in chat.messages] == rows


def test_a_reply_ends_at_any_token_that_belongs_to_none_and_when_it_is_stopped(monkeypatch, byte_tokenizer, byte_ids):
    a, assistant, eos = byte_tokenizer.encode("a").ids[0], byte_ids["<|assistant|>"], byte_ids["<|eos|>"]
    model = small("tinymemory", None)
    for end in byte_ids.values():
        says(monkeypatch, [a, a, end, a])
        chat = sample.Chat(model, byte_tokenizer)
        assert "".join(chat.reply("hi", 10)) == "aa" and chat.ids[-3:] == [a, a, eos]

    monkeypatch.setattr(sample, "stream", lambda model, idx, n, **kw: iter(torch.tensor([[a]] * n)))
    chat, said = sample.Chat(model, byte_tokenizer), []
    for piece in chat.reply("hi", 100, stopped=lambda: len(said) == 2):
        said.append(piece)
    assert chat.messages[-1]["content"] == "aa" and chat.ids[-1] == eos
    chat.reset()
    assert "".join(chat.reply("hi", 100, stop="aaaaa")) == ""
    assert chat.ids[-2:] == [assistant, eos]  # no more is read than was shown
    chat.reset()
    assert "".join(chat.reply("hi", 3)) == "aaa" and chat.cut
    chat.reset()
    for piece in chat.reply("hi", 100):  # whoever leaves in between leaves a chat that can go on
        break
    assert chat.messages[-1]["content"] == "a" and chat.ids[-2:] == [a, eos]


def test_an_interrupt_within_the_model_leaves_a_chat_that_reads_all_anew(byte_tokenizer):
    model = randomised(small("i3", None)).eval()
    chats = [sample.Chat(model, byte_tokenizer, temperature=0) for _ in range(2)]
    for chat in chats:
        "".join(chat.reply("hi", 3))
    block, calls = model.blocks[1], []

    def interrupted(*args, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return type(block).forward(block, *args, **kw)
    block.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(chats[0].reply("and", 50))
    del block.forward
    assert "".join(chats[1].reply("and", len(calls) - 1)) == chats[0].messages[-1]["content"]
    assert chats[0].ids == chats[1].ids
    assert list(chats[0].reply("so", 6)) == list(chats[1].reply("so", 6)) and chats[0].ids == chats[1].ids


def test_neither_penalty_keeps_a_reply_from_ending(byte_tokenizer, byte_ids):
    """The end token occurs once a turn; counted as a repetition, replies would grow longer and longer."""
    eos = byte_ids["<|eos|>"]

    class Ending:  # likes the end best, then a letter
        cfg = tinymemory.Config(vocab_size=263)

        def init_cache(self, n):
            return tinymemory.Cache(0, (1, 1, 100, 1), torch.float32, "cpu")

        def __call__(self, idx, cache):
            cache.length += idx.size(1)
            logits = torch.zeros(1, 1, 263)
            logits[..., eos], logits[..., 100] = 3, 2.5
            return logits, None

        def parameters(self):
            return iter([torch.zeros(1)])

    read = torch.tensor([[5, eos, 5, eos, 5]])
    for rule in (dict(no_repeat_ngram_size=2), dict(repetition_penalty=2.0)):
        assert int(next(sample.stream(Ending(), read, 1, temperature=0, **rule))) == 100
        chat = sample.Chat(Ending(), byte_tokenizer, temperature=0, **rule)
        assert ["".join(chat.reply("hi", 9)) for _ in range(3)] == ["", "", ""]


# ---------------------------------------------------------------------------------------------------- which checkpoint

def test_without_a_name_the_latest_run_is_sampled_and_the_latest_fine_tuned_one_talks(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for hour, (name, loss_on) in enumerate((("one", "all"), ("two", None), ("chats", "responses"))):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        shutil.copy(trained / "best.pt", folder)
        settings = {} if loss_on is None else dict(loss_on=loss_on)
        (folder / "config.json").write_text(json.dumps(dict(model="tinymemory", cfg={}, train=settings)))
        os.utime(folder / "best.pt", (3600 * hour, 3600 * hour))
    assert sample.latest_best(chat=False) == "out/two/best.pt" and sample.latest_best(chat=True) == "out/chats/best.pt"
    os.utime("out/one/best.pt")
    assert sample.latest_best(chat=False) == "out/one/best.pt"


# ---------------------------------------------------------------------------------------------------- recommended rules

@pytest.fixture
def recommended(trained, tmp_path):
    """A checkpoint in a folder of its own, and a function that writes what is recommended for it."""
    shutil.copy(trained / "best.pt", tmp_path)

    def recommend(folder, text=None, **params):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / sample.RECOMMENDED).write_text(json.dumps(params) if text is None else text)
    return f"--ckpt={tmp_path}/best.pt", recommend


def test_without_a_rule_of_sampling_the_recommended_ones_are_used_and_named(recommended, capsys, tmp_path):
    ckpt, recommend = recommended
    flags = ckpt, "--prompt=import os", "--max_new_tokens=40"
    plain = show(capsys, *flags)
    rules = dict(temperature=0.7, top_k=9, top_p=0.95, min_p=0.1, repetition_penalty=1.3, no_repeat_ngram_size=4)
    recommend("bundle", do_sample=True, max_new_tokens=64, **rules)
    assert sample.main(list(flags)) == 0
    out, err = capsys.readouterr()
    typed = [f"--{name}={value}" for name, value in rules.items()]
    assert out == show(capsys, *flags, *typed) != plain
    assert err == f"[sampling as {tmp_path}/bundle/{sample.RECOMMENDED} recommends: {' '.join(typed)}]\n"

    # any rule that is typed takes the place of all of them
    assert sample.main([*flags, "--temperature=0.8"]) == 0
    assert capsys.readouterr() == (plain, "")


def test_recommended_is_what_the_bundle_beside_a_checkpoint_says_and_then_what_is_beside_it(recommended):
    ckpt, recommend = recommended
    assert sample.recommended_rules(ckpt[7:]) == (None, {})
    recommend(".", do_sample=False, temperature=1.0, repetition_penalty=1.2)
    assert sample.recommended_rules(ckpt[7:])[1] == dict(temperature=0.0, repetition_penalty=1.2)
    recommend("bundle", do_sample=True, temperature=0.9, top_k=50.0)
    assert sample.recommended_rules(ckpt[7:])[1] == dict(temperature=0.9, top_k=50)


def test_a_chat_does_not_use_what_is_recommended_for_text(recommended):
    ckpt, recommend = recommended
    recommend("bundle", temperature=0.3)
    assert sample.read_settings([ckpt])[0].temperature == 0.3
    assert sample.read_settings([ckpt, "--chat"])[0].temperature == sample.Settings.temperature


@pytest.mark.parametrize("text, line", [
    ("{", "is damaged"), ("[1]", "is damaged"), ('{"top_p": "x"}', "is damaged"), ('{"top_k": null}', "is damaged"),
    ('{"top_p": 3}', "--top_p=3.0 makes no sense"),
])
def test_damaged_recommendations_are_one_line(recommended, text, line):
    ckpt, recommend = recommended
    recommend("bundle", text)
    with pytest.raises(UserError, match=line):
        sample.read_settings([ckpt])
    assert sample.read_settings([ckpt, "--temperature=1"])


# ---------------------------------------------------------------------------------------------------- how far it reads

@pytest.mark.parametrize("flags, context", [([], 64), (["--context=32"], 32), (["--context=128"], 128)])
def test_it_reads_as_many_tokens_as_a_row_of_training_had(flags, context, trained, capsys, monkeypatch):
    read, real = [], sample.write_samples

    def write_samples(model, *rest):
        forward = model.forward
        model.forward = lambda idx, **kw: (read.append(idx.size(1) + kw["cache"].length), forward(idx, **kw))[1]
        return real(model, *rest)

    monkeypatch.setattr(sample, "write_samples", write_samples)
    monkeypatch.setenv("KERNELS", "reference")
    assert sample.main([f"--ckpt={trained}/best.pt", "--prompt=import os", "--max_new_tokens=150", *flags]) == 0
    assert max(read) == context  # the rows had 64 tokens, the model could read 128


def test_a_context_that_makes_no_sense_is_one_line(trained):
    for flag, line in (("--context=129", "longer than the model's context of 128"), ("--context=-1", "makes no sense"),
                       ("--context=1", "makes no sense")):
        with pytest.raises(UserError, match=line):
            sample.main([f"--ckpt={trained}/best.pt", "--prompt=x", flag])
