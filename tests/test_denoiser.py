"""The EDM denoiser: its coefficients against the table, noise levels for each sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels.diffusion import EDM, FDM, VE, FlowMatching, Preconditioner, Process, VPLinear
from dsno_kernels.models import DSNO, DSNOConfig, EDMDenoiser, ModelFileError, load, save
from dsno_kernels.models.files import read_metadata, read_tensors, write_tensors
from tests.helpers import FLOAT64, assert_close

TINY = DSNOConfig(
    image_size=8,
    image_channels=1,
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    embedding_dim=32,
    num_classes=3,
)
# About 20 layers of float32; only the order of the batch differs.
MODEL = 1e-5


class Recorded(nn.Module):
    """A network that returns a constant and keeps its inputs."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(3.0, dtype=dtype))

    def forward(self, x: Tensor, logsnr: Tensor, y: Tensor | None) -> Tensor:
        self.inputs = x, logsnr, y
        return self.value.expand(len(x), 1, *x.shape[1:])


def test_coefficients_are_those_of_edm() -> None:
    network, sigma_data = Recorded(), 0.3
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    out = EDMDenoiser(network, sigma_data)(x, sigma)
    s, noisy = sigma[:, None, None, None], sigma_data**2 + sigma**2
    noisy = noisy[:, None, None, None]
    c_skip, c_out = sigma_data**2 / noisy, s * sigma_data / noisy.sqrt()
    assert_close(out, c_skip * x + c_out * 3.0, FLOAT64)
    assert_close(network.inputs[0], x / noisy.sqrt(), FLOAT64)
    assert_close(network.inputs[1], -2.0 * sigma.log()[:, None], FLOAT64)


@pytest.mark.parametrize("y", [None, torch.tensor([2, 0, 1])], ids=["plain", "classes"])
def test_each_sample_has_its_own_noise_level(y: Tensor | None) -> None:
    config = dataclasses.replace(TINY, time_conv=False, num_classes=0 if y is None else 3)
    model = EDMDenoiser(DSNO(config), 0.5).eval()
    with torch.no_grad():  # the last convolution starts at zero
        nn.init.normal_(model.network.all_modules[-1].weight)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    together = model(x, sigma, y)
    for i in range(3):
        alone = model(x[i : i + 1], sigma[i].item(), None if y is None else y[i : i + 1])
        assert_close(together[i : i + 1], alone, MODEL)
    assert (together - model(x, 1.0, y)).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3


def test_per_sample_times_of_the_network_with_temporal_layers() -> None:
    for kernels in (True, False):
        model = DSNO(TINY, kernels=kernels).eval()
        with torch.no_grad():
            nn.init.normal_(model.all_modules[-1].weight)
        x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 0])
        logsnr = torch.tensor([[-3.0, 0.0, 4.0], [-1.0, 2.0, 6.0]])
        together = model(x, logsnr, y)
        for i in range(2):
            assert_close(together[i : i + 1], model(x[i : i + 1], logsnr[i], y[i : i + 1]), MODEL)
        assert_close(model(x, logsnr[:1].expand(2, 3), y), model(x, logsnr[0], y), MODEL)
        with pytest.raises(ValueError, match=r"\(T,\) or \(2, T\) with T >= 1, got \(3, 2\)"):
            model(x, logsnr.T, y)


def test_the_network_learns_through_the_denoiser() -> None:
    model = EDMDenoiser(DSNO(dataclasses.replace(TINY, time_conv=False, num_classes=0)))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    model(x, sigma).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_x_comes_back(dtype: torch.dtype) -> None:
    network = Recorded(torch.float32)
    out = EDMDenoiser(network)(torch.randn(2, 1, 2, 2).to(dtype), torch.tensor(0.5))
    assert out.dtype == dtype
    assert network.inputs[0].dtype == torch.float32


def test_no_noise_changes_nothing() -> None:
    x = torch.randn(2, 1, 8, 8)
    config = dataclasses.replace(TINY, time_conv=False, num_classes=0)
    assert torch.equal(EDMDenoiser(DSNO(config))(x, 0.0), x)


