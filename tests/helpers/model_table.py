"""What byeori does with a tiny random model of every architecture: the rows of docs/models.md."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ByeoriError
from byeori.kernels import forest_attention, state_layers
from byeori.model import adapter, forward, text_model
from byeori.plan import rehearsal
from shrunk import shrunk

TEXT = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
NAMES = sorted({*TEXT, *IMAGES})
YES = "yes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """trains: `shared`, `row by row: why`, the sentence that a user gets, or why there is no tiny model.
    exact: the largest of the relative differences of loss and gradients to the model's own code, None if not trained.
    plan: yes, or the sentence. built: whether there is a tiny model that transformers itself can run.
    """

    name: str
    trains: str
    exact: float | None = None
    plan: str = ""
    built: bool = True


def rows() -> list[Example]:
    """Five rows of one tree."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(30, 120, (count,), generator=generator).tolist()

    a, b = words(20), words(17)
    ids = [a + b + words(11), a + b + words(5), a + words(13), words(30), a + words(3)]
    return [Example(token_ids=row, targets=((len(row) - 4, len(row)),)) for row in ids]


def row(name: str) -> Row:
    """Try one architecture."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = shrunk(transformers.CONFIG_MAPPING[name]())
            base = text_model.auto_class(config).from_config(config).eval().requires_grad_(False)
            for parameter in base.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            with torch.no_grad():
                ran = base(input_ids=torch.tensor([rows()[0].token_ids]), use_cache=False).logits.shape[:2]
            if ran != (1, 48):
                raise ValueError("its logits are not one for each token of the text")
        except Exception as error:
            return Row(name=name, trains=f"{type(error).__name__}: {error}", built=False)
        return _tried(name, config, base)


def _tried(name: str, config: Any, base: Any) -> Row:
    forest_attention.register()
    try:
        model = adapter.attach(base, r=3, alpha=6, dropout=0.0, targets=["all-linear"], seed=1).eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        forward.use_plain_attention(model)
        try:
            expected = _plain(model)
        except Exception as error:  # its own code, with rows of several lengths
            return Row(name=name, trains=f"{type(error).__name__}: {error}", built=False)
        why = forward.choose(model, rows()[:4])
    except ByeoriError as error:
        return Row(name=name, trains=str(error))
    groups = [[each] for each in rows()] if why else [rows()]
    parts = [forward.forest_logprobs(model, forests.build(g, min_shared=8), plain=bool(why)) for g in groups]
    found = _gradients(model, -torch.cat(parts).sum())
    exact = max(float((found[i] - expected[i]).norm() / expected[i].norm().clamp(min=1e-12)) for i in range(2))
    states = state_layers.note(base) or ""
    trains = f"row by row: {why}" if why else "shared" + (", states over whole rows" if "whole rows" in states else "")
    return Row(name=name, trains=trains, exact=exact, plan=_planned(config))


def _plain(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros(())
    for example in rows():
        ids = torch.tensor([list(example.token_ids)])
        logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        for start, end in example.targets:
            total = total - sum(logprobs[at - 1, ids[0, at]] for at in range(start, end))
    return _gradients(model, total)


def _gradients(model: Any, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return loss.detach()[None], torch.cat([gradient.flatten() for gradient in filled])


def _planned(config: Any) -> str:
    how = rehearsal.Adapter(r=3, alpha=6, dropout=0.0, targets=("all-linear",))
    try:
        architecture = rehearsal.architecture(config)
        rehearsal.rehearse(architecture, how, rows(), dtype=torch.float32, device="cpu")
        return YES
    except ByeoriError as error:
        return str(error)
