"""What byeori does with a tiny random model of every architecture: the rows of docs/models.md."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.distributed.processes import Processes
from byeori.errors import ByeoriError
from byeori.export.merge import merge
from byeori.kernels import forest_attention, state_layers
from byeori.losses.base import Objective, Targets
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.model import adapter, decode, forward, load, load_streamed, text_model
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
    cells: one for each of `CELLS`: yes, or the sentence. built: whether there is a tiny model.
    """

    name: str
    trains: str
    exact: float | None = None
    cells: dict[str, str]
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
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            config = shrunk(transformers.CONFIG_MAPPING[name]())
            base = text_model.auto_class(config).from_config(config).eval().requires_grad_(False)
        except Exception as error:  # each class has checks of its own
            missing = re.search(r"pip install (\w+)|No module named '(\w+)'", str(error))
            why = f"needs the package {missing[1] or missing[2]}" if missing else "its default sizes hang on each other"
            return Row(name=name, trains=why, built=False, cells={})
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        return _tried(name, config, base, Path(folder))


def _adapted(base: Any) -> Any:
    """The model with an adapter whose every number is random."""
    model = adapter.attach(base, r=3, alpha=6, dropout=0.0, targets=["all-linear"], seed=1).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _tried(name: str, config: Any, base: Any, folder: Path) -> Row:
    forest_attention.register()
    try:
        base.save_pretrained(folder / "base")
        model = _adapted(base)
        why = forward.choose(model, rows()[:4])
    except ByeoriError as error:
        return Row(name=name, trains=str(error), cells={})
    except Exception as error:
        return Row(name=name, trains=f"no ({type(error).__name__})", cells={})
    forward.use_plain_attention(model)
    expected = _plain(model)
    if why is None:
        forward.choose(model, rows()[:4])
    found = _gradients(model, -_logprobs(model, apart=bool(why)).sum())
    exact = max(float((found[i] - expected[i]).norm() / expected[i].norm().clamp(min=1e-12)) for i in range(2))
    states = state_layers.note(base) or ""
    how = ", states over whole rows" if "whole rows" in states else ""
    how = ", by a mask" if getattr(text_model.text_config(config), "index_topk", None) else how
    trains = f"row by row: {why}" if why else "shared" + how
    tiny = _Tiny(config=config, model=model, folder=folder, apart=bool(why))
    return Row(name=name, trains=trains, exact=exact, cells={cell: _cell(check, tiny) for cell, check in CELLS.items()})


def _logprobs(model: Any, *, apart: bool) -> torch.Tensor:
    """Of the rows' targets, as training computes them."""
    groups = [[each] for each in rows()] if apart else [rows()]
    return torch.cat([forward.forest_logprobs(model, forests.build(g, min_shared=8), plain=apart) for g in groups])


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


# ---- the cells --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tiny:
    """model: with its adapter. folder: has the base in `base`. apart: one row at a time."""

    config: Any
    model: Any
    folder: Path
    apart: bool


def _cell(check: Callable[[_Tiny], str], tiny: _Tiny) -> str:
    forward.use_plain_attention(tiny.model) if tiny.apart else forward.choose(tiny.model, rows()[:4])
    try:
        return check(tiny)
    except ByeoriError as error:
        return str(error).replace(str(tiny.folder) + "/", "")
    except Exception as error:  # a fault of ours: what it is stands in the row of the page
        return f"no ({type(error).__name__})"


def _steps(tiny: _Tiny) -> str:
    """A step of SFT and one of DPO on the loop's own objectives make their loss smaller, as the gradient foretells."""
    with torch.no_grad(), tiny.model.disable_adapter():
        reference = _logprobs(tiny.model, apart=tiny.apart)
    wrong = []
    for name, objective in (("SFT", SFT), ("DPO", preference(Preference(loss="sigmoid", beta=0.1)))):
        # too long a step meets curvature, too short a one float32
        wrong += [] if _falls(tiny, lambda objective=objective: _loss(tiny, objective, reference)) else [name]
    return f"the loss does not fall: {', '.join(wrong)}" if wrong else YES


def _falls(tiny: _Tiny, loss: Callable[[], torch.Tensor]) -> bool:
    """Whether a step down the gradient, of one of four lengths, takes a quarter of what it would on a slope."""
    trained = [parameter for parameter in tiny.model.parameters() if parameter.requires_grad]
    first = loss()
    gradients = torch.autograd.grad(first, trained, allow_unused=True)
    moves = [(p, p.detach().clone(), g) for p, g in zip(trained, gradients, strict=True) if g is not None]
    size = sum(float(gradient.square().sum()) for *_, gradient in moves) ** 0.5
    found = False
    with torch.no_grad():
        for step in (1e-2, 1e-3, 1e-4, 1e-1):
            for parameter, value, gradient in moves:
                parameter.copy_(value - step / size * gradient)
            found = found or float(first - loss()) > step * size / 4
        for parameter, value, _ in moves:
            parameter.copy_(value)
    return found


