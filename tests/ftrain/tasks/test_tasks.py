"""Every task: equal to its definition written with plain loops, and on a mesh equal to one device.

T tokens of a batch.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import ftrain
from ftrain.bridge.batches import LANGUAGE
from ftrain.bridge.native import NativeDecoder
from ftrain.kernels.documents import Documents, join_documents
from ftrain.modules import decoder
from ftrain.modules.model import Model
from ftrain.modules.packs import join_packs
from ftrain.modules.spec import map_with_paths
from ftrain.sharding import Mesh, Plan
from ftrain.tasks import Classify, Dpo, Embed, Kd, Kto, NextToken, Reward
from ftrain.tree import leaves

CFG = decoder.preset("llama-tiny")
MADE = NativeDecoder(CFG)
MODEL = Model(
    "tiny", decoder.specs(CFG), LANGUAGE, MADE.loss, token_losses=MADE.token_losses, logits=MADE.logits,
    hidden=MADE.hidden,
)  # fmt: skip
T, LENGTHS = 24, (5, 7, 4, 6)
SIDES, JUDGED = (1, -1, 1, -1), (1, 2, -1, 2)
MESHES = {"shard": {"shard": 2}, "replicate": {"replicate": 2}}


def params(seed):
    made = ftrain.init(MODEL.specs, ftrain.key(seed))
    return map_with_paths(lambda _, p: p.double(), made)


def pack(seed):
    """Four documents and padding: each begins with two tokens of a prompt, which have no label."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, CFG.vocab, (T,), generator=random)
    lengths = torch.tensor([*LENGTHS, T - sum(LENGTHS)])
    segments = torch.arange(5).repeat_interleave(lengths) + 10 * seed
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    labels = decoder.next_token_labels(tokens, segments)
    labels[(positions < 1) | (segments == 4 + 10 * seed)] = -100
    spread = lambda values: torch.tensor([*values, 0]).repeat_interleave(lengths)  # noqa: E731
    return {
        "tokens": tokens, "labels": labels, "positions": positions, "segments": segments, "side": spread(SIDES),
        "judged": spread(JUDGED), "weights": torch.rand(T, generator=random, dtype=torch.float64),
    }  # fmt: skip


BATCH = join_packs([pack(0), pack(1)])
TEXTS = {name: BATCH[name] for name in LANGUAGE}
OWN = {"weights": ("weights",), "dpo": ("side",), "ipo": ("side",), "hinge": ("side",), "kto": ("judged",)}
POLICY, REFERENCE = params(0), params(1)
TASKS = {
    "tokens": (NextToken(), {}),
    "documents": (NextToken(average="documents"), {}),
    "weights": (NextToken(weighted=True), {}),
    "dpo": (Dpo(), {"reference": REFERENCE}),
    "dpo-smooth": (Dpo(beta=0.5, label_smoothing=0.2, sft=0.3), {"reference": REFERENCE}),
    "ipo": (Dpo(kind="ipo"), {"reference": REFERENCE}),
    "hinge": (Dpo(kind="hinge"), {"reference": REFERENCE}),
    "kto": (Kto(good=1.5), {"reference": REFERENCE}),
    "kd": (Kd(), {"reference": REFERENCE}),
    "kd-reverse": (Kd(kind="reverse", temperature=2.0, labels=0.5), {"reference": REFERENCE}),
    "kd-jsd": (Kd(kind="jsd", mix=0.3), {"reference": REFERENCE}),
    "kd-top": (Kd(top_k=8), {"reference": REFERENCE}),
}


def batch_of(name):
    """What the model reads, and the leaf of the task."""
    return {**TEXTS, **{leaf: BATCH[leaf] for leaf in OWN.get(name.removesuffix("-smooth"), ())}}


def document_sums(params):
    """The log probability of the labels of each document of `BATCH`, and their number, from plain log softmax."""
    logp = torch.log_softmax(MODEL.logits(params, TEXTS), -1)
    found = {}
    for place, (document, label) in enumerate(zip(BATCH["segments"].tolist(), BATCH["labels"].tolist(), strict=True)):
        total, count = found.get(document, (0.0, 0))
        found[document] = (total + (logp[place, label] if label != -100 else 0.0), count + (label != -100))
    return found


