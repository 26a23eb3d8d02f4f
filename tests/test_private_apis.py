"""Every private or internal name of another library that src/ uses, exercised, with what to do when it goes.

A release that renames one of them fails here, by name, instead of in the middle of a run. A name that src/ uses and the
table lacks fails as well, and so does a name that the table has and src/ does not use any more.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2.sandbox
import pytest
import torch

from tiny_models import tiny_llama

SOURCE = Path(__file__).parents[1] / "src" / "byeori"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
_OF_NAMED_TUPLES = ("_asdict", "_fields", "_replace")


class Private(NamedTuple):
    """use: exercises the name and raises or returns False if it is gone. remedy: what to do then."""

    use: Callable[[], Any]
    remedy: str


def own_feature() -> bool:
    """A feature of one's own is read back by its name, decoded."""
    import datasets

    from byeori.data.json_values import JsonValue

    features = datasets.Features.from_dict(datasets.Features({"a": JsonValue()}).to_dict())
    rows = datasets.Dataset.from_dict({"a": [[0.1234567890123456, "x"]]}, features=features)
    return rows[0] == {"a": [0.1234567890123456, "x"]} == next(iter(rows)) and rows["a"][:] == [rows[0]["a"]]


def chat_environment() -> bool:
    from transformers.utils import chat_template_utils

    return chat_template_utils.ImmutableSandboxedEnvironment is jinja2.sandbox.ImmutableSandboxedEnvironment


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(2, 2)


def llama() -> Any:
    return tiny_llama(20)


def auto_names(task: str) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return names


def operator_arguments(name: str) -> set[str]:
    return {argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments}


def deterministic() -> bool:
    before = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    inside = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(before, warn_only=False)
    return inside


def default_store() -> bool:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = dist.distributed_c10d._get_default_store()
        return [store.add("name", 1), store.add("name", 1)] == [1, 2]
    finally:
        dist.destroy_process_group()


def local_shape() -> bool:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = compute_local_shape_and_global_offset(torch.Size([6, 2]), init_device_mesh("cpu", (1,)), [Shard(0)])
        return [tuple(part) for part in found] == [(6, 2), (0, 0)]
    finally:
        dist.destroy_process_group()


def scaled_gradients() -> bool:
    gradients = [torch.ones(2), torch.ones(3)]
    torch._foreach_mul_(gradients, 0.5)
    return all(float(gradient.sum()) == 0.5 * len(gradient) for gradient in gradients)


def fingerprints() -> bool:
    import datasets

    one, same, other = (datasets.Dataset.from_dict({"a": [number]}) for number in (1, 1, 2))
    return one._fingerprint == same._fingerprint != other._fingerprint


def selected_lines() -> bool:
    import datasets

    whole = datasets.Dataset.from_dict({"a": [5, 6, 7]})
    chosen = whole.select([2, 0])
    taken = chosen.data.column("a").take(chosen._indices.column(0)).to_pylist()
    return whole._indices is None and taken == [7, 5]


def dispatch_mode() -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        torch.ones(2).add_(1)
    return "aten::add_" in names


def no_first_values() -> bool:
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return linear().weight.is_meta


def attention_interface() -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def function(*given: Any, **named: Any) -> None:
        pass

    ALL_ATTENTION_FUNCTIONS["byeori_test"] = function
    found = ALL_ATTENTION_FUNCTIONS["byeori_test"] is function
    del ALL_ATTENTION_FUNCTIONS["byeori_test"]
    return found


def conversion() -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(llama())
    kinds = (WeightConverter, WeightRenaming, rename_source_key)
    ordered = sorted(["e.10.w", "e.9.w"], key=dot_natural_key)
    return isinstance(mapping, list) and all(map(callable, kinds)) and ordered == ["e.9.w", "e.10.w"]


def taken_apart() -> bool:
    from transformers.core_model_loading import revert_weight_conversion

    weight = torch.zeros(2, 2)
    return revert_weight_conversion(llama(), {"model.norm.weight": weight})["model.norm.weight"] is weight


