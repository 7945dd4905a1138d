"""Launch tables as data, the model that ranks their candidates, and how one is chosen."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import tuning, tuning_model
from benchmarks.shapes import find
from benchmarks.tuning import Overflows, Rejected, Spills, TableFile, choose
from benchmarks.tuning_model import GPUS, Usage, Work
from dsno_kernels.backends.triton import configs
from dsno_kernels.backends.triton.configs import TABLES, Config, RowKey

H200 = GPUS[9, 0]
ROW: RowKey = ("spectral_conv", "tf32", "3")
FITS = Usage(128, 1024, True)
CONFIGS = [Config((16 << i, 16, 16), 4, 2) for i in range(4)]


def table_data(name: str = "sm_90.json") -> Any:
    return json.loads((TABLES / name).read_text())


# Tables


def test_every_table_loads_and_is_in_the_form_that_the_tuner_writes() -> None:
    assert {(8, 0), (8, 6), (9, 0)} <= set(configs.ARCHITECTURES)
    assert len(configs.ARCHITECTURES) == len(list(TABLES.glob("*.json")))
    for capability, table in configs.ARCHITECTURES.items():
        assert table.rows and table.multiprocessors > 0
        path = configs.table_path(capability)
        assert TableFile.open(TABLES, capability, H200).text() == path.read_text()


def test_an_unknown_gpu_has_no_table_of_its_own() -> None:
    assert (7, 5) not in configs.ARCHITECTURES
    assert configs.ARCHITECTURES.get((8, 9), configs.SAFE) is configs.SAFE


def _first(field: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data["rows"][0].update({field: value})


def _without(kernel: str, kind: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        wanted = (kernel, "tf32", kind)
        data["rows"] = [
            row for row in data["rows"] if (row["kernel"], row["method"], row["class"]) != wanted
        ]

    return change


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown field": (lambda data: data.update(extra=1), "sm_90.json: fields are"),
    "missing field": (lambda data: data.pop("multiprocessors"), "sm_90.json: fields are"),
    "rows of a wrong type": (lambda data: data.update(rows={}), "rows is {}; expected list"),
    "another name": (lambda data: data.update(architecture="sm_80"), "holds the table of sm_80"),
    "no multiprocessors": (
        lambda data: data.update(multiprocessors=0),
        "multiprocessors is 0; give a positive",
    ),
    "real bins": (lambda data: data.update(real_bins=1), "real_bins is 1; expected bool"),
    "fp32 method": (lambda data: data.update(fp32_method="fp8"), "fp32_method is 'fp8'"),
    "row of a wrong type": (lambda data: data["rows"].append(3), r"row \d+: expected an object"),
    "row without a field": (lambda data: data["rows"][1].pop("tile"), "row 2: fields are"),
    "unknown kernel": (_first("kernel", "conv"), "row 1: kernel is 'conv'"),
    "unknown method": (_first("method", "fp8"), "row 1: method is 'fp8'"),
    "unknown class": (_first("class", "5"), "row 1: class is '5'"),
    "two tile sizes": (_first("tile", [16, 16]), r"row 1: tile is \[16, 16\]; give three powers"),
    "no power of two": (_first("tile", [48, 16, 16]), "row 1: tile is .* three powers"),
    "a tile too small": (_first("tile", [8, 16, 16]), "row 1: tile is .* from 16 to 1024"),
    "a size that is no integer": (_first("tile", [16, 16.0, 16]), "row 1: tile is"),
    "warps": (_first("warps", 3), "row 1: warps is 3; give a power of two"),
    "a truth value": (_first("warps", True), "row 1: warps is True; expected int"),
    "stages": (_first("stages", 0), "row 1: stages is 0; give 1 to 8"),
    "source": (_first("source", "guessed"), "row 1: source is 'guessed'"),
    "twice": (lambda data: data["rows"].append(data["rows"][0]), r"row \d+: .* stands twice"),
    "no narrow row": (_without("spectral_conv", "3 narrow"), "no row for .* tf32 3 narrow: add"),
    "no planar row": (_without("spectral_conv_mix", ""), "no row for spectral_conv_mix tf32: add"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_names_file_row_and_fault(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    data = table_data()
    change(data)
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        configs.load(path)
    assert str(error.value).startswith("sm_90.json") and "\n" not in str(error.value)


def test_half_a_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text((TABLES / "sm_90.json").read_text()[:500])
    with pytest.raises(ValueError, match=r"sm_90\.json is not JSON: "):
        configs.load(tmp_path / "sm_90.json")


# Model

WORK = Work(
    programs=600, steps=8, load=3e4, flop=2e6, operations=1e4, store=6e4, dram=1e8, kept=1, loaded=1
)


@pytest.mark.parametrize("field", ["programs", "steps", "load", "flop", "operations", "store"])
@pytest.mark.parametrize("dram", [0.0, 1e8, 1e10], ids="dram={:.0e}".format)
def test_more_work_never_takes_less_time(field: str, dram: float) -> None:
    times = []
    for factor in (1, 2, 10, 1e6):
        work = WORK._replace(dram=dram, **{field: int(getattr(WORK, field) * factor)})
        times.append(tuning_model.seconds(work, H200, "tf32", 3, 2))
    assert times == sorted(times) and times[0] >= dram / H200.dram
    assert times[-1] > times[0]


@pytest.mark.parametrize("method", configs.METHODS)
def test_a_better_gpu_and_more_programs_at_once_never_take_more_time(method: str) -> None:
    time = tuning_model.seconds(WORK, H200, method, 3, 2)
    for faster in (
        H200._replace(dram=2 * H200.dram),
        H200._replace(l2=2 * H200.l2),
        H200._replace(rates={name: 2 * rate for name, rate in H200.rates.items()}),
    ):
        assert tuning_model.seconds(WORK, faster, method, 3, 2) <= time
    by_stages = [tuning_model.seconds(WORK, H200, method, stages, 1) for stages in (1, 2, 3, 4)]
    by_residents = [tuning_model.seconds(WORK, H200, method, 3, count) for count in (1, 2, 3, 4)]
    assert by_stages == sorted(by_stages, reverse=True)
    assert by_residents == sorted(by_residents, reverse=True)


def test_the_work_of_the_fused_kernel_is_that_of_the_roofline() -> None:
    """T=4, K=2: 4 slices of x and 3 planes of W a step, 5 products; DRAM's limit is 62.6 us."""
    shape = find("cifar_b32_32")
    assert shape is not None
    work = tuning_model.work_of(ROW, (64, 32, 128), shape, H200.multiprocessors)
    assert work.load == 32 * 4 * (4 * 64 + 3 * 128)
    assert work.flop == 10 * 64 * 32 * 128
    assert work.programs * work.steps * work.flop == shape.flop("forward")
    assert work.dram / H200.dram == pytest.approx(62.6e-6, rel=2e-3)


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [(8, 255, 0, 1), (8, 128, 0, 2), (4, 128, 100_000, 2), (16, 64, 0, 2), (4, 168, 0, 3)],
)
def test_occupancy(warps: int, registers: int, shared: int, expected: int) -> None:
    assert tuning_model.occupancy(H200, warps, registers, shared) == expected


