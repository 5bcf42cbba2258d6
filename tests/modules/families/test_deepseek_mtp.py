"""DeepSeek-V3's modules of multi-token prediction against plain ones by the paper, in float64, document by document."""

import pytest
import torch
from torch import nn

import ftrain
from ftrain.bridge.native import NativeDecoder
from ftrain.modules import decoder, spec
from ftrain.modules.model import Model
from ftrain.sharding import Mesh
from tests.helpers import text_families as laws
from tests.helpers.deepseek import SIZES, config

transformers = pytest.importorskip("transformers", minversion="5")

DEPTH, LAYERS, WEIGHT = 2, 2, 0.1


class Module(nn.Module):
    """One module by the paper (arXiv 2412.19437, section 2.2), around transformers' own layer."""

    def __init__(self, described):
        super().__init__()
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        width = described.hidden_size
        self.enorm, self.hnorm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = theirs.DeepseekV3DecoderLayer(described, layer_idx=LAYERS)  # behind the dense ones
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(width, eps=1e-6)})

    def forward(self, hidden, ahead, rotated, mask):
        """`hidden`: of tokens; `ahead`: embeddings of the tokens that are seen."""
        rows = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], -1))
        rows = self.layer(rows, attention_mask=mask, position_embeddings=rotated)
        return self.shared_head["norm"](rows)


