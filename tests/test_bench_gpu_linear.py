"""The GPU benches run from end to end on the CPU; rooflines and targets are what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import bench_gpu_linear
import bench_gpu_train_linear
import gpu_layers
import make_readme_table
import plot_gpu_linear
import pytest
from gpu_layers import Layer

O_PROJ = Layer("Llama-3-8B", "o", 4096, 4096)


def test_dry_run_of_every_kind_of_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, chart = tmp_path / "folder" / "result.json", tmp_path / "chart.png"
    assert bench_gpu_linear.main(["--dry-run", "--json", str(result), "--chart", str(chart)]) == 0
    record = json.loads(result.read_text())
    assert record["dry_run"] is True
    assert {row["dtype"] for row in record["rows"]} == {"bfloat16", "float16", "int8", "float8_e4m3fn"}
    assert {row["pattern"] for row in record["rows"]} == {"2:4", "1:4", "1:8", "1:16", "4:8"}
    ways = {way for row in record["rows"] for way in row["ways"]}
    assert ways == {"small-batch", "cusparselt", "ours"}
    assert all("torch 2:4" in row["missing"] for row in record["rows"] if row["pattern"] == "2:4")
    assert all(row["TFLOPS"] > 0 and row["over cuBLAS"]["ratio"] > 0 for row in record["rows"])
    assert {"F.linear, dense", "F.linear, packed", "cusparselt.linear"} <= {r["call"] for r in record["host"]}
    assert record["missed"] == record["left_out"] == []
    assert chart.read_bytes().startswith(b"\x89PNG")
    shown = [dict(list(row.items())[:11]) for row in record["rows"]]
    shown = [{key: row[key] for key in ("layer", "tokens", "cuBLAS", "over cuBLAS")} for row in shown]
    assert make_readme_table.table({**record, "rows": shown}).startswith("| layer | tokens |")
    assert "no GPU: a dry run" in capsys.readouterr().out
    plot_gpu_linear.main([str(result), str(chart)])


def test_training_dry_run(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert bench_gpu_train_linear.main(["--dry-run", "--json", str(result)]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert {row["transposable"] for row in rows} == {"yes", "no"}
    assert all(row["over dense"]["ratio"] > 0 and row["packing"] > 0 for row in rows)


@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_without_a_gpu_they_say_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if bench_gpu_linear.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for bench in (bench_gpu_linear, bench_gpu_train_linear):
        with pytest.raises(SystemExit) as end:
            bench.main(arguments)
        assert end.value.code == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_time_that_is_up_leaves_rows_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu_linear.main(["--dry-run", "--seconds", "1e-9"]) == 0
    assert capsys.readouterr().out.count("left out: ") == 20


def test_an_interrupt_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, result = bench_gpu_linear.Bench.row, tmp_path / "result.json"

    def interrupted(bench: bench_gpu_linear.Bench, *what: object) -> None:
        row(bench, *what)
        if len(bench.rows) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu_linear.Bench, "row", interrupted)
    assert bench_gpu_linear.main(["--dry-run", "--json", str(result)]) == 0
    record = json.loads(result.read_text())
    assert len(record["rows"]) == 2
    assert record["left_out"] == ["all that would have come after an interrupt"]


def test_rooflines() -> None:
    h200 = gpu_layers.peaks_of("NVIDIA H200")
    assert h200 is not None
    decode = gpu_layers.roofline(O_PROJ, 1, "2:4", 2, 2, h200)
    assert decode.limit == "memory"
    assert decode.bound == pytest.approx(16 / 9, rel=2e-3)
    assert gpu_layers.roofline(O_PROJ, 1, "1:8", 2, 2, h200).bound == pytest.approx(16 / 2.5, rel=5e-2)
    prefill = gpu_layers.roofline(O_PROJ, 16384, "2:4", 2, 2, h200)
    assert (prefill.limit, prefill.bound) == ("math", 2.0)
    assert prefill.operations == 2 * 16384 * 4096 * 4096
    assert gpu_layers.roofline(O_PROJ, 16384, "4:8", 2, 2, h200).bound == 1.0
    assert gpu_layers.roofline(O_PROJ, 1, "2:4", 2, 2, None).bound is None
    assert gpu_layers.peaks_of("NVIDIA H100 PCIe").bytes < gpu_layers.peaks_of("NVIDIA H100 80GB HBM3").bytes
    assert gpu_layers.peaks_of("NVIDIA GeForce RTX 3090") is None


def test_targets() -> None:
    def least(gpu: str, dtype: str, pattern: str, tokens: int, layer: Layer = O_PROJ) -> float:
        return gpu_layers.target(gpu, dtype, pattern, layer, tokens).least

    assert [least("H200", "bfloat16", p, 1) for p in ("2:4", "1:4", "1:8", "1:16", "4:8")] == [
        1.6,
        3,
        5,
        8,
        1,
    ]
    assert least("H200", "bfloat16", "2:4", 16) == 1.0
    assert least("H200", "bfloat16", "2:4", 4096) == 1.2
    assert least("H100 PCIe", "bfloat16", "2:4", 4096) == 1.5
    assert least("H200", "int8", "2:4", 4096) == least("H200", "float8_e4m3fn", "2:4", 4096) == 1.4
    assert least("A100-SXM4", "bfloat16", "2:4", 8192) == 1.5
    assert least("A100-SXM4", "int8", "2:4", 8192) == 2.0
    assert least("H200", "bfloat16", "2:4", 4096, Layer("BERT", "o", 768, 768)) == 1.0


def test_layers_are_those_that_were_asked_for() -> None:
    groups = {layer.group for layer in gpu_layers.LAYERS}
    assert groups == {
        "square", "Qwen2.5-7B", "Llama-3-8B", "BERT base", "BERT large", "ViT-L", "ResNet-50 1x1",
    }  # fmt: skip
    assert {layer.rows for layer in gpu_layers.SQUARES} == {1024, 2048, 4096, 8192, 16384}
    assert max(gpu_layers.TOKENS) == 16384
