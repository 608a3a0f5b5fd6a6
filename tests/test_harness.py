"""evaluation/harness.py and likelihood.py: every item's likelihood is that of lm-evaluation-harness's own `hf` model;
what arithmetic says of models that know nothing or everything; local data and mistakes."""
import json
import logging
import math
import random
import re
import sys

import numpy as np
import pytest
import torch

from architectures import ARCHITECTURES, tiny
from common import Progress, UserError
from conftest import CPU, command, finish
from corpus.tokenizer import bos_eos, load_tokenizer, train_bpe, train_hybrid
from evaluation import harness, likelihood
from made_up import made_up_text

RNG = random.Random(0)
TEXTS = [made_up_text("en", kind, RNG) for kind in ("wiki", "web") for _ in range(60)]
TOKENIZER = load_tokenizer(train_bpe(TEXTS, 340).to_str())
BOS, EOS = bos_eos(TOKENIZER)
CONTEXT = 24  # of the small models: most texts are longer


def model_of(name, **overrides):
    return tiny(name, vocab_size=TOKENIZER.get_vocab_size(), context_length=CONTEXT, **overrides).eval()


def adapted(name, **given):
    return harness.harness_model(model_of(name), TOKENIZER, CPU, **given)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module", autouse=True)
def harness_is_here():
    pytest.importorskip("lm_eval")


# ---------------------------------------------------------------------------------------------------- made-up tasks

def sentences(n):
    """Pairs of sentences that differ in a word or so, as BLiMP's do."""
    rng = random.Random(1)
    pairs = []
    for _ in range(n):
        words = made_up_text("en", "web", rng).split()[:rng.randint(3, 9)]
        other = list(words)
        other[rng.randrange(len(other))] = rng.choice(["house", "sees", "at", "Zz!"])
        pairs.append((" ".join(words) + ".", " ".join(other) + "."))
    return pairs


def questions(n):
    rng = random.Random(2)
    rows = []
    for i in range(n):
        count = rng.choice([3, 4, 4, 5])
        labels = list("ABCDE"[:count]) if i % 2 else list("12345"[:count])
        texts = [" ".join(made_up_text("en", "web", rng).split()[:rng.randint(1, 7)]) for _ in range(count)]
        rows.append(dict(id=str(i), question=made_up_text("en", "wiki", rng)[:rng.randint(20, 160)],
                         choices=dict(text=texts, label=labels), answerKey=rng.choice(labels)))
    return rows


