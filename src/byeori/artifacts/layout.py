"""The name of every file in a folder that byeori writes."""

from __future__ import annotations

TEMPLATE = "template.txt"
SETTINGS = "byeori.yaml"
BASE = "byeori_base.json"
AUDIT = "audit.json"
METRICS = "metrics.json"
CARD = "README.md"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
LOG = "train_log.jsonl"
ROWS = "rows.jsonl"  # of a comparison