def old_expert_names() -> bool:
    """Names of layers in models without experts stay."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=["gate_proj"])
    convert_peft_config_for_transformers(config, model=llama(), conversions=None)
    return not config.target_parameters and set(config.target_modules) == {"gate_proj"}


def adapter_stays() -> bool:
    """Set on a layer, it is called with the adapter's name and does nothing: the adapter stays where it is."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in get_peft_model(llama(), LoraConfig()).modules() if isinstance(m, BaseTunerLayer)]
    return bool(layers) and all(callable(layer._move_adapter_to_device_of_base_layer) for layer in layers)


def trackers() -> bool:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {"tensorboard", "wandb", "mlflow", "trackio"} <= set(LOGGER_TYPE_TO_CLASS)


def paged_optimizer() -> bool:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW

    return callable(AdamW)


def pattern_key() -> bool:
    from peft.utils.other import get_pattern_key

    return get_pattern_key(["q_proj"], "layers.0.q_proj") == "q_proj"


def expert_wrapper() -> bool:
    from peft.tuners.lora.layer import ParamWrapper

    return callable(ParamWrapper._activate_lora)


def tuner_layer() -> bool:
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    return issubclass(Linear, BaseTunerLayer)


def conv1d() -> bool:
    from transformers.pytorch_utils import Conv1D

    return tuple(Conv1D(3, 2).weight.shape) == (2, 3)


def quiet_bars() -> bool:
    from transformers.utils import logging

    return isinstance(logging.is_progress_bar_enabled(), bool) and callable(logging.disable_progress_bar)


_FLASH = "kernels/cuda_attention.py: adapt the calls, or let supports() be False, for PyTorch's sdpa"
_FLASH_ARGUMENTS = {"cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal", "window_size_left", "window_size_right"}
_CONFIG = "model/load.py: load_config clears what config.json says about kernels; find where it is kept now"
_MODULE = "torch.nn.Module's tables of tensors: use get_parameter/register_parameter and named_buffers instead"
_ATTENTION = "model/forward.py: find the new flag; the self-check refuses models that compute something else"
_META = "plan/memory_tracker.py and meta_ops.py: let the rehearsal treat the operator like any other"
_CLASSES = "model/text_model.py: find out in another way which class a checkpoint is of"
_CONVERSION = "export/merge_plan.py: map the names of files to those of the model by the new functions"