def _loss(tiny: _Tiny, objective: Objective, reference: torch.Tensor) -> torch.Tensor:
    """Of the first four rows: two pairs."""
    owner = torch.arange(len(reference)) // 4
    pairs = owner < 4
    logprobs = _logprobs(tiny.model, apart=tiny.apart)[pairs]
    weights = torch.ones(len(logprobs))
    targets = Targets(weights=weights, owner=owner[pairs], examples=4, reference=reference[pairs])
    return objective.sums(logprobs, targets).total


def _resumed(tiny: _Tiny) -> str:
    """Base and adapter from their files give the log-probs that they had."""
    base = load.load_model(str(tiny.folder / "base"), dtype=torch.float32, device=torch.device("cpu"))
    again = adapter.attach(base, r=3, alpha=6, dropout=0.0, targets=["all-linear"], seed=2).eval()
    missing, unexpected = adapter.load_state(again, adapter.state(tiny.model))
    assert not unexpected and not [key for key in missing if "lora_" in key]
    if not tiny.apart:
        forward.choose(again, rows()[:4])
    else:
        forward.use_plain_attention(again)
        base.byeori_own_logits = tiny.model.get_base_model().byeori_own_logits
    with torch.no_grad():
        before, after = (_logprobs(model, apart=tiny.apart) for model in (tiny.model, again))
    return (
        YES
        if torch.allclose(before, after, rtol=0, atol=1e-5)
        else f"log-probs differ by {float((before - after).abs().max()):.0e}"
    )


def _four_bit(tiny: _Tiny) -> str:
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    base = load_streamed.load_streamed(str(tiny.folder / "base"), dtype=torch.float32, processes=alone, bits=4)
    model = _adapted(base)
    why = forward.choose(model, rows()[:4])
    loss, gradients = _gradients(model, -_logprobs(model, apart=bool(why)).sum())
    return YES if bool(torch.isfinite(loss).all()) and float(gradients.norm()) > 0 else "no gradient"


def _merged(tiny: _Tiny) -> str:
    """Every tensor of the merged folder, as transformers loads it, is that of PEFT's own merge."""
    tiny.model.save_pretrained(tiny.folder / "adapter")
    merge(
        adapter=tiny.folder / "adapter", base=str(tiny.folder / "base"), output_dir=tiny.folder / "merged", verify=False
    )
    found = load.load_model(str(tiny.folder / "merged"), dtype=torch.float32, device=torch.device("cpu")).state_dict()
    for key, value in tiny.model.merge_and_unload().state_dict().items():
        if not torch.allclose(found[key], value, rtol=1e-4, atol=1e-5):
            return f"{key} differs by {float((found[key] - value).abs().max()):.0e}"
    return YES


def _generated(tiny: _Tiny) -> str:
    """Greedy answers of two prompts at once are those of one forward pass after the other."""
    forward.use_plain_attention(tiny.model)
    prompts = [list(rows()[0].token_ids[:12]), list(rows()[3].token_ids[:9])]
    answers: dict[int, list[int]] = {}
    decode.decode(
        tiny.model,
        prompts,
        decode.Choice(),
        rows=[0, 1],
        limits=[5, 5],
        on_row=answers.__setitem__,
        pad=0,
        stop_ids=[],
        ended=lambda ids: False,
        stop_strings=None,
    )
    for at, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(tiny.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if answers[at] != ids[len(prompt) :]:
            return f"answer {answers[at]} instead of {ids[len(prompt) :]}"
    return YES


def _planned(tiny: _Tiny) -> str:
    how = rehearsal.Adapter(r=3, alpha=6, dropout=0.0, targets=("all-linear",))
    config = copy.deepcopy(tiny.config)  # as its file has it
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        part._attn_implementation = None
    architecture = rehearsal.architecture(config)
    rehearsal.rehearse(architecture, how, rows(), dtype=torch.float32, device="cpu")
    return YES


CELLS: dict[str, Callable[[_Tiny], str]] = {
    "SFT, DPO": _steps,
    "resume": _resumed,
    "4 bit": _four_bit,
    "generate": _generated,
    "plan": _planned,
    "merge": _merged,  # last: it changes the model
}
