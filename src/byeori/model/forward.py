"""Forest -> log-probs at its targets, through any causal model of transformers.

Attention runs on the forest (kernels/forest_attention.py), layers that carry a state run node by node
(kernels/state_layers.py), and attention that chooses its keys by scores gets the forest as a mask. Which models that
works for is found by trying; the others run one example at a time.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.batch.forest import Forest
from byeori.data.tokenize import Example
from byeori.errors import ByeoriError, ModelError
from byeori.kernels import device_kind, dispatch, forest_attention, patch, state_layers
from byeori.kernels.lm_head import SIZES, target_logprobs
from byeori.model import load, sharding, text_model
from byeori.model.device_batch import DeviceBatch, place
from byeori.model.text_model import text_config

# Kinds of layers with states.
_STATES = {"linear_attention", "conv", "mamba", "recurrent"}
# Tokens of the rows that `choose` tries: a shared prefix, and two branches after it.
_TRIED_PREFIX, _TRIED_BRANCH = 40, 8
_CHECKED = 64  # targets of a row that are compared to the model's own


class _DiffersError(ModelError):
    """The log-probs differ from those of the model's own code."""


def use_forest_attention(model: Any, *, paths: bool = False) -> bool:
    """Switch the model to forests; return False if its attention cannot be switched. Whether it works: `choose`.

    paths: layers that carry a state run over whole paths.
    """
    causal = load.base_of(model)
    if _takes_mask(causal):
        use_plain_attention(model)
        return True
    try:
        _set_attention(model, forest_attention.NAME)
    except (ValueError, ImportError):
        return False
    text = text_config(causal.config)
    if state_layers.attach(causal, paths=paths):
        return True
    own = getattr(causal, "_is_stateful", False) or _STATES & set(getattr(text, "layer_types", None) or ())
    if own or text._attn_implementation != forest_attention.NAME:  # states of another kind would cross branches
        use_plain_attention(model)
        return False
    return True


def _takes_mask(causal: Any) -> bool:
    """Whether its attention chooses keys by scores under the causal mask (DeepSeek V3.2's sparse attention).

    Of a mask of the forest, where a query sees its own path, it chooses what it would of that path alone.
    """
    text = text_config(causal.config)
    return isinstance(getattr(text, "index_topk", None), int) and not getattr(text, "sliding_window", None)


def _set_attention(model: Any, name: str) -> None:
    with load.quiet():  # transformers warns where it cannot
        load.base_of(model).set_attn_implementation(name)


def use_plain_attention(model: Any) -> None:
    """Switch back to PyTorch's attention for generation, or to the model's own if it does not support that."""
    causal = load.base_of(model)
    _set_attention(model, "sdpa" if getattr(causal, "_supports_sdpa", False) else "eager")


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Generate inside with a model that is being trained on forests; afterwards its attention is as before."""
    before = text_config(load.base_of(model).config)._attn_implementation
    use_plain_attention(model)
    try:
        yield
    finally:
        _set_attention(model, before)


def compute_device(model: Any) -> torch.device:
    """Return the device of the adapters, where the model computes; sharded weights may be in the CPU's memory."""
    first = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    device: torch.device = (next(model.parameters()) if first is None else first).device
    return device


@contextmanager
def accelerated(model: Any) -> Iterator[None]:
    """Run the model with its own accelerations inside: a forward pass with its backward pass, or generation."""
    with patch.active(model, load.compute_dtype(model), compute_device(model)):
        yield


def forest_logprobs(model: Any, forest: Forest | DeviceBatch, *, plain: bool = False) -> torch.Tensor:
    """Return log p of every target of a forest, [M] float32, with gradients if they are enabled.

    plain: one pass per node, for a model without forest attention; then nodes may not have children.
    """
    with accelerated(model):
        return sharding.through(load.base_of(model), lambda: _forest_logprobs(model, forest, plain))


def _forest_logprobs(model: Any, forest: Forest | DeviceBatch, plain: bool) -> torch.Tensor:
    causal, (backbone, head) = load.base_of(model), load.parts(model)
    own = getattr(causal, "byeori_own_logits", False)  # between hidden states and logits is more than the head
    backbone = causal if own else backbone
    batch = forest if isinstance(forest, DeviceBatch) else place(forest, compute_device(model))
    index = batch.index
    if plain:
        nodes = batch.forest.nodes
        parts = [backbone(input_ids=batch.ids[:, start:end], use_cache=False) for start, end, _ in nodes]
        hidden = torch.cat([_rows(part, own) for part in parts])
    elif _takes_mask(causal):
        mask = forest_attention.dense_mask(batch.layout, load.compute_dtype(model))
        output = backbone(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask, use_cache=False)
        hidden = _rows(output, own)
    else:
        with forest_attention.using(batch.layout):
            output = backbone(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
        if not batch.layout.calls[0]:
            raise ModelError("its layers do not use transformers' attention interface")
        hidden = _rows(output, own)
        if len(hidden) < batch.forest.unique_tokens:  # the last layer computed only rows that predict something
            index = batch.index_of_rows
    if own:
        logits = hidden[index].to(dispatch.wide(hidden))
        return logits.gather(1, batch.target_ids[:, None])[:, 0] - logits.logsumexp(dim=1)
    sizes = SIZES.get(device_kind.kind(hidden), SIZES["cuda"])
    return target_logprobs(head, hidden[index], batch.target_ids, **sizes)


def _rows(output: Any, own: bool) -> torch.Tensor:
    """The logits of all tokens [T, V], or their hidden states [T, d]."""
    rows: torch.Tensor = (output.logits if own else output.last_hidden_state).squeeze(0)
    return rows


@torch.no_grad()
def plain_logprobs(model: Any, tokens: list[int], at: list[int]) -> torch.Tensor:
    """Return log p [len(at)] of the tokens at the positions `at`, by the model's own forward pass over one sequence."""
    device = compute_device(model)
    ids = torch.tensor([tokens], device=device)
    index = torch.tensor(at, device=device)
    takes = inspect.signature(type(load.base_of(model)).forward).parameters
    with accelerated(model):
        if "logits_to_keep" in takes:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=index - 1).logits[0]
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, index - 1]
    return logits.to(dispatch.wide(logits)).log_softmax(dim=-1).gather(1, ids[0, index][:, None])[:, 0]