TABLE: dict[str, Private] = {
    "transformers.utils.chat_template_utils": Private(
        chat_environment, "data/bounded_jinja.py: find where apply_chat_template makes its Jinja environment"
    ),
    "_generate": Private(
        lambda: callable(jinja2.Environment._generate), "data/bounded_jinja.py: change the parsed template elsewhere"
    ),
    "_C": Private(deterministic, "kernels/cuda_attention.py: use torch.use_deterministic_algorithms around the kernel"),
    "_set_deterministic_algorithms": Private(
        deterministic, "kernels/cuda_attention.py: use torch.use_deterministic_algorithms around the kernel"
    ),
    "_attn_implementation": Private(lambda: llama().config._attn_implementation, _CONFIG),
    "_experts_implementation": Private(lambda: llama().config._experts_implementation, _CONFIG),
    "_buffers": Private(lambda: linear()._buffers == {}, _MODULE),
    "_modules": Private(lambda: torch.nn.Sequential(linear())._modules["0"], _MODULE),
    "_parameters": Private(lambda: set(linear()._parameters) == {"weight", "bias"}, _MODULE),
    "_non_persistent_buffers_set": Private(lambda: linear()._non_persistent_buffers_set == set(), _MODULE),
    "_load_state_dict_post_hooks": Private(
        lambda: linear()._load_state_dict_post_hooks == {},
        "model/sharding.py: hide FSDP's hooks from PEFT in another way, or let PEFT see shards",
    ),
    "_cdata": Private(
        lambda: isinstance(torch.ones(1).untyped_storage()._cdata, int),
        "plan/memory_tracker.py: tell storages apart by another number that is not reused while they live",
    ),
    "datasets.features.features.register_feature": Private(
        own_feature, "data/json_values.py: datasets' own Json, which changes the last digit of fractions"
    ),
    "_disable_dynamo": Private(
        lambda: torch._disable_dynamo(lambda value: value)(1) == 1,
        "kernels/forest_attention.py, state_layers.py: torch.compiler.disable, which imports the compiler at once",
    ),
    "_fingerprint": Private(
        fingerprints, "data/tokenized.py: hash the rows themselves to find out whether a cached table is of them"
    ),
    "_indices": Private(
        selected_lines, "data/tokenized.py: read columns with table.with_format('arrow'), slower and in more memory"
    ),
    "_flash_attention_forward": Private(
        lambda: operator_arguments("_flash_attention_forward") >= _FLASH_ARGUMENTS, _FLASH
    ),
    "_flash_attention_backward": Private(
        lambda: operator_arguments("_flash_attention_backward") >= _FLASH_ARGUMENTS, _FLASH
    ),
    "_scaled_dot_product_flash_attention": Private(
        lambda: "scale" in operator_arguments("_scaled_dot_product_flash_attention"),
        "kernels/forest_attention.py: rehearse attention with the operator that sdpa calls on a GPU now",
    ),
    "_foreach_mul_": Private(scaled_gradients, "train/trainer.py: multiply the gradients one by one"),
    "_version": Private(
        lambda: (value := torch.ones(1)).add_(1)._version > torch.ones(1)._version and value is not None,
        "kernels/lora_linear.py: compute DoRA's lengths for every token",
    ),
    "_get_default_store": Private(
        default_store, "distributed/processes.py: keep the store that init_process_group is given"
    ),
    "_grouped_mm": Private(lambda: operator_arguments("_grouped_mm") >= {"self", "mat2"}, _META),
    "_local_scalar_dense": Private(lambda: torch.ops.aten._local_scalar_dense, _META),
    "_schema": Private(lambda: torch.ops.aten.add.Tensor._schema.name == "aten::add", _META),
    "_is_mkldnn_bf16_supported": Private(
        lambda: isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool),
        "kernels/bf16_matmul.py: ask for bf16 units in another way; without it CPUs compute in float32, slower",
    ),
    "_is_stateful": Private(lambda: llama()._is_stateful is False, _ATTENTION),
    "_supports_sdpa": Private(lambda: llama()._supports_sdpa, _ATTENTION),
    "_keep_in_fp32_modules_strict": Private(
        lambda: hasattr(llama(), "_keep_in_fp32_modules_strict"),
        "model/load_streamed.py: find out which modules transformers keeps in float32",
    ),
    "_no_split_modules": Private(
        lambda: "LlamaDecoderLayer" in llama()._no_split_modules,
        "model/wrap.py: find the decoder's layers by their ModuleList",
    ),
    "accelerate.tracking.LOGGER_TYPE_TO_CLASS": Private(trackers, "train/log.py: list the trackers there"),
    "peft.tuners.tuners_utils.BaseTunerLayer": Private(
        tuner_layer, "export/merge_check.py: find PEFT's layers by get_base_layer"
    ),
    "transformers.core_model_loading.revert_weight_conversion": Private(
        taken_apart, "export/expert_changes.py: refuse adapters on experts whose base stores them one by one"
    ),
    "peft.utils.transformers_weight_conversion": Private(
        old_expert_names,
        "model/adapter.py: see where PEFT renames an adapter's tensors; test_adapter.py has two models",
    ),
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": Private(
        old_expert_names, "model/experts.py: if PEFT converts no names any more, old_names is always empty"
    ),
    "_activate_lora": Private(
        expert_wrapper,
        "kernels/quantized_experts.py: open quantized experts around PEFT's forward pass in another way",
    ),
    "peft.utils.other.get_pattern_key": Private(
        pattern_key, "export/merge_plan.py: copy the function, which matches rank_pattern and alpha_pattern"
    ),
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": Private(
        local_shape, "model/sharding.py: compute this process's rows from the mesh, by chunks of equal size"
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": Private(
        dispatch_mode, "plan/meta_ops.py: the rehearsal sees operators through it; use its new place"
    ),
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": Private(
        lambda: auto_names("CAUSAL_LM")["llama"] == "LlamaForCausalLM", _CLASSES
    ),
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": Private(
        lambda: auto_names("IMAGE_TEXT_TO_TEXT")["gemma3"] == "Gemma3ForConditionalGeneration", _CLASSES
    ),
    "_scaled_dot_product_attention_math": Private(
        lambda: torch.ops.aten._scaled_dot_product_attention_math(*torch.zeros(3, 1, 1, 2, 4)),
        "kernels/forest_attention.py: find the operator that PyTorch's attention runs where no fused kernel fits",
    ),
    "transformers.conversion_mapping.get_model_conversion_mapping": Private(conversion, _CONVERSION),
    "transformers.core_model_loading.WeightConverter": Private(conversion, _CONVERSION),
    "transformers.core_model_loading.WeightRenaming": Private(conversion, _CONVERSION),
    "transformers.core_model_loading.dot_natural_key": Private(conversion, _CONVERSION),
    "transformers.core_model_loading.rename_source_key": Private(conversion, _CONVERSION),
    "_move_adapter_to_device_of_base_layer": Private(
        adapter_stays, "export/merge_check.py: keep PEFT from moving adapters to the meta device in another way"
    ),
    "transformers.initialization.no_init_weights": Private(
        no_first_values, "model/adapter.py: drop it; the rehearsal then draws first values, which takes longer"
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": Private(
        attention_interface, "kernels/forest_attention.py: register with the new attention interface"
    ),
    "transformers.pytorch_utils.Conv1D": Private(conv1d, "model/adapter.py, export/merge_plan.py: GPT-2's layers"),
    "transformers.utils.logging": Private(quiet_bars, "model/load.py: silence transformers in another way"),
}
# Public names whose behaviour is relied on beyond their documentation.
BEHAVIOUR: dict[str, Private] = {
    "bitsandbytes.optim.AdamW": Private(paged_optimizer, "train/optim.py: use the new name of the paged optimizer"),
    "torch.library.get_kernel": Private(
        lambda: torch.library.get_kernel("aten::mm", "CPU").call_boxed,
        "kernels/bf16_matmul.py: without PyTorch's own kernel, override in Python and call it for other types",
    ),
    "torch.nn.utils.get_total_norm": Private(
        lambda: float(torch.nn.utils.get_total_norm([torch.ones(4)])) == 2.0, "train/trainer.py: sum the squares there"
    ),
    "peft.import_utils.is_bnb_available": Private(
        lambda: __import__("peft").import_utils.is_bnb_available.cache_clear,
        "model/adapter.py: hide bitsandbytes from PEFT in another way, or let PEFT import it",
    ),
    "torch.utils.deterministic.fill_uninitialized_memory": Private(
        lambda: isinstance(torch.utils.deterministic.fill_uninitialized_memory, bool),
        "kernels/cuda_attention.py: its deterministic mode would fill memory for nothing",
    ),
    "a layer wrapped twice is checkpointed once": Private(
        lambda: "is_outermost" in Path(__import__("transformers").modeling_layers.__file__).read_text(),
        "model/sharding.py: FSDP's subclass of a layer would run activation checkpointing twice",
    ),
}


@pytest.mark.parametrize("name", [*TABLE, *BEHAVIOUR])
def test_the_name_does_what_it_is_used_for(name: str) -> None:
    private = (TABLE | BEHAVIOUR)[name]
    try:
        works = private.use()
    except (AttributeError, ImportError, KeyError, TypeError, RuntimeError) as error:
        pytest.fail(f"{name} is gone ({error}). {private.remedy}")
    assert works, f"{name} has changed. {private.remedy}"


def names_in(tree: ast.AST) -> Iterator[str]:
    """Private attributes of anything but self, and imports from inside other libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            inside = any(part.startswith("_") for part in node.module.split("."))
            if inside or ("." in node.module and not node.module.startswith("torch.")):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_table_is_complete() -> None:
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for name in names_in(ast.parse(path.read_text(encoding="utf-8"))):
            private = name.startswith("_") and not name.startswith("__") and name not in _OF_NAMED_TUPLES
            if private or "." in name:
                found.setdefault(name, path.relative_to(SOURCE).as_posix())
    missing = {name: path for name, path in found.items() if name not in TABLE}
    assert not missing, "private names without an entry in the table"
    assert not set(TABLE) - set(found), "entries that src/ does not use any more"