def by_loops(name):
    """The loss of a task, document by document."""
    ours, theirs = document_sums(POLICY), document_sums(REFERENCE)
    ratio = {d: ours[d][0] - theirs[d][0] for d in ours}
    each = {d: ratio[d] / max(ours[d][1], 1) for d in ours}
    pairs = [(0, 1), (2, 3), (10, 11), (12, 13)]
    texts = [d for d in ours if ours[d][1]]
    count = sum(ours[d][1] for d in texts)
    spoken = -sum(ours[d][0] for d in texts) / count
    if name == "tokens":
        return spoken
    if name == "documents":
        return -sum(ours[d][0] / ours[d][1] for d in texts) / len(texts)
    if name == "dpo":
        return sum(-logsigmoid(0.1 * (ratio[a] - ratio[b])) for a, b in pairs) / 4
    if name == "dpo-smooth":
        margins = [0.5 * (ratio[a] - ratio[b]) for a, b in pairs]
        chosen = [a for a, _ in pairs]
        sft = -sum(ours[d][0] for d in chosen) / sum(ours[d][1] for d in chosen)
        return sum(-0.8 * logsigmoid(m) - 0.2 * logsigmoid(-m) for m in margins) / 4 + 0.3 * sft
    if name == "ipo":
        return sum((each[a] - each[b] - 5) ** 2 for a, b in pairs) / 4
    if name == "hinge":
        return sum(torch.relu(1 - 0.1 * (ratio[a] - ratio[b])) for a, b in pairs) / 4
    assert name == "kto"
    kl = (sum(ratio[d] for d in (1, 3, 11, 13)) / 4).clamp(min=0)
    good = sum(1.5 * (1 - torch.sigmoid(0.1 * (ratio[d] - kl))) for d in (0, 10))
    return (good + sum(1 - torch.sigmoid(0.1 * (kl - ratio[d])) for d in (2, 12))) / 4


@pytest.mark.parametrize("name", ["tokens", "documents", "dpo", "dpo-smooth", "ipo", "hinge", "kto"])
def test_is_its_definition_document_by_document(name):
    task, options = TASKS[name]
    loss, _ = task.loss(MODEL, POLICY, batch_of(name), **options)
    torch.testing.assert_close(loss.value(), by_loops(name))


@pytest.mark.parametrize("name", ["kd", "kd-reverse", "kd-jsd"])
def test_distillation_is_the_divergence_of_the_two_distributions(name):
    task, options = TASKS[name]
    labelled = BATCH["labels"] != -100
    p = torch.softmax(MODEL.logits(REFERENCE, TEXTS)[labelled] / task.temperature, -1)
    q = torch.softmax(MODEL.logits(POLICY, TEXTS)[labelled] / task.temperature, -1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1).mean()  # noqa: E731
    m = task.mix * p + (1 - task.mix) * q
    expected = {
        "forward": kl(p, q), "reverse": kl(q, p), "jsd": task.mix * kl(p, m) + (1 - task.mix) * kl(q, m)
    }[task.kind] * task.temperature**2  # fmt: skip
    if task.labels:
        expected = expected + task.labels * by_loops("tokens")
    torch.testing.assert_close(task.loss(MODEL, POLICY, TEXTS, **options)[0].value(), expected)


def test_the_likeliest_tokens_of_the_teacher_tell_at_most_what_all_tell():
    """To take the other tokens as one can only hide where two distributions differ."""
    tasks = [Kd(top_k=8), Kd(top_k=64), Kd(top_k=CFG.vocab - 2), Kd()]
    values = [task.loss(MODEL, POLICY, TEXTS, reference=REFERENCE)[0].item() for task in tasks]
    assert values == sorted(values)
    assert values[0] < 0.5 * values[3]
    assert values[2] == pytest.approx(values[3], rel=1e-2)


