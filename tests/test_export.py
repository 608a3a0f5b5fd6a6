"""Releases: `transformers`, in a process of its own that does not see the repository, loads each of them and computes
what our model computes; llama.cpp does so too; what was exported is imported again to the bit; the card tells what the
run's files tell; and nothing is left half-made."""
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import export
import gpt2preln
import ivme
import run
import runfolder
import tinymemory
import train
from architectures import ARCHITECTURES, tiny
from common import UserError, run_tool
from conftest import ROOT, command, finish
from corpus.chats import chat_ids, encode_chats, tidy
from corpus.tokenizer import TRAINERS, fast_encoder, from_tiktoken
from corpus_helpers import small_gpt2
from fake_hub import FakeHub
from made_up import made_up_chats, made_up_text
from release import card, contents, gguf_format, importing, llama_cpp, transformers_format

# release -> (row of ARCHITECTURES, tokenizer, class in `transformers`)
RELEASES = {
    "ivme": ("ivme", "bpe", "LlamaForCausalLM"),
    "tinymemory": ("tinymemory", "hybrid", "Qwen3ForCausalLM"),
    "gpt2preln": ("gpt2preln", "bpe", "GPT2LMHeadModel"),
    "gpt2preln-tied": ("gpt2preln-tied", "bpe", "GPT2LMHeadModel"),
    "i3": ("i3", "chunk", "I3ForCausalLM"),
    "i3-attention": ("i3-attention", "bpe", "I3ForCausalLM"),
}
every_release = pytest.mark.parametrize("name", RELEASES)

TEXTS = llama_cpp.varied_texts(1000)
CHATS = [[(m["role"], m["content"]) for m in chat["messages"]] for chat in made_up_chats(20, seed=0)]
CHATS += [
    [("user", " hi\n"), ("assistant", "a"), ("user", ""), ("assistant", "b")],
    [("system", "İvme 🙂"), ("user", ""), ("assistant", "  x\n\n")],
    [("system", " "), ("system", "brief"), ("user", "a"), ("user", ""), ("user", "b"), ("assistant", "x")],
    [("system", ""), ("user", ""), ("user", "hi"), ("assistant", ""), ("assistant", "x"), ("assistant", "\n")]]


# ---------------------------------------------------------------------------------------------------- making releases

@functools.cache
def trained_tokenizer(kind):
    rng = random.Random(0)
    return TRAINERS[kind]([*TEXTS, *(made_up_text("en", "web", rng) for _ in range(200))], 400)


def write_checkpoint(path, architecture, kind, **overrides):
    """A checkpoint with random weights that all count, as if it had never been trained."""
    model = tiny(architecture, vocab_size=400, context_length=96, **overrides)
    preset = next(iter(ARCHITECTURES[architecture].params))
    path.parent.mkdir(parents=True, exist_ok=True)
    runfolder.save_checkpoint(path, dict(
        dict.fromkeys(run.KEYS), format=run.FORMAT, step=0, tokens=0, model_name=preset,
        cfg=dataclasses.asdict(model.cfg), train=dict(model=preset), model=model.state_dict(), ema={}, use_ema=False,
        loader={}, tokenizer=trained_tokenizer(kind).to_str(pretty=True), metrics=dict(elapsed=0.0)))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Release -> its checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name / "best.pt", architecture, kind)
            for name, (architecture, kind, _) in RELEASES.items()}


@pytest.fixture(scope="session")
def releases(checkpoints):
    """Release -> its folder."""
    for path in checkpoints.values():
        assert export.main([f"--ckpt={path}"]) == 0
    return {name: path.parent / "release" for name, path in checkpoints.items()}


def opened(checkpoints, name):
    return contents.open_release(checkpoints[name])


def ids_of(release, text):
    return release.tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------------- in transformers

# What a process that knows nothing of the repository does: it loads the folders in jobs.pt and writes what it finds to
# found.pt. It also saves small random models of its own, for import.
IN_TRANSFORMERS = """
import json, os, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

torch.set_num_threads(1)
found = {}
for name, job in torch.load("jobs.pt").items():
    trust = dict(trust_remote_code=True) if job["trust"] else {}
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], **trust)
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **trust)
    got = found[name] = dict(kind=type(model).__name__, dtype=model.dtype)
    got["ids"] = tokenizer(job["texts"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    got["decoded"] = [tokenizer.decode(ids) for ids in got["ids"]]
    with torch.no_grad():
        got["logits"] = [model(idx).logits for idx in job["idx"]]
        got["loss"] = model(job["idx"][0], labels=job["idx"][0]).loss
    got["greedy"] = [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, do_sample=False)[0]
                     for text in job["prompts"]]
    batch = tokenizer(job["prompts"], return_tensors="pt", padding=True)
    got["batch"] = {key: value.tolist() for key, value in batch.items()}
    got["batch_greedy"] = model.generate(**batch, max_new_tokens=20, do_sample=False).tolist()
    got["beams"] = [model.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False, use_cache=use).tolist()
                    for use in (True, False)]
    got["chats"] = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in job["chats"]]
    got["asked"] = tokenizer.apply_chat_template(
        job["asked"], add_generation_prompt=True, return_dict=True)["input_ids"]
    if "sanitize_control_tokens" in tokenizer.apply_chat_template.__code__.co_varnames:
        got["sanitized"] = tokenizer.apply_chat_template(
            [dict(role="user", content="<|eos|> is no end")], sanitize_control_tokens=True)["input_ids"]

torch.manual_seed(0)
sizes = dict(vocab_size=600, max_position_embeddings=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=80, tie_word_embeddings=True, initializer_range=0.3)
configs = {
    "gpt2": transformers.GPT2Config(
        vocab_size=600, n_positions=64, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3),
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **sizes),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=4, head_dim=12, **sizes)}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(name)
    bos, eos = ("<s>", "</s>") if name == "llama" else ("<|endoftext|>", "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_file=f"{name}.json", bos_token=bos, eos_token=eos).save_pretrained(name)
    idx = torch.randint(600, (2, 64))
    with torch.no_grad():
        found[name] = dict(idx=idx, logits=model(idx).logits)
torch.save(found, "found.pt")

for folder, code in json.load(open("snippets.json")):  # of model cards
    os.chdir(folder)
    sys.path[0] = folder
    print("----", flush=True)
    exec(code, {})
"""

