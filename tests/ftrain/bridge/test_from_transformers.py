"""transformers' language models as pure functions: equal to the plain module, on meshes, and in and out of folders.

Legend: T tokens of a pack.
"""

import copy
import filecmp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ftrain
from ftrain import tree
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest
from ftrain.graph.layers import layer_of_node
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
OF_GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"head_dim": 4, "num_key_value_heads": 4}
PACKED = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**OF_GPT2, **UNDROPPED),
    "window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "roberta": lambda: transformers.RobertaConfig(
        **{**SMALL, "pad_token_id": 1}, **NO_DROPOUT, max_position_embeddings=64, is_decoder=True
    ),
    "experts": lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS),
    "latent attention": lambda: transformers.DeepseekV3Config(
        **{**SMALL, **LATENT, "num_hidden_layers": 1},
        first_k_dense_replace=0,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    ),
    "scaled logits": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=3.0),
}
ALONE = {
    "bart": lambda: transformers.BartConfig(
        vocab_size=61, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24, dropout=0.0
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4),
    "bloom": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4),
    "attention by its name": lambda: transformers.FalconConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4
    ),
    "looks into masks": lambda: transformers.DogeConfig(**GROUPED),
    "keeps the state of its scan": lambda: transformers.RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 1}, lru_width=16, attention_window_size=8
    ),
}
LENGTH, DOCUMENTS = 12, 2


def rows():
    """Two documents of one length as rows, with the next token as the label of each."""
    tokens = torch.randint(3, 61, (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((DOCUMENTS, 1), -100)], 1)
    return {"tokens": tokens, "labels": labels}


def pack():
    """The same documents in one pack."""
    segments = torch.arange(DOCUMENTS).repeat_interleave(LENGTH)
    return {**{name: x.flatten() for name, x in rows().items()}, "segments": segments}


def plain(config):
    """transformers' own module, eager, its loss and gradients on the rows."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").train()
    batch = rows()
    logits = module(batch["tokens"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
    loss.backward()
    return module, loss.detach(), {name: p.grad for name, p in module.named_parameters()}


def bridged(config, batch, **options):
    """The model, its loss and gradients at the plain module's numbers."""
    module, loss, grads = plain(config)
    model = from_transformers(config)
    params = nest({name: p.detach().clone() for name, p in module.named_parameters()})
    if "plan" in options:
        options["specs"] = model.specs

    def of_model(params, batch):
        found = model.loss(params, batch)
        return found[0] if model.state else found

    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(of_model)(params, batch), **options)
    return step(params, batch), (loss, grads)


def assert_equal(found, expected):
    (value, grads), (loss, of_module) = found, expected
    torch.testing.assert_close(value, loss, rtol=0, atol=1e-5)
    largest = max(float(g.norm()) for g in of_module.values() if g is not None)
    for name, grad in flatten(grads).items():
        if of_module[name] is not None:
            apart = float((grad - of_module[name]).norm())
            assert apart <= 1e-5 * largest + 1e-5 * float(of_module[name].norm()), name


@pytest.mark.parametrize("kind", PACKED)
def test_a_pack_of_documents_is_rows_of_the_plain_module(kind):
    assert_equal(*bridged(PACKED[kind](), pack()))


LONG = pytest.mark.exhaustive
SHARD, SEQUENCE = Mesh(shard=2, kind="virtual"), Mesh(sequence=2, kind="virtual")


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("llama", SEQUENCE),
        ("experts", SHARD),
        ("roberta", SEQUENCE),
        pytest.param("llama", SHARD, marks=LONG),
        pytest.param("experts", SEQUENCE, marks=LONG),
        pytest.param("roberta", SHARD, marks=LONG),
    ],
    ids=str,
)
def test_a_pack_on_a_mesh(kind, mesh):
    places = torch.arange(LENGTH).repeat(DOCUMENTS)
    assert_equal(*bridged(PACKED[kind](), {**pack(), "positions": places}, plan=Plan(mesh, Layout())))


