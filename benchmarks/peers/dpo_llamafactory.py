"""LLaMA-Factory's DPO; the reference is the model with its adapter off, computed in the step."""

from __future__ import annotations

import sft_llamafactory

if __name__ == "__main__":
    sft_llamafactory.main("dpo")
