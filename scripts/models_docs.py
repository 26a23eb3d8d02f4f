"""Write docs/models.md: every architecture of transformers that writes text, as a tiny random model (`make models`).

python scripts/models_docs.py               all of them, on two cores (JOBS=1: one); a stopped run goes on where it was
python scripts/models_docs.py llama qwen3   these alone, the other rows of the page stay
python scripts/models_docs.py --kept        none: the page of the rows that a stopped run left, and of its former ones

Rows are computed by processes that this one starts, and kept in models-output/ until the page is written. A row that
takes longer than LIMIT stops its process and gets a sentence.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "tests" / "fixtures" / "models.json"
KEPT = ROOT / "models-output"
LIMIT = 600  # seconds
AT_ONCE = 20  # rows of a process; hundreds of classes fill it
sys.path.insert(0, str(ROOT / "tests" / "helpers"))


def compute(names: list[str]) -> None:
    """Write the rows of these architectures; one that is begun and not ended has no seconds."""
    import torch
    import transformers

    import model_table

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started_by = os.getppid()
    for name in names:
        if os.getppid() != started_by:  # which was stopped
            return
        start, path = time.perf_counter(), KEPT / f"{name}.json"
        if path.exists():  # another process of the same run has it
            continue
        begun = model_table.Row(name=name, trains=f"did not end within {LIMIT} s", built=False, cells={})
        path.write_text(json.dumps(asdict(begun)))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        row = asdict(model_table.row(name))
        faulthandler.cancel_dump_traceback_later()
        path.write_text(json.dumps(row | {"seconds": time.perf_counter() - start}, ensure_ascii=False))
        print(f"{len(list(KEPT.iterdir()))} rows: {name}", file=sys.stderr, flush=True)


def computed(names: list[str]) -> None:
    """Have a process compute the rows that are missing, and another one go on where a row ended it."""
    while left := [name for name in names if not (KEPT / f"{name}.json").exists()]:
        subprocess.run([sys.executable, __file__, "--rows", *left], check=False)
        if not (KEPT / f"{left[0]}.json").exists():
            raise SystemExit("the process for the rows does not start")


def page(korean: bool, found: list[dict[str, Any]]) -> str:
    """Return docs/models.md in one language."""
    import transformers

    rows = [row for row in found if row["built"]]
    trained = [row for row in rows if row["exact"] is not None]
    shared = sum(row["trains"].startswith("shared") for row in trained)
    left = {row["name"]: row["trains"] for row in found if not row["built"]}
    cells = list(max((row["cells"] for row in trained), key=len))
    whole = [row for row in trained if len(row["cells"]) == len(cells)]
    yes = sum(cell == "yes" for row in whole for cell in row["cells"].values())
    counts = {
        "version": transformers.__version__,
        "trained": len(trained),
        "shared": shared,
        "apart": len(trained) - shared,
        "refused": len(rows) - len(trained),
        "yes": yes,
        "of": len(whole) * len(cells),
        "minutes": round(sum(row.get("seconds", 0) for row in whole) / 60),
        "left": len(left),
    }
    intro = (KOREAN if korean else ENGLISH).format(**counts)
    if older := len(trained) - len(whole):
        intro += (KOREAN_OLDER if korean else ENGLISH_OLDER).format(older=older, whole=len(whole))
    head = ["model_type", "trains", "exact", *cells]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        exact = "" if row["exact"] is None else f"{row['exact']:.0e}"
        texts = [row["name"], row["trains"], exact, *(row["cells"].get(cell, "") for cell in cells)]
        lines.append(f"| {' | '.join(texts)} |")
    names = "빠진 모델" if korean else "Not in the table"
    lines += ["", f"## {names}", "", *(f"- {name}: {why}" for name, why in left.items())]
    return intro + "\n" + "\n".join(lines) + "\n"


ENGLISH = """# Models

Every architecture in transformers {version}'s mappings for causal language models and for images and text, as a tiny
random model; `make models` writes this page.