def test_experts_divided_among_ranks():
    plan = Plan(Mesh(shard=2, expert=2, kind="virtual"), Layout())
    assert_equal(*bridged(PACKED["experts"](), pack(), plan=plan))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_are_computed_again(kind):
    assert_equal(*bridged(PACKED[kind](), pack(), remat="layer"))


LISTS = {
    "model.layers": PACKED["experts"],
    "transformer.h": PACKED["gpt2"],
    "roberta.encoder.layer": PACKED["roberta"],
    "transformer.blocks": lambda: transformers.MptConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=4),
    "model.decoder.layers": lambda: transformers.OPTConfig(
        vocab_size=61, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_layers_are_found_whatever_their_list_is_called(name):
    model = from_transformers(LISTS[name]())
    params = ftrain.init(model.specs, ftrain.key(0))
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch), remat="layer")
    graph = step.lower(params, pack() if model.packs else rows()).graph.graph
    assert {layer_of_node(node) for node in graph.nodes} - {""} == {f"params.{name}.0", f"params.{name}.1"}


@pytest.mark.parametrize("kind", ALONE)
def test_rows_where_documents_cannot_share_a_pack(kind):
    assert_equal(*bridged(ALONE[kind](), rows()))


@pytest.mark.parametrize("kind", ALONE)
def test_such_a_pack_is_refused_with_the_reason(kind):
    model = from_transformers(ALONE[kind]())
    assert not model.packs
    params = ftrain.init(model.specs, ftrain.key(0))
    with pytest.raises(
        ValueError, match=r"several documents cannot share its tokens, as .*(modeling_|masking_utils).*\.py:\d+"
    ):
        model.loss(params, pack())


@pytest.mark.parametrize(
    ("kind", "own"), [("attention by its name", True), ("looks into masks", True), ("bart", False)]
)
def test_its_own_attention_is_taken_where_ours_does_not_suit_it(kind, own):
    model = from_transformers(ALONE[kind]())
    assert model.why.startswith("bridged, with its own attention, as ours does not suit it (") == own


def test_every_call_begins_with_the_same_module():
    model = from_transformers(ALONE["keeps the state of its scan"]())
    params = ftrain.init(model.specs, ftrain.key(0))
    first, again = (model.logits(params, rows()) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(("kind", "calls"), [("llama", 1), ("gpt2", 2)])  # gpt2 reads a table by places
def test_a_model_is_made_with_one_trace(kind, calls):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(type(module).__name__) if hasattr(module, "lm_head") else None
    )
    try:
        from_transformers(PACKED[kind]())
    finally:
        hook.remove()
    assert len(seen) == calls


@pytest.mark.filterwarnings("error:.*traced again")
def test_a_step_is_traced_once(tmp_path):
    model = from_transformers(PACKED["llama"]())
    params = ftrain.init(model.specs, ftrain.key(0))
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
    for _ in range(2):
        step(params, pack())
        model.save(params, tmp_path)


def test_only_experts_that_our_primitive_reads_are_divided_as_experts():
    ours = flatten(from_transformers(PACKED["experts"]()).specs)
    assert {path.rpartition(".")[2] for path, spec in ours.items() if "expert" in spec.axes} == {
        "gate_up_proj",
        "down_proj",
    }
    theirs = transformers.JetMoeConfig(
        **{**GROUPED, "num_hidden_layers": 1}, kv_channels=4, num_local_experts=4, num_experts_per_tok=2
    )
    specs = flatten(from_transformers(theirs).specs)
    assert any(".experts." in path for path in specs)
    assert not any("expert" in spec.axes for spec in specs.values())


def test_nothing_is_allocated():
    config = transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, vocab_size=128256)
    model = from_transformers(config)
    assert ftrain.modules.spec.count(model.specs) > 2_000_000_000