def write_tasks(folder):
    """The data of all three benchmarks in small, as --tasks_dir has it."""
    for name in ("blimp", "arc_easy", "wikitext"):
        (folder / name).mkdir()
    for i, name in enumerate(["wh_island", "npi_present_1"]):
        rows = [dict(sentence_good=a, sentence_bad=b) for a, b in sentences(40)[20 * i:20 * (i + 1)]]
        (folder / f"blimp/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = questions(25)
    (folder / "arc_easy/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = "".join(f" \n = Page {i} = \n \n {' '.join(TEXTS[5 * i:5 * i + 1 + i])} \n \n = = Part = = \n {TEXTS[i]} \n"
                    for i in range(4))
    (folder / "wikitext/wiki.test.raw").write_text(found)
    return folder


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """Read only."""
    return str(write_tasks(tmp_path_factory.mktemp("tasks")))


# ---------------------------------------------------------------------------------------------------- the same as hf

def theirs(model, reference):
    """The harness's own model of the same weights and the same tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")
    return HFLM(pretrained=reference(model), tokenizer=tokenizer, batch_size=8, max_length=CONTEXT, device="cpu",
                add_bos_token=False)


@pytest.mark.parametrize("name", ["ivme", *(pytest.param(name, marks=pytest.mark.slow)
                                           for name in ("tinymemory", "gpt2preln"))])
def test_every_item_and_every_score_is_that_of_the_harness_itself(name, tasks_dir, monkeypatch):
    """Rolling text beyond the context, pairs of sentences, questions that lose their beginning, generated text."""
    ours = adapted(name, batch_tokens=200)
    hf = theirs(ours.model, ARCHITECTURES[name].reference)
    likelihoods = {}

    def kept(lm, kind):
        answer = getattr(lm, kind)

        def answered(requests, *args, **given):
            likelihoods[lm, kind] = answer(requests, *args, **given)
            return likelihoods[lm, kind]
        monkeypatch.setattr(lm, kind, answered)

    results = {}
    hf.scorer, hf.encoder, hf.on = ours.scorer, TOKENIZER, CPU  # what run_tasks takes from ours
    for lm in (ours, hf):
        kept(lm, "loglikelihood")
        kept(lm, "loglikelihood_rolling")
        results[lm] = harness.run_tasks(lm, ["wikitext", "blimp", "arc_easy"], tasks_dir=tasks_dir)
    assert results[ours]["protocol"] == results[hf]["protocol"]

    # each item
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        a, b = likelihoods[ours, kind], likelihoods[hf, kind]
        if kind == "loglikelihood":
            assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
            a, b = [x for x, _ in a], [x for x, _ in b]
            assert len(a) == 2 * 40 + sum(len(row["choices"]["text"]) for row in questions(25))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)
        assert np.std(a) > 5

    # each score
    for task, score in results[ours]["tasks"].items():
        for mine, other in zip([score, *score["others"].values()],
                               [results[hf]["tasks"][task], *results[hf]["tasks"][task]["others"].values()]):
            tolerance = 0 if mine["metric"].startswith("acc") else 1e-5
            assert mine["score"] == pytest.approx(other["score"], rel=tolerance)
            assert mine["stderr"] == other["stderr"] and mine["chance"] == other["chance"]

    # generated text: greedy, from contexts of all lengths, until a text or the end of what was asked for
    asked = [(text[:9 * i], dict(until=["e ", "zz"], max_gen_toks=12)) for i, text in enumerate(TEXTS[:20], 1)]
    texts = ours.generate_until(instances("generate_until", *asked))
    assert texts == hf.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert len(set(texts)) > 10


def plain(model, tokens, n):
    """The likelihood of the last n tokens, a row and a position at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), all_logits=True)[0][0].double()
    logprobs = logits.log_softmax(-1)
    positions = range(len(tokens) - 1 - n, len(tokens) - 1)
    return (sum(float(logprobs[t, tokens[t + 1]]) for t in positions),
            all(int(logits[t].argmax()) == tokens[t + 1] for t in positions))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
def test_a_row_has_the_same_likelihood_however_it_is_computed(name, batch_tokens):
    """Alone or in a batch, padded, with a shared beginning that is read once, in pieces of any size."""
    rng, model = random.Random(3), model_of(name)
    V, rows = model.cfg.vocab_size, []
    for _ in range(4):  # a question and its answers; the last one is the question's best continuation
        question = [rng.randrange(V) for _ in range(rng.randint(17, 20))]
        best = model.generate(torch.tensor([question]), 3, temperature=0)[0].tolist()
        for n in (1, 2, 2, 4):
            rows.append((tuple(question + [rng.randrange(V) for _ in range(n)]), n))
        rows += [(tuple(best), 3), (tuple(best), 8)]
    for n in (2, 3, 9, 25):  # texts that are scored as a whole, and alike ones
        row = [BOS, *(rng.randrange(V) for _ in range(n - 1))]
        rows += [(tuple(row), n - 1), (tuple(row[:-1] + [5]), n - 1)]
    rows.append(rows[0])

    found = likelihood.Scorer(model, CPU, batch_tokens).score(rows)
    expected = [plain(model, *row) for row in rows]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert 4 <= sum(greedy for _, greedy in found) < len(rows)


def test_rows_of_one_question_are_a_group_and_nothing_is_lost():
    question, other = tuple(range(30)), tuple(range(50, 80))
    rows = [(question + (i, i), 2) for i in range(100, 104)] + [(other + (i,), 1) for i in range(3)]
    rows += [((9, 8, 7), 2), ((9, 8), 1), (question[:20] + (200,) * 40, 40)]
    groups = likelihood.in_groups(rows)
    assert sorted(row for group in groups for row in group.rows) == sorted(rows)
    shared = {len(group.rows): group.shared for group in groups if group.shared}
    assert shared == {4: 24, 3: 24}  # 29 tokens come before the first difference; a multiple of 8 of them is shared
    for group in groups:
        assert len({tokens[:group.shared + 1] for tokens, _ in group.rows}) == 1


