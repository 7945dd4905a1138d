"""Denoisers: the exact one of a data set, for a process, and of other libraries' networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels import diffusion
from dsno_kernels.diffusion import (
    EDM,
    FDM,
    VE,
    DiscreteVP,
    ExactDenoiser,
    FlowMatching,
    Process,
    SolverPlan,
    VPCosine,
    VPLinear,
    denoisers,
    for_process,
    from_diffusers,
    from_edm,
    time_grid,
)
from tests.helpers import assert_close, rel_rms

# Sums of tens of terms, whose weights are exponentials of differences of scores.
FLOAT64 = 1e-12
FLOAT32 = 1e-6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(x: Tensor, sigma: Tensor, images: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The weighted mean, one pair at a time."""
    result = torch.empty(x.shape, dtype=torch.float64)
    for b in range(len(x)):
        squares = torch.stack([(x[b].double() - image.double()).square().sum() for image in images])
        if allowed is not None:
            squares = squares.masked_fill(~allowed[b], torch.inf)
        weights = torch.exp(-(squares - squares.min()) / (2 * sigma[b] ** 2))
        weights = (weights / weights.sum()).view(-1, *[1] * (x.ndim - 1))
        result[b] = (weights * images.double()).sum(0)
    return result


@pytest.mark.parametrize("shape", [(7, 5), (13, 3, 2, 3)], ids=["vectors", "images"])
@pytest.mark.parametrize("level", [0.05, 0.7, 5.0], ids=str)
@pytest.mark.parametrize("labeled", [False, True], ids=["all", "labels"])
def test_exact_denoiser_is_the_weighted_mean(
    shape: tuple[int, ...], level: float, labeled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(denoisers._SCORES, "cpu", 2 * shape[0])  # two samples at a time
    images, x = randn(*shape), randn(5, *shape[1:], seed=1)
    sigma = level * torch.tensor([0.5, 1.0, 2.0, 1.0, 1.5], dtype=torch.float64)
    labels = torch.arange(shape[0]) % 3 if labeled else None
    y = torch.tensor([2, 0, -1, 1, 1]) if labeled else None
    allowed = None if labels is None or y is None else (labels == y[:, None]) | (y[:, None] < 0)
    expected = brute_force(x, sigma, images, allowed)
    denoiser = ExactDenoiser(images, labels)
    assert_close(denoiser(x, sigma, y), expected, FLOAT64)
    single = ExactDenoiser(images.float(), labels)(x.float(), sigma.float(), y)
    assert single.dtype == torch.float32
    expected = brute_force(x.float(), sigma.float().double(), images.float(), allowed)
    assert_close(single, expected, FLOAT32)


def test_sigma_is_a_number_a_tensor_or_one_a_sample() -> None:
    images, x = randn(9, 4), randn(3, 4, seed=1)
    denoiser = ExactDenoiser(images)
    expected = denoiser(x, torch.full((3,), 0.5))
    for sigma in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert torch.equal(denoiser(x, sigma), expected)
    assert denoiser(x[:0], 0.5).shape == (0, 4)
    assert denoiser(x.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("sigma", [0.0, 1e-38, 1e-8, 1e-3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_noise_it_is_the_nearest_image(sigma: float, dtype: torch.dtype) -> None:
    images = 10 * randn(50, 3, 4, 4).to(dtype)
    x = images[torch.arange(20)] + 1e-3 * randn(20, 3, 4, 4, seed=1).to(dtype)
    x.requires_grad_()
    level = torch.tensor(sigma, requires_grad=True)
    result = ExactDenoiser(images)(x, level)
    assert torch.equal(result, images[:20])
    gradients = torch.autograd.grad(result.sum(), (x, level))
    assert all(bool(gradient.eq(0).all()) for gradient in gradients)


def test_at_large_sigma_it_is_the_mean() -> None:
    images = 1 + randn(50, 3, 4, 4).float()
    denoiser = ExactDenoiser(images, torch.arange(50) % 2)
    x = 1e9 * randn(4, 3, 4, 4, seed=1).float()
    mean = images.double().mean(0).expand(4, 3, 4, 4)
    assert_close(denoiser(x * 1e3, 1e12), mean, FLOAT32)
    odd = denoiser(x * 1e3, 1e12, torch.ones(4, dtype=torch.int64))
    assert_close(odd, images[1::2].double().mean(0).expand(4, 3, 4, 4), FLOAT32)


def test_near_duplicates_are_told_apart_in_float32() -> None:
    """Scores in float32 would be off by whole units here."""
    base = 1 + randn(1, 64).float().abs()
    step = torch.zeros(1, 64)
    step[0, 0] = 2e-3
    images = torch.cat([base, base + step])
    x = base + 0.25 * step
    expected = brute_force(x, torch.tensor([2e-3]), images)
    made = ExactDenoiser(images)(x, 2e-3)
    # The result is 1 and more in float32, its distance from the first image 9e-4.
    assert_close(made.double() - base, expected - base.double(), 2e-3)


@pytest.mark.parametrize("labeled", [False, True], ids=["all", "labels"])
def test_gradients(labeled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(denoisers._SCORES, "cpu", 14)
    images = randn(7, 2, 3)
    x = randn(3, 2, 3, seed=1).requires_grad_()
    sigma = torch.tensor([0.6, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    denoiser = ExactDenoiser(images, torch.arange(7) % 2 if labeled else None)
    y = torch.tensor([0, 1, -1]) if labeled else None
    torch.autograd.gradcheck(lambda x, sigma: denoiser(x, sigma, y), (x, sigma))


def test_tweedie() -> None:
    """x - D is sigma^2 times minus the gradient of the log density of the noisy data."""
    images, sigma = randn(11, 4), 0.8
    x = randn(6, 4, seed=1).requires_grad_()
    density = torch.logsumexp(-torch.cdist(x, images).square() / (2 * sigma**2), 1)
    (score,) = torch.autograd.grad(density.sum(), x)
    assert_close(ExactDenoiser(images)(x, sigma), x + sigma**2 * score, 1e-10)


def test_a_denoiser_is_a_module() -> None:
    denoiser = ExactDenoiser(randn(3, 2), torch.tensor([0, 1, 1]))
    assert set(denoiser.state_dict()) == {"images", "labels"}
    assert not list(denoiser.parameters())


@pytest.mark.parametrize(
    ("images", "labels", "error", "text"),
    [
        ([1.0], None, TypeError, "images must be a torch.Tensor"),
        (torch.ones(3, 2, dtype=torch.uint8), None, TypeError, "images must be real"),
        (torch.ones(3), None, ValueError, r"images must have shape \(N, ...\)"),
        (torch.ones(0, 2), None, ValueError, "N >= 1"),
        (torch.ones(3, 2), torch.ones(3), TypeError, "labels must be integers"),
        (torch.ones(3, 2), torch.ones(2).long(), ValueError, r"labels must have shape \(3,\)"),
    ],
    ids=["list", "uint8", "vector", "empty", "float labels", "few labels"],
)
def test_bad_data(images: Any, labels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ExactDenoiser(images, labels)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(2, 4), 1.0), ValueError, r"x must have shape \(B, 3\), got \(2, 4\)"),
        ((torch.ones(2, 1, 3), 1.0), ValueError, r"x must have shape"),
        ((torch.ones(2, 3).long(), 1.0), TypeError, "x must be real"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"sigma must have shape \(\) or \(2,\)"),
        ((torch.ones(2, 3), -1.0), ValueError, "at least 0"),
        ((torch.ones(2, 3), float("nan")), ValueError, "at least 0"),
        ((torch.ones(2, 3), "1"), TypeError, "sigma must be a real number"),
        ((torch.ones(2, 3), 1.0, torch.ones(3).long()), ValueError, r"y must have shape \(2,\)"),
        ((torch.ones(2, 3), 1.0, torch.ones(2)), TypeError, "y must be integers"),
        ((torch.ones(2, 3), 1.0, torch.tensor([0, 7])), ValueError, "label 7; there are .0, 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ExactDenoiser(torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))(*arguments)
    if "label 7" in text:
        with pytest.raises(ValueError, match="no labels"):
            ExactDenoiser(torch.ones(4, 3))(*arguments)


# For a process


@pytest.mark.parametrize(
    "process",
    [VPLinear(), VPCosine(), EDM(), FlowMatching(), DiscreteVP.linear(50)],
    ids=lambda process: type(process).__name__,
)
def test_for_process_is_the_mean_given_the_state(process: Process) -> None:
    images = randn(9, 4)
    f = for_process(ExactDenoiser(images), process)
    for t in (process.t_min + (process.t_max - process.t_min) * u for u in (0.1, 0.5, 1.0)):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        x = alpha * images[:3] + sigma * randn(3, 4, seed=1)
        squares = (x[:, None] - alpha * images).square().sum(-1)
        expected = torch.softmax(-squares / (2 * sigma**2), 1) @ images
        time = torch.tensor(t, dtype=torch.float64)
        # FlowMatching has no data left at t = 1: there the mean is that of sigma / alpha = 1e6.
        budget = FLOAT64 if alpha > 0 else 1e-5
        assert_close(f(x, time), expected, budget)
        assert_close(f(x, time.expand(3)), expected, budget)


@pytest.mark.parametrize("split", [False, True], ids=["one call", "two calls"])
def test_guided_sampling_of_a_class(split: bool) -> None:
    process = VPCosine()
    centers = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    images = centers.repeat(5, 1) + 0.05 * randn(15, 2).float()
    labels = torch.arange(15) % 3
    plan = SolverPlan.build(process, time_grid(process, 30, "log_snr"), prediction="x0")
    y = torch.tensor([0, 1, 2, 0])
    made = diffusion.sample(
        *(for_process(ExactDenoiser(images, labels), process), randn(4, 2).float(), plan),
        kwargs={"y": y},
        unconditional={"y": torch.full_like(y, -1)},
        guidance=1.0,
        split_guidance=split,
    )
    assert (torch.cdist(made, centers).argmin(1) == y).all()
    assert (torch.cdist(made, images).amin(1) < 0.05).all()


# Networks of others


class Unet(nn.Module):
    """What diffusers' models look like: of the exact noise, x0 or v of a data set."""

    def __init__(self, process: DiscreteVP, images: Tensor, kind: str) -> None:
        super().__init__()
        self.model = for_process(ExactDenoiser(images), process)
        self.process, self.kind = process, kind
        self.times: list[Tensor] = []

    def forward(self, z: Tensor, timestep: Tensor, **kwargs: Any) -> SimpleNamespace:
        self.times.append(timestep)
        t = timestep.double()
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        x0 = self.model(z, t)
        alpha, sigma = (v.reshape(-1, *[1] * (z.ndim - 1)) for v in (alpha, sigma))
        eps = (z - alpha * x0) / sigma
        return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[self.kind]


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["number", "per sample"])
def test_predictions_of_diffusers(kind: str, per_sample: bool) -> None:
    process, images = DiscreteVP.scaled_linear(), randn(9, 2, 3, 3)
    scheduler = SimpleNamespace(
        alphas_cumprod=process.alphas_cumprod.float(), config=SimpleNamespace(prediction_type=kind)
    )
    unet = Unet(process, images, kind)
    denoiser = from_diffusers(unet, scheduler)
    x = images[:4] + randn(4, 2, 3, 3, seed=1)
    sigma = torch.tensor([0.3, 1.0, 2.0, 9.0], dtype=torch.float64) if per_sample else 1.0
    # Times are float32 in a model's eyes: of 1000 they keep 3e-5.
    assert_close(denoiser(x, sigma), ExactDenoiser(images)(x, sigma), 1e-5)
    assert unet.times[0].shape == ((4,) if per_sample else ())


def test_times_of_a_model_end_where_it_was_trained() -> None:
    process = DiscreteVP.linear(100)
    scheduler = SimpleNamespace(
        alphas_cumprod=process.alphas_cumprod, config=SimpleNamespace(prediction_type="sample")
    )
    unet = Unet(process, randn(5, 2), "sample")
    from_diffusers(unet, scheduler)(randn(2, 2), torch.tensor([1e-5, 1e5]))
    assert unet.times[0].tolist() == [0.0, 99.0]


def test_a_tiny_unet_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,  # with a learned variance
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    denoiser = from_diffusers(unet, scheduler)
    process = denoiser.process
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 1]), torch.tensor(400)
    with torch.no_grad():
        eps = unet(x, t, class_labels=y).sample[:, :3]
        expected = scheduler.step(torch.cat([eps, eps], 1), 400, x).pred_original_sample
        ours = for_process(denoiser, process)(x, t, y=y)
    clipped = ours.clamp(-1, 1)  # as the scheduler does
    assert rel_rms(clipped, expected) < 1e-4 and expected.abs().lt(1).any()
    plan = SolverPlan.build(process, time_grid(process, 4, "trailing"), prediction="x0")
    eps_plan = SolverPlan.build(process, time_grid(process, 4, "trailing"))
    with torch.no_grad():
        made = diffusion.sample(for_process(denoiser, process), x, plan, kwargs={"y": y})
        wanted = diffusion.sample(
            lambda x, t: unet(x, t, class_labels=y).sample[:, :3], x, eps_plan
        )
    assert_close(made, wanted, 1e-4)


def test_bad_schedulers() -> None:
    with pytest.raises(TypeError, match="alphas_cumprod"):
        from_diffusers(nn.Identity(), SimpleNamespace())
    config = SimpleNamespace(prediction_type="flow_prediction")
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.9, 0.5]), config=config)
    with pytest.raises(NotImplementedError, match="flow_prediction"):
        from_diffusers(nn.Identity(), scheduler)


def test_networks_of_edm() -> None:
    calls = []

    class Net:
        label_dim = 3

        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            calls.append((sigma, class_labels))
            return x.float() / sigma.reshape(-1, 1)

    x = randn(2, 4)
    made = from_edm(Net())(x, 2.0, torch.tensor([2, -1]))
    assert made.dtype == torch.float64
    assert_close(made, x / 2, 1e-7)
    sigma, labels = calls.pop()
    assert sigma.dtype == torch.float32 and sigma.tolist() == [2.0, 2.0]
    assert labels.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    from_edm(Net())(x, torch.tensor([1.0, 3.0]))
    sigma, labels = calls.pop()
    assert sigma.tolist() == [1.0, 3.0] and labels.eq(0).all() and labels.shape == (2, 3)
    from_edm(Net(), classes=0)(x, 1.0)
    assert calls.pop()[1] is None
    with pytest.raises(ValueError, match="no classes"):
        from_edm(Net(), classes=0)(x, 1.0, torch.tensor([0, 1]))
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=rf"0 to 2, or -1 for none, got {wrong}"):
            from_edm(Net())(x, 1.0, torch.tensor([0, wrong]))
    assert not calls
    for process in (None, EDM()):
        with pytest.raises(ValueError, match=r"the shape of x, \(2, 4\), got \(2, 1\)"):
            from_edm(lambda x, *rest: x[:, :1], process=process)(x, 1.0)
        with pytest.raises(TypeError, match=r"what the network returns must be a torch\.Tensor"):
            from_edm(lambda *given: None, process=process)(x, 1.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"x must be real floating point .*, got torch\.int64"):
            from_edm(lambda x, *rest: x, process=process)(x.long(), 1.0)
    with pytest.raises(TypeError, match="callable"):
        from_edm(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", [EDM(), VE(), VPLinear(), FDM(EDM())], ids=str)
def test_without_noise_a_network_of_edm_changes_nothing(process: Process) -> None:
    """Its input c_noise, log sigma, must stay finite."""
    denoiser = from_edm(lambda x, c_noise, labels: c_noise.cos()[:, None] * x, process=process)
    x = randn(2, 4)
    assert torch.equal(denoiser(x, 0.0), x)
    mixed = denoiser(x, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], x[0]) and torch.equal(mixed[1], denoiser(x, 1.0)[1])