def test_initial_numbers_are_those_of_the_module():
    model = from_transformers(PACKED["llama"]())
    inits = {path: spec.init for path, spec in flatten(model.specs).items()}
    assert inits["model.norm.weight"].value == 1.0
    assert abs(inits["model.layers.0.mlp.up_proj.weight"].std - 0.02) < 0.004


def test_a_rule_of_an_inner_model_fills_its_modules():
    config = transformers.xLSTMConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_heads=2)
    inits = {path: spec.init for path, spec in flatten(from_transformers(config).specs).items()}
    assert 0.1 < inits["backbone.embeddings.weight"].std < 0.3  # sqrt(2 / 5 / 16): the backbone's own rule


def test_logits_and_hidden_are_those_of_the_plain_module():
    module, _, _ = plain(PACKED["scaled logits"]())
    model = from_transformers(PACKED["scaled logits"]())
    params = nest({name: p.detach() for name, p in module.named_parameters()})
    expected = module(rows()["tokens"], use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(model.logits(params, rows()), expected.logits.detach())
    torch.testing.assert_close(model.hidden(params, rows()), expected.hidden_states[-1].detach())


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "experts"])
def test_a_folder_goes_in_and_comes_out_byte_by_byte(kind, tmp_path):
    plain(PACKED[kind]())[0].save_pretrained(tmp_path / "in")
    model = from_transformers(tmp_path / "in")
    params = model.load()
    model.save(params, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert filecmp.cmpfiles(tmp_path / "in", tmp_path / "out", files, shallow=False) == (files, [], [])


def test_a_folder_that_is_not_tied_as_it_says_is_refused(tmp_path):
    plain(PACKED["tied"]())[0].save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    table = next(name for name in held if "embed" in name)
    save_file({**held, "lm_head.weight": held[table].flip(0)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"should repeat the numbers of .* set tie_word_embeddings to false"):
        from_transformers(tmp_path).load()


def test_recompute_that_a_configuration_asks_for_is_left_to_jit():
    config = PACKED["llama"]()
    config.gradient_checkpointing = True
    model = from_transformers(config)
    params = ftrain.init(model.specs, ftrain.key(0))
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
    assert torch.isfinite(step(params, pack())[0])
    assert config.gradient_checkpointing


def test_a_trained_folder_loads_with_strict_names(tmp_path: Path):
    model = from_transformers(PACKED["experts"]())
    params = ftrain.init(model.specs, ftrain.key(0))
    model.save(params, tmp_path)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    here = flatten(params)
    assert all(torch.equal(p, here[name]) for name, p in loaded.named_parameters())


def test_numbers_are_read_into_a_state_that_exists(tmp_path: Path):
    module, _, _ = plain(PACKED["llama"]())
    module.save_pretrained(tmp_path)
    model = from_transformers(tmp_path)
    params = ftrain.init(model.specs, ftrain.key(0))
    assert model.load(params) is params
    assert all(torch.equal(flatten(params)[name], p) for name, p in module.named_parameters())


def test_a_model_of_transformers_elsewhere_is_as_it_was():
    from_transformers(PACKED["llama"]())
    module = transformers.AutoModelForCausalLM.from_config(PACKED["llama"]())
    assert module.config._attn_implementation == "sdpa"
    assert next(module.parameters()).device.type == "cpu"


def test_no_memory_of_scores():
    model = from_transformers(PACKED["llama"]())
    params = ftrain.init(model.specs, ftrain.key(0))
    step = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))
    graph = step.lower(params, pack()).as_text()
    assert "[24, 61]" not in graph


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "of_tomorrow"}, "knows no model of type 'of_tomorrow'"),
        ({"model_type": "of_tomorrow", "transformers_version": "9.0"}, "written by transformers 9.0"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.C"}}, "pass trust_remote_code=True"),
    ],
)
def test_a_folder_that_transformers_does_not_know_is_refused(config, says, tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        from_transformers(tmp_path)


def test_a_task_that_the_architecture_has_not_is_refused():
    with pytest.raises(ValueError, match="no mamba for task 'masked_lm'"):
        from_transformers(ALONE["mamba"](), task="masked_lm")


def test_quantized_weights_are_refused(tmp_path):
    import json

    module, _, _ = plain(PACKED["llama"]())
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"quantized \(fp8\)"):
        from_transformers(tmp_path).load()


