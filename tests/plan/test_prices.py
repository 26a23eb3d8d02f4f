"""Prices: the shipped list, a user's own, staleness, and a newer list from gpuhunt."""

from __future__ import annotations

import datetime
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import gpuhunt
import pytest

from byeori.errors import ConfigError
from byeori.plan import machines, prices
from byeori.plan.prices import Price

NAMES = [machine.name for machine in machines.read().machines]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prices, "today", lambda: datetime.date(2026, 11, 30))


def test_every_shipped_price_has_its_source_and_date() -> None:
    shipped = prices.read(None, NAMES)
    assert len(shipped) > 130
    assert all(price.source and price.provider and price.date >= "2026-09-01" for price in shipped)
    assert [prices.offers(shipped, "RTX 4090")[0].provider, prices.offers(shipped, "H100")[0].provider] == [
        "RunPod",
        "RunPod",
    ]
    assert {price.gpu for price in shipped} >= {"T4", "H100", "B300", "RTX A6000", "GH200", "MI325X", "RTX 4080"}


def test_offers_are_those_of_so_many_gpus() -> None:
    shipped = prices.read(None, NAMES)
    assert "CoreWeave" not in {price.provider for price in prices.offers(shipped, "H100", 4)}
    assert "CoreWeave" in {price.provider for price in prices.offers(shipped, "H100", 8)}
    assert {price.kind for price in prices.offers(shipped, "H100", 8, spot=True)} == {"spot"}


@pytest.mark.parametrize(("date", "old"), [("2026-10-01", False), ("2026-09-30", True), ("", False)])
def test_a_price_is_stale_after_60_days(date: str, old: bool) -> None:
    assert prices.stale(Price(gpu="T4", provider="x", usd_per_gpu_hour=1.0, date=date)) is old


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H1000: 2", "names an unknown GPU 'H1000' (did you mean H100?)"),
        ("H100: {usd_per_hour: -3}", "the price of H100 is -3; give dollars an hour"),
        ("H100: {usd_per_hour: cheap}", "the price of H100 is 'cheap'"),
        ("H100: {usd_per_hour: 2, date: yesterday}", "the date of H100 is 'yesterday'; write it like 2026-11-30"),
        ("- 1", "holds no prices; write lines like H100: 2.5"),
        ("a: [", "is not valid YAML at line"),
    ],
)
def test_bad_prices(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        prices.read(str(file), NAMES)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu,provider,usd_per_gpu_hour\nH1000,x,2\n", "line 2 names an unknown GPU 'H1000'"),
        ("gpu,provider,usd_per_gpu_hour\nT4,x,1\nH100,x,\n", "line 3: the price of H100 is ''"),
        ("gpu,provider,usd_per_gpu_hour,kind\nT4,x,1,weekly\n", "line 2: kind is one of on-demand, secure, spot"),
        (
            "gpu,usd_per_gpu_hour,least\nT4,1," + "9" * 5000,
            "line 2: kind is one of on-demand, secure, spot, and least a",
        ),
        ("gpu,usd_per_gpu_hour\nT4," + "9" * 200_000, "cannot read the prices file"),
        ("gpu,provider,usd_per_gpu_hour\n", "holds no prices; its columns are gpu, provider, usd_per_gpu_hour"),
    ],
)
def test_bad_tables(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        prices.read(str(file), NAMES)
    assert words in str(error.value)


def test_own_prices_replace_those_of_their_gpus(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("H100: {usd_per_hour: 2.5, source: my contract, date: 2026-11-24}\nT4: 0.3\n")
    found = prices.read(str(file), NAMES)
    assert [(price.usd_per_gpu_hour, price.source) for price in prices.offers(found, "H100")] == [(2.5, "my contract")]
    assert [price.usd_per_gpu_hour for price in prices.offers(found, "T4")] == [0.3]
    assert len(prices.offers(found, "L4")) > 1
    table = tmp_path / "own.csv"
    table.write_text("gpu,provider,usd_per_gpu_hour,kind,least\nH100,us,1.5,on-demand,2\n")
    own = prices.read(str(table), NAMES)
    assert not prices.offers(own, "H100") and prices.offers(own, "H100", 4)[0].usd_per_gpu_hour == 1.5


def test_one_provider_only() -> None:
    assert {price.provider for price in prices.read(None, NAMES, "runpod")} == {"RunPod"}
    with pytest.raises(ConfigError, match=r"no prices of 'runpot' are known \(did you mean runpod\?\); the known"):
        prices.read(None, NAMES, "runpot")


def _item(name: str | None, gigabytes: float, price: float, count: int = 1, **more: Any) -> gpuhunt.CatalogItem:
    values: dict[str, Any] = {"gpu_name": name, "gpu_memory": gigabytes, "price": price, "gpu_count": count}
    values |= {"instance_name": "x", "location": "here", "cpu": 8, "memory": 64, "disk_size": None}
    values |= {"gpu_vendor": gpuhunt.AcceleratorVendor.NVIDIA if count else None}
    return gpuhunt.CatalogItem(**values | {"provider": "runpod", "spot": False} | more)


def _named(name: str, gigabytes: float) -> str | None:
    machine = machines.of_device(machines.read().machines, name, gigabytes)
    return machine.name if machine else None


def test_a_newer_list_from_gpuhunt(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [_item("H100", 80, 3.0), _item("H100", 80, 16.0, 8), _item("RTX4090", 24, 0.4), _item("TPU", 16, 1.0)]
    items += [_item("H100", 80, 1.0, spot=True), _item("H100", 80, 5.0, provider="aws"), _item(None, 0, 1.0, 0)]
    monkeypatch.setattr(gpuhunt, "query", lambda **filters: items)
    file, count = prices.update(_named)
    assert (file, count) == (prices.cached(), 4)
    found = prices.read(None, NAMES)
    assert [(p.provider, p.usd_per_gpu_hour, p.least) for p in prices.offers(found, "H100", 8)] == [
        ("runpod", 2.0, 8),
        ("aws", 5.0, 1),
    ]
    assert prices.offers(found, "H100", 1, spot=True)[0].usd_per_gpu_hour == 1.0
    assert all(price.date == "2026-11-30" and price.source == "gpuhunt" for price in found)


def test_without_gpuhunt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(ConfigError, match=r"gpuhunt, which is not installed; pip install 'byeori\[rent\]'"):
        prices.update(_named)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    with pytest.raises(ConfigError, match=r"could not read its catalogue .*; without a network, give --prices FILE"):
        prices.update(_named)
    assert not prices.cached().exists()
