"""Write docs/models.md: every architecture of transformers that writes text, as a tiny random model (`make models`)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import model_table  # noqa: E402


def page(korean: bool, counts: dict[str, int], table: list[str]) -> str:
    """Return docs/models.md in one language."""
    version = transformers.__version__
    if korean:
        intro = f"""# 모델

transformers {version}에 등록된 인과 언어 모델과 이미지-텍스트 모델의
모든 아키텍처를 아주 작은 무작위 모델로 만들어 돌려 본 결과입니다.
`make models`가 이 페이지를 만듭니다.

- {counts["shared"]}종은 겹치는 앞부분을 공유하고, {counts["apart"]}종은 한 행씩
  학습하며, {counts["planned"]}종은 계획할 수 있습니다. 나머지
  {counts["refused"]}종은 아래 문장과 함께 거절합니다.
- {counts["left"]}종은 기본 설정을 작게 줄일 수 없었거나 이미지, 음성,
  별도 패키지가 있어야 실행되어 표에 없습니다.
- *exact*: 손실과 전체 그래디언트가 모델 자체 코드로 한 행씩 계산한 값과
  얼마나 다른지 나타냅니다(float32, 상대 오차 최댓값).
"""
    else:
        intro = f"""# Models

Every architecture in transformers {version}'s mappings for causal language models and for images and text, as a tiny
random model; `make models` writes this page.

- {counts["shared"]} share prefixes, {counts["apart"]} train row by row, {counts["planned"]} are planned;
  {counts["refused"]} are refused with the sentence below.
- {counts["left"]} more are not in the table: their default configuration could not be made small, or they need images,
  audio or a package to run at all.
- *exact*: the largest relative difference of the loss and of all gradients to the model's own code, one row at a time,
  in float32.
"""
    return "\n".join([intro, "| model_type | trains | exact | plan |", "|---|---|---|---|", *table]) + "\n"


def main() -> None:
    """Try all of them; takes a few minutes."""
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    tried = [model_table.row(name) for name in model_table.NAMES]
    rows = [row for row in tried if row.built]
    counts = {
        "shared": sum(row.trains.startswith("shared") for row in rows),
        "apart": sum(row.trains.startswith("row by row") for row in rows),
        "planned": sum(row.plan == model_table.YES for row in rows),
        "refused": sum(row.exact is None for row in rows),
        "left": len(tried) - len(rows),
    }
    table = [
        f"| {row.name} | {row.trains} | {'' if row.exact is None else f'{row.exact:.0e}'} | {row.plan} |"
        for row in rows
    ]
    for korean, name in ((False, "models.md"), (True, "models.ko.md")):
        (ROOT / "docs" / name).write_text(page(korean, counts, table), encoding="utf-8")
    print(f"{len(rows)} architectures in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
