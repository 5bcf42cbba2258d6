"""Laws of a family of text models: it is transformers' for the same weights, on meshes, through files and caches.

Each takes a tiny random model of transformers; its weights and its gradients reach our trees through folders of files,
so that the family's names are tested with them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ftrain
from ftrain.modules import decoder, spec
from ftrain.modules.autoregression import generate
from ftrain.modules.families.registry import family_of
from ftrain.modules.model import Model
from ftrain.sharding import Layout, Mesh
from tests.helpers import mesh_models

LENGTHS = (9, 3, 17, 1, 2)


def random_model(config: Any) -> Any:
    """The causal language model of a configuration, eager, in float32, every parameter and buffer of weights random."""
    import transformers

    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    # what is no parameter but is saved (a router's biases) is random too
    named = {**dict(model.named_buffers()), **model.state_dict()}
    with torch.no_grad():
        for path in model.state_dict():
            leaf = named[path]
            leaf.copy_(float("norm" in path) * 0.5 + torch.randn(leaf.shape, generator=generator) * 0.2)
    return model


def saved(model: Any, folder: Path) -> Path:
    """The folder with the model's weights in it."""
    model.save_pretrained(folder)
    return folder


def batch(vocab: int) -> dict[str, Tensor]:
    """A pack of documents of `LENGTHS`."""
    made = mesh_models.text_batch(vocab, 1, LENGTHS)
    return {name.removesuffix("_T"): leaf for name, leaf in made.items()}


def theirs(model: Any, given: dict[str, Tensor], folder: Path) -> tuple[float, Any]:
    """The mean loss of transformers, document by document, and every gradient as our tree."""
    total, count = torch.zeros(()), 0
    for tokens in given["tokens"].split(LENGTHS):
        if len(tokens) > 1:
            logits = model(tokens[None], use_cache=False).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
            count += len(tokens) - 1
    loss = total / count
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), ftrain.hf.open(saved(model, folder), native="always").load()


def require_equal_gradients(found: Any, wanted: Any, *, within: float = 1e-5) -> None:
    """Each gradient's difference over its norm (at least a thousandth of the largest one's)."""
    largest = max(leaf.norm().item() for _, leaf in spec.leaves_with_paths(wanted))
    pairs = zip(spec.leaves_with_paths(found), spec.leaves_with_paths(wanted), strict=True)
    for (path, ours), (_, want) in pairs:
        error = (ours.double() - want.double()).norm().item() / max(want.norm().item(), 1e-3 * largest)
        assert error < within, f"{path}: relative error {error:.1e}"


def require_those_of_transformers(
    config: Any, tmp_path: Path, *, dtype: torch.dtype = torch.float32, within: float = 1e-5
) -> Model:
    """Loss and every gradient of packed documents are those of transformers in float32; returns the native model.

    `dtype`: in which ours are computed; in float64 only their rounding is left between the two. `within`: relative
    differences of gradients.
    """
    model = random_model(config)
    native = ftrain.hf.open(saved(model, tmp_path / "weights"), native="always")
    given = batch(config.vocab_size)
    params = native.load()
    spec.check(params, native.specs)
    params = spec.map_with_paths(lambda _, leaf: leaf.to(dtype), params)
    grads, mean = torch.func.grad_and_value(lambda p: mean_of(native, p, given).value())(params)
    loss, wanted = theirs(model, given, tmp_path / "gradients")
    assert abs(mean.item() - loss) < 1e-5 * loss
    require_equal_gradients(grads, wanted, within=within)
    return native


def mean_of(native: Model, params: Any, given: dict[str, Tensor]) -> Any:
    """The loss, without the new state of a model that has one."""
    found = native.loss(params, given)
    return found[0] if native.state else found


def on_mesh(native: Model, mesh: Mesh, *layout: Layout) -> tuple[float, float]:
    """Relative differences of the loss and of the gradients between one device and the mesh, in float64."""

    def loss(params: Any, given: dict[str, Tensor]) -> Any:
        found = native.loss(params, {name.removesuffix("_T"): leaf for name, leaf in given.items()})
        return found if native.state else (found, ())

    vocab = native.specs["embedding"]["table_VD"].shape[0]
    made = mesh_models.Model(native.specs, loss, lambda packs: mesh_models.text_batch(vocab, packs), {})
    return mesh_models.compare(made, mesh_models.plan_for(made, mesh, *layout), dtype=torch.float64)


def require_saved_as_it_was(native: Model, tmp_path: Path) -> None:
    """What is saved of untouched weights is, to the byte, the file that transformers wrote."""
    native.save(native.load(), tmp_path / "again")
    (one, other) = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("weights", "again"))
    assert one == other


def described(config: dict[str, Any]) -> decoder.DecoderConfig:
    """The decoder of a configuration."""
    return family_of(config).config(config)


def require_one_by_one(native: Model, cfg: decoder.DecoderConfig) -> None:
    """Tokens one by one through the cache give the hidden states of all at once."""
    params = spec.map_with_paths(lambda _, leaf: leaf.double(), native.load())
    balance = native.state or None
    rows = [decoder.embed(params, torch.arange(n) * 5 % cfg.vocab) for n in (12, 9)]
    lengths, steps = [5, 2], 7

    def alone(x_TD: Tensor) -> Tensor:
        place_T = torch.arange(len(x_TD))
        return decoder.apply(
            params, x_TD, positions=place_T, segments=torch.zeros_like(place_T), cfg=cfg, balance=balance
        )[0]

    wanted = [alone(x) for x in rows]
    out, cache = decoder.prefill(
        params,
        torch.cat([x[:n] for x, n in zip(rows, lengths, strict=True)]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        length_B=torch.tensor(lengths),
        room=steps,
        cfg=cfg,
        balance=balance,
    )
    for got, want in zip(out.split(lengths), wanted, strict=True):
        torch.testing.assert_close(got, want[: len(got)], rtol=0, atol=1e-9)
    for step in range(steps):
        at = [n + step for n in lengths]
        x_BD = torch.stack([x[i] for x, i in zip(rows, at, strict=True)])
        out, cache = decoder.extend(params, x_BD, positions=torch.tensor(at), cache=cache, cfg=cfg, balance=balance)
        torch.testing.assert_close(out, torch.stack([w[i] for w, i in zip(wanted, at, strict=True)]), rtol=0, atol=1e-9)


def require_same_text(kind: str, config: Any, folder: Path) -> None:
    """AssertionError unless the native family, opened from `folder`, writes greedily what transformers does."""
    model = random_model(config)
    native = ftrain.hf.open(saved(model, folder))
    ids = generate(native.load(), [[1, 2, 3]], family=native.family, max_new=9)
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert ids == [expected[0, 3:].tolist()]
    assert native.why == f"native: {kind} is a family of the library"