@pytest.mark.parametrize("capability", sorted(GPUS), ids="sm_{0[0]}{0[1]}".format)
def test_candidates_stay_within_the_limits_and_come_best_first(capability: tuple[int, int]) -> None:
    gpu, table = GPUS[capability], configs.ARCHITECTURES[capability]
    for key in [ROW, ("spectral_conv_mix", "bf16x3", "narrow"), *list(table.rows)[::5]]:
        found = tuning_model.candidates(key, gpu)
        assert len(found) == len(set(found)) > 8
        times = [tuning_model.row_seconds(key, c, gpu) for c in found]
        assert all(b > a / 1.03 for a, b in itertools.pairwise(times))
        assert times[0] == pytest.approx(min(times), rel=0.03)
        for config in found:
            assert config.num_warps * 32 <= 1024
            for shape in tuning_model.shapes_of(key):
                usage = tuning_model.guess(
                    tuning_model.work_of(key, config.tile, shape, gpu.multiprocessors), config
                )
                assert usage.registers <= min(255, 65536 // (32 * config.num_warps))
                assert usage.shared <= gpu.shared


def test_every_row_has_shapes_of_its_class() -> None:
    for table in configs.ARCHITECTURES.values():
        for kernel, method, kind in table.rows:
            shapes = tuning_model.shapes_of((kernel, method, kind))
            assert shapes
            if kind[:1] in configs.CLASSES["spectral_conv_weight_grad"]:
                assert {
                    configs.shape_class(shape.T, shape.real_coefficients) for shape in shapes
                } == {kind[0]}
            elif not kernel.startswith("truncated"):
                assert all(shape.T > configs.MAX_LENGTH for shape in shapes)


# One row


def try_all(
    times: dict[Config, float | str], unfit: tuple[Config, ...] = (), **options: Any
) -> tuning.Choice:
    """`choose` among CONFIGS, the first being the old one; a text is why a candidate fails."""

    def check(key: RowKey, config: Config, every: bool) -> Usage:
        if every and config in unfit:
            raise Rejected("another launch spills")
        if times.get(config) in (reasons := {"spills": Spills, "overflows": Overflows}):
            raise reasons[str(times[config])](str(times[config]))
        return FITS

    def score(key: RowKey, config: Config, usage: Usage) -> float:
        time = times[config]
        if isinstance(time, str):
            raise Rejected(time)
        return time

    return choose(
        ROW,
        CONFIGS[0],
        CONFIGS[1:],
        **{"guess": lambda config: 0.0, "check": check, "score": score, "bounded": False, "most": 8}
        | options,
    )


def times_of(*times: float | str) -> dict[Config, float | str]:
    return dict(zip(CONFIGS, times, strict=True))


@pytest.mark.parametrize(
    ("times", "unfit", "expected"),
    [
        (times_of(10, 9, 8, 9), (), CONFIGS[2]),
        (times_of(10, 9.9, 9.85, 9.9), (), CONFIGS[0]),
        (times_of(10, 9, 8, 9), (CONFIGS[2],), CONFIGS[1]),
        (times_of(10, "wrong", 9, "wrong"), (), CONFIGS[2]),
        (times_of("wrong", 11, 12, 12), (), CONFIGS[1]),
        (times_of(10, 11, 12, 12), (CONFIGS[0],), CONFIGS[1]),
        (times_of("a", "b", "c", "d"), (), None),
        (times_of(10, 9, "c", "d"), (CONFIGS[0], CONFIGS[1]), None),
    ],
    ids=[
        "best",
        "noise",
        "gate",
        "failing",
        "old fails",
        "old spills",
        "none",
        "none through the gate",
    ],
)
def test_the_best_that_passes_the_gate_wins(
    times: dict[Config, float | str], unfit: tuple[Config, ...], expected: Config | None
) -> None:
    choice = try_all(times, unfit)
    assert choice.new == expected
    assert [one.config for one in choice.tried] == CONFIGS
    assert [one.seconds or one.problem for one in choice.tried] == list(times.values())
    refused = [one.config for one in choice.tried if one.problem == "another launch spills"]
    assert refused == list(unfit)


@pytest.mark.parametrize("reason", ["spills", "overflows"])
def test_larger_tiles_than_one_that_is_too_large_are_not_compiled(reason: str) -> None:
    choice = try_all(times_of(10, 9, reason, 1))
    assert [one.config for one in choice.tried] == CONFIGS[:3] and choice.new == CONFIGS[1]


def test_a_bounded_search_ends_where_nothing_can_win() -> None:
    guesses = dict(zip(CONFIGS, (9, 7, 8, 8), strict=True))
    choice = try_all(times_of(10, 8, 7, 1), guess=guesses.__getitem__, bounded=True)
    assert [one.config for one in choice.tried] == CONFIGS[:2] and choice.new == CONFIGS[1]


def test_a_candidate_that_fails_the_whole_gate_does_not_end_a_bounded_search() -> None:
    guesses = dict(zip(CONFIGS, (9, 7, 7.5, 7.5), strict=True))
    choice = try_all(times_of(10, 7, 8, 8), (CONFIGS[1],), guess=guesses.__getitem__, bounded=True)
    assert choice.new == CONFIGS[2]


def test_a_row_ends_when_its_time_is_over_but_the_old_one_is_always_timed() -> None:
    clock = iter(range(100))
    choice = try_all(times_of(10, 9, 8, 7), seconds=1.5, now=lambda: float(next(clock)))
    assert [one.config for one in choice.tried] == CONFIGS[:2] and choice.new == CONFIGS[1]
    choice = try_all(times_of(10, 9, 8, 7), seconds=0, now=lambda: float(next(clock)))
    assert choice.new == CONFIGS[0]


def test_only_so_many_candidates_are_tried() -> None:
    choice = try_all(times_of(10, 9, 8, 7), most=2)
    assert [one.config for one in choice.tried] == CONFIGS[:3] and choice.new == CONFIGS[2]


# The file


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TABLES, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    file = TableFile.open(tmp_path, (9, 0), H200)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            file.update(ROW, CONFIGS[3], "compiled")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    file.update(ROW, CONFIGS[3], "compiled")
    assert configs.parse(json.loads(file.path.read_text()), "sm_90.json").rows[ROW] == CONFIGS[3]
    with pytest.raises(ValueError, match="source is 'guessed'"):
        file.update(ROW, CONFIGS[3], "guessed")
