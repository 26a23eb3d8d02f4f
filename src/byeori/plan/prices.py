"""What a GPU costs an hour: prices.csv in this folder, a list of `byeori plan --update-prices`, or a user's file.

Every price has a provider, a date and a source. One older than STALE_DAYS still counts, and the plan says so.
"""

from __future__ import annotations

import csv
import datetime
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support import atomic_files, cache_folder
from byeori.support.suggestions import nearest
from byeori.support.text_files import read_text
from byeori.support.yaml_files import yaml_mapping

STALE_DAYS = 60
KINDS = ("on-demand", "secure", "spot")
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """US dollars an hour for one GPU. kind: one of KINDS; secure is a dearer tier of the same provider.

    least: how many GPUs the provider rents at once, and multiples of it. date: ISO 8601, empty if unknown.
    """

    gpu: str
    provider: str
    usd_per_gpu_hour: float
    kind: str = "on-demand"
    least: int = 1
    source: str = ""
    date: str = ""


def today() -> datetime.date:
    """Return the date by which prices are stale."""
    return datetime.date.today()


def stale(price: Price) -> bool:
    """Return whether a price is older than STALE_DAYS."""
    return bool(price.date) and (today() - datetime.date.fromisoformat(price.date)).days > STALE_DAYS


def cached() -> Path:
    """Return the file that `--update-prices` writes."""
    return cache_folder.cache_folder() / "prices.csv"


def read(file: str | None, gpus: Sequence[str], provider: str | None = None) -> tuple[Price, ...]:
    """Return all prices, or those of one provider; a user's file replaces those of the GPUs that it names.

    file: a table like prices.csv, or YAML: `H100: 2.5` or `H100: {usd_per_hour: 2.5, source: ..., date: ...}`.
    gpus: the known names.

    Raises:
        ConfigError: if a file cannot be read, names an unknown GPU or holds no price, or there is no such provider.
    """
    shipped = cached() if cached().is_file() else _HERE / "prices.csv"
    known = _table(shipped, gpus)
    if file:
        own = _table(Path(file), gpus) if Path(file).suffix == ".csv" else _yaml(file, gpus)
        named = {price.gpu for price in own}
        known = [*own, *(price for price in known if price.gpu not in named)]
    if provider:
        names = sorted({price.provider for price in known if price.provider}, key=str.lower)
        known = [price for price in known if price.provider.lower() == provider.lower()]
        if not known:
            near = nearest(provider.lower(), [name.lower() for name in names])
            raise ConfigError(f"no prices of {provider!r} are known{near}; the known providers are {', '.join(names)}")
    return tuple(sorted(known, key=lambda price: price.usd_per_gpu_hour))


def offers(prices: Iterable[Price], gpu: str, count: int = 1, *, spot: bool = False) -> list[Price]:
    """Return what `count` of a GPU can be rented for, the cheapest first."""
    fitting = [price for price in prices if price.gpu == gpu and not count % price.least]
    return [price for price in fitting if (price.kind == "spot") == spot]


def _table(path: Path, gpus: Sequence[str]) -> list[Price]:
    prices = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path, ConfigError))), 2):
            where = f"{path} line {number}"
            kind, least = row.get("kind") or "on-demand", row.get("least") or "1"
            if kind not in KINDS or not re.fullmatch("[1-9][0-9]{0,4}", least):
                raise ConfigError(f"{where}: kind is one of {', '.join(KINDS)}, and least a number of GPUs")
            values = {name: row.get(name) or "" for name in ("provider", "source")}
            gpu, usd = row.get("gpu") or "", row.get("usd_per_gpu_hour")
            common: dict[str, Any] = {"gpu": gpu, "usd": usd, "date": row.get("date"), "where": where, "gpus": gpus}
            prices.append(_price(**common, kind=kind, least=int(least), **values))
    except (OSError, csv.Error) as error:
        raise ConfigError(f"cannot read the prices file {path}: {error}") from None
    if not prices:
        raise ConfigError(f"{path} holds no prices; its columns are {', '.join(f.name for f in fields(Price))}")
    return prices


def _yaml(file: str, gpus: Sequence[str]) -> list[Price]:
    entries = yaml_mapping(file, what="prices", advice="write lines like H100: 2.5")
    prices = []
    for gpu, entry in entries.items():
        values = entry if isinstance(entry, dict) else {"usd_per_hour": entry}
        source = str(values.get("source") or file)
        common: dict[str, Any] = {
            "gpu": str(gpu),
            "usd": values.get("usd_per_hour"),
            "date": values.get("date"),
            "gpus": gpus,
        }
        prices.append(_price(**common, where=file, provider=str(values.get("provider") or ""), source=source))
    return prices


def _price(*, gpu: str, usd: object, date: object, where: str, gpus: Sequence[str], **values: Any) -> Price:
    if gpu not in [*gpus, "CPU"]:
        raise ConfigError(f"{where} names an unknown GPU {gpu!r}{nearest(gpu, list(gpus))}")
    try:
        number = math.nan if isinstance(usd, bool) else float(str(usd))
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e6:
        raise ConfigError(f"{where}: the price of {gpu} is {usd!r}; give dollars an hour for one GPU")
    try:
        day = datetime.date.fromisoformat(str(date)).isoformat() if date else ""
    except ValueError:
        raise ConfigError(f"{where}: the date of {gpu} is {date!r}; write it like 2026-11-30") from None
    return Price(gpu=gpu, usd_per_gpu_hour=number, date=day, **values)


# ---- a newer list ------------------------------------------------------------------------------------------------


def update(named: Callable[[str, float], str | None]) -> tuple[Path, int]:
    """Read today's offers from gpuhunt (dstack's catalogue), write the cheapest to the cache; return file and count.

    named: (a GPU's name there, its GB) -> its name here, or None.

    Raises:
        ConfigError: if gpuhunt is not installed or cannot reach its catalogue.
    """
    try:
        import gpuhunt
    except ImportError:
        raise ConfigError("--update-prices reads gpuhunt, which is not installed; pip install 'byeori[rent]'") from None
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # a traceback for every provider without a network
    try:
        found = from_catalogue(gpuhunt.query(min_gpu_count=1), named)
    except Exception as error:  # of its HTTP client, of the catalogue's archive
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--update-prices: gpuhunt could not read its catalogue ({text}); without a network, give --prices FILE"
        ) from None
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([[field.name for field in fields(Price)], *map(astuple, found)])
    cached().parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(cached(), table.getvalue())
    return cached(), len(found)


def from_catalogue(items: Iterable[Any], named: Callable[[str, float], str | None]) -> list[Price]:
    """Return the cheapest price of every GPU, provider and kind among gpuhunt's items.

    least: the smallest number of GPUs that has this price.
    """
    best: dict[tuple[str, str, str], Price] = {}
    for item in items:
        gpu = named(item.gpu_name, item.gpu_memory) if item.gpu_name and item.gpu_memory else None
        if gpu is None or not item.gpu_count or not item.price:
            continue
        price = Price(
            gpu=gpu,
            provider=item.provider,
            usd_per_gpu_hour=round(item.price / item.gpu_count, 4),
            kind="spot" if item.spot else "on-demand",
            least=item.gpu_count,
            source="gpuhunt",
            date=today().isoformat(),
        )
        key = price.gpu, price.provider, price.kind
        known = best.get(key, price)
        best[key] = min(known, price, key=lambda each: (each.usd_per_gpu_hour, each.least))
    return list(best.values())
