"""Damaged predictors: forests that predict, or an error that names the file; nothing of a file is ever run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fuzzing import (
    archive_of,
    boundaries,
    damaged_archive,
    damaged_bytes,
    damaged_json,
    damaged_pickle,
    damaged_yaml,
    dumped,
    examples,
    judged,
    members_of,
    randoms,
)
from hypothesis import given
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

from oneshot.cost.nn_meter.forest import Forest
from oneshot.cost.nn_meter.kernels import Detector
from oneshot.cost.nn_meter.predictors import PredictorSet, load_predictor_set
from oneshot.errors import ConfigurationError, UnsafePickleError

DATA = Path(__file__).resolve().parent / "data"
RULES = {"MON": {"obey": None}, "RT": {"obey": False}, "BF_conv_bn_relu": {"obey": True}, "BF_bn_relu": {"obey": True}}
META = {"name": "tiny", "version": 1.0, "kernel_predictors": ["relu"], "category": "cpu", "package_location": "/x"}


def small(kind: type, protocol: int) -> bytes:
    x = np.random.default_rng(0).random((12, 3))
    return pickle.dumps(kind(2, max_depth=2, random_state=0).fit(x, x.sum(1)), protocol)


PICKLES = [
    *(small(RandomForestRegressor, protocol) for protocol in (0, 2, 4, 5)),
    small(ExtraTreesRegressor, 3),
    (DATA / "forest_python27" / "protocol1.pkl").read_bytes(),
    (DATA / "forest_python27" / "protocol2.pkl").read_bytes(),
]
STARTS = [boundaries(data) for data in PICKLES]


def predicts(forest: Forest | None) -> None:
    if forest is not None:
        assert np.isfinite(forest.predict(np.ones((2, forest.n_features)))).all()


@examples(900)
@given(random=randoms)
def test_a_damaged_forest(tmp_path: Path, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, which = tmp_path / "relu.pkl", random.randrange(len(PICKLES))
    path.write_bytes(damaged_pickle(PICKLES[which], STARTS[which], PICKLES, random))
    predicts(judged(path, lambda: Forest.from_pickle(path)))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("arrays") / "forest.npz"
    Forest.from_pickle(PICKLES[2]).save(path)
    return path.read_bytes()


@examples(250)
@given(random=randoms)
def test_damaged_arrays(arrays: bytes, tmp_path: Path, random: Random) -> None:
    path = tmp_path / "forest.npz"
    damaged = damaged_archive(members_of(arrays), random) if random.randrange(2) else arrays
    path.write_bytes(damaged if damaged != arrays else damaged_bytes(arrays, PICKLES, random))
    predicts(judged(path, lambda: Forest.load(path)))


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    folder = tmp_path / "device"
    folder.mkdir(exist_ok=True)
    named = {"fusion_rules.json": dumped(RULES).encode(), "meta.yaml": dumped(META).encode(), "relu.pkl": PICKLES[2]}
    for name, data in {**named, **files}.items():
        (folder / name).write_bytes(data)
    return folder


def loaded(folder: Path, cache: Path, changed: Path) -> PredictorSet | None:
    found = judged(changed, lambda: load_predictor_set(folder, cache=cache))
    if found is not None:
        assert len(found.name) <= 200
        assert len(found.version) <= 200
        for forest in found.forests.values():
            predicts(forest)
    return found


@examples(200)
@given(random=randoms)
def test_damaged_fusion_rules(tmp_path: Path, random: Random) -> None:
    rules = damaged_json(RULES, [dumped(META).encode()], random)
    folder = folder_of(tmp_path, **{"fusion_rules.json": rules})
    found = loaded(folder, tmp_path / "cache", folder / "fusion_rules.json")
    if found is not None:
        assert isinstance(Detector(found.fusion_rules).fusible("conv", "relu"), bool)


@examples(150)
@given(random=randoms)
def test_a_damaged_description(tmp_path: Path, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    meta = damaged_yaml(META, [b"name: tiny\nversion: 1.0\nkernel_predictors:\n  - relu\n"], random)
    folder = folder_of(tmp_path, **{"meta.yaml": meta})
    # Where it names other kernels, it is the folder that lacks them.
    loaded(folder, tmp_path / "cache", folder)


@examples(150)
@given(random=randoms)
def test_a_damaged_cache_is_made_again(tmp_path: Path, random: Random) -> None:
    folder, cache = folder_of(tmp_path), tmp_path / "cache"
    expected = Forest.from_pickle(folder / "relu.pkl").predict([[0.5] * 3])
    entry = [random.choice((len(PICKLES[2]), 1)), 1, "0" * 64]
    index = {str((folder / "relu.pkl").resolve()): entry, "/x": [1, 2, "../../evil"]}
    (cache / "nn_meter").mkdir(parents=True, exist_ok=True)
    path = cache / "nn_meter" / "sha256.json"
    path.write_bytes(damaged_json(index, [b"{}"], random))
    found = judged(path, lambda: load_predictor_set(folder, cache=cache))
    assert found is not None
    np.testing.assert_array_equal(found.forests["relu"].predict([[0.5] * 3]), expected)


# ---- what was found, by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["3", "{}", '{"obey": "yes"}', '{"obey": []}', "null", '{"OBEY": true}'])
def test_fusion_rules_that_are_none(rule: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, **{"fusion_rules.json": f'{{"BF_conv_relu": {rule}}}'.encode()})
    with pytest.raises(ConfigurationError, match=r"fusion_rules\.json: fusion rule 'BF_conv_relu'"):
        load_predictor_set(folder, cache=tmp_path / "cache")


def test_a_fusion_rule_of_a_thousand_operators(tmp_path: Path) -> None:
    name = "BF" + "_conv" * 1000
    folder = folder_of(tmp_path, **{"fusion_rules.json": json.dumps({name: {"obey": True}}).encode()})
    with pytest.raises(ConfigurationError, match="of at most 20 operators"):
        load_predictor_set(folder, cache=tmp_path / "cache")


def test_a_name_of_ten_to_the_forty_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 x", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 41)), "name: *a40"]
    folder = folder_of(tmp_path, **{"meta.yaml": "\n".join(lines).encode()})
    with pytest.raises(ConfigurationError, match=r"meta\.yaml: cannot be read: more than 1,000,000 values"):
        load_predictor_set(folder, cache=tmp_path / "cache")
    for key in ("name", "version"):
        (folder / "meta.yaml").write_text(f"{key}: [1, 2]")
        with pytest.raises(ConfigurationError, match=rf"meta\.yaml: '{key}' is \[1, 2\]; a text is needed"):
            load_predictor_set(folder, cache=tmp_path / "cache")


def test_an_index_that_leads_out_of_the_cache(tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path), tmp_path / "cache"
    (cache / "nn_meter").mkdir(parents=True)
    index = cache / "nn_meter" / "sha256.json"
    for name in ("relu.pkl", "fusion_rules.json"):
        path = (folder / name).resolve()
        state = path.stat()
        entry = [state.st_size, state.st_mtime_ns, "../../outside"]
        index.write_text(json.dumps({str(path): entry}))
        assert list(load_predictor_set(folder, cache=cache).forests) == ["relu"]
    assert not list(tmp_path.glob("outside*"))


def test_an_archive_without_numbers(tmp_path: Path, arrays: bytes) -> None:
    members, path = members_of(arrays), tmp_path / "forest.npz"
    path.write_bytes(archive_of(members))
    assert Forest.load(path).n_trees == 2
    path.write_bytes(archive_of({**members, "left.npy": b""}))
    with pytest.raises(UnsafePickleError, match="'left' is no array of numbers"):
        Forest.load(path)