def test_equal_logits_are_no_guess_of_the_later_token():
    """As torch's argmax in the harness's own model: of several largest logits the first is the model's choice."""
    scorer = likelihood.Scorer(model_of("ivme"), CPU)
    logits = torch.tensor([[[1.0, 5.0, 5.0, 0.0]] * 3])
    logprobs, greedy = scorer.compare(logits, torch.tensor([[1, 2, 3]]))
    assert greedy.tolist() == [[True, False, False]]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, [0, 1, 2], [1, 2, 3]][None])


def test_a_device_that_runs_out_of_memory_gets_less_at_once(monkeypatch):
    rows = [(tuple(TOKENIZER.encode(text).ids[:12]), 5) for text in TEXTS]
    scorer = likelihood.Scorer(model_of("ivme"), CPU, batch_tokens=4096)
    expected, compute = scorer.score(rows), scorer.score_together

    def small_device(batch):
        if sum(len(group.rows) for group in batch) > room:
            raise torch.OutOfMemoryError
        return compute(batch)
    monkeypatch.setattr(scorer, "score_together", small_device)
    room = 7
    found = scorer.score(rows)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=1e-3)
    assert scorer.batch_tokens == 64  # 5 rows of 11 tokens; with 128 they would be 11 rows
    room = 0
    with pytest.raises(UserError, match="too little memory"):
        scorer.score(rows)


# ---------------------------------------------------------------------------------------------------- arithmetic

class Table(torch.nn.Module):
    """A model whose logits depend on the last token alone: row i of `logits` (V, V) follows token i."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.max_len = torch.nn.Parameter(logits), CONTEXT
        self.cfg = ARCHITECTURES["ivme"].module.Config(vocab_size=len(logits), context_length=CONTEXT)
        self.n_params = logits.numel()

    def init_cache(self, *sizes):
        return []

    def forward(self, idx, cache=None, all_logits=False):
        return self.logits[idx if all_logits else idx[:, -1:]], None


BYTES = load_tokenizer(train_hybrid([], 263).to_str())  # special tokens and the 256 bytes


def byte_model(logits):
    logits[:, :7] = -math.inf  # the special tokens are never said
    return harness.harness_model(Table(logits), BYTES, CPU)


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_uniform_bytes_score_256_and_the_good_sentence_wins_ties(tmp_path):
    # nothing here that the harness would change before it is scored, so that bytes and tokens are as many
    write_rows(tmp_path / "wikitext/test.jsonl", [dict(page="Il caffè è caldo\n" * 9), dict(page="so")])
    write_rows(tmp_path / "blimp/wh_island.jsonl", [
        dict(sentence_good="ab cd", sentence_bad="cd ab"),  # a tie
        dict(sentence_good="ab", sentence_bad="abc"),  # the shorter one wins
        dict(sentence_good="abè", sentence_bad="abc"),  # è is two bytes
        dict(sentence_good="abcd", sentence_bad="abc")])
    write_rows(tmp_path / "blimp/npi_present_1.jsonl", [dict(sentence_good="a", sentence_bad="b")])
    result = harness.run_tasks(byte_model(torch.zeros(263, 263)), ["wikitext", "blimp"], tasks_dir=str(tmp_path))
    text, pairs = result["tasks"]["wikitext"], result["tasks"]["blimp"]
    assert text["metric"] == "byte_perplexity" and text["score"] == pytest.approx(256.0, abs=1e-3)
    assert text["others"]["bits_per_byte"]["score"] == pytest.approx(8.0, abs=1e-5)
    assert pairs["score"] == pairs["uniform_bytes"] == 75.0  # the mean of 50 and 100, though the first has more pairs
    assert pairs["chance"] == 50.0 and pairs["n"] == 5
    assert pairs["subtasks"] == dict(blimp_npi_present_1=100.0, blimp_wh_island=50.0)


def test_an_oracle_scores_1_and_100_percent(tmp_path):
    """It knows that the letters come in the order of the alphabet, after a space, and a space after the beginning."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    logits = torch.full((263, 263), -1e4)
    logits[:, BYTES.token_to_id("Ġ")] = 0.0
    for a, b in zip("Ġ" + letters, letters + "a"):
        logits[BYTES.token_to_id(a)] = -1e4
        logits[BYTES.token_to_id(a), BYTES.token_to_id(b)] = 0.0

    write_rows(tmp_path / "wikitext/test.jsonl", [dict(page=" " + letters * 4), dict(page=" abc")])
    write_rows(tmp_path / "blimp/wh_island.jsonl", [dict(sentence_good="abcde", sentence_bad="abdce")])
    write_rows(tmp_path / "arc_easy/test.jsonl", [
        dict(question="what", choices=dict(text=["abd", "b", "abc", "abca"], label=list("ABCD")), answerKey="C"),
        dict(question="who", choices=dict(text=["ab", "ac"], label=list("12")), answerKey="1")])
    result = harness.run_tasks(byte_model(logits), ["wikitext", "blimp", "arc_easy"], tasks_dir=str(tmp_path))
    scores = {name: score["score"] for name, score in result["tasks"].items()}
    assert scores == dict(wikitext=pytest.approx(1.0), blimp=100.0, arc_easy=100.0)

    # what the others would get, counted by hand: " b" and " ab" are the shortest answers; acc_norm divides by the
    # answer's characters, so that a byte more for the space weighs least in the longest answer
    questions = result["tasks"]["arc_easy"]
    assert questions["split"] == "test" and questions["metric"] == "acc_norm"
    assert questions["chance"] == pytest.approx(100 * (1 / 4 + 1 / 2) / 2)
    assert questions["others"]["acc"]["uniform_bytes"] == 50.0 and questions["uniform_bytes"] == 50.0