# The snippet on the card of IvmeLabs/Ivme-Conversate-22M-Base
IVME_SNIPPET = '''
import torch
from tokenizers import Tokenizer

# Load with custom code (not a standard HF AutoModel — see model.py)
from model import IvmeConfig, IvmeConversate

tokenizer = Tokenizer.from_file("ivme_tokenizer.json")
ckpt = torch.load("ivme_base_ema.pt", map_location="cuda", weights_only=False)
cfg = ckpt["cfg"]
cfg.attn_backend = "sdpa"  # or "kernels" for HF Kernels flash-attn
model = IvmeConversate(cfg).cuda()
model.load_state_dict(ckpt["model"])
model.eval()

prompt = "The theory of relativity states that"
ids = torch.tensor([tokenizer.encode(prompt).ids], device="cuda")
out = model.generate(ids, max_new_tokens=100, temperature=0.8, top_k=40)
print(tokenizer.decode(out[0].tolist()))
'''


def foreign_tokenizers(folder):
    """gpt2.json, llama.json and qwen3.json: tokenizers with GPT-2's, Llama's and again GPT-2's special tokens."""
    gpt2 = from_tiktoken(small_gpt2(vocab_size=599))
    for name in ("gpt2", "qwen3"):
        (folder / f"{name}.json").write_text(gpt2.to_str())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    llama = Tokenizer(models.BPE({token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    llama.pre_tokenizer, llama.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    llama.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    (folder / "llama.json").write_text(llama.to_str())


PROMPTS = ["The", "a long story of the house and", "def f"]


@pytest.fixture(scope="session")
def in_transformers(checkpoints, releases, trained, tmp_path_factory):
    """(what IN_TRANSFORMERS found, its folder, what the cards' snippets printed)."""
    folder = tmp_path_factory.mktemp("transformers")
    jobs = {}
    for name, path in releases.items():
        cfg = opened(checkpoints, name).cfg
        g = torch.Generator().manual_seed(0)
        idx = [torch.randint(cfg.vocab_size, shape, generator=g) for shape in ((3, 40), (1, cfg.context_length))]
        chats = [[dict(role=role, content=text) for role, text in chat] for chat in CHATS]
        jobs[name] = dict(folder=str(path), trust=name.startswith("i3"), texts=TEXTS, idx=idx, prompts=PROMPTS,
                          chats=chats, asked=chats[0][:-1])
    torch.save(jobs, folder / "jobs.pt")
    foreign_tokenizers(folder)

    named = [folder / "İvme", folder / "TinyMemoryLM"]
    export.main([f"--ckpt={checkpoints['ivme']}", f"--out={named[0]}", "--card_names"])
    export.main([f"--ckpt={trained / 'best.pt'}", f"--out={named[1]}", "--card_names"])
    snippets = [(str(named[0]), IVME_SNIPPET.replace(".cuda()", "").replace('"cuda"', '"cpu"'))]
    for path in (named[1], releases["i3"]):
        (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)
        snippets.append((str(path), code))
    (folder / "snippets.json").write_text(json.dumps(snippets))

    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= dict(HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", IN_TRANSFORMERS], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt"), folder, done.stdout.split("----\n")[1:]


@every_release
def test_transformers_computes_the_same_logits(name, checkpoints, in_transformers):
    release, got = opened(checkpoints, name), in_transformers[0][name]
    assert got["kind"] == RELEASES[name][2] and got["dtype"] == torch.float32
    jobs = torch.load(in_transformers[1] / "jobs.pt")
    for idx, logits in zip(jobs[name]["idx"], got["logits"]):
        with torch.no_grad():
            ours = release.model(idx, all_logits=True)[0]
        assert ours.std() > 0.1 and (ours - logits).abs().max() < 1e-4
    idx = jobs[name]["idx"][0]
    loss = release.model(idx[:, :-1], idx[:, 1:])[1]
    assert abs(loss - got["loss"]) < 1e-4


@every_release
def test_transformers_writes_the_same_greedy_text(name, checkpoints, in_transformers):
    release, got = opened(checkpoints, name), in_transformers[0][name]
    for text, theirs in zip(PROMPTS, got["greedy"]):
        assert theirs.tolist() == greedy(release, [release.bos, *ids_of(release, text)], 64)


def greedy(release, ids, n):
    return release.model.generate(torch.tensor([ids]), n, temperature=0, stop_token=release.eos)[0].tolist()


@every_release
def test_rows_of_unequal_lengths_are_padded_on_the_left_and_go_on_as_each_alone(name, checkpoints, in_transformers):
    release, got = opened(checkpoints, name), in_transformers[0][name]
    longest = max(map(len, got["batch"]["input_ids"]))
    assert got["batch"].keys() == {"input_ids", "attention_mask"}
    for text, ids, mask, row in zip(PROMPTS, *got["batch"].values(), got["batch_greedy"]):
        own = [release.bos, *ids_of(release, text)]
        n = longest - len(own)
        assert ids == [release.pad] * n + own and mask == [0] * n + [1] * len(own)
        alone = greedy(release, own, 20)
        assert row[n:n + len(alone)] == alone and set(row[n + len(alone):]) <= {release.pad}
    assert got["beams"][0] == got["beams"][1]  # with what was read kept, and without


@every_release
def test_transformers_reads_text_as_we_do_and_never_makes_a_special_token_of_it(name, checkpoints, in_transformers):
    release, got = opened(checkpoints, name), in_transformers[0][name]
    assert any("<|eos|>" in text for text in TEXTS)
    assert got["ids"] == [ids_of(release, text) for text in TEXTS]
    assert got["decoded"] == [release.tokenizer.decode(ids) for ids in got["ids"]]
    special = chat_ids(release.tokenizer)
    if "sanitized" in got:  # of versions that can
        assert [i for i in got["sanitized"] if i in special.values()] == [special["<|bos|>"], special["<|user|>"]]


@every_release
def test_the_chat_template_frames_chats_as_our_tools_do(name, checkpoints, in_transformers):
    release, got = opened(checkpoints, name), in_transformers[0][name]
    encode, special = fast_encoder(release.tokenizer), chat_ids(release.tokenizer)
    assert got["chats"] == [ids.tolist() for ids, _ in encode_chats([tidy(chat) for chat in CHATS], encode, special)]
    (asked, _), = encode_chats([tidy(CHATS[0])[:-1] + [("assistant", "")]], encode, special)
    assert got["asked"] == asked[:-1].tolist()


def test_the_snippets_on_the_cards_run(in_transformers):
    ivme_text, tinymemory_text, i3_text = in_transformers[2]
    assert ivme_text.startswith("The theory of relativity states that") and len(ivme_text) > 60
    assert tinymemory_text.startswith("The") and len(tinymemory_text) > 10
    assert i3_text.startswith("the") and len(i3_text) > 10  # a chunk tokenizer lowercases


def test_a_tuned_tinymemory_brings_the_model_that_it_started_from(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = run.read_checkpoint(checkpoints["tinymemory"])
    weights = {name: value + 1 for name, value in start["model"].items()}
    settings = dict(start["train"], loss_on="responses", init_from=str(checkpoints["tinymemory"]))
    runfolder.save_checkpoint("tuned.pt", dict(start, model=weights, train=settings))
    export.main(["--ckpt=tuned.pt", "--out=it", "--card_names"])
    code = """
import sys, torch
sys.path.insert(0, "it")
from model import TinyMemoryConfig, TinyMemoryLM
for name in ("pretrain.pt", "model.pt"):
    ckpt = torch.load(f"it/{name}", weights_only=False)
    assert type(ckpt["cfg"]) is TinyMemoryConfig
    model = TinyMemoryLM(ckpt["cfg"])
    model.load_state_dict(ckpt["model"])
    print(model.norm.weight[0].item())
"""
    before, after = map(float, finish(command("-c", code)).split())
    assert before == start["model"]["norm.weight"][0].item() and after == before + 1


def test_i3_carries_its_code_whole_in_two_files(releases):
    text = (releases["i3"] / "modeling_i3.py").read_text()
    for source in ("i3.py", "kernels/reference.py"):
        lines = [line for line in (ROOT / source).read_text().splitlines() if "from kernels import" not in line]
        assert "\n".join(lines[-40:]) in text and "\n".join(lines[:20]) in text
    assert "from kernels" not in text and "from .i3" not in text and "from .reference" not in text


# ---------------------------------------------------------------------------------------------------- and back

@every_release
def test_what_was_exported_comes_back_to_the_bit(name, checkpoints, releases, tmp_path):
    assert export.main([f"--import_from={releases[name]}", f"--out={tmp_path / 'back.pt'}"]) == 0
    before, after = run.read_checkpoint(checkpoints[name]), run.read_checkpoint(tmp_path / "back.pt")
    assert after["cfg"] == before["cfg"] and after["tokenizer"] == before["tokenizer"]
    assert after["model"].keys() == before["model"].keys()
    assert all(torch.equal(after["model"][key], value) for key, value in before["model"].items())
    # so does the checkpoint in the release
    shipped = run.read_checkpoint(releases[name] / "step_0.pt")
    assert all(torch.equal(shipped["model"][key], value) for key, value in before["model"].items())


def test_weights_may_be_a_bin_file_of_another_type(checkpoints, tmp_path):
    out = tmp_path / "half"
    export.main([f"--ckpt={checkpoints['i3']}", f"--out={out}", "--bin", "--dtype=bfloat16"])
    assert (out / "pytorch_model.bin").exists() and not (out / "model.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export.main([f"--import_from={out}", f"--out={tmp_path / 'back.pt'}"])
    after = run.read_checkpoint(tmp_path / "back.pt")["model"]
    for key, value in run.read_checkpoint(checkpoints["i3"])["model"].items():
        assert torch.equal(after[key], value.bfloat16().float())


FOREIGN = dict(gpt2=gpt2preln, llama=ivme, qwen3=tinymemory)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_transformers_comes_in_with_its_logits_and_its_tokenizer(name, in_transformers, tmp_path):
    found, folder, _ = in_transformers
    export.main([f"--import_from={folder / name}", f"--out={tmp_path / 'its.pt'}"])
    model, tokenizer, checkpoint = run.load_checkpoint(tmp_path / "its.pt")
    assert type(model).__module__ == FOREIGN[name].__name__
    with torch.no_grad():
        ours = model(found[name]["idx"], all_logits=True)[0]
    assert found[name]["logits"].std() > 0.5 and (ours - found[name]["logits"]).abs().max() < 1e-4
    # the ids stay, and those that begin and end a document have our names
    theirs = Tokenizer.from_file(str(folder / f"{name}.json"))
    assert all(tokenizer.encode(text).ids == ids_without_special(theirs, text) for text in TEXTS[:200])
    bos, eos = ("<s>", "</s>") if name == "llama" else ("<|endoftext|>",) * 2
    assert contents.bos_eos(tokenizer) == (theirs.token_to_id(bos), theirs.token_to_id(eos))


def ids_without_special(tokenizer, text):
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_an_imported_gpt2_is_fine_tuned_as_nanogpt_does_it(in_transformers, tmp_path, monkeypatch):
    """nanoGPT's recipe for tiny shakespeare: a constant small rate, few steps, no average."""
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    Path("text.txt").write_text("\n\n".join(made_up_text("en", "web", rng) for _ in range(300)))
    export.main([f"--import_from={in_transformers[1] / 'gpt2'}", "--out=out/gpt2/gpt2.pt"])
    finish(command(ROOT / "prepare.py", "text.txt", "--tokenizer=out/gpt2/gpt2.pt", "--name=shakespeare"))
    assert train.main(["--init_from=out/gpt2/gpt2.pt", "--data=shakespeare", "--out=out/tuned", "--batch_tokens=1024",
                       "--micro_batch=4", "--max_steps=6", "--lr=1e-3", "--schedule=constant", "--warmup_steps=0",
                       "--ema_beta=0", "--eval_every=3", "--eval_tokens=1024", "--final_eval_tokens=1024",
                       "--log_every=1", "--sample_tokens=0", "--dtype=float32", "--compile=off", "--device=cpu"]) == 0
    rows = runfolder.read_rows(Path("out/tuned/metrics.jsonl"))
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses[-1] < losses[0] - 1
    assert run.read_checkpoint("out/gpt2/gpt2.pt")["cfg"]["tied"]

    # and out it goes again, with a tokenizer that has one special token and no roles
    export.main(["--ckpt=out/tuned/best.pt", "--gguf", "--gguf_type=F32"])
    config = json.loads(Path("out/tuned/release/tokenizer_config.json").read_text())
    assert config["bos_token"] == config["eos_token"] == config["pad_token"] == "<|endoftext|>"
    assert "chat_template" not in config and not Path("out/tuned/release/chat_template.jinja").exists()
    text = Path("out/tuned/release/README.md").read_text()
    assert "| Started from | out/gpt2/gpt2.pt |" in text and "tokens of 400 strings equal" in text


# ---------------------------------------------------------------------------------------------------- in llama.cpp

IN_GGUF = {"ivme": dict(d_model=96), "tinymemory": dict(d_model=64), "gpt2preln": dict(d_model=64),
           "gpt2preln-tied": dict(d_model=64)}


@pytest.fixture(scope="session")
def with_bpe(tmp_path_factory):
    """Architecture -> a checkpoint whose tokenizer is a BPE, and whose rows divide into blocks of Q8_0."""
    root = tmp_path_factory.mktemp("gguf")
    return {name: write_checkpoint(root / name / "best.pt", name, "bpe", **sizes) for name, sizes in IN_GGUF.items()}


@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_computes_what_we_compute(name, with_bpe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(llama_cpp, "N_TEXTS", 100)
    kinds = list(gguf_format.TYPES) if name == "ivme" else ["F32", "Q8_0"]
    out = tmp_path / "it"
    assert export.main([f"--ckpt={with_bpe[name]}", f"--out={out}", "--gguf", f"--gguf_type={','.join(kinds)}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line.removeprefix("llama.cpp").strip() for line in printed if line.startswith("llama.cpp")]
    assert [line.split(":")[0] for line in lines] == [f"{name}-{kind}.gguf" for kind in kinds]
    assert "tokens of 100 strings equal" in lines[0] and "part" not in lines[0]
    assert all(f"- {line}" in (out / "README.md").read_text() for line in lines)
    sizes = [(out / f"{name}-{kind}.gguf").stat().st_size for kind in kinds]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]
    assert f"FROM ./{name}-F32.gguf" in (out / "Modelfile").read_text()


def test_a_gguf_file_of_another_model_is_found_out(with_bpe, tmp_path, monkeypatch):
    """The check that every export makes can fail: here the rows of Llama's queries and keys keep our order."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(llama_cpp, "N_TEXTS", 10)
    monkeypatch.setattr(gguf_format, "neighbouring_pairs", lambda weight, n_head: weight)
    with pytest.raises(UserError, match="log-probabilities are off"):
        export.main([f"--ckpt={with_bpe['ivme']}", f"--out={tmp_path / 'it'}", "--gguf", "--gguf_type=F32"])
    assert list(tmp_path.iterdir()) == []


def test_a_chat_in_llama_cpp_ends_where_ours_ends(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    path = write_checkpoint(tmp_path / "run/best.pt", "gpt2preln", "bpe", d_model=64)
    release = contents.open_release(path)
    question = [release.bos, *(release.tokenizer.token_to_id("<|user|>"), *ids_of(release, "Who?"),
                               release.tokenizer.token_to_id("<|assistant|>"))]
    lengths = {}
    for factor in range(1, 40):  # the end becomes likelier and likelier
        with torch.no_grad():
            release.model.head.weight[release.eos] *= 1.1
        n = len(greedy(release, question, 60)) - len(question) - 1
        if 3 < n < 50:
            lengths[factor] = n
            break
    assert lengths, "no reply that ends by itself"

    gguf_format.write_gguf(tmp_path / "it.gguf", release, "F32")
    llama = llama_cpp.LlamaCpp(tmp_path / "it.gguf", release.cfg.context_length)
    answer = llama.ask("/v1/chat/completions", messages=[dict(role="user", content="Who?")], temperature=0,
                       max_tokens=60, repeat_penalty=1.0)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(question)
    assert answer["usage"]["completion_tokens"] == n + 1  # with the <|eos|>
    # and so do texts
    monkeypatch.setattr(llama_cpp, "N_TEXTS", 5)
    assert "part" not in llama_cpp.check(tmp_path / "it.gguf", release, "F32")


def about_weights(folder):
    """What eval_summary.json says of the weights that a bundle is about."""
    checkpoint = run.read_checkpoint(folder / "best.pt")
    return dict(checkpoint="best.pt", step=checkpoint["step"], tokens=checkpoint["tokens"],
                weights="EMA" if checkpoint["use_ema"] else "raw")


def test_recommended_decoding_goes_into_every_format(with_bpe, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "run"
    shutil.copytree(with_bpe["ivme"].parent, folder)
    decoding = dict(do_sample=True, temperature=0.75, top_k=13, top_p=0.875, min_p=0.0, repetition_penalty=1.25,
                    no_repeat_ngram_size=0, max_new_tokens=7)
    (folder / "bundle").mkdir()
    (folder / "bundle/recommended_decoding_params.json").write_text(json.dumps(decoding | dict(preset="balanced")))
    (folder / "bundle/decoding_report.md").write_text("# Balanced wins\n")
    for about in ({}, dict(about_weights(folder), step=7), dict(about_weights(folder), weights="other")):
        (folder / "bundle/eval_summary.json").write_text(json.dumps(about))  # of other weights
        assert contents.open_release(folder / "best.pt").decoding == {}
    (folder / "bundle/eval_summary.json").write_text(json.dumps(about_weights(folder)))
    release = contents.open_release(folder / "best.pt")
    assert release.decoding == decoding

    export.main([f"--ckpt={folder / 'best.pt'}", "--gguf", "--gguf_type=F32"])
    out = folder / "release"
    assert decoding.items() <= json.loads((out / "generation_config.json").read_text()).items()
    assert (out / "decoding_report.md").exists() and "| top_p | `0.875` |" in (out / "README.md").read_text()
    modelfile = (out / "Modelfile").read_text()
    for line in ("temperature 0.75", "top_k 13", "top_p 0.875", "repeat_penalty 1.25", "num_ctx 96"):
        assert f"PARAMETER {line}\n" in modelfile
    assert "num_predict" not in modelfile  # how long a text is, is not how to sample it
    settings = llama_cpp.LlamaCpp(out / "run-F32.gguf", 96).ask("/completion", prompt="a", n_predict=1)
    settings = settings["generation_settings"]
    ours = dict(temperature=0.75, top_k=13, top_p=0.875, min_p=0.0, repeat_penalty=1.25)
    assert {name: settings[name] for name in ours} == ours
    assert settings["samplers"] == ["penalties", "temperature", "top_k", "top_p", "min_p"]  # in sample.py's order


def test_greedy_decoding_leaves_out_what_nothing_is_drawn_by(checkpoints):
    release = opened(checkpoints, "ivme")
    release.decoding = dict(do_sample=False, temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=9)
    config = transformers_format.generation_config(release)
    assert config == dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=9)
    assert "PARAMETER temperature 0\n" in gguf_format.modelfile(release, "it.gguf")


def test_what_llama_cpp_cannot_do_is_not_half_done(checkpoints):
    release = opened(checkpoints, "ivme")
    release.decoding = dict(do_sample=True, temperature=0.7, top_p=0.9, no_repeat_ngram_size=3)
    assert gguf_format.decoding_of(release) == {} and "temperature" not in gguf_format.modelfile(release, "it.gguf")
    assert "which llama.cpp cannot do" in card.gguf_section(release, {"it.gguf": ""}, [])
    assert transformers_format.generation_config(release)["no_repeat_ngram_size"] == 3


def test_chats_are_not_sampled_as_texts_are(checkpoints):
    """Also those of which all that is said was learned."""
    release = opened(checkpoints, "ivme")
    for loss_on in ("responses", "all"):
        chat = dataclasses.replace(release, checkpoint=dict(release.checkpoint, train=dict(
            release.checkpoint["train"], loss_on=loss_on, minutes=0.0)))
        assert chat.is_chat_model and chat.decoding == {} and "<|user|>" in gguf_format.modelfile(chat, "it.gguf")
        assert f"tokens of {'replies' if loss_on == 'responses' else 'chats'}: it answers" in card.introduction(chat)


@pytest.mark.parametrize("settings, said, unsaid", [
    (dict(schedule="constant"), [], ["Final lr", "| Decay |"]),
    (dict(schedule="wsd", decay_steps=0, decay_fraction=0.0), [], ["Final lr", "| Decay |"]),
    (dict(schedule="wsd", decay_steps=20, final_lr_fraction=0.1), ["| Decay | 20 steps |", "10% of the peak"], []),
    (dict(schedule="cosine", final_lr_fraction=0.1), ["10% of the peak"], ["| Decay |"]),
    (dict(init_from="gpt2/gpt2.pt"), ["goes on from gpt2/gpt2.pt, with"], ["on English only", "training tokens"]),
    (dict(init_from="card/1.pt", decay_only=True), ["It was trained on ", "on English only"], ["It goes on from"]),
])
def test_the_card_tells_of_the_training_what_happened(settings, said, unsaid, trained):
    release = trained_release(trained)
    release = dataclasses.replace(release, checkpoint=dict(release.checkpoint, train=dict(
        release.checkpoint["train"], **settings)))
    text = card.model_card(release, {})
    assert all(part in text for part in said) and not any(part in text for part in unsaid)


def test_a_release_of_a_release_keeps_what_is_known_of_the_training(evaluated):
    export.main([f"--ckpt={evaluated / 'best.pt'}"])
    (again,) = (evaluated / "release").glob("step_*.pt")
    export.main([f"--ckpt={again}", f"--out={evaluated / 'again'}"])
    first, second = ((evaluated / name / "training_config.json").read_text() for name in ("release", "again"))
    assert first == second and "NVIDIA H100" in (evaluated / "again/README.md").read_text()
    losses = [(evaluated / name / "README.md").read_text().split("## Validation losses")[1].split("##")[0]
              for name in ("release", "again")]
    assert losses[0] == losses[1] and "blimp" in (evaluated / "again/README.md").read_text()


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_release_says_which_weights_it_has(use_ema, evaluated):
    checkpoint = run.read_checkpoint(evaluated / "best.pt")
    runfolder.save_checkpoint(evaluated / "best.pt", dict(checkpoint, use_ema=use_ema))
    export.main([f"--ckpt={evaluated / 'best.pt'}"])
    (again,) = (evaluated / "release").glob("step_*.pt")
    assert contents.open_release(again).weights == ("ema" if use_ema else "raw")


def test_of_a_bundle_only_what_eval_has_written_is_released(evaluated):
    (evaluated / "bundle").mkdir()
    (evaluated / "bundle/eval_summary.json").write_text(json.dumps(about_weights(evaluated)))
    (evaluated / "bundle/.env").write_text("TOKEN=secret")
    (evaluated / "bundle/notes.txt").write_text("mine")
    for flags in ([], [f"--bundle={evaluated / 'bundle'}"]):
        export.main([f"--ckpt={evaluated / 'best.pt'}", f"--out={evaluated / str(len(flags))}", *flags])
        names = {path.name for path in (evaluated / str(len(flags))).iterdir()}
        assert "eval_summary.json" in names and not names & {".env", "notes.txt"}


def test_a_tokenizer_that_varied_in_training_does_not_vary_in_the_release(with_bpe, tmp_path):
    checkpoint = run.read_checkpoint(with_bpe["ivme"])
    spec = json.loads(checkpoint["tokenizer"])
    spec["model"]["dropout"] = 0.9
    runfolder.save_checkpoint(tmp_path / "best.pt", dict(checkpoint, tokenizer=json.dumps(spec)))
    export.main([f"--ckpt={tmp_path / 'best.pt'}", f"--out={tmp_path / 'it'}"])
    assert json.loads((tmp_path / "it/tokenizer.json").read_text())["model"]["dropout"] is None


@pytest.mark.parametrize("change", [
    dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)),
    dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)),
    dict(normalizer=dict(type="Lowercase"))], ids=["prefix space", "no words", "normalizer"])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_has_no_gguf(change, with_bpe, tmp_path):
    checkpoint = run.read_checkpoint(with_bpe["ivme"])
    text = json.dumps(json.loads(checkpoint["tokenizer"]) | change)
    runfolder.save_checkpoint(tmp_path / "best.pt", dict(checkpoint, tokenizer=text))
    with pytest.raises(UserError, match="llama.cpp would cut the text into other tokens"):
        export.main([f"--ckpt={tmp_path / 'best.pt'}", f"--out={tmp_path / 'it'}", "--gguf"])


# ---------------------------------------------------------------------------------------------------- the model card

@pytest.fixture
def evaluated(trained, tmp_path):
    """A copy of the small run, with eval.json and what the run says of its machine."""
    folder = tmp_path / "my-model"
    shutil.copytree(trained, folder)
    blimp = dict(score=0.614, stderr=0.0017, metric="acc")
    scores = dict(about_weights(folder), tasks=dict(blimp=blimp, odd="no score"),
                  protocol=dict(harness="lm_eval 0.4.13", num_fewshot=0, window=1024))
    (folder / "eval.json").write_text(json.dumps(scores))
    record = json.loads((folder / "config.json").read_text())
    record["machine"] = dict(chip="NVIDIA H100 80GB HBM3", processes=8, dtype="bfloat16", torch="2.13.0")
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_the_card_tells_what_the_files_tell(evaluated, corpora, monkeypatch):
    monkeypatch.chdir(corpora)
    export.main([f"--ckpt={evaluated / 'best.pt'}", "--license=mit"])
    text = (evaluated / "release/README.md").read_text()
    checkpoint = run.read_checkpoint(evaluated / "best.pt")
    final = runfolder.read_rows(evaluated / "metrics.jsonl")[-1]
    (kind,) = final["val_loss"]
    n_params = sum(value.numel() for value in checkpoint["model"].values())
    said = [
        "# my-model", 'license: "mit"', 'language: ["en"]', f"| Parameters | {n_params:,} |", "| Layers | 2 |",
        "| Context length | 128 tokens, trained on rows of 64 |", "| Attention heads | 2 |",
        f"| pydocs | {final['val_loss'][kind]['mixed']:.4f} |", f"| {final['val_bits_per_byte'][kind]['mixed']:.3f} |",
        f"`xz -9` needs {final['xz_bits_per_byte']:.3f} bits", f"| Tokens trained on | {checkpoint['tokens']:,} |",
        "| Muon lr | 0.025 |", "| Tokens per step | 512 |", "| PSF |", "100%",
        "| blimp | acc | 0.614 ± 0.0017 |", "num fewshot 0, window 1024", "NVIDIA H100 80GB HBM3",
        "| Precision | bfloat16 |", "It is a base model", f"step_{checkpoint['step']}.pt", "training_config.json",
        "eval.json", "(loss.png)"]
    assert [part for part in said if part not in text] == []
    assert "None" not in text and "nan" not in text and "odd" not in text
    (evaluated / "eval.json").write_text(json.dumps(dict(step=1, tasks=dict(blimp=dict(score=0.614)))))
    export.main([f"--ckpt={evaluated / 'best.pt'}", f"--out={evaluated / 'again'}"])
    assert "blimp" not in (evaluated / "again/README.md").read_text() and not (evaluated / "again/eval.json").exists()
    for line in text.splitlines():  # tables are whole
        assert not line.startswith("| ") or line.endswith(" |")


def test_what_no_file_tells_is_left_out_of_the_card(trained, tmp_path):
    checkpoint = run.read_checkpoint(trained / "best.pt")
    checkpoint["train"]["data"] = "gone"
    runfolder.save_checkpoint(tmp_path / "best.pt", checkpoint)
    export.main([f"--ckpt={tmp_path / 'best.pt'}"])
    text = (tmp_path / "release/README.md").read_text()
    unknown = ["Validation losses", "Benchmarks", "loss.png", "| Hardware |", "Licence", "license:", "None", "PSF",
               "Recommended decoding", "GGUF", "metrics.jsonl"]
    assert [part for part in unknown if part in text] == []
    assert "| pydocs | 6.14K | 100% |" in text and "| AdamW lr | 0.003 |" in text  # the checkpoint knows them

    checkpoint["train"] = dict(model="tinymemory")
    runfolder.save_checkpoint(tmp_path / "best.pt", checkpoint)
    export.main([f"--ckpt={tmp_path / 'best.pt'}", f"--out={tmp_path / 'less'}"])
    less = (tmp_path / "less/README.md").read_text()
    assert [part for part in [*unknown, "AdamW lr", "| pydocs |", "rows of"] if part in less] == []
    assert "| Tokens trained on | 6,144 |" in less and "| Layers | 2 |" in less


def test_the_data_table_has_shares_licences_and_revisions(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = run.read_checkpoint(trained / "best.pt")
    checkpoint["loader"] = dict(fingerprint=[["finemath", "a" * 64], ["mine", "b" * 64]], taken=[30, 10],
                                per_epoch=[60, 5])
    checkpoint["train"]["order"] = "sequential"
    runfolder.save_checkpoint(tmp_path / "best.pt", checkpoint)
    (tmp_path / "data/mix").mkdir(parents=True)
    origins = [dict(dataset="HuggingFaceTB/finemath", configs=["finemath-4plus"], filter=[["score", ">", 3]],
                    revision="0123456789abcdef"), dict(path="/home/me/mine.txt", files=1)]
    entries = [dict(name=name, language=language, kind="math", origin=origin,
                    train=dict(sha256=letter * 64, tokens=3840, documents=10))
               for name, language, origin, letter in zip(("finemath", "mine"), ("en", "it"), origins, "ab")]
    meta = dict(format=1, tokenizer_sha256="", sources=entries)
    (tmp_path / "data/mix/meta.json").write_text(json.dumps(meta))
    (tmp_path / "data/other").mkdir()
    (tmp_path / "data/other/meta.json").write_text('{"sources": ["of another program"]}')
    export.main(["--ckpt=best.pt", "--out=it"])
    text = Path("it/README.md").read_text()
    assert ("| [HuggingFaceTB/finemath](https://huggingface.co/datasets/HuggingFaceTB/finemath) (finemath-4plus, "
            "score > 3) | en/math | ODC-By | `0123456789ab` | 0.50 | 1.92K | 75% |") in text
    assert "| mine | it/math |  |  | 0.17 | 640 | 25% |" in text and "follow each other in this order" in text
    assert 'datasets: ["HuggingFaceTB/finemath"]' in text and "English and Italian" in text
    assert "/home/me" not in text


@functools.cache
def trained_release(trained):
    return contents.open_release(trained / "best.pt")


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
                    max_leaves=4)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_no_file_of_an_evaluation_breaks_the_card(trained, tmp_path_factory, data):
    """Whatever eval.json and the recommended parameters hold, a card is written, and no configuration that is none."""
    folder = tmp_path_factory.getbasetemp() / "odd"
    folder.mkdir(exist_ok=True)
    task = st.fixed_dictionaries({}, optional=dict(score=JSON, stderr=JSON, metric=JSON))
    tasks = JSON | st.dictionaries(st.just("blimp"), task)
    scores = st.fixed_dictionaries({}, optional=dict(tasks=tasks, protocol=JSON))
    decoding = st.fixed_dictionaries({}, optional=dict.fromkeys(contents.DECODING, JSON))
    (folder / "eval.json").write_text(json.dumps(data.draw(JSON | scores)))
    (folder / "recommended_decoding_params.json").write_text(json.dumps(data.draw(JSON | decoding)))
    release = dataclasses.replace(trained_release(trained), path=folder / "best.pt")
    text = card.model_card(release, {})
    assert text.startswith("---\n") and "## Usage" in text
    json.dumps(transformers_format.generation_config(release), allow_nan=False)
    assert gguf_format.modelfile(release, "it.gguf").startswith("FROM ./it.gguf\n")


# ---------------------------------------------------------------------------------------------------- the Hub

# export.py with several lists of flags, one after the other; a variable of the environment is set after the first one
SEVERAL = """
import json, os, sys
import export
from common import run_tool
sys.argv[0] = "export.py"
for flags in json.loads(sys.argv[1]):
    try:
        run_tool(lambda argv: export.main(flags))
    except SystemExit as end:
        print("status", end.code, flush=True)
    if len(sys.argv) > 2:
        os.environ[sys.argv[2]] = "something"
"""


def test_a_model_behind_terms_is_said_to_be_one(monkeypatch):
    from huggingface_hub.errors import GatedRepoError
    from release import hub

    def model_info(name, timeout):
        raise GatedRepoError.__new__(GatedRepoError)
    monkeypatch.setattr(hub, "connect", lambda: types.SimpleNamespace(model_info=model_info))
    with pytest.raises(UserError, match="org/model is on the Hub for those who accept its terms: .* hf auth login"):
        hub.fetch("org/model")


def test_a_new_release_removes_what_an_older_one_left_and_nobody_elses_files():
    from huggingface_hub.utils import filter_repo_objects
    from release import hub
    older = ["small-F16.gguf", "Modelfile", "step_100.pt", "eval.json", "metrics.jsonl", "decoding_report.md"]
    others = ["notes.md", "model.py", "images/loss.png", "README.md", ".gitattributes"]
    assert list(filter_repo_objects([*older, *others], allow_patterns=hub.OURS)) == older


def test_a_release_goes_up_to_the_hub_and_comes_down_again(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--ckpt={checkpoints['tinymemory']}", "--out=it"]
    jobs = [[*flags, "--push=me/small"], ["--out=it", "--push=me/small"], ["--import_from=me/small", "--out=back.pt"],
            ["--import_from=me/none", "--out=none.pt"]]
    with FakeHub(tmp_path / "hub", tmp_path / "models") as hub:
        env = hub.env(tmp_path / "home") | dict(HF_HUB_DISABLE_IMPLICIT_TOKEN="0")
        out, err = command("-c", SEVERAL, json.dumps(jobs), "HF_TOKEN", **env).communicate(timeout=100)
    assert re.findall(r"status (\d)", out) == ["2", "0", "0", "2"], err
    without_token, of_none = err.splitlines()
    assert "may write: hf auth login" in without_token and "no folder me/none here, and no public model" in of_none

    (repo, message, names), = hub.commits
    assert (repo, message) == ("me/small", "Release of me/small")
    assert names == sorted(path.name for path in Path("it").iterdir())
    for path in Path("it").iterdir():
        assert (tmp_path / "models/me/small" / path.name).read_bytes() == path.read_bytes()
    assert "model.safetensors" in out.split("status")[0]  # what is to go up was shown before the Hub refused it
    before, after = run.read_checkpoint(checkpoints["tinymemory"]), run.read_checkpoint("back.pt")
    assert all(torch.equal(after["model"][key], value) for key, value in before["model"].items())


# -------------------------------------------------------------------------------------------------- whole or not at all

# No file may become larger than 200 kB. With a second word, GGUF is the first file that is written
FULL = """
import resource, signal, sys
import export
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if len(sys.argv) > 2:
    export.transformers_format.write_folder = export.write_checkpoint = lambda *args: {}
"""


@pytest.mark.parametrize("flags", ([[], ["--bin"]], [["--gguf"]]), ids=("weights", "gguf"))
def test_a_full_disk_leaves_nothing_and_says_so_in_a_line(flags, with_bpe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [[f"--ckpt={with_bpe['gpt2preln']}", "--out=it", *more] for more in flags]
    words = ["gguf first"] if ["--gguf"] in flags else []
    out, err = command("-c", FULL + SEVERAL, json.dumps(jobs), *words).communicate(timeout=100)
    assert out.split() == ["status", "2"] * len(jobs)
    assert [("no space left on the disk" in line) for line in err.splitlines()] == [True] * len(jobs), err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder_and_does_not_hinder_the_next(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killing = "import os, signal, export\nexport.card.model_card = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
    process = command("-c", killing + SEVERAL, json.dumps([[f"--ckpt={checkpoints['ivme']}", "--out=it"]]))
    process.communicate(timeout=100)
    assert process.returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".it.lock", ".it.part"]
    export.main([f"--ckpt={checkpoints['ivme']}", "--out=it"])
    assert [path.name for path in tmp_path.iterdir()] == ["it"] and (tmp_path / "it/README.md").exists()


# ---------------------------------------------------------------------------------------------------- mistakes

def edit_config(**changes):
    """A function that changes the config.json of a release."""
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def edit_weights(change):
    """A function that changes the weights of a release."""
    def edit(folder):
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
    return edit


def other_tokens(folder):
    text = (folder / "tokenizer.json").read_text().replace("<|eos|>", "<|fin|>")
    (folder / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    edit_config(eos_token_id=None)(folder)


IMPORTS = {
    # what is wrong: (release, what spoils it, what the line must say)
    "another architecture": ("ivme", edit_config(model_type="mistral"), "model_type 'mistral'; gpt2, llama, qwen3, i3"),
    "a size that is missing": (
        "ivme", lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "says no num_attention_heads"),
    "no configuration": ("ivme", lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "attention biases": ("ivme", edit_config(attention_bias=True), "attention_bias=True, and ivme.py has no place"),
    "rope scaling": (
        "ivme", edit_config(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), r"rope scaling \(yarn\)"),
    "rope scaling of version 4": (
        "ivme", edit_config(rope_parameters=None, rope_scaling=dict(type="linear", factor=2)),
        r"rope scaling \(linear\)"),
    "another activation": ("ivme", edit_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "wide heads": ("ivme", edit_config(head_dim=64), "head_dim=64"),
    "a sliding window": (
        "tinymemory", edit_config(use_sliding_window=True), "use_sliding_window=True, and tinymemory.py"),
    "shared heads": ("tinymemory", edit_config(num_key_value_heads=2), "num_key_value_heads=2, and tinymemory.py"),
    "another GELU": ("gpt2preln", edit_config(activation_function="relu"), "activation_function='relu'"),
    "another shape": (
        "gpt2preln", edit_config(n_positions=95), r"do not fit its config.json: position.weight is \(96, 48\)"),
    "an output head of its own": (
        "ivme", edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        "output head of its own, and ivme.py has no place"),
    "a bias that the configuration hides": (
        "ivme", edit_weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
        "has the weight model.layers.0.self_attn.q_proj.bias, and ivme.py has no place"),
    "a weight that is missing": ("tinymemory", edit_weights(lambda w: w.pop("model.norm.weight")), "model.norm.weight"),
    "a foreign weight": (
        "i3", edit_weights(lambda w: w.update({"model.extra": torch.zeros(1)})),
        r"extra is \(1,\), and should be absent"),
    "no weights": ("ivme", lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "damaged weights": ("ivme", lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 99), "are damaged"),
    "no tokenizer": ("ivme", lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a damaged tokenizer": ("ivme", lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    "no end of a document": ("ivme", other_tokens, "names no token that ends a document"),
    "a vocabulary that is too small": ("ivme", edit_config(vocab_size=399), "400 tokens, its model 399|do not fit"),
}


def one_line(argv, capsys, monkeypatch):
    """What export.py says on standard error of a mistake: one line, with exit status 2."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, argv)])
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as end:
        run_tool(export.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("export.py: "), err
    return err


@pytest.mark.parametrize("what", IMPORTS)
def test_what_cannot_be_imported_is_named_in_one_line(what, releases, tmp_path, capsys, monkeypatch):
    name, spoil, line = IMPORTS[what]
    folder = tmp_path / "it"
    shutil.copytree(releases[name], folder)
    spoil(folder)
    assert re.search(line, one_line([f"--import_from={folder}", f"--out={tmp_path}/it.pt"], capsys, monkeypatch))
    assert not (tmp_path / "it.pt").exists()


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(name=st.sampled_from(["ivme", "tinymemory", "gpt2preln", "i3"]), data=st.data())
def test_a_configuration_with_any_value_is_imported_or_refused(name, data, releases, tmp_path_factory):
    folder, out = tmp_path_factory.getbasetemp() / f"any-{name}", tmp_path_factory.getbasetemp() / "any.pt"
    if not folder.exists():
        shutil.copytree(releases[name], folder)
    config = json.loads((releases[name] / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    (folder / "config.json").write_text(json.dumps(config | {key: data.draw(JSON)}))
    out.unlink(missing_ok=True)
    try:
        importing.import_model(str(folder), out)
    except UserError as e:
        assert str(folder) in str(e) and not out.exists()
    else:
        run.load_checkpoint(out)


def edit_checkpoint(**changes):
    def edit(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)
    return edit


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


MISTAKES = {
    # what is wrong: (release, flags, what spoils the checkpoint, what the line must say)
    "no checkpoint": ("ivme", ["--ckpt="], None, "give --ckpt=CHECKPOINT"),
    "a checkpoint that is not there": ("ivme", ["--ckpt=none.pt"], None, "no checkpoint none.pt"),
    "a damaged checkpoint": ("ivme", [], cut, "damaged or not a checkpoint"),
    "a foreign checkpoint": ("ivme", [], lambda path: torch.save(dict(model={}), path), "it lacks format"),
    "a newer checkpoint": ("ivme", [], edit_checkpoint(format=2), "its format is 2, not 1"),
    "a changed architecture": ("ivme", [], edit_checkpoint(cfg=dict(n_experts=2)), "does not fit ivme.py as it is now"),
    "a folder that is there": ("ivme", ["--out=there"], None, "there is there already: delete it, or give another"),
    "averaged weights that were not kept": ("ivme", ["--ema"], None, "holds no EMA weights"),
    "no such type": ("ivme", ["--dtype=int8"], None, "--dtype=int8 is not one of float32, float16, bfloat16"),
    "no such GGUF type": ("ivme", ["--gguf", "--gguf_type=Q4"], None, "--gguf_type=Q4 is not one of F32"),
    "a GGUF type without GGUF": ("ivme", ["--gguf_type=F32"], None, "--gguf_type belongs to --gguf"),
    "GGUF of words": ("tinymemory", ["--gguf"], None, "--gguf needs a byte-level BPE with GPT-2's words"),
    "GGUF of an i3": ("i3", ["--gguf"], None, "llama.cpp has no i3"),
    "names of no card": ("i3", ["--card_names"], None, r"pytorch_model.bin \(--bin\)"),
    "no name on the Hub": ("ivme", ["--push=small"], None, "--push=small is not USER/NAME"),
    "a bad name on the Hub": ("ivme", ["--push=me/my model"], None, "--push=me/my model is not USER/NAME, of letters"),
    "a bundle that is not there": ("ivme", ["--bundle=none"], None, "--bundle=none is no folder"),
    "a bundle of something else": ("ivme", ["--bundle=."], None, "--bundle=. is no evaluation of these weights"),
    "uploading what is no release": (
        "ivme", ["--ckpt=", "--out=there", "--push=me/it"], None, "there is not a release"),
    "importing into no file": (
        "ivme", ["--ckpt=", "--import_from=there"], None, "needs --out=CHECKPOINT, a file that ends in .pt"),
    "importing and exporting": (
        "ivme", ["--import_from=there", "--out=it.pt"], None, "--ckpt does not go with --import_from"),
    "importing what is nowhere": ("ivme", None, None, "there is no folder no/where/at all"),
    "no such flag": ("ivme", ["--gguff"], None, r"no flag --gguff \(did you mean gguf"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(what, checkpoints, tmp_path, capsys, monkeypatch):
    name, flags, spoil, line = MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoints[name], "best.pt")
    Path("there").mkdir()
    if spoil:
        spoil(tmp_path / "best.pt")
    if flags is None:
        argv = ["--import_from=no/where/at all", "--out=it.pt"]
    elif any(flag.startswith("--ckpt=") for flag in flags):
        argv = [flag for flag in flags if flag != "--ckpt="]
    else:
        argv = ["--ckpt=best.pt", *flags]
    assert re.search(line, one_line(argv, capsys, monkeypatch))
    assert sorted(map(str, Path(".").rglob("*"))) == ["best.pt", "there"]


@pytest.mark.parametrize("package, flags", (("safetensors", []), ("gguf", ["--gguf"])))
def test_a_missing_package_is_named_with_what_installs_it(package, flags, with_bpe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    err = one_line([f"--ckpt={with_bpe['ivme']}", f"--out={tmp_path / 'it'}", *flags], capsys, monkeypatch)
    assert f"package {package}: pip install -r requirements-dev.txt" in err and not list(tmp_path.iterdir())


def test_the_tools_that_do_not_export_need_no_package_of_a_release():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert not line.startswith(("transformers", "gguf", "safetensors", "xllamacpp"))
    code = "import sys, export; print({'transformers', 'gguf', 'safetensors', 'xllamacpp'} & sys.modules.keys())"
    assert finish(command("-c", code)).strip() == "set()"
