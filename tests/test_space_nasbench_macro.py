"""The space of NAS-Bench-Macro against its published parameters and MACs, all of them where the table is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import oneshot
from oneshot import count_macs, count_params, decisions
from oneshot.errors import ArchMismatchError
from oneshot.export import arch_of
from search_spaces.nasbench_macro import choices_of_code, code_of_choices, nasbench_macro

TABLE = Path(__file__).parents[2] / "shared/data/nas-bench-macro/nas-bench-macro_cifar10.json"

# code -> parameters, MACs: rows of the published table (Apache-2.0, github.com/xiusu/NAS-Bench-Macro)
ROWS = {
    "00000000": (387_882, 7_713_280),
    "11111111": (1_588_874, 53_246_464),
    "22222222": (2_932_586, 105_660_928),
    "01201202": (1_711_210, 52_904_448),
    "01111202": (1_769_258, 54_194_688),
    "20101200": (828_970, 37_892_608),
    "22120201": (1_408_682, 66_634_240),
    "00201010": (971_818, 30_155_264),
    "02212101": (1_371_050, 63_257_088),
    "01022202": (1_969_258, 64_487_936),
}


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 32, 32)


@pytest.fixture(scope="module")
def space() -> nn.Module:
    return nasbench_macro()


def test_the_space(space: nn.Module, image: Tensor) -> None:
    assert [d.options for d in decisions(space).values()] == [("id", "mb3k3", "mb6k5")] * 8
    assert list(decisions(space)) == [f"layer{i}" for i in range(1, 9)]
    assert space.eval()(image).shape == (1, 10)


def test_params_and_macs_are_the_published_ones(space: nn.Module, image: Tensor) -> None:
    params, macs = count_params(space), count_macs(space, (image,))
    for code, row in ROWS.items():
        choices = choices_of_code(code)
        assert (params.of(choices), macs.of(choices)) == row, code


@pytest.mark.parametrize("code", ROWS)
def test_a_fixed_network_has_the_published_params_and_macs(code: str, space: nn.Module, image: Tensor) -> None:
    net = oneshot.fixed(space, arch_of(space, choices_of_code(code)))
    assert (sum(p.numel() for p in net.parameters()), count_macs(net, (image,)).of({})) == ROWS[code]


@pytest.mark.skipif(not TABLE.exists(), reason="the table of the benchmark is not on this machine")
def test_params_and_macs_of_all_networks(space: nn.Module, image: Tensor) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    params, macs = count_params(space), count_macs(space, (image,))
    assert len(table) == 3**8
    for code, row in table.items():
        choices = choices_of_code(code)
        assert (params.of(choices), macs.of(choices)) == (row["params"], row["flops"]), code
    assert {code: (table[code]["params"], table[code]["flops"]) for code in ROWS} == ROWS


def test_codes() -> None:
    assert choices_of_code("01200000") == {**{f"layer{i}": 0 for i in range(1, 9)}, "layer2": 1, "layer3": 2}
    for code in ROWS:
        assert code_of_choices(choices_of_code(code)) == code


@pytest.mark.parametrize("code", ["", "0120000", "012000000", "01200003", "0120000x", "0120000²"])
def test_a_damaged_code(code: str) -> None:
    with pytest.raises(ArchMismatchError, match="8 digits from 0 to 2"):
        choices_of_code(code)


@pytest.mark.parametrize("change", [{"layer1": 3}, {"layer1": -1}, {"layer9": 0}, {"layer1": "id"}])
def test_choices_of_another_space(change: dict[str, int]) -> None:
    with pytest.raises(ArchMismatchError, match="0, 1 or 2 is needed for each of"):
        code_of_choices({**choices_of_code("00000000"), **change})