# ---------------------------------------------------------------------------------------------------- as a guest

def test_a_run_leaves_no_trace_and_says_the_same_every_time(tasks_dir, capfd, caplog):
    lm = adapted("ivme")
    lm.model.train()
    torch.manual_seed(4), np.random.seed(4), random.seed(4)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    names = ["arc_easy", "blimp", "wikitext", "arc_easy"]
    first = harness.run_tasks(lm, names, limit=7, tasks_dir=tasks_dir)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert lm.model.training and logging.root.manager.disable == 0
    assert harness.run_tasks(lm, names, limit=7, tasks_dir=tasks_dir) == first
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert json.loads(json.dumps(first)) == first
    assert [score["n"] for score in first["tasks"].values()] == [7, 14, 4]


def test_progress_is_shown_although_the_harness_is_silent(tasks_dir, capsys):
    progress = Progress()
    progress.live = True
    harness.run_tasks(adapted("ivme", progress=progress), ["arc_easy"], tasks_dir=tasks_dir)
    shown = capsys.readouterr().out
    assert "loading arc_easy" in shown and shown.endswith("\r\x1b[K")


def test_the_table_says_what_was_scored_and_what_is_known_of_others(tasks_dir):
    result = harness.run_tasks(adapted("ivme"), ["wikitext", "blimp", "arc_easy"], tasks_dir=tasks_dir)
    lines = harness.table(result)
    text, _, _, pairs, questions, _, protocol = lines[1:]
    assert re.search(r"wikitext +byte_perplexity +\d+\.\d\d +2\.96 +256\.00 +4 documents, test split", text)
    number = r" +\d+\.\d\d"
    assert re.search(rf"blimp +acc %{number}{number} +61\.40 +50\.00{number} +2 of 67 subtasks, 40 pairs", pairs)
    assert re.search(r"arc_easy +acc_norm % .* 30\.85 .* 25 documents, validation split", questions)
    assert protocol == (f"lm-evaluation-harness {result['protocol']['harness']}, data: {tasks_dir}; float32, "
                        "windows of 24 tokens, stride 24, prefix <|bos|>")

    header, rule, row = harness.leaderboard_row(result, "mine", 22_028_160, 1_517_000_000, 0.2512)
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| mine | 22.0M | 1.5B | ") and row.endswith(" | 0.251 |") and row.count(" ± ") == 2


