"""The steps of the demo, in order."""

from __future__ import annotations

import argparse
import copy
import platform
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dsno_kernels as dk
from dsno_kernels._files import write_json
from dsno_kernels.demo import compare, figure, student, teacher
from dsno_kernels.demo.figure import Row, Section
from dsno_kernels.training import images as data
from dsno_kernels.training.distributed import choose_device
from dsno_kernels.training.errors import CommandError, prepare_folder

FRAMES = 4  # T of the published models
TEACHER_STEPS = 48
# Teacher trajectories to learn from: each noise is drawn a few times in the default number of
# steps.
MAX_NOISES = 8192
# The teacher compares each noise with every image: more than this would take minutes and teach a
# small student no more.
MAX_IMAGES = 4096
HELD_OUT = 512  # noises no training step sees; quality is measured on them


def run(options: argparse.Namespace) -> None:
    """Train, sample, measure, write.

    Raises:
        CommandError: the device, the data or the output folder cannot be used.
    """
    started = time.perf_counter()
    device = choose_device(options.device)
    prepare_folder(options.out)
    torch.manual_seed(options.seed)
    images = load(options, device)
    packaged = None if options.data else packaged_samples(options.seed, device)

    noise, held_out = (
        torch.randn(count, *images.shape[1:]).to(device)
        for count in (min(MAX_NOISES, 4 * student.BATCH * options.steps), HELD_OUT)
    )
    trajectories = partial(teacher.trajectories, images=images, steps=TEACHER_STEPS, frames=FRAMES)
    say(f"Teacher: the images' exact denoiser, {TEACHER_STEPS} DEIS steps, {len(noise):,} noises")
    frames, logsnr = trajectories(noise)
    wanted, _ = trajectories(held_out)

    model = student.build(images.shape[1], images.shape[2], device)
    swapped = dk.swap_layers(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"Student: DSNO, {parameters:,} parameters, {swapped} temporal layers on our kernels")
    with tqdm(total=options.steps, desc="training", unit="step", dynamic_ncols=True) as bar:

        def report(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        model = student.train(model, noise, frames, logsnr, options.steps, report)
    made = student.sample(model, held_out, logsnr)

    say("Measuring the layers in turns")
    sections = [
        quality_section(images, wanted[:, -1], made[:, -1]),
        *layer_sections(device),
        training_section(model, (noise[: student.BATCH], frames[: student.BATCH], logsnr)),
    ]
    write(options.out, images, held_out, wanted, made, packaged, sections)
    for section in sections:
        print(f"\n{figure.table(section)}")
    print(f"\n{describe(device)}; {time.perf_counter() - started:.0f} s in all")
    print(f"Wrote {options.out / 'demo.png'} and {options.out / 'demo.json'}")


def say(line: str) -> None:
    """A line of progress, at once also where the output is a file."""
    print(line, flush=True)


def load(options: argparse.Namespace, device: torch.device) -> Tensor:
    if options.data is None:
        images = data.digits().images
        say(f"Data: {len(images):,} real 8x8 digits (scikit-learn)")
    else:
        images = data.folder(options.data, options.size, limit=MAX_IMAGES).images
        kind = "gray" if images.shape[1] == 1 else "RGB"
        size = f"{options.size}x{options.size}"
        say(f"Data: {len(images):,} images of {options.data}, as {size} {kind}")
    return images.to(device)


def packaged_samples(seed: int, device: torch.device) -> Tensor:
    """Digits of the student that comes with the package, one evaluation each."""
    count = figure.COLUMNS * figure.ROWS
    started = time.perf_counter()
    samples = dk.generate("digits", count, seed=seed, device=device)
    say(
        f"Packaged student: {count} digits in {time.perf_counter() - started:.2f} s, loading it too"
    )
    return samples


def quality_section(images: Tensor, wanted: Tensor, made: Tensor) -> Section:
    """Teacher and student on noises that no training step saw."""
    normal = compare.normal_samples(images, len(made))
    neighbors = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(torch.inf).amin(1)
    between = f"real images to each other: {neighbors.mean():.2f}" if len(images) > 1 else ""
    distances = [compare.nearest_distance(samples, images) for samples in (wanted, made, normal)]
    frechet = [compare.frechet_distance(samples, images) for samples in (wanted, made)]
    shift = (made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    return Section(
        f"Samples ({len(made)} new noises)",
        ("teacher", "student"),
        [
            Row("network evaluations a sample", str(TEACHER_STEPS), "1", f"{TEACHER_STEPS}x fewer"),
            Row(
                "distance to the nearest real image",
                f"{distances[0]:.2f}",
                f"{distances[1]:.2f}",
                between,
            ),
            Row("the same of a normal fit's draws", "", f"{distances[2]:.2f}", "no model at all"),
            Row(
                "Fréchet distance on pixels",
                f"{frechet[0]:.2f}",
                f"{frechet[1]:.2f}",
                "0: mean and covariance agree",
            ),
            Row("student - teacher, relative RMS", "", f"{shift:.2f}", "same noise"),
        ],
    )


def layer_sections(device: torch.device) -> list[Section]:
    """The temporal layer of CIFAR-10's DSNO: same numbers, less time, less memory."""
    layer, x, grad = compare.layer_case(device)
    ours = compare.swapped_copy(layer)
    pairs = zip(
        ("y", "gradient of x", "gradient of the weights"),
        compare.layer_results(ours, x, grad),
        compare.layer_results(layer, x, grad),
        strict=True,
    )
    parity = [(name, compare.parity(a, b)) for name, a, b in pairs]
    rows = [
        Row(name, f"{p.relative_rms:.1e}", f"{p.largest:.1e}", "float32 rounding")
        for name, p in parity
    ]

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    times = [
        ("forward", compare.medians(partial(forward, layer), partial(forward, ours), device)),
        (
            "forward + backward",
            compare.medians(
                partial(compare.layer_results, layer, x, grad),
                partial(compare.layer_results, ours, x, grad),
                device,
            ),
        ),
    ]
    memory = [
        (
            "kept for backward",
            [compare.saved_bytes(partial(module, x)) for module in (layer, ours)],
        ),
        (
            "peak of forward + backward",
            [
                compare.peak_bytes(partial(compare.layer_results, module, x, grad), device)
                for module in (layer, ours)
            ],
        ),
    ]
    shape = " x ".join(map(str, compare.LAYER_SHAPE))
    return [
        Section(f"Same numbers ({shape})", ("rel. RMS", "largest"), rows),
        Section(
            "Temporal layer",
            ("original", "swapped"),
            [duration_row(name, pair) for name, pair in times]
            + [memory_row(name, *pair) for name, pair in memory],
        ),
    ]


def training_section(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Section:
    """One training step of the student, its layers restored and swapped."""
    original = copy.deepcopy(model)
    dk.restore_layers(original)
    ours = compare.swapped_copy(original)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        student.loss_of(module, *batch).backward()

    device = batch[0].device
    pair = compare.medians(partial(step, original), partial(step, ours), device)
    kept = [
        compare.saved_bytes(partial(student.loss_of, module, *batch)) for module in (original, ours)
    ]
    peak = [compare.peak_bytes(partial(step, module), device) for module in (original, ours)]
    return Section(
        f"Student, forward + backward (batch {len(batch[0])})",
        ("original", "swapped"),
        [
            duration_row("time", pair),
            memory_row("kept for backward", *kept),
            memory_row("peak", *peak),
        ],
    )


def duration_row(name: str, pair: compare.Pair) -> Row:
    first, second = (f"{seconds * 1e3:.1f} ms" for seconds in pair)
    return Row(name, first, second, versus(*pair, "faster", "slower"))


def memory_row(name: str, original: int, ours: int) -> Row:
    first, second = (f"{size / 2**20:.1f} MiB" for size in (original, ours))
    return Row(name, first, second, versus(original, ours, "less", "more"))


def versus(original: float, ours: float, better: str, worse: str) -> str:
    """How many times better or worse ours is, in words."""
    if ours <= original:
        return f"{original / ours:.2f}x {better}"
    return f"{ours / original:.2f}x {worse}"


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"CPU ({platform.machine()}), {threads}, PyTorch {torch.__version__}"


def write(
    folder: Path,
    images: Tensor,
    noise: Tensor,
    wanted: Tensor,
    made: Tensor,
    packaged: Tensor | None,
    sections: list[Section],
) -> None:
    """The picture and the numbers; a file of an earlier run is replaced only by a complete one."""
    shown = figure.COLUMNS * figure.ROWS
    order = torch.randperm(len(images))[:shown].to(images.device)
    blocks = [
        ("real images", images[order]),
        (f"teacher, {TEACHER_STEPS} evaluations a sample", wanted[:shown, -1]),
        ("student, the same noises, ONE evaluation a sample", made[:shown, -1]),
    ]
    if packaged is not None:
        blocks.append(("packaged student of `make digits`, 0..9 in turn, ONE evaluation", packaged))
    few = slice(0, 6)
    strips = [
        (title, torch.cat([noise[few, None], frames[few]], dim=1))
        for title, frames in (
            ("teacher: noise, 4 states of the ODE", wanted),
            ("student: all 4 at once", made),
        )
    ]
    try:
        figure.draw(folder / "demo.png", blocks, strips, sections)
        write_json(
            folder / "demo.json", {s.title: [row._asdict() for row in s.rows] for s in sections}
        )
    except OSError as error:
        raise CommandError(
            f"--out {folder} cannot be written ({error.strerror}); give a folder that can"
        ) from None
