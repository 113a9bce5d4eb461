"""The command `fastscore recipe`."""

from fastscore import datasets, schedules


def recipe(
    data: str = "digits",
    budget: int = 1000,
    sigma_max: float | None = None,
    sigma_min: float = 0.01,
    overlap: float = 0.5,
    denoise: bool = True,
    seed: int = 0,
) -> None:
    """Choose noise levels and step sizes for a data set and a number of network calls.

    They are those of NCSNv2's techniques 1, 2 and 4.

    Args:
        data: digits, mnist, fashion, a folder of images, or an .npz or .npy file.
        budget: network calls for one batch of samples.
        sigma_max: largest noise; the largest distance between samples unless given.
        sigma_min: smallest noise.
        overlap: of neighbouring levels; the official NCSNv2 configurations have 0.567.
        denoise: keep one call for the final noise-free step.
        seed: of the random subset in which distances are looked for where the data are many.
    """
    options = {"sigma_max": sigma_max, "sigma_min": sigma_min, "overlap": overlap}
    options |= {"denoise": denoise, "seed": seed}
    plan = schedules.recipe(datasets.load(data)[0], budget, **options)

    first, last = plan.sigmas[0], plan.sigmas[-1]
    ladder = f"--sigma-max {first:.6g} --sigma-min {last:.6g} --levels {len(plan.sigmas)}"
    steps = f"--steps-per-level {plan.steps_per_level} --step-size {plan.step_size:.6g}"
    print(f"{plan}\n\nfastscore train --data {data} --out run {ladder}")
    print(f"fastscore sample run {steps}")