# ---------------------------------------------------------------------------------------------------- the data

def test_wikitext_is_cut_at_the_headings_of_pages():
    """And no byte is lost but the line ends between the pages and the empty line before the first."""
    text = " \n = One = \n \n a \n = = Part = = \n b \n = = = Small = = = \n = x \n \n = Two and = = three = \n c \n"
    found = harness.pages(text)
    assert [page.split("\n")[0] for page in found] == [" = One = ", " = Two and = = three = "]
    assert sum(map(len, found)) + 1 + 2 == len(text)


def own_task(folder, name, **settings):
    """A task of one's own, as the harness describes them: questions to which the answer is generated."""
    path = folder / f"{name}_data.jsonl"
    path.write_text("".join(json.dumps(dict(q=text, a="e")) + "\n" for text in TEXTS[:3]))
    config = dict(
        task=name, dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(path)), cache_dir=str(folder / "c")),
        output_type="generate_until", test_split="test", doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs=dict(until=[" "], max_gen_toks=5), metric_list=[dict(metric="exact_match")])
    (folder / f"{name}.yaml").write_text(json.dumps(config | settings))  # YAML reads JSON


def test_a_task_of_ones_own_generates_text(tmp_path):
    own_task(tmp_path, "mine")
    score = harness.run_tasks(adapted("ivme"), ["mine"], tasks_dir=str(tmp_path))["tasks"]["mine"]
    assert score["metric"] == "exact_match" and score["score"] == 0.0 and score["n"] == 3 and score["chance"] is None


def test_what_is_generated_follows_the_task():
    lm, texts = adapted("ivme"), TEXTS[:6]

    def said(**settings):
        return lm.generate_until(instances("generate_until", *[(text, dict(settings)) for text in texts]))
    greedy = said(max_gen_toks=10)
    assert [len(TOKENIZER.encode(text).ids) for text in greedy] != [0] * 6
    assert said(max_gen_toks=10, do_sample=False, temperature=0.7) == greedy
    sampled = said(max_gen_toks=10, do_sample=True, temperature=5.0)
    assert sampled != greedy and said(max_gen_toks=10, temperature=5.0) == sampled  # the same every time
    assert said(max_gen_toks=10, temperature=5.0, top_k=1) == greedy
    for text, cut in zip(greedy, said(max_gen_toks=10, until=["e", "a"])):
        assert cut == re.split("[ea]", text)[0]
    for settings, line in ((dict(num_beams=4), "several beams"), (dict(typical_p=0.5), "generates with typical_p"),
                           (dict(max_gen_toks=24), "leaves no room")):
        with pytest.raises(UserError, match=line):
            said(**settings)


# ---------------------------------------------------------------------------------------------------- mistakes

def mistake(names, tasks_dir, lm=None):
    with pytest.raises(UserError) as error:
        harness.run_tasks(lm or adapted("ivme"), names, tasks_dir=str(tasks_dir))
    return str(error.value)


def test_what_is_wrong_with_the_data_is_one_line(tmp_path):
    assert mistake(["blimp"], tmp_path / "none").endswith("none is not a folder")
    for name, file in (("blimp", "blimp/SUBTASK.jsonl"), ("blimp_wh_island", "blimp/wh_island.jsonl"),
                       ("arc_easy", "arc_easy/test.jsonl or validation.jsonl"),
                       ("wikitext", "wikitext/test.txt or valid.txt")):
        expected = f"--tasks_dir={tmp_path} has no data for {name}: it would be {tmp_path}/{file}"
        assert mistake([name], tmp_path) == expected
    (tmp_path / "blimp").mkdir()
    path = tmp_path / "blimp/wh_iland.jsonl"
    path.write_text('{"sentence": "a"}\n')
    assert mistake(["blimp"], tmp_path).startswith(f"{path} is no subtask of BLiMP (did you mean blimp_wh_island or ")
    path = path.rename(tmp_path / "blimp/wh_island.jsonl")
    assert re.fullmatch(r"the task blimp_wh_island cannot be loaded \(.*\); are the rows of its file as on the Hub\?",
                        mistake(["blimp_wh_island"], tmp_path))
    path.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence')
    assert mistake(["blimp"], tmp_path) == f"{path}, line 2: not JSON"
    path.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n\n{"sentence_good": "a"}\n')
    assert mistake(["blimp"], tmp_path) == f"{path}, line 3 lacks sentence_bad, which the others have"
    path.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n[1]\n')
    assert mistake(["blimp"], tmp_path) == f"{path}, line 2 lacks its fields, which the others have"
    path.write_bytes(b"\xff\xfe")
    assert mistake(["blimp"], tmp_path) == f"{path} is not UTF-8 text"
    path.write_bytes(b"")
    assert mistake(["blimp"], tmp_path) == f"{path} is empty"