def choose(model: Any, examples: list[Example]) -> str | None:
    """Decide by trying how training runs a model that `use_forest_attention` switched: on forests, or row by row.

    Returns None for forests, else why not. examples: some rows; a few more that share a prefix are made of the first.

    Raises:
        ModelError: if the model cannot be trained at all, see `self_check`.
    """
    causal = load.base_of(model)
    tried = [*examples, *branches(examples[0], load.positions_limit(causal.config))]
    stateful = getattr(causal, "_is_stateful", False)
    reason = "its layers keep their states to themselves" if stateful else "its attention cannot be replaced"
    ways = [*itertools.product((False, True), repeat=2)]
    if (getattr(text_config(causal.config), "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        reason, ways = "dynamic RoPE scaling depends on the length of a row", []
    for own, paths in ways:
        if not use_forest_attention(model, paths=paths):
            break
        if paths and not state_layers.note(causal):
            continue
        causal.byeori_own_logits = own
        try:
            self_check(model, tried)
            return None
        except _DiffersError:
            reason = "its layers give other results on prefixes that are shared"
        except ModelError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any model's code; what matters is whether rows one at a time work
            logging.getLogger(__name__).debug("not on forests", exc_info=error)
            reason = "its code does not run on forests"
    use_plain_attention(model)
    try:
        _check_causal(model, examples[0])
        _check_row_by_row(model, examples)
    except (ByeoriError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any model's code, once more
        logging.getLogger(__name__).debug("not on text", exc_info=error)
        raise ModelError(text_model.not_for_text(causal)) from error
    return reason


def _check_row_by_row(model: Any, examples: list[Example]) -> None:
    causal = load.base_of(model)
    try:
        causal.byeori_own_logits = False
        self_check(model, examples, plain=True)
    except ModelError:
        causal.byeori_own_logits = True
        self_check(model, examples, plain=True)


def _check_causal(model: Any, example: Example) -> None:
    """Raise unless a model's log-probs do not depend on later tokens; an encoder's do, and training would leak."""
    ids = list(example.token_ids)
    at = list(range(1, len(ids) - 1))[-_CHECKED:]
    other = [*ids[:-1], ids[0] if ids[-1] != ids[0] else ids[-1] - 1]
    training = model.training
    model.eval()
    before, after = (plain_logprobs(model, tokens, at) for tokens in (ids, other))
    model.train(training)
    if at and float((before - after).abs().max()) > 1e-3 * (1 + float(before.abs().max())):
        raise ModelError(
            "this model's attention sees later tokens, so it cannot learn to write; give a decoder like Qwen or Llama"
        )


def branches(example: Example, limit: int | None) -> list[Example]:
    """Return two rows made of one: a common prefix and different ends, every token of these a target."""
    length = _TRIED_PREFIX + 2 * _TRIED_BRANCH
    if limit is not None and limit < length:
        return []
    ids = (list(example.token_ids) * (1 + length // len(example.token_ids)))[:length]
    ends = ids[_TRIED_PREFIX:-_TRIED_BRANCH], ids[: -1 - _TRIED_BRANCH : -1]
    start = (_TRIED_PREFIX + 1, _TRIED_PREFIX + _TRIED_BRANCH)
    return [Example(token_ids=ids[:_TRIED_PREFIX] + end, targets=(start,)) for end in ends]


def _last_targets(example: Example) -> Example:
    """The example with no more targets than a check compares: logits of all words at each would be a step's peak."""
    at = [i for start, end in example.targets for i in range(start, end)][-_CHECKED:]
    return replace(example, targets=tuple((i, i + 1) for i in at), reference=None)


def self_check(model: Any, examples: list[Example], *, plain: bool = False) -> float:
    """Compute some examples as training does and by the model's own code, one at a time; return the mean difference.

    plain: training runs one sequence at a time, since the model does not support forest attention.

    Raises:
        ModelError: if they differ by more than rounding (5e-4 in float32, 0.1 in 16 bit, relative to 1 + |log p|).
    """
    training, attention = model.training, text_config(load.base_of(model).config)._attn_implementation
    examples = [_last_targets(example) for example in examples]
    model.eval()
    groups = [[example] for example in examples] if plain else [examples]
    at = [[i for start, end in example.targets for i in range(start, end)] for example in examples]
    try:
        with torch.no_grad():
            together = torch.cat([forest_logprobs(model, forests.build(group), plain=plain) for group in groups])
        if not plain:
            use_plain_attention(model)
        alone = [plain_logprobs(model, list(e.token_ids), where) for e, where in zip(examples, at, strict=True)]
        if not plain:
            _set_attention(model, attention)
    finally:
        model.train(training)
    expected = torch.cat(alone)
    difference = float(((together - expected).abs() / (1 + expected.abs())).mean())
    limit = 5e-4 if load.compute_dtype(model) in (torch.float32, torch.float64) else 0.1
    if not difference <= limit:
        raise _DiffersError(
            f"byeori's log-probs differ from those of this model's own forward pass (mean relative difference "
            f"{difference:.2g}), so it cannot train this model; please report which one it is"
        )
    return difference