def test_leaves_that_a_model_does_not_read_are_refused():
    model = from_transformers(PACKED["llama"]())
    params = ftrain.init(model.specs, ftrain.key(0))
    with pytest.raises(ValueError, match="the batch has 'position_ids', which the model does not read"):
        model.loss(params, {**rows(), "position_ids": torch.zeros(2, 12)})
    with pytest.raises(ValueError, match="the batch has no 'tokens'"):
        model.loss(params, {"labels": rows()["labels"]})


def test_dropout_draws_from_a_key_and_is_the_same_under_recompute():
    config = transformers.GPT2Config(**OF_GPT2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)
    model = from_transformers(config)
    params = ftrain.init(model.specs, ftrain.key(0))

    def step(params, batch, key):
        return ftrain.value_and_grad(model.loss)(params, batch, key)

    first = ftrain.jit(step)(params, pack(), ftrain.key(1))
    again = ftrain.jit(step, remat="layer")(params, pack(), ftrain.key(1))
    other = ftrain.jit(step)(params, pack(), ftrain.key(2))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(again), strict=True))
    assert float(first[0]) != float(other[0])
    on_mesh = ftrain.jit(step, plan=Plan(Mesh(shard=2, kind="virtual"), Layout()), specs=model.specs)
    torch.testing.assert_close(on_mesh(params, pack(), ftrain.key(1))[0], first[0], rtol=0, atol=1e-5)


ONE = {**GROUPED, "num_hidden_layers": 1}
DROPPING = {
    "window": lambda: transformers.MistralConfig(**ONE, attention_dropout=0.3, sliding_window=5),
    "eager": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=8, n_layer=1, n_head=2, attention_dropout=0.3),
}


def at_key(config, batch, key, **options):
    model = from_transformers(config)
    if "plan" in options:
        options["specs"] = model.specs
    step = ftrain.jit(lambda p, batch, key: ftrain.value_and_grad(model.loss)(p, batch, key), **options)
    return tree.leaves(step(ftrain.init(model.specs, ftrain.key(0)), batch, key))


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_of_attention_is_the_same_under_recompute_and_on_a_mesh(kind):
    batch = rows() if kind == "eager" else pack()
    first, other = (at_key(DROPPING[kind](), batch, ftrain.key(seed)) for seed in (1, 2))
    assert float(first[0]) != float(other[0])
    again = at_key(DROPPING[kind](), batch, ftrain.key(1), remat="all")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    shared = at_key(DROPPING[kind](), batch, ftrain.key(1), plan=Plan(Mesh(shard=2, kind="virtual"), Layout()))
    for a, b in zip(first, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dropout_of_attention_is_the_same_for_rows_and_for_their_pack():
    (a, *_), (b, *_) = (at_key(DROPPING["window"](), batch, ftrain.key(1)) for batch in (rows(), pack()))
    torch.testing.assert_close(a, b)


def test_dropout_of_attention_is_none_without_a_key():
    (a, *_), (b, *_) = (
        at_key(config, pack(), None)
        for config in (DROPPING["window"](), transformers.MistralConfig(**ONE, sliding_window=5))
    )
    torch.testing.assert_close(a, b)


def test_dropout_of_attention_is_refused_where_ranks_share_a_sequence():
    plan = Plan(Mesh(sequence=2, kind="virtual"), Layout())
    places = torch.arange(LENGTH).repeat(DOCUMENTS)
    with pytest.raises(ValueError, match=r"MistralAttention drops .*\(p=0.3\), which ranks of a sequence"):
        at_key(DROPPING["window"](), {**pack(), "positions": places}, ftrain.key(1), plan=plan)
