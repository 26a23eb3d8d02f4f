"""The name of every file in a folder that byeori writes, and of those of others that it looks for there."""

from __future__ import annotations

# an adapter, as PEFT names it, and a model, as transformers does
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARD = "README.md"

# next to an adapter and in its checkpoints
TEMPLATE = "template.txt"
SETTINGS = "byeori.yaml"
BASE = "byeori_base.json"
VERSIONS = "versions.json"

# of a checkpoint
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"

# of a run
LOG = "train_log.jsonl"
LIVE = "live.html"
ORDER = "order.json"
AUDIT = "audit.json"
PLAN = "plan.json"
TRACKERS = "trackers.json"

# of a comparison and of a merged model
METRICS = "metrics.json"
ROWS = "rows.jsonl"
REPORT = "report.html"
MERGE_REPORT = "merge_report.json"

# of an export
EXPORT_REPORT = "export_report.json"
MODELFILE = "Modelfile"