def gradients(name, plan=None):
    """Loss, terms and every gradient of a step, which runs op by op where there is no plan."""
    task, options = TASKS[name]
    reference = options.get("reference")

    def fn(state, batch):
        def loss(params, reference, batch):
            return task.loss(MODEL, params, batch, **({} if reference is None else {"reference": reference}))

        return ftrain.value_and_grad(loss, has_aux=True)(state["params"], state.get("reference"), batch)

    state = {"params": POLICY} if reference is None else {"params": POLICY, "reference": reference}
    specs = dict.fromkeys(state, MODEL.specs)
    step = fn if plan is None else ftrain.jit(fn, plan=plan, specs=specs)
    (loss, terms), grads = step(state, batch_of(name))
    return [loss.value() if hasattr(loss, "value") else loss, *leaves(grads)], {k: float(v) for k, v in terms.items()}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[] if (i + j) % 2 == 0 or name == "dpo" else pytest.mark.exhaustive)
        for i, name in enumerate(TASKS)
        for j, mesh in enumerate(MESHES)
    ],
)
def test_a_mesh_is_one_device(name, mesh):
    alone, terms = gradients(name)
    found, its_terms = gradients(name, Plan(Mesh(**MESHES[mesh], kind="virtual")))
    for a, b in zip(alone, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert its_terms == pytest.approx(terms, rel=1e-9)


@pytest.mark.parametrize("name", ["dpo", "kto", "documents"])
def test_ranks_that_share_documents_are_refused(name):
    with pytest.raises(ValueError, match="within_documents on a sequence axis of 2"):
        gradients(name, Plan(Mesh(sequence=2, kind="virtual")))


HEADS = {
    "classify": (Classify(classes=3), "kind", (1, 3, 2, 0)),
    "reward": (Reward(), "side", SIDES),
    "reward-centred": (Reward(centre=0.5), "side", SIDES),
}


def with_head(name, plan=None):
    """Loss, terms and gradients of a head's step."""
    task, leaf, values = HEADS[name]
    lengths = torch.tensor([*LENGTHS, T - sum(LENGTHS)])
    batch = {**TEXTS, leaf: torch.tensor([*values, 0]).repeat_interleave(lengths).repeat(2)}
    specs = {**MODEL.specs, **task.head_specs(MODEL)}
    head = ftrain.normal(ftrain.key(3), (CFG.d_model, task.outputs)).double() * 0.1
    state = {**POLICY, "task_head": head}

    def fn(state, batch):
        def loss(params, batch):
            return task.loss(MODEL, {k: params[k] for k in MODEL.specs}, batch, head={"task_head": params["task_head"]})

        return ftrain.value_and_grad(loss, has_aux=True)(state, batch)

    step = fn if plan is None else ftrain.jit(fn, plan=plan, specs=specs)
    (loss, terms), grads = step(state, batch)
    return batch, head, loss, {k: float(v) for k, v in terms.items()}, leaves(grads)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_reads_the_last_token_of_each_document(name):
    task, leaf, _ = HEADS[name]
    batch, head, loss, terms, _ = with_head(name)
    scores, ids = MODEL.hidden(POLICY, TEXTS) @ head, TEXTS["segments"].tolist()
    last = [i for i, d in enumerate(ids) if i + 1 == len(ids) or ids[i + 1] != d]
    value = {ids[i]: scores[i] for i in last}
    if name == "classify":
        kinds = {ids[i]: int(batch[leaf][i]) - 1 for i in last}
        told = [d for d in kinds if kinds[d] >= 0]
        expected = torch.stack([-torch.log_softmax(value[d], -1)[kinds[d]] for d in told]).mean()
        assert terms["accuracy"] == sum(int(value[d].argmax()) == kinds[d] for d in told) / len(told)
    else:
        pairs = [(value[a][0], value[b][0]) for a, b in ((0, 1), (2, 3), (10, 11), (12, 13))]
        expected = torch.stack([-logsigmoid(a - b) + task.centre * (a + b) ** 2 for a, b in pairs]).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_on_a_mesh_is_that_of_one_device(name):
    *_, alone, terms, grads = with_head(name)
    *_, found, its_terms, its_grads = with_head(name, Plan(Mesh(shard=2, kind="virtual")))
    for a, b in zip([alone, *grads], [found, *its_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert its_terms == pytest.approx(terms, rel=1e-9)


PARTS = (1, 2, 1, 2)


def embedded(pooling, plan=None):
    """Loss, accuracy and gradients of a step of embeddings on packs of two questions with their answers."""
    lengths = torch.tensor([*LENGTHS, T - sum(LENGTHS)])
    segments = [Documents.of(pack(seed)["segments"], max_documents=8) for seed in (0, 1)]
    batch = {**TEXTS, "segments": join_documents(segments)}
    batch["part"] = torch.tensor([*PARTS, 0]).repeat_interleave(lengths).repeat(2)
    task = Embed(temperature=0.5, pooling=pooling)

    def fn(params, batch):
        return ftrain.value_and_grad(lambda p, b: task.loss(MODEL, p, b), has_aux=True)(params, batch)

    step = fn if plan is None else ftrain.jit(fn, plan=plan, specs=MODEL.specs)
    (loss, terms), grads = step(POLICY, batch)
    return [loss, *leaves(grads)], float(terms["accuracy"])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_compared_over_the_whole_batch(pooling):
    hidden, ids = MODEL.hidden(POLICY, TEXTS), TEXTS["segments"]
    texts = [hidden[ids == d] for d in (0, 1, 2, 3, 10, 11, 12, 13)]
    pooled = torch.stack([t.mean(0) if pooling == "mean" else t[-1] for t in texts])
    pooled = torch.nn.functional.normalize(pooled, dim=-1)
    scores = pooled[0::2] @ pooled[1::2].T / 0.5
    found, accuracy = embedded(pooling)
    torch.testing.assert_close(found[0], torch.nn.functional.cross_entropy(scores, torch.arange(4)))
    assert accuracy == (scores.argmax(-1) == torch.arange(4)).double().mean()
    meshed, its = embedded(pooling, Plan(Mesh(shard=2, kind="virtual")))
    for a, b in zip(found, meshed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert its == accuracy


def test_a_policy_that_is_its_reference_has_no_margin():
    loss, terms = Dpo().loss(MODEL, POLICY, batch_of("dpo"), reference=POLICY)
    assert loss.item() == pytest.approx(math.log(2))
    assert float(terms["margin"]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("name", "leaf"), [("dpo", "side"), ("kto", "judged"), ("weights", "weights")])
def test_a_batch_without_the_leaf_of_its_task_is_refused(name, leaf):
    task, options = TASKS[name]
    with pytest.raises(ValueError, match=f"no '{leaf}'"):
        task.loss(MODEL, POLICY, TEXTS, **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Dpo(kind="sigmod"), "not one of sigmoid"),
        (lambda: Dpo(beta=0), "must be positive"),
        (lambda: Dpo(label_smoothing=0.6), "in \\[0, 0.5\\)"),
        (lambda: Kto(good=-1), "must not be negative"),
        (lambda: Kd(kind="kl"), "not one of forward"),
        (lambda: Kd(top_k=0), "at least 1"),
        (lambda: NextToken(average="batch"), "not one of tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