def test_bad_arguments_are_named() -> None:
    x = torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"number or have shape \(2,\), got \(3,\)"):
        EDMDenoiser(Recorded())(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"sigma must be at least 0, got -1"):
        EDMDenoiser(Recorded())(x, -1)
    with pytest.raises(TypeError, match=r"x must be real floating point .*, got torch\.int64"):
        EDMDenoiser(Recorded())(x.long(), 1.0)
    with pytest.raises(ValueError, match=r"sigma_data must be positive, got 0"):
        EDMDenoiser(Recorded(), 0)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        EDMDenoiser(lambda x: x)  # type: ignore[arg-type]


def test_the_process_says_the_preconditioner() -> None:
    """FDM differs by c_in alone."""
    x, sigma = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.tensor([0.1, 9.0]).double()
    for base in (EDM(sigma_data=0.3), VE(), VPLinear()):
        seen = []
        for process in (base, FDM(base)):
            network = Recorded()
            out = EDMDenoiser(network, process=process)(x, sigma)
            c_skip, c_out, c_in, _ = Preconditioner(process).coefficients(
                sigma[:, None, None, None]
            )
            assert_close(out, c_skip * x + c_out * 3.0, FLOAT64)
            assert_close(network.inputs[0], c_in * x, FLOAT64)
            raw = EDMDenoiser(network, process=process)(c_in * x, sigma, raw=True)
            assert_close(raw, torch.full_like(x, 3.0), FLOAT64)
            assert_close(network.inputs[0], c_in * x, FLOAT64)
            seen.append(out)
        assert torch.equal(*seen)
    with pytest.raises(ValueError, match=r"sigma_data is 0\.7, the process has 0\.3"):
        EDMDenoiser(network, 0.7, EDM(sigma_data=0.3))
    with pytest.raises(TypeError, match="a VP, VE or EDM process is required"):
        EDMDenoiser(network, process=FlowMatching())


@pytest.mark.parametrize("process", [EDM(), FDM(VPLinear(), 2.0), FDM(VE(), damping=1.2)], ids=repr)
def test_it_compiles_without_a_graph_break(process: Process) -> None:
    model, x = EDMDenoiser(Recorded(), process=process), torch.randn(2, 1, 2, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for sigma in (torch.tensor([0.5, 9.0]), torch.tensor(2.0)):
        assert_close(compiled(x, sigma), model(x, sigma), MODEL)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"sigma_data": 0.3}, r"sigma_data is 0\.3, the process has 0\.5"),
        ({"process": {"kind": "FlowMatching"}}, "a VP, VE or EDM process is required"),
    ],
)
def test_a_file_whose_metadata_make_no_denoiser(
    metadata: dict[str, object], match: str, tmp_path: Path
) -> None:
    network = DSNO(dataclasses.replace(TINY, time_conv=False))
    path = tmp_path / "model.safetensors"
    save(EDMDenoiser(network, process=FDM(EDM())), path)
    tensors, own = read_tensors(path)
    write_tensors(path, tensors, {**own, **metadata})
    with pytest.raises(ModelFileError, match=rf"model\.safetensors holds no denoiser: {match}"):
        load(path)


def test_a_process_that_holds_a_function_has_no_file(tmp_path: Path) -> None:
    network = DSNO(dataclasses.replace(TINY, time_conv=False))
    model = EDMDenoiser(network, process=FDM(EDM(), B=lambda t: t))
    with pytest.raises(ModelFileError, match="a file cannot hold the process FDM"):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "process",
    [EDM(), EDM(sigma_data=0.3), EDM(0.01, 50.0, 0.3), FDM(EDM(0.01, 50.0), 2.0)],
    ids=repr,
)
def test_a_file_keeps_all_of_its_process(process: Process, tmp_path: Path) -> None:
    """The range, too; what sigma_data tells alone is not written twice."""
    path = tmp_path / "model.safetensors"
    save(EDMDenoiser(DSNO(dataclasses.replace(TINY, time_conv=False)), process=process), path)
    assert load(path).process == process
    assert ("process" in read_metadata(path)) == (process != EDM(sigma_data=process.sigma_data))