def test_a_row_that_the_task_cannot_use_is_one_line(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    choices = dict(text=["a", "b"], label=["A", "B"])
    rows = [dict(id="1", question="?", choices=choices, answerKey=key) for key in ("A", "Z")]
    (tmp_path / "arc_easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert re.fullmatch(r"a row of the local files in .* is not as the task needs it \(ValueError: .*\)",
                        mistake(["arc_easy"], tmp_path))


def test_rows_are_lines_whatever_else_ends_a_line_elsewhere(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\x85three"
    path.write_text("\ufeff" + json.dumps(dict(a=text), ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert harness.read_rows(path) == [dict(a=text)]


def test_a_task_that_is_not_possible_is_one_line(tasks_dir, tmp_path):
    assert mistake(["blimp_wh_iland"], "").startswith(
        "lm-evaluation-harness has no task 'blimp_wh_iland' (did you mean blimp_wh_island or ")
    assert "asked for twice" in mistake(["blimp", "blimp_wh_island"], tasks_dir)
    own_task(tmp_path, "pictures", doc_to_image="{{q}}")
    own_task(tmp_path, "programs", unsafe_code=True)
    own_task(tmp_path, "beams", generation_kwargs=dict(until=["."], num_beams=3))
    own_task(tmp_path, "foreign", doc_to_text="{{nothing}}")
    assert mistake(["pictures"], tmp_path) == \
        "the task pictures shows pictures or sounds; these models read text alone"
    assert mistake(["programs"], tmp_path).startswith("the task programs runs the code that a model writes")
    assert "several beams" in mistake(["beams"], tmp_path)
    assert mistake(["foreign"], tmp_path).startswith("the task foreign cannot be loaded (UndefinedError: ")
    lm = adapted("ivme", window=3)
    assert "the model reads 3" in mistake(["arc_easy"], tasks_dir, lm)


def test_no_network_names_the_flag_that_needs_none(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = mistake(["arc_easy"], "")
    assert line.startswith("the data of arc_easy cannot be read from the Hugging Face Hub (ConnectionError: ")
    assert line.endswith("; --tasks_dir=DIR reads local files")


def test_a_window_beyond_the_context_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="a window of 25 tokens is longer than the model's context of 24"):
        adapted("ivme", window=25)
    harness.adapter.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"benchmarks need the package lm_eval: pip install lm_eval==0\.4\.13"):
        adapted("ivme")


@pytest.mark.slow  # the harness's command line takes a quarter of a minute to look through its tasks
def test_the_harness_itself_scores_a_checkpoint(trained, tasks_dir, tmp_path):
    own_task(tmp_path, "mine")
    out = finish(command("-m", "evaluation.harness", "--model", "checkpoint", "--model_args",
                         f"ckpt={trained}/best.pt,dtype=float32", "--tasks", "mine", "--include_path", tmp_path,
                         "--output_path", tmp_path / "scores", "--device", "cpu", fresh=True))
    assert re.search(r"\|mine *\|.*exact_match", out)
    (path,) = (tmp_path / "scores").glob("**/results*.json")
    config = json.loads(path.read_text())["config"]
    assert config["window"] == 64 and config["prefix_token"] == "<|bos|>"  # the rows that it was trained on


@pytest.mark.slow
def test_an_unknown_task_is_one_line():
    assert mistake(["arc_esy"], "") == \
        "lm-evaluation-harness has no task 'arc_esy' (did you mean arc_easy or arc_es or arc_eu_easy?)"