- {trained} train: {shared} share prefixes, {apart} run row by row, for the reason in the table. {refused} are refused
  with the sentence there. {yes} of {of} cells of those that train are yes; they took {minutes} minutes of one process.
- *exact*: the largest relative difference of the loss and of all gradients to the model's own code, one row at a time,
  in float32.
- *SFT, DPO*: a step of each makes its loss smaller. *resume*: base and adapter from their files give the log-probs
  that they had. *4 bit*: loaded with `--load_in_4bit`, with gradients. *generate*: greedy answers of a batch are those
  of one forward pass after the other. *plan*: `byeori plan` rehearses a step. *merge*: the merged weights are PEFT's.
- {left} more are not in the table; the list below says why.
"""
ENGLISH_OLDER = """- {older} rows are those of an earlier table, which had *exact* and *plan* alone; the cells
  counted are of the other {whole}.
"""
KOREAN_OLDER = """- {older}행은 *exact*와 *plan*만 있던 이전 표의 것입니다.
  칸의 수는 나머지 {whole}행에서 센 것입니다.
"""
KOREAN = """# 모델

transformers {version}에 등록된 인과 언어 모델과 이미지-텍스트 모델의
모든 아키텍처를 아주 작은 무작위 모델로 만들어 돌려 본 결과입니다.
`make models`가 이 페이지를 만듭니다.

- {trained}종을 학습할 수 있습니다. {shared}종은 겹치는 앞부분을 공유하고,
  {apart}종은 표에 적힌 이유로 한 행씩 학습합니다. {refused}종은 표의 문장과
  함께 거절합니다. 학습하는 모델의 칸 {of}개 가운데 {yes}개가 yes이고,
  프로세스 하나로 {minutes}분 걸렸습니다.
- *exact*: 손실과 전체 그래디언트가 모델 자체 코드로 한 행씩 계산한 값과
  얼마나 다른지 나타냅니다(float32, 상대 오차 최댓값).
- *SFT, DPO*: 한 스텝 뒤에 손실이 줄어듭니다. *resume*: 파일에서 다시 읽은
  기본 모델과 어댑터가 같은 로그 확률을 냅니다. *4 bit*: `--load_in_4bit`로
  불러와도 그래디언트가 나옵니다. *generate*: 배치로 만든 답이 한 토큰씩
  계산한 답과 같습니다. *plan*: `byeori plan`이 한 스텝을 계산합니다.
  *merge*: 병합한 가중치가 PEFT로 병합한 것과 같습니다.
- {left}종은 표에 없습니다. 이유는 맨 아래에 있습니다.
"""


def main() -> None:
    """Compute all rows or those that are named, and write the page."""
    import model_table

    kept = sys.argv[1:] == ["--kept"]
    names = [] if kept else sys.argv[1:] or list(model_table.NAMES)
    KEPT.mkdir(exist_ok=True)
    for path in KEPT.iterdir():
        if "seconds" not in json.loads(path.read_text()):  # stopped in the middle of it
            path.unlink()
    os.environ["OMP_NUM_THREADS"] = "1"
    groups = [names[at : at + AT_ONCE] for at in range(0, len(names), AT_ONCE)]
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        list(pool.map(computed, groups))
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in KEPT.iterdir()}
    known = {row["name"]: row for row in json.loads(FOUND.read_text())} if sys.argv[1:] and FOUND.exists() else {}
    known |= rows if kept else {name: rows[name] for name in names}
    found = [known[name] for name in sorted(known)]
    FOUND.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for korean, name in ((False, "models.md"), (True, "models.ko.md")):
        (ROOT / "docs" / name).write_text(page(korean, found), encoding="utf-8")
    if not kept:
        shutil.rmtree(KEPT)
    seconds = sum(rows[name].get("seconds", LIMIT) for name in names)
    print(f"{len(names)} architectures in {seconds:.0f} s of one process")


if __name__ == "__main__":
    compute(sys.argv[2:]) if sys.argv[1:2] == ["--rows"] else main()
