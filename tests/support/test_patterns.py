"""Patterns of strangers end: the time to compare a name with one is bounded."""

from __future__ import annotations

import time

import pytest

from byeori.support import patterns

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    "pattern", ["q_proj", r".*\.layers\.\d+\.(mlp|self_attn)\..*", r"(?:.*?(?:language|text).*?)|x", ""]
)
def test_what_peft_uses(pattern: str) -> None:
    assert patterns.problem(pattern, NAMES) is None


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9])*)*Z", ".*" * 12 + "Z", "(.|[a-z_0-9.])+Z"])
def test_a_pattern_that_takes_for_ever(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    began = time.process_time()
    why = patterns.problem(pattern, NAMES)
    assert why and "for ever" in why
    assert time.process_time() - began < 2


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(?P<x", "(" * 5000 + ")" * 5000, "a{99999999999}", "[" * 99])
def test_no_pattern_at_all(pattern: str) -> None:
    assert "is no regular expression" in (patterns.problem(pattern, NAMES) or "")
