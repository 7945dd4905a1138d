"""The fused schedulers inside diffusers: configurations, saved and loaded, and pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers

from tests.scheduler_runs import SCHEDULERS, original, ours, start

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

ALL = (*SCHEDULERS, "DDIMScheduler")


# Configurations


@pytest.mark.parametrize("name", ALL)
def test_configurations_go_both_ways(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "thresholding": True}
    config |= {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    theirs = original(name, **config)
    mine = type(ours(name)).from_config(theirs.config)
    assert mine.config.match_diffusers is False
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert mine.config[key] == value, key
    back = type(theirs).from_config(mine.config)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} | {
        "match_diffusers": False
    } == {k: v for k, v in mine.config.items() if not k.startswith("_")}

    ours(name, **config, match_diffusers=True).save_pretrained(tmp_path / "mine")
    loaded = type(mine).from_pretrained(tmp_path / "mine")
    assert loaded.config.match_diffusers is True and loaded.config.beta_end == 0.012
    assert type(theirs).from_pretrained(tmp_path / "mine").config.beta_end == 0.012
    theirs.save_pretrained(tmp_path / "theirs")
    assert type(mine).from_pretrained(tmp_path / "theirs").config.prediction_type == "v_prediction"
    assert type(mine).from_config(theirs.config, match_diffusers=True).config.match_diffusers
    assert mine._compatibles == theirs._compatibles
    assert set(mine.compatibles) == set(theirs.compatibles)
    assert mine.order == theirs.order and mine.init_noise_sigma == theirs.init_noise_sigma
    assert len(mine) == len(theirs)


def test_defaults_of_another_scheduler_are_not_taken() -> None:
    """A default of the original is ours too, not a choice: as between diffusers' schedulers."""
    config = original("UniPCMultistepScheduler").config
    assert config.solver_type == "bh2"
    assert ours("DEISMultistepScheduler").from_config(config).config.solver_type == "logrho"


def test_positional_arguments() -> None:
    scheduler = type(ours("DEISMultistepScheduler"))(500, 0.001)
    assert scheduler.config.num_train_timesteps == 500 and scheduler.config.beta_start == 0.001


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unknown_predictions_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample"):
        ours(name, prediction_type="score").set_timesteps(4)
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample"):
        ours("DDIMScheduler", prediction_type="flow_prediction").set_timesteps(4)


def test_scale_model_input_and_tuples() -> None:
    for name in ALL:
        scheduler, x = ours(name), start()
        scheduler.set_timesteps(8)
        assert scheduler.scale_model_input(x, 3) is x
        found = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        assert isinstance(found, tuple) and len(found) == 1 + (name == "DDIMScheduler")


# Pipelines


def _unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def _images(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(
        batch_size=2, num_inference_steps=6, generator=generator, output_type="np", **options
    ).images
    return torch.from_numpy(images)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_pipeline(eta: float) -> None:
    pipeline = diffusers.DDIMPipeline(_unet(), original("DDIMScheduler"))
    expected = _images(pipeline, eta=eta)
    pipeline.scheduler = ours("DDIMScheduler").from_config(pipeline.scheduler.config)
    assert_close(_images(pipeline, eta=eta), expected, 1e-4)
    assert expected.std() > 0.01


def test_ddpm_pipeline_swaps_in_five_lines(tmp_path: Path) -> None:
    """README's example, on a pipeline of one's own; then it is saved and loaded so."""
    path = tmp_path / "original"
    diffusers.DDPMPipeline(_unet(), diffusers.DDPMScheduler()).save_pretrained(path)

    from diffusers import DDPMPipeline

    from dsno_kernels.integrations.diffusers import FusedDPMSolverMultistepScheduler

    pipeline = DDPMPipeline.from_pretrained(path)
    config = pipeline.scheduler.config
    pipeline.scheduler = FusedDPMSolverMultistepScheduler.from_config(config)
    actual = _images(pipeline)

    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    expected = _images(pipeline)
    assert_close(actual, expected, 1e-4)
    assert expected.std() > 0.01
    pipeline.scheduler = FusedDPMSolverMultistepScheduler.from_config(config)
    pipeline.save_pretrained(tmp_path / "swapped")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "swapped")
    assert type(loaded.scheduler) is FusedDPMSolverMultistepScheduler
    assert_close(_images(loaded), expected, 1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latent_pipeline_with_guidance(name: str) -> None:
    """DiTPipeline: classifier-free guidance over latents."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipeline = diffusers.DiTPipeline(transformer, vae, original(name, solver_order=2))
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        found = pipeline([1, 2], generator=generator, num_inference_steps=5, output_type="np")
        return torch.from_numpy(found.images)

    expected = images()
    pipeline.scheduler = type(ours(name)).from_config(pipeline.scheduler.config)
    assert_close(images(), expected, 1e-4)
    assert expected.std() > 0.01


# Without diffusers


def test_without_diffusers_one_sentence_says_so() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import dsno_kernels, dsno_kernels.integrations as integrations\n"
        "integrations.diffusers"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "ImportError: dsno_kernels.integrations.diffusers needs diffusers" in found.stderr


def test_importing_the_library_leaves_diffusers_alone() -> None:
    code = (
        "import sys, dsno_kernels, dsno_kernels.integrations\nassert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