class Plain(nn.Module):
    """The main model of transformers with the modules behind it."""

    def __init__(self):
        super().__init__()
        described = config(num_nextn_predict_layers=DEPTH, experts_implementation="eager")
        self.main = laws.random_model(described)
        self.ahead = nn.ModuleList(Module(self.main.config).eval() for _ in range(DEPTH))
        generator = torch.Generator().manual_seed(1)
        for name, leaf in self.ahead.state_dict().items():
            leaf.copy_(float("norm" in name) * 0.5 + torch.randn(leaf.shape, generator=generator) * 0.2)

    def loss(self, given):
        """The mean of the next token, and a tenth of the mean of those further ahead, each over all documents."""
        totals, counts = [0.0] * (DEPTH + 1), [0] * (DEPTH + 1)
        for tokens, labels in zip(
            given["tokens"].split(laws.LENGTHS), given["labels"].split(laws.LENGTHS), strict=True
        ):
            hidden, n = self.main.model(tokens[None], use_cache=False).last_hidden_state, len(tokens)
            for k in range(min(DEPTH + 1, n)):
                if k:
                    hidden = self._module(k, hidden, tokens)
                scores = self.main.lm_head(hidden)[0]
                totals[k] += nn.functional.cross_entropy(scores, labels[k:], reduction="sum", ignore_index=-100)
                counts[k] += int((labels[k:] != -100).sum())
        first, *ahead = (total / count for total, count in zip(totals, counts, strict=True))
        return first + WEIGHT / DEPTH * sum(ahead)

    def _module(self, k, hidden, tokens):
        """The first `n - k` rows: the others have no token so far ahead."""
        hidden, n = hidden[:, : len(tokens) - k], len(tokens) - k
        rotated = self.main.model.rotary_emb(hidden, torch.arange(n)[None])
        mask = torch.full((n, n), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        return self.ahead[k - 1](hidden, self.main.model.embed_tokens(tokens[None, k:]), rotated, mask)

    def save(self, folder, *, repeated=True):
        """As published: modules are layers behind the last, which repeat the table and the head."""
        from safetensors.torch import load_file, save_file

        file = laws.saved(self.main, folder) / "model.safetensors"
        found = load_file(file)
        for k, module in enumerate(self.ahead):
            own = {}
            for name, leaf in module.state_dict().items():
                own |= _published(name.removeprefix("layer."), leaf.float())
            if repeated:
                own["embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
                own["shared_head.head.weight"] = found["lm_head.weight"].clone()
            found |= {f"model.layers.{LAYERS + k}.{name}": leaf.contiguous() for name, leaf in own.items()}
        save_file(found, file, metadata={"format": "pt"})
        return folder


def _published(name, leaf):
    """Experts one by one, as files have them."""
    if not name.startswith("mlp.experts."):
        return {name: leaf}
    down = name.endswith("down_proj")
    parts = {"down": leaf} if down else dict(zip(("gate", "up"), leaf.chunk(2, 1), strict=True))
    return {f"mlp.experts.{e}.{n}_proj.weight": x[e].clone() for n, x in parts.items() for e in range(len(leaf))}


@pytest.fixture(scope="module")
def plain():
    return Plain()


@pytest.fixture(scope="module")
def native(plain, tmp_path_factory):
    return ftrain.hf.open(plain.save(tmp_path_factory.mktemp("mtp") / "weights"), native="always")


def given(vocab=64):
    """A pack of documents, some of whose labels are not trained."""
    made = laws.batch(vocab)
    labels = made["labels"].clone()
    labels[2:6] = -100
    return {**made, "labels": labels}


def test_loss_and_gradients_are_those_of_the_paper(plain, native, tmp_path):
    params = spec.map_with_paths(lambda _, leaf: leaf.double(), native.load())
    state = {name: x.double() for name, x in native.state.items()}
    grads, value = torch.func.grad_and_value(lambda p: native.loss(p, given(), state=state)[0].value())(params)
    loss = plain.double().loss(given())
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)  # transformers has cosines and routers in float32
    loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    wanted = ftrain.hf.open(plain.float().save(tmp_path, repeated=False), native="always").load()
    laws.require_equal_gradients(grads, wanted, within=2e-6)
    assert wanted["mtp"]["layers"][1]["w_join_CD"].norm() > 0


def test_a_mesh_gives_what_one_device_gives():
    """The biases of all routers too. On a sequence axis tokens further ahead lie on the next rank."""
    sizes = {**SIZES, "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": DEPTH}
    cfg = laws.described({"model_type": "deepseek_v3", **sizes})
    state = ftrain.init(decoder.balance_specs(cfg), ftrain.key(0))
    assert list(state) == ["mtp_bias_LE"]
    model = Model("two modules behind an MLP", decoder.specs(cfg), {}, NativeDecoder(cfg, state).loss, state=state)
    loss, gradients = laws.on_mesh(model, Mesh(sequence=2, expert=2, kind="virtual"))
    assert loss < 1e-12
    assert gradients < 1e-11


def test_a_folder_comes_back_to_the_byte(native, plain, tmp_path):
    """With the repeated table and head, and without where there were none."""
    text = laws.saved(plain.float().main, tmp_path / "text")
    for model, folder in ((native, None), (None, plain.save(tmp_path / "weights", repeated=False)), (None, text)):
        model = model or ftrain.hf.open(folder, native="always")
        folder = folder or model.load.__self__.folder.path
        model.save(model.load(), tmp_path / "again")
        one, other = ((at / "model.safetensors").read_bytes() for at in (folder, tmp_path / "again"))
        assert one == other
        assert ("mtp" in model.specs) == (folder != text)


def test_biases_of_their_routers_move_against_the_load_and_are_saved(native, tmp_path):
    before = native.state["mtp_bias_LE"]
    assert before.shape == (DEPTH, 6)
    _, after = native.loss(native.load(), given())
    moved = (after["mtp_bias_LE"] - before) / 1e-3
    torch.testing.assert_close(moved.round(), moved, rtol=0, atol=1e-3)
    assert moved.amin() < -0.5
    assert moved.amax() > 0.5
    native.save(native.load(), tmp_path, after)
    assert torch.equal(ftrain.hf.open(tmp_path).state["mtp_bias_LE"], after["mtp_bias_LE"])


@pytest.mark.parametrize(
    ("number", "extra", "message"),
    [
        (0, "model.layers.2.enorm.weight", r"'model\.layers\.2\.enorm\.weight' is of a module of multi-token"),
        (1, "mtp.fc.weight", r"'mtp\.fc\.weight' is of a module of multi-token"),
        (3, "model.layers.2.enorm.weight", "no tensor"),
    ],
)
def test_modules_that_a_configuration_does_not_describe_are_refused_by_name(number, extra, message, plain, tmp_path):
    from safetensors.torch import load_file, save_file

    plain.main.config.num_nextn_predict_layers = number
    file = laws.saved(plain.float().main, tmp_path) / "model.safetensors"
    plain.main.config.num_nextn_predict_layers = DEPTH
    save_file({**load_file(file), extra: torch.ones(32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        ftrain.hf.open(tmp_path, native="always").load()
